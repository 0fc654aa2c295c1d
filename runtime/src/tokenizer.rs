//! Text to token ids and back, equal to Hugging Face's ids.
//!
//! Unicode classes, the pre-tokenizers' parts and finding added tokens come from the crate `tokenizers`; how they are put
//! together is fixed here for the two kinds of [`PreTokenizer`], so that no regex of a file is ever run. Words become ids
//! in `bpe.rs`.

use crate::bpe::Bpe;
use crate::model::Model;
use kestrel_formats::tokenizer::{PreTokenizer, TokenType, TokenizerData};
use kestrel_formats::{Error, ErrorKind, Result};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::{
    AddedToken, AddedVocabulary, OffsetType, PreTokenizer as _, PreTokenizerWrapper, SplitDelimiterBehavior,
    Token,
};

/// Encodes and decodes with one model's vocabulary.
pub struct Tokenizer {
    bpe: Bpe,
    /// Unicode normalization, where the tokenizer has one.
    normalizer: Option<NFC>,
    pre: PreTokenizerWrapper,
    /// Finds special tokens and those added by hand.
    with_special: AddedVocabulary,
    /// Finds only those added by hand.
    without_special: AddedVocabulary,
    /// The bytes of all tokens, one after the other, and where each ends.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    types: Vec<TokenType>,
    bos: Option<u32>,
    end_tokens: Vec<u32>,
    add_bos: bool,
}

impl Model {
    /// The tokenizer that the model's file brings. `Missing` if it brings none.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match self.tokenizer_data() {
            Some(data) => Tokenizer::new(data),
            None => {
                Err(Error::new(ErrorKind::Missing).what("tokenizer").expected("a vocabulary in the model"))
            }
        }
    }
}

impl Tokenizer {
    /// Builds the tables. `UnsupportedTokenizer` if `tokenizers` refuses them, which validated data does not cause.
    pub fn new(data: &TokenizerData) -> Result<Self> {
        let text = |id: u32| std::str::from_utf8(data.tokens.get(id as usize)?).ok();
        let (normalizer, pre) = pre_tokenizer(data.pre)?;
        let mut with_special = AddedVocabulary::new();
        // A token that is not UTF-8 can be found in no text.
        let (ids, added): (Vocab, Vec<AddedToken>) = (0..)
            .zip(&data.token_types)
            .filter(|(_, ty)| matches!(ty, TokenType::Control | TokenType::UserDefined))
            .filter_map(|(id, ty)| {
                let text = text(id)?;
                Some(((text.to_owned(), id), AddedToken::from(text, *ty == TokenType::Control)))
            })
            .unzip();
        let ids = BPE::builder().vocab_and_merges(ids, Vec::new()).build().map_err(unsupported)?;
        with_special.add_tokens(&added, &ids, normalizer.as_ref());
        let mut without_special = with_special.clone();
        without_special.set_encode_special_tokens(true);
        let (bytes, ends) = decoded(data);
        Ok(Self {
            bpe: Bpe::new(data),
            normalizer,
            pre,
            with_special,
            without_special,
            bytes,
            ends,
            types: data.token_types.clone(),
            bos: data.bos,
            end_tokens: data.eos.clone(),
            add_bos: data.add_bos,
        })
    }

    /// The ids of `text`. `parse_special` finds special tokens written in the text; leave it off for text that a
    /// user wrote, where `<|im_end|>` or, in Falcon's instruct models, the word `assistant` would become one.
    /// Nothing is put in front; see [`Self::prompt_bos`].
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        let added = if parse_special { &self.with_special } else { &self.without_special };
        let mut pieces = added.extract_and_normalize(self.normalizer.as_ref(), text);
        self.pre.pre_tokenize(&mut pieces).map_err(unsupported)?;
        // Only the ids are asked for.
        let token = |id| Token::new(id, String::new(), (0, 0));
        pieces
            .tokenize(|piece| Ok(self.bpe.encode(piece.get()).into_iter().map(token).collect()))
            .map_err(unsupported)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(unsupported)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token that a prompt starts with, for models that want one.
    pub fn prompt_bos(&self) -> Option<u32> {
        self.bos.filter(|_| self.add_bos)
    }

