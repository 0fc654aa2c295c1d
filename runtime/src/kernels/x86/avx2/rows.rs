//! Few tokens, blocks of 256: rows are read once, straight from their blocks, front to back. The order of the sums is that of
//! `avx512::rows`, with the halves of its vectors one after the other. Four blocks are prepared together, as there; the
//! activations stay in row order, which 32 codes at a time need no other.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::narrow::Narrow;
use crate::kernels::matmul::{INT_PANEL_TOKENS, Job, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::x86::few::{FOUR, Few, TOKENS, fetch_ahead, four_blocks, walk};
use crate::kernels::x86::sums::{fold_eight, sum_four};
use std::arch::x86_64::*;
use std::hint::black_box;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn large<F: Narrow>(job: &Job<'_>, _: &mut Scratch) {
    let tokens = tokens(job, F::SUB);
    match job.weights.cols {
        256 => walk(&LargeRows::<F, FOUR> { tokens, of: PhantomData }, job),
        _ => walk(&LargeRows::<F, 1> { tokens, of: PhantomData }, job),
    }
}

/// The sum of sixteen lanes, in the order of `Lanes::sum`.
#[inline(always)]
pub(super) unsafe fn sum_sixteen(x: [__m256; 2]) -> f32 {
    sum_four(fold_eight(_mm256_add_ps(x[0], x[1])))
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

/// Numbers `2 h` and `2 h + 1` of four, each in all lanes of its half.
#[inline(always)]
pub(super) unsafe fn spread(x: __m128, h: usize) -> __m256 {
    let both = _mm256_set_m128(x, x);
    let which = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    _mm256_permutevar_ps(both, _mm256_add_epi32(which, _mm256_set1_epi32(2 * h as i32)))
}

/// Number `j` of four in all lanes.
#[inline(always)]
unsafe fn spread_one(x: __m128, j: usize) -> __m256 {
    let both = _mm256_set_m128(x, x);
    _mm256_permutevar_ps(both, _mm256_set1_epi32(j as i32))
}

/// Rows of blocks of 256, `R` at a time: one, or four rows of one block each.
struct LargeRows<F, const R: usize> {
    tokens: [Token; INT_PANEL_TOKENS],
    of: PhantomData<F>,
}

/// Sums of `R` rows of blocks of 256.
struct LargeSums<const T: usize, const R: usize> {
    /// Sixteen lanes: a lane is a dword of the 64 bytes that the codes are read in.
    products: [[[__m256; 2]; R]; T],
    /// A lane is two sub-blocks. Those of two blocks of eight, or of one of sixteen, are in one vector.
    mins: [[__m256; FOUR]; T],
}

impl<F: Narrow, const R: usize> Few for LargeRows<F, R> {
    const ROWS: usize = R;

    #[inline(always)]
    unsafe fn product<const T: usize>(
        &self,
        job: &Job<'_>,
        row: usize,
        t: usize,
        out: &mut [[f32; LANES]; TOKENS],
        r: usize,
    ) {
        let (p, n_blocks) = (job.weights.row_of(row, 256, F::BYTES), job.weights.cols / 256);
        let x = each!([self.tokens[0]; T], i => self.tokens[t + i]);
        let zero = _mm256_setzero_ps();
        let mut sums = LargeSums { products: [[[zero; 2]; R]; T], mins: [[zero; FOUR]; T] };
        let mut room = MaybeUninit::<Prepared<T>>::uninit();
        let prepared = black_box(room.as_mut_ptr());
        let n_blocks = if R == 1 { n_blocks } else { (job.rows.end - row).min(R) };
        for b in (0..n_blocks).step_by(FOUR) {
            let p = p.add(b * F::BYTES);
            match n_blocks - b {
                n if n < FOUR => large_blocks::<F, T, R>(p, &x, b, n, prepared, &mut sums),
                _ => large_blocks::<F, T, R>(p, &x, b, FOUR, prepared, &mut sums),
            }
        }
        for i in 0..T {
            for j in 0..R {
                out[i][r + j] = sum_sixteen(sums.products[i][j]);
                if F::HAS_MINS {
                    out[i][r + j] -= mins_of::<F, R>(&sums.mins[i], j);
                }
            }
        }
    }
}

/// The minimums of row `j` of `R`.
#[inline(always)]
unsafe fn mins_of<F: Narrow, const R: usize>(mins: &[__m256; FOUR], j: usize) -> f32 {
    match (R, F::SUB) {
        (1, _) => sum_sixteen([mins[0], mins[1]]),
        (_, 32) if j.is_multiple_of(2) => sum_four(_mm256_castps256_ps128(mins[j / 2])),
        (_, 32) => sum_four(_mm256_extractf128_ps::<1>(mins[j / 2])),
        _ => sum_four(fold_eight(mins[j])),
    }
}

/// What the products of four blocks need beside their codes. It is in memory, where loading spreads a part of it, which from a
/// register takes an instruction.
struct Prepared<const T: usize> {
    /// Of the sub-blocks, twice in a dword: [two blocks][four sub-blocks][block][sub-block].
    scales: [[[[i32; 4]; 2]; 4]; 2],
    /// Scales of blocks and activations multiplied.
    d: [[f32; FOUR]; T],
}

/// Adds the products of `n` blocks, the first of them at `p`: `b..b + n` of a row, or the first of as many rows.
#[inline(always)]
unsafe fn large_blocks<F: Narrow, const T: usize, const R: usize>(
    p: *const u8,
    x: &[Token; T],
    b: usize,
    n: usize,
    prepared: *mut Prepared<T>,
    sums: &mut LargeSums<T, R>,
) {
    let p = four_blocks(p, F::BYTES, n);
    // Of a row the blocks have activations one after the other; of several rows they have the same.
    let x_blocks = [0, 1, 2, 3].map(|j: usize| if R == 1 { b + j.min(n - 1) } else { 0 });
    let heads = F::heads(&p);
    for i in 0..T {
        let x_scales = match R {
            1 => up_to_four(x[i].scales.add(b), n),
            _ => _mm_set1_ps(*x[i].scales),
        };
        _mm_storeu_ps((&raw mut (*prepared).d[i]).cast(), _mm_mul_ps(heads.d, x_scales));
        if F::HAS_MINS {
            let factors = _mm_mul_ps(heads.dmin, x_scales);
            add_mins::<F, R>(&heads.mins, factors, x[i].sums, &x_blocks, &mut sums.mins[i]);
        }
    }
    for h in 0..2 {
        for eight in 0..256 / F::SUB / 8 {
            let wide = widened(heads.scales[h], eight);
            let to: *mut __m256i = (&raw mut (*prepared).scales[h][2 * eight]).cast();
            _mm256_storeu_si256(to, _mm256_unpacklo_epi16(wide, wide));
            _mm256_storeu_si256(to.add(1), _mm256_unpackhi_epi16(wide, wide));
        }
    }
    large_block::<F, T, R, 0>(&p, x, x_blocks[0], n, prepared, sums);
    large_block::<F, T, R, 1>(&p, x, x_blocks[1], n, prepared, sums);
    large_block::<F, T, R, 2>(&p, x, x_blocks[2], n, prepared, sums);
    large_block::<F, T, R, 3>(&p, x, x_blocks[3], n, prepared, sums);
}

/// Adds the minimums of four blocks, times the sums of the activations that each meets and its factor.
#[inline(always)]
unsafe fn add_mins<F: Narrow, const R: usize>(
    mins: &[__m256i; 2],
    factors: __m128,
    x_sums: *const i32,
    x_blocks: &[usize; FOUR],
    to: &mut [__m256; FOUR],
) {
    let eight = |i: usize| _mm256_loadu_si256(x_sums.add(8 * i).cast());
    if F::SUB == 32 {
        for h in 0..2 {
            let x_sums = packed(eight(x_blocks[2 * h]), eight(x_blocks[2 * h + 1]));
            let dots = _mm256_cvtepi32_ps(_mm256_madd_epi16(widened(mins[h], 0), x_sums));
            to[h] = _mm256_fmadd_ps(dots, spread(factors, h), to[h]);
        }
        return;
    }
    for j in 0..FOUR {
        let mins = match j % 2 {
            0 => _mm256_castsi256_si128(mins[j / 2]),
            _ => _mm256_extracti128_si256::<1>(mins[j / 2]),
        };
        let x_sums = packed(eight(2 * x_blocks[j]), eight(2 * x_blocks[j] + 1));
        let dots = _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_cvtepi8_epi16(mins), x_sums));
        let to = &mut to[if R == 1 { j % 2 } else { j }];
        *to = _mm256_fmadd_ps(dots, spread_one(factors, j), *to);
    }
}

