//! Importance matrices: how much each column of a weight matrix matters, measured by `kestrel imatrix` or llama-imatrix.
//!
//! Two formats are read. The GGUF form (`general.type` is `imatrix`) has for each weight `NAME` the tensors
//! `NAME.in_sum2`, the sums of squared inputs per column, and `NAME.counts`, how many inputs went into them; this one is
//! written too. The older `.dat` form is a list of (name, number of calls, values), then the number of chunks and the
//! data set's name. Source: llama.cpp's `tools/imatrix`.

use crate::atomic_file::AtomicFile;
use crate::gguf::{Gguf, TensorDecl, TensorView, Value, layout};
use crate::limits::{GGUF_STRING_BYTES_MAX, IMATRIX_BYTES_MAX, TENSORS_MAX, WIDTH_MAX};
use crate::map::Map;
use crate::{Error, ErrorKind, GgmlType, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
const GGUF_MAGIC: &[u8] = b"GGUF";
const TYPE: &str = "general.type";
const DATASETS: &str = "imatrix.datasets";
const CHUNK_COUNT: &str = "imatrix.chunk_count";
const CHUNK_SIZE: &str = "imatrix.chunk_size";

/// The mean squared input of every column of the matrices of a model.
#[derive(Clone, Debug)]
pub struct Imatrix {
    path: PathBuf,
    /// By the weight's GGUF name.
    entries: BTreeMap<String, Entry>,
    datasets: Vec<String>,
    chunks: Option<u32>,
    chunk_size: Option<u32>,
    origin: Option<Origin>,
}

/// Sums over inputs, and the means that follow. All finite and not negative.
#[derive(Clone, Debug)]
struct Entry {
    sums: Vec<f32>,
    count: f32,
    means: Vec<f32>,
}

/// What `kestrel imatrix` measured, so that it can go on after an interruption: llama.cpp ignores these keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The weights; equal for all quantizations of them.
    pub model: u64,
    /// A checksum of the tokens.
    pub tokens: u64,
}

impl Origin {
    const MODEL: &'static str = "kestrel.imatrix.model";
    const TOKENS: &'static str = "kestrel.imatrix.tokens";
}

impl Imatrix {
    /// One without entries, made from `chunks` chunks of `chunk_size` tokens of a text called `dataset`.
    pub fn new(dataset: &str, chunks: u32, chunk_size: u32, origin: Origin) -> Self {
        Self {
            datasets: vec![dataset.to_owned()],
            chunks: Some(chunks),
            chunk_size: Some(chunk_size),
            origin: Some(origin),
            ..Self::empty(Path::new(""))
        }
    }

