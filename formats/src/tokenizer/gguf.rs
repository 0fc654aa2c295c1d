//! The tokenizer in GGUF metadata, under the keys of llama.cpp.

use super::{
    Ids, Merge, PreTokenizer, TokenType, TokenizerData, check_merge_count, check_vocab_count, split_merge,
};
use crate::gguf::{Gguf, Metadata, Value};
use crate::json::shorten;
use crate::{Error, ErrorKind, Result};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
/// A second token that ends a generation; llama.cpp reads it.
const EOT: &str = "tokenizer.ggml.eot_token_id";
const PAD: &str = "tokenizer.ggml.padding_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
/// All tokens that end a generation. llama.cpp has no key for a list.
const EOS_LIST: &str = "kestrel.eos_token_ids";

/// Control tokens that end a generation by their text in files without [`EOS_LIST`]; llama.cpp does the same.
const END_TEXTS: [&str; 4] = ["<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>"];

impl PreTokenizer {
    /// The name in `tokenizer.ggml.pre`. For the GPT-NeoX vocabulary llama.cpp's converter writes `mpt`, the first
    /// model with it that llama.cpp knew.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Falcon => "falcon",
            Self::GptNeox => "mpt",
        }
    }

    /// OLMo's first models share GPT-NeoX's tokenizer as well.
    fn from_gguf_name(name: &str) -> Option<Self> {
        match name {
            "falcon" => Some(Self::Falcon),
            "mpt" | "olmo" => Some(Self::GptNeox),
            _ => None,
        }
    }
}

impl TokenizerData {
    /// The tokenizer of a GGUF file; `None` if the file has none.
    ///
    /// Errors: `UnsupportedTokenizer` for another model or pre-tokenizer, and whatever contradicts itself.
    pub fn from_gguf(gguf: &Gguf) -> Result<Option<Self>> {
        Self::from_metadata(gguf.metadata()).map_err(|e| e.file(gguf.path()))
    }

    fn from_metadata(m: &Metadata) -> Result<Option<Self>> {
        let pre = match (m.str(MODEL)?, m.str(PRE)?) {
            (None | Some("no_vocab"), _) => return Ok(None),
            (Some("gpt2"), Some(pre)) => PreTokenizer::from_gguf_name(pre)
                .ok_or_else(|| unsupported(PRE, "falcon or mpt", &format!("\"{}\"", shorten(pre))))?,
            (Some("gpt2"), None) => return Err(unsupported(PRE, "falcon or mpt", "no such key")),
            (Some(model), _) => return Err(unsupported(MODEL, "gpt2", &format!("\"{}\"", shorten(model)))),
        };
        let missing =
            |key: &str| Error::new(ErrorKind::Missing).what(format!("key \"{key}\"")).expected("the key");
        let texts = m.strings(TOKENS)?.ok_or_else(|| missing(TOKENS))?;
        check_vocab_count(texts.len())?;
        let tokens: Vec<Vec<u8>> = texts.iter().map(<[u8]>::to_vec).collect();
        let merges = {
            let ids = Ids::new(tokens.iter().map(Vec::as_slice))?;
            let texts = m.strings(MERGES)?.ok_or_else(|| missing(MERGES))?;
            check_merge_count(texts.len())?;
            let mut joined = Vec::new();
            let merge = |(n, text)| {
                let (left, right) = split_merge(n, text)?;
                ids.merge(n, left, right, &mut joined)
            };
            texts.iter().enumerate().map(merge).collect::<Result<_>>()?
        };
        let token_types = token_types(m, tokens.len())?;
        let mut data = Self {
            pre,
            tokens,
            token_types,
            merges,
            bos: m.u32(BOS)?,
            eos: Vec::new(),
            pad: m.u32(PAD)?,
            add_bos: m.bool(ADD_BOS)?.unwrap_or(false),
            chat_template: m.str(CHAT_TEMPLATE)?.map(str::to_owned),
            warnings: Vec::new(),
        };
        data.eos = data.end_tokens(m)?;
        data.checked().map(Some)
    }

    fn end_tokens(&self, m: &Metadata) -> Result<Vec<u32>> {
        let mut out: Vec<u32> = m.u32(EOS)?.into_iter().chain(m.u32(EOT)?).collect();
        match m.u32s(EOS_LIST)? {
            Some(list) => out.extend(list),
            None => {
                let ends = |token: &[u8]| END_TEXTS.iter().any(|text| text.as_bytes() == token);
                let typed = self.tokens.iter().zip(&self.token_types).enumerate();
                out.extend(
                    typed
                        .filter(|(_, (t, ty))| **ty == TokenType::Control && ends(t))
                        .map(|(id, _)| id as u32),
                );
            }
        }
        let mut seen = Vec::new();
        out.retain(|id| {
            let new = !seen.contains(id);
            seen.push(*id);
            new
        });
        Ok(out)
    }

    /// The metadata that llama.cpp reads, and `kestrel.eos_token_ids` where one id does not say all.
    pub fn to_metadata(&self) -> Vec<(String, Value)> {
        let merge = |m: &Merge| {
            let text = |id: u32| self.tokens.get(id as usize).map_or(&[][..], Vec::as_slice);
            [text(m.left), b" ", text(m.right)].concat()
        };
        let types: Vec<i32> = self.token_types.iter().map(|t| *t as i32).collect();
        let mut out: Vec<(&str, Value)> = vec![
            (MODEL, "gpt2".into()),
            (PRE, self.pre.gguf_name().into()),
            (TOKENS, self.tokens.clone().into()),
            (TOKEN_TYPE, types.into()),
            (MERGES, self.merges.iter().map(merge).collect::<Vec<_>>().into()),
        ];
        let ids = [
            (BOS, self.bos),
            (EOS, self.eos.first().copied()),
            (EOT, self.eos.get(1).copied()),
            (PAD, self.pad),
        ];
        out.extend(ids.into_iter().filter_map(|(key, id)| Some((key, id?.into()))));
        out.push((ADD_BOS, self.add_bos.into()));
        if let Some(template) = &self.chat_template {
            out.push((CHAT_TEMPLATE, template.as_str().into()));
        }
        if self.eos.len() > 1 {
            out.push((EOS_LIST, self.eos.clone().into()));
        }
        out.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// One type per token; all normal if the file has none.
fn token_types(m: &Metadata, n: usize) -> Result<Vec<TokenType>> {
    let Some(ids) = m.i32s(TOKEN_TYPE)? else { return Ok(vec![TokenType::Normal; n]) };
    let error = |kind| Error::new(kind).what(format!("key \"{TOKEN_TYPE}\""));
    if ids.len() != n {
        return Err(error(ErrorKind::Inconsistent)
            .expected(format!("{n} types, one per token"))
            .found(ids.len()));
    }
    ids.into_iter()
        .map(|id| {
            TokenType::from_id(id)
                .ok_or_else(|| error(ErrorKind::OutOfRange).expected("types from 1 to 6").found(id))
        })
        .collect()
}

fn unsupported(key: &str, expected: &str, found: &str) -> Error {
    Error::new(ErrorKind::UnsupportedTokenizer).what(format!("key \"{key}\"")).expected(expected).found(found)
}
