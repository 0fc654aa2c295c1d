//! Few tokens: rows are read once, straight from their blocks, four side by side.
//!
//! A decoded token reads every weight once, so what counts is how many instructions a weight takes. Codes are unpacked
//! and multiplied 64 at a time, in the order in which their bytes lie; it is the activations, which all rows share,
//! that are brought into that order. What a block has once (f16 scales, sub-block scales, minimums) is prepared for
//! four rows together, and several tokens share the unpacked codes.
//!
//! Vector instructions of 256 weights of Q4_K and one token, counted in this source: 6 to unpack, 4 to spread the
//! scales, 8 for the products and their sums, 2 for the sum of the row; a quarter of the 22 that prepare four rows, an
//! eighth of the 7 that prepare the activations of eight: 26.4. Q5_K takes 34, Q6_K 37,
//! IQ4_XS 30, four blocks of 32 of Q4_0 14.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::wide::{Four, Head, Wide, X};
use crate::kernels::matmul::Job;
use crate::kernels::memory::LANES;
use crate::kernels::x86::few::{fetch, for_groups};
use std::arch::asm;
use std::arch::x86_64::*;

/// Rows that are prepared together.
const FOUR: usize = 4;
/// Groups of four rows that are read side by side.
const GROUPS: usize = 2;
/// Rows that are read side by side.
const ROWS: usize = GROUPS * FOUR;

#[inline(always)]
pub(super) unsafe fn small<F: Four>(job: &Job<'_>) {
    for_groups!(job, ROWS, small_product, F);
}

#[inline(always)]
pub(super) unsafe fn large<F: Wide>(job: &Job<'_>) {
    for_groups!(job, ROWS, large_product, F);
}

/// The sums of four vectors of four, in the order of `Lanes::sum`.
#[inline(always)]
unsafe fn sum_fours(x: [__m128; 4]) -> __m128 {
    let halves = |a, b| _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    let (low, high) = (halves(x[0], x[1]), halves(x[2], x[3]));
    _mm_add_ps(_mm_movelh_ps(low, high), _mm_movehl_ps(high, low))
}

/// Lanes i + 8 added to lanes i, then i + 4.
#[inline(always)]
unsafe fn fold(x: __m512) -> __m128 {
    let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
    _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
}

/// The four 256-bit parts, each folded to 128.
#[inline(always)]
unsafe fn halves(x: [__m512; 2]) -> [__m128; 4] {
    let fold = |x| _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let (low, high) = (|x| _mm512_castps512_ps256(x), |x| _mm512_extractf32x8_ps::<1>(x));
    [fold(low(x[0])), fold(high(x[0])), fold(low(x[1])), fold(high(x[1]))]
}

/// The four 128-bit parts.
#[inline(always)]
unsafe fn quarters(x: __m512) -> [__m128; 4] {
    [
        _mm512_castps512_ps128(x),
        _mm512_extractf32x4_ps::<1>(x),
        _mm512_extractf32x4_ps::<2>(x),
        _mm512_extractf32x4_ps::<3>(x),
    ]
}

/// Rows of blocks of 32 times `T` tokens. A row has four lanes of a sum.
#[inline(always)]
unsafe fn small_product<F: Four, const T: usize>(
    job: &Job<'_>,
    rows: &[*const u8; ROWS],
    next: *const u8,
    t: usize,
    out: &mut [[f32; ROWS]; 4],
) {
    let n_blocks = job.weights.cols / 32;
    let mut sums =
        [SmallSums { products: [_mm512_setzero_ps(); T], offsets: [_mm512_setzero_ps(); T] }; GROUPS];
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
    for g in 0..GROUPS {
        for i in 0..T {
            let mut sum = sum_fours(quarters(sums[g].products[i]));
            if F::HAS_M {
                sum = _mm_add_ps(sum, sum_fours(quarters(sums[g].offsets[i])));
            }
            _mm_storeu_ps(out[i][FOUR * g..][..FOUR].as_mut_ptr(), sum);
        }
    }
}

/// Sums of four rows of blocks of 32, a row in each 128-bit part.
#[derive(Clone, Copy)]
struct SmallSums<const T: usize> {
    products: [__m512; T],
    offsets: [__m512; T],
}

/// The `N` numbers at `p` in each 128-bit part, zeros after them.
#[inline(always)]
unsafe fn in_quarters<const N: usize>(p: *const f32) -> __m512 {
    let four = match N {
        4 => _mm_loadu_ps(p),
        _ => _mm_maskz_loadu_ps((1 << N) - 1, p),
    };
    _mm512_broadcast_f32x4(four)
}