    fn empty(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            entries: BTreeMap::new(),
            datasets: Vec::new(),
            chunks: None,
            chunk_size: None,
            origin: None,
        }
    }

    /// Reads either format.
    ///
    /// Errors: whatever is wrong with the container, `Unexpected` for a GGUF file of another kind, `Missing` for sums
    /// without counts, `BadShape`, `NotFinite` and `OutOfRange` for numbers that are no mean of squares.
    pub fn open(path: &Path) -> Result<Self> {
        let map = Map::open(path)?;
        if map.len() as u64 > IMATRIX_BYTES_MAX {
            return Err(Error::new(ErrorKind::Limit)
                .file(path)
                .expected(format!("an importance matrix of at most {IMATRIX_BYTES_MAX} bytes"))
                .found(map.len()));
        }
        let mut out = Self::empty(path);
        let read =
            if map.starts_with(GGUF_MAGIC) { out.read_gguf(&Gguf::parse(map)?) } else { out.read_dat(&map) };
        read.map_err(|e| e.file(path))?;
        Ok(out)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of matrices.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The texts that it was made from, by llama-imatrix's own naming.
    pub fn datasets(&self) -> &[String] {
        &self.datasets
    }

    /// Chunks of text that it was made from, if recorded.
    pub fn chunks(&self) -> Option<u32> {
        self.chunks
    }

    /// Tokens of a chunk, if recorded.
    pub fn chunk_size(&self) -> Option<u32> {
        self.chunk_size
    }

    /// The model and the text, if `kestrel imatrix` recorded them.
    pub fn origin(&self) -> Option<Origin> {
        self.origin
    }

    /// Mean squared input per column of the weight with this GGUF name.
    pub fn for_tensor(&self, gguf_name: &str) -> Option<&[f32]> {
        self.entries.get(gguf_name).map(|e| e.means.as_slice())
    }

    /// Every weight's name, sums of squared inputs per column, and how many inputs were summed, in order of names.
    pub fn sums(&self) -> impl Iterator<Item = (&str, &[f32], f32)> {
        self.entries.iter().map(|(name, e)| (name.as_str(), e.sums.as_slice(), e.count))
    }

    /// Writes the GGUF form as llama-imatrix does. Errors: those of [`AtomicFile`].
    pub fn write(&self, target: &Path, force: bool) -> Result<()> {
        let text = |key: &str, value: Value| (key.to_owned(), value);
        let mut pairs = vec![text(TYPE, "imatrix".into()), text(DATASETS, self.datasets.clone().into())];
        let numbers = [(CHUNK_COUNT, self.chunks), (CHUNK_SIZE, self.chunk_size)];
        pairs.extend(numbers.into_iter().filter_map(|(key, n)| Some(text(key, n?.into()))));
        if let Some(origin) = self.origin {
            let keys = [(Origin::MODEL, origin.model), (Origin::TOKENS, origin.tokens)];
            pairs.extend(keys.map(|(key, n)| text(key, n.into())));
        }
        let tensor = |name: &str, suffix: &str, n: usize| TensorDecl {
            name: format!("{name}{suffix}"),
            dtype: GgmlType::F32,
            shape: vec![1, n as u64],
        };
        let entries = || self.entries.iter();
        let tensors: Vec<_> =
            entries().flat_map(|(k, e)| [tensor(k, SUMS, e.sums.len()), tensor(k, COUNTS, 1)]).collect();
        let layout = layout(&pairs, &tensors)?;
        let mut bytes = layout.header;
        bytes.resize(layout.file_bytes as usize, 0);
        let values = entries().flat_map(|(_, e)| [e.sums.as_slice(), std::slice::from_ref(&e.count)]);
        for (&(offset, _), values) in layout.tensors.iter().zip(values) {
            let (words, _) = bytes[offset as usize..].as_chunks_mut();
            words.iter_mut().zip(values).for_each(|(word, x)| *word = x.to_le_bytes());
        }
        let file = AtomicFile::create(target, layout.file_bytes, force)?;
        file.write_at(0, &bytes)?;
        file.commit(|_| Ok(()))
    }

    fn read_gguf(&mut self, file: &Gguf) -> Result<()> {
        let kind = file.metadata().str(TYPE)?;
        if kind != Some("imatrix") {
            return Err(Error::new(ErrorKind::Unexpected)
                .what(format!("key \"{TYPE}\""))
                .expected("\"imatrix\"")
                .found(kind.map_or("none".to_owned(), |k| {
                    format!("\"{}\"", k.chars().take(64).collect::<String>())
                })));
        }
        self.chunks = file.metadata().u32(CHUNK_COUNT)?;
        self.chunk_size = file.metadata().u32(CHUNK_SIZE)?;
        if let (Some(model), Some(tokens)) =
            (file.metadata().u64(Origin::MODEL)?, file.metadata().u64(Origin::TOKENS)?)
        {
            self.origin = Some(Origin { model, tokens });
        }
        if let Some(datasets) = file.metadata().strings(DATASETS)? {
            self.datasets = datasets.iter().map(|d| String::from_utf8_lossy(d).into_owned()).collect();
        }
        for info in file.tensors() {
            let Some(name) = info.name.strip_suffix(SUMS) else { continue };
            let tensor = |suffix: &str| file.tensor(&format!("{name}{suffix}"));
            let (Some(sums), Some(counts)) = (tensor(SUMS), tensor(COUNTS)) else {
                return Err(
                    entry_error(ErrorKind::Missing, name).expected(format!("a tensor \"{name}{COUNTS}\""))
                );
            };
            let (sums, counts) = (floats(&sums)?, floats(&counts)?);
            // More than one count stands for a stack of matrices, which no Mamba has.
            let &[count] = counts.as_slice() else {
                return Err(entry_error(ErrorKind::BadShape, name).expected("one count").found(counts.len()));
            };
            self.insert(name.to_owned(), sums, count)?;
        }
        Ok(())
    }

    fn read_dat(&mut self, bytes: &[u8]) -> Result<()> {
        let mut cursor = Cursor { bytes, at: 0 };
        let n = cursor.count("number of entries", TENSORS_MAX)?;
        if n == 0 {
            return Err(Error::new(ErrorKind::BadMagic)
                .at(0)
                .expected("an importance matrix")
                .found("no entries"));
        }
        for _ in 0..n {
            let name_bytes = cursor.count("length of a name", GGUF_STRING_BYTES_MAX)?;
            let at = cursor.at as u64;
            let name = std::str::from_utf8(cursor.take(name_bytes, "a name")?)
                .map_err(|_| Error::new(ErrorKind::BadName).at(at).expected("a name in UTF-8"))?
                .to_owned();
            let calls = cursor.count("number of calls", i32::MAX as u64)?;
            let n_values = cursor.count("number of values", WIDTH_MAX)?;
            let values = le_floats(cursor.take(n_values.saturating_mul(4), "values")?);
            self.insert(name, values, calls as f32)?;
        }
        if cursor.at < bytes.len() {
            let chunks = cursor.count("number of chunks", i32::MAX as u64)?;
            self.chunks = u32::try_from(chunks).ok().filter(|&n| n > 0);
            let text_bytes = cursor.count("length of the data set's name", GGUF_STRING_BYTES_MAX)?;
            let text = cursor.take(text_bytes, "the data set's name")?;
            self.datasets = vec![String::from_utf8_lossy(text).into_owned()];
        }
        Ok(())
    }

    /// Adds an entry: sums of squared inputs per column of the weight with this GGUF name, and how many inputs were
    /// summed. Nothing counted says nothing: every column is then alike.
    ///
    /// Errors: `NotFinite` and `OutOfRange` for numbers that are no sum of squares, `Duplicate` for a name again.
    pub fn insert(&mut self, name: String, sums: Vec<f32>, count: f32) -> Result<()> {
        let not_a_square = |x: &f32| !x.is_finite() || *x < 0.0;
        if let Some(bad) = sums.iter().chain([&count]).find(|x| not_a_square(x)) {
            let kind = if bad.is_finite() { ErrorKind::OutOfRange } else { ErrorKind::NotFinite };
            return Err(entry_error(kind, &name).expected("finite numbers that are not negative").found(bad));
        }
        let means: Vec<f32> = match count > 0.0 {
            true => sums.iter().map(|x| x / count).collect(),
            false => vec![1.0; sums.len()],
        };
        // A count below 1 can still overflow.
        if means.iter().any(not_a_square) {
            return Err(entry_error(ErrorKind::NotFinite, &name)
                .expected("finite means")
                .found(format!("count {count}")));
        }
        match self.entries.insert(name.clone(), Entry { sums, count, means }) {
            None => Ok(()),
            Some(_) => Err(entry_error(ErrorKind::Duplicate, &name).expected("each entry once")),
        }
    }
}

