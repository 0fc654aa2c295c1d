//! Activations in the form that a weight type multiplies with.

use super::matmul::INT_PANEL_TOKENS;
use super::memory::{Aligned, LANES, SharedMut};
use kestrel_formats::{GgmlType, WeightType};

/// How activations are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActKind {
    /// As they are.
    F32,
    /// int8 with a scale per 32, for weights in blocks of 32.
    Q8x32,
    /// The same, of each 32 those at even places and then those at odd ones: in this order lie the high and the low halves
    /// of the bytes of 4-bit weights of bitsandbytes.
    Q8x32EvenOdd,
    /// int8 with a scale per 256, for weights in blocks of 256.
    Q8x256,
}

impl ActKind {
    /// What weights of type `ty` multiply with; `precise` keeps f32 whatever the weights are.
    pub fn for_weights(ty: GgmlType, precise: bool) -> Self {
        match ty.block_len() {
            _ if precise => Self::F32,
            32 => Self::Q8x32,
            256 => Self::Q8x256,
            _ => Self::F32,
        }
    }

    /// What weights of bitsandbytes multiply with, when they are multiplied as Q8_0.
    pub fn for_weights_of_bnb(dtype: WeightType) -> Self {
        if dtype.code_values().is_some() { Self::Q8x32EvenOdd } else { Self::Q8x32 }
    }

    /// Numbers that share a scale; a range of columns that is quantized by itself is a multiple of this.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Q8x32 | Self::Q8x32EvenOdd => 32,
            Self::Q8x256 => 256,
        }
    }

    /// Whether sums of `sub` codes are kept beside them.
    fn keeps_sums(self, sub: usize) -> bool {
        sub == 32 || self == Self::Q8x256
    }

    /// 32 codes in the order in which they are stored.
    #[inline(always)]
    pub(crate) fn in_order(self, codes: [i8; 32]) -> [i8; 32] {
        match self {
            Self::Q8x32EvenOdd => {
                let mut out = [0; 32];
                for (i, &[even, odd]) in codes.as_chunks().0.iter().enumerate() {
                    (out[i], out[LANES + i]) = (even, odd);
                }
                out
            }
            _ => codes,
        }
    }
}

/// Activations of some tokens, quantized as a [`ActKind`] says: `x ≈ scale * code` with `scale = max |x| / 127` over
/// the block (f32) and `code = x / scale` rounded to the nearest, ties to even, the same on every instruction set.
///
/// Beside the codes it keeps their sums, which weights with a minimum and codes with an offset need.
///
/// Floats, and codes of few tokens, are `[token][column]`. From six tokens on, sixteen are interleaved so that a
/// vector holds the same four columns of all of them: codes `[token / 16][column / 4][16][4]`, scales
/// `[token / 16][block][16]`, sums `[token / 16][sub-block][16]`. What the last group has beyond the last token means
/// nothing.
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

/// Where the numbers of one token are.
#[derive(Clone, Copy)]
struct Place {
    /// The first of its floats, codes, scales and sums.
    floats: usize,
    codes: usize,
    scales: usize,
    sums: usize,
    /// From four codes to the next four.
    quad_stride: usize,
    /// From a scale or a sum to the next.
    stride: usize,
}

/// Whether tokens lie in groups of sixteen; see [`Acts`].
fn is_interleaved(kind: ActKind, n_tokens: usize) -> bool {
    kind != ActKind::F32 && n_tokens >= INT_PANEL_TOKENS
}

/// The place of token `t` of `n_tokens` with `cols` numbers.
fn place(kind: ActKind, n_tokens: usize, cols: usize, t: usize) -> Place {
    let (n_scales, n_sums) = (cols / kind.block_len(), sums_len(kind, cols));
    if is_interleaved(kind, n_tokens) {
        let (group, lane) = (t / LANES, t % LANES);
        return Place {
            floats: 0,
            codes: group * cols * LANES + 4 * lane,
            scales: group * n_scales * LANES + lane,
            sums: group * n_sums * LANES + lane,
            quad_stride: 4 * LANES,
            stride: LANES,
        };
    }
    Place {
        floats: t * (cols.next_multiple_of(LANES) + ROW_PAD),
        codes: t * (cols.next_multiple_of(64) + ROW_PAD),
        scales: t * n_scales,
        sums: t * n_sums,
        quad_stride: 4,
        stride: 1,
    }
}

/// Sums of one token: per 32, and for blocks of 256 then per 16 and per 256.
fn sums_len(kind: ActKind, cols: usize) -> usize {
    match kind {
        ActKind::F32 => 0,
        ActKind::Q8x32 | ActKind::Q8x32EvenOdd => cols / 32,
        ActKind::Q8x256 => cols / 32 + cols / 16 + cols / 256,
    }
}

