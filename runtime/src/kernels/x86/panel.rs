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
use crate::kernels::matmul::{Job, PANEL_COLS, PANEL_ROWS, Scratch, panel_rows};
use crate::kernels::memory::{LANES, fetch};
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Bytes from a row of codes to the next: rows of 256 alone would share their cache sets.
pub(super) const STRIDE: usize = PANEL_COLS + 64;
/// Bytes from a row of codes in words to the next.
pub(super) const WORD_STRIDE: usize = 2 * PANEL_COLS + 64;
/// Half a group of tokens: with no more, an instruction set may do half the work.
pub(super) const HALF: usize = LANES / 2;
/// Sub-blocks of a row of a panel at most.
pub(super) const SUBS: usize = PANEL_COLS / 16;

/// What the inner loops read; all in the worker's scratch.
pub(super) struct Panel {
    /// [row][[`STRIDE`]]
    pub codes: *mut u8,
    /// Room for the codes as words of i16: [row][[`WORD_STRIDE`]]
    pub words: *mut u8,
    /// [row][[`SUBS`]]
    pub scales: *mut f32,
    /// Added to a weight, -dmin·min or m: [row][[`SUBS`]]
    pub offsets: *mut f32,
    /// Over the panels so far: [token / 16][`max_rows`][16]
    sums: *mut f32,
    /// Rows that a panel of this job has at most.
    max_rows: usize,
    /// Tiles of integer products on their way from AMX to f32; with AVX2, a group's activations as words.
    pub tiles: *mut i32,
    /// What it is expanded from,
    this: Source,
    /// and what the next panel will be, if there is one.
    next: Option<Source>,
}

impl Panel {
    fn new(scratch: &mut Scratch, max_rows: usize, this: Source, next: Option<Source>) -> Self {
        assert!(scratch.panel.len() * 4 >= PANEL_ROWS * (STRIDE + WORD_STRIDE));
        assert!(
            scratch.scales.len() >= 2 * PANEL_ROWS * SUBS && scratch.tiles.len() >= PANEL_COLS * LANES / 2
        );
        let (scales, offsets) = scratch.scales.split_at_mut(SUBS * PANEL_ROWS);
        let codes: *mut u8 = scratch.panel.as_mut_ptr().cast();
        Self {
            codes,
            words: codes.wrapping_add(PANEL_ROWS * STRIDE),
            scales: scales.as_mut_ptr(),
            offsets: offsets.as_mut_ptr(),
            sums: scratch.sums.as_mut_ptr(),
            max_rows,
            tiles: scratch.tiles.as_mut_ptr(),
            this,
            next,
        }
    }

    /// Fetches rows of the next panel; of a low one, which is soon done with, those of the panel that has the same columns of
    /// the rows behind it. A few rows at a time between the products: a panel's at once would fill the buffers for misses
    /// and hold up everything behind them.
    #[inline(always)]
    pub fn fetch_next(&self, rows: Range<usize>) {
        let Source { blocks, row_bytes, n_bytes, .. } = match self.next {
            Some(next) if self.is_high() => next,
            _ => self.this.behind(),
        };
        for r in rows {
            fetch_lines(blocks.wrapping_add(r * row_bytes), n_bytes.div_ceil(64));
        }
    }

    /// Whether it is one for many tokens, see [`panel_rows`].
    #[inline(always)]
    pub fn is_high(&self) -> bool {
        self.max_rows == PANEL_ROWS
    }

    /// The first row of the last of its tiles of `tile` rows.
    fn late(&self, tile: usize) -> usize {
        (self.this.n_rows - 1) / tile * tile
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
        self.sums.add((g * self.max_rows + r) * LANES)
    }
}

/// A row of a panel.
pub(super) struct Row {
    pub codes: *mut u8,
    pub scales: *mut f32,
    pub offsets: *mut f32,
}

impl Row {
    /// The `i`th row behind it.
    #[inline(always)]
    pub unsafe fn behind(&self, i: usize) -> Self {
        Self {
            codes: self.codes.add(i * STRIDE),
            scales: self.scales.add(i * SUBS),
            offsets: self.offsets.add(i * SUBS),
        }
    }
}

