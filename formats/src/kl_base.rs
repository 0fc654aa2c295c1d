//! What a base model predicts on a text, for `kestrel perplexity --kl-base`.
//!
//! Two layouts, little-endian. Both have a head, the tokens of all windows (4 bytes each), and a row for each window's
//! scored positions in order.
//!
//! - llama.cpp's (`llama-perplexity --kl-divergence-base`; source: its `tools/perplexity`): magic `_logits_`, then i32
//!   n_ctx, vocab, n_windows. A row has 2·((vocab + 1) / 2) + 4 u16: in the first four the f32 `scale` and `least`, then
//!   a code per token, whose log-probability is scale·code + least. What is less likely than e^-16 times the most likely
//!   token has code 0.
//! - Ours, which rounds nothing: magic `KESTRLKL`, then u32 version, vocab, n_ctx, n_windows. A row has vocab f32 logits.

use crate::atomic_file::AtomicFile;
use crate::map::Map;
use crate::{Error, ErrorKind, Result};
use std::ops::{Range, RangeInclusive};
use std::path::Path;

const VERSION: u32 = 1;
/// Tokens of a window, and windows of a file.
const N_CTX: RangeInclusive<u32> = 4..=1 << 20;
/// llama.cpp leaves out what is this much less likely than the most likely token, in nats.
const LEAST: f32 = 16.0;
/// What the probabilities of a row of llama.cpp's add up to: rounding adds little, and what is left out of the largest
/// vocabulary is less than half.
const SUM: RangeInclusive<f64> = 0.5..=1.1;

/// Positions of a window whose predictions are scored, each against the token after it: the second half without the
/// last. A base file has a row for each.
pub fn scored(n_ctx: usize) -> Range<usize> {
    n_ctx / 2..n_ctx.saturating_sub(1)
}

/// How log-probabilities are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// 16 bits each, with a scale and a minimum per position.
    LlamaCpp,
    /// As f32 logits.
    F32,
}

impl Layout {
    fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::LlamaCpp => b"_logits_",
            Self::F32 => b"KESTRLKL",
        }
    }

    fn head_bytes(self) -> u64 {
        match self {
            Self::LlamaCpp => 20,
            Self::F32 => 24,
        }
    }

    fn row_bytes(self, vocab: u64) -> u64 {
        match self {
            Self::LlamaCpp => 2 * (vocab.next_multiple_of(2) + 4),
            Self::F32 => 4 * vocab,
        }
    }

    /// Magic and numbers.
    fn head(self, vocab: u32, n_ctx: u32, n_windows: u32) -> Vec<u8> {
        let numbers: &[u32] = match self {
            Self::LlamaCpp => &[n_ctx, vocab, n_windows],
            Self::F32 => &[VERSION, vocab, n_ctx, n_windows],
        };
        self.magic().iter().copied().chain(numbers.iter().flat_map(|n| n.to_le_bytes())).collect()
    }
}

/// Sizes of a file.
#[derive(Clone, Copy)]
struct Extent {
    layout: Layout,
    vocab: u32,
    n_ctx: u32,
    n_windows: u32,
}

impl Extent {
    fn n_tokens(self) -> u64 {
        u64::from(self.n_ctx) * u64::from(self.n_windows)
    }

    fn rows_at(self) -> u64 {
        self.layout.head_bytes() + 4 * self.n_tokens()
    }

    fn row_bytes(self) -> u64 {
        self.layout.row_bytes(self.vocab.into())
    }

    fn n_rows(self) -> u64 {
        u64::from(self.n_windows) * scored(self.n_ctx as usize).len() as u64
    }

    /// Bytes of the whole file; `Limit` if they do not fit 64 bits.
    fn file_bytes(self) -> Result<u64> {
        let rows = self.n_rows().checked_mul(self.row_bytes());
        rows.and_then(|n| n.checked_add(self.rows_at()))
            .ok_or_else(|| Error::new(ErrorKind::Limit).what("KL base").found("a size beyond 64 bits"))
    }
}

/// Writes a base file, which appears when it is complete.
pub struct KlBaseWriter {
    file: AtomicFile,
    layout: Layout,
    next: u64,
    row: Vec<u8>,
}

impl KlBaseWriter {
    /// Reserves the space and writes the tokens of windows of `n_ctx`. Errors: those of [`AtomicFile`].
    pub fn create(
        path: &Path,
        layout: Layout,
        (vocab, n_ctx): (usize, usize),
        tokens: &[u32],
        force: bool,
    ) -> Result<Self> {
        let (vocab, n_ctx, n_windows) = (vocab as u32, n_ctx as u32, (tokens.len() / n_ctx) as u32);
        let extent = Extent { layout, vocab, n_ctx, n_windows };
        let file = AtomicFile::create(path, extent.file_bytes()?, force)?;
        let mut head = layout.head(vocab, n_ctx, n_windows);
        head.extend(tokens.iter().flat_map(|t| t.to_le_bytes()));
        file.write_at(0, &head)?;
        Ok(Self { file, layout, next: extent.rows_at(), row: Vec::new() })
    }