/// Signed bytes `8 eight..` of each half as i16.
#[inline(always)]
unsafe fn widened(x: __m256i, eight: usize) -> __m256i {
    let twice = if eight == 0 { _mm256_unpacklo_epi8(x, x) } else { _mm256_unpackhi_epi8(x, x) };
    _mm256_srai_epi16::<8>(twice)
}

/// Sixteen i32 as i16.
#[inline(always)]
unsafe fn packed(low: __m256i, high: __m256i) -> __m256i {
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high))
}

/// Where the activations of a token are.
#[derive(Clone, Copy)]
struct Token {
    codes: *const i8,
    /// Of the sub-blocks' codes.
    sums: *const i32,
    scales: *const f32,
}

/// The tokens of a job; of those that it has not, the first.
fn tokens(job: &Job<'_>, sub: usize) -> [Token; INT_PANEL_TOKENS] {
    debug_assert!(job.acts.n_tokens() <= INT_PANEL_TOKENS);
    std::array::from_fn(|t| {
        let t = if t < job.acts.n_tokens() { t } else { 0 };
        let sums = if sub == 32 { job.acts.sums32(t) } else { job.acts.sums16(t) };
        Token { codes: job.acts.codes(t).as_ptr(), sums: sums.as_ptr(), scales: job.acts.scales(t).as_ptr() }
    })
}