    /// The token that stands before a text of which every token is to be predicted: the one that begins texts, or else
    /// the one that ends them. `Missing` if there is neither.
    pub fn text_start(&self) -> Result<u32> {
        self.bos.or(self.end_tokens.first().copied()).ok_or_else(|| {
            Error::new(ErrorKind::Missing).what("tokenizer").expected("a token that begins or ends texts")
        })
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that a token stands for; a special token's are its name. Empty for an id outside the vocabulary
    /// and for the unused tokens that fill it up.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = id.checked_sub(1).and_then(|before| self.ends.get(before).copied()).unwrap_or(0);
        self.ends.get(id).and_then(|&end| self.bytes.get(start..end)).unwrap_or_default()
    }

    /// Whether the token ends a generation.
    pub fn is_end(&self, id: u32) -> bool {
        self.end_tokens.contains(&id)
    }

    /// Whether the token is special, and not part of a text.
    pub fn is_special(&self, id: u32) -> bool {
        self.types.get(id as usize) == Some(&TokenType::Control)
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        self.types.len()
    }
}

fn unsupported(e: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::UnsupportedTokenizer).what("tokenizer").found(e)
}

/// The fixed pipelines. [`ByteLevel`] with its regex cuts GPT-2's words and then maps bytes to letters, so the parts
/// after it see one letter per byte: in Falcon's, the bytes of `²` (C2 B2) are `Â` and `²`, the second a digit.
fn pre_tokenizer(kind: PreTokenizer) -> Result<(Option<NFC>, PreTokenizerWrapper)> {
    let words = ByteLevel::new(false, true, true);
    Ok(match kind {
        PreTokenizer::GptNeox => (Some(NFC), words.into()),
        PreTokenizer::Falcon => {
            let threes = SplitPattern::Regex("[0-9][0-9][0-9]".to_owned());
            let threes = Split::new(threes, SplitDelimiterBehavior::Isolated, false).map_err(unsupported)?;
            let punctuation = Punctuation::new(SplitDelimiterBehavior::Contiguous);
            let parts = vec![punctuation.into(), words.into(), Digits::new(false).into(), threes.into()];
            (None, Sequence::new(parts).into())
        }
    })
}

/// GPT-2's alphabet: printable Latin-1 characters stand for their own byte, the other 68 bytes in order for the
/// characters from U+0100 on.
struct Alphabet([Option<u8>; 256 + 68]);

impl Alphabet {
    fn new() -> Self {
        let own = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let mut bytes = [None; 256 + 68];
        for b in (0..=255).filter(own) {
            bytes[usize::from(b)] = Some(b);
        }
        for (place, b) in bytes[256..].iter_mut().zip((0..=255).filter(|b| !own(b))) {
            *place = Some(b);
        }
        Self(bytes)
    }

    fn byte(&self, c: char) -> Option<u8> {
        self.0.get(c as usize).copied().flatten()
    }
}

/// The bytes of every token, and where each ends.
fn decoded(data: &TokenizerData) -> (Vec<u8>, Vec<usize>) {
    let alphabet = Alphabet::new();
    let mut bytes = Vec::with_capacity(data.tokens.iter().map(Vec::len).sum());
    let ends = data.tokens.iter().zip(&data.token_types).map(|(token, ty)| {
        let start = bytes.len();
        match (ty, std::str::from_utf8(token)) {
            (TokenType::Unused, _) => {}
            (TokenType::Control | TokenType::UserDefined, _) | (_, Err(_)) => bytes.extend_from_slice(token),
            (_, Ok(text)) => {
                bytes.extend(text.chars().map_while(|c| alphabet.byte(c)));
                if bytes.len() - start != text.chars().count() {
                    bytes.truncate(start); // Not in the alphabet: plain text.
                    bytes.extend_from_slice(token);
                }
            }
        }
        bytes.len()
    });
    let ends = ends.collect();
    (bytes, ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_has_a_letter_for_every_byte() {
        let alphabet = Alphabet::new();
        let mut bytes: Vec<u8> = ('\0'..='\u{1000}').filter_map(|c| alphabet.byte(c)).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        // Known from GPT-2's vocabulary.
        assert_eq!(['Ġ', 'Ċ', 'A', 'Ń'].map(|c| alphabet.byte(c)), [b' ', b'\n', b'A', 0xAD].map(Some));
    }
}
