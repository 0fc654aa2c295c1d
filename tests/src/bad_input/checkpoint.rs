//! Checkpoint folders whose index, configuration or files are wrong.

use super::*;
use crate::checkpoint_builder::CheckpointBuilder;
use serde_json::{Value, json};
use std::fs::File;

fn builder() -> CheckpointBuilder {
    CheckpointBuilder::new()
}

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = index_cases();
    cases.extend(file_cases());
    cases.extend(link_cases());
    cases.extend(config_cases());
    cases.extend(config_texts());
    cases
}

/// The correct index after a change.
fn index(change: impl FnOnce(&mut Value)) -> Value {
    let mut index = builder().index();
    change(&mut index);
    index
}

fn index_cases() -> Vec<Case> {
    use Kind::*;
    let first = "backbone.embeddings.weight";
    let shard = |name: &str| index(|i| i["weight_map"][first] = name.into());
    let two_missing = index(|i| {
        i["weight_map"]["g1"] = "x1.safetensors".into();
        i["weight_map"]["g2"] = "x2.safetensors".into();
    });
    let rows: Vec<(&str, Value, Expect)> = vec![
        ("I01 parent", shard("../../x.safetensors"), Reject(BadPath)),
        ("I02 absolute", shard("/etc/x.safetensors"), Reject(BadPath)),
        ("I03 inner_parent", shard("a/../b.safetensors"), Reject(BadPath)),
        ("I04 subfolder", shard("sub/x.safetensors"), Reject(BadPath)),
        ("I05 nul", shard("a\0.safetensors"), Reject(BadPath)),
        ("I05 control", shard("a\n.safetensors"), Reject(BadPath)),
        ("I05 backslash", shard("..\\x.safetensors"), Reject(BadPath)),
        ("I05 empty", shard(""), Reject(BadPath)),
        ("I07 weight_map_list", index(|i| i["weight_map"] = json!([])), Reject(WrongType)),
        ("I07 no_weight_map", json!({"metadata": {}}), Reject(Missing)),
        ("I08 non_string", index(|i| i["weight_map"][first] = json!(7)), Reject(WrongType)),
        ("I09 empty", index(|i| i["weight_map"] = json!({})), Reject(Missing)),
        ("I10 wrong_shard", shard("b.safetensors"), Reject(Inconsistent)),
        (
            "I11 not_in_index",
            index(|i| drop(i["weight_map"].as_object_mut().expect("a map").remove(first))),
            Reject(Unexpected),
        ),
        (
            "I12 listed_not_held",
            index(|i| i["weight_map"]["ghost"] = "a.safetensors".into()),
            Reject(Missing),
        ),
        ("I13 missing_shards", index(|i| i["weight_map"]["ghost"] = "c.safetensors".into()), Reject(Missing)),
        ("I14 bin_shard", shard("pytorch_model.bin"), Reject(PickleRefused)),
        ("I15 total_size", index(|i| i["metadata"]["total_size"] = json!(1)), Warn("total_size")),
        ("I13 missing_shards_are_listed", two_missing, RejectWith(Missing, "x1.safetensors, x2.safetensors")),
    ];
    let case = |(name, index, expect): (&str, Value, Expect)| {
        folder_case("index", name, expect, move |dir| builder().write_two_into(dir, Some(index.clone())))
    };
    rows.into_iter().map(case).collect()
}

/// A folder of two shards, one of which is cut to what `keep` says of its length.
fn cut_shard(name: &str, shard: &'static str, keep: fn(usize) -> usize, kind: Kind) -> Case {
    folder_case("index", format!("I17 {name}_{shard}"), Reject(kind), move |dir| {
        let path = builder().write_two_into(dir, None);
        let shard = path.join(shard);
        let whole = std::fs::read(&shard).expect("the shard");
        std::fs::write(&shard, &whole[..keep(whole.len())]).expect("cutting the shard");
        path
    })
}

