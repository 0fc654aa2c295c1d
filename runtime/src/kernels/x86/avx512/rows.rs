//! Few tokens: rows are read once, straight from their blocks, some rows side by side.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use crate::kernels::matmul::Job;
use crate::kernels::memory::LANES;
use crate::kernels::x86::unpack::{Large, Small, f16};
use std::arch::x86_64::*;

/// Rows that are read side by side.
const ROWS: usize = 4;
/// How far ahead of the reading a row is prefetched.
const AHEAD_BYTES: usize = 1024;

/// Calls `product(rows, token)` for groups of rows, first [`ROWS`] and then one at a time, and stores the results.
macro_rules! for_rows {
    ($job:ident, $product:ident, $type:ident) => {
        for row0 in $job.rows.clone().step_by(LANES) {
            let n_rows = LANES.min($job.rows.end - row0);
            for t in 0..$job.acts.n_tokens() {
                let mut out = [0.0; LANES];
                let mut r = 0;
                while r + ROWS <= n_rows {
                    out[r..r + ROWS].copy_from_slice(&$product::<$type, ROWS>($job, row0 + r, t));
                    r += ROWS;
                }
                while r < n_rows {
                    out[r] = $product::<$type, 1>($job, row0 + r, t)[0];
                    r += 1;
                }
                $job.out.put(row0, t, &out[..n_rows]);
            }
        }
    };
}

#[inline(always)]
pub(super) unsafe fn small<F: Small>(job: &Job<'_>) {
    for_rows!(job, small_product, F);
}

#[inline(always)]
pub(super) unsafe fn large<F: Large>(job: &Job<'_>) {
    for_rows!(job, large_product, F);
}

/// Two blocks side by side.
#[inline(always)]
unsafe fn join(low: __m256i, high: __m256i) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}

/// Two f16, `stride` bytes apart, as f32; the second is 0 unless `BOTH`.
#[inline(always)]
unsafe fn two_f16<const BOTH: bool>(p: *const u8, stride: usize) -> __m128 {
    let bits = |p: *const u8| u32::from(p.cast::<u16>().read_unaligned());
    let bits = if BOTH { bits(p) | bits(p.add(stride)) << 16 } else { bits(p) };
    _mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32))
}

/// Two dwords; the second is 0 unless `BOTH`.
#[inline(always)]
unsafe fn two<const BOTH: bool, T>(p: *const T) -> __m128i {
    if BOTH { _mm_loadl_epi64(p.cast()) } else { _mm_loadu_si32(p.cast()) }
}

/// Sums of `R` rows of blocks of 32.
struct SmallSums<const R: usize> {
    products: [__m512; R],
    offsets: [__m128; R],
}

#[inline(always)]
unsafe fn small_product<F: Small, const R: usize>(job: &Job<'_>, row: usize, t: usize) -> [f32; R] {
    let rows: [*const u8; R] = std::array::from_fn(|r| job.weights.row(row + r).as_ptr());
    let n_blocks = job.weights.cols / 32;
    let mut sums = SmallSums { products: [_mm512_setzero_ps(); R], offsets: [_mm_setzero_ps(); R] };
    for b in (0..n_blocks / 2 * 2).step_by(2) {
        two_blocks::<F, R, true>(job, &rows, t, b, &mut sums);
    }
    if n_blocks % 2 == 1 {
        two_blocks::<F, R, false>(job, &rows, t, n_blocks - 1, &mut sums);
    }
    let mut out = [0.0; R];
    for (r, out) in out.iter_mut().enumerate() {
        *out = _mm512_reduce_add_ps(sums.products[r]); // in the order of `Lanes::sum`
        if F::HAS_M {
            let m = sums.offsets[r];
            *out += _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
        }
    }
    out
}