fn entry_error(kind: ErrorKind, name: &str) -> Error {
    Error::new(kind).what(format!("entry \"{}\"", name.chars().take(128).collect::<String>()))
}

fn floats(tensor: &TensorView) -> Result<Vec<f32>> {
    if tensor.info.dtype != GgmlType::F32 {
        return Err(Error::new(ErrorKind::WrongType)
            .at(tensor.info.offset)
            .what(format!("tensor \"{}\"", tensor.info.name))
            .expected(GgmlType::F32)
            .found(tensor.info.dtype));
    }
    Ok(le_floats(tensor.bytes))
}

fn le_floats(bytes: &[u8]) -> Vec<f32> {
    let (words, _) = bytes.as_chunks();
    words.iter().map(|w| f32::from_le_bytes(*w)).collect()
}

/// Reads the `.dat` form front to back.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest.get(..n).ok_or_else(|| {
            Error::new(ErrorKind::Truncated)
                .at(self.at as u64)
                .what(what)
                .expected(format!("{n} bytes"))
                .found(format!("{} to the end of the file", rest.len()))
        })?;
        self.at += n;
        Ok(taken)
    }

    /// An i32 that counts something.
    fn count(&mut self, what: &str, max: u64) -> Result<usize> {
        let at = self.at as u64;
        let &[word] = self.take(4, what)?.as_chunks::<4>().0 else { return Ok(0) };
        let n = i32::from_le_bytes(word);
        u64::try_from(n).ok().filter(|&n| n <= max).map(|n| n as usize).ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange).at(at).what(what).expected(format!("0 to {max}")).found(n)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dat(entries: &[(&str, i32, &[f32])], tail: &[u8]) -> Vec<u8> {
        let mut out = (entries.len() as i32).to_le_bytes().to_vec();
        for (name, calls, values) in entries {
            out.extend((name.len() as i32).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend(calls.to_le_bytes());
            out.extend((values.len() as i32).to_le_bytes());
            values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        out.extend(tail);
        out
    }

    fn read(bytes: &[u8]) -> Result<Imatrix> {
        let mut out = Imatrix::empty(Path::new(""));
        out.read_dat(bytes).map(|()| out)
    }

    #[test]
    fn the_old_form_gives_means_chunks_and_the_data_set() {
        let tail = [&7i32.to_le_bytes()[..], &3i32.to_le_bytes()[..], b"abc"].concat();
        let m = read(&dat(&[("w", 2, &[4.0, 6.0]), ("unused", 0, &[0.0, 0.0])], &tail)).unwrap();
        assert_eq!(m.for_tensor("w"), Some(&[2.0, 3.0][..]));
        assert_eq!(m.for_tensor("unused"), Some(&[1.0, 1.0][..]));
        assert_eq!((m.for_tensor("v"), m.chunks(), m.datasets()), (None, Some(7), &["abc".to_owned()][..]));
    }

    #[test]
    fn every_truncation_of_the_old_form_is_an_error() {
        let whole = dat(&[("w", 2, &[4.0, 6.0]), ("v", 1, &[1.0])], &[]);
        assert!(read(&whole).is_ok());
        for n in 0..whole.len() {
            assert_eq!(read(&whole[..n]).unwrap_err().kind(), ErrorKind::Truncated, "{n} bytes");
        }
    }

    #[test]
    fn impossible_counts_and_numbers_are_refused() {
        let kind = |bytes: &[u8]| read(bytes).unwrap_err().kind();
        assert_eq!(kind(&[0xff; 64]), ErrorKind::OutOfRange);
        assert_eq!(kind(&i32::MAX.to_le_bytes()), ErrorKind::OutOfRange);
        assert_eq!(kind(&[0; 4]), ErrorKind::BadMagic);
        assert_eq!(kind(&dat(&[("w", 1, &[-1.0])], &[])), ErrorKind::OutOfRange);
        assert_eq!(kind(&dat(&[("w", 1, &[f32::NAN])], &[])), ErrorKind::NotFinite);
        assert_eq!(kind(&dat(&[("w", 1, &[1.0]), ("w", 1, &[1.0])], &[])), ErrorKind::Duplicate);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let path = std::env::temp_dir().join(format!("kestrel-imatrix-{}", std::process::id()));
        let mut m = Imatrix::new("a text", 3, 512, Origin { model: u64::MAX, tokens: 7 });
        m.insert("blk.0.ssm_in.weight".into(), vec![1.0, 2.5, 0.0], 2.0).unwrap();
        m.insert("blk.0.ssm_dt.weight".into(), vec![9.0], 1536.0).unwrap();
        m.write(&path, false).unwrap();
        let again = Imatrix::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let all = |m: &Imatrix| m.sums().map(|(n, s, c)| (n.to_owned(), s.to_vec(), c)).collect::<Vec<_>>();
        assert_eq!(all(&m), all(&again));
        assert_eq!(again.for_tensor("blk.0.ssm_in.weight"), Some(&[0.5, 1.25, 0.0][..]));
        assert_eq!((again.datasets(), again.chunks()), (&["a text".to_owned()][..], Some(3)));
        assert_eq!((again.chunk_size(), again.origin()), (Some(512), m.origin()));
    }
}