/// Columns of some rows of a matrix: what a panel is expanded from.
#[derive(Clone, Copy)]
struct Source {
    /// The first row's.
    blocks: *const u8,
    row_bytes: usize,
    n_rows: usize,
    n_cols: usize,
    /// Of these columns in a row.
    n_bytes: usize,
}

impl Source {
    /// Columns `k0..` of the job's rows `row0..`, as many as a panel has.
    #[inline(always)]
    unsafe fn of<F: Format>(job: &Job<'_>, max_rows: usize, (row0, k0): (usize, usize)) -> Self {
        let row_bytes = job.weights.row_bytes();
        let n_rows = max_rows.min(job.rows.end - row0);
        let n_cols = PANEL_COLS.min(job.weights.cols - k0);
        let rows = &job.weights.bytes[row0 * row_bytes..][..n_rows * row_bytes];
        let blocks = rows.as_ptr().add(k0 / F::BLOCK * F::BYTES);
        Self { blocks, row_bytes, n_rows, n_cols, n_bytes: n_cols / F::BLOCK * F::BYTES }
    }

    /// The same columns of the rows behind it, of which there may be fewer or none.
    fn behind(self) -> Self {
        Self { blocks: self.blocks.wrapping_add(self.n_rows * self.row_bytes), ..self }
    }

    /// Four rows from `r` on, which become those of `panel`.
    #[inline(always)]
    unsafe fn rows(&self, panel: &Panel, r: usize) -> Rows {
        let row = |i: usize| self.blocks.add((r + i).min(self.n_rows - 1) * self.row_bytes);
        Rows { blocks: each!([self.blocks; FOUR], i => row(i)), n_cols: self.n_cols, to: panel.row(r) }
    }
}

/// Rows that are expanded together. There may be fewer: then the last is there several times, as a panel has room for
/// whole sixteens.
pub(super) struct Rows {
    pub blocks: [*const u8; FOUR],
    pub n_cols: usize,
    pub to: Row,
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

    /// What a step of an expansion leaves for the next.
    type Prepared;
    /// Steps in which four rows are expanded. Each has some twenty instructions, so that a processor can do them beside
    /// the products of other rows; see [`Ahead`].
    const STEPS: usize;
    /// How many of them only prepare the others.
    const PREPARING: usize = 0;
    /// A step of expanding `rows`; codes get `minus` taken off.
    unsafe fn expand(step: usize, rows: &Rows, minus: u8, prepared: *mut Self::Prepared);
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
    const STEPS: usize = 2 * FOUR;

    #[inline(always)]
    unsafe fn expand(step: usize, rows: &Rows, minus: u8, _: *mut ()) {
        let minus = _mm256_set1_epi8(minus as i8);
        let (row, to) = (rows.blocks[step / 2], rows.to.behind(step / 2));
        for b in half_of(step % 2, rows.n_cols) {
            let block = row.add(b * F::BYTES);
            _mm256_storeu_si256(to.codes.add(32 * b).cast(), _mm256_sub_epi8(F::codes(block), minus));
            *to.scales.add(b) = f16(block);
            if F::HAS_M {
                *to.offsets.add(b) = f16(block.add(2));
            }
        }
    }
}

