//! Vocabularies in GGUF metadata that contradict themselves.

use super::*;
use crate::gguf_builder::model;

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = vocabulary_cases();
    cases.extend(special_cases());
    cases
}

/// Tokens of [`with_vocabulary`]: the bytes that a text of `a` and `b` needs, two special ones, and padding.
const TOKENS: [&[u8]; 16] = [
    b"<|endoftext|>",
    b"<|im_start|>",
    b"<|im_end|>",
    b"a",
    b"b",
    b"ab",
    b"u",
    b"s",
    b"e",
    b"r",
    b"\xc4\x8a",
    b"i",
    b"t",
    b"n",
    b"<s>",
    b"aba",
];

fn strings(items: &[&[u8]]) -> Raw {
    Raw::array(8, items.len() as u64, &items.iter().flat_map(|t| Raw::str(t).bytes).collect::<Vec<u8>>())
}

fn i32s(items: &[i32]) -> Raw {
    Raw::array(5, items.len() as u64, &items.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
}

fn types(special: &[usize]) -> Vec<i32> {
    (0..TOKENS.len()).map(|i| if special.contains(&i) { 3 } else { 1 }).collect()
}

/// A model that runs, with a vocabulary of 16 tokens.
pub fn with_vocabulary() -> GgufBuilder {
    model(&SMALL)
        .kv("tokenizer.ggml.model", Raw::str(b"gpt2"))
        .kv("tokenizer.ggml.pre", Raw::str(b"falcon"))
        .kv("tokenizer.ggml.tokens", strings(&TOKENS))
        .kv("tokenizer.ggml.token_type", i32s(&types(&[0, 1, 2, 14])))
        .kv("tokenizer.ggml.merges", strings(&[b"a b", b"ab a"]))
        .kv("tokenizer.ggml.bos_token_id", Raw::u32(14))
        .kv("tokenizer.ggml.eos_token_id", Raw::u32(0))
}

fn with_token(id: usize, token: &'static [u8]) -> GgufBuilder {
    let mut tokens = TOKENS;
    tokens[id] = token;
    with_vocabulary().set("tokenizer.ggml.tokens", strings(&tokens))
}

fn t(name: &str, file: GgufBuilder, expect: Expect) -> Case {
    case(name, file, expect).group("GGUF tokenizer").by(Action::Tokenize)
}

fn vocabulary_cases() -> Vec<Case> {
    let set = |key: &str, value| with_vocabulary().set(key, value);
    let merges = |m: &[&[u8]]| set("tokenizer.ggml.merges", strings(m));
    vec![
        t("valid_vocabulary", with_vocabulary(), Accept),
        t("valid_vocabulary_runs", with_vocabulary(), Accept).by(Action::Run),
        t("G71 no_tokenizer", model(&SMALL), Reject(Kind::Missing)),
        t("G71 no_vocab", set("tokenizer.ggml.model", Raw::str(b"no_vocab")), Reject(Kind::Missing)),
        t(
            "G72 other_model",
            set("tokenizer.ggml.model", Raw::str(b"llama")),
            Reject(Kind::UnsupportedTokenizer),
        ),
        t("G72 model_wrong_type", set("tokenizer.ggml.model", Raw::u32(1)), Reject(Kind::WrongType)),
        t(
            "G72 other_pre",
            set("tokenizer.ggml.pre", Raw::str(b"llama-bpe")),
            Reject(Kind::UnsupportedTokenizer),
        ),
        t("G72 no_pre", with_vocabulary().unset("tokenizer.ggml.pre"), Reject(Kind::UnsupportedTokenizer)),
        t("G73 token_twice", with_token(5, b"a"), Reject(Kind::Duplicate)),
        t("G74 no_tokens", with_vocabulary().unset("tokenizer.ggml.tokens"), Reject(Kind::Missing)),
        t(
            "G74 fewer_tokens_than_rows",
            set("tokenizer.ggml.tokens", strings(&TOKENS[..15])),
            Reject(Kind::Inconsistent),
        ),
        t("G74 tokens_of_numbers", set("tokenizer.ggml.tokens", i32s(&[1; 16])), Reject(Kind::WrongType)),
        t("G74 tokens_not_an_array", set("tokenizer.ggml.tokens", Raw::str(b"a")), Reject(Kind::WrongType)),
        t(
            "G75 types_u8",
            set("tokenizer.ggml.token_type", Raw::array(0, 16, &[1; 16])),
            Reject(Kind::WrongType),
        ),
        t(
            "G75 types_f32",
            set("tokenizer.ggml.token_type", Raw::array(6, 16, &[0; 64])),
            Reject(Kind::WrongType),
        ),
        t(
            "G75 scores_u8",
            with_vocabulary().kv("tokenizer.ggml.scores", Raw::array(0, 16, &[1; 16])),
            Accept,
        ),
        t("G76 types_15", set("tokenizer.ggml.token_type", i32s(&[1; 15])), Reject(Kind::Inconsistent)),
        t("G76 types_17", set("tokenizer.ggml.token_type", i32s(&[1; 17])), Reject(Kind::Inconsistent)),
        t("G76 type_7", set("tokenizer.ggml.token_type", i32s(&[7; 16])), Reject(Kind::OutOfRange)),
        t("G76 type_negative", set("tokenizer.ggml.token_type", i32s(&[-1; 16])), Reject(Kind::OutOfRange)),
        t("G77 merge_of_unknown_pieces", merges(&[b"a q"]), Reject(Kind::Inconsistent)),
        t("G77 merge_to_unknown_token", merges(&[b"b a"]), Reject(Kind::Inconsistent)),
        t("G78 merge_without_space", merges(&[b"ab"]), Reject(Kind::BadJson)),
        t("G78 merge_of_three", merges(&[b"a b a"]), Reject(Kind::BadJson)),
        t("G78 merge_empty", merges(&[b""]), Reject(Kind::BadJson)),
        t("G78 merge_twice", merges(&[b"a b", b"a b"]), Accept),
        t("G78 no_merges", with_vocabulary().unset("tokenizer.ggml.merges"), Reject(Kind::Missing)),
        t("G81 token_not_utf8", with_token(13, b"\xff\xfe"), Accept),
        t("G82 token_empty", with_token(13, b""), Warn("empty token")),
        t(
            "G83 token_1_mib",
            with_token(13, Box::leak(vec![b'x'; 1 << 20].into_boxed_slice())),
            Reject(Kind::Limit),
        ),
    ]
}

fn special_cases() -> Vec<Case> {
    let set = |key: &str, value| with_vocabulary().set(key, value);
    vec![
        t(
            "G79 bos_1000000",
            set("tokenizer.ggml.bos_token_id", Raw::u32(1_000_000)),
            Reject(Kind::OutOfRange),
        ),
        t("G79 bos_is_rows", set("tokenizer.ggml.bos_token_id", Raw::u32(16)), Reject(Kind::OutOfRange)),
        t("G80 eos_max", set("tokenizer.ggml.eos_token_id", Raw::u32(u32::MAX)), Reject(Kind::OutOfRange)),
        t("G80 eos_negative", set("tokenizer.ggml.eos_token_id", Raw::i32(-1)), Reject(Kind::OutOfRange)),
        t("G80 eos_text", set("tokenizer.ggml.eos_token_id", Raw::str(b"0")), Reject(Kind::WrongType)),
        t(
            "G80 pad_max",
            set("tokenizer.ggml.padding_token_id", Raw::u32(u32::MAX)),
            Reject(Kind::OutOfRange),
        ),
        t("G80 eot_max", set("tokenizer.ggml.eot_token_id", Raw::u32(u32::MAX)), Reject(Kind::OutOfRange)),
        t(
            "G80 end_list_out_of_range",
            set("kestrel.eos_token_ids", Raw::array(4, 1, &99u32.to_le_bytes())),
            Reject(Kind::OutOfRange),
        ),
        t("G84 add_bos_number", set("tokenizer.ggml.add_bos_token", Raw::u32(1)), Reject(Kind::WrongType)),
        t("G85 template_number", set("tokenizer.chat_template", Raw::u32(1)), Reject(Kind::WrongType)),
        t(
            "G85 template_not_utf8",
            set("tokenizer.chat_template", Raw::str(b"\xff")),
            Reject(Kind::OutOfRange),
        ),
    ]
}
