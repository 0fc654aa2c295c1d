//! Builds checkpoint folders, right or wrong. It shares no code with `kestrel_formats::checkpoint`.
#![allow(missing_docs)]

use crate::temp_dir::TempDir;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// A tensor of a safetensors file. Its data is zeros.
#[derive(Clone)]
pub struct RawTensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
}

impl RawTensor {
    pub fn new(name: &str, dtype: &str, shape: &[u64]) -> Self {
        Self { name: name.to_owned(), dtype: dtype.to_owned(), shape: shape.to_vec() }
    }

    fn n_bytes(&self) -> u64 {
        let width = match self.dtype.as_str() {
            "F64" | "I64" => 8,
            "F32" => 4,
            "U8" | "I8" | "F8_E4M3" => 1,
            _ => 2,
        };
        self.shape.iter().product::<u64>() * width
    }
}

/// A whole safetensors file from the text of its header and the number of data bytes.
pub fn safetensors_bytes(header: &[u8], n_data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header);
    out.resize(out.len() + n_data, 0);
    out
}

/// A correct safetensors file.
pub fn safetensors(tensors: &[RawTensor]) -> Vec<u8> {
    let (mut header, mut end) = (Map::new(), 0);
    for t in tensors {
        let begin = end;
        end += t.n_bytes();
        header.insert(
            t.name.clone(),
            json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, end]}),
        );
    }
    safetensors_bytes(Value::Object(header).to_string().as_bytes(), end as usize)
}

/// A small Falcon Mamba: d_model 8, d_inner 16, d_state 2, d_conv 4, dt_rank 1, one layer.
#[derive(Clone)]
pub struct CheckpointBuilder {
    pub config: Value,
    pub generation: Option<Value>,
    pub tensors: Vec<RawTensor>,
    pub tokenizer: Option<Value>,
    pub tokenizer_config: Option<Value>,
}

impl CheckpointBuilder {
    pub fn new() -> Self {
        Self::with_vocab(16)
    }

    pub fn with_vocab(vocab: u64) -> Self {
        let config = json!({
            "architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "torch_dtype": "bfloat16",
            "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "state_size": 2, "conv_kernel": 4,
            "time_step_rank": 1, "vocab_size": vocab, "expand": 16, "hidden_act": "silu",
            "layer_norm_epsilon": 1e-5, "mixer_rms_eps": 1e-6, "use_bias": false, "use_conv_bias": true,
            "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 11, "pad_token_id": 11,
        });
        let layer =
            |name: &str, shape: &[u64]| RawTensor::new(&format!("backbone.layers.0.{name}"), "BF16", shape);
        let tensors = vec![
            RawTensor::new("backbone.embeddings.weight", "BF16", &[vocab, 8]),
            layer("norm.weight", &[8]),
            layer("mixer.in_proj.weight", &[32, 8]),
            layer("mixer.conv1d.weight", &[16, 1, 4]),
            layer("mixer.conv1d.bias", &[16]),
            layer("mixer.x_proj.weight", &[5, 16]),
            layer("mixer.dt_proj.weight", &[16, 1]),
            layer("mixer.dt_proj.bias", &[16]),
            layer("mixer.A_log", &[16, 2]),
            layer("mixer.D", &[16]),
            layer("mixer.out_proj.weight", &[8, 16]),
            RawTensor::new("backbone.norm_f.weight", "BF16", &[8]),
            RawTensor::new("lm_head.weight", "BF16", &[vocab, 8]),
        ];
        let generation = Some(json!({"bos_token_id": 0, "eos_token_id": 11, "pad_token_id": 11}));
        Self { config, generation, tensors, tokenizer: Some(tokenizer()), tokenizer_config: None }
    }

    /// Sets fields of config.json; null removes one.
    pub fn config(mut self, fields: Value) -> Self {
        let Value::Object(fields) = fields else { panic!("an object of fields") };
        for (name, value) in fields {
            let config = self.config.as_object_mut().expect("an object");
            match value {
                Value::Null => drop(config.remove(&name)),
                value => drop(config.insert(name, value)),
            }
        }
        self
    }

    /// Changes the tokenizer.
    pub fn tokenizer(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(self.tokenizer.as_mut().expect("a tokenizer"));
        self
    }