/// The blocks of 32 in a half of `n_cols` columns.
#[inline(always)]
pub(super) fn half_of(half: usize, n_cols: usize) -> Range<usize> {
    const BLOCKS: usize = PANEL_COLS / 2 / 32;
    half * BLOCKS..((half + 1) * BLOCKS).min(n_cols / 32)
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
    const STEPS: usize = 2 * FOUR;

    #[inline(always)]
    unsafe fn expand(step: usize, rows: &Rows, minus: u8, _: *mut ()) {
        const { assert!(PANEL_COLS == 256) } // a block
        let minus = _mm256_set1_epi8(minus as i8);
        let (block, to) = (rows.blocks[step / 2], rows.to.behind(step / 2));
        // One after the other by hand: as a loop it would not be unrolled, and shift by variables.
        if step.is_multiple_of(2) {
            put_codes::<F, 0>(to.codes, block, minus);
            put_codes::<F, 1>(to.codes, block, minus);
            put_codes::<F, 2>(to.codes, block, minus);
            put_codes::<F, 3>(to.codes, block, minus);
            put_scaled::<F>(to.scales, F::scales(block), f16(block.add(F::D)));
        } else {
            put_codes::<F, 4>(to.codes, block, minus);
            put_codes::<F, 5>(to.codes, block, minus);
            put_codes::<F, 6>(to.codes, block, minus);
            put_codes::<F, 7>(to.codes, block, minus);
            if F::HAS_MINS {
                put_scaled::<F>(to.offsets, F::mins(block), -f16(block.add(F::DMIN)));
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
pub(super) trait Sweep<F: Format> {
    type Lanes: Lanes;
    /// Whether [`Self::sweep`] calls [`Panel::fetch_next`] for all rows. Else it is done while a panel is expanded.
    const FETCHES_NEXT: bool = true;
    /// Rows that are expanded together, four at most, and in how many steps.
    const ROWS: usize = FOUR;
    const STEPS: usize = F::STEPS;
    /// A step of expanding them; what of a code's bias is not taken off then is left to the products.
    unsafe fn expand(step: usize, rows: &Rows, prepared: *mut F::Prepared);
    /// Rows of a tile, if the sweep over this many groups of tokens expands the next panel [`Ahead`].
    fn ahead(_n_groups: usize) -> Option<usize> {
        None
    }
    /// Adds the products of the panel's first `n_rows` rows, which are columns `k0..k0 + n`, with all tokens to the
    /// sums. Rows up to the next multiple of 16 exist, but mean nothing.
    unsafe fn sweep(panel: &Panel, job: &Job<'_>, n_rows: usize, k0: usize, n: usize);
    /// The sums of the 16 rows from `r` on with the tokens of group `g`, as [token][row].
    #[inline(always)]
    unsafe fn by_token(panel: &Panel, g: usize, r: usize, to: &mut [f32; LANES * LANES]) {
        Self::Lanes::transpose(panel.sums(g, r), LANES, to.as_mut_ptr());
    }
}

/// Rows of `F` times many tokens.
#[inline(always)]
pub(super) unsafe fn product<F: Format, S: Sweep<F>>(job: &Job<'_>, scratch: &mut Scratch) {
    let (n_tokens, n_groups, cols) = (job.acts.n_tokens(), job.acts.n_groups(), job.weights.cols);
    let max_rows = panel_rows(n_tokens);
    let of_rows = |row0| (0..cols).step_by(PANEL_COLS).map(move |k0| (row0, k0));
    let mut places = job.rows.clone().step_by(max_rows).flat_map(of_rows).peekable();
    while let Some((row0, k0)) = places.next() {
        if k0 == 0 {
            scratch.sums[..n_groups * max_rows * LANES].fill(0.0);
        }
        let next = places.peek().map(|&place| Source::of::<F>(job, max_rows, place));
        let panel = Panel::new(scratch, max_rows, Source::of::<F>(job, max_rows, (row0, k0)), next);
        let Source { n_rows, n_cols, .. } = panel.this;
        let is_first = k0 == 0 && row0 == job.rows.start;
        match S::ahead(n_groups) {
            Some(tile) if n_rows > tile && is_first => fill::<F, S>(&panel, 0..panel.late(tile)),
            Some(tile) if n_rows > tile => (),
            _ => fill::<F, S>(&panel, 0..n_rows),
        }
        S::sweep(&panel, job, n_rows, k0, n_cols);
        if k0 + n_cols < cols {
            continue;
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

/// Expands some rows of the panel.
#[inline(always)]
unsafe fn fill<F: Format, S: Sweep<F>>(panel: &Panel, rows: Range<usize>) {
    const { assert!(S::STEPS <= 16) }
    const AT_ONCE: usize = 32;
    let mut prepared = [const { MaybeUninit::<F::Prepared>::uninit() }; AT_ONCE];
    for first in rows.clone().step_by(AT_ONCE) {
        let some = first..rows.end.min(first + AT_ONCE);
        // All of these are prepared first, so that none waits for the one before it.
        for r in some.clone().step_by(S::ROWS) {
            let rows = panel.this.rows(panel, r);
            sixteen_times!(STEP => {
                if STEP < F::PREPARING {
                    S::expand(STEP, &rows, prepared[(r - first) / S::ROWS].as_mut_ptr());
                }
            });
        }
        for r in some.step_by(S::ROWS) {
            if !S::FETCHES_NEXT {
                panel.fetch_next(r..r + S::ROWS);
            }
            let rows = panel.this.rows(panel, r);
            sixteen_times!(STEP => {
                if (F::PREPARING..S::STEPS).contains(&STEP) {
                    S::expand(STEP, &rows, prepared[(r - first) / S::ROWS].as_mut_ptr());
                }
            });
        }
    }
}

/// Fetches `n` lines from `p` on.
#[inline(always)]
fn fetch_lines(p: *const u8, n: usize) {
    (0..n).for_each(|line| fetch(p.wrapping_add(64 * line)));
}

/// The activations that come after those of some tiles, where they come from beyond the second-level cache.
pub(super) struct NextActs<const G: usize> {
    /// Of the first of the groups, the columns of a panel.
    codes: *const u8,
    /// From a group to the next.
    group_bytes: usize,
}

impl<const G: usize> NextActs<G> {
    /// The `G` groups behind as many from `g` on, of columns `k0..k0 + n`; or the first groups, of the columns behind. None for
    /// a low panel, whose few tokens are near.
    #[inline(always)]
    pub fn after(panel: &Panel, job: &Job<'_>, g: usize, k0: usize, n: usize) -> Option<Self> {
        if !panel.is_high() {
            return None;
        }
        let is_last = g + G >= job.acts.n_groups();
        let (g, k0) = if is_last { (0, (k0 + n) % job.weights.cols) } else { (g + G, k0) };
        let codes = job.acts.group(g).codes;
        Some(Self { codes: codes[k0 * LANES..].as_ptr().cast(), group_bytes: codes.len() })
    }

    /// Fetches part `i` of `n` parts.
    #[inline(always)]
    pub fn fetch(&self, i: usize, n: usize) {
        const LINES: usize = PANEL_COLS * LANES / 64;
        let (first, end) = (LINES * i / n, LINES * (i + 1) / n);
        for j in 0..G {
            fetch_lines(self.codes.wrapping_add(j * self.group_bytes + 64 * first), end - first);
        }
    }
}

/// Columns of a tile between which something is done [`Ahead`].
pub(super) const AHEAD_COLS: usize = 16;

/// Expansion of the `R` rows before those of a tile, a little at a time between the tile's products: they have been
/// multiplied, and make way for the next panel's. The first tile makes way for none, and sees to the last rows of its own
/// panel, if that has others.
///
/// Unpacking needs other units of a processor than products do, and so takes no time of its own, as long as what waits
/// for its operands does not fill the queues.
pub(super) struct Ahead<'a, F: Format, S, const R: usize> {
    panel: &'a Panel,
    source: Option<Source>,
    first: usize,
    prepared: MaybeUninit<F::Prepared>,
    sweep: PhantomData<S>,
}

impl<'a, F: Format, S: Sweep<F>, const R: usize> Ahead<'a, F, S, R> {
    const PARTS: usize = PANEL_COLS / AHEAD_COLS;
    const STEPS: usize = R / S::ROWS * S::STEPS;

    /// Beside the tile that begins at row `r`.
    #[inline(always)]
    pub unsafe fn of_tile(panel: &'a Panel, r: usize) -> Self {
        let (source, first) = match r {
            0 => (Some(panel.this).filter(|this| this.n_rows > R), panel.late(R)),
            _ => (panel.next.filter(|next| next.n_rows > r - R), r - R),
        };
        Self { panel, source, first, prepared: MaybeUninit::uninit(), sweep: PhantomData }
    }

    /// What is due before column `k` of the tile.
    #[inline(always)]
    pub unsafe fn at(&mut self, k: usize) {
        let part = k / AHEAD_COLS;
        if let Some(source) = &self.source {
            for step in Self::STEPS * part / Self::PARTS..Self::STEPS * (part + 1) / Self::PARTS {
                let rows = source.rows(self.panel, self.first + step / S::STEPS * S::ROWS);
                S::expand(step % S::STEPS, &rows, self.prepared.as_mut_ptr());
            }
        }
    }

    /// What is due after the last of a tile's `n` columns.
    #[inline(always)]
    pub unsafe fn rest(&mut self, n: usize) {
        for k in (n..PANEL_COLS).step_by(AHEAD_COLS) {
            self.at(k);
        }
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
