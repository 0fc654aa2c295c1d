//! The S (safetensors), I (index), C (config) and T (tokenizer) groups of broken checkpoints: each ends in a typed
//! error of the right kind, or is accepted where it is only odd, and allocates in proportion to the file.

use kestrel_formats::checkpoint::Checkpoint;
use kestrel_formats::limits::SAFETENSORS_HEADER_BYTES_MAX;
use kestrel_formats::{ErrorKind, Result};
use kestrel_tests::alloc_count::peak_during;
use kestrel_tests::checkpoint_builder::{CheckpointBuilder, RawTensor, safetensors, safetensors_bytes};
use kestrel_tests::temp_dir::TempDir;
use serde_json::{Value, json};
use std::fs::File;
use std::path::Path;

/// What a case must end in.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    Error(ErrorKind),
    Accepted,
    /// Accepted with a warning that holds this text.
    Warning(&'static str),
}
use ErrorKind::*;
use Wanted::{Accepted, Error, Warning};

/// Opens the folder, bounds the heap by its files' size, and compares.
fn check(name: &str, dir: &Path, wanted: Wanted) {
    let sizes = std::fs::read_dir(dir)
        .expect("the folder")
        .map(|e| e.expect("an entry").metadata().map_or(0, |m| m.len()));
    // Sparse files: what is read of them is at most a header.
    let n_bytes = sizes.map(|n| n.min(SAFETENSORS_HEADER_BYTES_MAX)).sum::<u64>() as usize;
    let (result, peak) = peak_during(|| Checkpoint::open(dir));
    let describe =
        |r: &Result<Checkpoint>| r.as_ref().map_or_else(|e| e.to_string(), |c| format!("{:?}", c.warnings()));
    let shown = describe(&result);
    match (wanted, &result) {
        (Error(kind), Err(e)) => assert_eq!(e.kind(), kind, "{name}: {shown}"),
        (Accepted, Ok(_)) => {}
        (Warning(text), Ok(c)) => assert!(c.warnings().iter().any(|w| w.contains(text)), "{name}: {shown}"),
        _ => panic!("{name}: wanted {wanted:?}, got {shown}"),
    }
    assert!(peak <= (1 << 20) + 24 * n_bytes, "{name}: {peak} bytes of heap for {n_bytes} bytes of files");
}

fn builder() -> CheckpointBuilder {
    CheckpointBuilder::new()
}

/// A folder whose only shard has these bytes.
fn with_shard(name: &str, bytes: &[u8], wanted: Wanted) {
    let dir = TempDir::new();
    builder().write_json(&dir);
    dir.file("model.safetensors", bytes);
    check(name, dir.path(), wanted);
}

/// A shard with this header text and so many bytes of data.
fn with_header(name: &str, header: &str, n_data: usize, wanted: Wanted) {
    with_shard(name, &safetensors_bytes(header.as_bytes(), n_data), wanted);
}

/// The correct shard's header with more entries in front, and its data with more bytes.
fn with_entries(name: &str, entries: &str, wanted: Wanted) {
    let file = safetensors(&builder().tensors);
    let len = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let header = String::from_utf8(file[8..8 + len].to_vec()).expect("UTF-8");
    let header = header.replacen('{', &format!("{{{entries},"), 1);
    with_header(name, &header, file.len() - 8 - len, wanted);
}

#[test]
fn the_valid_folder_opens_without_warning() {
    for dir in [builder().write(), builder().write_two(None)] {
        let checkpoint = Checkpoint::open(dir.path()).expect("valid");
        assert!(checkpoint.warnings().is_empty(), "{:?}", checkpoint.warnings());
    }
}

