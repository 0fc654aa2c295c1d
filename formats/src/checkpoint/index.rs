//! `model.safetensors.index.json`: which shard holds which tensor.

use super::folder::check_component;
use crate::json::{describe, parse_object, shorten};
use crate::{Error, ErrorKind, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Suffix of every weight file that is read.
pub(super) const SAFETENSORS: &str = ".safetensors";

/// A parsed index.
#[derive(Debug)]
pub(super) struct Index {
    /// Tensor name to position in `shards`.
    pub(super) shard_of: BTreeMap<String, usize>,
    /// File names, sorted.
    pub(super) shards: Vec<String>,
    /// `metadata.total_size`: bytes of all tensors.
    pub(super) total_size: Option<u64>,
}

/// Parses an index. Every shard name is checked to be a plain `*.safetensors` file name.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Index> {
    let mut root = parse_object(bytes, path)?;
    let bad = |kind: ErrorKind, what: &str| Error::new(kind).file(path).what(what);
    let map = match root.remove("weight_map") {
        Some(Value::Object(map)) => map,
        Some(other) => {
            return Err(bad(ErrorKind::WrongType, "weight_map")
                .expected("an object")
                .found(describe(&other)));
        }
        None => return Err(bad(ErrorKind::Missing, "weight_map").expected("an object of tensor names")),
    };
    if map.is_empty() {
        return Err(bad(ErrorKind::Missing, "weight_map").expected("at least one tensor").found("none"));
    }
    let mut named = BTreeMap::new();
    for (tensor, shard) in map {
        let what = format!("weight_map \"{}\"", shorten(&tensor));
        let Value::String(shard) = shard else {
            return Err(bad(ErrorKind::WrongType, &what).expected("a file name").found(describe(&shard)));
        };
        check_component(&shard).map_err(|e| e.file(path))?;
        if !shard.ends_with(SAFETENSORS) {
            let kind = if is_pickle_name(&shard) { ErrorKind::PickleRefused } else { ErrorKind::Unsupported };
            return Err(bad(kind, &what).expected("a .safetensors file").found(shorten(&shard)));
        }
        named.insert(tensor, shard);
    }
    let mut shards: Vec<String> = named.values().cloned().collect();
    shards.sort_unstable();
    shards.dedup();
    let shard_of = named
        .into_iter()
        .filter_map(|(tensor, shard)| Some((tensor, shards.binary_search(&shard).ok()?)))
        .collect();
    let total_size = root.get("metadata").and_then(|m| m.get("total_size")).and_then(Value::as_u64);
    Ok(Index { shard_of, shards, total_size })
}

/// File names that PyTorch pickles usually have.
pub(super) const PICKLE_SUFFIXES: [&str; 4] = [".bin", ".pt", ".pth", ".ckpt"];

fn is_pickle_name(name: &str) -> bool {
    PICKLE_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}
