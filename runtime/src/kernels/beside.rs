//! Products of matrices whose scales lie beside their codes, as bitsandbytes has them.
//!
//! With int8 activations the weights are multiplied as Q8_0. Two roundings come in: values to 1/127 of a block's scale,
//! which adds under 1 % to the variance of NF4's own error, and scales to f16; [`multiplies_as_q8_0`] tells where that
//! holds. Some rows at a time become Q8_0 blocks in scratch, and the product is Q8_0's. Of the 4-bit types, weights and
//! activations are in the order of [`super::ActKind::Q8x32EvenOdd`]. Where an instruction set has [`Kernels::beside_rows`],
//! few tokens are multiplied straight from the codes, to the same bits.
//!
//! With f32 activations the weights are exactly what the library dequantizes. For few tokens a row is read once: the 16
//! values of a 4-bit type, times the scale of a block and rounded, fit a register (or two), in which every code is
//! looked up; of a byte one half and then the other, so the activations are brought into that order first.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contracts of `Lanes` and `Matmul` alone

use super::lanes::Lanes;
use super::matmul::{F32_PANEL_TOKENS, INT_PANEL_TOKENS, Job, MatrixRef, PANEL_ROWS, Scratch, panel_rows};
use super::memory::{Aligned, LANES, read_ahead};
use super::table::Kernels;
use kestrel_formats::{GgmlType, WeightType};
use kestrel_quant::codec::{bnb8, f16_bits, q8_0};

/// Weights of one step: 16 bytes of 4-bit codes.
const STEP: usize = 2 * LANES;

/// Whether a matrix with these scales, the largest of them `largest`, may be multiplied as Q8_0: blocks do not split a
/// block of 32, and the largest scale is at least a quarter of a normal f16, so that rounding it costs 2^-9 at most and
/// a smaller one no more of it.
pub(crate) fn multiplies_as_q8_0(cols: usize, blocksize: usize, largest: f32) -> bool {
    let d = largest * bnb8::INVERSE_127;
    cols.is_multiple_of(q8_0::LEN)
        && blocksize.is_multiple_of(q8_0::LEN)
        && (half::f16::MIN_POSITIVE.to_f32() / 4.0..=half::f16::MAX.to_f32()).contains(&d)
}

/// Bytes of scratch that a product with `cols` columns needs.
pub(crate) fn scratch_bytes(cols: usize) -> usize {
    PANEL_ROWS * cols / q8_0::LEN * q8_0::BYTES
}

/// A product with int8 activations of the kind that Q8_0 takes.
///
/// # Safety
/// That of [`super::matmul::Matmul`].
pub(crate) unsafe fn int_matmul(kernels: &Kernels, job: &Job<'_>, scratch: &mut Scratch) {
    if let Some(rows) = kernels.beside_rows
        && job.acts.n_tokens() < INT_PANEL_TOKENS
        && rows(job, scratch)
    {
        return;
    }
    let cols = job.weights.cols;
    let row_bytes = cols / q8_0::LEN * q8_0::BYTES;
    let mut blocks = std::mem::replace(&mut scratch.blocks, Aligned::zeroed(0)); // given back below
    let rows_at_once = panel_rows(job.acts.n_tokens());
    for row0 in job.rows.clone().step_by(rows_at_once) {
        let n_rows = rows_at_once.min(job.rows.end - row0);
        for (r, row) in blocks[..n_rows * row_bytes].chunks_exact_mut(row_bytes).enumerate() {
            (kernels.to_q8_0)(&job.weights, row0 + r, row);
        }
        let weights = MatrixRef::new(GgmlType::Q8_0, n_rows, cols, &blocks[..n_rows * row_bytes]);
        let weights = weights.expect("whole blocks of 32, see `multiplies_as_q8_0`");
        let panel = Job { weights, rows: 0..n_rows, acts: job.acts, out: job.out.starting_at(row0) };
        (kernels.int_matmul)(&panel, scratch);
    }
    scratch.blocks = blocks;
}

/// What codes stand for (-1..=1) as codes of Q8_0, with a scale of 1/127 of theirs.
pub(crate) const fn codes_of_q8_0(values: &[f32; 16]) -> [i8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        let half = if values[i] < 0.0 { -0.5 } else { 0.5 };
        out[i] = (values[i] * 127.0 + half) as i8; // none is halfway between two
        i += 1;
    }
    out
}

/// Row `row` as Q8_0 blocks, in the order of [`super::ActKind::for_weights_of_bnb`].
#[inline(always)]
pub(crate) unsafe fn to_q8_0<L: Lanes>(weights: &MatrixRef<'_>, row: usize, out: &mut [u8]) {
    let (scales, first) = weights.beside(row);
    let codes = weights.row(row);
    let table = weights.dtype.code_values().map(codes_of_q8_0);
    let mut last = (usize::MAX, 0);
    for (b, out) in out.as_chunks_mut::<{ q8_0::BYTES }>().0.iter_mut().enumerate() {
        let block = (first + b * q8_0::LEN) / scales.blocksize;
        if block != last.0 {
            last = (block, f16_bits(scales.absmax.get(block) * bnb8::INVERSE_127));
        }
        out[q8_0::D..q8_0::QS].copy_from_slice(&last.1.to_le_bytes());
        let to = out[q8_0::QS..].as_mut_ptr();
        match &table {
            None => to.copy_from_nonoverlapping(codes[b * q8_0::LEN..][..q8_0::LEN].as_ptr(), q8_0::LEN),
            Some(table) => {
                L::look_up_i8(table, codes[b * q8_0::LEN / 2..][..q8_0::LEN / 2].as_ptr(), to.cast())
            }
        }
    }
}

