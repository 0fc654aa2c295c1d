//! Few tokens: rows of blocks of 32, whether their scales lie in the blocks or beside them. The order of the sums is that of
//! `avx512::rows`: a row has sixteen lanes, four blocks' in turn, four each.
//!
//! Two blocks go together. With the activations in that order, what a type needs to know of them beside them and their
//! scales spread, all of which is done once per product, 64 weights of four bits take 4 to 6 instructions to unpack and a
//! token 8 to 11 more.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::narrow::Two;
use super::rows::{spread, sum_sixteen};
use crate::kernels::matmul::{INT_PANEL_TOKENS, Job, MatrixRef, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::x86::few::{FOUR, Few, TOKENS, fetch_ahead, fetch_line, four_blocks, walk};
use crate::kernels::x86::sums::sum_four;
use crate::kernels::x86::unpack::f16_four;
use kestrel_quant::codec::bnb8;
use kestrel_quant::codec::scales::{Absmax, Scales};
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// The shortest run of weights with a scale beside them that this takes: two blocks of 32.
pub(super) const PAIR: usize = 64;
/// Weights whose scales, where they lie beside them, are brought together.
const RUN: usize = PAIR * LANES;

/// Rows of `F` times few tokens; a matrix with scales beside its codes must fit, see [`super::super::few::fit`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn small<F: Two>(job: &Job<'_>, scratch: &mut Scratch) {
    let tokens = tokens::<F>(job, scratch);
    walk(&Rows::<F> { tokens, of: PhantomData }, job);
}

/// Activations of two blocks.
#[derive(Clone, Copy)]
struct Acts {
    /// The first 16 of both, then the last 16.
    codes: [__m256i; 2],
    /// What [`dots`] needs beside them.
    notes: [__m256i; 2],
    /// The scale of the first block four times, then that of the second.
    scales: __m256,
}

/// Where the activations of a token are. There are whole fours of blocks of them, with zeros after the last.
#[derive(Clone, Copy)]
struct Token {
    /// [block / 2]
    acts: *const Acts,
    /// [block], for types that have an `m`.
    sums: *const f32,
}

/// The activations in the order of the codes; of tokens that the job has not, those of the first.
#[inline(always)]
unsafe fn tokens<F: Two>(job: &Job<'_>, scratch: &mut Scratch) -> [Token; INT_PANEL_TOKENS] {
    let (n_blocks, n_tokens) = (job.weights.cols / 32, job.acts.n_tokens());
    debug_assert!(n_tokens <= INT_PANEL_TOKENS);
    let all_blocks = n_blocks.next_multiple_of(FOUR);
    let acts_bytes = all_blocks / 2 * size_of::<Acts>();
    let token_bytes = (acts_bytes + all_blocks * size_of::<f32>()).next_multiple_of(align_of::<Acts>());
    let room = scratch.acts(INT_PANEL_TOKENS * token_bytes);
    let place = |t: usize| {
        let acts = room.add(t * token_bytes);
        Token { acts: acts.cast(), sums: acts.add(acts_bytes).cast() }
    };
    for t in 0..n_tokens {
        let to = place(t);
        let (codes, scales, sums) = (job.acts.codes(t), job.acts.scales(t), job.acts.sums32(t));
        for b in (0..all_blocks).step_by(2) {
            let mut two = [(_mm256_setzero_si256(), 0.0, 0.0); 2];
            for (b, block) in (b..n_blocks).zip(&mut two) {
                let codes = _mm256_loadu_si256(codes.as_ptr().add(32 * b).cast());
                *block = (codes, scales[b], scales[b] * sums[b] as f32);
            }
            let [first, second] = two;
            let codes = [
                _mm256_permute2x128_si256::<0x20>(first.0, second.0),
                _mm256_permute2x128_si256::<0x31>(first.0, second.0),
            ];
            let scales = _mm256_set_m128(_mm_set1_ps(second.1), _mm_set1_ps(first.1));
            to.acts.cast_mut().add(b / 2).write(Acts { codes, notes: notes::<F>(codes), scales });
            to.sums.cast_mut().add(b).cast::<[f32; 2]>().write([first.2, second.2]);
        }
    }
    std::array::from_fn(|t| place(if t < n_tokens { t } else { 0 }))
}

/// What [`dots`] takes beside the activations of two blocks: their magnitudes, or what the bias of the codes adds.
#[inline(always)]
unsafe fn notes<F: Two>(x: [__m256i; 2]) -> [__m256i; 2] {
    if F::BIAS == 128 {
        return [_mm256_abs_epi8(x[0]), _mm256_abs_epi8(x[1])];
    }
    let ones = _mm256_set1_epi8(1);
    let sums = _mm256_add_epi16(_mm256_maddubs_epi16(ones, x[0]), _mm256_maddubs_epi16(ones, x[1]));
    [_mm256_madd_epi16(sums, _mm256_set1_epi16(F::BIAS.into())), _mm256_setzero_si256()]
}

