//! Few tokens times weights whose scales lie beside their codes, as those of Q8_0: to the bits of [`super::rows`] with
//! Q8_0, in whose sums a lane is the same four products.
//!
//! Two blocks of 32 go together. With the activations in that order, their magnitudes beside them and their scales spread,
//! which is done once per product, 64 weights of four bits take 6 instructions to unpack and a token 11 more.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::narrow::{gather16, nibbles, pairs};
use super::rows::sum_sixteen;
use crate::kernels::matmul::{INT_PANEL_TOKENS, Job, MatrixRef, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::x86::few::{Few, TOKENS, fetch_ahead, fetch_line, walk};
use crate::kernels::x86::unpack::{FourBit, Int8, Small};
use kestrel_quant::codec::bnb8;
use kestrel_quant::codec::scales::{Absmax, Scales};
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// The shortest run of weights with one scale that this takes: two blocks of 32.
pub(super) const PAIR: usize = 64;
/// Weights whose scales are brought together.
const RUN: usize = PAIR * LANES;

/// Rows of `F` times few tokens, for a matrix that fits; see [`super::super::few::fit`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn beside<F: Pair>(job: &Job<'_>, scratch: &mut Scratch) {
    let tokens = tokens(job, scratch);
    walk(&TwoRows::<F> { tokens, of: PhantomData }, job);
}

/// A type with scales beside its codes, two blocks of 32 at a time.
pub(super) trait Pair: Small {
    /// The first and the last 16 signed codes of both blocks, each block in its half.
    unsafe fn two(p: *const u8) -> [__m256i; 2];
    /// Products of 32 codes and activations, of which it has the magnitudes too, summed in pairs.
    unsafe fn pairs(codes: __m256i, x: __m256i, magnitudes: __m256i) -> __m256i;
}

impl<F: FourBit> Pair for F {
    #[inline(always)]
    unsafe fn two(p: *const u8) -> [__m256i; 2] {
        let table = _mm_xor_si128(_mm_loadu_si128(F::BIASED.as_ptr().cast()), _mm_set1_epi8(i8::MIN));
        let table = _mm256_broadcastsi128_si256(table);
        // The activations at even places come first, as do the high halves of bytes.
        let [low, high] = nibbles(_mm256_loadu_si256(p.cast()));
        [_mm256_shuffle_epi8(table, high), _mm256_shuffle_epi8(table, low)]
    }
    #[inline(always)]
    unsafe fn pairs(codes: __m256i, x: __m256i, magnitudes: __m256i) -> __m256i {
        _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(codes, x)) // no code of a table is -128
    }
}

impl Pair for Int8 {
    #[inline(always)]
    unsafe fn two(p: *const u8) -> [__m256i; 2] {
        let both = [p, p.add(Self::BYTES)];
        [gather16(&both, 0), gather16(&both, 16)]
    }
    #[inline(always)]
    unsafe fn pairs(codes: __m256i, x: __m256i, _: __m256i) -> __m256i {
        pairs::<Self>(codes, x)
    }
}

/// Where the activations of a token are.
#[derive(Clone, Copy)]
struct Token {
    /// Of each two blocks of 32 the first 16 of both, then the last 16.
    codes: *const i8,
    /// Their magnitudes.
    magnitudes: *const i8,
    /// The scale of the first block four times, then that of the second.
    scales: *const f32,
}

/// The activations in the order of the codes; of tokens that the job has not, those of the first.
#[inline(always)]
unsafe fn tokens(job: &Job<'_>, scratch: &mut Scratch) -> [Token; INT_PANEL_TOKENS] {
    let (cols, n_tokens) = (job.weights.cols, job.acts.n_tokens());
    debug_assert!(cols.is_multiple_of(PAIR) && n_tokens <= INT_PANEL_TOKENS);
    let stride = 2 * cols + cols / 8 * size_of::<f32>();
    let room = scratch.acts(INT_PANEL_TOKENS * stride);
    let place = |t: usize| {
        let codes = room.add(t * stride);
        Token { codes: codes.cast(), magnitudes: codes.add(cols).cast(), scales: codes.add(2 * cols).cast() }
    };
    for t in 0..n_tokens {
        let (to, from, scales) = (place(t), job.acts.codes(t).as_ptr(), job.acts.scales(t).as_ptr());
        for k in (0..cols).step_by(PAIR) {
            for (half, x) in Int8::two(from.add(k).cast()).into_iter().enumerate() {
                let at = k + 32 * half;
                _mm256_storeu_si256(to.codes.cast_mut().add(at).cast(), x);
                _mm256_storeu_si256(to.magnitudes.cast_mut().add(at).cast(), _mm256_abs_epi8(x));
            }
            let spread =
                _mm256_set_m128(_mm_set1_ps(*scales.add(k / 32 + 1)), _mm_set1_ps(*scales.add(k / 32)));
            _mm256_storeu_ps(to.scales.cast_mut().add(k / 8), spread);
        }
    }
    std::array::from_fn(|t| place(if t < n_tokens { t } else { 0 }))
}

/// Two rows at a time.
struct TwoRows<F> {
    tokens: [Token; INT_PANEL_TOKENS],
    of: PhantomData<F>,
}

