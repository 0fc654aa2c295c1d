//! Random checkpoints, byte for byte those of `scripts/oracle/random_model.py`, so that goldens need no stored weights.
//!
//! Every weight is an integer from a counter-based generator (splitmix64), turned into a float by one multiplication and
//! one addition in f32: both languages round those alike.

use crate::reference::{Reference, Tensors};
use half::{bf16, f16};
use kestrel_formats::GgmlType;
use kestrel_formats::arch::{self, Arch, HyperParams, Role, TensorSpec};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Standard deviation of the sum of four independent uniform 16-bit integers.
fn sum_std() -> f64 {
    (4.0 * (65536f64.powi(2) - 1.0) / 12.0).sqrt()
}

/// What fixes a random checkpoint.
#[derive(Clone)]
pub struct RandomModel {
    /// config.json, written as it is.
    pub config: Value,
    /// F32, F16 or BF16.
    pub dtype: GgmlType,
    /// Start of every stream of numbers.
    pub seed: u64,
    /// Standard deviation of x_proj: how small dt, B and C are before their norms.
    pub x_proj_std: f64,
}

impl RandomModel {
    /// The hyperparameters that config.json states, read without the product's reader.
    pub fn hyperparams(&self) -> HyperParams {
        let number =
            |key: &str| self.config[key].as_u64().unwrap_or_else(|| panic!("config has no {key}")) as usize;
        let eps = |key: &str| self.config[key].as_f64().map(|v| v as f32);
        HyperParams {
            arch: if eps("mixer_rms_eps").is_some() { Arch::FalconMamba } else { Arch::Mamba },
            d_model: number("hidden_size"),
            d_inner: number("intermediate_size"),
            d_state: number("state_size"),
            d_conv: number("conv_kernel"),
            dt_rank: number("time_step_rank"),
            n_layer: number("num_hidden_layers"),
            vocab_size: number("vocab_size"),
            layer_norm_epsilon: eps("layer_norm_epsilon").expect("config has layer_norm_epsilon"),
            mixer_rms_eps: eps("mixer_rms_eps").unwrap_or(1e-6),
        }
    }

    /// Whether the output matrix is the embedding.
    pub fn tied(&self) -> bool {
        self.config["tie_word_embeddings"] == true
    }

    /// Every tensor of the checkpoint in the byte order of its names: (row of the table, layer, weights before rounding
    /// to the dtype).
    fn tensors(&self) -> Vec<(&'static TensorSpec, usize, Vec<f32>)> {
        let h = self.hyperparams();
        let mut all = arch::tensors(&h, self.tied());
        all.sort_by_key(|(spec, layer)| spec.hf_name(*layer));
        all.into_iter().map(|(spec, layer)| (spec, layer, self.weights(&h, spec, layer))).collect()
    }

    fn weights(&self, h: &HyperParams, spec: &TensorSpec, layer: usize) -> Vec<f32> {
        let shape = (spec.hf_shape)(h);
        let (mean, std) = match spec.role {
            Role::TokenEmbd => (0.0, if self.tied() { 0.06 } else { 0.5 }),
            Role::AttnNorm | Role::OutputNorm => (1.0, 0.1),
            Role::SsmIn => (0.0, 1.0 / (h.d_model as f64).sqrt()),
            Role::SsmConv1d => (0.0, 0.4),
            Role::SsmConv1dBias => (0.0, 0.1),
            Role::SsmX => (0.0, self.x_proj_std),
            Role::SsmDt => (0.0, 1.0 / (h.dt_rank as f64).sqrt()),
            Role::SsmDtBias => (-4.0, 1.0),
            Role::SsmA => (f32::NAN, 0.05), // its mean depends on the column, see below
            Role::SsmD => (1.0, 0.2),
            Role::SsmOut => (0.0, 1.0 / (h.d_inner as f64).sqrt()),
            Role::Output => (0.0, 2.0 / (h.d_model as f64).sqrt()),
        };
        let mean = |i: usize| match spec.role {
            Role::SsmA => 0.175f32 * (i % h.d_state + 1) as f32,
            _ => mean,
        };
        normal(&spec.hf_name(layer), self.seed, shape.iter().product(), mean, std)
    }

    /// The bytes of model.safetensors.
    pub fn safetensors(&self) -> Vec<u8> {
        let h = self.hyperparams();
        let (mut header, mut data) = (Map::new(), Vec::new());
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        for (spec, layer, weights) in self.tensors() {
            let start = data.len();
            for w in weights {
                match self.dtype {
                    GgmlType::F32 => data.extend(w.to_le_bytes()),
                    GgmlType::F16 => data.extend(f16::from_f32(w).to_le_bytes()),
                    GgmlType::Bf16 => data.extend(bf16::from_f32(w).to_le_bytes()),
                    other => panic!("checkpoints have no {other}"),
                }
            }
            let entry = json!({"dtype": self.dtype.name(), "shape": (spec.hf_shape)(&h), "data_offsets": [start, data.len()]});
            header.insert(spec.hf_name(layer), entry);
        }
        let mut text = Value::Object(header).to_string();
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend(text.into_bytes());
        file.extend(data);
        file
    }

    /// Writes config.json and model.safetensors into an existing folder.
    pub fn write(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config.to_string()).expect("writing config.json");
        std::fs::write(dir.join("model.safetensors"), self.safetensors()).expect("writing model.safetensors");
    }

    /// The reference model of these weights as published: x_proj unscaled, the config's own mixer_rms_eps.
    pub fn reference(&self) -> Reference {
        let h = self.hyperparams();
        let round = |w: f32| match self.dtype {
            GgmlType::F16 => f16::from_f32(w).to_f32(),
            GgmlType::Bf16 => bf16::from_f32(w).to_f32(),
            _ => w,
        };
        let mut tensors = Tensors::new();
        for (spec, layer, weights) in self.tensors() {
            let stored = weights.into_iter().map(round);
            let values = match spec.role {
                Role::SsmA => stored.map(|w| -f64::from(w).exp() as f32).collect(),
                _ => stored.collect(),
            };
            tensors.insert(spec.gguf_name(layer), ((spec.shape)(&h), values));
        }
        Reference { h, tensors }
    }
}

/// `n` roughly normal numbers around `mean(i)`.
pub fn normal(name: &str, seed: u64, n: usize, mean: impl Fn(usize) -> f32, std: f64) -> Vec<f32> {
    let unit = (std / sum_std()) as f32;
    let start = fnv1a(name, seed);
    (0..n).map(|i| mean(i) + integer(start, i as u64) as f32 * unit).collect()
}

/// 64-bit FNV-1a of a name, from a start that depends on the seed: each tensor has its own stream.
fn fnv1a(text: &str, seed: u64) -> u64 {
    text.bytes()
        .fold(0xCBF2_9CE4_8422_2325 ^ seed, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

/// The i-th integer of a stream, in -131070..=131070 and roughly normal: splitmix64, its four 16-bit words summed.
fn integer(start: u64, i: u64) -> i32 {
    let mut z = start.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    [0, 16, 32, 48].map(|s| (z >> s & 0xFFFF) as i32).iter().sum::<i32>() - 131_070
}