/// Block `J` of four, if it is one of the `n` that exist, whose activations are the `b`-th.
///
/// No lane of the integer sums overflows: it has 16 products of at most 63·127 times a scale of at most 128, or of
/// 127·127 times one of at most 32.
#[inline(always)]
unsafe fn large_block<F: Narrow, const T: usize, const R: usize, const J: usize>(
    p: &[*const u8; FOUR],
    x: &[Token; T],
    b: usize,
    n: usize,
    prepared: *const Prepared<T>,
    sums: &mut LargeSums<T, R>,
) {
    if J >= n {
        return;
    }
    let scales = (&raw const (*prepared).scales[J / 2][0][J % 2]).cast::<i32>();
    let mut dots = [[_mm256_setzero_si256(); 2]; T];
    // One after the other by hand: as a loop it would not be unrolled, and shift by variables.
    codes64::<F, T, 0>(p[J], x, b, scales, &mut dots);
    codes64::<F, T, 1>(p[J], x, b, scales, &mut dots);
    codes64::<F, T, 2>(p[J], x, b, scales, &mut dots);
    codes64::<F, T, 3>(p[J], x, b, scales, &mut dots);
    for i in 0..T {
        let d = _mm256_set1_ps((*prepared).d[i][J]);
        for half in 0..2 {
            let sum = &mut sums.products[i][J * R / FOUR][half];
            *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[i][half]), d, *sum);
        }
    }
}

/// Adds the products of the `V`th 64 codes of a block.
#[inline(always)]
unsafe fn codes64<F: Narrow, const T: usize, const V: usize>(
    p: *const u8,
    x: &[Token; T],
    b: usize,
    scales: *const i32,
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