#[test]
fn s_whole_file() {
    with_shard("S01_empty", b"", Error(Truncated));
    with_shard("S02_7_bytes", b"1234567", Error(Truncated));
    with_header("S03_header_len_0", "", 100, Error(BadJson));
    with_shard("S04_header_past_file", &[&999u64.to_le_bytes()[..], b"{}"].concat(), Error(CountExceedsFile));
    with_shard("S06_u64_max", &[&u64::MAX.to_le_bytes()[..], b"{}"].concat(), Error(CountExceedsFile));
    with_shard("S07_not_utf8", &safetensors_bytes(b"{\"\xFF\":{}}", 0), Error(BadJson));
    with_header("S08_not_json", "{hello}", 0, Error(BadJson));
    with_header("S09_array", "[1,2,3]", 0, Error(BadJson));
    with_header("S10_bom", "\u{feff}{}", 0, Error(BadJson));
    with_shard("S38_pickle", b"\x80\x02}q\x00(X\x06\x00\x00\x00weightq\x01K\x01u.", Error(PickleRefused));
    with_shard("S39_zip", b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl", Error(PickleRefused));
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n";
    with_shard("S40_lfs_pointer", pointer, Error(LfsPointer));
    with_shard("S41_html", b"<!DOCTYPE html>\n<html><body>401</body></html>", Error(BadMagic));
}

#[test]
fn s05_header_over_the_limit() {
    let dir = TempDir::new();
    builder().write_json(&dir);
    let path = dir.file("model.safetensors", &(SAFETENSORS_HEADER_BYTES_MAX + 1).to_le_bytes());
    File::options().write(true).open(path).and_then(|f| f.set_len(64 << 20)).expect("a sparse file");
    check("S05_header_over_limit", dir.path(), Error(Limit));
}

#[test]
fn s_header_contents() {
    let zero = r#""dtype":"F32","shape":[0],"data_offsets":[0,0]"#;
    with_entries("S11_leading_space_and_metadata", r#"  "__metadata__":{"format":"pt"}"#, Accepted);
    with_entries("S12_dup_same", &format!(r#""x":{{{zero}}},"x":{{{zero}}}"#), Error(Duplicate));
    let f16 = zero.replace("F32", "F16");
    with_entries("S13_dup_other_dtype", &format!(r#""x":{{{zero}}},"x":{{{f16}}}"#), Error(Duplicate));
    with_entries("S14_dup_metadata", r#""__metadata__":{"a":"1","a":"2"}"#, Warning("more than once"));
    with_entries("S15_metadata_non_string", r#""__metadata__":{"a":1}"#, Error(WrongType));
    with_entries("S30_depth_200k", &format!(r#""__metadata__":{}"#, "[".repeat(200_000)), Error(BadJson));
    let deep = format!(r#""x":{{"y":{}{},{zero}}}"#, "[".repeat(200_000), "]".repeat(200_000));
    with_entries("S30_depth_200k_in_field", &deep, Error(Limit));
    let many: Vec<String> = (0..100_000).map(|i| format!(r#""t{i}":{{{zero}}}"#)).collect();
    with_entries("S33_100k_tensors", &many.join(","), Error(Limit));
    with_entries("S37_nul_name", &format!(r#""a\u0000b":{{{zero}}}"#), Error(BadName));
    with_entries("S37_empty_name", &format!(r#""":{{{zero}}}"#), Error(BadName));
    with_entries("S37_long_name", &format!(r#""{}":{{{zero}}}"#, "n".repeat(2000)), Error(BadName));
    // An extra tensor is not part of the architecture, whatever its name: it never touches the file system.
    with_entries("S36_path_like_name", &format!(r#""../../x":{{{zero}}}"#), Error(Unexpected));
    with_entries("S42_zero_size_shares_offset", &format!(r#""x":{{{zero}}}"#), Error(Unexpected));
    let spaced = safetensors(&builder().tensors);
    let len = u64::from_le_bytes(spaced[..8].try_into().expect("8 bytes")) as usize;
    let header = format!(" {}", String::from_utf8_lossy(&spaced[8..8 + len]))
        .replace(r#""shape""#, r#""note":1,"shape""#);
    with_header("S11_S28_S34_space_unaligned_extra", &header, spaced.len() - 8 - len, Accepted);
}

/// One tensor, described in many wrong ways.
#[test]
fn s_one_tensor() {
    let cases = [
        ("S16_unknown_dtype", r#""dtype":"F99","shape":[1],"data_offsets":[0,4]"#, 4, UnknownType),
        ("S17_shape_negative", r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#, 4, BadShape),
        ("S18_shape_float", r#""dtype":"F32","shape":[1.5],"data_offsets":[0,4]"#, 4, BadShape),
        (
            "S19_product_overflow",
            r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]"#,
            4,
            BadShape,
        ),
        (
            "S20_bytes_overflow",
            r#""dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]"#,
            4,
            BadShape,
        ),
        ("S21_shape_offsets_differ", r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#, 4, Inconsistent),
        ("S22_reversed", r#""dtype":"F32","shape":[1],"data_offsets":[4,0]"#, 4, BadOffset),
        ("S23_past_eof", r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#, 4, DataOutOfBounds),
        ("S25_hole", r#""dtype":"F32","shape":[1],"data_offsets":[4,8]"#, 8, BadOffset),
        ("S26_polyglot_tail", r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#, 100, Unexpected),
        ("S27_missing_bytes", r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#, 3, DataOutOfBounds),
        ("S29_2_to_64", r#""dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]"#, 4, BadShape),
        ("S35_no_dtype", r#""shape":[1],"data_offsets":[0,4]"#, 4, Missing),
        ("S35_no_shape", r#""dtype":"F32","data_offsets":[0,4]"#, 4, Missing),
        ("S35_no_offsets", r#""dtype":"F32","shape":[1]"#, 4, Missing),
        ("S35_three_offsets", r#""dtype":"F32","shape":[1],"data_offsets":[0,4,4]"#, 4, BadOffset),
        ("S43_f64", r#""dtype":"F64","shape":[1],"data_offsets":[0,8]"#, 8, Unsupported),
        ("S43_i64", r#""dtype":"I64","shape":[1],"data_offsets":[0,8]"#, 8, Unsupported),
        ("S43_f8", r#""dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]"#, 1, Unsupported),
        ("S43_u8_bitsandbytes", r#""dtype":"U8","shape":[1],"data_offsets":[0,1]"#, 1, Missing),
        ("S43_f4_half_byte", r#""dtype":"F4","shape":[1],"data_offsets":[0,1]"#, 1, BadShape),
        ("S12_dup_field", r#""dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]"#, 4, Duplicate),
        ("S31_zero_dim_in_model", r#""dtype":"F32","shape":[0,8],"data_offsets":[0,0]"#, 0, Missing),
    ];
    for (name, info, n_data, kind) in cases {
        with_header(name, &format!(r#"{{"x":{{{info}}}}}"#), n_data, Error(kind));
    }
    let dims = vec!["1"; 100_000].join(",");
    let many = format!(r#"{{"x":{{"dtype":"F32","shape":[{dims}],"data_offsets":[0,4]}}}}"#);
    with_header("S32_100k_dims", &many, 4, Error(BadShape));
    let overlap = r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    with_header("S24_overlap", overlap, 12, Error(BadOffset));
    let mut zero = builder();
    zero.tensors[0] = RawTensor::new("backbone.embeddings.weight", "BF16", &[0, 8]);
    check("S31_zero_rows", zero.write().path(), Error(BadShape));
}

/// The correct index after a change.
fn index(change: impl FnOnce(&mut Value)) -> Value {
    let mut index = builder().index();
    change(&mut index);
    index
}

#[test]
fn i_index() {
    let first = "backbone.embeddings.weight";
    let shard = |name: &str| index(|i| i["weight_map"][first] = name.into());
    let cases: Vec<(&str, Value, Wanted)> = vec![
        ("I01_parent", shard("../../x.safetensors"), Error(BadPath)),
        ("I02_absolute", shard("/etc/x.safetensors"), Error(BadPath)),
        ("I03_inner_parent", shard("a/../b.safetensors"), Error(BadPath)),
        ("I04_subfolder", shard("sub/x.safetensors"), Error(BadPath)),
        ("I05_nul", shard("a\0.safetensors"), Error(BadPath)),
        ("I05_control", shard("a\n.safetensors"), Error(BadPath)),
        ("I05_backslash", shard("..\\x.safetensors"), Error(BadPath)),
        ("I05_empty", shard(""), Error(BadPath)),
        ("I07_weight_map_list", index(|i| i["weight_map"] = json!([])), Error(WrongType)),
        ("I07_no_weight_map", json!({"metadata": {}}), Error(Missing)),
        ("I08_non_string", index(|i| i["weight_map"][first] = json!(7)), Error(WrongType)),
        ("I09_empty", index(|i| i["weight_map"] = json!({})), Error(Missing)),
        ("I10_wrong_shard", shard("b.safetensors"), Error(Inconsistent)),
        (
            "I11_not_in_index",
            index(|i| drop(i["weight_map"].as_object_mut().expect("a map").remove(first))),
            Error(Unexpected),
        ),
        ("I12_listed_not_held", index(|i| i["weight_map"]["ghost"] = "a.safetensors".into()), Error(Missing)),
        ("I13_missing_shards", index(|i| i["weight_map"]["ghost"] = "c.safetensors".into()), Error(Missing)),
        ("I14_bin_shard", shard("pytorch_model.bin"), Error(PickleRefused)),
        ("I15_total_size", index(|i| i["metadata"]["total_size"] = json!(1)), Warning("total_size")),
    ];
    for (name, index, wanted) in cases {
        check(name, builder().write_two(Some(index)).path(), wanted);
    }
    let dir = builder().write_two(None);
    let mut two = builder().index();
    two["weight_map"]["g1"] = "x1.safetensors".into();
    two["weight_map"]["g2"] = "x2.safetensors".into();
    dir.file("model.safetensors.index.json", two.to_string().as_bytes());
    let message = Checkpoint::open(dir.path()).expect_err("two shards missing").to_string();
    assert!(message.contains("x1.safetensors") && message.contains("x2.safetensors"), "{message}");
}

#[test]
fn i_files() {
    let dir = builder().write_two(None);
    let path = dir.file("model.safetensors.index.json", b"{}");
    File::options().write(true).open(path).and_then(|f| f.set_len(1 << 30)).expect("a sparse file");
    check("I16_index_1_gib", dir.path(), Error(Limit));
    for name in ["a.safetensors", "b.safetensors"] {
        let dir = builder().write_two(None);
        let whole = std::fs::read(dir.path().join(name)).expect("the shard");
        dir.file(name, &whole[..whole.len() - 1]);
        check("I17_truncated_data", dir.path(), Error(DataOutOfBounds));
        dir.file(name, &whole[..100]);
        check("I17_truncated_header", dir.path(), Error(CountExceedsFile));
    }
    let dir = TempDir::new();
    builder().write_json(&dir);
    check("no_weights", dir.path(), Error(Missing));
    dir.file("pytorch_model.bin", b"PK\x03\x04");
    check("bin_only", dir.path(), Error(PickleRefused));
    std::fs::create_dir(dir.path().join("model.safetensors")).expect("a folder");
    check("shard_is_a_folder", dir.path(), Error(NotRegularFile));
    let file = Checkpoint::open(&dir.file("x", b"")).expect_err("a file is no folder");
    assert_eq!(file.kind(), Usage);
}

#[cfg(unix)]
#[test]
fn i06_links() {
    use std::os::unix::fs::symlink;
    let outside = builder().write();
    let target = outside.path().join("model.safetensors");
    let dir = TempDir::new();
    builder().write_json(&dir);
    let link = dir.path().join("model.safetensors");
    symlink(&target, &link).expect("a link");
    check("I06_absolute_link", dir.path(), Error(BadPath));
    std::fs::remove_file(&link).expect("removed");
    symlink("model.safetensors", &link).expect("a link");
    check("G99_link_to_itself", dir.path(), Error(BadPath));
    std::fs::remove_file(&link).expect("removed");
    std::fs::copy(&target, dir.path().join("weights")).expect("a copy");
    symlink("weights", &link).expect("a link");
    check("sibling_link", dir.path(), Accepted);

    // The Hugging Face cache: every file is a link to ../../blobs/<hash>.
    let cache = TempDir::new();
    let (snapshot, blobs) = (cache.path().join("snapshots/main"), cache.path().join("blobs"));
    std::fs::create_dir_all(&snapshot).and_then(|()| std::fs::create_dir(&blobs)).expect("folders");
    for (i, name) in
        ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"].iter().enumerate()
    {
        let hash = format!("{i:064x}");
        std::fs::copy(outside.path().join(name), blobs.join(&hash)).expect("a copy");
        symlink(format!("../../blobs/{hash}"), snapshot.join(name)).expect("a link");
    }
    check("I06_hf_cache", &snapshot, Accepted);
}

#[test]
fn c_config() {
    let config = |fields: Value| builder().config(fields);
    let cases: Vec<(&str, CheckpointBuilder, Wanted)> = vec![
        ("C02_model_type", config(json!({"model_type": "llama"})), Error(Unsupported)),
        ("C02_no_model_type", config(json!({"model_type": null})), Error(Missing)),
        ("C02_architectures", config(json!({"architectures": ["JambaForCausalLM"]})), Error(Unsupported)),
        ("C03_zero", config(json!({"hidden_size": 0})), Error(OutOfRange)),
        ("C03_negative", config(json!({"hidden_size": -8})), Error(OutOfRange)),
        ("C03_float", config(json!({"hidden_size": 8.5})), Error(WrongType)),
        ("C03_string", config(json!({"hidden_size": "8"})), Error(WrongType)),
        ("C03_1e30", config(json!({"hidden_size": 1e30})), Error(WrongType)),
        ("C03_missing", config(json!({"hidden_size": null})), Error(Missing)),
        ("C04_intermediate", config(json!({"intermediate_size": 24})), Error(Unsupported)),
        ("C05_state_0", config(json!({"state_size": 0})), Error(OutOfRange)),
        ("C05_state_2_31", config(json!({"state_size": 1u64 << 31})), Error(OutOfRange)),
        ("C06_conv_kernel", config(json!({"conv_kernel": 3})), Error(BadShape)),
        ("C07_rank_auto", config(json!({"time_step_rank": "auto"})), Accepted),
        ("C07_rank_0", config(json!({"time_step_rank": 0})), Error(OutOfRange)),
        ("C08_vocab", config(json!({"vocab_size": 17})), Error(BadShape)),
        ("C09_more_layers", config(json!({"num_hidden_layers": 2})), Error(Missing)),
        ("C09_max_layers", config(json!({"num_hidden_layers": 4294967295u32})), Error(OutOfRange)),
        ("C10_eps_negative", config(json!({"layer_norm_epsilon": -1e-5})), Error(OutOfRange)),
        ("C10_eps_zero", config(json!({"mixer_rms_eps": 0.0})), Error(OutOfRange)),
        ("C10_eps_text", config(json!({"mixer_rms_eps": "1e-6"})), Error(WrongType)),
        ("C11_tied_with_head", config(json!({"tie_word_embeddings": true})), Warning("lm_head")),
        ("C11_untied_no_head", builder().without("lm_head.weight"), Error(Missing)),
        ("C12_no_mixer_eps", config(json!({"mixer_rms_eps": null})), Warning("mixer_rms_eps")),
        ("C16_use_bias", config(json!({"use_bias": true})), Error(Unsupported)),
        ("C17_no_conv_bias", config(json!({"use_conv_bias": false})), Error(Unsupported)),
        ("C18_act", config(json!({"hidden_act": "gelu"})), Error(Unsupported)),
        (
            "C19_bitsandbytes",
            config(json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}})),
            Warning("no tensor is quantized"),
        ),
        (
            "C19_gptq",
            config(json!({"quantization_config": {"quant_method": "gptq", "bits": 4}})),
            Error(Unsupported),
        ),
        (
            "C19_4_and_8_bits",
            config(json!({"quantization_config": {"load_in_4bit": true, "load_in_8bit": true}})),
            Error(Inconsistent),
        ),
        ("C20_missing_tensor", builder().without("backbone.layers.0.mixer.A_log"), Error(Missing)),
        ("C21_eos_text", config(json!({"eos_token_id": "11"})), Error(WrongType)),
    ];
    for (name, builder, wanted) in cases {
        check(name, builder.write().path(), wanted);
    }
    let texts = [
        ("C01_not_json", "hello".to_owned(), BadJson),
        ("C01_list", "[]".to_owned(), BadJson),
        ("C10_eps_nan", r#"{"model_type": "mamba", "layer_norm_epsilon": NaN}"#.to_owned(), BadJson),
        ("C13_depth_10000", "[".repeat(10_000), Limit),
        ("C14_duplicate", r#"{"model_type": "mamba", "model_type": "mamba"}"#.to_owned(), Duplicate),
    ];
    for (name, text, kind) in texts {
        let dir = builder().write();
        dir.file("config.json", text.as_bytes());
        check(name, dir.path(), Error(kind));
    }
}

#[test]
fn t_tokenizer() {
    let change = |f: fn(&mut Value)| builder().tokenizer(f);
    let cases: Vec<(&str, CheckpointBuilder, Wanted)> = vec![
        ("T01_gap", change(|t| t["model"]["vocab"]["ab"] = json!(15)), Error(Inconsistent)),
        ("T02_id_twice", change(|t| t["model"]["vocab"]["ab"] = json!(13)), Error(Duplicate)),
        ("T03_id_huge", change(|t| t["model"]["vocab"]["ab"] = json!(4294967295u32)), Error(Inconsistent)),
        ("T03_id_past_u32", change(|t| t["model"]["vocab"]["ab"] = json!(1u64 << 40)), Error(WrongType)),
        ("T05_unknown_piece", change(|t| t["model"]["merges"] = json!(["a q"])), Error(Inconsistent)),
        ("T05_unknown_result", change(|t| t["model"]["merges"] = json!(["b a"])), Error(Inconsistent)),
        ("T06_no_space", change(|t| t["model"]["merges"] = json!(["ab"])), Error(BadJson)),
        ("T06_two_spaces", change(|t| t["model"]["merges"] = json!(["a b c"])), Error(BadJson)),
        ("T06_three_pieces", change(|t| t["model"]["merges"] = json!([["a", "b", "c"]])), Error(BadJson)),
        ("T06_number", change(|t| t["model"]["merges"] = json!([1])), Error(BadJson)),
        ("T07_pairs", change(|t| t["model"]["merges"] = json!([["a", "b"]])), Accepted),
        ("T08_added_outside", change(|t| t["added_tokens"][0]["id"] = json!(1000)), Error(Inconsistent)),
        ("T08_added_other_id", change(|t| t["added_tokens"][0]["id"] = json!(12)), Error(Duplicate)),
        ("T09_bos_out_of_range", builder_with_ids(json!({"bos_token_id": 1_000_000})), Error(OutOfRange)),
        (
            "T09_eos_out_of_range",
            builder_with_ids(json!({"eos_token_id": [11, 4294967295u32]})),
            Error(OutOfRange),
        ),
        (
            "T10_other_regex",
            change(|t| t["pre_tokenizer"]["pretokenizers"][3]["pattern"]["Regex"] = json!("[0-9]")),
            Error(UnsupportedTokenizer),
        ),
        (
            "T10_whitespace",
            change(|t| t["pre_tokenizer"] = json!({"type": "Whitespace"})),
            Error(UnsupportedTokenizer),
        ),
        (
            "T10_unigram",
            change(|t| t["model"] = json!({"type": "Unigram", "vocab": [["a", 0.0]]})),
            Error(UnsupportedTokenizer),
        ),
        (
            "T10_byte_fallback",
            change(|t| t["model"]["byte_fallback"] = json!(true)),
            Error(UnsupportedTokenizer),
        ),
        ("T10_decoder", change(|t| t["decoder"] = json!({"type": "Metaspace"})), Error(UnsupportedTokenizer)),
        ("T10_lstrip", change(|t| t["added_tokens"][3]["lstrip"] = json!(true)), Error(UnsupportedTokenizer)),
        (
            "T11_redos",
            change(|t| {
                t["normalizer"] = json!({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""})
            }),
            Error(UnsupportedTokenizer),
        ),
        ("T12_token_1_mib", change(|t| t["model"]["vocab"]["x".repeat(1 << 20)] = json!(15)), Error(Limit)),
        ("T16_empty_token", change(|t| t["model"]["vocab"][""] = json!(15)), Warning("empty token")),
        (
            "vocab_over_embedding",
            change(|t| (15..18).for_each(|i| t["model"]["vocab"][format!("t{i}")] = json!(i))),
            Error(OutOfRange),
        ),
    ];
    for (name, builder, wanted) in cases {
        check(name, builder.write().path(), wanted);
    }
    let text = builder().tokenizer.expect("a tokenizer").to_string();
    let twice = text.replace(r#""ab":14"#, r#""ab":14,"ab":15"#);
    let surrogate = text.replace(r#""ab":14"#, r#""\ud800":14"#);
    for (name, text, kind) in [("T04_token_twice", twice, Duplicate), ("T22_surrogate", surrogate, BadJson)] {
        let dir = builder().write();
        dir.file("tokenizer.json", text.as_bytes());
        check(name, dir.path(), Error(kind));
    }
    let dir = builder().write();
    File::options()
        .write(true)
        .open(dir.path().join("tokenizer.json"))
        .and_then(|f| f.set_len(1 << 30))
        .expect("sparse");
    check("T13_1_gib", dir.path(), Error(Limit));
}

fn builder_with_ids(ids: Value) -> CheckpointBuilder {
    CheckpointBuilder { generation: Some(ids), ..builder() }
}

/// A deeply nested template cannot stop a model from loading: it is text until chat is asked for.
#[test]
fn t17_nested_template_loads() {
    let template = "{% if a %}".repeat(50_000);
    let with = CheckpointBuilder { tokenizer_config: Some(json!({"chat_template": template})), ..builder() };
    check("T17_nested_template", with.write().path(), Accepted);
}
