//! Few tokens: rows are read once, straight from their blocks, front to back. The order of the sums is that of
//! `avx512::rows`, with the halves of its vectors one after the other.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::narrow::{Narrow, Two, pairs};
use crate::kernels::matmul::Job;
use crate::kernels::memory::LANES;
use crate::kernels::x86::few::{FOUR, Few, TOKENS, fetch_ahead, four_blocks, walk};
use crate::kernels::x86::sums::{fold_eight, sum_four};
use crate::kernels::x86::unpack::{Large, f16};
use std::arch::x86_64::*;
use std::marker::PhantomData;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn small<F: Two>(job: &Job<'_>) {
    walk(&SmallRow::<F>(PhantomData), job);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn large<F: Narrow>(job: &Job<'_>) {
    walk(&LargeRow::<F>(PhantomData), job);
}

/// The sum of sixteen lanes, in the order of `Lanes::sum`.
#[inline(always)]
unsafe fn sum_sixteen(x: [__m256; 2]) -> f32 {
    sum_four(fold_eight(_mm256_add_ps(x[0], x[1])))
}

/// Rows of blocks of 32. A row has sixteen lanes of a sum: four blocks', four each.
struct SmallRow<F>(PhantomData<F>);

/// Sums of a row of blocks of 32.
#[derive(Clone, Copy)]
struct SmallSums {
    products: [__m256; 2],
    offsets: __m128,
}

impl<F: Two> Few for SmallRow<F> {
    const ROWS: usize = 1;

    #[inline(always)]
    unsafe fn product<const T: usize>(
        &self,
        job: &Job<'_>,
        row: usize,
        t: usize,
        out: &mut [[f32; LANES]; TOKENS],
        r: usize,
    ) {
        let (p, n_blocks) = (job.weights.row_of(row, 32, F::BYTES), job.weights.cols / 32);
        let x = each!([Token::new(job, t, 32); T], i => Token::new(job, t + i, 32));
        let mut sums = [SmallSums { products: [_mm256_setzero_ps(); 2], offsets: _mm_setzero_ps() }; T];
        let whole = n_blocks / FOUR * FOUR;
        for b in (0..whole).step_by(FOUR) {
            small_blocks::<F, T>(p.add(b * F::BYTES), &x, b, FOUR, &mut sums);
        }
        if whole < n_blocks {
            small_blocks::<F, T>(p.add(whole * F::BYTES), &x, whole, n_blocks - whole, &mut sums);
        }
        for i in 0..T {
            out[i][r] = sum_sixteen(sums[i].products);
            if F::HAS_M {
                out[i][r] += sum_four(sums[i].offsets);
            }
        }
    }
}

/// The `n` numbers at `p`, zeros after them.
#[inline(always)]
unsafe fn up_to_four(p: *const f32, n: usize) -> __m128 {
    if n == FOUR {
        return _mm_loadu_ps(p);
    }
    let mut four = [0.0; FOUR];
    for i in 0..n {
        four[i] = *p.add(i);
    }
    _mm_loadu_ps(four.as_ptr())
}

/// The f16 at `p + at` of each of four blocks.
#[inline(always)]
unsafe fn f16_four(p: &[*const u8; FOUR], at: usize) -> __m128 {
    let mut bits = 0;
    for i in 0..FOUR {
        bits |= i64::from(p[i].add(at).cast::<u16>().read_unaligned()) << (16 * i);
    }
    _mm_cvtph_ps(_mm_cvtsi64_si128(bits))
}

/// Numbers `2 h` and `2 h + 1` of four, each in all lanes of its half.
#[inline(always)]
unsafe fn spread(x: __m128, h: usize) -> __m256 {
    let both = _mm256_set_m128(x, x);
    let which = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    _mm256_permutevar_ps(both, _mm256_add_epi32(which, _mm256_set1_epi32(2 * h as i32)))
}

/// Blocks `b..b + n`, the first of them at `p`.
#[inline(always)]
unsafe fn small_blocks<F: Two, const T: usize>(
    p: *const u8,
    x: &[Token; T],
    b: usize,
    n: usize,
    sums: &mut [SmallSums; T],
) {
    fetch_ahead(p, FOUR * F::BYTES, 0, 1);
    let p = four_blocks(p, F::BYTES, n);
    let ones = _mm256_set1_epi16(1);
    let d = f16_four(&p, 0);
    let scales = each!([d; T], i => up_to_four(x[i].scales.add(b), n));
    let factors = each!([d; T], i => _mm_mul_ps(d, scales[i]));
    for h in 0..2 {
        if 2 * h >= n {
            break;
        }
        let codes = F::two(&[p[2 * h], p[2 * h + 1]]);
        // Of a block that does not exist the factor is zero, so any activations will do.
        let (first, second) = (32 * (b + 2 * h), 32 * (b + (2 * h + 1).min(n - 1)));
        for i in 0..T {
            let x = x[i].codes;
            let x = each!([ones; 2], half => _mm256_set_m128i(
                _mm_loadu_si128(x.add(second + 16 * half).cast()),
                _mm_loadu_si128(x.add(first + 16 * half).cast())
            ));
            let (low, high) = (pairs::<F>(codes[0], x[0]), pairs::<F>(codes[1], x[1]));
            let dot = if F::BIAS < 128 {
                _mm256_madd_epi16(_mm256_add_epi16(low, high), ones) // at most 4·31·127 in i16
            } else {
                _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones))
            };
            let sum = &mut sums[i].products[h];
            *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), spread(factors[i], h), *sum);
        }
    }
    if F::HAS_M {
        let m = f16_four(&p, 2);
        for i in 0..T {
            let mut x_sums = [0.0; FOUR];
            for j in 0..n {
                x_sums[j] = *x[i].sums.add(b + j) as f32;
            }
            let terms = _mm_mul_ps(scales[i], _mm_loadu_ps(x_sums.as_ptr()));
            sums[i].offsets = _mm_fmadd_ps(m, terms, sums[i].offsets);
        }
    }
}