/// The f16 at `p + at` and `stride` bytes on.. of each row in its 128-bit part, as f32; zeros after `N` of them, which
/// lie in whole blocks of `stride` bytes at `p`.
#[inline(always)]
unsafe fn f16_quarters<const N: usize>(p: &[*const u8; FOUR], stride: usize, at: usize) -> __m512 {
    let bits = if N == 4 && at + 3 * stride + 2 <= 64 {
        // All four are in 64 bytes: each row puts its words where they belong.
        let word = |j: usize| ((at + j * stride) / 2) as i64;
        let words = _mm512_set1_epi64(word(0) | word(1) << 16 | word(2) << 32 | word(3) << 48);
        let mut all = _mm512_setzero_si512();
        for (r, p) in p.iter().enumerate() {
            let row = _mm512_loadu_si512(p.cast());
            all = _mm512_mask_permutexvar_epi16(all, 0xf << (4 * r), words, row);
        }
        _mm512_castsi512_si256(all)
    } else {
        let mut all = [[0u16; 4]; FOUR];
        for (all, p) in all.iter_mut().zip(p) {
            for (j, bits) in all[..N].iter_mut().enumerate() {
                *bits = p.add(at + j * stride).cast::<u16>().read_unaligned();
            }
        }
        _mm256_loadu_si256(all.as_ptr().cast())
    };
    _mm512_cvtph_ps(bits)
}

/// Number `j` of each 128-bit part in all its lanes.
#[inline(always)]
unsafe fn spread(x: __m512, j: usize) -> __m512 {
    match j {
        0 => _mm512_permute_ps::<0x00>(x),
        1 => _mm512_permute_ps::<0x55>(x),
        2 => _mm512_permute_ps::<0xaa>(x),
        _ => _mm512_permute_ps::<0xff>(x),
    }
}

/// Blocks `b..b + N` of the rows.
#[inline(always)]
unsafe fn some_blocks<F: Four, const T: usize, const N: usize>(
    job: &Job<'_>,
    rows: &[*const u8; ROWS],
    next: *const u8,
    t: usize,
    b: usize,
    sums: &mut [SmallSums<T>; GROUPS],
) {
    let (rows, _) = rows.as_chunks::<FOUR>();
    fetch(next.wrapping_add(b * ROWS * F::BYTES), N * ROWS * F::BYTES);
    let zero = _mm512_setzero_si512();
    let scales: [__m512; T] =
        std::array::from_fn(|i| in_quarters::<N>(job.acts.scales(t + i).as_ptr().add(b)));
    let mut factors = [[_mm512_setzero_ps(); T]; GROUPS];
    for g in 0..GROUPS {
        let p = rows[g].map(|row| row.add(b * F::BYTES));
        let d = f16_quarters::<N>(&p, F::BYTES, 0);
        factors[g] = scales.map(|scale| _mm512_mul_ps(d, scale));
        if F::HAS_M {
            let m = f16_quarters::<N>(&p, F::BYTES, 2);
            for i in 0..T {
                let x_sums = _mm_cvtepi32_ps(match N {
                    4 => _mm_loadu_si128(job.acts.sums32(t + i).as_ptr().add(b).cast()),
                    _ => _mm_maskz_loadu_epi32((1 << N) - 1, job.acts.sums32(t + i).as_ptr().add(b)),
                });
                let term = _mm512_mul_ps(scales[i], _mm512_broadcast_f32x4(x_sums));
                sums[g].offsets[i] = _mm512_fmadd_ps(m, term, sums[g].offsets[i]);
            }
        }
    }
    for j in 0..N {
        let mut x = [[zero; 2]; T];
        let mut start = [zero; T];
        for i in 0..T {
            let codes = job.acts.codes(t + i).as_ptr().add(32 * (b + j));
            x[i] = [codes, codes.add(16)].map(|x| _mm512_broadcast_i32x4(_mm_loadu_si128(x.cast())));
            if F::BIAS != 0 {
                let bias = _mm512_set1_epi8(F::BIAS as i8);
                let biases = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, bias, x[i][0]), bias, x[i][1]);
                start[i] = _mm512_sub_epi32(zero, biases);
            }
        }
        for g in 0..GROUPS {
            let codes = F::four(&rows[g].map(|row| row.add((b + j) * F::BYTES)));
            for i in 0..T {
                let dot = _mm512_dpbusd_epi32(start[i], codes[0], x[i][0]);
                let dot = _mm512_dpbusd_epi32(dot, codes[1], x[i][1]);
                let sum = &mut sums[g].products[i];
                *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), spread(factors[g][i], j), *sum);
            }
        }
    }
}

/// Sums of four rows of blocks of 256.
#[derive(Clone, Copy)]
struct LargeSums<const T: usize> {
    /// A lane is a dword of the 64 bytes that the codes are read in.
    products: [[__m512; FOUR]; T],
    /// A lane is two sub-blocks; the rows one after the other.
    mins: [[__m512; 2]; T],
}