/// Where the sums per `sub` begin among those of one token.
fn first_sum(sub: usize, cols: usize) -> usize {
    match sub {
        32 => 0,
        16 => cols / 32,
        _ => cols / 32 + cols / 16,
    }
}

impl Acts {
    /// Room for `n_tokens` of `cols` numbers in any form. Memory is taken only by what is used.
    pub fn with_capacity(n_tokens: usize, cols: usize) -> Self {
        // A whole last group, and a start of a token beyond it.
        let t = n_tokens.next_multiple_of(LANES);
        let floats = place(ActKind::F32, t, cols, t).floats;
        let codes = t * (cols.next_multiple_of(64) + ROW_PAD);
        Self {
            kind: ActKind::F32,
            n_tokens: 0,
            cols: 0,
            floats: Aligned::zeroed(floats),
            codes: Aligned::zeroed(codes),
            scales: Aligned::zeroed(t * cols.div_ceil(32)),
            sums: Aligned::zeroed(t * sums_len(ActKind::Q8x256, cols)),
        }
    }

    /// Sets form and size; the content becomes meaningless.
    pub(crate) fn reset(&mut self, kind: ActKind, n_tokens: usize, cols: usize) {
        assert!(cols.is_multiple_of(kind.block_len()), "{cols} columns for {kind:?}");
        let t = n_tokens.next_multiple_of(LANES);
        let fits = match kind {
            ActKind::F32 => place(kind, n_tokens, cols, n_tokens).floats <= self.floats.len(),
            _ => {
                t * (cols.next_multiple_of(64) + ROW_PAD) <= self.codes.len()
                    && t * (cols / kind.block_len()) <= self.scales.len()
                    && t * sums_len(kind, cols) <= self.sums.len()
            }
        };
        assert!(fits, "more activations than there is room for");
        (self.kind, self.n_tokens, self.cols) = (kind, n_tokens, cols);
    }

    /// The form.
    pub fn kind(&self) -> ActKind {
        self.kind
    }

    /// Tokens.
    #[inline(always)]
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Numbers per token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    fn place(&self, t: usize) -> Place {
        assert!(t < self.n_tokens, "token {t} of {}", self.n_tokens);
        place(self.kind, self.n_tokens, self.cols, t)
    }

    /// f32 of token `t`.
    #[inline(always)]
    pub(crate) fn floats(&self, t: usize) -> &[f32] {
        &self.floats[self.place(t).floats..][..self.cols]
    }
}

/// What kernels of integers read.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // NEON has none yet
impl Acts {
    /// Codes of token `t` of few.
    #[inline(always)]
    pub(crate) fn codes(&self, t: usize) -> &[i8] {
        debug_assert!(self.n_tokens < INT_PANEL_TOKENS);
        &self.codes[self.place(t).codes..][..self.cols]
    }

    /// Scales of token `t` of few, one per block.
    #[inline(always)]
    pub(crate) fn scales(&self, t: usize) -> &[f32] {
        debug_assert!(self.n_tokens < INT_PANEL_TOKENS);
        &self.scales[self.place(t).scales..][..self.cols / self.kind.block_len()]
    }

    /// Sums per 32 of the codes of token `t` of few.
    #[inline(always)]
    pub(crate) fn sums32(&self, t: usize) -> &[i32] {
        debug_assert!(self.n_tokens < INT_PANEL_TOKENS);
        &self.sums[self.place(t).sums..][..self.cols / 32]
    }

    /// Sums per 16 of the codes of token `t` of few; only for [`ActKind::Q8x256`].
    #[inline(always)]
    pub(crate) fn sums16(&self, t: usize) -> &[i32] {
        debug_assert!(self.kind == ActKind::Q8x256 && self.n_tokens < INT_PANEL_TOKENS);
        &self.sums[self.place(t).sums + first_sum(16, self.cols)..][..self.cols / 16]
    }

    /// Groups of 16 tokens, of many.
    #[inline(always)]
    pub(crate) fn n_groups(&self) -> usize {
        self.n_tokens.div_ceil(LANES)
    }

    /// Group `g` of many tokens.
    #[inline(always)]
    pub(crate) fn group(&self, g: usize) -> Group<'_> {
        assert!(is_interleaved(self.kind, self.n_tokens));
        let at = self.place(g * LANES);
        let sums = &self.sums[at.sums..];
        let of_large = |sub: usize| match self.kind.keeps_sums(sub) {
            true => &sums[first_sum(sub, self.cols) * LANES..][..self.cols / sub * LANES],
            false => &[],
        };
        Group {
            codes: &self.codes[at.codes..][..self.cols * LANES],
            scales: &self.scales[at.scales..][..self.cols / self.kind.block_len() * LANES],
            sums32: &sums[..self.cols / 32 * LANES],
            sums16: of_large(16),
            sums256: of_large(256),
        }
    }
}

