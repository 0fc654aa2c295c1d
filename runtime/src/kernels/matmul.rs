//! Matrix products: the job that every instruction set's products take, and the product with f32 activations, which
//! is written once over [`Lanes`].

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contracts of `Lanes` and `Matmul` alone

use super::acts::Acts;
use super::beside;
use super::lanes::Lanes;
use super::memory::{Aligned, LANES, Out, fetch, read_ahead};
use kestrel_formats::{Error, ErrorKind, GgmlType, Result, WeightType};
use kestrel_quant::codec::dequantize;
use kestrel_quant::codec::scales::Scales;
use std::ops::Range;

/// A weight matrix of any type where it lies: row-major, rows · row_bytes bytes.
#[derive(Clone, Copy)]
pub struct MatrixRef<'a> {
    /// How the weights are stored.
    pub dtype: WeightType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// The weights, or their codes.
    pub bytes: &'a [u8],
    /// Scales beside the codes, for types that have them there.
    pub scales: Option<Scales<'a>>,
    /// What the scales call its first weight.
    first: usize,
}

impl<'a> MatrixRef<'a> {
    /// A matrix without scales beside it. Errors: `BadShape` if `bytes` is not exactly rows · cols weights of `dtype`.
    pub fn new(dtype: GgmlType, rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self> {
        Self::with_scales(dtype.into(), rows, cols, bytes, None)
    }

    /// As [`new`](Self::new), with the scales that the type asks for.
    pub fn with_scales(
        dtype: WeightType,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
        scales: Option<Scales<'a>>,
    ) -> Result<Self> {
        let row_bytes = dtype.bytes_for(cols as u64);
        let n_bytes = row_bytes.and_then(|b| b.checked_mul(rows as u64));
        if cols == 0 || n_bytes != Some(bytes.len() as u64) {
            return Err(Error::new(ErrorKind::BadShape)
                .what(format!("a {dtype} matrix of {rows} x {cols}"))
                .expected(n_bytes.map_or("whole blocks in a row".to_owned(), |n| format!("{n} bytes")))
                .found(format!("{} bytes", bytes.len())));
        }
        Ok(Self { dtype, rows, cols, bytes, scales, first: 0 })
    }

    /// The type, where it can only be one of ggml's.
    #[inline(always)]
    pub(crate) fn ggml(&self) -> GgmlType {
        match self.dtype {
            WeightType::Ggml(ty) => ty,
            other => unreachable!("{other} has a product of its own"),
        }
    }

    /// Bytes of a row.
    #[inline(always)]
    pub fn row_bytes(&self) -> usize {
        self.cols / self.dtype.block_len() * self.dtype.block_bytes()
    }

    /// The bytes of row `r`.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> &'a [u8] {
        &self.bytes[r * self.row_bytes()..][..self.row_bytes()]
    }

    /// Where row `r` begins, of a type whose blocks of `block_len` weights take `block_bytes`. A kernel knows these, and
    /// is spared the divisions by those of any type, which for short rows take as long as the row.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // NEON takes blocks apart with the codecs' accessors
    #[inline(always)]
    pub(crate) fn row_of(&self, r: usize, block_len: usize, block_bytes: usize) -> *const u8 {
        debug_assert_eq!(self.dtype.block_len() * block_bytes, self.dtype.block_bytes() * block_len);
        self.bytes[r * (self.cols / block_len * block_bytes)..].as_ptr()
    }

    /// The scales of row `r` and what they call its first weight, of a type that has them beside its codes.
    pub(crate) fn beside(&self, r: usize) -> (&Scales<'a>, usize) {
        (self.scales.as_ref().expect("a type with scales beside its codes"), self.first + r * self.cols)
    }

    /// Fetches what a product that begins with row `r` reads first: what it is going to read itself is fetched ahead only
    /// some way on.
    pub(crate) fn fetch(&self, r: usize) {
        const LINES: usize = 256;
        for line in self.bytes[r * self.row_bytes()..].chunks(64).take(LINES) {
            fetch(line.as_ptr());
        }
    }

