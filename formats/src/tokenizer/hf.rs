//! The tokenizer of a Hugging Face folder: tokenizer.json, and the special tokens that its siblings name.

mod json_model;

use super::{
    Ids, Merge, PreTokenizer, TokenType, TokenizerData, check_merge_count, check_token, check_vocab_count,
};
use crate::checkpoint::GenerationConfig;
use crate::checkpoint::folder::Folder;
use crate::json::{describe, parse_object_without, shorten};
use crate::limits::{CONFIG_BYTES_MAX, TOKENIZER_BYTES_MAX};
use crate::{Error, ErrorKind, Result};
use json_model::{Model, TokenizerJson};
use serde_json::{Map, Value, json};
use std::path::Path;

impl TokenizerData {
    /// The tokenizer of a folder by tokenizer.json and tokenizer_config.json alone, without the ids of a model's
    /// configuration; `None` if there is no tokenizer.json.
    pub fn from_hf(dir: &Path) -> Result<Option<Self>> {
        Self::read(&Folder::open(dir)?, &GenerationConfig::default())
    }

    /// The tokenizer of a checkpoint, whose configurations may name special ids that the tokenizer's do not.
    pub(crate) fn from_folder(folder: &Folder, ids: &GenerationConfig) -> Result<Option<Self>> {
        Self::read(folder, ids)
    }

    /// The tokenizer of a tokenizer.json without the files that usually lie beside it. `path` names it in errors.
    pub fn from_json(bytes: &[u8], path: &Path) -> Result<Self> {
        let file = json_model::parse(bytes, path)?;
        let siblings = Siblings { config: Map::new(), special: Map::new(), jinja: None };
        build(file, siblings, &GenerationConfig::default()).map_err(|e| e.file(path))
    }

    fn read(folder: &Folder, ids: &GenerationConfig) -> Result<Option<Self>> {
        let Some((path, bytes)) = folder.read("tokenizer.json", TOKENIZER_BYTES_MAX)? else {
            return Ok(None);
        };
        let file = json_model::parse(&bytes, &path)?;
        drop(bytes); // before the vocabulary is built
        let siblings = Siblings::read(folder)?;
        build(file, siblings, ids).map(Some).map_err(|e| e.file(&path))
    }
}

/// The small files beside tokenizer.json.
struct Siblings {
    /// tokenizer_config.json.
    config: Map<String, Value>,
    /// special_tokens_map.json.
    special: Map<String, Value>,
    /// chat_template.jinja.
    jinja: Option<String>,
}

impl Siblings {
    fn read(folder: &Folder) -> Result<Self> {
        let object = |name: &str| match folder.read(name, CONFIG_BYTES_MAX)? {
            // What tokenizer.json has as well, thousands of objects in some.
            Some((path, bytes)) => parse_object_without("added_tokens_decoder", &bytes, &path),
            None => Ok(Map::new()),
        };
        let jinja = match folder.read("chat_template.jinja", CONFIG_BYTES_MAX)? {
            Some((path, bytes)) => Some(String::from_utf8(bytes).map_err(|e| {
                let at = e.utf8_error().valid_up_to() as u64;
                Error::new(ErrorKind::BadName).file(&path).at(at).expected("UTF-8 text").found("other bytes")
            })?),
            None => None,
        };
        Ok(Self {
            config: object("tokenizer_config.json")?,
            special: object("special_tokens_map.json")?,
            jinja,
        })
    }

    /// The text of `bos_token` and its like: a string, or an object with `content`.
    fn special_token(&self, field: &str) -> Option<&str> {
        [&self.config, &self.special].into_iter().find_map(|fields| match fields.get(field)? {
            Value::String(text) => Some(text.as_str()),
            Value::Object(token) => token.get("content")?.as_str(),
            _ => None,
        })
    }

    /// As transformers: chat_template.jinja, which wins over tokenizer_config.json; of several, the default one.
    fn chat_template(&self) -> Option<String> {
        if let Some(jinja) = &self.jinja {
            return Some(jinja.clone());
        }
        match self.config.get("chat_template")? {
            Value::String(text) => Some(text.clone()),
            Value::Array(list) => {
                let default =
                    list.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"))?;
                default.get("template")?.as_str().map(str::to_owned)
            }
            _ => None,
        }
    }
}

fn unsupported(what: &str, expected: &str, found: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::UnsupportedTokenizer).what(what).expected(expected).found(found)
}

