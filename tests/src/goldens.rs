//! Logits of transformers in float32, made by `scripts/oracle/make_logits.py` and kept in `tests/data/logits`.

use crate::npy;
use crate::random_model::RandomModel;
use kestrel_formats::GgmlType;
use serde_json::Value;
use std::path::PathBuf;

/// `tests/data`.
pub fn data_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data")
}

/// The tiny trained checkpoint.
pub fn tiny_dir() -> PathBuf {
    data_dir().join("tiny-falcon-mamba")
}

/// One model's prompt and what transformers says to it.
pub struct Golden {
    /// Key in goldens.json.
    pub name: String,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// The most likely next token after each position.
    pub top1: Vec<u32>,
    /// Length of a row of logits.
    pub vocab_size: usize,
    /// max |logit| of each position.
    max_abs: Vec<f64>,
    /// [n_tokens, vocab_size], logit / max_abs of the position · step, rounded.
    quantized: Vec<i16>,
    step: f64,
    entry: Value,
}

/// How far logits are from a golden.
pub struct Comparison {
    /// Largest |logit - golden| / max |golden logit of that position|.
    pub worst: f64,
    /// Where that is: (position, token).
    pub at: (usize, usize),
    /// Positions whose most likely token differs.
    pub top1_differs: Vec<usize>,
}

/// A greedy continuation by transformers.
pub struct Greedy {
    /// The text continued.
    pub prompt: String,
    /// Its ids.
    pub prompt_tokens: Vec<u32>,
    /// What follows.
    pub tokens: Vec<u32>,
}

fn all() -> Value {
    parsed("logits")
}

/// goldens.json of a folder of `tests/data`.
pub fn parsed(folder: &str) -> Value {
    let path = data_dir().join(folder).join("goldens.json");
    serde_json::from_str(&std::fs::read_to_string(&path).expect("goldens.json"))
        .expect("goldens.json is JSON")
}

/// Names of the random models, in order.
pub fn random_names() -> Vec<String> {
    let all = all();
    let models = all["models"].as_object().expect("models").iter();
    models.filter(|(_, entry)| !entry["seed"].is_null()).map(|(name, _)| name.clone()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("an array of ids").iter().map(|v| v.as_u64().expect("an id") as u32).collect()
}

impl Golden {
    /// The golden with this name of a model without bitsandbytes.
    pub fn load(name: &str) -> Self {
        Self::load_from("logits", name)
    }

    /// The golden with this name in a folder of `tests/data`.
    pub fn load_from(folder: &str, name: &str) -> Self {
        let all = parsed(folder);
        let entry = all["models"][name].clone();
        let path = data_dir().join(folder).join(format!("{name}.npy"));
        let (rows, vocab_size, quantized) = npy::read_i16(&path);
        let max_abs: Vec<f64> = entry["max_abs"]
            .as_array()
            .expect("max_abs")
            .iter()
            .map(|v| v.as_f64().expect("a number"))
            .collect();
        assert_eq!(rows, max_abs.len());
        Self {
            name: name.to_owned(),
            tokens: ids(&entry["tokens"]),
            top1: ids(&entry["top1"]),
            vocab_size,
            max_abs,
            quantized,
            step: all["step"].as_f64().expect("step"),
            entry,
        }
    }

    /// The checkpoint it was made from, for a random model.
    pub fn model(&self) -> RandomModel {
        RandomModel {
            config: self.entry["config"].clone(),
            dtype: GgmlType::from_name(self.entry["dtype"].as_str().expect("dtype")).expect("a known dtype"),
            seed: self.entry["seed"].as_u64().expect("seed"),
            x_proj_std: self.entry["x_proj_std"].as_f64().expect("x_proj_std"),
        }
    }

    /// SHA-256 of every matrix as bitsandbytes dequantizes it, f32, by its name in the checkpoint.
    pub fn dequantized_sha256(&self) -> Vec<(String, String)> {
        let digests = self.entry["sha256"].as_object().expect("sha256").iter();
        digests.map(|(name, digest)| (name.clone(), digest.as_str().expect("a digest").to_owned())).collect()
    }

    /// SHA-256 of that checkpoint's shard as Python wrote it, in hexadecimal.
    pub fn sha256(&self) -> &str {
        self.entry["sha256"].as_str().expect("sha256")
    }

    /// Greedy continuations (tiny trained model only).
    pub fn greedy(&self) -> Vec<Greedy> {
        let of = |g: &Value| Greedy {
            prompt: g["prompt"].as_str().expect("prompt").to_owned(),
            prompt_tokens: ids(&g["prompt_tokens"]),
            tokens: ids(&g["tokens"]),
        };
        self.entry["greedy"].as_array().expect("greedy").iter().map(of).collect()
    }

    /// Compares every logit; `logits` is [n_tokens, vocab_size]. The stored form itself is off by up to 1.6e-5.
    pub fn compare<T: Copy + Into<f64>>(&self, logits: &[T]) -> Comparison {
        assert_eq!(logits.len(), self.quantized.len(), "{}: logits of another shape", self.name);
        let (mut worst, mut at, mut top1_differs) = (0.0, (0, 0), Vec::new());
        for (position, row) in logits.chunks_exact(self.vocab_size).enumerate() {
            let golden = &self.quantized[position * self.vocab_size..][..self.vocab_size];
            for (token, (&got, &want)) in row.iter().zip(golden).enumerate() {
                let difference = (got.into() / self.max_abs[position] - f64::from(want) / self.step).abs();
                // A NaN must come out as the worst, whatever it is compared with.
                if difference > worst || difference.is_nan() {
                    (worst, at) = (difference, (position, token));
                }
            }
            if argmax(row) != self.top1[position] {
                top1_differs.push(position);
            }
        }
        Comparison { worst, at, top1_differs }
    }
}

/// Index of the largest value, the first of equals.
pub fn argmax<T: Copy + Into<f64>>(row: &[T]) -> u32 {
    let mut best = 0;
    for (i, &v) in row.iter().enumerate() {
        if v.into() > row[best].into() {
            best = i;
        }
    }
    best as u32
}

impl Comparison {
    /// Panics unless every logit is within `tolerance` and the most likely token is the same everywhere.
    pub fn expect_within(&self, tolerance: f64, who: &str) {
        assert!(
            self.worst <= tolerance,
            "{who}: off by {:.2e} of max |logit| at (position, token) {:?}",
            self.worst,
            self.at
        );
        assert!(self.top1_differs.is_empty(), "{who}: another top-1 at positions {:?}", self.top1_differs);
    }
}
