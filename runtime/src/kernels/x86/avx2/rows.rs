//! Few tokens: rows are read once, straight from their blocks, two side by side.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::lanes::sum_floats;
use crate::kernels::matmul::Job;
use crate::kernels::memory::LANES;
use crate::kernels::x86::unpack::{Large, Small, f16};
use std::arch::x86_64::*;

/// How far ahead of the reading a row is prefetched.
const AHEAD_BYTES: usize = 1024;

/// Calls `product(row, token)` for pairs of rows, then for a last one, and stores the results.
macro_rules! for_rows {
    ($job:ident, $product:ident, $type:ident) => {
        for row0 in $job.rows.clone().step_by(LANES) {
            let n_rows = LANES.min($job.rows.end - row0);
            for t in 0..$job.acts.n_tokens() {
                let mut out = [0.0; LANES];
                for r in (0..n_rows / 2 * 2).step_by(2) {
                    out[r..r + 2].copy_from_slice(&$product::<$type, 2>($job, row0 + r, t));
                }
                if n_rows % 2 == 1 {
                    out[n_rows - 1] = $product::<$type, 1>($job, row0 + n_rows - 1, t)[0];
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

/// Products of 32 codes with 32 activations, summed in pairs to i16. No pair overflows: codes up to 63 are multiplied
/// as they are (2·63·127), and those with a bias of 128 by magnitude (2·128·127 = 32512).
#[inline(always)]
unsafe fn pairs<const BIAS: u8>(codes: __m256i, x: __m256i) -> __m256i {
    if BIAS == 128 {
        let w = _mm256_xor_si256(codes, _mm256_set1_epi8(i8::MIN));
        return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    }
    let products = _mm256_maddubs_epi16(codes, x);
    match BIAS {
        0 => products,
        _ => _mm256_sub_epi16(products, _mm256_maddubs_epi16(_mm256_set1_epi8(BIAS as i8), x)),
    }
}

/// [`pairs`] with the bias of a type.
macro_rules! pairs_of {
    ($type:ident, $codes:expr, $x:expr) => {
        match $type::BIAS {
            0 => pairs::<0>($codes, $x),
            4 => pairs::<4>($codes, $x),
            8 => pairs::<8>($codes, $x),
            16 => pairs::<16>($codes, $x),
            32 => pairs::<32>($codes, $x),
            _ => pairs::<128>($codes, $x),
        }
    };
}

#[inline(always)]
unsafe fn small_product<F: Small, const R: usize>(job: &Job<'_>, row: usize, t: usize) -> [f32; R] {
    let rows: [*const u8; R] = std::array::from_fn(|r| job.weights.row(row + r).as_ptr());
    let (codes, scales, terms) = (job.acts.codes(t), job.acts.scales(t), job.acts.sums32(t));
    // Even and odd blocks apart, as the lower and the upper half of sixteen lanes.
    let mut sums = [[_mm256_setzero_ps(); R]; 2];
    let mut offsets = [[_mm_setzero_ps(); R]; 2];
    let n_blocks = job.weights.cols / 32;
    for b0 in (0..n_blocks).step_by(2) {
        for half in 0..2.min(n_blocks - b0) {
            let b = b0 + half;
            let x = _mm256_loadu_si256(codes.as_ptr().add(32 * b).cast());
            let term = scales[b] * terms[b] as f32;
            for r in 0..R {
                let p = rows[r].add(b * F::BYTES);
                _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD_BYTES).cast());
                let dot = _mm256_madd_epi16(pairs_of!(F, F::codes(p), x), _mm256_set1_epi16(1));
                let d = _mm256_set1_ps(f16(p) * scales[b]);
                sums[half][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), d, sums[half][r]);
                if F::HAS_M {
                    let (m, term) = (_mm_set_ss(f16(p.add(2))), _mm_set_ss(term));
                    offsets[half][r] = _mm_fmadd_ss(m, term, offsets[half][r]);
                }
            }
        }
    }
    std::array::from_fn(|r| {
        let sum = sum_floats(_mm256_add_ps(sums[0][r], sums[1][r]));
        match F::HAS_M {
            true => sum + (_mm_cvtss_f32(offsets[0][r]) + _mm_cvtss_f32(offsets[1][r])),
            false => sum,
        }
    })
}

#[inline(always)]
unsafe fn large_product<F: Large, const R: usize>(job: &Job<'_>, row: usize, t: usize) -> [f32; R] {
    let rows: [*const u8; R] = std::array::from_fn(|r| job.weights.row(row + r).as_ptr());
    let codes = job.acts.codes(t);
    let mut sums = [[_mm256_setzero_ps(); 2]; R]; // sixteen lanes
    for b in 0..job.weights.cols / 256 {
        let x = codes.as_ptr().add(256 * b);
        let scale = job.acts.scales(t)[b];
        for r in 0..R {
            let p = rows[r].add(b * F::BYTES);
            for line in 0..F::BYTES.div_ceil(64) {
                _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD_BYTES + 64 * line).cast());
            }
            let d = _mm256_set1_ps(f16(p.add(F::D)) * scale);
            let dots = large_block::<F>(p, x);
            for half in 0..2 {
                sums[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[half]), d, sums[r][half]);
            }
            if F::HAS_MINS {
                let dmin = _mm256_set1_ps(f16(p.add(F::DMIN)) * scale);
                for half in 0..256 / F::SUB / 8 {
                    let mins = _mm256_cvtepi32_ps(large_mins::<F>(p, job, t, b, half));
                    sums[r][half] = _mm256_fnmadd_ps(mins, dmin, sums[r][half]);
                }
            }
        }
    }
    sums.map(|[low, high]| sum_floats(_mm256_add_ps(low, high)))
}

/// Sum over the sub-blocks of scale · (codes · x), spread over 16 lanes: lane i has codes 4·i..4·i + 4 of each 64.
#[inline(always)]
unsafe fn large_block<F: Large>(p: *const u8, x: *const i8) -> [__m256i; 2] {
    let mut scales = [0i16; 16];
    _mm256_storeu_si256(scales.as_mut_ptr().cast(), _mm256_cvtepi8_epi16(F::scales(p)));
    let mut sums = [_mm256_setzero_si256(); 2];
    for j in 0..8 {
        let x = _mm256_loadu_si256(x.add(32 * j).cast());
        let products = pairs_of!(F, F::codes(p, j), x);
        let scale = match F::SUB {
            16 => _mm256_setr_m128i(_mm_set1_epi16(scales[2 * j]), _mm_set1_epi16(scales[2 * j + 1])),
            _ => _mm256_set1_epi16(scales[j]),
        };
        sums[j % 2] = _mm256_add_epi32(sums[j % 2], _mm256_madd_epi16(products, scale));
    }
    sums
}

/// Minimums of sub-blocks `8 half..8 half + 8` times the sums of their activations.
#[inline(always)]
unsafe fn large_mins<F: Large>(p: *const u8, job: &Job<'_>, t: usize, b: usize, half: usize) -> __m256i {
    let sums = if F::SUB == 16 { job.acts.sums16(t) } else { job.acts.sums32(t) };
    let sums = _mm256_loadu_si256(sums.as_ptr().add(256 / F::SUB * b + 8 * half).cast());
    let mins = if half == 1 { _mm_srli_si128::<8>(F::mins(p)) } else { F::mins(p) };
    _mm256_mullo_epi32(_mm256_cvtepi8_epi32(mins), sums)
}
