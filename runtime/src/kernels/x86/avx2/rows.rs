//! Few tokens: rows are read once, straight from their blocks, some side by side. The order of the sums is that of
//! `avx512::rows`, with the halves of its vectors one after the other.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::narrow::{Narrow, Two, pairs};
use crate::kernels::matmul::Job;
use crate::kernels::memory::LANES;
use crate::kernels::x86::few::{fetch, for_groups};
use crate::kernels::x86::unpack::{Large, f16};
use std::arch::x86_64::*;

/// Rows whose scales are prepared together.
const TWO: usize = 2;
/// Pairs of rows that are read side by side.
const PAIRS: usize = 2;
/// Rows that are read side by side.
const ROWS: usize = PAIRS * TWO;

#[inline(always)]
pub(super) unsafe fn small<F: Two>(job: &Job<'_>) {
    for_groups!(job, ROWS, small_product, F);
}

#[inline(always)]
pub(super) unsafe fn large<F: Narrow>(job: &Job<'_>) {
    for_groups!(job, ROWS, large_product, F);
}

/// The sum of four lanes, in the order of `Lanes::sum`.
#[inline(always)]
unsafe fn sum_four(x: __m128) -> f32 {
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// The lower and the upper half.
#[inline(always)]
unsafe fn halves(x: __m256) -> [__m128; 2] {
    [_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)]
}

/// Both halves added.
#[inline(always)]
unsafe fn fold(x: __m256) -> __m128 {
    let [low, high] = halves(x);
    _mm_add_ps(low, high)
}

/// Sums of two rows of blocks of 32, a row in each half.
#[derive(Clone, Copy)]
struct SmallSums<const T: usize> {
    products: [__m256; T],
    offsets: [__m256; T],
}

/// Rows of blocks of 32 times `T` tokens. A row has four lanes of a sum.
#[inline(always)]
unsafe fn small_product<F: Two, const T: usize>(
    job: &Job<'_>,
    rows: &[*const u8; ROWS],
    next: *const u8,
    t: usize,
    out: &mut [[f32; ROWS]; 4],
) {
    let n_blocks = job.weights.cols / 32;
    let zero = [_mm256_setzero_ps(); T];
    let mut sums = [SmallSums { products: zero, offsets: zero }; PAIRS];
    let whole = n_blocks / 4 * 4;
    for b in (0..whole).step_by(4) {
        some_blocks::<F, T, 4>(job, rows, next, t, b, &mut sums);
    }
    match n_blocks - whole {
        1 => some_blocks::<F, T, 1>(job, rows, next, t, whole, &mut sums),
        2 => some_blocks::<F, T, 2>(job, rows, next, t, whole, &mut sums),
        3 => some_blocks::<F, T, 3>(job, rows, next, t, whole, &mut sums),
        _ => {}
    }
    for (g, sums) in sums.iter().enumerate() {
        for i in 0..T {
            for (r, sum) in halves(sums.products[i]).into_iter().enumerate() {
                out[i][TWO * g + r] = sum_four(sum);
            }
            if F::HAS_M {
                for (r, sum) in halves(sums.offsets[i]).into_iter().enumerate() {
                    out[i][TWO * g + r] += sum_four(sum);
                }
            }
        }
    }
}

/// The first `N` of four numbers in each half, zeros after them.
#[inline(always)]
unsafe fn in_halves<const N: usize>(p: *const f32) -> __m256 {
    let four: [f32; 4] = std::array::from_fn(|i| if i < N { *p.add(i) } else { 0.0 });
    let four = _mm_loadu_ps(four.as_ptr());
    _mm256_set_m128(four, four)
}

/// The f16 at `p`, `p + stride`.. of each row in its half, as f32; zeros after `N` of them.
#[inline(always)]
unsafe fn f16_halves<const N: usize>(p: &[*const u8; TWO], stride: usize) -> __m256 {
    let row = |p: *const u8| {
        let bits = |i: usize| i64::from(p.add(i * stride).cast::<u16>().read_unaligned()) << (16 * i);
        (0..N).fold(0, |all, i| all | bits(i))
    };
    _mm256_cvtph_ps(_mm_set_epi64x(row(p[1]), row(p[0])))
}

/// Number `j` of each half in all its lanes.
#[inline(always)]
unsafe fn spread(x: __m256, j: usize) -> __m256 {
    match j {
        0 => _mm256_permute_ps::<0x00>(x),
        1 => _mm256_permute_ps::<0x55>(x),
        2 => _mm256_permute_ps::<0xaa>(x),
        _ => _mm256_permute_ps::<0xff>(x),
    }
}

