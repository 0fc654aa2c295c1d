//! What published checkpoints have that a careless reader gets wrong.

use kestrel_formats::arch::Arch;
use kestrel_formats::checkpoint::Checkpoint;
use kestrel_formats::tokenizer::{Merge, TokenType, TokenizerData};
use kestrel_formats::{ErrorKind, GgmlType};
use kestrel_runtime::tokenizer::Tokenizer;
use kestrel_tests::checkpoint_builder::CheckpointBuilder;
use kestrel_tests::temp_dir::TempDir;
use serde_json::{Value, json};

fn open(dir: &TempDir) -> Checkpoint {
    Checkpoint::open(dir.path()).expect("a valid checkpoint")
}

fn config(fields: Value) -> CheckpointBuilder {
    CheckpointBuilder::new().config(fields)
}

fn warned(c: &Checkpoint, text: &str) -> bool {
    c.warnings().iter().any(|w| w.contains(text))
}

#[test]
fn expand_16_is_ignored() {
    let dir = config(json!({"expand": 16})).write();
    assert_eq!(open(&dir).hyperparams().d_inner, 16);
    // Without intermediate_size nothing in a Falcon config tells d_inner.
    let dir = config(json!({"intermediate_size": null})).write();
    let error = Checkpoint::open(dir.path()).expect_err("expand must not be used");
    assert_eq!(error.kind(), ErrorKind::Missing);
}

/// Plain Mamba, as state-spaces/mamba-*-hf have it: tied, no intermediate_size in old configs.
fn plain(fields: Value) -> CheckpointBuilder {
    let base = json!({"architectures": ["MambaForCausalLM"], "model_type": "mamba", "mixer_rms_eps": null,
        "tie_word_embeddings": null, "expand": 2});
    config(base).config(fields).without("lm_head.weight")
}

#[test]
fn plain_mamba_is_tied_and_has_no_norms() {
    for fields in [json!({}), json!({"intermediate_size": null})] {
        let checkpoint = open(&plain(fields).write());
        let h = checkpoint.hyperparams();
        assert_eq!((h.arch, h.d_inner, h.x_proj_scale(), checkpoint.tied()), (Arch::Mamba, 16, 1.0, true));
    }
    let dir = plain(json!({"intermediate_size": null, "expand": 4})).write();
    assert_eq!(Checkpoint::open(dir.path()).expect_err("expand is wrong").kind(), ErrorKind::Missing);
}

#[test]
fn second_names_of_fields() {
    let dir = config(json!({"hidden_size": null, "d_model": 8, "num_hidden_layers": null, "n_layer": 1,
        "state_size": null, "d_state": 2, "conv_kernel": null, "d_conv": 4, "time_step_rank": null, "dt_rank": 1,
        "intermediate_size": null, "d_inner": 16, "layer_norm_epsilon": null, "rms_norm_eps": 1e-4,
        "torch_dtype": null, "dtype": "bfloat16"}))
    .write();
    let checkpoint = open(&dir);
    let h = checkpoint.hyperparams();
    assert_eq!((h.d_model, h.n_layer, h.d_state, h.d_conv, h.dt_rank, h.d_inner), (8, 1, 2, 4, 1, 16));
    assert_eq!(h.layer_norm_epsilon, 1e-4);
    assert_eq!(checkpoint.config().torch_dtype.as_deref(), Some("bfloat16"));
}

#[test]
fn mixer_rms_eps_absent_is_1e_6_and_falcon3_has_1e_5() {
    let absent = open(&config(json!({"mixer_rms_eps": null})).write());
    assert_eq!(absent.hyperparams().mixer_rms_eps, 1e-6);
    assert!((absent.hyperparams().x_proj_scale() - 10f32.sqrt()).abs() < 1e-6);
    let falcon3 = open(&config(json!({"mixer_rms_eps": 1e-5, "expand": 2})).write());
    assert_eq!(falcon3.hyperparams().x_proj_scale(), 1.0);
}

