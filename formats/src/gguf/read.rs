//! Opening and checking GGUF files, one or the parts of a split one.

use super::cursor::Cursor;
use super::metadata::Metadata;
use super::tensor_table::{self, DataSection};
use super::value::{Value, ValueType};
use crate::limits::{GGUF_ALIGNMENT_MAX, GGUF_SPLIT_MAX};
use crate::map::Map;
use crate::{Error, ErrorKind, GgmlType, Result};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// First bytes of every GGUF file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of tensor data in a file without `general.alignment`.
pub(super) const DEFAULT_ALIGNMENT: u32 = 32;
pub(super) const KEY_ALIGNMENT: &str = "general.alignment";
const KEY_SPLIT_NO: &str = "split.no";
const KEY_SPLIT_COUNT: &str = "split.count";
const KEY_SPLIT_TENSORS: &str = "split.tensors.count";

/// A GGUF file, mapped and checked: every name, type, shape and byte range in it can be relied on.
pub struct Gguf {
    /// One, or all parts of a split file in order.
    parts: Vec<Part>,
    tensors: Vec<TensorInfo>,
    /// Indices of `tensors`, sorted by name. A search in it has no bad case, unlike a hash table.
    by_name: Vec<u32>,
    warnings: Vec<String>,
}

struct Part {
    map: Map,
    metadata: Metadata,
    version: u32,
    alignment: u32,
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, such as `blk.0.ssm_in.weight`.
    pub name: String,
    /// How the numbers are stored.
    pub dtype: GgmlType,
    /// 1 to 4 dimensions in PyTorch order (rows, cols); one may be 0.
    pub shape: Vec<u64>,
    /// Offset of the data in its file.
    pub offset: u64,
    /// Size of the data.
    pub n_bytes: u64,
    /// Which part of a split file holds it.
    pub part: usize,
}

/// A tensor with its bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Name, type and shape.
    pub info: &'a TensorInfo,
    /// The data as it is stored.
    pub bytes: &'a [u8],
}

impl Gguf {
    /// Opens a file and, if it is the first part of a split file, all other parts beside it.
    ///
    /// Errors: anything wrong with the container (see [`ErrorKind`]); `Usage` for a part other than the first;
    /// `Missing` for an absent part. Whether the tensors make a model is for [`super::model_of`] to say.
    pub fn open(path: &Path) -> Result<Self> {
        let mut first = Self::parse(Map::open(path)?)?;
        let Some(split) = Split::of(&first, 0)? else { return Ok(first) };
        for part in 1..split.count {
            if part >= GGUF_SPLIT_MAX {
                return Err(Error::new(ErrorKind::Limit)
                    .file(path)
                    .what(KEY_SPLIT_COUNT)
                    .expected(format!("at most {GGUF_SPLIT_MAX} parts"))
                    .found(split.count));
            }
            first.append(&split, part)?;
        }
        if first.tensors.len() as u64 != split.n_tensors {
            return Err(Error::new(ErrorKind::Inconsistent)
                .file(path)
                .what(KEY_SPLIT_TENSORS)
                .expected(format!("{} tensors", split.n_tensors))
                .found(format!("{} in {} parts", first.tensors.len(), split.count)));
        }
        first.index_names()?;
        Ok(first)
    }

    /// Reads one mapped file on its own, also if it is a part of a split file.
    pub fn parse(map: Map) -> Result<Self> {
        let path = map.path().to_owned();
        Self::parse_map(map).map_err(|e| e.file(&path))
    }

    fn parse_map(map: Map) -> Result<Self> {
        let mut cursor = Cursor::new(&map);
        check_magic(&mut cursor, &map)?;
        let version = read_version(&mut cursor)?;
        let n_tensors = tensor_table::read_count(&mut cursor)?;
        let n_kv = Metadata::read_count(&mut cursor)?;
        let metadata = Metadata::read(&map, &mut cursor, n_kv)?;
        let alignment = alignment_of(&metadata)?;
        let mut tensors = tensor_table::read(&mut cursor, n_tensors, alignment)?;
        let mut warnings = Vec::new();
        let data = DataSection { file: &map, header_end: cursor.pos() as u64, alignment: alignment.into() };
        data.place(&mut tensors, &mut warnings)?;
        let part = Part { map, metadata, version, alignment };
        let mut out = Self { parts: vec![part], tensors, by_name: Vec::new(), warnings };
        out.index_names()?;
        Ok(out)
    }