/// A folder of two shards with an index of so many other tensors.
fn wide_index(n: usize) -> impl Fn(&TempDir) -> PathBuf {
    move |dir| {
        let entries: Vec<String> = (0..n).map(|i| format!(r#""{i}":"a.safetensors""#)).collect();
        let path = builder().write_two_into(dir, None);
        dir.file(
            "model.safetensors.index.json",
            format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(",")).as_bytes(),
        );
        path
    }
}

fn file_cases() -> Vec<Case> {
    use Kind::*;
    let sparse = |dir: &TempDir, name: &str| {
        let path = dir.file(name, b"{}");
        File::options().write(true).open(path).and_then(|f| f.set_len(1 << 30)).expect("a sparse file");
    };
    let mut cases = vec![
        folder_case("index", "valid_two_shards", Accept, |dir| builder().write_two_into(dir, None)),
        folder_case("index", "I16 index_1_gib", Reject(Limit), move |dir| {
            let path = builder().write_two_into(dir, None);
            sparse(dir, "model.safetensors.index.json");
            path
        }),
        folder_case("index", "I16 index_of_100k", Reject(Limit), wide_index(100_000)),
        folder_case("index", "I16 index_of_4k", Reject(Unexpected), wide_index(4_000)),
        folder_case("config", "C13 config_1_gib", Reject(Limit), move |dir| {
            let path = builder().write_into(dir);
            sparse(dir, "config.json");
            path
        }),
        folder_case("tokenizer", "T13 tokenizer_1_gib", Reject(Limit), move |dir| {
            let path = builder().write_into(dir);
            sparse(dir, "tokenizer.json");
            path
        }),
        folder_case("index", "I13 no_weights", Reject(Missing), |dir| {
            builder().write_json(dir);
            dir.path().to_owned()
        }),
        folder_case("index", "I14 bin_only", Reject(PickleRefused), |dir| {
            builder().write_json(dir);
            dir.file("pytorch_model.bin", b"PK\x03\x04");
            dir.path().to_owned()
        }),
        folder_case("index", "I13 shard_is_a_folder", Reject(NotRegularFile), |dir| {
            builder().write_json(dir);
            std::fs::create_dir(dir.path().join("model.safetensors")).expect("a folder");
            dir.path().to_owned()
        }),
        folder_case("index", "I13 shard_is_a_pipe", Reject(NotRegularFile), |dir| {
            builder().write_json(dir);
            other_files::pipe(&dir.path().join("model.safetensors"));
            dir.path().to_owned()
        }),
        folder_case("config", "C13 config_is_a_pipe", Reject(NotRegularFile), |dir| {
            let path = builder().write_into(dir);
            std::fs::remove_file(path.join("config.json")).expect("removing");
            other_files::pipe(&path.join("config.json"));
            path
        }),
        folder_case("index", "I18 shards_swapped", Reject(Inconsistent), |dir| {
            let path = builder().write_two_into(dir, None);
            let at = |name: &str| path.join(name);
            std::fs::rename(at("a.safetensors"), at("c")).expect("renaming");
            std::fs::rename(at("b.safetensors"), at("a.safetensors")).expect("renaming");
            std::fs::rename(at("c"), at("b.safetensors")).expect("renaming");
            path
        }),
    ];
    for shard in ["a.safetensors", "b.safetensors"] {
        cases.push(cut_shard("truncated_data", shard, |n| n - 1, DataOutOfBounds));
        cases.push(cut_shard("truncated_header", shard, |_| 100, CountExceedsFile));
    }
    cases
}

fn link_cases() -> Vec<Case> {
    use std::os::unix::fs::symlink;
    /// A folder without its weights, and a shard in a folder beside it.
    fn parts(dir: &TempDir) -> (PathBuf, PathBuf) {
        let (folder, outside) = (dir.path().join("model"), dir.path().join("outside"));
        std::fs::create_dir(&folder).and_then(|()| std::fs::create_dir(&outside)).expect("folders");
        builder().write_to(&outside);
        builder().write_to(&folder);
        std::fs::remove_file(folder.join("model.safetensors")).expect("removing the shard");
        (folder, outside.join("model.safetensors"))
    }
    vec![
        folder_case("index", "I06 absolute_link", Reject(Kind::BadPath), |dir| {
            let (folder, shard) = parts(dir);
            symlink(shard, folder.join("model.safetensors")).expect("a link");
            folder
        }),
        folder_case("index", "I06 link_to_parent", Reject(Kind::BadPath), |dir| {
            let (folder, _) = parts(dir);
            symlink("../outside/model.safetensors", folder.join("model.safetensors")).expect("a link");
            folder
        }),
        folder_case("index", "I06 link_to_itself", Reject(Kind::BadPath), |dir| {
            let (folder, _) = parts(dir);
            symlink("model.safetensors", folder.join("model.safetensors")).expect("a link");
            folder
        }),
        folder_case("index", "I06 link_to_sibling", Accept, |dir| {
            let (folder, shard) = parts(dir);
            std::fs::copy(shard, folder.join("weights")).expect("a copy");
            symlink("weights", folder.join("model.safetensors")).expect("a link");
            folder
        }),
        // The Hugging Face cache: every file is a link to ../../blobs/<hash>.
        folder_case("index", "I06 hf_cache", Accept, |dir| {
            let (_, shard) = parts(dir);
            let outside = shard.parent().expect("a folder");
            let (snapshot, blobs) = (dir.path().join("snapshots/main"), dir.path().join("blobs"));
            std::fs::create_dir_all(&snapshot).and_then(|()| std::fs::create_dir(&blobs)).expect("folders");
            let names = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"];
            for (i, name) in names.iter().enumerate() {
                let hash = format!("{i:064x}");
                std::fs::copy(outside.join(name), blobs.join(&hash)).expect("a copy");
                symlink(format!("../../blobs/{hash}"), snapshot.join(name)).expect("a link");
            }
            snapshot
        }),
    ]
}

fn config_cases() -> Vec<Case> {
    use Kind::*;
    let config = |fields: Value| builder().config(fields);
    let rows: Vec<(&str, CheckpointBuilder, Expect)> = vec![
        ("C02 model_type", config(json!({"model_type": "llama"})), Reject(Unsupported)),
        ("C02 no_model_type", config(json!({"model_type": null})), Reject(Missing)),
        ("C02 architectures", config(json!({"architectures": ["JambaForCausalLM"]})), Reject(Unsupported)),
        ("C03 zero", config(json!({"hidden_size": 0})), Reject(OutOfRange)),
        ("C03 negative", config(json!({"hidden_size": -8})), Reject(OutOfRange)),
        ("C03 float", config(json!({"hidden_size": 8.5})), Reject(WrongType)),
        ("C03 string", config(json!({"hidden_size": "8"})), Reject(WrongType)),
        ("C03 1e30", config(json!({"hidden_size": 1e30})), Reject(WrongType)),
        ("C03 missing", config(json!({"hidden_size": null})), Reject(Missing)),
        ("C04 intermediate", config(json!({"intermediate_size": 24})), Reject(Unsupported)),
        ("C05 state_0", config(json!({"state_size": 0})), Reject(OutOfRange)),
        ("C05 state_2_31", config(json!({"state_size": 1u64 << 31})), Reject(OutOfRange)),
        ("C06 conv_kernel", config(json!({"conv_kernel": 3})), Reject(BadShape)),
        ("C07 rank_auto", config(json!({"time_step_rank": "auto"})), Accept),
        ("C07 rank_0", config(json!({"time_step_rank": 0})), Reject(OutOfRange)),
        ("C08 vocab", config(json!({"vocab_size": 17})), Reject(BadShape)),
        ("C09 more_layers", config(json!({"num_hidden_layers": 2})), Reject(Missing)),
        ("C09 max_layers", config(json!({"num_hidden_layers": 4294967295u32})), Reject(OutOfRange)),
        ("C10 eps_negative", config(json!({"layer_norm_epsilon": -1e-5})), Reject(OutOfRange)),
        ("C10 eps_zero", config(json!({"mixer_rms_eps": 0.0})), Reject(OutOfRange)),
        ("C10 eps_text", config(json!({"mixer_rms_eps": "1e-6"})), Reject(WrongType)),
        ("C11 tied_with_head", config(json!({"tie_word_embeddings": true})), Warn("lm_head")),
        ("C11 untied_no_head", builder().without("lm_head.weight"), Reject(Missing)),
        ("C12 no_mixer_eps", config(json!({"mixer_rms_eps": null})), Warn("mixer_rms_eps")),
        ("C16 use_bias", config(json!({"use_bias": true})), Reject(Unsupported)),
        ("C17 no_conv_bias", config(json!({"use_conv_bias": false})), Reject(Unsupported)),
        ("C18 act", config(json!({"hidden_act": "gelu"})), Reject(Unsupported)),
        (
            "C19 bitsandbytes",
            config(json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}})),
            Warn("no tensor is quantized"),
        ),
        (
            "C19 gptq",
            config(json!({"quantization_config": {"quant_method": "gptq", "bits": 4}})),
            Reject(Unsupported),
        ),
        (
            "C19 4_and_8_bits",
            config(json!({"quantization_config": {"load_in_4bit": true, "load_in_8bit": true}})),
            Reject(Inconsistent),
        ),
        ("C20 missing_tensor", builder().without("backbone.layers.0.mixer.A_log"), Reject(Missing)),
        ("C21 eos_text", config(json!({"eos_token_id": "11"})), Reject(WrongType)),
        ("C09 fewer_layers", config(json!({"num_hidden_layers": 0})), Reject(OutOfRange)),
        ("C05 state_as_text", config(json!({"state_size": "2"})), Reject(WrongType)),
        ("C10 eps_1e400", config(json!({"layer_norm_epsilon": 2.0})), Reject(OutOfRange)),
    ];
    let case = |(name, builder, expect): (&str, CheckpointBuilder, Expect)| {
        folder_case("config", name, expect, move |dir| builder.write_into(dir))
    };
    rows.into_iter().map(case).chain([a_log_overflows()]).collect()
}