#[test]
fn a_falcon_published_as_mamba_gets_its_norms() {
    let legacy = json!({"architectures": ["MambaForCausalLM"], "model_type": "mamba", "mixer_rms_eps": null});
    let evidence = [
        config(legacy.clone()).config(json!({"mixer_rms_eps": 1e-6})),
        config(legacy.clone()).config(json!({"_name_or_path": "tiiuae/Falcon-Mamba-7B"})),
        CheckpointBuilder::with_vocab(65_024).config(legacy.clone()),
    ];
    for builder in evidence {
        let checkpoint = open(&builder.write());
        assert_eq!(checkpoint.hyperparams().arch, Arch::FalconMamba);
        assert_eq!(checkpoint.hyperparams().mixer_rms_eps, 1e-6);
        assert!(warned(&checkpoint, "Falcon Mamba"), "{:?}", checkpoint.warnings());
    }
    // Neither an output matrix of its own nor the vocabulary alone make a Falcon.
    assert_eq!(open(&config(legacy.clone()).write()).hyperparams().arch, Arch::Mamba);
    let tied =
        CheckpointBuilder::with_vocab(65_024).config(legacy).config(json!({"tie_word_embeddings": true}));
    assert_eq!(open(&tied.without("lm_head.weight").write()).hyperparams().arch, Arch::Mamba);
}

/// Names token `id` so.
fn rename(t: &mut Value, id: usize, name: &str) {
    let old = t["added_tokens"][id]["content"].as_str().expect("a token").to_owned();
    let vocab = t["model"]["vocab"].as_object_mut().expect("a vocabulary");
    vocab.remove(&old);
    vocab.insert(name.to_owned(), id.into());
    t["added_tokens"][id]["content"] = name.into();
}

