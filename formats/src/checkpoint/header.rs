//! The header of a safetensors file, read strictly.
//!
//! Source of the layout: the README of huggingface/safetensors. The crate `safetensors` 0.8.0 supplies the types
//! ([`Dtype`], [`TensorInfo`]); its own parser is not used, because it collects the header into a map and so
//! accepts what the format forbids and other readers disagree about: the same tensor name twice, even with two
//! dtypes (the last wins). It also accepts NUL in names, 100 000 dimensions and any number of empty tensors. The
//! test `the_crate_agrees` checks that whatever is accepted here means the same to the crate.

use super::folder::Opened;
use crate::json::{Fault, Strict, duplicate_key, shorten};
use crate::limits::{
    CHECKPOINT_TENSORS_MAX, SAFETENSORS_DIMS_MAX, SAFETENSORS_HEADER_BYTES_MAX, SAFETENSORS_NAME_BYTES_MAX,
    SAFETENSORS_UNKNOWN_MAX,
};
use crate::{Error, ErrorKind, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{
    self, DeserializeSeed, Deserializer, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use std::fmt;
use std::path::Path;

/// The length field in front of the header.
const LENGTH_BYTES: u64 = 8;

/// The key of the header that is no tensor.
const METADATA: &str = "__metadata__";

/// A validated header.
#[derive(Debug)]
pub(super) struct Header {
    /// Name and description, in the order of the header; offsets are relative to `data_start`.
    pub(super) tensors: Vec<(String, TensorInfo)>,
    /// Offset of the first byte of tensor data in the file.
    pub(super) data_start: u64,
    pub(super) warnings: Vec<String>,
}

/// Reads and validates the header of an opened file: no hole, no overlap, no byte that belongs to no tensor.
///
/// `is_known` tells which names the model can have. A header that lists more than a few others is refused before anything
/// of it is kept: a short entry takes more memory than its text.
pub(super) fn read(opened: &Opened, is_known: &dyn Fn(&str) -> bool) -> Result<Header> {
    let Opened { path, n_bytes, .. } = opened;
    let mut start = [0u8; 512];
    let n = start.len().min(usize::try_from(*n_bytes).unwrap_or(usize::MAX));
    let start = start.get_mut(..n).unwrap_or_default();
    opened.read_at(0, start)?;
    let header_bytes = header_length(start, *n_bytes).map_err(|e| e.file(path))?;
    let mut header = vec![0; header_bytes as usize];
    opened.read_at(LENGTH_BYTES, &mut header)?;
    let parsed = parse(&header, path, is_known)?;
    drop(header); // Its tables are about as large.
    check(&parsed, *n_bytes).map_err(|e| e.file(path))?;
    Ok(parsed)
}

/// Parses the JSON of a header.
fn parse(header: &[u8], path: &Path, is_known: &dyn Fn(&str) -> bool) -> Result<Header> {
    let fault = Fault::default();
    let mut n_entries = 0;
    let census = Census { fault: &fault, is_known, n_entries: &mut n_entries };
    match fault.parse(header, path, LENGTH_BYTES, census) {
        // What is wrong with the JSON is told better below.
        Err(e) if !matches!(e.kind(), ErrorKind::Limit | ErrorKind::Unexpected) => {}
        other => other?,
    }
    let fault = Fault::default();
    let mut parsed = fault.parse(header, path, LENGTH_BYTES, HeaderSeed { fault: &fault, n_entries })?;
    parsed.data_start = LENGTH_BYTES + header.len() as u64;
    Ok(parsed)
}

/// Whether names and extents of a parsed header are right for a file of `file_bytes`.
fn check(header: &Header, file_bytes: u64) -> Result<()> {
    check_names(&header.tensors)?;
    check_extents(header, file_bytes)
}

/// The tensors of a whole safetensors file in memory, as its header lists them. `path` names it in errors.
pub fn safetensors_tensors(file: &[u8], path: &Path) -> Result<Vec<(String, TensorInfo)>> {
    let header_bytes =
        header_length(&file[..file.len().min(512)], file.len() as u64).map_err(|e| e.file(path))?;
    let header = file.get(LENGTH_BYTES as usize..).and_then(|rest| rest.get(..header_bytes as usize));
    let parsed = parse(header.unwrap_or_default(), path, &|_| true)?;
    check(&parsed, file.len() as u64).map_err(|e| e.file(path))?;
    Ok(parsed.tensors)
}

/// Bytes of the header, from the first bytes of the file.
fn header_length(start: &[u8], file_bytes: u64) -> Result<u64> {
    let Some((length, text)) = start.split_first_chunk() else {
        return Err(recognise(start).unwrap_or_else(|| {
            Error::new(ErrorKind::Truncated)
                .at(0)
                .what("safetensors header length")
                .expected("8 bytes")
                .found(format!("a file of {file_bytes} bytes"))
        }));
    };
    let length = u64::from_le_bytes(*length);
    let wrong = |kind: ErrorKind, expected: String| {
        recognise(start).unwrap_or_else(|| {
            Error::new(kind).at(0).what("safetensors header length").expected(expected).found(length)
        })
    };
    if length > file_bytes - LENGTH_BYTES {
        let most = file_bytes - LENGTH_BYTES;
        return Err(wrong(ErrorKind::CountExceedsFile, format!("at most {most}, the rest of the file")));
    }
    if length > SAFETENSORS_HEADER_BYTES_MAX {
        return Err(wrong(ErrorKind::Limit, format!("at most {SAFETENSORS_HEADER_BYTES_MAX}")));
    }
    if length < 2 {
        return Err(wrong(ErrorKind::BadJson, "at least the 2 bytes of {}".to_owned()));
    }
    // Another format can begin with bytes that make a plausible length, but not followed by an object.
    if !matches!(text.first(), Some(b'{' | b' ' | b'\t' | b'\n' | b'\r'))
        && let Some(error) = recognise(start)
    {
        return Err(error);
    }
    Ok(length)
}

/// The error for a file that is something else, from its first bytes.
pub(super) fn recognise(start: &[u8]) -> Option<Error> {
    let convert =
        "download the safetensors files of the model, or convert them with transformers' save_pretrained";
    let pickle = start.first() == Some(&0x80) && matches!(start.get(1), Some(2..=5));
    let text = String::from_utf8_lossy(start).trim_start().to_ascii_lowercase();
    let (kind, found, hint) = if pickle {
        (ErrorKind::PickleRefused, "a Python pickle, which can run code when loaded", convert)
    } else if start.starts_with(b"PK\x03\x04") {
        (
            ErrorKind::PickleRefused,
            "a PyTorch archive (zip of pickles), which can run code when loaded",
            convert,
        )
    } else if start.starts_with(b"version https://git-lfs") {
        (ErrorKind::LfsPointer, "a git-lfs pointer", "run `git lfs pull` in the folder")
    } else if start.starts_with(b"GGUF") {
        (ErrorKind::BadMagic, "a GGUF file", "pass the file itself instead of a folder")
    } else if ["<!doctype", "<html", "<?xml"].iter().any(|tag| text.starts_with(tag)) {
        (
            ErrorKind::BadMagic,
            "an HTML page",
            "the download failed: an error page was saved; check access and URL",
        )
    } else {
        return None;
    };
    Some(Error::new(kind).at(0).expected("a safetensors file").found(found).hint(hint))
}

/// Names are unique. Sorting, unlike a hash table, has no bad case.
fn check_names(tensors: &[(String, TensorInfo)]) -> Result<()> {
    let mut names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair.first() == pair.last()) {
        Some(pair) => Err(duplicate_key(pair.first().unwrap_or(&""))),
        None => Ok(()),
    }
}

/// Every tensor has the bytes that its shape asks for, and together they are the rest of the file, each byte once.
fn check_extents(header: &Header, file_bytes: u64) -> Result<()> {
    let data_bytes = file_bytes - header.data_start;
    let mut order: Vec<(u64, u64, &str)> = Vec::with_capacity(header.tensors.len());
    for (name, info) in &header.tensors {
        let (begin, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let bad = |kind: ErrorKind| Error::new(kind).what(format!("tensor \"{}\"", shorten(name)));
        if end < begin {
            return Err(bad(ErrorKind::BadOffset).expected("begin <= end").found(format!("{begin}..{end}")));
        }
        let n_bytes = tensor_bytes(info).ok_or_else(|| {
            bad(ErrorKind::BadShape)
                .expected("a whole number of bytes that fits 64 bits")
                .found(format!("{} {:?}", info.dtype, info.shape))
        })?;
        if n_bytes != end - begin {
            return Err(bad(ErrorKind::Inconsistent)
                .expected(format!("{n_bytes} bytes for {} {:?}", info.dtype, info.shape))
                .found(format!("{} bytes, {begin}..{end}", end - begin)));
        }
        if end > data_bytes {
            return Err(bad(ErrorKind::DataOutOfBounds)
                .at(header.data_start.saturating_add(begin))
                .expected(format!("data within the file's {data_bytes} data bytes"))
                .found(format!("{begin}..{end}")));
        }
        order.push((begin, end, name));
    }
    order.sort_unstable(); // An empty tensor sorts before the one that starts at the same offset.
    let mut covered = 0;
    for (begin, end, name) in order {
        if begin != covered {
            let found = if begin < covered { "an overlap with another tensor" } else { "a hole before it" };
            return Err(Error::new(ErrorKind::BadOffset)
                .at(header.data_start.saturating_add(begin))
                .what(format!("tensor \"{}\"", shorten(name)))
                .expected(format!("data that begins at {covered}, where the previous tensor's ends"))
                .found(format!("{found}: {begin}..{end}")));
        }
        covered = end;
    }
    if covered != data_bytes {
        return Err(Error::new(ErrorKind::Unexpected)
            .at(header.data_start.saturating_add(covered))
            .what("bytes after the last tensor")
            .expected("the end of the file")
            .found(format!("{} bytes that belong to no tensor", data_bytes - covered)));
    }
    Ok(())
}

/// Bytes of a tensor; `None` on overflow or a broken byte.
pub(super) fn tensor_bytes(info: &TensorInfo) -> Option<u64> {
    let n = info.shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim as u64))?;
    let bits = n.checked_mul(info.dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// A look at the names alone, which keeps nothing: `Limit` for too many, `Unexpected` for too many unknown ones.
struct Census<'a> {
    fault: &'a Fault,
    is_known: &'a dyn Fn(&str) -> bool,
    n_entries: &'a mut u64,
}

impl<'de> DeserializeSeed<'de> for Census<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Census<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a safetensors header object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let mut n_unknown = 0;
        while let Some(unknown) = map.next_key_seed(UnknownName { is_known: self.is_known })? {
            map.next_value::<IgnoredAny>()?;
            *self.n_entries += 1;
            if *self.n_entries > CHECKPOINT_TENSORS_MAX + 1 {
                // One of them may be __metadata__.
                return Err(self.fault.raise(
                    Error::new(ErrorKind::Limit)
                        .what("safetensors header")
                        .expected(format!("at most {CHECKPOINT_TENSORS_MAX} tensors")),
                ));
            }
            let Some(name) = unknown else { continue };
            n_unknown += 1;
            if n_unknown > SAFETENSORS_UNKNOWN_MAX {
                return Err(self.fault.raise(
                    Error::new(ErrorKind::Unexpected)
                        .what(format!("tensor \"{name}\""))
                        .expected("the tensors of the model that config.json describes")
                        .found(format!("more than {SAFETENSORS_UNKNOWN_MAX} others")),
                ));
            }
        }
        Ok(())
    }
}