/// Products of the codes of two blocks with activations, summed by fours from each half of a block.
#[inline(always)]
unsafe fn dots<F: Two>(codes: [__m256i; 2], acts: &Acts) -> __m256i {
    let (ones, x, notes) = (_mm256_set1_epi16(1), acts.codes, acts.notes);
    if F::BIAS < 128 {
        // At most 4·31·127 in i16.
        let pairs = each!([ones; 2], half => _mm256_maddubs_epi16(codes[half], x[half]));
        let dots = _mm256_madd_epi16(_mm256_add_epi16(pairs[0], pairs[1]), ones);
        return if F::BIAS == 0 { dots } else { _mm256_sub_epi32(dots, notes[0]) };
    }
    // By magnitude and sign, of which those of the activations are the cheaper ones: at most 2·128·127.
    let dots = each!([ones; 2], half => {
        let pairs = match F::HAS_MIN {
            false => _mm256_maddubs_epi16(notes[half], _mm256_sign_epi8(codes[half], x[half])),
            true => _mm256_maddubs_epi16(_mm256_abs_epi8(codes[half]), _mm256_sign_epi8(x[half], codes[half])),
        };
        _mm256_madd_epi16(pairs, ones)
    });
    _mm256_add_epi32(dots[0], dots[1])
}

/// Rows of `F`, two at a time.
struct Rows<F> {
    tokens: [Token; INT_PANEL_TOKENS],
    of: PhantomData<F>,
}

impl<F: Two> Few for Rows<F> {
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

/// Sums of a row.
#[derive(Clone, Copy)]
struct Sums {
    products: [__m256; 2],
    offsets: __m128,
}

/// `R` rows, which share what is loaded of the activations.
#[inline(always)]
unsafe fn rows<F: Two, const T: usize, const R: usize>(
    job: &Job<'_>,
    rows: [usize; R],
    x: &[Token; T],
    out: &mut [[f32; LANES]; TOKENS],
    r: usize,
) {
    let n_blocks = job.weights.cols / 32;
    let p = each!([std::ptr::null(); R], j => job.weights.row_of(rows[j], 32, F::BYTES));
    let mut sums = [[Sums { products: [_mm256_setzero_ps(); 2], offsets: _mm_setzero_ps() }; R]; T];
    let mut d = [[0.0; LANES]; R];
    let whole = n_blocks / FOUR * FOUR;
    for b0 in (0..whole).step_by(RUN / 32) {
        let n = (RUN / 32).min(whole - b0);
        if F::BESIDE {
            for j in 0..R {
                RowScales::of(&job.weights, rows[j]).run(32 * b0, 32 * n, &mut d[j]);
            }
        }
        for b in (b0..b0 + n).step_by(FOUR) {
            let beside = each!([std::ptr::null(); R], j => d[j].as_ptr().add((b - b0) / 2));
            four::<F, T, R>(&p, b, FOUR, &beside, x, &mut sums);
        }
    }
    if whole < n_blocks {
        four::<F, T, R>(&p, whole, n_blocks - whole, &[std::ptr::null(); R], x, &mut sums);
    }
    for i in 0..T {
        for j in 0..R {
            out[i][r + j] = sum_sixteen(sums[i][j].products);
            if F::HAS_M {
                out[i][r + j] += sum_four(sums[i][j].offsets);
            }
        }
    }
}

/// Adds the products of `n` blocks, `b..` of rows that begin at `rows`. `beside` are the scales of each two, where the blocks
/// have none.
#[inline(always)]
unsafe fn four<F: Two, const T: usize, const R: usize>(
    rows: &[*const u8; R],
    b: usize,
    n: usize,
    beside: &[*const f32; R],
    x: &[Token; T],
    sums: &mut [[Sums; R]; T],
) {
    // Of blocks that do not exist the activations are zeros, so the last will do.
    let p = each!([[rows[0]; FOUR]; R], j => four_blocks(rows[j].add(b * F::BYTES), F::BYTES, n));
    let d = each!([[_mm256_setzero_ps(); 2]; R], j => {
        fetch_ahead(p[j][0], FOUR * F::BYTES, 0, 1);
        match F::BESIDE {
            true => [_mm256_set1_ps(*beside[j]), _mm256_set1_ps(*beside[j].add(1))],
            false => {
                let d = f16_four(&p[j], 0);
                [spread(d, 0), spread(d, 1)]
            }
        }
    });
    for h in 0..2 {
        let codes = each!([[_mm256_setzero_si256(); 2]; R], j => F::two(&[p[j][2 * h], p[j][2 * h + 1]]));
        for i in 0..T {
            let acts = &*x[i].acts.add(b / 2 + h);
            for j in 0..R {
                let dots = dots::<F>(codes[j], acts);
                let sum = &mut sums[i][j].products[h];
                *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_mul_ps(d[j][h], acts.scales), *sum);
            }
        }
    }
    if F::HAS_M {
        for j in 0..R {
            let m = f16_four(&p[j], 2);
            for i in 0..T {
                let sum = &mut sums[i][j].offsets;
                *sum = _mm_fmadd_ps(m, _mm_loadu_ps(x[i].sums.add(b)), *sum);
            }
        }
    }
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
