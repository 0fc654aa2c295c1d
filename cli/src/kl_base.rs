//! The logits of a base model on a text, for `kestrel perplexity --kl-base`.
//!
//! Layout, little-endian: magic `KESTRLKL`, then u32 version, vocab, n_ctx, n_windows; the tokens of all windows (u32);
//! the logits (f32, vocab) of each window's scored positions in order. Unlike llama.cpp's file nothing is rounded.

use kestrel_formats::atomic_file::AtomicFile;
use kestrel_formats::map::{Map, f32s};
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::evaluate::scored;
use std::path::Path;

const MAGIC: &[u8; 8] = b"KESTRLKL";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 24;

/// What was evaluated: both models must have read the same.
#[derive(Clone, Copy)]
pub struct Extent<'a> {
    pub vocab: usize,
    pub n_ctx: usize,
    /// All windows one after the other; a multiple of `n_ctx`.
    pub tokens: &'a [u32],
}

impl Extent<'_> {
    fn n_windows(&self) -> usize {
        self.tokens.len() / self.n_ctx
    }

    fn row_bytes(&self) -> u64 {
        4 * self.vocab as u64
    }

    fn logits_offset(&self) -> u64 {
        HEADER_BYTES + 4 * self.tokens.len() as u64
    }

    /// Bytes of the whole file; `Limit` if they do not fit 64 bits.
    fn file_bytes(&self) -> Result<u64> {
        let rows = self.n_windows() as u64 * scored(self.n_ctx).len() as u64;
        let logits = rows.checked_mul(self.row_bytes());
        logits
            .and_then(|n| n.checked_add(self.logits_offset()))
            .ok_or_else(|| Error::new(ErrorKind::Limit).what("KL base").found("a size beyond 64 bits"))
    }

    fn header(&self) -> Vec<u8> {
        let numbers = [VERSION, self.vocab as u32, self.n_ctx as u32, self.n_windows() as u32];
        let numbers = numbers.iter().chain(self.tokens);
        MAGIC.iter().copied().chain(numbers.flat_map(|n| n.to_le_bytes())).collect()
    }
}

/// Writes a base file, which appears when it is complete.
pub struct KlBaseWriter {
    file: AtomicFile,
    next: u64,
}

impl KlBaseWriter {
    /// Reserves the space and writes the tokens.
    pub fn create(path: &Path, extent: Extent, force: bool) -> Result<Self> {
        let file = AtomicFile::create(path, extent.file_bytes()?, force)?;
        file.write_at(0, &extent.header())?;
        Ok(Self { file, next: extent.logits_offset() })
    }

    /// Appends the logits (vocab) of the next scored position.
    pub fn push(&mut self, logits: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.file.write_at(self.next, &bytes)?;
        self.next += bytes.len() as u64;
        Ok(())
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<()> {
        self.file.commit(|_| Ok(()))
    }
}

/// A base file, mapped.
pub struct KlBase {
    map: Map,
    logits_offset: u64,
    row_bytes: u64,
}

impl KlBase {
    /// Opens a base file and checks that it is of this text, window and vocabulary.
    pub fn open(path: &Path, extent: Extent) -> Result<Self> {
        let map = Map::open(path)?;
        let error = |kind| Error::new(kind).file(path);
        if map.get(..MAGIC.len()) != Some(MAGIC) {
            return Err(error(ErrorKind::BadMagic)
                .at(0)
                .expected("a file of kestrel perplexity --save-kl-base"));
        }
        let header = extent.header();
        if map.get(..header.len()) != Some(&header) {
            let at = map.iter().zip(&header).take_while(|(a, b)| a == b).count();
            return Err(error(ErrorKind::Inconsistent)
                .at(at as u64)
                .what("KL base")
                .expected("the same text, --ctx, --chunks and vocabulary as the base had")
                .found("others"));
        }
        let file_bytes = extent.file_bytes()?;
        if map.len() as u64 != file_bytes {
            let found = format!("{} bytes", map.len());
            return Err(error(ErrorKind::Truncated).expected(format!("{file_bytes} bytes")).found(found));
        }
        Ok(Self { map, logits_offset: extent.logits_offset(), row_bytes: extent.row_bytes() })
    }

    /// The logits (vocab) of scored position `i`, counted over all windows; empty beyond the last.
    pub fn row(&self, i: usize) -> &[f32] {
        let start = self.logits_offset + i as u64 * self.row_bytes;
        // The file's length was checked, so all of it lies in memory. Maps begin at a page, and rows at 4 bytes.
        self.map.get(start as usize..(start + self.row_bytes) as usize).and_then(f32s).unwrap_or_default()
    }
}