/// A key, shortened, if it is no known name.
struct UnknownName<'a> {
    is_known: &'a dyn Fn(&str) -> bool,
}

impl<'de> DeserializeSeed<'de> for UnknownName<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for UnknownName<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> std::result::Result<Self::Value, E> {
        Ok((name != METADATA && !(self.is_known)(name)).then(|| shorten(name)))
    }
}

/// The header object.
struct HeaderSeed<'a> {
    fault: &'a Fault,
    /// How many entries it was found to have, `__metadata__` included.
    n_entries: u64,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = Header;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Header, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a safetensors header object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
        let tensors = Vec::with_capacity(self.n_entries as usize);
        let mut header = Header { tensors, data_start: 0, warnings: Vec::new() };
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value_seed(MetadataSeed { fault: self.fault, warnings: &mut header.warnings })?;
                continue;
            }
            check_name(&name).map_err(|e| self.fault.raise::<A::Error>(e))?;
            if header.tensors.len() as u64 == CHECKPOINT_TENSORS_MAX {
                return Err(self.fault.raise(
                    Error::new(ErrorKind::Limit)
                        .what("safetensors header")
                        .expected(format!("at most {CHECKPOINT_TENSORS_MAX} tensors")),
                ));
            }
            let info = map.next_value_seed(InfoSeed { fault: self.fault, name: &name })?;
            header.tensors.push((name, info));
        }
        Ok(header)
    }
}