/// Up to 16 rows times few tokens with f32 activations; false if the matrix has another shape than this can take.
#[inline(always)]
pub(crate) unsafe fn f32_rows<L: Lanes>(
    job: &Job<'_>,
    row0: usize,
    out: &mut [[f32; LANES]; F32_PANEL_TOKENS],
    n_rows: usize,
    scratch: &mut Scratch,
) -> bool {
    let (n_tokens, cols) = (job.acts.n_tokens(), job.weights.cols);
    let Some(scales) = job.weights.scales else { return false };
    let fits = cols.is_multiple_of(STEP) && scales.blocksize.is_multiple_of(STEP);
    if job.weights.dtype == WeightType::Int8 || !fits {
        return false;
    }
    let x = scratch.acts(n_tokens * cols * size_of::<f32>()).cast::<f32>();
    if row0 == job.rows.start {
        for t in 0..n_tokens {
            deinterleave(job.acts.floats(t), std::slice::from_raw_parts_mut(x.add(t * cols), cols));
        }
    }
    match scales.round_to {
        GgmlType::F16 => rows::<L, ToF16>(job, row0, out, n_rows, x),
        GgmlType::Bf16 => rows::<L, ToBf16>(job, row0, out, n_rows, x),
        _ => rows::<L, Exact>(job, row0, out, n_rows, x),
    }
    true
}

/// Of each 32 numbers those at even places, then those at odd ones.
fn deinterleave(x: &[f32], to: &mut [f32]) {
    for (x, to) in x.as_chunks::<STEP>().0.iter().zip(to.as_chunks_mut::<STEP>().0) {
        let (even, odd) = to.split_at_mut(LANES);
        for (pair, (even, odd)) in x.as_chunks::<2>().0.iter().zip(even.iter_mut().zip(odd)) {
            (*even, *odd) = (pair[0], pair[1]);
        }
    }
}

/// What the library's dequantization rounds weights to.
trait Rounding {
    unsafe fn round<L: Lanes>(x: L) -> L;
}

struct Exact;
struct ToF16;
struct ToBf16;

impl Rounding for Exact {
    #[inline(always)]
    unsafe fn round<L: Lanes>(x: L) -> L {
        x
    }
}

impl Rounding for ToF16 {
    #[inline(always)]
    unsafe fn round<L: Lanes>(x: L) -> L {
        x.to_f16()
    }
}

impl Rounding for ToBf16 {
    #[inline(always)]
    unsafe fn round<L: Lanes>(x: L) -> L {
        x.to_bf16()
    }
}

/// Rows times the deinterleaved activations `x`, [token][column].
#[inline(always)]
unsafe fn rows<L: Lanes, R: Rounding>(
    job: &Job<'_>,
    row0: usize,
    out: &mut [[f32; LANES]; F32_PANEL_TOKENS],
    n_rows: usize,
    x: *const f32,
) {
    for r in 0..n_rows {
        match job.acts.n_tokens() {
            1 => row::<L, R, 1>(job, row0 + r, x, out, r),
            2 => row::<L, R, 2>(job, row0 + r, x, out, r),
            _ => row::<L, R, 3>(job, row0 + r, x, out, r),
        }
    }
}

/// Row `row` times `T` tokens, to `out[token][r]`.
#[inline(always)]
unsafe fn row<L: Lanes, R: Rounding, const T: usize>(
    job: &Job<'_>,
    row: usize,
    x: *const f32,
    out: &mut [[f32; LANES]; F32_PANEL_TOKENS],
    r: usize,
) {
    let (scales, first) = job.weights.beside(row);
    let (cols, blocksize) = (job.weights.cols, scales.blocksize);
    let codes = job.weights.row(row).as_ptr();
    let values = job.weights.dtype.code_values().expect("a 4-bit type");
    let values = L::load(values.as_ptr());
    let mut sums = [[L::splat(0.0); 4]; T];
    let (mut k, mut block) = (0, first / blocksize);
    while k < cols {
        let end = ((block + 1) * blocksize - first).min(cols);
        let table = R::round(values.mul(L::splat(scales.absmax.get(block))));
        // Both are multiples of 32 within the row.
        while k + 2 * STEP <= end {
            if (k / 2).is_multiple_of(64) {
                read_ahead(codes.add(k / 2));
            }
            add_step::<L, T>(table, codes, x, cols, k, &mut sums, 0);
            add_step::<L, T>(table, codes, x, cols, k + STEP, &mut sums, 2);
            k += 2 * STEP;
        }
        if k < end {
            add_step::<L, T>(table, codes, x, cols, k, &mut sums, 0);
            k += STEP;
        }
        block += 1;
    }
    for t in 0..T {
        let [a, b, c, d] = sums[t];
        out[t][r] = a.add(b).add(c.add(d)).sum();
    }
}

/// Weights `k..k + 32` of a row into sums `at` and `at + 1`.
#[inline(always)]
unsafe fn add_step<L: Lanes, const T: usize>(
    table: L,
    codes: *const u8,
    x: *const f32,
    cols: usize,
    k: usize,
    sums: &mut [[L; 4]; T],
    at: usize,
) {
    let (even, odd) = table.look_up(codes.add(k / 2));
    for t in 0..T {
        let x = x.add(t * cols + k);
        sums[t][at] = even.mul_add(L::load(x), sums[t][at]);
        sums[t][at + 1] = odd.mul_add(L::load(x.add(LANES)), sums[t][at + 1]);
    }
}

/// Sixteen weights of an int8 row from their codes, exactly as they are dequantized.
#[inline(always)]
pub(crate) unsafe fn int8_weights<L: Lanes>(codes: *const u8, scale: f32) -> L {
    L::load_i8(codes).mul(L::splat(scale)).mul(L::splat(bnb8::INVERSE_127))
}