/// What plain Rust reads, however many tokens there are.
impl Acts {
    /// Codes `col..` of token `t` in the order of the kind, one for each number of `to`, however they are stored. `col`
    /// and the length are multiples of 4.
    pub(crate) fn copy_codes(&self, t: usize, col: usize, to: &mut [i8]) {
        let at = self.place(t);
        for (i, to) in to.chunks_exact_mut(4).enumerate() {
            to.copy_from_slice(&self.codes[at.codes + (col / 4 + i) * at.quad_stride..][..4]);
        }
    }

    /// The scale of block `b` of token `t`.
    pub(crate) fn scale(&self, t: usize, b: usize) -> f32 {
        let at = self.place(t);
        self.scales[at.scales + b * at.stride]
    }

    /// The sum of the codes `sub · i..sub · (i + 1)` of token `t`; `sub` is 32, or also 16 or 256 for
    /// [`ActKind::Q8x256`].
    pub(crate) fn sum(&self, t: usize, sub: usize, i: usize) -> i32 {
        let at = self.place(t);
        self.sums[at.sums + (first_sum(sub, self.cols) + i) * at.stride]
    }

    /// What the activations stand for, as f32; for tests and reports.
    pub fn to_f32(&self, t: usize) -> Vec<f32> {
        if self.kind == ActKind::F32 {
            return self.floats(t).to_vec();
        }
        let mut codes = vec![0; self.cols];
        self.copy_codes(t, 0, &mut codes);
        if self.kind == ActKind::Q8x32EvenOdd {
            for block in codes.as_chunks_mut::<32>().0 {
                *block = std::array::from_fn(|i| block[i % 2 * LANES + i / 2]);
            }
        }
        let scaled = |(i, &q): (usize, &i8)| self.scale(t, i / self.kind.block_len()) * f32::from(q);
        codes.iter().enumerate().map(scaled).collect()
    }

    /// A view that several workers fill, each its own tokens or columns.
    pub(crate) fn writer(&mut self) -> ActsWriter<'_> {
        ActsWriter {
            kind: self.kind,
            n_tokens: self.n_tokens,
            cols: self.cols,
            floats: SharedMut::new(&mut self.floats),
            codes: SharedMut::new(&mut self.codes),
            scales: SharedMut::new(&mut self.scales),
            sums: SharedMut::new(&mut self.sums),
        }
    }
}

/// Sixteen interleaved tokens; see [`Acts`].
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // NEON has no panels of integers yet
pub(crate) struct Group<'a> {
    /// [column / 4][16][4]
    pub codes: &'a [i8],
    /// [block][16]
    pub scales: &'a [f32],
    /// [column / 32][16]
    pub sums32: &'a [i32],
    /// [column / 16][16], or empty.
    pub sums16: &'a [i32],
    /// [column / 256][16], or empty.
    pub sums256: &'a [i32],
}

/// See [`Acts::writer`].
#[derive(Clone, Copy)]
pub(crate) struct ActsWriter<'a> {
    pub kind: ActKind,
    n_tokens: usize,
    cols: usize,
    floats: SharedMut<'a, f32>,
    codes: SharedMut<'a, i8>,
    scales: SharedMut<'a, f32>,
    sums: SharedMut<'a, i32>,
}

/// One block of a quantized token, to be filled.
pub(crate) struct BlockMut<'a> {
    to: ActsWriter<'a>,
    at: Place,
    block: usize,
}