/// Names never touch the file system, so only what cannot be printed or stored is refused.
fn check_name(name: &str) -> Result<()> {
    let found = match name {
        "" => "an empty name".to_owned(),
        _ if name.len() > SAFETENSORS_NAME_BYTES_MAX => format!("{} bytes", name.len()),
        _ if name.contains('\0') => "a NUL".to_owned(),
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::BadName)
        .what(format!("tensor name \"{}\"", shorten(name)))
        .expected(format!("1 to {SAFETENSORS_NAME_BYTES_MAX} bytes without NUL"))
        .found(found))
}

/// `__metadata__`: strings to strings. What it says is not used; what is wrong with it is reported.
struct MetadataSeed<'a> {
    fault: &'a Fault,
    warnings: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of strings in __metadata__")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let mut keys = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Strict { fault: self.fault, depth: 2 })?;
            if !value.is_string() {
                return Err(self.fault.raise(
                    Error::new(ErrorKind::WrongType)
                        .what(format!("__metadata__ \"{}\"", shorten(&key)))
                        .expected("a string")
                        .found(crate::json::describe(&value)),
                ));
            }
            keys.push(key);
        }
        keys.sort_unstable();
        if let Some([key, _]) = keys.windows(2).find(|pair| pair.first() == pair.last()) {
            self.warnings.push(format!("__metadata__ has the key \"{}\" more than once", shorten(key)));
        }
        Ok(())
    }
}