    /// Appends the next scored position, of which these are the logits (vocab).
    pub fn push(&mut self, logits: &[f32]) -> Result<()> {
        self.row.clear();
        match self.layout {
            Layout::LlamaCpp => encode(logits, &mut self.row),
            Layout::F32 => self.row.extend(logits.iter().flat_map(|x| x.to_le_bytes())),
        }
        self.file.write_at(self.next, &self.row)?;
        self.next += self.row.len() as u64;
        Ok(())
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<()> {
        self.file.commit(|_| Ok(()))
    }
}

/// A row of llama.cpp's.
fn encode(logits: &[f32], row: &mut Vec<u8>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let min = logits.iter().copied().fold(f32::INFINITY, f32::min).max(max - LEAST);
    let sum: f64 = logits.iter().map(|&l| f64::from((l - max).exp())).sum();
    let scale = (max - min) / 65535.0;
    let least = min - max - sum.ln() as f32;
    row.extend(scale.to_le_bytes().into_iter().chain(least.to_le_bytes()));
    let per_step = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let code = |l: f32| if l > min { (per_step * (l - min)).round_ties_even() as u16 } else { 0 };
    row.extend(logits.iter().flat_map(|&l| code(l).to_le_bytes()));
    row.resize(row.len().next_multiple_of(4), 0);
}

/// A base file, mapped.
pub struct KlBase {
    map: Map,
    extent: Extent,
    tokens: Vec<u32>,
}

/// What a base model predicts at one position, for each token of the vocabulary.
pub enum Prediction<'a> {
    /// Log-probabilities; minus infinity for what llama.cpp left out.
    LogProbs(&'a [f64]),
    /// Finite logits.
    Logits(&'a [f32]),
}

/// Room for a prediction, to be used again for the next.
#[derive(Default)]
pub struct PredictionBuffer {
    log_probs: Vec<f64>,
    logits: Vec<f32>,
}

impl KlBase {
    /// Opens a base file of either layout for a model with this vocabulary.
    ///
    /// Errors: `BadMagic`, `UnsupportedVersion`; `Inconsistent` with the model's vocabulary; `OutOfRange` for sizes and
    /// tokens that cannot be; `Truncated` if the file is not as long as its head says.
    pub fn open(path: &Path, vocab: usize) -> Result<Self> {
        let map = Map::open(path)?;
        Self::parse(map, vocab).map_err(|e| e.file(path))
    }

    /// As [`Self::open`].
    pub fn parse(map: Map, vocab: usize) -> Result<Self> {
        let layout = [Layout::LlamaCpp, Layout::F32].into_iter().find(|l| map.starts_with(l.magic()));
        let layout = layout.ok_or_else(|| {
            Error::new(ErrorKind::BadMagic)
                .at(0)
                .expected("a file of --save-kl-base or of llama-perplexity --kl-divergence-base")
        })?;
        let number = |at: u64| -> Result<u32> {
            let word = map.get(at as usize..).and_then(|b| b.first_chunk());
            word.map(|w| u32::from_le_bytes(*w)).ok_or_else(|| {
                Error::new(ErrorKind::Truncated)
                    .expected(format!("a head of {} bytes", layout.head_bytes()))
                    .found(format!("{} bytes", map.len()))
            })
        };
        let (n_ctx_at, vocab_at) = if layout == Layout::LlamaCpp { (8, 12) } else { (16, 12) };
        if layout == Layout::F32 && number(8)? != VERSION {
            let e = Error::new(ErrorKind::UnsupportedVersion).at(8);
            return Err(e.expected(VERSION).found(number(8)?));
        }
        let (n_ctx, found, n_windows) =
            (number(n_ctx_at)?, number(vocab_at)?, number(layout.head_bytes() - 4)?);
        if !N_CTX.contains(&n_ctx) {
            return Err(Error::new(ErrorKind::OutOfRange)
                .at(n_ctx_at)
                .what("tokens of a window")
                .expected(format!("{} to {}", N_CTX.start(), N_CTX.end()))
                .found(n_ctx));
        }
        if found as usize != vocab {
            return Err(Error::new(ErrorKind::Inconsistent)
                .at(vocab_at)
                .what("vocabulary of the base model")
                .expected(format!("{vocab} tokens, as the model has"))
                .found(found));
        }
        let extent = Extent { layout, vocab: found, n_ctx, n_windows };
        let file_bytes = extent.file_bytes()?;
        if map.len() as u64 != file_bytes {
            let found = format!("{} bytes", map.len());
            return Err(Error::new(ErrorKind::Truncated)
                .expected(format!("{file_bytes} bytes"))
                .found(found));
        }
        let tokens = &map[layout.head_bytes() as usize..extent.rows_at() as usize];
        let tokens: Vec<u32> = tokens.as_chunks().0.iter().map(|w| u32::from_le_bytes(*w)).collect();
        if let Some(i) = tokens.iter().position(|&t| t as usize >= vocab) {
            return Err(Error::new(ErrorKind::OutOfRange)
                .at(layout.head_bytes() + 4 * i as u64)
                .what("token")
                .expected(format!("an id below {vocab}"))
                .found(tokens[i]));
        }
        Ok(Self { map, extent, tokens })
    }

    /// Tokens of a window.
    pub fn n_ctx(&self) -> usize {
        self.extent.n_ctx as usize
    }

    /// The tokens of all windows.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Scored positions of all windows.
    pub fn n_scored(&self) -> u64 {
        self.extent.n_rows()
    }

    /// The prediction at scored position `i`, counted over all windows, in `buffer`. A token that llama.cpp left out is kept if it is
    /// `next`, which really follows. Errors: `NotFinite`; `OutOfRange` for what are no probabilities.
    ///
    /// # Panics
    /// If there is no such position.
    pub fn prediction<'a>(
        &self,
        i: usize,
        next: u32,
        buffer: &'a mut PredictionBuffer,
    ) -> Result<Prediction<'a>> {
        let start = self.extent.rows_at() + i as u64 * self.extent.row_bytes();
        // The file's length was checked, so all of it lies in memory.
        let row = &self.map[start as usize..(start + self.extent.row_bytes()) as usize];
        let error = |kind| {
            Error::new(kind).file(self.map.path()).at(start).what(format!("prediction at position {i}"))
        };
        match self.extent.layout {
            Layout::LlamaCpp => {
                let log_probs = &mut buffer.log_probs;
                decode(row, self.extent.vocab, next, log_probs);
                let sum: f64 = log_probs.iter().map(|p| p.exp()).sum();
                let of_next = log_probs.get(next as usize).copied().unwrap_or(f64::NAN);
                match sum.is_finite() && of_next.is_finite() {
                    true if SUM.contains(&sum) => Ok(Prediction::LogProbs(log_probs)),
                    true => {
                        Err(error(ErrorKind::OutOfRange).expected("probabilities with a sum of 1").found(sum))
                    }
                    false => Err(error(ErrorKind::NotFinite).expected("finite numbers")),
                }
            }
            Layout::F32 => {
                let logits = &mut buffer.logits;
                logits.clear();
                logits.extend(row.as_chunks().0.iter().map(|w| f32::from_le_bytes(*w)));
                match logits.iter().all(|x| x.is_finite()) {
                    true => Ok(Prediction::Logits(logits)),
                    false => Err(error(ErrorKind::NotFinite).expected("finite numbers")),
                }
            }
        }
    }
}

