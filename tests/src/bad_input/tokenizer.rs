//! tokenizer.json files that contradict themselves or ask for what is not supported.

use super::*;
use crate::checkpoint_builder::CheckpointBuilder;
use serde_json::{Value, json};

fn builder() -> CheckpointBuilder {
    CheckpointBuilder::new()
}

fn with_ids(ids: Value) -> CheckpointBuilder {
    CheckpointBuilder { generation: Some(ids), ..builder() }
}

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    use Kind::*;
    let change = |f: fn(&mut Value)| builder().tokenizer(f);
    let rows: Vec<(&str, CheckpointBuilder, Expect)> = vec![
        ("T01 gap", change(|t| t["model"]["vocab"]["ab"] = json!(15)), Reject(Inconsistent)),
        ("T02 id_twice", change(|t| t["model"]["vocab"]["ab"] = json!(13)), Reject(Duplicate)),
        ("T03 id_huge", change(|t| t["model"]["vocab"]["ab"] = json!(4294967295u32)), Reject(Inconsistent)),
        ("T03 id_past_u32", change(|t| t["model"]["vocab"]["ab"] = json!(1u64 << 40)), Reject(WrongType)),
        ("T05 unknown_piece", change(|t| t["model"]["merges"] = json!(["a q"])), Reject(Inconsistent)),
        ("T05 unknown_result", change(|t| t["model"]["merges"] = json!(["b a"])), Reject(Inconsistent)),
        ("T06 no_space", change(|t| t["model"]["merges"] = json!(["ab"])), Reject(BadJson)),
        ("T06 two_spaces", change(|t| t["model"]["merges"] = json!(["a b c"])), Reject(BadJson)),
        ("T06 three_pieces", change(|t| t["model"]["merges"] = json!([["a", "b", "c"]])), Reject(BadJson)),
        ("T06 number", change(|t| t["model"]["merges"] = json!([1])), Reject(BadJson)),
        ("T07 pairs", change(|t| t["model"]["merges"] = json!([["a", "b"]])), Accept),
        ("T08 added_outside", change(|t| t["added_tokens"][0]["id"] = json!(1000)), Reject(Inconsistent)),
        ("T08 added_other_id", change(|t| t["added_tokens"][0]["id"] = json!(12)), Reject(Duplicate)),
        ("T09 bos_out_of_range", with_ids(json!({"bos_token_id": 1_000_000})), Reject(OutOfRange)),
        ("T09 eos_out_of_range", with_ids(json!({"eos_token_id": [11, 4294967295u32]})), Reject(OutOfRange)),
        (
            "T10 other_regex",
            change(|t| t["pre_tokenizer"]["pretokenizers"][3]["pattern"]["Regex"] = json!("[0-9]")),
            Reject(UnsupportedTokenizer),
        ),
        (
            "T10 whitespace",
            change(|t| t["pre_tokenizer"] = json!({"type": "Whitespace"})),
            Reject(UnsupportedTokenizer),
        ),
        (
            "T10 unigram",
            change(|t| t["model"] = json!({"type": "Unigram", "vocab": [["a", 0.0]]})),
            Reject(UnsupportedTokenizer),
        ),
        (
            "T10 byte_fallback",
            change(|t| t["model"]["byte_fallback"] = json!(true)),
            Reject(UnsupportedTokenizer),
        ),
        (
            "T10 decoder",
            change(|t| t["decoder"] = json!({"type": "Metaspace"})),
            Reject(UnsupportedTokenizer),
        ),
        (
            "T10 lstrip",
            change(|t| t["added_tokens"][3]["lstrip"] = json!(true)),
            Reject(UnsupportedTokenizer),
        ),
        (
            "T11 redos",
            change(|t| {
                t["normalizer"] = json!({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""})
            }),
            Reject(UnsupportedTokenizer),
        ),
        ("T12 token_1_mib", change(|t| t["model"]["vocab"]["x".repeat(1 << 20)] = json!(15)), Reject(Limit)),
        ("T16 empty_token", change(|t| t["model"]["vocab"][""] = json!(15)), Warn("empty token")),
        (
            "T03 vocab_over_embedding",
            change(|t| (15..18).for_each(|i| t["model"]["vocab"][format!("t{i}")] = json!(i))),
            Reject(OutOfRange),
        ),
    ];
    let case = |(name, builder, expect): (&str, CheckpointBuilder, Expect)| {
        folder_case("tokenizer", name, expect, move |dir| builder.write_into(dir))
    };
    rows.into_iter().map(case).chain(texts()).collect()
}

/// What a JSON library would not write.
fn texts() -> Vec<Case> {
    let text = builder().tokenizer.expect("a tokenizer").to_string();
    let rows = [
        ("T04 token_twice", text.replace(r#""ab":14"#, r#""ab":14,"ab":15"#), Kind::Duplicate),
        ("T22 surrogate", text.replace(r#""ab":14"#, r#""\ud800":14"#), Kind::BadJson),
        ("T22 not_json", "{".to_owned(), Kind::BadJson),
        ("T22 list", "[]".to_owned(), Kind::BadJson),
        ("T22 depth_100k", "[".repeat(100_000), Kind::BadJson),
        (
            "T14 merges_100k_of_nothing",
            text.replace(r#"["a b"]"#, &format!("[{}]", vec![r#""""#; 100_000].join(","))),
            Kind::BadJson,
        ),
    ];
    let case = |(name, text, kind): (&str, String, Kind)| {
        folder_case("tokenizer", name, Reject(kind), move |dir| {
            let path = builder().write_into(dir);
            dir.file("tokenizer.json", text.as_bytes());
            path
        })
    };
    rows.into_iter().map(case).collect()
}
