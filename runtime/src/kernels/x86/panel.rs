//! Many tokens: some rows are expanded once, some columns at a time, and multiplied with all tokens, sixteen of which
//! are interleaved ([`Group`]).
//!
//! A panel is [row][column] codes of a byte, and [row][sub-block] scales and offsets as f32. The weights stay in row
//! order, so expanding them is unpacking and nothing else; what the products need interleaved are the activations, and
//! those are written so when they are quantized. Here is what the instruction sets share; they differ in their
//! [`Sweep`].

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::few::FOUR;
use super::unpack::{Large, Small, f16};
use crate::kernels::acts::Group;
use crate::kernels::lanes::Lanes;
use crate::kernels::matmul::{Job, PANEL_COLS, PANEL_ROWS, Scratch};
use crate::kernels::memory::LANES;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Bytes from a row of codes to the next: rows of 256 alone would share their cache sets.
pub(super) const STRIDE: usize = PANEL_COLS + 64;
/// Half a group of tokens: with no more, an instruction set may do half the work.
pub(super) const HALF: usize = LANES / 2;
/// Sub-blocks of a row of a panel at most.
pub(super) const SUBS: usize = PANEL_COLS / 16;

/// What the inner loops read; all in the worker's scratch.
pub(super) struct Panel {
    /// [row][[`STRIDE`]]
    pub codes: *mut u8,
    /// [row][[`SUBS`]]
    pub scales: *mut f32,
    /// Added to a weight, -dmin·min or m: [row][[`SUBS`]]
    pub offsets: *mut f32,
    /// Over the panels so far: [token / 16][[`PANEL_ROWS`]][16]
    pub sums: *mut f32,
    /// Tiles of integer products on their way from AMX to f32.
    pub tiles: *mut i32,
    /// Where the same columns of the rows after the panel's begin, bytes from row to row, and lines of each.
    next: (*const u8, usize, usize),
}

impl Panel {
    fn new(scratch: &mut Scratch) -> Self {
        assert!(
            scratch.panel.len() * 4 >= PANEL_ROWS * STRIDE && scratch.scales.len() >= 2 * PANEL_ROWS * SUBS
        );
        let (scales, offsets) = scratch.scales.split_at_mut(SUBS * PANEL_ROWS);
        Self {
            codes: scratch.panel.as_mut_ptr().cast(),
            scales: scales.as_mut_ptr(),
            offsets: offsets.as_mut_ptr(),
            sums: scratch.sums.as_mut_ptr(),
            tiles: scratch.tiles.as_mut_ptr(),
            next: (std::ptr::null(), 0, 0),
        }
    }

    /// Fetches what these rows of the next panel with the same columns will be expanded from. A few rows at a time between
    /// the products: a panel's at once would fill the buffers for misses and hold up everything behind them.
    #[inline(always)]
    pub fn fetch_next(&self, rows: Range<usize>) {
        let (first, row_bytes, n_lines) = self.next;
        for r in rows {
            let row = first.wrapping_add(r * row_bytes);
            for line in 0..n_lines {
                // SAFETY: SSE is part of x86-64; a prefetch accesses nothing that a program can see.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(64 * line).cast()) };
            }
        }
    }

    /// Where row `r` is.
    unsafe fn row(&self, r: usize) -> Row {
        Row {
            codes: self.codes.add(r * STRIDE),
            scales: self.scales.add(r * SUBS),
            offsets: self.offsets.add(r * SUBS),
        }
    }

    /// The sums of row `r` with the 16 tokens of group `g`.
    pub unsafe fn sums(&self, g: usize, r: usize) -> *mut f32 {
        self.sums.add((g * PANEL_ROWS + r) * LANES)
    }
}

/// A row of a panel.
pub(super) struct Row {
    pub codes: *mut u8,
    pub scales: *mut f32,
    offsets: *mut f32,
}

/// A block format as panels have it: `weight = scale(sub-block) · code + offset(sub-block)`.
pub(super) trait Format {
    /// Weights that share an activation scale, 32 or 256: for 32, each product is scaled at once.
    const BLOCK: usize;
    /// Weights that share a scale.
    const SUB: usize;
    /// Codes are below `1 << BITS`, before [`Self::BIAS`] is taken off.
    const BITS: usize;
    const BIAS: u8;
    const HAS_OFFSETS: bool;
    /// Bytes of a block, in the file.
    const BYTES: usize;