    /// Rows `range` as a matrix.
    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        let bytes = &self.bytes[range.start * self.row_bytes()..range.end * self.row_bytes()];
        Self { rows: range.len(), bytes, first: self.first + range.start * self.cols, ..*self }
    }

    /// Columns `k0..` of row `r` as f32; `k0` and `to.len()` are whole blocks.
    pub(crate) fn expand(&self, r: usize, k0: usize, to: &mut [f32]) {
        self.expand_flat(r * self.cols + k0, to);
    }

    /// Weights `i..` of the matrix, counted along its rows, as f32; `i` and `to.len()` are whole blocks.
    pub(crate) fn expand_flat(&self, i: usize, to: &mut [f32]) {
        let bytes = |n: usize| n / self.dtype.block_len() * self.dtype.block_bytes();
        let codes = &self.bytes[bytes(i)..bytes(i + to.len())];
        dequantize(self.dtype, codes, self.first + i, self.scales.as_ref(), to);
    }
}

/// Some rows of `weights` times all of `acts`.
pub(crate) struct Job<'a> {
    pub weights: MatrixRef<'a>,
    /// Starts at a multiple of 16.
    pub rows: Range<usize>,
    pub acts: &'a Acts,
    pub out: Out<'a>,
}

/// A product, for the kind of activations that its name says.
///
/// # Safety
/// The instruction set is present; the acts have the weights' columns and the kind that the function takes; no other
/// worker accesses the job's rows of the output.
pub(crate) type Matmul = unsafe fn(&Job<'_>, &mut Scratch);

/// Columns of a panel that is expanded at a time: few, so that some of its rows, the activations that they meet and
/// the sums stay in the first-level cache together.
pub(crate) const PANEL_COLS: usize = 256;
/// Rows of an expanded panel at most.
pub(crate) const PANEL_ROWS: usize = 128;
/// Tokens with which a panel has fewer rows.
const FEW_TOKENS: usize = 3 * LANES;

/// Rows of an expanded panel. Activations of many tokens do not fit the second-level cache and pass through it once for every
/// panel, so that there must be few, high ones; with few tokens it is the panel that should be near. ARCHITECTURE.md has the
/// figures ("High panels").
pub(crate) fn panel_rows(n_tokens: usize) -> usize {
    if n_tokens <= FEW_TOKENS { 32 } else { PANEL_ROWS }
}

/// Sub-blocks whose integer products wait for their scales at a time, where there are tiles for them.
pub(crate) const TILE_SUBS: usize = 8;

/// What one worker needs beside its registers; its size depends on nothing but the number of tokens.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // NEON has no panels of integers yet
pub(crate) struct Scratch {
    /// Expanded weights: f32 [column][16] here, codes in an order of their own elsewhere.
    pub panel: Aligned<f32>,
    /// Rows before they are interleaved.
    pub rows: Aligned<f32>,
    /// Scales, then offsets, of an expanded panel.
    pub scales: Aligned<f32>,
    /// Sums over the panels so far, [token][row] here.
    pub sums: Aligned<f32>,
    /// Integer products of tiles of 16 rows by 16 tokens, or columns of a panel of as many tokens as i16.
    pub tiles: Aligned<i32>,
    /// Activations of few tokens in the order of a type's codes; see [`Self::acts`]. Whoever needs them there puts them
    /// there at the beginning of a job.
    acts: Aligned<u8>,
    /// Rows of a matrix of bitsandbytes as Q8_0; empty where there is none.
    pub blocks: Aligned<u8>,
}

impl Scratch {
    /// For products with at most `n_tokens`.
    pub fn new(n_tokens: usize) -> Self {
        Self {
            panel: Aligned::zeroed(PANEL_COLS * PANEL_ROWS),
            rows: Aligned::zeroed(PANEL_COLS * LANES),
            scales: Aligned::zeroed(PANEL_COLS / 16 * PANEL_ROWS * 2),
            sums: Aligned::zeroed(n_tokens.next_multiple_of(LANES) * PANEL_ROWS),
            tiles: Aligned::zeroed(2 * TILE_SUBS * LANES * LANES),
            acts: Aligned::zeroed(0),
            blocks: Aligned::zeroed(0),
        }
    }

    /// Room for `n_bytes`, which grows with the first products.
    pub fn acts(&mut self, n_bytes: usize) -> *mut u8 {
        if self.acts.len() < n_bytes {
            self.acts = Aligned::zeroed(n_bytes);
        }
        self.acts.as_mut_ptr()
    }
}

/// From this many tokens on, weights are expanded into a panel that all tokens share; with int8 activations.
pub(crate) const INT_PANEL_TOKENS: usize = 6;
/// The same with f32 activations.
pub(crate) const F32_PANEL_TOKENS: usize = 4;

/// Weights of any type times f32 activations.
#[inline(always)]
pub(crate) unsafe fn f32_matmul<L: Lanes>(job: &Job<'_>, scratch: &mut Scratch) {
    for row0 in job.rows.clone().step_by(LANES) {
        let n_rows = LANES.min(job.rows.end - row0);
        if job.acts.n_tokens() < F32_PANEL_TOKENS {
            f32_rows::<L>(job, row0, n_rows, scratch);
        } else {
            f32_panel::<L>(job, row0, n_rows, scratch);
        }
    }
}

/// Up to 16 rows times few tokens, row by row.
#[inline(always)]
unsafe fn f32_rows<L: Lanes>(job: &Job<'_>, row0: usize, n_rows: usize, scratch: &mut Scratch) {
    let mut out = [[0.0; LANES]; F32_PANEL_TOKENS];
    let done = beside::f32_rows::<L>(job, row0, &mut out, n_rows, scratch);
    for r in if done { 0..0 } else { 0..n_rows } {
        let bytes = job.weights.row(row0 + r).as_ptr();
        match job.weights.dtype {
            WeightType::Ggml(GgmlType::F32) => {
                let load = |k| L::load(bytes.add(4 * k).cast());
                let fetch = |k| fetch_lines(bytes.add(4 * k), 4);
                dots::<L>(job, row0 + r, 0..job.weights.cols, load, fetch, |t, sum| out[t][r] = sum);
            }
            WeightType::Ggml(GgmlType::F16) => {
                let load = |k| L::load_f16(bytes.add(2 * k));
                let fetch = |k| fetch_lines(bytes.add(2 * k), 2);
                dots::<L>(job, row0 + r, 0..job.weights.cols, load, fetch, |t, sum| out[t][r] = sum);
            }
            WeightType::Ggml(GgmlType::Bf16) => {
                let load = |k| L::load_bf16(bytes.add(2 * k));
                let fetch = |k| fetch_lines(bytes.add(2 * k), 2);
                dots::<L>(job, row0 + r, 0..job.weights.cols, load, fetch, |t, sum| out[t][r] = sum);
            }
            WeightType::Int8 => {
                let (scales, first) = job.weights.beside(row0 + r);
                let scale = scales.absmax.get(first / scales.blocksize);
                let load = |k| beside::int8_weights::<L>(bytes.add(k), scale);
                let fetch = |k| fetch_lines(bytes.add(k), 1);
                dots::<L>(job, row0 + r, 0..job.weights.cols, load, fetch, |t, sum| out[t][r] = sum);
            }
            _ => {
                for k0 in (0..job.weights.cols).step_by(PANEL_COLS) {
                    let n = PANEL_COLS.min(job.weights.cols - k0);
                    job.weights.expand(row0 + r, k0, &mut scratch.rows[..n]);
                    let rows = scratch.rows.as_ptr();
                    let load = |k| L::load(rows.add(k));
                    dots::<L>(job, row0 + r, k0..k0 + n, load, |_| {}, |t, sum| out[t][r] += sum);
                }
            }
        }
    }
    for t in 0..job.acts.n_tokens() {
        job.out.put(row0, t, &out[t][..n_rows]);
    }
}

/// Fetches ahead for the next 64 numbers at `p`, of `size` bytes each.
#[inline(always)]
fn fetch_lines(p: *const u8, size: usize) {
    for line in 0..size {
        read_ahead(p.wrapping_add(64 * line));
    }
}

/// The dot product of some columns of a row with every token; `load(k)` gives the row's numbers `k..k + 16` from the
/// first of these columns on, and is called only where all 16 exist; `fetch(k)` is told of every 64 of them.
#[inline(always)]
unsafe fn dots<L: Lanes>(
    job: &Job<'_>,
    row: usize,
    columns: Range<usize>,
    load: impl Fn(usize) -> L,
    fetch: impl Fn(usize),
    mut each: impl FnMut(usize, f32),
) {
    let (k0, whole) = (columns.start, columns.len() / LANES * LANES);
    for t in 0..job.acts.n_tokens() {
        let x = &job.acts.floats(t)[columns.clone()];
        let mut sums = [L::splat(0.0); 4];
        let mut k = 0;
        while k + 4 * LANES <= whole {
            fetch(k);
            for i in 0..4 {
                let k = k + i * LANES;
                sums[i] = load(k).mul_add(L::load(x.as_ptr().add(k)), sums[i]);
            }
            k += 4 * LANES;
        }
        while k < whole {
            sums[0] = load(k).mul_add(L::load(x.as_ptr().add(k)), sums[0]);
            k += LANES;
        }
        let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
        each(t, sum + tail_dot(job, row, k0 + whole, &x[whole..]));
    }
}

/// The last columns of a row, fewer than 16; only types without blocks have such.
fn tail_dot(job: &Job<'_>, row: usize, k: usize, x: &[f32]) -> f32 {
    let mut weights = [0.0; LANES];
    job.weights.expand(row, k, &mut weights[..x.len()]);
    weights.iter().zip(x).map(|(w, x)| w * x).sum()
}

/// Up to 16 rows times all tokens: the rows are expanded to [column][16], some columns at a time, and multiplied in
/// tiles of 16 rows by several tokens.
#[inline(always)]
unsafe fn f32_panel<L: Lanes>(job: &Job<'_>, row0: usize, n_rows: usize, scratch: &mut Scratch) {
    let (n_tokens, cols) = (job.acts.n_tokens(), job.weights.cols);
    scratch.sums[..n_tokens * LANES].fill(0.0);
    for k0 in (0..cols).step_by(PANEL_COLS) {
        let n = PANEL_COLS.min(cols - k0);
        for r in 0..LANES {
            let row = &mut scratch.rows[r * PANEL_COLS..][..n.next_multiple_of(LANES)];
            row[n / LANES * LANES..].fill(0.0);
            match r < n_rows {
                true => job.weights.expand(row0 + r, k0, &mut row[..n]),
                false => row.fill(0.0),
            }
        }
        for k in (0..n).step_by(LANES) {
            let to = scratch.panel[k * LANES..][..LANES * LANES].as_mut_ptr();
            L::transpose(scratch.rows[k..].as_ptr(), PANEL_COLS, to);
        }
        let mut t = 0;
        while n_tokens - t >= L::TILE_TOKENS {
            match L::TILE_TOKENS {
                12 => f32_tile::<L, 12>(job, scratch, k0, n, t),
                6 => f32_tile::<L, 6>(job, scratch, k0, n, t),
                _ => f32_tile::<L, 4>(job, scratch, k0, n, t),
            }
            t += L::TILE_TOKENS;
        }
        while t < n_tokens {
            match n_tokens - t {
                1 => f32_tile::<L, 1>(job, scratch, k0, n, t),
                2 | 3 => f32_tile::<L, 2>(job, scratch, k0, n, t),
                _ => f32_tile::<L, 4>(job, scratch, k0, n, t),
            }
            t += match n_tokens - t {
                1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
        }
    }
    for t in 0..n_tokens {
        job.out.put(row0, t, &scratch.sums[t * LANES..][..n_rows]);
    }
}

/// Adds 16 rows by `T` tokens over columns `k0..k0 + n` to the sums.
#[inline(always)]
unsafe fn f32_tile<L: Lanes, const T: usize>(
    job: &Job<'_>,
    scratch: &mut Scratch,
    k0: usize,
    n: usize,
    t0: usize,
) {
    let x: [*const f32; T] = std::array::from_fn(|i| job.acts.floats(t0 + i)[k0..k0 + n].as_ptr());
    let panel = scratch.panel[..n * LANES].as_ptr();
    let mut sums = [L::splat(0.0); T];
    for k in 0..n {
        let w = L::load(panel.add(k * LANES));
        for i in 0..T {
            sums[i] = w.mul_add(L::splat(*x[i].add(k)), sums[i]);
        }
    }
    for (i, sum) in sums.into_iter().enumerate() {
        let to = scratch.sums[(t0 + i) * LANES..][..LANES].as_mut_ptr();
        L::load(to).add(sum).store(to);
    }
}
