//! tokenizer.json itself. Its two long parts, the vocabulary and the merges, are read into compact lists; the rest
//! is small and becomes JSON values.

use super::super::split_merge;
use crate::json::{Fault, Strict, describe, duplicate_key};
use crate::limits::{MERGES_MAX, TOKENIZER_BYTES_MAX, VOCAB_MAX};
use crate::{Error, ErrorKind, Result};
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;
use std::path::Path;

/// The file's parts.
pub(super) struct TokenizerJson {
    pub(super) model: Option<Model>,
    /// Everything but `model`.
    pub(super) rest: Map<String, Value>,
}

/// The `model` object.
#[derive(Default)]
pub(super) struct Model {
    /// `type`.
    pub(super) kind: Option<String>,
    /// `vocab` in file order.
    pub(super) vocab: Vec<(String, u32)>,
    pub(super) merges: Merges,
    /// Every other field.
    pub(super) options: Vec<(String, Value)>,
}

/// Merges in one buffer.
#[derive(Default)]
pub(super) struct Merges {
    text: Vec<u8>,
    /// The length of the left half of each merge and its end in `text`, which the size of the file keeps within 32 bits.
    places: Vec<(u32, u32)>,
}

const _: () = assert!(TOKENIZER_BYTES_MAX < u32::MAX as u64);

impl Merges {
    fn push(&mut self, left: &[u8], right: &[u8]) {
        self.text.extend_from_slice(left);
        self.text.extend_from_slice(right);
        self.places.push((left.len() as u32, self.text.len() as u32));
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// The halves of each merge.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut start = 0;
        self.places.iter().map(move |&(left, end)| {
            let text = self.text.get(start..end as usize).unwrap_or_default();
            start = end as usize;
            text.split_at_checked(left as usize).unwrap_or_default()
        })
    }
}

/// Parses tokenizer.json.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<TokenizerJson> {
    let fault = Fault::default();
    fault.parse(bytes, path, 0, FileSeed(&fault))
}

/// A visitor's result.
type Parsed<T, E> = std::result::Result<T, E>;

/// Implements the seed of a visitor that expects one kind of JSON value.
macro_rules! seed {
    ($seed:ident, $value:ty, $method:ident) => {
        impl<'de> DeserializeSeed<'de> for $seed<'_> {
            type Value = $value;

            fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Parsed<$value, D::Error> {
                deserializer.$method(self)
            }
        }
    };
}

/// What a visitor expects, for the parser's messages.
macro_rules! expecting {
    ($text:literal) => {
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str($text)
        }
    };
}

struct FileSeed<'a>(&'a Fault);
seed!(FileSeed, TokenizerJson, deserialize_map);

impl<'de> Visitor<'de> for FileSeed<'_> {
    type Value = TokenizerJson;

    expecting!("a tokenizer object");

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Parsed<TokenizerJson, A::Error> {
        let mut out = TokenizerJson { model: None, rest: Map::new() };
        while let Some(key) = map.next_key::<String>()? {
            let again = if key == "model" {
                out.model.replace(map.next_value_seed(ModelSeed(self.0))?).is_some()
            } else {
                let value = map.next_value_seed(Strict { fault: self.0, depth: 1 })?;
                out.rest.insert(key.clone(), value).is_some()
            };
            if again {
                return Err(self.0.raise(duplicate_key(&key)));
            }
        }
        Ok(out)
    }
}

struct ModelSeed<'a>(&'a Fault);
seed!(ModelSeed, Model, deserialize_map);

impl<'de> Visitor<'de> for ModelSeed<'_> {
    type Value = Model;

    expecting!("a model object");

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Parsed<Model, A::Error> {
        let mut model = Model::default();
        let mut seen = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if seen.contains(&key) {
                return Err(self.0.raise(duplicate_key(&key)));
            }
            match key.as_str() {
                "type" => model.kind = Some(map.next_value::<String>()?),
                // A Unigram model has a list here; its type alone is reason to refuse it, so say that.
                "vocab" => model.vocab = map.next_value_seed(VocabSeed(self.0))?,
                "merges" => model.merges = map.next_value_seed(MergesSeed(self.0))?,
                _ => {
                    let value = map.next_value_seed(Strict { fault: self.0, depth: 2 })?;
                    model.options.push((key.clone(), value));
                }
            }
            seen.push(key);
        }
        Ok(model)
    }
}

struct VocabSeed<'a>(&'a Fault);
seed!(VocabSeed, Vec<(String, u32)>, deserialize_any);

impl<'de> Visitor<'de> for VocabSeed<'_> {
    type Value = Vec<(String, u32)>;

    expecting!("an object of token ids");

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Parsed<Self::Value, A::Error> {
        let mut out = Vec::new();
        while let Some(token) = map.next_key::<String>()? {
            let value = map.next_value_seed(Strict { fault: self.0, depth: 3 })?;
            let Some(id) = value.as_u64().and_then(|id| u32::try_from(id).ok()) else {
                let error = Error::new(ErrorKind::WrongType).what("model.vocab").expected("ids");
                return Err(self.0.raise(error.found(describe(&value))));
            };
            if out.len() as u64 == VOCAB_MAX {
                let error = Error::new(ErrorKind::Limit).what("model.vocab");
                return Err(self.0.raise(error.expected(format!("at most {VOCAB_MAX} tokens"))));
            }
            out.push((token, id));
        }
        Ok(out)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Parsed<Self::Value, A::Error> {
        let error = Error::new(ErrorKind::UnsupportedTokenizer).what("model.vocab");
        Err(self
            .0
            .raise(error.expected("a BPE vocabulary, an object of ids").found("a list, as Unigram has it")))
    }
}

struct MergesSeed<'a>(&'a Fault);
seed!(MergesSeed, Merges, deserialize_seq);

impl<'de> Visitor<'de> for MergesSeed<'_> {
    type Value = Merges;

    expecting!("an array of merges");

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Parsed<Merges, A::Error> {
        let mut merges = Merges::default();
        while seq.next_element_seed(MergeSeed { fault: self.0, merges: &mut merges })?.is_some() {
            if merges.len() as u64 > MERGES_MAX {
                let error = Error::new(ErrorKind::Limit).what("model.merges");
                return Err(self.0.raise(error.expected(format!("at most {MERGES_MAX} merges"))));
            }
        }
        Ok(merges)
    }
}

/// One merge, `"a b"` (until 2024) or `["a", "b"]` (since).
struct MergeSeed<'a> {
    fault: &'a Fault,
    merges: &'a mut Merges,
}
seed!(MergeSeed, (), deserialize_any);

impl<'de> Visitor<'de> for MergeSeed<'_> {
    type Value = ();

    expecting!("a merge: \"a b\" or [\"a\", \"b\"]");

    fn visit_str<E: de::Error>(self, text: &str) -> Parsed<(), E> {
        let (left, right) =
            split_merge(self.merges.len(), text.as_bytes()).map_err(|e| self.fault.raise::<E>(e))?;
        self.merges.push(left, right);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Parsed<(), A::Error> {
        let pieces: [Option<String>; 3] = [seq.next_element()?, seq.next_element()?, seq.next_element()?];
        let [Some(left), Some(right), None] = &pieces else {
            let what = format!("merge {}", self.merges.len());
            let error = Error::new(ErrorKind::BadJson).what(what).expected("two pieces");
            return Err(self.fault.raise(error.found(match pieces.iter().flatten().count() {
                3 => "more".to_owned(),
                n => n.to_string(),
            })));
        };
        self.merges.push(left.as_bytes(), right.as_bytes());
        Ok(())
    }
}