/// Rows of blocks of 256.
struct LargeRow<F>(PhantomData<F>);

/// Sums of a row of blocks of 256.
#[derive(Clone, Copy)]
struct LargeSums {
    /// Sixteen lanes: a lane is a dword of the 64 bytes that the codes are read in.
    products: [__m256; 2],
    /// Sixteen lanes of two sub-blocks each: those of two or four blocks in turn.
    mins: [f32; LANES],
}

impl<F: Narrow> Few for LargeRow<F> {
    const ROWS: usize = 1;

    #[inline(always)]
    unsafe fn product<const T: usize>(
        &self,
        job: &Job<'_>,
        row: usize,
        t: usize,
        out: &mut [[f32; LANES]; TOKENS],
        r: usize,
    ) {
        let p = job.weights.row_of(row, 256, F::BYTES);
        let x = each!([Token::new(job, t, F::SUB); T], i => Token::new(job, t + i, F::SUB));
        let mut sums = [LargeSums { products: [_mm256_setzero_ps(); 2], mins: [0.0; LANES] }; T];
        for b in 0..job.weights.cols / 256 {
            large_block::<F, T>(p.add(b * F::BYTES), &x, b, &mut sums);
        }
        for i in 0..T {
            out[i][r] = sum_sixteen(sums[i].products);
            if F::HAS_MINS {
                let mins = sums[i].mins.as_ptr();
                out[i][r] -= sum_sixteen([_mm256_loadu_ps(mins), _mm256_loadu_ps(mins.add(8))]);
            }
        }
    }
}

/// Where the activations of a token are.
#[derive(Clone, Copy)]
struct Token {
    codes: *const i8,
    /// Of the sub-blocks' codes.
    sums: *const i32,
    scales: *const f32,
}