/// One tensor's description. The name is for messages.
struct InfoSeed<'a> {
    fault: &'a Fault,
    name: &'a str,
}

impl InfoSeed<'_> {
    fn error(&self, kind: ErrorKind, field: &str) -> Error {
        Error::new(kind).what(format!("tensor \"{}\" {field}", shorten(self.name)))
    }
}

impl<'de> DeserializeSeed<'de> for InfoSeed<'_> {
    type Value = TensorInfo;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<TensorInfo, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for InfoSeed<'_> {
    type Value = TensorInfo;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<TensorInfo, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key::<String>()? {
            let again = match field.as_str() {
                "dtype" => {
                    let text = map.next_value::<String>()?;
                    let parsed = dtype_of(&text).ok_or_else(|| {
                        let error =
                            self.error(ErrorKind::UnknownType, "dtype").expected("a safetensors dtype");
                        self.fault.raise::<A::Error>(error.found(format!("\"{}\"", shorten(&text))))
                    })?;
                    dtype.replace(parsed).is_some()
                }
                "shape" => {
                    let numbers = NumbersSeed { info: &self, field: "shape", kind: ErrorKind::BadShape };
                    shape.replace(map.next_value_seed(numbers)?).is_some()
                }
                "data_offsets" => {
                    let numbers =
                        NumbersSeed { info: &self, field: "data_offsets", kind: ErrorKind::BadOffset };
                    offsets.replace(map.next_value_seed(numbers)?).is_some()
                }
                _ => {
                    map.next_value_seed(Strict { fault: self.fault, depth: 2 })?;
                    false
                }
            };
            if again {
                return Err(self.fault.raise(duplicate_key(&field)));
            }
        }
        let missing = |field: &str| self.fault.raise::<A::Error>(self.error(ErrorKind::Missing, field));
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let offsets = offsets.ok_or_else(|| missing("data_offsets"))?;
        let &[begin, end] = offsets.as_slice() else {
            let error =
                self.error(ErrorKind::BadOffset, "data_offsets").expected("2 numbers").found(offsets.len());
            return Err(self.fault.raise(error));
        };
        Ok(TensorInfo { dtype, shape, data_offsets: (begin, end) })
    }
}