fn build(file: TokenizerJson, siblings: Siblings, ids: &GenerationConfig) -> Result<TokenizerData> {
    let TokenizerJson { model, rest } = file;
    let model = model.ok_or_else(|| Error::new(ErrorKind::Missing).what("model").expected("a BPE model"))?;
    check_model(&model)?;
    let pre = pre_tokenizer(&rest)?;
    if part_type(&rest, "decoder") != Some("ByteLevel") {
        return Err(unsupported("decoder", "ByteLevel", part_shown(&rest, "decoder")));
    }
    let added = added_tokens(&rest)?;
    let (tokens, token_types) = vocabulary(&model, &added)?;
    let id_of = |text: &str| added.iter().find(|t| t.text == text).map(|t| t.id);
    let special = |field: &str| siblings.special_token(field).and_then(id_of);
    // The text in tokenizer_config.json comes first, as in llama.cpp's converter; the configurations' ids follow.
    let mut eos: Vec<u32> = special("eos_token").into_iter().collect();
    eos.extend(ids.eos.iter().filter(|id| !eos.contains(id)).copied().collect::<Vec<_>>());
    let bos = special("bos_token").or(ids.bos);
    let add_bos = match siblings.config.get("add_bos_token") {
        Some(Value::Bool(add)) => *add,
        _ => template_adds_bos(&rest, bos.and_then(|id| tokens.get(id as usize)))?,
    };
    let merges = merges(&model, &tokens)?;
    TokenizerData {
        pre,
        tokens,
        token_types,
        merges,
        bos,
        eos,
        pad: special("pad_token").or(ids.pad),
        add_bos,
        chat_template: siblings.chat_template(),
        warnings: Vec::new(),
    }
    .checked()
}

/// Byte-level BPE has none of these options.
fn check_model(model: &Model) -> Result<()> {
    match &model.kind {
        Some(kind) if kind == "BPE" => {}
        Some(kind) => return Err(unsupported("model.type", "BPE", format!("\"{}\"", shorten(kind)))),
        None => return Err(unsupported("model.type", "BPE", "no type")),
    }
    for (name, value) in &model.options {
        let harmless = match name.as_str() {
            "dropout" | "continuing_subword_prefix" | "end_of_word_suffix" => {
                value.is_null() || *value == json!("") || *value == json!(0.0)
            }
            "unk_token" => true, // Byte-level text has no unknown part.
            "fuse_unk" | "byte_fallback" | "ignore_merges" => {
                matches!(value, Value::Null | Value::Bool(false))
            }
            _ => false,
        };
        if !harmless {
            return Err(unsupported(
                &format!("model.{}", shorten(name)),
                "plain byte-level BPE",
                describe(value),
            ));
        }
    }
    Ok(())
}

/// The `type` of a part such as `decoder`.
fn part_type<'a>(rest: &'a Map<String, Value>, part: &str) -> Option<&'a str> {
    rest.get(part)?.get("type")?.as_str()
}

fn part_shown(rest: &Map<String, Value>, part: &str) -> String {
    shorten(&rest.get(part).unwrap_or(&Value::Null).to_string())
}

/// Recognises the pre-tokenizer by its structure. Nothing in it is run.
fn pre_tokenizer(rest: &Map<String, Value>) -> Result<PreTokenizer> {
    let null = Value::Null;
    let pre = rest.get("pre_tokenizer").unwrap_or(&null);
    let normalizer = rest.get("normalizer").unwrap_or(&null);
    // trim_offsets concerns offsets only, which are not used.
    let byte_level = |part: &Value| {
        part.get("type") == Some(&json!("ByteLevel"))
            && part.get("add_prefix_space") == Some(&json!(false))
            && part.get("use_regex").unwrap_or(&json!(true)) == &json!(true)
    };
    let found = match pre.get("pretokenizers").and_then(Value::as_array).map(Vec::as_slice) {
        Some([punctuation, byte, digits, split]) => (*punctuation
            == json!({"type": "Punctuation", "behavior": "Contiguous"})
            && byte_level(byte)
            && *digits == json!({"type": "Digits", "individual_digits": false})
            && *split
                == json!({"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": false}))
        .then_some((PreTokenizer::Falcon, Value::Null)),
        _ => byte_level(pre).then_some((PreTokenizer::GptNeox, json!({"type": "NFC"}))),
    };
    match found {
        Some((kind, wanted)) if *normalizer == wanted => Ok(kind),
        Some((kind, wanted)) => Err(unsupported(
            "normalizer",
            &format!("{wanted} with the pre-tokenizer of {kind:?}"),
            part_shown(rest, "normalizer"),
        )),
        None => Err(unsupported(
            "pre_tokenizer",
            "Falcon's (Punctuation, ByteLevel, Digits, Split) or GPT-NeoX's (ByteLevel)",
            part_shown(rest, "pre_tokenizer"),
        )),
    }
}

/// An entry of `added_tokens`.
struct Added {
    id: u32,
    text: String,
    special: bool,
}