    /// Removes a tensor.
    pub fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|t| t.name != name);
        self
    }

    /// Writes everything but the weights.
    pub fn write_json(&self, dir: &TempDir) {
        self.write_json_to(dir.path());
    }

    fn write_json_to(&self, dir: &Path) {
        let parts = [
            ("config.json", Some(&self.config)),
            ("generation_config.json", self.generation.as_ref()),
            ("tokenizer.json", self.tokenizer.as_ref()),
            ("tokenizer_config.json", self.tokenizer_config.as_ref()),
        ];
        for (name, value) in parts {
            if let Some(value) = value {
                std::fs::write(dir.join(name), value.to_string()).expect("writing a checkpoint");
            }
        }
    }

    /// Writes the folder with one shard.
    pub fn write(&self) -> TempDir {
        let dir = TempDir::new();
        self.write_into(&dir);
        dir
    }

    /// Writes the folder with one shard into an empty one, whose path is returned.
    pub fn write_into(&self, dir: &TempDir) -> PathBuf {
        self.write_to(dir.path());
        dir.path().to_owned()
    }

    /// Writes everything with one shard.
    pub fn write_to(&self, dir: &Path) {
        self.write_json_to(dir);
        std::fs::write(dir.join("model.safetensors"), safetensors(&self.tensors)).expect("writing a shard");
    }

    /// Writes the folder with two shards, `a.safetensors` and `b.safetensors`, and the given index if any.
    pub fn write_two(&self, index: Option<Value>) -> TempDir {
        let dir = TempDir::new();
        self.write_two_into(&dir, index);
        dir
    }

    /// As [`Self::write_two`], into an empty folder, whose path is returned.
    pub fn write_two_into(&self, dir: &TempDir, index: Option<Value>) -> PathBuf {
        self.write_json(dir);
        let (a, b) = self.tensors.split_at(6);
        dir.file("a.safetensors", &safetensors(a));
        dir.file("b.safetensors", &safetensors(b));
        dir.file(
            "model.safetensors.index.json",
            index.unwrap_or_else(|| self.index()).to_string().as_bytes(),
        );
        dir.path().to_owned()
    }

    /// Gives every element of a 16-bit tensor these bytes in a shard written by [`Self::write_to`].
    pub fn fill(&self, name: &str, element: [u8; 2], shard: &Path) {
        let mut bytes = std::fs::read(shard).expect("a shard");
        let before = self.tensors.iter().take_while(|t| t.name != name);
        let data = self.tensors.iter().map(RawTensor::n_bytes).sum::<u64>() as usize;
        let start = bytes.len() - data + before.map(RawTensor::n_bytes).sum::<u64>() as usize;
        let tensor = self.tensors.iter().find(|t| t.name == name).expect("a tensor of the checkpoint");
        bytes[start..start + tensor.n_bytes() as usize]
            .chunks_exact_mut(2)
            .for_each(|x| x.copy_from_slice(&element));
        std::fs::write(shard, bytes).expect("writing a shard");
    }

    /// The correct index of [`Self::write_two`].
    pub fn index(&self) -> Value {
        let shard = |i: usize| if i < 6 { "a.safetensors" } else { "b.safetensors" };
        let map: Map<String, Value> =
            self.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), shard(i).into())).collect();
        let total: u64 = self.tensors.iter().map(RawTensor::n_bytes).sum();
        json!({"metadata": {"total_size": total}, "weight_map": map})
    }
}

impl Default for CheckpointBuilder {
    fn default() -> Self {
        Self::new()
    }
}

/// A tokenizer of 15 tokens: 12 special ones, and `a`, `b`, `ab`.
fn tokenizer() -> Value {
    let mut vocab = Map::new();
    let mut added = Vec::new();
    for id in 0..12 {
        let text = if id == 11 { "<|endoftext|>".to_owned() } else { format!(">>{id}<<") };
        vocab.insert(text.clone(), id.into());
        added.push(json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}));
    }
    for (text, id) in [("a", 12), ("b", 13), ("ab", 14)] {
        vocab.insert(text.to_owned(), id.into());
    }
    json!({
        "version": "1.0", "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Punctuation", "behavior": "Contiguous"},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            {"type": "Digits", "individual_digits": false},
            {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": false}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": ["a b"]},
    })
}