/// Blocks `b..b + N` of the rows.
#[inline(always)]
unsafe fn some_blocks<F: Two, const T: usize, const N: usize>(
    job: &Job<'_>,
    rows: &[*const u8; ROWS],
    next: *const u8,
    t: usize,
    b: usize,
    sums: &mut [SmallSums<T>; PAIRS],
) {
    let (rows, _) = rows.as_chunks::<TWO>();
    fetch(next.wrapping_add(b * ROWS * F::BYTES), N * ROWS * F::BYTES);
    let ones = _mm256_set1_epi16(1);
    let scales: [__m256; T] = std::array::from_fn(|i| in_halves::<N>(job.acts.scales(t + i).as_ptr().add(b)));
    let mut factors = [[_mm256_setzero_ps(); T]; PAIRS];
    for g in 0..PAIRS {
        let p = rows[g].map(|row| row.add(b * F::BYTES));
        let d = f16_halves::<N>(&p, F::BYTES);
        factors[g] = scales.map(|scale| _mm256_mul_ps(d, scale));
        if F::HAS_M {
            let m = f16_halves::<N>(&p.map(|p| p.add(2)), F::BYTES);
            for i in 0..T {
                let x_sums = job.acts.sums32(t + i)[b..b + N].as_ptr();
                let x_sums: [f32; N] = std::array::from_fn(|j| *x_sums.add(j) as f32);
                let terms = _mm256_mul_ps(scales[i], in_halves::<N>(x_sums.as_ptr()));
                sums[g].offsets[i] = _mm256_fmadd_ps(m, terms, sums[g].offsets[i]);
            }
        }
    }
    for j in 0..N {
        let mut x = [[_mm256_setzero_si256(); 2]; T];
        for i in 0..T {
            let codes = job.acts.codes(t + i).as_ptr().add(32 * (b + j));
            x[i] = [codes, codes.add(16)].map(|x| _mm256_broadcastsi128_si256(_mm_loadu_si128(x.cast())));
        }
        for g in 0..PAIRS {
            let codes = F::two(&rows[g].map(|row| row.add((b + j) * F::BYTES)));
            for i in 0..T {
                let [low, high] = [0, 1].map(|h| pairs::<F>(codes[h], x[i][h]));
                let dot = if F::BIAS < 128 {
                    _mm256_madd_epi16(_mm256_add_epi16(low, high), ones) // at most 4·31·127 in i16
                } else {
                    _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones))
                };
                let sum = &mut sums[g].products[i];
                *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), spread(factors[g][i], j), *sum);
            }
        }
    }
}

/// Sums of a row of blocks of 256.
#[derive(Clone, Copy)]
struct LargeSums {
    /// Sixteen lanes: a lane is a dword of the 64 bytes that the codes are read in.
    products: [__m256; 2],
    /// A lane is two sub-blocks.
    mins: __m256,
}

/// Rows of blocks of 256 times `T` tokens.
#[inline(always)]
unsafe fn large_product<F: Narrow, const T: usize>(
    job: &Job<'_>,
    rows: &[*const u8; ROWS],
    next: *const u8,
    t: usize,
    out: &mut [[f32; ROWS]; 4],
) {
    let zero = _mm256_setzero_ps();
    let mut sums = [[LargeSums { products: [zero; 2], mins: zero }; T]; ROWS];
    for b in 0..job.weights.cols / 256 {
        fetch(next.wrapping_add(b * ROWS * F::BYTES), ROWS * F::BYTES);
        let x_sums: [__m256i; T] = std::array::from_fn(|i| match F::HAS_MINS {
            true => x_sums::<F>(job, t + i, b),
            false => _mm256_setzero_si256(),
        });
        for r in 0..ROWS {
            let p = rows[r].add(b * F::BYTES);
            let dots = large_block::<F, T>(job, p, t, b);
            let d = f16(p.add(F::D));
            for i in 0..T {
                let factor = _mm256_set1_ps(d * job.acts.scales(t + i)[b]);
                for half in 0..2 {
                    let sum = &mut sums[r][i].products[half];
                    *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[i][half]), factor, *sum);
                }
            }
            if F::HAS_MINS {
                let dmin = f16(p.add(F::DMIN));
                let mins = _mm256_cvtepi8_epi16(F::mins(p));
                for i in 0..T {
                    let factor = _mm256_set1_ps(dmin * job.acts.scales(t + i)[b]);
                    let dots = _mm256_madd_epi16(mins, x_sums[i]);
                    let sum = &mut sums[r][i].mins;
                    *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), factor, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (i, LargeSums { products: [low, high], mins }) in sums.iter().enumerate() {
            out[i][r] = sum_four(fold(_mm256_add_ps(*low, *high)));
            if F::HAS_MINS {
                out[i][r] -= sum_four(fold(*mins));
            }
        }
    }
}

/// The sums over block `b` at `p` of scale · (codes · x), in 16 lanes.
///
/// No lane of a sum overflows: it has 16 products of at most 63·127 times a scale of at most 128, or of 127·127 times
/// one of at most 32.
#[inline(always)]
unsafe fn large_block<F: Narrow, const T: usize>(
    job: &Job<'_>,
    p: *const u8,
    t: usize,
    b: usize,
) -> [[__m256i; 2]; T] {
    let scales = _mm256_cvtepi8_epi16(F::scales(p));
    let scales = [_mm256_permute4x64_epi64::<0x44>(scales), _mm256_permute4x64_epi64::<0xee>(scales)];
    let mut dots = [[_mm256_setzero_si256(); 2]; T];
    for v in 0..4 {
        for half in 0..2 {
            let codes = F::codes32(p, v, half);
            let scale = F::spread_scales(&scales, v, half);
            for i in 0..T {
                let x = F::x32(job.acts.codes(t + i).as_ptr().add(256 * b), v, half);
                let products = _mm256_madd_epi16(F::pairs(codes, x), scale);
                dots[i][half] = _mm256_add_epi32(dots[i][half], products);
            }
        }
    }
    dots
}

/// Sums of the activations of each sub-block as i16 (at most 32·127); zeros after the eight of 32.
#[inline(always)]
unsafe fn x_sums<F: Large>(job: &Job<'_>, t: usize, b: usize) -> __m256i {
    if F::SUB == 32 {
        let sums = job.acts.sums32(t).as_ptr().add(8 * b);
        let [low, high] = [sums, sums.add(4)].map(|p| _mm_loadu_si128(p.cast()));
        _mm256_zextsi128_si256(_mm_packs_epi32(low, high))
    } else {
        let sums = job.acts.sums16(t).as_ptr().add(16 * b);
        let [low, high] = [sums, sums.add(8)].map(|p| _mm256_loadu_si256(p.cast()));
        _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high))
    }
}
