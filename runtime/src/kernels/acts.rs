//! Activations in the form that a weight type multiplies with.

use super::memory::{Aligned, SharedMut};
use kestrel_formats::GgmlType;

/// How activations are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActKind {
    /// As they are.
    F32,
    /// int8 with a scale per 32, for weights in blocks of 32.
    Q8x32,
    /// int8 with a scale per 256, for weights in blocks of 256.
    Q8x256,
}

impl ActKind {
    /// What weights of type `ty` multiply with (`Matrix::act_kind` for those of bitsandbytes); `precise` keeps f32 whatever the weights are.
    pub fn for_weights(ty: GgmlType, precise: bool) -> Self {
        match ty.block_len() {
            _ if precise => Self::F32,
            32 => Self::Q8x32,
            256 => Self::Q8x256,
            _ => Self::F32,
        }
    }

    /// Numbers that share a scale; a range of columns that is quantized by itself is a multiple of this.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Q8x32 => 32,
            Self::Q8x256 => 256,
        }
    }
}

/// Activations of some tokens, [token][column], quantized as a [`ActKind`] says: `x ≈ scale * code` with
/// `scale = max |x| / 127` over the block (f32) and `code = x / scale` rounded to the nearest, ties to even, the same
/// on every instruction set.
///
/// Beside the codes it keeps their sums, which weights with a minimum and codes with an offset need.
pub struct Acts {
    kind: ActKind,
    n_tokens: usize,
    cols: usize,
    floats: Aligned<f32>,
    codes: Aligned<i8>,
    scales: Aligned<f32>,
    sums: Aligned<i32>,
}

/// Rows are this much longer than needed, so that several rows of 4096 numbers do not share their cache sets.
const ROW_PAD: usize = 64;

/// Strides of one token, in numbers.
fn strides(kind: ActKind, cols: usize) -> (usize, usize, usize, usize) {
    match kind {
        ActKind::F32 => (cols.next_multiple_of(16) + ROW_PAD, 0, 0, 0),
        _ => (0, cols.next_multiple_of(64) + ROW_PAD, cols / kind.block_len(), sums_len(kind, cols)),
    }
}

/// Sums of one token: per 32, and for blocks of 256 then per 16.
fn sums_len(kind: ActKind, cols: usize) -> usize {
    cols / 32 + if kind == ActKind::Q8x256 { cols / 16 } else { 0 }
}

impl Acts {
    /// Room for `n_tokens` of `cols` numbers in any form. Memory is taken only by what is used.
    pub fn with_capacity(n_tokens: usize, cols: usize) -> Self {
        let (floats, _, _, _) = strides(ActKind::F32, cols);
        let (_, codes, scales, _) = strides(ActKind::Q8x32, cols);
        Self {
            kind: ActKind::F32,
            n_tokens: 0,
            cols: 0,
            floats: Aligned::zeroed(n_tokens * floats),
            codes: Aligned::zeroed(n_tokens * codes),
            scales: Aligned::zeroed(n_tokens * scales),
            sums: Aligned::zeroed(n_tokens * sums_len(ActKind::Q8x256, cols)),
        }
    }

    /// Sets form and size; the content becomes meaningless.
    pub(crate) fn reset(&mut self, kind: ActKind, n_tokens: usize, cols: usize) {
        assert!(cols.is_multiple_of(kind.block_len()), "{cols} columns for {kind:?}");
        let (f, c, s, u) = strides(kind, cols);
        let fits = n_tokens * f <= self.floats.len()
            && n_tokens * c <= self.codes.len()
            && n_tokens * s <= self.scales.len()
            && n_tokens * u <= self.sums.len();
        assert!(fits, "more activations than there is room for");
        (self.kind, self.n_tokens, self.cols) = (kind, n_tokens, cols);
    }

    /// The form.
    pub fn kind(&self) -> ActKind {
        self.kind
    }

    /// Tokens.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Numbers per token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// f32 of token `t`.
    pub(crate) fn floats(&self, t: usize) -> &[f32] {
        &self.floats[t * strides(self.kind, self.cols).0..][..self.cols]
    }