fn added_tokens(rest: &Map<String, Value>) -> Result<Vec<Added>> {
    let list = match rest.get("added_tokens") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => {
            let error = Error::new(ErrorKind::WrongType).what("added_tokens").expected("an array");
            return Err(error.found(describe(other)));
        }
    };
    check_vocab_count(list.len())?;
    list.iter().enumerate().map(|(i, token)| added_token(i, token)).collect()
}

fn added_token(i: usize, token: &Value) -> Result<Added> {
    let id = token.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
    let (Some(id), Some(text)) = (id, token.get("content").and_then(Value::as_str)) else {
        return Err(Error::new(ErrorKind::WrongType)
            .what(format!("added token {i}"))
            .expected("an object with id and content")
            .found(shorten(&token.to_string())));
    };
    let set = |name: &str| token.get(name) == Some(&Value::Bool(true));
    if let Some(option) = ["single_word", "lstrip", "rstrip"].into_iter().find(|name| set(name)) {
        let what = format!("added token {i} (\"{}\")", shorten(text));
        return Err(unsupported(&what, "a token matched as it is, which is all that GGUF can say", option));
    }
    Ok(Added { id, text: text.to_owned(), special: set("special") })
}

/// Tokens by id, and their types. The ids of `vocab` and `added_tokens` together are 0, 1, 2, … without a gap.
fn vocabulary(model: &Model, added: &[Added]) -> Result<(Vec<Vec<u8>>, Vec<TokenType>)> {
    let mut by_id: Vec<(u32, &str, TokenType)> = Vec::with_capacity(model.vocab.len() + added.len());
    by_id.extend(model.vocab.iter().map(|(text, id)| (*id, text.as_str(), TokenType::Normal)));
    by_id.extend(added.iter().map(|t| {
        (t.id, t.text.as_str(), if t.special { TokenType::Control } else { TokenType::UserDefined })
    }));
    by_id.sort_by_key(|(id, _, _)| *id); // Stable: what `added_tokens` says of a token comes last.
    let (mut tokens, mut types) = (Vec::with_capacity(by_id.len()), Vec::with_capacity(by_id.len()));
    let mut last = "";
    for (id, text, kind) in by_id {
        let again = id as usize + 1 == tokens.len();
        if again && text == last && kind != TokenType::Normal {
            types.pop();
            types.push(kind);
            continue;
        }
        if again {
            return Err(Error::new(ErrorKind::Duplicate)
                .what(format!("token id {id}"))
                .expected("one token per id")
                .found(format!("\"{}\" and \"{}\"", shorten(last), shorten(text))));
        }
        if id as usize != tokens.len() {
            return Err(Error::new(ErrorKind::Inconsistent)
                .what(format!("token \"{}\"", shorten(text)))
                .expected(format!("id {}, the next without a gap", tokens.len()))
                .found(id));
        }
        check_token(tokens.len(), text.as_bytes())?;
        tokens.push(text.as_bytes().to_vec());
        types.push(kind);
        last = text;
    }
    check_vocab_count(tokens.len())?;
    Ok((tokens, types))
}

/// Merges in either encoding, as ids.
fn merges(model: &Model, tokens: &[Vec<u8>]) -> Result<Vec<Merge>> {
    let ids = Ids::new(tokens.iter().map(Vec::as_slice))?;
    check_merge_count(model.merges.len())?;
    let mut joined = Vec::new();
    let merge = |(n, (left, right)): (usize, (&[u8], &[u8]))| {
        if left.contains(&b' ') || right.contains(&b' ') {
            return Err(unsupported(
                &format!("merge {n}"),
                "pieces in the byte-level alphabet",
                "a space in one",
            ));
        }
        ids.merge(n, left, right, &mut joined)
    };
    model.merges.iter().enumerate().map(merge).collect()
}

/// Whether the post-processor puts the begin-of-text token in front. Anything else it may do is refused.
fn template_adds_bos(rest: &Map<String, Value>, bos: Option<&Vec<u8>>) -> Result<bool> {
    let refused = || {
        unsupported("post_processor", "none, ByteLevel, or a template", part_shown(rest, "post_processor"))
    };
    match part_type(rest, "post_processor") {
        None | Some("ByteLevel") => Ok(false),
        Some("TemplateProcessing") => {
            let single = rest.get("post_processor").and_then(|p| p.get("single")).and_then(Value::as_array);
            let special = |part: &Value| part.get("SpecialToken").is_some();
            match single.map(Vec::as_slice) {
                Some([text]) if !special(text) => Ok(false),
                Some([first, text]) if special(first) && !special(text) => {
                    let name = first.get("SpecialToken").and_then(|t| t.get("id")).and_then(Value::as_str);
                    if name.map(str::as_bytes) == bos.map(Vec::as_slice) { Ok(true) } else { Err(refused()) }
                }
                _ => Err(refused()),
            }
        }
        Some(_) => Err(refused()),
    }
}
