//! `model.safetensors.index.json`: which shard holds which tensor.

use super::folder::check_component;
use crate::json::{Fault, Strict, describe, duplicate_key, shorten};
use crate::limits::{CHECKPOINT_TENSORS_MAX, INDEX_FIELDS_MAX, SHARDS_MAX};
use crate::{Error, ErrorKind, Result};
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Suffix of every weight file that is read.
pub(super) const SAFETENSORS: &str = ".safetensors";

/// A parsed index.
#[derive(Debug)]
pub(super) struct Index {
    /// Tensor names, sorted, and the position in `shards` of each.
    pub(super) tensors: Vec<(String, usize)>,
    /// File names, sorted.
    pub(super) shards: Vec<String>,
    /// `metadata.total_size`: bytes of all tensors.
    pub(super) total_size: Option<u64>,
}

impl Index {
    /// The position in `shards` of a tensor's.
    pub(super) fn shard_of(&self, tensor: &str) -> Option<usize> {
        let i = self.tensors.binary_search_by(|(name, _)| name.as_str().cmp(tensor)).ok()?;
        self.tensors.get(i).map(|&(_, shard)| shard)
    }
}

/// Parses an index. Every shard name is checked to be a plain `*.safetensors` file name.
///
/// The list is not read as a `Value`, which takes several times the memory of its text.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Index> {
    let fault = Fault::default();
    let Root { listed, total_size } = fault.parse(bytes, path, 0, RootSeed { fault: &fault })?;
    let bad = |kind| Error::new(kind).file(path).what("weight_map");
    let Some(Listed { mut tensors, shards }) = listed else {
        return Err(bad(ErrorKind::Missing).expected("an object of tensor names"));
    };
    if tensors.is_empty() {
        return Err(bad(ErrorKind::Missing).expected("at least one tensor").found("none"));
    }
    tensors.sort_unstable();
    if let Some([(name, _), _]) = tensors.windows(2).find(|pair| matches!(pair, [a, b] if a.0 == b.0)) {
        return Err(duplicate_key(name).file(path));
    }
    // From the order in which they were met to that of their names.
    let position: BTreeMap<usize, usize> = shards.values().enumerate().map(|(i, &met)| (met, i)).collect();
    for (_, shard) in &mut tensors {
        *shard = position.get(shard).copied().unwrap_or_default();
    }
    Ok(Index { tensors, shards: shards.into_keys().collect(), total_size })
}

/// What an index holds of what is asked for.
#[derive(Default)]
struct Root {
    listed: Option<Listed>,
    total_size: Option<u64>,
}

/// Tensor names with the number of their shard, and the shards, numbered as they are met.
#[derive(Default)]
struct Listed {
    tensors: Vec<(String, usize)>,
    shards: BTreeMap<String, usize>,
}

struct RootSeed<'a> {
    fault: &'a Fault,
}

impl<'de> DeserializeSeed<'de> for RootSeed<'_> {
    type Value = Root;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Root, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for RootSeed<'_> {
    type Value = Root;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Root, A::Error> {
        let (mut root, mut seen) = (Root::default(), Vec::new());
        while let Some(key) = map.next_key::<String>()? {
            if seen.contains(&key) {
                return Err(self.fault.raise(duplicate_key(&key)));
            }
            if key == "weight_map" {
                root.listed = Some(map.next_value_seed(ListedSeed { fault: self.fault })?);
            } else {
                let value = map.next_value_seed(Strict { fault: self.fault, depth: 1 })?;
                if key == "metadata" {
                    root.total_size = value.get("total_size").and_then(Value::as_u64);
                }
            }
            if seen.len() == INDEX_FIELDS_MAX {
                let error = Error::new(ErrorKind::Limit).what("index");
                return Err(self.fault.raise(error.expected(format!("at most {INDEX_FIELDS_MAX} fields"))));
            }
            seen.push(key);
        }
        Ok(root)
    }
}

struct ListedSeed<'a> {
    fault: &'a Fault,
}

impl ListedSeed<'_> {
    fn no_object<E: de::Error>(&self, found: &str) -> E {
        let error = Error::new(ErrorKind::WrongType).what("weight_map").expected("an object");
        self.fault.raise(error.found(found))
    }

    /// The file name of a tensor, checked.
    fn shard(&self, tensor: &str, shard: Value) -> Result<String> {
        let bad = |kind| Error::new(kind).what(format!("weight_map \"{}\"", shorten(tensor)));
        let Value::String(shard) = shard else {
            return Err(bad(ErrorKind::WrongType).expected("a file name").found(describe(&shard)));
        };
        check_component(&shard)?;
        if !shard.ends_with(SAFETENSORS) {
            let kind = if is_pickle_name(&shard) { ErrorKind::PickleRefused } else { ErrorKind::Unsupported };
            return Err(bad(kind).expected("a .safetensors file").found(shorten(&shard)));
        }
        Ok(shard)
    }
}

impl<'de> DeserializeSeed<'de> for ListedSeed<'_> {
    type Value = Listed;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Listed, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ListedSeed<'_> {
    type Value = Listed;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensor names")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> std::result::Result<Listed, A::Error> {
        Err(self.no_object("an array"))
    }

    fn visit_str<E: de::Error>(self, _: &str) -> std::result::Result<Listed, E> {
        Err(self.no_object("a string"))
    }

    fn visit_unit<E: de::Error>(self) -> std::result::Result<Listed, E> {
        Err(self.no_object("null"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Listed, A::Error> {
        let mut listed = Listed::default();
        while let Some(tensor) = map.next_key::<String>()? {
            let value = map.next_value_seed(Strict { fault: self.fault, depth: 2 })?;
            let shard = self.shard(&tensor, value).map_err(|e| self.fault.raise::<A::Error>(e))?;
            let limit = |what: &str, most: u64| {
                let error = Error::new(ErrorKind::Limit).what(what);
                self.fault.raise::<A::Error>(error.expected(format!("at most {most}")))
            };
            if listed.tensors.len() as u64 == CHECKPOINT_TENSORS_MAX {
                return Err(limit("tensors of the index", CHECKPOINT_TENSORS_MAX));
            }
            let n_shards = listed.shards.len();
            let shard = *listed.shards.entry(shard).or_insert(n_shards);
            if shard as u64 == SHARDS_MAX {
                return Err(limit("shards", SHARDS_MAX));
            }
            listed.tensors.push((tensor, shard));
        }
        Ok(listed)
    }
}

/// File names that PyTorch pickles usually have.
pub(super) const PICKLE_SUFFIXES: [&str; 4] = [".bin", ".pt", ".pth", ".ckpt"];

fn is_pickle_name(name: &str) -> bool {
    PICKLE_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}