impl BlockMut<'_> {
    /// Numbers of the block.
    pub fn len(&self) -> usize {
        self.to.kind.block_len()
    }

    /// Stores the scale.
    ///
    /// # Safety
    /// That of [`ActsWriter::block`], here and below.
    pub unsafe fn put_scale(&self, scale: f32) {
        let i = self.at.scales + self.block * self.at.stride;
        // SAFETY: the caller's promise.
        unsafe { self.to.scales.part(i..i + 1)[0] = scale };
    }

    /// Stores codes `32 i..32 i + 32`, and their sums: of the first sixteen and of the others.
    ///
    /// # Safety
    /// See [`Self::put_scale`].
    #[inline(always)]
    pub unsafe fn put_codes(&self, i: usize, codes: [i8; 32], sums: [i32; 2]) {
        let codes = self.to.kind.in_order(codes);
        let (first, stride) = (self.block * self.len() / 4 + 8 * i, self.at.quad_stride);
        // SAFETY: the caller's promise.
        unsafe {
            if stride == 4 {
                let start = self.at.codes + 4 * first;
                self.to.codes.part(start..start + codes.len()).copy_from_slice(&codes);
            } else {
                for (q, quad) in codes.as_chunks::<4>().0.iter().enumerate() {
                    let start = self.at.codes + (first + q) * stride;
                    self.to.codes.part(start..start + 4).copy_from_slice(quad);
                }
            }
            self.put_sum(16, 2 * i, sums[0]);
            self.put_sum(16, 2 * i + 1, sums[1]);
            self.put_sum(32, i, sums[0] + sums[1]);
        }
    }

    /// Stores the sum of all codes, where the form keeps it.
    ///
    /// # Safety
    /// See [`Self::put_scale`].
    pub unsafe fn put_sum_of_all(&self, sum: i32) {
        // SAFETY: the caller's promise.
        unsafe { self.put_sum(256, 0, sum) };
    }

    unsafe fn put_sum(&self, sub: usize, i: usize, sum: i32) {
        if self.to.kind.keeps_sums(sub) {
            let i = first_sum(sub, self.to.cols) + self.block * (self.len() / sub) + i;
            let i = self.at.sums + i * self.at.stride;
            // SAFETY: the caller's promise.
            unsafe { self.to.sums.part(i..i + 1)[0] = sum };
        }
    }
}

/// Sixteen interleaved tokens, or the last of them, to be filled.
pub(crate) struct GroupMut<'a> {
    to: ActsWriter<'a>,
    /// Of the first token.
    at: Place,
    n_tokens: usize,
}

impl<'a> GroupMut<'a> {
    /// The kind of codes.
    pub fn kind(&self) -> ActKind {
        self.to.kind
    }

    /// Tokens that mean something.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Stores all tokens' scales of block `block`.
    ///
    /// # Safety
    /// That of [`ActsWriter::group`], here and below.
    pub unsafe fn put_scales(&self, block: usize, scales: &[f32; LANES]) {
        let i = self.at.scales + block * LANES;
        // SAFETY: the caller's promise, here and below.
        unsafe { self.to.scales.part(i..i + LANES) }.copy_from_slice(scales);
    }

    /// Codes `col..col + n` of all tokens, [column / 4][16][4].
    ///
    /// # Safety
    /// See [`Self::put_scales`].
    pub unsafe fn codes(&self, col: usize, n: usize) -> &'a mut [i8] {
        let i = self.at.codes + col * LANES;
        // SAFETY: see above.
        unsafe { self.to.codes.part(i..i + n * LANES) }
    }

    /// Stores all tokens' sums of codes `sub · i..sub · (i + 1)`, where the form keeps them.
    ///
    /// # Safety
    /// See [`Self::put_scales`].
    pub unsafe fn put_sums(&self, sub: usize, i: usize, sums: &[i32; LANES]) {
        if self.to.kind.keeps_sums(sub) {
            let i = self.at.sums + (first_sum(sub, self.to.cols) + i) * LANES;
            // SAFETY: see above.
            unsafe { self.to.sums.part(i..i + LANES) }.copy_from_slice(sums);
        }
    }
}

impl<'a> ActsWriter<'a> {
    /// Groups of interleaved tokens; none if tokens are not interleaved.
    pub fn n_groups(&self) -> usize {
        if is_interleaved(self.kind, self.n_tokens) { self.n_tokens.div_ceil(LANES) } else { 0 }
    }

    /// Group `g`.
    ///
    /// # Safety
    /// No other worker accesses the columns that are put, of any token of the group, at the same time.
    pub unsafe fn group(&self, g: usize) -> GroupMut<'a> {
        assert!(g < self.n_groups(), "group {g} of {}", self.n_groups());
        let n_tokens = LANES.min(self.n_tokens - g * LANES);
        GroupMut { to: *self, at: self.place(g * LANES), n_tokens }
    }

    fn place(&self, t: usize) -> Place {
        assert!(t < self.n_tokens, "token {t} of {}", self.n_tokens);
        place(self.kind, self.n_tokens, self.cols, t)
    }

    /// f32 `col..col + n` of token `t`.
    ///
    /// # Safety
    /// No other worker accesses these numbers at the same time, and no other part of them is alive.
    pub unsafe fn floats(&self, t: usize, col: usize, n: usize) -> &'a mut [f32] {
        assert!(col + n <= self.cols);
        let start = self.place(t).floats + col;
        // SAFETY: the caller's promise.
        unsafe { self.floats.part(start..start + n) }
    }

    /// Block `b` of token `t`.
    ///
    /// # Safety
    /// As for [`Self::floats`].
    pub unsafe fn block(&self, t: usize, b: usize) -> BlockMut<'a> {
        assert!((b + 1) * self.kind.block_len() <= self.cols);
        BlockMut { to: *self, at: self.place(t), block: b }
    }
}