/// 89 in BF16, whose exp is infinite in f32.
fn a_log_overflows() -> Case {
    folder_case("config", "C15 a_log_89", RejectWith(Kind::NotFinite, "layers.0.mixer.A_log"), |dir| {
        let path = builder().write_into(dir);
        builder().fill("backbone.layers.0.mixer.A_log", [0xb2, 0x42], &path.join("model.safetensors"));
        path
    })
    .by(Action::Convert)
}

fn config_texts() -> Vec<Case> {
    use Kind::*;
    let wide: Vec<String> = (0..100_000).map(|i| format!(r#""{i}":1"#)).collect();
    let rows = [
        ("C01 not_json", "hello".to_owned(), BadJson),
        ("C01 empty", String::new(), BadJson),
        ("C01 list", "[]".to_owned(), BadJson),
        ("C10 eps_nan", r#"{"model_type": "mamba", "layer_norm_epsilon": NaN}"#.to_owned(), BadJson),
        ("C13 depth_10000", "[".repeat(10_000), Limit),
        ("C13 wide_array", format!("[{}1]", "1,".repeat(500_000)), Limit),
        ("C13 wide_array_of_objects", format!(r#"[{}1]"#, r#"{"a":1},"#.repeat(10_000)), Limit),
        ("C13 wide_object", format!("{{{}}}", wide.join(",")), Limit),
        ("C14 duplicate", r#"{"model_type": "mamba", "model_type": "mamba"}"#.to_owned(), Duplicate),
    ];
    let case = |(name, text, kind): (&str, String, Kind)| {
        folder_case("config", name, Reject(kind), move |dir| {
            let path = builder().write_into(dir);
            dir.file("config.json", text.as_bytes());
            path
        })
    };
    rows.into_iter().map(case).collect()
}