    /// Adds a further part of a split file.
    fn append(&mut self, split: &Split, part: u32) -> Result<()> {
        let path = split.path_of(part);
        if !path.exists() {
            return Err(Error::new(ErrorKind::Missing)
                .file(self.path())
                .what(format!("part {} of {}", part + 1, split.count))
                .expected(format!("the file {}", path.display())));
        }
        let mut other = Self::parse(Map::open(&path)?)?;
        if Split::of(&other, part)?.is_none_or(|s| s.count != split.count || s.n_tensors != split.n_tensors) {
            return Err(Error::new(ErrorKind::Inconsistent)
                .file(&path)
                .what(format!("{KEY_SPLIT_COUNT} and {KEY_SPLIT_TENSORS}"))
                .expected(format!("{} and {}, as in the first part", split.count, split.n_tensors)));
        }
        let arch = other.metadata().str(super::KEY_ARCHITECTURE)?;
        let first_arch = self.metadata().str(super::KEY_ARCHITECTURE)?;
        if arch.is_some() && arch != first_arch {
            return Err(Error::new(ErrorKind::Inconsistent)
                .file(&path)
                .what(format!("key \"{}\"", super::KEY_ARCHITECTURE))
                .expected(format!("\"{}\", as in the first part", first_arch.unwrap_or_default()))
                .found(format!("\"{}\"", arch.unwrap_or_default())));
        }
        let index = self.parts.len();
        self.tensors.extend(other.tensors.drain(..).map(|t| TensorInfo { part: index, ..t }));
        self.warnings.extend(other.warnings.drain(..).map(|w| format!("{}: {w}", path.display())));
        self.parts.append(&mut other.parts);
        Ok(())
    }

    /// Sorts the names and refuses a name that occurs twice.
    fn index_names(&mut self) -> Result<()> {
        let tensors = &self.tensors;
        let name = |i: u32| tensors.get(i as usize).map_or("", |t| t.name.as_str());
        self.by_name.clear();
        self.by_name.extend(0..tensors.len() as u32); // at most TENSORS_MAX * GGUF_SPLIT_MAX
        self.by_name.sort_unstable_by_key(|&i| (name(i), i));
        for pair in self.by_name.windows(2) {
            if let &[a, b] = pair
                && name(a) == name(b)
                && let (Some(a), Some(b)) = (tensors.get(a as usize), tensors.get(b as usize))
            {
                let file = |t: &TensorInfo| self.parts[t.part].map.path();
                return Err(Error::new(ErrorKind::Duplicate)
                    .file(file(b))
                    .at(b.offset)
                    .what(format!("tensor \"{}\"", b.name))
                    .expected("each tensor once")
                    .found(format!("one more with its data at byte {} of {}", a.offset, file(a).display())));
            }
        }
        Ok(())
    }

    /// The file, or the first part of a split file.
    pub fn path(&self) -> &Path {
        self.parts[0].map.path()
    }

    /// The format's version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.parts[0].version
    }

    /// Alignment of tensor data (of the first part).
    pub fn alignment(&self) -> u32 {
        self.parts[0].alignment
    }

    /// Size of all parts together.
    pub fn file_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.map.len() as u64).sum()
    }

    /// Metadata of the file, or of the first part, which holds all that describes the model.
    pub fn metadata(&self) -> &Metadata {
        &self.parts[0].metadata
    }

    /// All tensors in file order, part after part.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let at = self.by_name.binary_search_by(|&i| self.tensors[i as usize].name.as_str().cmp(name)).ok()?;
        let info = &self.tensors[self.by_name[at] as usize];
        let (map, range) = self.map_of(info);
        Some(TensorView { info, bytes: &map[range] })
    }

    /// Brings the parts into memory, see [`Map::preload`].
    pub fn preload(&self) {
        self.parts.iter().for_each(|part| part.map.preload());
    }

    /// Map and byte range of a tensor of this file, for whoever keeps a clone of the map.
    pub fn map_of(&self, t: &TensorInfo) -> (&Map, Range<usize>) {
        // Both ends were checked against the map's length, a usize.
        (&self.parts[t.part].map, t.offset as usize..(t.offset + t.n_bytes) as usize)
    }

    /// `Changed` if a part was modified or replaced since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.map.check_unchanged())
    }

    /// What is odd about the file and yet no reason to refuse it.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

