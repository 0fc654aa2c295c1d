//! Checkpoints that transformers and bitsandbytes saved, from `tests/data/bitsandbytes`.

use crate::goldens::{data_dir, tiny_dir};
use crate::safetensors::{Tensors, read, to_bytes};
use crate::temp_dir::TempDir;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Of the tiny trained model: NF4; FP4 with quantized scales, in BF16 storage; int8.
pub const TINY_KINDS: [&str; 3] = ["tiny-nf4", "tiny-fp4-double", "tiny-int8"];
/// Of a random model: every width of storage, and dtypes of the weights.
pub const SMALL_KINDS: [&str; 4] =
    ["small-fp4-f16", "small-nf4-double-f32", "small-nf4-head", "small-int8-f32"];

fn data(name: String) -> PathBuf {
    data_dir().join("bitsandbytes").join(name)
}

/// The tensors of a checkpoint as saved; those that quantization left alone are the tiny model's own.
pub fn tensors(kind: &str) -> Tensors {
    let mut saved = read(&data(format!("{kind}.safetensors")));
    if TINY_KINDS.contains(&kind) {
        for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
            for (name, tensor) in read(&tiny_dir().join(shard)) {
                saved.entry(name).or_insert(tensor);
            }
        }
    }
    saved
}

/// config.json as saved.
pub fn config(kind: &str) -> Value {
    let path = data(format!("{kind}.config.json"));
    serde_json::from_slice(&std::fs::read(path).expect("config.json")).expect("JSON")
}

/// A folder with one shard.
pub fn folder(kind: &str) -> TempDir {
    folder_of(&tensors(kind), &config(kind))
}

/// A folder of these tensors, in one shard, with the tiny model's tokenizer if the vocabulary is its.
pub fn folder_of(tensors: &Tensors, config: &Value) -> TempDir {
    let dir = TempDir::new();
    dir.file("model.safetensors", &to_bytes(tensors));
    dir.file("config.json", config.to_string().as_bytes());
    if config["vocab_size"] == 4096 {
        let tokenizer = std::fs::read(tiny_dir().join("tokenizer.json")).expect("the tokenizer");
        dir.file("tokenizer.json", &tokenizer);
    }
    dir
}

/// The same in several shards, so that codes and their scales are in different ones.
pub fn sharded(kind: &str, n_shards: usize) -> TempDir {
    let dir = folder(kind);
    std::fs::remove_file(dir.path().join("model.safetensors")).expect("removed");
    let (mut shards, mut map) = (vec![Tensors::new(); n_shards], serde_json::Map::new());
    for (i, (name, tensor)) in tensors(kind).into_iter().enumerate() {
        let file = format!("model-{:05}-of-{n_shards:05}.safetensors", i % n_shards + 1);
        map.insert(name.clone(), json!(file));
        shards[i % n_shards].insert(name, tensor);
    }
    for (i, shard) in shards.iter().enumerate() {
        dir.file(&format!("model-{:05}-of-{n_shards:05}.safetensors", i + 1), &to_bytes(shard));
    }
    dir.file("model.safetensors.index.json", json!({"weight_map": map}).to_string().as_bytes());
    dir
}