/// As falcon-mamba-7b-instruct.
fn instruct() -> CheckpointBuilder {
    let mut builder = CheckpointBuilder::new().tokenizer(|t| {
        for (id, name) in [
            (7, "assistant"),
            (8, "<|begin_of_text|>"),
            (9, "<|im_start|>"),
            (10, "<|im_end|>"),
            (11, "<|end_of_text|>"),
        ] {
            rename(t, id, name);
        }
    });
    builder.generation = Some(json!({"bos_token_id": 8, "eos_token_id": [11, 10], "pad_token_id": 0}));
    builder.tokenizer_config = Some(
        json!({"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}, "pad_token": "<|end_of_text|>"}),
    );
    builder.config(json!({"bos_token_id": 8, "eos_token_id": 11, "pad_token_id": null}))
}

#[test]
fn two_end_tokens() {
    let checkpoint = open(&instruct().write());
    assert_eq!(checkpoint.generation().eos, [11, 10]);
    let data = checkpoint.tokenizer().expect("a tokenizer");
    assert_eq!((data.bos, &data.eos[..], data.pad), (Some(8), &[11, 10][..], Some(11)));
    let metadata = data.to_metadata();
    let value = |key: &str| metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    assert_eq!(value("tokenizer.ggml.eos_token_id"), Some(11u32.into()));
    assert_eq!(value("tokenizer.ggml.eot_token_id"), Some(10u32.into()));
    assert_eq!(value("kestrel.eos_token_ids"), Some(vec![11u32, 10].into()));
    let tokenizer = Tokenizer::new(data).expect("a tokenizer");
    assert!(tokenizer.is_end(10) && tokenizer.is_end(11) && !tokenizer.is_end(8));
    // As Falcon3 has it: the order is the file's, the first is what tokenizer_config.json names.
    let mut falcon3 = instruct();
    falcon3.generation = Some(json!({"eos_token_id": [10, 11]}));
    falcon3.tokenizer_config = None;
    assert_eq!(open(&falcon3.write()).tokenizer().expect("a tokenizer").eos, [10, 11]);
}

#[test]
fn special_ids_without_any_name_come_from_the_configurations() {
    let checkpoint = open(&CheckpointBuilder::new().write());
    let data = checkpoint.tokenizer().expect("a tokenizer");
    assert_eq!((data.bos, &data.eos[..], data.pad), (Some(0), &[11][..], Some(11)));
    assert!(!data.add_bos);
    let mut no_generation = CheckpointBuilder::new();
    no_generation.generation = None;
    let config_only = open(&no_generation.write());
    assert_eq!(config_only.generation().eos, [11]);
}

/// `assistant` is an ordinary word and a special token of the instruct models.
#[test]
fn the_word_assistant_in_user_text() {
    let builder = instruct().tokenizer(|t| {
        for (i, text) in ["s", "i", "t", "n"].iter().enumerate() {
            t["model"]["vocab"][*text] = json!(15 + i);
        }
    });
    let mut builder = builder.config(json!({"vocab_size": 24}));
    for t in
        builder.tensors.iter_mut().filter(|t| t.name.contains("embeddings") || t.name.contains("lm_head"))
    {
        t.shape[0] = 24;
    }
    let checkpoint = open(&builder.write());
    let data = checkpoint.tokenizer().expect("a tokenizer");
    assert_eq!(data.token_types[7], TokenType::Control);
    assert_eq!(data.tokens[19..], (19..24).map(|i| format!("[PAD{i}]").into_bytes()).collect::<Vec<_>>());
    assert!(data.token_types[19..].iter().all(|ty| *ty == TokenType::Unused));
    let tokenizer = Tokenizer::new(data).expect("a tokenizer");
    assert_eq!(tokenizer.encode("assistant", true).expect("ids"), [7]);
    assert_eq!(tokenizer.encode("assistant", false).expect("ids"), [12, 15, 15, 16, 15, 17, 12, 18, 17]);
}

#[test]
fn merges_in_both_encodings_are_the_same() {
    let strings = open(&CheckpointBuilder::new().write());
    let pairs = CheckpointBuilder::new().tokenizer(|t| t["model"]["merges"] = json!([["a", "b"]]));
    assert_eq!(open(&pairs.write()).tokenizer(), strings.tokenizer());
    assert_eq!(strings.tokenizer().expect("a tokenizer").merges, [Merge { left: 12, right: 13, joined: 14 }]);
}

#[test]
fn chat_template_jinja_wins_over_the_config() {
    let mut builder = CheckpointBuilder::new();
    builder.tokenizer_config = Some(json!({"chat_template": "old"}));
    let template =
        |dir: &TempDir| open(dir).tokenizer().and_then(|t: &TokenizerData| t.chat_template.clone());
    let dir = builder.write();
    assert_eq!(template(&dir).as_deref(), Some("old"));
    dir.file("chat_template.jinja", "new {{ x }} é".as_bytes());
    assert_eq!(template(&dir).as_deref(), Some("new {{ x }} é"));
    let list = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
    builder.tokenizer_config = Some(json!({"chat_template": list}));
    assert_eq!(template(&builder.write()).as_deref(), Some("d"));
}

#[test]
fn every_dtype_in_one_and_two_shards() {
    for (name, dtype) in [("F32", GgmlType::F32), ("F16", GgmlType::F16), ("BF16", GgmlType::Bf16)] {
        let mut builder = CheckpointBuilder::new();
        builder.tensors.iter_mut().for_each(|t| t.dtype = name.to_owned());
        for (dir, n_shards) in [(builder.write(), 1), (builder.write_two(None), 2)] {
            let checkpoint = open(&dir);
            assert_eq!((checkpoint.shards().len(), checkpoint.tensors().len()), (n_shards, 13));
            assert!(checkpoint.tensors().iter().all(|t| t.dtype == dtype));
        }
    }
}

#[test]
fn a_shard_that_shrinks_or_changes_is_noticed() {
    let dir = CheckpointBuilder::new().write();
    let checkpoint = open(&dir);
    checkpoint.check_unchanged().expect("nothing happened");
    let file =
        std::fs::File::options().write(true).open(dir.path().join("model.safetensors")).expect("the shard");
    file.set_len(1000).expect("truncated");
    assert_eq!(checkpoint.check_unchanged().expect_err("truncated").kind(), ErrorKind::Changed);
    let last = checkpoint.tensor("lm_head.weight").expect("the last tensor");
    let mut bytes = vec![0; last.n_bytes() as usize];
    assert_eq!(
        checkpoint.read(&last.place, 0, &mut bytes).expect_err("truncated").kind(),
        ErrorKind::Changed
    );
    assert_eq!(checkpoint.map(&last.place).expect_err("truncated").kind(), ErrorKind::Changed);
}