impl Token {
    #[inline(always)]
    fn new(job: &Job<'_>, t: usize, sub: usize) -> Self {
        let sums = if sub == 32 { job.acts.sums32(t) } else { job.acts.sums16(t) };
        Self { codes: job.acts.codes(t).as_ptr(), sums: sums.as_ptr(), scales: job.acts.scales(t).as_ptr() }
    }
}

/// Block `b` of a row, at `p`.
///
/// No lane of the integer sums overflows: it has 16 products of at most 63·127 times a scale of at most 128, or of
/// 127·127 times one of at most 32.
#[inline(always)]
unsafe fn large_block<F: Narrow, const T: usize>(
    p: *const u8,
    x: &[Token; T],
    b: usize,
    sums: &mut [LargeSums; T],
) {
    let scales = _mm256_cvtepi8_epi16(F::scales(p));
    let scales = [_mm256_permute4x64_epi64::<0x44>(scales), _mm256_permute4x64_epi64::<0xee>(scales)];
    let mut dots = [[_mm256_setzero_si256(); 2]; T];
    // One after the other by hand: as a loop it would not be unrolled, and shift by variables.
    codes64::<F, T, 0>(p, x, b, &scales, &mut dots);
    codes64::<F, T, 1>(p, x, b, &scales, &mut dots);
    codes64::<F, T, 2>(p, x, b, &scales, &mut dots);
    codes64::<F, T, 3>(p, x, b, &scales, &mut dots);
    let (d, dmin) = (f16(p.add(F::D)), f16(p.add(F::DMIN)));
    for i in 0..T {
        let scale = *x[i].scales.add(b);
        for half in 0..2 {
            let sum = &mut sums[i].products[half];
            *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[i][half]), _mm256_set1_ps(d * scale), *sum);
        }
        if F::HAS_MINS {
            let x_sums = x_sums::<F>(x[i].sums.add(b * 256 / F::SUB));
            let dots = _mm256_madd_epi16(_mm256_cvtepi8_epi16(F::mins(p)), x_sums);
            let (dots, factor) = (_mm256_cvtepi32_ps(dots), _mm256_set1_ps(dmin * scale));
            let n_pairs = 128 / F::SUB;
            let lanes = sums[i].mins.as_mut_ptr().add(b * n_pairs % LANES);
            if F::SUB == 32 {
                let (dots, factor) = (_mm256_castps256_ps128(dots), _mm256_castps256_ps128(factor));
                _mm_storeu_ps(lanes, _mm_fmadd_ps(dots, factor, _mm_loadu_ps(lanes)));
            } else {
                _mm256_storeu_ps(lanes, _mm256_fmadd_ps(dots, factor, _mm256_loadu_ps(lanes)));
            }
        }
    }
}

/// Adds the products of the `V`th 64 codes of a block.
#[inline(always)]
unsafe fn codes64<F: Narrow, const T: usize, const V: usize>(
    p: *const u8,
    x: &[Token; T],
    b: usize,
    scales: &[__m256i; 2],
    dots: &mut [[__m256i; 2]; T],
) {
    fetch_ahead(p, F::BYTES, V, 4);
    for half in 0..2 {
        let codes = F::codes32(p, V, half);
        let scale = F::spread_scales(scales, V, half);
        for i in 0..T {
            let products =
                _mm256_madd_epi16(F::pairs(codes, F::x32(x[i].codes.add(256 * b), V, half)), scale);
            dots[i][half] = _mm256_add_epi32(dots[i][half], products);
        }
    }
}

/// Sums of the activations of each sub-block of a block as i16 (at most 32·127); zeros after the eight of 32.
#[inline(always)]
unsafe fn x_sums<F: Large>(sums: *const i32) -> __m256i {
    if F::SUB == 32 {
        let (low, high) = (_mm_loadu_si128(sums.cast()), _mm_loadu_si128(sums.add(4).cast()));
        _mm256_zextsi128_si256(_mm_packs_epi32(low, high))
    } else {
        let (low, high) = (_mm256_loadu_si256(sums.cast()), _mm256_loadu_si256(sums.add(8).cast()));
        _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high))
    }
}