    /// Codes of token `t`.
    pub(crate) fn codes(&self, t: usize) -> &[i8] {
        &self.codes[t * strides(self.kind, self.cols).1..][..self.cols]
    }

    /// Scales of token `t`, one per block.
    pub(crate) fn scales(&self, t: usize) -> &[f32] {
        &self.scales[t * strides(self.kind, self.cols).2..][..self.cols / self.kind.block_len()]
    }

    /// Sums of token `t`'s codes per 32.
    pub(crate) fn sums32(&self, t: usize) -> &[i32] {
        &self.sums[t * strides(self.kind, self.cols).3..][..self.cols / 32]
    }

    /// Sums of token `t`'s codes per 16; only for [`ActKind::Q8x256`].
    pub(crate) fn sums16(&self, t: usize) -> &[i32] {
        debug_assert_eq!(self.kind, ActKind::Q8x256);
        &self.sums[t * strides(self.kind, self.cols).3..][self.cols / 32..][..self.cols / 16]
    }

    /// What the activations stand for, as f32; for tests and reports.
    pub fn to_f32(&self, t: usize) -> Vec<f32> {
        match self.kind {
            ActKind::F32 => self.floats(t).to_vec(),
            kind => {
                let scales = self.scales(t);
                self.codes(t)
                    .iter()
                    .enumerate()
                    .map(|(i, &q)| scales[i / kind.block_len()] * f32::from(q))
                    .collect()
            }
        }
    }

    /// A view that several workers fill, each its own tokens or columns.
    pub(crate) fn writer(&mut self) -> ActsWriter<'_> {
        ActsWriter {
            kind: self.kind,
            cols: self.cols,
            floats: SharedMut::new(&mut self.floats),
            codes: SharedMut::new(&mut self.codes),
            scales: SharedMut::new(&mut self.scales),
            sums: SharedMut::new(&mut self.sums),
        }
    }
}

/// See [`Acts::writer`].
#[derive(Clone, Copy)]
pub(crate) struct ActsWriter<'a> {
    pub kind: ActKind,
    cols: usize,
    floats: SharedMut<'a, f32>,
    codes: SharedMut<'a, i8>,
    scales: SharedMut<'a, f32>,
    sums: SharedMut<'a, i32>,
}

/// One block of a quantized row, to be filled.
pub(crate) struct BlockMut<'a> {
    pub codes: &'a mut [i8],
    pub scale: &'a mut f32,
    /// One per 32 codes.
    pub sums32: &'a mut [i32],
    /// One per 16 codes, or empty.
    pub sums16: &'a mut [i32],
}

impl<'a> ActsWriter<'a> {
    /// f32 `col..col + n` of token `t`.
    ///
    /// # Safety
    /// No other worker accesses these numbers at the same time, and no other part of them is alive.
    pub unsafe fn floats(&self, t: usize, col: usize, n: usize) -> &'a mut [f32] {
        assert!(col + n <= self.cols);
        let start = t * strides(self.kind, self.cols).0 + col;
        // SAFETY: the caller's promise.
        unsafe { self.floats.part(start..start + n) }
    }

    /// Block `b` of token `t`.
    ///
    /// # Safety
    /// As for [`Self::floats`].
    pub unsafe fn block(&self, t: usize, b: usize) -> BlockMut<'a> {
        let len = self.kind.block_len();
        let (_, codes, scales, sums) = strides(self.kind, self.cols);
        let (codes, scale, sums) = (t * codes + b * len, t * scales + b, t * sums);
        let (start32, n32) = (sums + b * (len / 32), len / 32);
        let (start16, n16) = match self.kind {
            ActKind::Q8x256 => (sums + self.cols / 32 + b * 16, 16),
            _ => (start32 + n32, 0),
        };
        // SAFETY: the caller's promise; the parts of one block are disjoint.
        unsafe {
            BlockMut {
                codes: self.codes.part(codes..codes + len),
                scale: &mut self.scales.part(scale..scale + 1)[0],
                sums32: self.sums.part(start32..start32 + n32),
                sums16: self.sums.part(start16..start16 + n16),
            }
        }
    }
}