/// The crate's own table of names.
fn dtype_of(text: &str) -> Option<Dtype> {
    let deserializer: de::value::StrDeserializer<de::value::Error> = text.into_deserializer();
    serde::Deserialize::deserialize(deserializer).ok()
}

/// A short array of sizes.
struct NumbersSeed<'a> {
    info: &'a InfoSeed<'a>,
    field: &'a str,
    /// The kind of error for anything that is not a small array of sizes.
    kind: ErrorKind,
}

impl<'de> DeserializeSeed<'de> for NumbersSeed<'_> {
    type Value = Vec<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Vec<usize>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for NumbersSeed<'_> {
    type Value = Vec<usize>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Vec<usize>, A::Error> {
        let mut out = Vec::new();
        let fault = self.info.fault;
        let bad = |found: String| {
            let expected = format!("at most {SAFETENSORS_DIMS_MAX} whole numbers from 0 to {}", u64::MAX);
            fault.raise(self.info.error(self.kind, self.field).expected(expected).found(found))
        };
        while let Some(value) = seq.next_element_seed(Strict { fault, depth: 3 })? {
            if out.len() == SAFETENSORS_DIMS_MAX {
                return Err(bad("more".to_owned()));
            }
            match value.as_u64().and_then(|x| usize::try_from(x).ok()) {
                Some(x) => out.push(x),
                None => return Err(bad(crate::json::describe(&value))),
            }
        }
        out.shrink_to_fit();
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::super::folder::Folder;
    use super::*;
    use safetensors::SafeTensors;
    use std::path::Path;

    fn opened(path: &Path) -> Opened {
        let (dir, name) = (path.parent().expect("a folder"), path.file_name().expect("a name"));
        let folder = Folder::open(dir).expect("the folder");
        folder.file(name.to_str().expect("UTF-8")).expect("no error").expect("the file")
    }

    #[test]
    fn the_crate_agrees() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny-falcon-mamba");
        for name in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
            let header = read(&opened(&dir.join(name)), &|_| true).expect("our reading");
            let bytes = std::fs::read(dir.join(name)).expect("the file");
            let (n, theirs) = SafeTensors::read_metadata(&bytes).expect("the crate's reading");
            assert_eq!(header.data_start, LENGTH_BYTES + n as u64);
            assert_eq!(header.tensors.len(), theirs.tensors().len());
            for (name, info) in &header.tensors {
                let same = |other: &TensorInfo| {
                    (info.dtype, &info.shape, info.data_offsets)
                        == (other.dtype, &other.shape, other.data_offsets)
                };
                assert!(theirs.info(name).is_some_and(same), "{name}");
            }
        }
    }

    /// Why the crate's parser is not used: should this fail, it may have become strict enough.
    #[test]
    fn the_crate_accepts_a_name_twice() {
        let header = br#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#;
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 4]].concat();
        assert!(SafeTensors::deserialize(&bytes).is_ok());
        let path = std::env::temp_dir().join(format!("kestrel-header-{}", std::process::id()));
        std::fs::write(&path, &bytes).expect("a temporary file");
        let kind = read(&opened(&path), &|_| true).map(|_| ()).map_err(|e| e.kind());
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(kind, Err(ErrorKind::Duplicate));
    }
}
