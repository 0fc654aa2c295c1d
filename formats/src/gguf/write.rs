//! Where everything goes in a GGUF file that is about to be written.

use super::metadata::check_key;
use super::read::{DEFAULT_ALIGNMENT, KEY_ALIGNMENT, MAGIC};
use super::tensor_table::{check_tensor_name, data_bytes};
use super::value::{Value, encode_string};
use crate::limits::{GGUF_DIMS_MAX, GGUF_KV_MAX, TENSORS_MAX};
use crate::{Error, ErrorKind, GgmlType, Result};
use std::collections::HashSet;

/// Version that is written.
const VERSION: u32 = 3;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDecl {
    /// Name, such as `blk.0.ssm_in.weight`.
    pub name: String,
    /// How the numbers will be stored.
    pub dtype: GgmlType,
    /// 1 to 4 dimensions in PyTorch order.
    pub shape: Vec<u64>,
}

/// The head of a file and the place of each tensor. Bytes between tensors are zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Everything before the data of the first tensor, padding included.
    pub header: Vec<u8>,
    /// (offset in the file, bytes) of each tensor, in the order given.
    pub tensors: Vec<(u64, u64)>,
    /// Size of the file, the padding after the last tensor included.
    pub file_bytes: u64,
}

/// Lays out a GGUF v3 file with alignment 32. The same input gives the same bytes.
///
/// Errors: `BadName`, `Duplicate`, `BadShape` for what no reader accepts; `Limit` for more pairs or tensors than
/// are read here; `BadAlignment` if a pair asks for another alignment.
pub fn layout(pairs: &[(String, Value)], tensors: &[TensorDecl]) -> Result<Layout> {
    check_unique("key", GGUF_KV_MAX, pairs.iter().map(|(key, _)| key.as_str()))?;
    check_unique("tensor", TENSORS_MAX, tensors.iter().map(|t| t.name.as_str()))?;
    let mut header = Vec::new();
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    header.extend_from_slice(&(pairs.len() as u64).to_le_bytes());
    for (key, value) in pairs {
        check_key(key.as_bytes())?;
        if key == KEY_ALIGNMENT && *value != Value::U32(DEFAULT_ALIGNMENT) {
            return Err(Error::new(ErrorKind::BadAlignment)
                .what(format!("key \"{KEY_ALIGNMENT}\""))
                .expected(DEFAULT_ALIGNMENT)
                .found(format!("{value:?}")));
        }
        encode_string(key.as_bytes(), &mut header);
        header.extend_from_slice(&(value.value_type() as u32).to_le_bytes());
        value.encode(&mut header);
    }
    let places = encode_tensors(tensors, &mut header)?;
    header.resize(header.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
    place(header, places)
}

/// Appends the table of tensors; returns (offset in the data section, bytes) of each.
fn encode_tensors(tensors: &[TensorDecl], header: &mut Vec<u8>) -> Result<Vec<(u64, u64)>> {
    let mut places = Vec::with_capacity(tensors.len());
    let mut next = 0u64;
    for t in tensors {
        let named = |e: Error| e.what(format!("tensor \"{}\"", t.name));
        check_tensor_name(t.name.as_bytes()).map_err(named)?;
        if !(1..=GGUF_DIMS_MAX as usize).contains(&t.shape.len()) {
            return Err(named(Error::new(ErrorKind::BadShape))
                .expected(format!("1 to {GGUF_DIMS_MAX} dimensions"))
                .found(t.shape.len()));
        }
        let n_bytes = data_bytes(t.dtype, &t.shape).map_err(named)?;
        encode_string(t.name.as_bytes(), header);
        header.extend_from_slice(&(t.shape.len() as u32).to_le_bytes());
        t.shape.iter().rev().for_each(|dim| header.extend_from_slice(&dim.to_le_bytes()));
        header.extend_from_slice(&t.dtype.id().to_le_bytes());
        header.extend_from_slice(&next.to_le_bytes());
        places.push((next, n_bytes));
        next = n_bytes
            .checked_next_multiple_of(DEFAULT_ALIGNMENT.into())
            .and_then(|n| next.checked_add(n))
            .ok_or_else(too_large)?;
    }
    Ok(places)
}

/// Moves the tensors behind the header.
fn place(header: Vec<u8>, mut tensors: Vec<(u64, u64)>) -> Result<Layout> {
    let start = header.len() as u64;
    let mut file_bytes = start;
    for (offset, n_bytes) in &mut tensors {
        *offset = offset.checked_add(start).ok_or_else(too_large)?;
        file_bytes = offset
            .checked_add(*n_bytes)
            .and_then(|end| end.checked_next_multiple_of(DEFAULT_ALIGNMENT.into()))
            .ok_or_else(too_large)?;
    }
    Ok(Layout { header, tensors, file_bytes })
}

fn too_large() -> Error {
    Error::new(ErrorKind::Limit).what("output file").found("a size that overflows 64 bits")
}

fn check_unique<'a>(what: &str, most: u64, names: impl ExactSizeIterator<Item = &'a str>) -> Result<()> {
    if names.len() as u64 > most {
        return Err(Error::new(ErrorKind::Limit)
            .what(format!("number of {what}s"))
            .expected(most)
            .found(names.len()));
    }
    let mut seen = HashSet::with_capacity(names.len());
    for name in names {
        if !seen.insert(name) {
            return Err(Error::new(ErrorKind::Duplicate)
                .what(format!("{what} \"{name}\""))
                .expected(format!("each {what} once")));
        }
    }
    Ok(())
}
