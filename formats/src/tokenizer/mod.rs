//! What a tokenizer is made of: vocabulary, merges, special ids. Read from a Hugging Face folder or a GGUF file,
//! written as GGUF metadata. Encoding text is `kestrel_runtime::tokenizer`'s part.
//!
//! Two tokenizers are known, both byte-level BPE: Falcon's and GPT-NeoX's. They are recognised by the structure of
//! their pre-tokenizer; a regex that a file brings is compared, never run.

mod gguf;
mod hf;

use crate::json::shorten;
use crate::limits::{MERGES_MAX, TOKEN_BYTES_MAX, VOCAB_MAX};
use crate::{Error, ErrorKind, Result};
use std::collections::HashMap;

/// How text is cut into words before BPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreTokenizer {
    /// Runs of punctuation, then GPT-2's words, then runs of digits in threes; no normalization.
    Falcon,
    /// Unicode NFC, then GPT-2's words. State-spaces' Mamba models use it.
    GptNeox,
}

/// Kind of a token; the discriminants are those of `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenType {
    /// Made by merges.
    Normal = 1,
    /// The unknown token.
    Unknown = 2,
    /// Special: found in text only where special tokens are parsed, not shown.
    Control = 3,
    /// Added by hand: found in any text before BPE.
    UserDefined = 4,
    /// Fills the vocabulary up to the size of the embedding.
    Unused = 5,
    /// One byte.
    Byte = 6,
}

impl TokenType {
    fn from_id(id: i32) -> Option<Self> {
        let all = [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte];
        all.into_iter().find(|t| *t as i32 == id)
    }
}

/// Two tokens that stand beside each other and the one that they become, by id: all three are tokens always, and ids take
/// a tenth of the memory of texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The first half.
    pub left: u32,
    /// The second half.
    pub right: u32,
    /// The token whose text is both.
    pub joined: u32,
}

/// A validated byte-level BPE tokenizer: tokens are distinct, every merge joins two tokens into a third, and every
/// special id is a token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerData {
    /// How text is cut into words.
    pub pre: PreTokenizer,
    /// By id. Normal tokens are in the byte-level alphabet of GPT-2 (a character per byte); others are plain text.
    /// Bytes, because a GGUF file may hold tokens that are not UTF-8.
    pub tokens: Vec<Vec<u8>>,
    /// By id.
    pub token_types: Vec<TokenType>,
    /// Best first.
    pub merges: Vec<Merge>,
    /// Begin of text.
    pub bos: Option<u32>,
    /// Every token that ends a generation; the first is `eos_token_id`.
    pub eos: Vec<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Whether encoding puts `bos` in front.
    pub add_bos: bool,
    /// Jinja source of the chat template.
    pub chat_template: Option<String>,
    /// What is odd but not wrong.
    pub warnings: Vec<String>,
}

impl TokenizerData {
    /// The vocabulary filled with unused tokens `[PADn]` up to the embedding's rows, as llama.cpp's converter does;
    /// `OutOfRange` if it has more tokens than rows.
    pub fn padded_to(mut self, rows: usize) -> Result<Self> {
        if self.tokens.len() > rows {
            return Err(Error::new(ErrorKind::OutOfRange)
                .what("vocabulary")
                .expected(format!("at most vocab_size = {rows} tokens"))
                .found(self.tokens.len()));
        }
        self.tokens.extend((self.tokens.len()..rows).map(|i| format!("[PAD{i}]").into_bytes()));
        self.token_types.resize(rows, TokenType::Unused);
        Ok(self)
    }

    /// A token's text for messages.
    fn shown(token: &[u8]) -> String {
        shorten(&String::from_utf8_lossy(token))
    }

    /// Checks everything that the type's description promises. Both readers end here.
    fn checked(mut self) -> Result<Self> {
        let special = self.bos.iter().map(|id| ("bos", id));
        let special = special.chain(self.eos.iter().map(|id| ("eos", id)));
        for (name, &id) in special.chain(self.pad.iter().map(|id| ("padding", id))) {
            if id as usize >= self.tokens.len() {
                return Err(Error::new(ErrorKind::OutOfRange)
                    .what(format!("{name} token id"))
                    .expected(format!("an id below {}", self.tokens.len()))
                    .found(id));
            }
        }
        if self.tokens.iter().any(Vec::is_empty) {
            self.warnings.push("the vocabulary has an empty token".to_owned());
        }
        Ok(self)
    }
}

/// Ids by text, from which merges are resolved.
struct Ids<'a>(HashMap<&'a [u8], u32>);

impl<'a> Ids<'a> {
    /// `Duplicate` if two tokens have the same text: an id could not be found from the text, and llama.cpp aborts.
    fn new(tokens: impl ExactSizeIterator<Item = &'a [u8]>) -> Result<Self> {
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.enumerate() {
            check_token(id, token)?;
            if let Some(first) = ids.insert(token, id as u32) {
                return Err(Error::new(ErrorKind::Duplicate)
                    .what(format!("token {id}"))
                    .expected("each token once")
                    .found(format!("\"{}\", as token {first}", TokenizerData::shown(token))));
            }
        }
        Ok(Self(ids))
    }

    /// The ids of merge `n`. `Inconsistent` unless both and their concatenation are tokens.
    fn merge(&self, n: usize, left: &[u8], right: &[u8], buffer: &mut Vec<u8>) -> Result<Merge> {
        buffer.clear();
        buffer.extend_from_slice(left);
        buffer.extend_from_slice(right);
        let find = |part: &[u8]| {
            self.0.get(part).copied().ok_or_else(|| {
                Error::new(ErrorKind::Inconsistent)
                    .what(format!("merge {n}"))
                    .expected("pieces that are tokens")
                    .found(format!("\"{}\", which is none", TokenizerData::shown(part)))
            })
        };
        // The whole first: of several that are missing, it is the one named.
        let joined = find(buffer)?;
        Ok(Merge { left: find(left)?, right: find(right)?, joined })
    }
}

fn check_token(id: usize, token: &[u8]) -> Result<()> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(Error::new(ErrorKind::Limit)
            .what(format!("token {id}"))
            .expected(format!("at most {TOKEN_BYTES_MAX} bytes"))
            .found(token.len()));
    }
    Ok(())
}

fn check_count(what: &str, n: usize, max: u64) -> Result<()> {
    if n as u64 > max {
        return Err(Error::new(ErrorKind::Limit).what(what).expected(format!("at most {max}")).found(n));
    }
    Ok(())
}

fn check_vocab_count(n: usize) -> Result<()> {
    check_count("vocabulary", n, VOCAB_MAX)
}

fn check_merge_count(n: usize) -> Result<()> {
    check_count("merges", n, MERGES_MAX)
}

/// The halves of a merge written as text, which are separated by exactly one space.
fn split_merge(n: usize, text: &[u8]) -> Result<(&[u8], &[u8])> {
    let mut parts = text.split(|b| *b == b' ');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(left), Some(right), None) if !left.is_empty() && !right.is_empty() => Ok((left, right)),
        _ => Err(Error::new(ErrorKind::BadJson)
            .what(format!("merge {n}"))
            .expected("two pieces separated by one space")
            .found(format!("\"{}\"", TokenizerData::shown(text)))),
    }
}