/// Rows of blocks of 256 times `T` tokens.
#[inline(always)]
unsafe fn large_product<F: Wide, const T: usize>(
    job: &Job<'_>,
    rows: &[*const u8; ROWS],
    next: *const u8,
    t: usize,
    out: &mut [[f32; ROWS]; 4],
) {
    let (rows, _) = rows.as_chunks::<FOUR>();
    let zero = _mm512_setzero_ps();
    let mut sums = [LargeSums { products: [[zero; FOUR]; T], mins: [[zero; 2]; T] }; GROUPS];
    for b in 0..job.weights.cols / 256 {
        fetch(next.wrapping_add(b * ROWS * F::BYTES), ROWS * F::BYTES);
        // Loops rather than closures: those do not inherit the instruction set, and may be called instead of inlined.
        let mut x = [X { codes: [_mm512_setzero_si512(); 4], extra: [_mm512_setzero_si512(); 4] }; T];
        let (mut scale, mut sums_of_x) = ([_mm_setzero_ps(); T], [_mm512_setzero_si512(); T]);
        for i in 0..T {
            x[i] = F::x(job.acts.codes(t + i).as_ptr().add(256 * b));
            scale[i] = _mm_set1_ps(job.acts.scales(t + i)[b]);
            if F::HAS_MINS {
                sums_of_x[i] = x_sums::<F>(job, t + i, b);
            }
        }
        let x_sums = sums_of_x;
        for g in 0..GROUPS {
            let p = rows[g].map(|row| row.add(b * F::BYTES));
            let Head { scales, mins, d, dmin } = F::head(&p);
            let factors = in_memory(scale.map(|scale| _mm_mul_ps(d, scale)));
            for r in 0..FOUR {
                let codes = F::codes64(p[r]);
                let mut spread = [_mm512_setzero_si512(); 4];
                for (v, spread) in spread.iter_mut().enumerate() {
                    *spread = F::spread_scales(&scales, r, v);
                }
                let scales = spread;
                for i in 0..T {
                    let mut dots = _mm512_setzero_si512();
                    for v in 0..4 {
                        // No lane overflows: it gets 16 products of at most 63·127 times a scale of at most 128, or of
                        // 127·127 times one of at most 32.
                        let pairs = F::pairs(codes[v], x[i].codes[v], x[i].extra[v]);
                        dots = dot_words(dots, pairs, scales[v]);
                    }
                    let factor = _mm512_set1_ps(factors[i][r]);
                    let sum = &mut sums[g].products[i][r];
                    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), factor, *sum);
                }
            }
            if F::HAS_MINS {
                for i in 0..T {
                    let factors = _mm512_castps128_ps512(_mm_mul_ps(dmin, scale[i]));
                    for h in 0..8 / (F::SUB / 4) {
                        let dots = _mm512_cvtepi32_ps(_mm512_madd_epi16(mins[h], x_sums[i]));
                        let factors = _mm512_permutexvar_ps(mins_rows::<F>(h), factors);
                        sums[g].mins[i][h] = _mm512_fmadd_ps(dots, factors, sums[g].mins[i][h]);
                    }
                }
            }
        }
    }
    for g in 0..GROUPS {
        for i in 0..T {
            let mut sum = sum_fours(sums[g].products[i].map(|x| fold(x)));
            if F::HAS_MINS {
                let mins = sums[g].mins[i];
                sum = _mm_sub_ps(
                    sum,
                    match F::SUB {
                        32 => sum_fours(quarters(mins[0])),
                        _ => sum_fours(halves(mins)),
                    },
                );
            }
            _mm_storeu_ps(out[i][FOUR * g..][..FOUR].as_mut_ptr(), sum);
        }
    }
}

/// Which of four rows each lane of `mins[h]` belongs to.
#[inline(always)]
unsafe fn mins_rows<F: Wide>(h: usize) -> __m512i {
    let rows = match F::SUB {
        32 => _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
        _ => _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
    };
    _mm512_add_epi32(rows, _mm512_set1_epi32(2 * h as i32))
}

/// Numbers where a later instruction can spread one of them as it loads it, which from a register takes another.
#[inline(always)]
unsafe fn in_memory<const T: usize>(x: [__m128; T]) -> [[f32; FOUR]; T] {
    let mut out = [[0.0; FOUR]; T];
    for (out, x) in out.iter_mut().zip(x) {
        _mm_storeu_ps(out.as_mut_ptr(), x);
    }
    std::hint::black_box(out)
}

/// Adds to each lane the products of two i16. The compiler would make two instructions of the intrinsic, a product and
/// an addition, to shorten chains that are no bottleneck here.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_words(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    asm!("vpdpwssd {0}, {1}, {2}", inout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b,
         options(pure, nomem, nostack, preserves_flags));
    sum
}

/// Sums of the activations of each sub-block as i16 (at most 32·127), for each row of `mins[h]`.
#[inline(always)]
unsafe fn x_sums<F: Wide>(job: &Job<'_>, t: usize, b: usize) -> __m512i {
    if F::SUB == 32 {
        let sums = _mm256_loadu_si256(job.acts.sums32(t).as_ptr().add(8 * b).cast());
        _mm512_broadcast_i32x4(_mm256_cvtepi32_epi16(sums))
    } else {
        let sums = _mm512_loadu_si512(job.acts.sums16(t).as_ptr().add(16 * b).cast());
        _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(sums))
    }
}
