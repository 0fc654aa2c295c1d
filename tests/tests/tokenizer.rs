//! Ids equal to Hugging Face's, from the vocabulary as it comes out of a GGUF file.

use kestrel_formats::gguf::{self, Gguf};
use kestrel_formats::tokenizer::{PreTokenizer, TokenType, TokenizerData};
use kestrel_runtime::tokenizer::Tokenizer;
use kestrel_tests::temp_dir::TempDir;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn data_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data")
}

fn tiny_dir() -> PathBuf {
    data_dir().join("tiny-falcon-mamba")
}

/// The folder of shared data, which is not in the repository. Absent: says so, and fails where CI is set.
fn falcon_dir() -> Option<PathBuf> {
    let shared = std::env::var_os("KESTREL_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let dir = shared.join("data/falcon-tokenizer");
    if dir.join("tokenizer.json").is_file() {
        return Some(dir);
    }
    let why = format!("skipped: no Falcon vocabulary in {} (set KESTREL_SHARED)", dir.display());
    assert!(std::env::var_os("CI").is_none(), "{why}");
    std::io::Write::write_all(&mut std::io::stderr(), format!("{why}\n").as_bytes()).expect("stderr");
    None
}

/// Writes the tokenizer as a GGUF file without tensors and reads it back.
fn through_gguf(data: &TokenizerData) -> TokenizerData {
    let mut pairs = vec![("general.architecture".to_owned(), gguf::Value::from("mamba"))];
    pairs.extend(data.to_metadata());
    let layout = gguf::layout(&pairs, &[]).expect("a layout");
    let dir = TempDir::new();
    let path = dir.file("vocabulary.gguf", &layout.header);
    TokenizerData::from_gguf(&Gguf::open(&path).expect("our own file"))
        .expect("our own keys")
        .expect("a tokenizer")
}

fn json_lines(name: &str) -> Vec<Value> {
    let path = data_dir().join("tokenizer").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("a JSON array")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// Compares with the committed ids, special tokens found and taken as text. `lossless`: decodes
/// back, which needs all 256 bytes in the vocabulary (Falcon's lacks U+0003 and others) and no normalization.
fn check_texts(data: &TokenizerData, golden: &str, lossless: bool) {
    let tokenizer = Tokenizer::new(data).expect("a tokenizer");
    let (texts, golden) = (json_lines("texts.json"), json_lines(golden));
    assert_eq!(texts.len(), golden.len());
    assert!(texts.len() >= 300);
    let (mut n_wrong, mut n_special) = (0, 0);
    for (text, wanted) in texts.iter().zip(&golden) {
        let text = text.as_str().expect("a text");
        let (special, plain) = (ids(&wanted[0]), ids(wanted.get(1).unwrap_or(&wanted[0])));
        n_special += usize::from(wanted.get(1).is_some());
        let got = [true, false].map(|parse| tokenizer.encode(text, parse).expect("ids"));
        if got != [special.clone(), plain] {
            n_wrong += 1;
            eprint_line(&format!("{text:?}: {got:?}, wanted {wanted}"));
        }
        if lossless {
            assert_eq!(tokenizer.decode(&special), text);
        }
    }
    assert_eq!(n_wrong, 0, "of {} texts", texts.len());
    assert!(n_special >= 20, "only {n_special} texts hold special tokens");
}

fn eprint_line(line: &str) {
    std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes()).expect("stderr");
}

#[test]
fn the_tiny_vocabulary_encodes_as_hugging_face_does() {
    let data = TokenizerData::from_hf(&tiny_dir()).expect("reads").expect("a tokenizer");
    let back = through_gguf(&data);
    assert_eq!(back, data);
    check_texts(&back, "ids-tiny.json", true);
}

#[test]
fn the_real_falcon_vocabulary_encodes_as_hugging_face_does() {
    let Some(dir) = falcon_dir() else { return };
    let data = TokenizerData::from_hf(&dir).expect("reads").expect("a tokenizer");
    assert_eq!((data.tokens.len(), data.merges.len(), data.pre), (65_024, 64_784, PreTokenizer::Falcon));
    let back = through_gguf(&data);
    assert_eq!(back, data);
    check_texts(&back, "ids-falcon.json", false);
}

#[test]
fn gpt_neox_normalizes_and_splits_as_hugging_face_does() {
    let text = std::fs::read_to_string(tiny_dir().join("tokenizer.json")).expect("tokenizer.json");
    let mut file: Value = serde_json::from_str(&text).expect("JSON");
    file["normalizer"] = json!({"type": "NFC"});
    file["pre_tokenizer"] =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let dir = TempDir::new();
    dir.file("tokenizer.json", file.to_string().as_bytes());
    let data = TokenizerData::from_hf(dir.path()).expect("reads").expect("a tokenizer");
    assert_eq!(data.pre, PreTokenizer::GptNeox);
    assert_eq!(data.to_metadata()[1], ("tokenizer.ggml.pre".to_owned(), "mpt".into()));
    check_texts(&through_gguf(&data), "ids-neox.json", false);
}

/// The texts that llama.cpp publishes for the Falcon vocabulary, and what it expects.
#[test]
fn the_published_vectors() {
    let Some(dir) = falcon_dir() else { return };
    let data = TokenizerData::from_hf(&dir).expect("reads").expect("a tokenizer");
    let tokenizer = Tokenizer::new(&through_gguf(&data)).expect("a tokenizer");
    let inputs = std::fs::read_to_string(dir.join("vectors.inp")).expect("vectors.inp");
    let outputs = std::fs::read_to_string(dir.join("vectors.out")).expect("vectors.out");
    // A text ends where the line break before the next separator begins; the last separator ends the file.
    let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let inputs = inputs.strip_suffix(&[""]).unwrap_or(&inputs);
    let outputs: Vec<&str> = outputs.lines().collect();
    assert_eq!((inputs.len(), outputs.len()), (46, 46));
    for (text, wanted) in inputs.iter().zip(&outputs) {
        let wanted: Vec<u32> = wanted.split_whitespace().map(|id| id.parse().expect("an id")).collect();
        assert_eq!(tokenizer.encode(text, false).expect("ids"), wanted, "{text:?}");
    }
}

#[test]
fn a_real_vocabulary_loads_fast() {
    let Some(dir) = falcon_dir() else { return };
    let data = TokenizerData::from_hf(&dir).expect("reads").expect("a tokenizer");
    let start = Instant::now();
    let tokenizer = Tokenizer::new(&data).expect("a tokenizer");
    let took = start.elapsed();
    eprint_line(&format!("building the tokenizer of 65024 tokens took {took:?}"));
    assert!(took < Duration::from_secs(3), "{took:?}"); // wide: other tests run beside it
    assert_eq!(tokenizer.vocab_size(), 65_024);
}

#[test]
fn bytes_of_tokens() {
    let mut data = TokenizerData::from_hf(&tiny_dir()).expect("reads").expect("a tokenizer");
    let n = data.tokens.len() as u32;
    data.tokens.push(b"\xFF\xFE".to_vec());
    data.token_types.push(TokenType::Normal);
    let data = data.padded_to(n as usize + 2).expect("room for two");
    let tokenizer = Tokenizer::new(&data).expect("a tokenizer");
    assert_eq!(tokenizer.token_bytes(0), b">>TITLE<<");
    assert_eq!(tokenizer.token_bytes(n), b"\xFF\xFE");
    assert_eq!(tokenizer.token_bytes(n + 1), b""); // [PADn]
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
    assert!(
        tokenizer.is_end(11) && tokenizer.is_special(11) && !tokenizer.is_end(12) && !tokenizer.is_special(n)
    );
    // The four bytes of an emoji are four tokens of one byte each: only together are they text.
    let llama = tokenizer.encode("🦙", true).expect("ids");
    assert!(llama.len() > 1);
    let bytes: Vec<u8> = llama.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
    assert_eq!(bytes, "🦙".as_bytes());
}

/// Long runs are where a backtracking regex engine would give up and cut the rest differently.
#[test]
fn long_runs() {
    let data = TokenizerData::from_hf(&tiny_dir()).expect("reads").expect("a tokenizer");
    let tokenizer = Tokenizer::new(&data).expect("a tokenizer");
    for unit in [" ", "1", "a", "\n", "!", "é"] {
        let text = unit.repeat(100_000) + " end";
        let ids = tokenizer.encode(&text, false).expect("ids");
        assert_eq!(tokenizer.decode(&ids), text);
        let end = tokenizer.encode(" end", false).expect("ids");
        assert!(ids.ends_with(&end), "{unit:?}");
    }
}