fn check_magic(cursor: &mut Cursor, file: &[u8]) -> Result<()> {
    let magic = cursor.array("the magic number")?;
    if magic == MAGIC {
        return Ok(());
    }
    if file.starts_with(b"version https://git-lfs") {
        return Err(Error::new(ErrorKind::LfsPointer)
            .at(0)
            .expected("a GGUF file")
            .found("a git-lfs pointer")
            .hint("run `git lfs pull`"));
    }
    Err(Error::new(ErrorKind::BadMagic)
        .at(0)
        .expected("\"GGUF\"")
        .found(format!("\"{}\"", magic.escape_ascii())))
}

fn read_version(cursor: &mut Cursor) -> Result<u32> {
    let at = cursor.pos() as u64;
    let version = cursor.u32("the version")?;
    let error =
        |kind| Error::new(kind).at(at).what("version").expected("2 or 3, little-endian").found(version);
    match version {
        2 | 3 => Ok(version),
        1 => {
            Err(error(ErrorKind::UnsupportedVersion).hint("version 1 ended in 2023; convert the model again"))
        }
        v if (1..=3).contains(&v.swap_bytes()) => {
            Err(error(ErrorKind::BigEndian).found(format!("version {}, big-endian", v.swap_bytes())))
        }
        _ => Err(error(ErrorKind::UnsupportedVersion)),
    }
}

/// `general.alignment`, which must be an u32 and nothing wider.
fn alignment_of(metadata: &Metadata) -> Result<u32> {
    let Some(field) = metadata.field(KEY_ALIGNMENT) else { return Ok(DEFAULT_ALIGNMENT) };
    let error = |kind| Error::new(kind).at(field.offset()).what(format!("key \"{KEY_ALIGNMENT}\""));
    let Value::U32(alignment) = field.head(0) else {
        return Err(error(ErrorKind::WrongType).expected(ValueType::U32).found(field.value_type()));
    };
    if !alignment.is_power_of_two() || alignment > GGUF_ALIGNMENT_MAX {
        return Err(error(ErrorKind::BadAlignment)
            .expected(format!("a power of two up to {GGUF_ALIGNMENT_MAX}"))
            .found(alignment));
    }
    Ok(alignment)
}

/// What a part of a split file says about the whole.
struct Split {
    /// Path up to `-00001-of-0000N.gguf`.
    stem: PathBuf,
    count: u32,
    n_tensors: u64,
}

impl Split {
    /// Reads the `split.*` keys of what should be part `part`; `None` for a file in one piece.
    fn of(file: &Gguf, part: u32) -> Result<Option<Self>> {
        let metadata = file.metadata();
        let count = match metadata.u32(KEY_SPLIT_COUNT)? {
            None | Some(0 | 1) => return Ok(None),
            Some(count) => count,
        };
        let missing =
            |key: &str| Error::new(ErrorKind::Missing).file(file.path()).what(format!("key \"{key}\""));
        let no = metadata.u32(KEY_SPLIT_NO)?.ok_or_else(|| missing(KEY_SPLIT_NO))?;
        let n_tensors = metadata.u64(KEY_SPLIT_TENSORS)?.ok_or_else(|| missing(KEY_SPLIT_TENSORS))?;
        if no != part {
            let kind = if part == 0 { ErrorKind::Usage } else { ErrorKind::Inconsistent };
            return Err(Error::new(kind)
                .file(file.path())
                .what(format!("key \"{KEY_SPLIT_NO}\""))
                .expected(format!("part {} of {count}", u64::from(part) + 1))
                .found(format!("part {}", u64::from(no) + 1))
                .hint("open the first part, the one named -00001-of-..."));
        }
        let suffix = split_suffix(part, count);
        let name = file.path().file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some(stem) = name.strip_suffix(suffix.as_str()) else {
            return Err(Error::new(ErrorKind::BadName)
                .file(file.path())
                .what("file name of a split file")
                .expected(format!("a name that ends in {suffix}"))
                .found(format!("\"{name}\"")));
        };
        Ok(Some(Self { stem: file.path().with_file_name(stem), count, n_tensors }))
    }

    fn path_of(&self, part: u32) -> PathBuf {
        let mut path = self.stem.clone().into_os_string();
        path.push(split_suffix(part, self.count));
        path.into()
    }
}

/// How llama.cpp names parts, counted from 1.
fn split_suffix(part: u32, count: u32) -> String {
    format!("-{:05}-of-{count:05}.gguf", u64::from(part) + 1)
}
