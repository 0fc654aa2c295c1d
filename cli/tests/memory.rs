//! What bitsandbytes' kinds take of memory: less than the weights that go through. RLIMIT_DATA bounds what a process has
//! beside mapped files (heap, stacks, anonymous maps, touched or not), which is at least its RssAnon.
#![forbid(unsafe_code)]

use kestrel_formats::arch::{self, HyperParams};
use kestrel_tests::bnb_builder::{HPARAMS, Kind, config, sound_of};
use kestrel_tests::checkpoint_builder::CheckpointBuilder;
use kestrel_tests::safetensors::to_bytes;
use kestrel_tests::temp_dir::TempDir;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Write;
use std::process::{Command, Output, Stdio};

/// 101 million weights in the matrices: 403 MB as F32, 201 MB as BF16.
const LARGE: HyperParams = HyperParams { d_model: 2048, d_inner: 4096, n_layer: 4, ..HPARAMS };
const F32_BYTES: u64 = 4 * 4 * 3 * 2048 * 4096;
/// What a conversion with two threads may have: their stacks, and pieces on their way.
const CONVERT_BYTES: u64 = 24 << 20;
/// What running has beside the weights: stacks, and buffers for 512 tokens.
const RUN_BYTES: u64 = 80 << 20;

fn write_json(dir: &TempDir, config: &Value) {
    dir.file("config.json", config.to_string().as_bytes());
    let tokenizer = CheckpointBuilder::new().tokenizer.expect("a tokenizer");
    dir.file("tokenizer.json", tokenizer.to_string().as_bytes());
}

/// A BF16 checkpoint whose weights are all 0, which takes no space.
fn zeros() -> TempDir {
    let dir = TempDir::new();
    write_json(&dir, &config(&LARGE));
    let (mut header, mut end) = (Map::new(), 0);
    for (spec, layer) in arch::tensors(&LARGE, false) {
        let shape = (spec.hf_shape)(&LARGE);
        let begin = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        let info = json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]});
        header.insert(spec.hf_name(layer), info);
    }
    let text = Value::Object(header).to_string();
    let mut file = File::create(dir.path().join("model.safetensors")).expect("a file");
    file.write_all(&(text.len() as u64).to_le_bytes()).expect("writing");
    file.write_all(text.as_bytes()).expect("writing");
    file.set_len(8 + text.len() as u64 + end).expect("a sparse file");
    dir
}

/// Runs the binary in `dir` with so much data.
fn limited(dir: &TempDir, bytes: u64, args: &[&str]) -> Output {
    let script = format!("ulimit -c 0; ulimit -d {}; exec \"$0\" \"$@\"", bytes >> 10);
    Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_kestrel")])
        .args(args)
        .args(["--threads", "2"])
        .current_dir(dir.path())
        .env_remove("KESTREL_ISA")
        .stdin(Stdio::null())
        .output()
        .expect("a shell")
}

/// Succeeds with so much data, and cannot with an eighth of it.
fn takes(dir: &TempDir, bytes: u64, args: &[&str]) {
    let done = limited(dir, bytes, args);
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{args:?} with {} MiB: {:?} {stderr}", bytes >> 20, done.status);
    assert!(!limited(dir, bytes / 8, args).status.success(), "{args:?}: the limit limits nothing");
}

#[test]
fn converting_a_folder_of_bitsandbytes_takes_less_than_its_weights() {
    let dir = TempDir::new();
    let (tensors, config) = sound_of(&LARGE, Kind::Nf4);
    write_json(&dir, &config);
    dir.file("model.safetensors", &to_bytes(&tensors));
    for ty in ["q8_0", "q4_0"] {
        takes(&dir, CONVERT_BYTES, &["convert", ".", "-o", "out.gguf", "--type", ty, "--force"]);
    }
}

#[test]
fn writing_a_folder_of_bitsandbytes_takes_less_than_its_weights() {
    let dir = zeros();
    for ty in ["bnb-nf4", "bnb-int8"] {
        takes(&dir, CONVERT_BYTES, &["convert", ".", "-o", "out", "--type", ty, "--force"]);
    }
}

/// The quantized weights are in memory, and little else is.
#[test]
fn quantizing_at_load_takes_the_quantized_weights_and_little_more() {
    let dir = zeros();
    let prompt = ["run", ".", "-p", "ab", "-n", "1", "--temp", "0"];
    let nf4 = ["--load-in-4bit", "--bnb-4bit-quant-type", "nf4"];
    let double = ["--load-in-4bit", "--bnb-4bit-quant-type", "nf4", "--bnb-4bit-use-double-quant"];
    let int8 = ["--load-in-8bit", "--quant-type", "int8"];
    // Codes, and scales of 64 weights each; codes.
    let (four, eight) = (F32_BYTES / 8 + F32_BYTES / 64, F32_BYTES / 4);
    for (weights, flags) in [(four, &nf4[..]), (four, &double[..]), (eight, &int8[..])] {
        takes(&dir, weights + RUN_BYTES, &[&prompt[..], flags].concat());
    }
}