impl<F: Pair> Few for TwoRows<F> {
    const ROWS: usize = 2;

    #[inline(always)]
    unsafe fn product<const T: usize>(
        &self,
        job: &Job<'_>,
        row: usize,
        t: usize,
        out: &mut [[f32; LANES]; TOKENS],
        r: usize,
    ) {
        let x = each!([self.tokens[0]; T], i => self.tokens[t + i]);
        let last = (row + 1).min(job.rows.end - 1);
        // The sums of more would not fit the registers.
        if T <= 2 {
            rows::<F, T, 2>(job, [row, last], &x, out, r);
        } else {
            rows::<F, T, 1>(job, [row], &x, out, r);
            rows::<F, T, 1>(job, [last], &x, out, r + 1);
        }
    }
}

/// `R` rows, which share what is loaded of the activations.
#[inline(always)]
unsafe fn rows<F: Pair, const T: usize, const R: usize>(
    job: &Job<'_>,
    rows: [usize; R],
    x: &[Token; T],
    out: &mut [[f32; LANES]; TOKENS],
    r: usize,
) {
    let cols = job.weights.cols;
    let p = each!([std::ptr::null(); R], j => job.weights.row_of(rows[j], 32, F::BYTES));
    // Sixteen lanes: four blocks', four each.
    let mut sums = [[[_mm256_setzero_ps(); 2]; R]; T];
    let mut d = [[0.0; LANES]; R];
    for k0 in (0..cols).step_by(RUN) {
        let n = RUN.min(cols - k0);
        for j in 0..R {
            RowScales::of(&job.weights, rows[j]).run(k0, n, &mut d[j]);
        }
        for k in (0..n).step_by(2 * PAIR) {
            let p = each!([p[0]; R], j => p[j].add((k0 + k) / 32 * F::BYTES));
            for j in 0..R {
                fetch_ahead(p[j], 4 * F::BYTES, 0, 1);
            }
            for h in 0..2 {
                let codes = each!([[_mm256_setzero_si256(); 2]; R], j => F::two(p[j].add(2 * h * F::BYTES)));
                for i in 0..T {
                    for j in 0..R {
                        let d = _mm256_set1_ps(*d[j].as_ptr().add(k / PAIR + h));
                        add_pair::<F>(codes[j], d, &x[i], k0 + k + h * PAIR, &mut sums[i][j][h]);
                    }
                }
            }
        }
    }
    for i in 0..T {
        for j in 0..R {
            out[i][r + j] = sum_sixteen(sums[i][j]);
        }
    }
}

/// Adds the products of weights `at..at + 64` of a row.
#[inline(always)]
unsafe fn add_pair<F: Pair>(codes: [__m256i; 2], d: __m256, x: &Token, at: usize, sum: &mut __m256) {
    let ones = _mm256_set1_epi16(1);
    let dots = each!([ones; 2], half => {
        let load = |from: *const i8| _mm256_loadu_si256(from.add(at + 32 * half).cast());
        _mm256_madd_epi16(F::pairs(codes[half], load(x.codes), load(x.magnitudes)), ones)
    });
    let factors = _mm256_mul_ps(d, _mm256_loadu_ps(x.scales.add(at / 8)));
    *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(dots[0], dots[1])), factors, *sum);
}

/// The scales of a row.
struct RowScales<'a> {
    scales: &'a Scales<'a>,
    /// What they call the first weight.
    first: usize,
    /// Of the weights that share one.
    shift: u32,
}

impl<'a> RowScales<'a> {
    #[inline(always)]
    fn of(weights: &'a MatrixRef<'_>, row: usize) -> Self {
        let (scales, first) = weights.beside(row);
        Self { scales, first, shift: scales.blocksize.trailing_zeros() }
    }

    /// The scale of each two blocks of 32 from weight `k0` on, over 127 and rounded to f16, as many as `n` weights have, at
    /// most [`RUN`]; anything after them.
    #[inline(always)]
    unsafe fn run(&self, k0: usize, n: usize, to: &mut [f32; LANES]) {
        let block = |pair: usize| (self.first + k0 + PAIR * pair) >> self.shift;
        let (first, n_pairs) = (block(0), n / PAIR);
        match &self.scales.absmax {
            Absmax::F32(all) => {
                let all = &all[first..=block(n_pairs - 1)];
                // A stream of its own beside the codes, which the processor's own prefetching leaves at the end of each page.
                fetch_line(all.as_ptr().cast());
                match <&[f32; LANES]>::try_from(all) {
                    Ok(all) => *to = *all, // one for each
                    Err(_) => (0..n_pairs).for_each(|pair| to[pair] = all[block(pair) - first]),
                }
            }
            nested => (0..n_pairs).for_each(|pair| to[pair] = nested.get(block(pair))),
        }
        for eight in to.as_chunks_mut::<8>().0 {
            let d = _mm256_mul_ps(_mm256_loadu_ps(eight.as_ptr()), _mm256_set1_ps(bnb8::INVERSE_127));
            let rounded = _mm256_cvtph_ps(_mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(d));
            _mm256_storeu_ps(eight.as_mut_ptr(), rounded);
        }
    }
}