    /// What is prepared for four rows together.
    type Prepared;
    /// Prepares columns of four rows, which begin at `blocks`.
    unsafe fn prepare(_blocks: &[*const u8; FOUR], _to: *mut Self::Prepared) {}
    /// Expands `n` weights from `blocks` on, those of row `i` of the four that were prepared.
    unsafe fn expand<S: Sweep>(
        prepared: *const Self::Prepared,
        i: usize,
        blocks: *const u8,
        n: usize,
        to: Row,
    );
}

/// A type with blocks of 32.
pub(super) struct InSmall<F>(PhantomData<F>);

impl<F: Small> Format for InSmall<F> {
    const BLOCK: usize = 32;
    const SUB: usize = 32;
    const BITS: usize = match F::BIAS {
        128 => 8,
        8 => 4,
        _ => 5,
    };
    const BIAS: u8 = F::BIAS;
    const HAS_OFFSETS: bool = F::HAS_M;
    const BYTES: usize = F::BYTES;
    type Prepared = ();

    #[inline(always)]
    unsafe fn expand<S: Sweep>(_: *const (), _: usize, blocks: *const u8, n: usize, to: Row) {
        let minus = _mm256_set1_epi8(S::taken_off(F::BIAS) as i8);
        for b in 0..n / 32 {
            let block = blocks.add(b * F::BYTES);
            _mm256_storeu_si256(to.codes.add(32 * b).cast(), _mm256_sub_epi8(F::codes(block), minus));
            *to.scales.add(b) = f16(block);
            if F::HAS_M {
                *to.offsets.add(b) = f16(block.add(2));
            }
        }
    }
}

/// A type with blocks of 256.
pub(super) struct InLarge<F>(PhantomData<F>);

impl<F: Large> Format for InLarge<F> {
    const BLOCK: usize = 256;
    const SUB: usize = F::SUB;
    const BITS: usize = F::BITS;
    const BIAS: u8 = F::BIAS;
    const HAS_OFFSETS: bool = F::HAS_MINS;
    const BYTES: usize = F::BYTES;
    type Prepared = ();

    #[inline(always)]
    unsafe fn expand<S: Sweep>(_: *const (), _: usize, blocks: *const u8, n: usize, to: Row) {
        let minus = _mm256_set1_epi8(S::taken_off(F::BIAS) as i8);
        let n_subs = 256 / F::SUB;
        for b in 0..n / 256 {
            let block = blocks.add(b * F::BYTES);
            let codes = to.codes.add(256 * b);
            // One after the other by hand: as a loop it would not be unrolled, and shift by variables.
            put_codes::<F, 0>(codes, block, minus);
            put_codes::<F, 1>(codes, block, minus);
            put_codes::<F, 2>(codes, block, minus);
            put_codes::<F, 3>(codes, block, minus);
            put_codes::<F, 4>(codes, block, minus);
            put_codes::<F, 5>(codes, block, minus);
            put_codes::<F, 6>(codes, block, minus);
            put_codes::<F, 7>(codes, block, minus);
            put_scaled::<F>(to.scales.add(b * n_subs), F::scales(block), f16(block.add(F::D)));
            if F::HAS_MINS {
                put_scaled::<F>(to.offsets.add(b * n_subs), F::mins(block), -f16(block.add(F::DMIN)));
            }
        }
    }
}

/// Stores codes `32·J..`, less `minus`.
#[inline(always)]
unsafe fn put_codes<F: Large, const J: usize>(to: *mut u8, block: *const u8, minus: __m256i) {
    _mm256_storeu_si256(to.add(32 * J).cast(), _mm256_sub_epi8(F::codes(block, J), minus));
}

/// Stores one number per sub-block of a block, times `d`.
#[inline(always)]
unsafe fn put_scaled<F: Large>(to: *mut f32, x: __m128i, d: f32) {
    let d = _mm256_set1_ps(d);
    _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), d));
    if F::SUB == 16 {
        let x = _mm_srli_si128::<8>(x);
        _mm256_storeu_ps(to.add(8), _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), d));
    }
}