/// Blocks `b` and, if `BOTH`, `b + 1` of `R` rows.
#[inline(always)]
unsafe fn two_blocks<F: Small, const R: usize, const BOTH: bool>(
    job: &Job<'_>,
    rows: &[*const u8; R],
    t: usize,
    b: usize,
    sums: &mut SmallSums<R>,
) {
    let halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    let spread = |x: __m128| _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(x));
    let codes = job.acts.codes(t).as_ptr().add(32 * b);
    let x = if BOTH {
        _mm512_loadu_si512(codes.cast())
    } else {
        _mm512_zextsi256_si512(_mm256_loadu_si256(codes.cast()))
    };
    let scale = _mm_castsi128_ps(two::<BOTH, f32>(job.acts.scales(t).as_ptr().add(b)));
    let scales = spread(scale);
    let zero = _mm512_setzero_si512();
    let bias = _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(F::BIAS as i8), x);
    let sum = _mm_cvtepi32_ps(two::<BOTH, i32>(job.acts.sums32(t).as_ptr().add(b)));
    let scaled_sum = _mm_mul_ps(scale, sum);
    for r in 0..R {
        let p = rows[r].add(b * F::BYTES);
        _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD_BYTES).cast());
        let high = if BOTH { F::codes(p.add(F::BYTES)) } else { _mm256_setzero_si256() };
        let mut dot = _mm512_dpbusd_epi32(zero, join(F::codes(p), high), x);
        if F::BIAS != 0 {
            dot = _mm512_sub_epi32(dot, bias);
        }
        let d = _mm512_mul_ps(spread(two_f16::<BOTH>(p, F::BYTES)), scales);
        sums.products[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), d, sums.products[r]);
        if F::HAS_M {
            sums.offsets[r] = _mm_fmadd_ps(two_f16::<BOTH>(p.add(2), F::BYTES), scaled_sum, sums.offsets[r]);
        }
    }
}

#[inline(always)]
unsafe fn large_product<F: Large, const R: usize>(job: &Job<'_>, row: usize, t: usize) -> [f32; R] {
    let rows: [*const u8; R] = std::array::from_fn(|r| job.weights.row(row + r).as_ptr());
    let codes = job.acts.codes(t);
    let mut sums = [_mm512_setzero_ps(); R];
    for b in 0..job.weights.cols / 256 {
        let mut x = [_mm512_setzero_si512(); 4];
        let mut bias = x;
        for k in 0..4 {
            x[k] = _mm512_loadu_si512(codes.as_ptr().add(256 * b + 64 * k).cast());
            bias[k] = _mm512_dpbusd_epi32(bias[k], _mm512_set1_epi8(F::BIAS as i8), x[k]);
        }
        let scale = job.acts.scales(t)[b];
        for r in 0..R {
            let p = rows[r].add(b * F::BYTES);
            for line in 0..F::BYTES.div_ceil(64) {
                _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD_BYTES + 64 * line).cast());
            }
            let dot = large_block::<F>(p, &x, &bias);
            let d = _mm512_set1_ps(f16(p.add(F::D)) * scale);
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), d, sums[r]);
            if F::HAS_MINS {
                let dmin = _mm512_set1_ps(f16(p.add(F::DMIN)) * scale);
                sums[r] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(large_mins::<F>(p, job, t, b)), dmin, sums[r]);
            }
        }
    }
    sums.map(|sum| _mm512_reduce_add_ps(sum)) // in the order of `Lanes::sum`
}

/// Sum over the sub-blocks of scale · (codes · x), spread over 16 lanes.
#[inline(always)]
unsafe fn large_block<F: Large>(p: *const u8, x: &[__m512i; 4], bias: &[__m512i; 4]) -> __m512i {
    let scales = _mm512_cvtepi8_epi32(F::scales(p));
    let mut sum = _mm512_setzero_si512();
    for k in 0..4 {
        let codes = join(F::codes(p, 2 * k), F::codes(p, 2 * k + 1));
        let mut dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x[k]);
        if F::BIAS != 0 {
            dot = _mm512_sub_epi32(dot, bias[k]);
        }
        // A lane has four products; its sub-block is 4 · lane / SUB of this quarter.
        let first = (64 * k / F::SUB) as i32;
        let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let which = match F::SUB {
            16 => _mm512_srli_epi32::<2>(lane),
            _ => _mm512_srli_epi32::<3>(lane),
        };
        let scale = _mm512_permutexvar_epi32(_mm512_add_epi32(which, _mm512_set1_epi32(first)), scales);
        sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(dot, scale));
    }
    sum
}

/// Minimums of the sub-blocks times the sums of their activations.
#[inline(always)]
unsafe fn large_mins<F: Large>(p: *const u8, job: &Job<'_>, t: usize, b: usize) -> __m512i {
    if F::SUB == 16 {
        let sums = _mm512_loadu_si512(job.acts.sums16(t).as_ptr().add(16 * b).cast());
        _mm512_mullo_epi32(_mm512_cvtepi8_epi32(F::mins(p)), sums)
    } else {
        let sums = _mm256_loadu_si256(job.acts.sums32(t).as_ptr().add(8 * b).cast());
        _mm512_zextsi256_si512(_mm256_mullo_epi32(_mm256_cvtepi8_epi32(F::mins(p)), sums))
    }
}