/// The log-probabilities of a row of llama.cpp's.
fn decode(row: &[u8], vocab: u32, next: u32, log_probs: &mut Vec<f64>) {
    let (words, _) = row.as_chunks::<4>();
    let (scale, least) = (f32::from_le_bytes(words[0]), f32::from_le_bytes(words[1]));
    let (codes, _) = row[8..].as_chunks::<2>();
    let log_prob = |(token, code): (u32, &[u8; 2])| {
        let p = scale * f32::from(u16::from_le_bytes(*code)) + least;
        if p <= -LEAST && token != next { f64::NEG_INFINITY } else { p.into() }
    };
    log_probs.clear();
    log_probs.extend((0..vocab).zip(codes).map(log_prob));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(row: &[u8], vocab: u32, next: u32) -> Vec<f64> {
        let mut out = vec![1.0]; // what was there before goes
        decode(row, vocab, next, &mut out);
        out
    }

    /// By hand: three tokens, of which one is too unlikely to be kept, and a fourth place of padding.
    #[test]
    fn a_row_of_llama_cpp() {
        let mut row = Vec::new();
        encode(&[1.0, 2.0, -30.0], &mut row);
        assert_eq!(row.len() as u64, Layout::LlamaCpp.row_bytes(3));
        let lse = (1.0 + (-1f64).exp()).ln();
        let scale = f32::from_le_bytes(row[..4].try_into().unwrap());
        let least = f32::from_le_bytes(row[4..8].try_into().unwrap());
        assert_eq!(scale, 16.0 / 65535.0);
        assert!((f64::from(least) - (-16.0 - lse)).abs() < 1e-6, "{least}");
        let codes: Vec<u16> = row[8..].as_chunks().0.iter().map(|c| u16::from_le_bytes(*c)).collect();
        assert_eq!(codes, [61439, 65535, 0, 0]);
        let out = decoded(&row, 3, 0);
        assert_eq!(out.len(), 3);
        assert!((out[0] - (-1.0 - lse)).abs() < 2e-4 && (out[1] + lse).abs() < 2e-6, "{out:?}");
        assert_eq!(out[2], f64::NEG_INFINITY);
        assert_eq!(decoded(&row, 3, 2)[2], f64::from(least));
    }

    #[test]
    fn the_second_half_is_scored_without_its_last_token() {
        assert_eq!(scored(512), 256..511);
        assert_eq!(scored(512).len(), 255);
        assert!(scored(0).is_empty());
    }

    #[test]
    fn equal_logits_have_no_scale() {
        let mut row = Vec::new();
        encode(&[3.0; 4], &mut row);
        let out = decoded(&row, 4, 0);
        assert!(out.iter().all(|p| (p - 0.25f64.ln()).abs() < 1e-6), "{out:?}");
    }
}