/// What an instruction set does with a panel.
pub(super) trait Sweep {
    type Lanes: Lanes;
    /// Whether [`Self::sweep`] calls [`Panel::fetch_next`] for all rows. Else it is done while a panel is expanded.
    const FETCHES_NEXT: bool = true;
    /// What expansion takes off a code that has `bias`; the rest is left to the products.
    fn taken_off(bias: u8) -> u8;
    /// Arranges `n_rows` rows, which were expanded, for [`Self::sweep`].
    #[inline(always)]
    unsafe fn arrange(_panel: &Panel, _n_rows: usize) {}
    /// Adds the products of the panel's first `n_rows` rows, which are columns `k0..k0 + n`, with all tokens to the
    /// sums. Rows up to the next multiple of 16 exist, but mean nothing.
    unsafe fn sweep<F: Format>(panel: &Panel, job: &Job<'_>, n_rows: usize, k0: usize, n: usize);
    /// The sums of the 16 rows from `r` on with the tokens of group `g`, as [token][row].
    #[inline(always)]
    unsafe fn by_token(panel: &Panel, g: usize, r: usize, to: &mut [f32; LANES * LANES]) {
        Self::Lanes::transpose(panel.sums(g, r), LANES, to.as_mut_ptr());
    }
}

/// Rows of `F` times many tokens.
#[inline(always)]
pub(super) unsafe fn product<F: Format, S: Sweep>(job: &Job<'_>, scratch: &mut Scratch) {
    let (n_tokens, n_groups) = (job.acts.n_tokens(), job.acts.n_groups());
    let row_bytes = job.weights.row_bytes();
    for row0 in job.rows.clone().step_by(PANEL_ROWS) {
        let n_rows = PANEL_ROWS.min(job.rows.end - row0);
        let rows = job.weights.bytes[row0 * row_bytes..][..n_rows * row_bytes].as_ptr();
        scratch.sums[..n_groups * PANEL_ROWS * LANES].fill(0.0);
        let mut panel = Panel::new(scratch);
        for k0 in (0..job.weights.cols).step_by(PANEL_COLS) {
            let n = PANEL_COLS.min(job.weights.cols - k0);
            let blocks = rows.add(k0 / F::BLOCK * F::BYTES);
            let n_lines = (n / F::BLOCK * F::BYTES).div_ceil(64);
            panel.next = (blocks.wrapping_add(n_rows * row_bytes), row_bytes, n_lines);
            fill::<F, S>(&panel, blocks, row_bytes, n_rows, n);
            S::arrange(&panel, n_rows);
            S::sweep::<F>(&panel, job, n_rows, k0, n);
        }
        for (half, row) in (row0..row0 + n_rows).step_by(LANES).enumerate() {
            for g in 0..n_groups {
                let mut by_token = [0.0; LANES * LANES];
                S::by_token(&panel, g, half * LANES, &mut by_token);
                for (i, sums) in by_token.chunks_exact(LANES).enumerate().take(n_tokens - g * LANES) {
                    job.out.put(row, g * LANES + i, &sums[..LANES.min(row0 + n_rows - row)]);
                }
            }
        }
    }
}

/// Expands `n` columns of `n_rows` rows, the first of which begin at `blocks`.
#[inline(always)]
unsafe fn fill<F: Format, S: Sweep>(
    panel: &Panel,
    blocks: *const u8,
    row_bytes: usize,
    n_rows: usize,
    n: usize,
) {
    // All are prepared first, so that none waits for the one before it.
    let mut prepared = [const { MaybeUninit::<F::Prepared>::uninit() }; PANEL_ROWS / FOUR];
    for (i, prepared) in prepared[..n_rows.div_ceil(FOUR)].iter_mut().enumerate() {
        // Of rows that do not exist, the last again.
        let four = each!([blocks; FOUR], j => blocks.add((FOUR * i + j).min(n_rows - 1) * row_bytes));
        F::prepare(&four, prepared.as_mut_ptr());
    }
    for r in 0..n_rows {
        let blocks = blocks.add(r * row_bytes);
        if !S::FETCHES_NEXT {
            panel.fetch_next(r..r + 1);
        }
        F::expand::<S>(prepared[r / FOUR].as_ptr(), r % FOUR, blocks, n, panel.row(r));
    }
}

/// Sums of the codes of sub-block `sub` of `F`, of all tokens of a group.
#[inline(always)]
pub(super) unsafe fn sums_of<F: Format>(group: &Group<'_>, sub: usize) -> *const i32 {
    let sums = match F::SUB {
        16 => group.sums16,
        32 => group.sums32,
        _ => group.sums256,
    };
    sums[sub * LANES..][..LANES].as_ptr()
}
