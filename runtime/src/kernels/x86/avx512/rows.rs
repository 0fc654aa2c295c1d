//! Few tokens: rows are read once, straight from their blocks, front to back.
//!
//! A decoded token reads every weight once, so what counts is how many instructions a weight takes. Codes are unpacked
//! and multiplied 64 at a time, in the order in which their bytes lie; it is the activations, which all rows share,
//! that are brought into that order, once per product. What a block has once (f16 scales, sub-block scales, minimums)
//! is prepared for four consecutive blocks together, and several tokens share the unpacked codes.
//!
//! Vector instructions of 256 weights of Q4_K and one token, counted in this source: 4 to unpack, 4 to spread the
//! scales, 8 for the products and their sums, 2 for the sum of the row; a quarter of the 26 that prepare four blocks:
//! 24.5. Q5_K takes 32, Q6_K 35, IQ4_XS 30, eight blocks of 32 of Q4_0 30. Loads are as scarce: 64 bytes a cycle, which is why
//! what several vectors need is loaded once (ARCHITECTURE.md, "Loads bind few tokens").

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::scales::{self, RowScales};
use super::wide::{Four, Head, Wide, X};
use crate::kernels::matmul::{INT_PANEL_TOKENS, Job, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::x86::few::{FOUR, Few, TOKENS, fetch_ahead, fetch_two, four_blocks, lines_of_step, walk};
use crate::kernels::x86::sums::{fold_eight, sum_four};
use crate::kernels::x86::unpack;
use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
pub(super) unsafe fn small<F: Four>(job: &Job<'_>, scratch: &mut Scratch) {
    let tokens = small_tokens::<F>(job, scratch);
    match job.weights.cols {
        256 if F::BESIDE => walk(&Small::<F, FOUR> { tokens, of: PhantomData }, job),
        _ => walk(&Small::<F, PAIR> { tokens, of: PhantomData }, job),
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
pub(super) unsafe fn large<F: Wide>(job: &Job<'_>, scratch: &mut Scratch) {
    let tokens = large_tokens::<F>(job, scratch);
    match job.weights.cols {
        256 => walk(&Large::<F, FOUR> { tokens, of: PhantomData }, job),
        _ => walk(&Large::<F, PAIR> { tokens, of: PhantomData }, job),
    }
}

/// Where the activations of a token are, in the order of a type's codes.
#[derive(Clone, Copy)]
struct Token {
    codes: *const i8,
    /// What the products take beside the codes.
    extra: *const i8,
    /// Sums of the sub-blocks: i16, or f32 and times the scale for blocks of 32.
    sums: *const i8,
    /// f32 per block.
    scales: *const f32,
}

impl Token {
    /// 64 activations from `at` on, and what the products take beside them.
    #[inline(always)]
    unsafe fn vector<F: Wide>(&self, at: usize) -> (__m512i, __m512i) {
        let extra = match F::EXTRA {
            true => _mm512_loadu_si512(self.extra.add(at).cast()),
            false => _mm512_setzero_si512(),
        };
        (_mm512_loadu_si512(self.codes.add(at).cast()), extra)
    }
}

/// Places for the activations of all tokens; what is written there is `(codes, extra, sums)`.
#[inline(always)]
unsafe fn places(job: &Job<'_>, scratch: &mut Scratch) -> [Token; INT_PANEL_TOKENS] {
    let cols = job.weights.cols.next_multiple_of(256);
    let stride = 2 * cols + (cols / 8).next_multiple_of(64) + 64;
    let to = scratch.acts(INT_PANEL_TOKENS * stride).cast::<i8>();
    let mut tokens = [Token { codes: to, extra: to, sums: to, scales: std::ptr::null() }; INT_PANEL_TOKENS];
    for t in 0..job.acts.n_tokens() {
        let codes = to.add(t * stride);
        let scales = job.acts.scales(t).as_ptr();
        tokens[t] = Token { codes, extra: codes.add(cols), sums: codes.add(2 * cols), scales };
    }
    tokens
}

#[inline(always)]
unsafe fn store(to: *const i8, at: usize, x: __m512i) {
    _mm512_storeu_si512(to.cast_mut().add(at).cast(), x);
}

/// For blocks of 32: of each four, the lower 16 codes of each, then the upper ones; zeros after the last block.
#[inline(always)]
unsafe fn small_tokens<F: Four>(job: &Job<'_>, scratch: &mut Scratch) -> [Token; INT_PANEL_TOKENS] {
    let tokens = places(job, scratch);
    let n_blocks = job.weights.cols / 32;
    for t in 0..job.acts.n_tokens() {
        let token = tokens[t];
        let (from, sums) = (job.acts.codes(t).as_ptr(), job.acts.sums32(t).as_ptr());
        for b in (0..n_blocks).step_by(FOUR) {
            // 64 bits at a time: 0, 1 are the lower 16 codes of the first block, 2, 3 the upper, and so on.
            let mask = (1u32 << (4 * (n_blocks - b).min(FOUR))) - 1;
            let from = from.add(32 * b).cast::<i64>();
            let x = _mm512_maskz_loadu_epi64(mask as u8, from);
            let y = _mm512_maskz_loadu_epi64((mask >> 8) as u8, from.add(8));
            let low = _mm512_permutex2var_epi64(x, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), y);
            let high = _mm512_permutex2var_epi64(x, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), y);
            store(token.codes, 32 * b, low);
            store(token.codes, 32 * b + 64, high);
            if F::BIAS != 0 {
                let (zero, bias) = (_mm512_setzero_si512(), _mm512_set1_epi8(F::BIAS as i8));
                let biases = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, bias, low), bias, high);
                store(token.extra, 16 * b, _mm512_sub_epi32(zero, biases));
            }
            if F::HAS_M {
                let mask = mask_of(n_blocks - b);
                let sums = _mm_cvtepi32_ps(_mm_maskz_loadu_epi32(mask, sums.add(b)));
                let terms = _mm_mul_ps(_mm_maskz_loadu_ps(mask, token.scales.add(b)), sums);
                _mm_storeu_ps(token.sums.cast_mut().add(4 * b).cast(), terms);
            }
        }
    }
    tokens
}

/// For blocks of 256: what [`Wide::x`] makes of each, and the sums of the sub-blocks as i16 (at most 32·127).
#[inline(always)]
unsafe fn large_tokens<F: Wide>(job: &Job<'_>, scratch: &mut Scratch) -> [Token; INT_PANEL_TOKENS] {
    let tokens = places(job, scratch);
    for t in 0..job.acts.n_tokens() {
        let token = tokens[t];
        for b in 0..job.weights.cols / 256 {
            let X { codes, extra } = F::x(job.acts.codes(t).as_ptr().add(256 * b));
            for v in 0..4 {
                store(token.codes, 256 * b + 64 * v, codes[v]);
                if F::EXTRA {
                    store(token.extra, 256 * b + 64 * v, extra[v]);
                }
            }
            if F::HAS_MINS {
                let to = token.sums.cast_mut().add(b * 512 / F::SUB);
                if F::SUB == 32 {
                    let sums = _mm256_loadu_si256(job.acts.sums32(t).as_ptr().add(8 * b).cast());
                    _mm_storeu_si128(to.cast(), _mm256_cvtepi32_epi16(sums));
                } else {
                    let sums = _mm512_loadu_si512(job.acts.sums16(t).as_ptr().add(16 * b).cast());
                    _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(sums));
                }
            }
        }
    }
    tokens
}

/// Ones for the first `n` of four.
#[inline(always)]
fn mask_of(n: usize) -> u8 {
    (1 << n.min(FOUR)) - 1
}

/// Lanes i + 8 added to lanes i, then i + 4.
#[inline(always)]
unsafe fn fold(x: __m512) -> __m128 {
    fold_eight(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x)))
}

/// Rows that go together, so that both use the activations that are loaded: those with scales beside them, those of other
/// blocks of 32 with several tokens, and those of blocks of 256 with one.
const PAIR: usize = 2;

/// Rows of blocks of 32, `R` at a time: a pair, or four short ones. A row has sixteen lanes of a sum: four blocks', four each.
struct Small<F, const R: usize> {
    tokens: [Token; INT_PANEL_TOKENS],
    of: PhantomData<F>,
}

/// Sums of a row of blocks of 32.
#[derive(Clone, Copy)]
struct SmallSums {
    products: __m512,
    offsets: __m128,
}

impl<F: Four, const R: usize> Few for Small<F, R> {
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
        let (p, n_blocks) = (job.weights.row_of(row, 32, F::BYTES), job.weights.cols / 32);
        let tokens = each!([self.tokens[0]; T], i => self.tokens[t + i]);
        let n_rows = (job.rows.end - row).min(R);
        if R == FOUR {
            let scales = RowScales::of(&job.weights, row..row + n_rows);
            return four_rows::<F, T>(p, &scales, &tokens, n_rows, out, r);
        }
        let pair = Pair::new(p, n_blocks, F::BYTES, n_rows);
        if F::BESIDE && n_blocks.is_multiple_of(LANES) {
            let scales = RowScales::of(&job.weights, row..row + n_rows);
            return two_beside_rows::<F, T>(&pair, &scales, &tokens, out, r);
        }
        // One token's activations are loaded fast enough, and memory is read faster row after row.
        if !F::BESIDE && T > 1 && n_blocks.is_multiple_of(FOUR) {
            return two_small_rows::<F, T>(&pair, &tokens, out, r);
        }
        for k in 0..n_rows {
            let scales = F::BESIDE.then(|| RowScales::of(&job.weights, row + k..row + k + 1));
            one_small_row::<F, T>(p.add(k * pair.row_bytes), scales.as_ref(), &tokens, n_blocks, out, r + k);
        }
    }
}

/// A row of `n_blocks` blocks at `p`, whose scales lie beside it or in them.
#[inline(always)]
unsafe fn one_small_row<F: Four, const T: usize>(
    p: *const u8,
    scales: Option<&RowScales<'_>>,
    x: &[Token; T],
    n_blocks: usize,
    out: &mut [[f32; LANES]; TOKENS],
    r: usize,
) {
    let mut sums = SmallSums::zeros();
    let whole = n_blocks / LANES * LANES;
    // What is left is a call of its own, so that the number of the others is a constant.
    for b in (0..whole).step_by(LANES) {
        some_blocks::<F, T>(p, scales, x, b, LANES, &mut sums);
    }
    if whole < n_blocks {
        some_blocks::<F, T>(p, scales, x, whole, n_blocks - whole, &mut sums);
    }
    SmallSums::put::<F, T>(&sums, out, r);
}

impl SmallSums {
    /// Of `T` tokens.
    #[inline(always)]
    unsafe fn zeros<const T: usize>() -> [Self; T] {
        [Self { products: _mm512_setzero_ps(), offsets: _mm_setzero_ps() }; T]
    }

    /// What the row comes to with each token, to `out[token][r]`.
    #[inline(always)]
    unsafe fn put<F: Four, const T: usize>(sums: &[Self; T], out: &mut [[f32; LANES]; TOKENS], r: usize) {
        for i in 0..T {
            out[i][r] = sum_four(fold(sums[i].products));
            if F::HAS_M {
                out[i][r] += sum_four(sums[i].offsets);
            }
        }
    }
}

/// The f16 at `at` of four blocks of 32, of which `n` exist.
#[inline(always)]
unsafe fn f16_four<F: Four>(p: &[*const u8; FOUR], at: usize, n: usize) -> __m128 {
    if n == FOUR && 3 * F::BYTES + 4 <= 64 {
        let word = |j: usize| ((at + j * F::BYTES) / 2) as i64;
        let words = _mm512_castsi128_si512(_mm_cvtsi64_si128(
            word(0) | word(1) << 16 | word(2) << 32 | word(3) << 48,
        ));
        let all = _mm512_permutexvar_epi16(words, _mm512_loadu_si512(p[0].cast()));
        return _mm_cvtph_ps(_mm512_castsi512_si128(all));
    }
    unpack::f16_four(p, at)
}

/// Numbers `j..j + 4`, each in four lanes.
#[inline(always)]
unsafe fn spread_four(x: __m512, j: usize) -> __m512 {
    let quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    _mm512_permutexvar_ps(_mm512_add_epi32(quarters, _mm512_set1_epi32(j as i32)), x)
}

/// Blocks `b..b + n` of the row at `p`, at most 16, whose scales lie beside it or in them.
#[inline(always)]
unsafe fn some_blocks<F: Four, const T: usize>(
    p: *const u8,
    scales: Option<&RowScales<'_>>,
    x: &[Token; T],
    b: usize,
    n: usize,
    sums: &mut [SmallSums; T],
) {
    let p = p.add(b * F::BYTES);
    match scales {
        Some(scales) => beside_blocks::<F, T>(p, scales, x, b, n, sums),
        None => small_blocks::<F, T>(p, x, b, n, sums),
    }
}

/// Blocks `b..b + n`, at most 16, the first of them at `p`.
#[inline(always)]
unsafe fn small_blocks<F: Four, const T: usize>(
    p: *const u8,
    x: &[Token; T],
    b: usize,
    n: usize,
    sums: &mut [SmallSums; T],
) {
    for j in (0..n).step_by(FOUR) {
        let (p, b, n) = (p.add(j * F::BYTES), b + j, FOUR.min(n - j));
        fetch_ahead(p, FOUR * F::BYTES, 0, 1);
        let p = four_blocks(p, F::BYTES, n);
        let d = f16_four::<F>(&p, 0, n);
        let codes = F::four(&p);
        for i in 0..T {
            let scales = _mm_maskz_loadu_ps(mask_of(n), x[i].scales.add(b));
            let factors = _mm512_castps128_ps512(_mm_mul_ps(d, scales));
            add_four::<F>(codes, spread_four(factors, 0), &x[i], b, &mut sums[i]);
        }
        if F::HAS_M {
            let m = f16_four::<F>(&p, 2, n);
            for i in 0..T {
                let terms = _mm_loadu_ps(x[i].sums.add(4 * b).cast());
                sums[i].offsets = _mm_fmadd_ps(m, terms, sums[i].offsets);
            }
        }
    }
}

/// The same of a row whose scales lie beside it; `n` is a multiple of 4.
#[inline(always)]
unsafe fn beside_blocks<F: Four, const T: usize>(
    p: *const u8,
    scales: &RowScales<'_>,
    x: &[Token; T],
    b: usize,
    n: usize,
    sums: &mut [SmallSums; T],
) {
    let d = scales.sixteen(b, n);
    let mask = scales::mask_of(n);
    let factors = each!([d; T], i => _mm512_mul_ps(d, _mm512_maskz_loadu_ps(mask, x[i].scales.add(b))));
    for j in (0..n).step_by(FOUR) {
        let p = p.add(j * F::BYTES);
        fetch_ahead(p, FOUR * F::BYTES, 0, 1);
        let codes = F::four(&four_blocks(p, F::BYTES, FOUR));
        for i in 0..T {
            add_four::<F>(codes, spread_four(factors[i], j), &x[i], b + j, &mut sums[i]);
        }
    }
}

/// The first `n` of four rows of eight blocks whose scales lie beside them, the first row at `p`.
#[inline(always)]
unsafe fn four_rows<F: Four, const T: usize>(
    p: *const u8,
    scales: &RowScales<'_>,
    x: &[Token; T],
    n: usize,
    out: &mut [[f32; LANES]; TOKENS],
    r: usize,
) {
    const BLOCKS: usize = 8;
    let x_scales = each!([_mm512_setzero_ps(); T], i => _mm512_broadcast_f32x8(_mm256_loadu_ps(x[i].scales)));
    for row0 in (0..n).step_by(2) {
        let n_rows = 2.min(n - row0);
        let d = scales.sixteen(row0 * BLOCKS, n_rows * BLOCKS);
        let factors = each!([d; T], i => _mm512_mul_ps(d, x_scales[i]));
        for row in 0..n_rows {
            let p = p.add((row0 + row) * BLOCKS * F::BYTES);
            let mut sums = SmallSums::zeros();
            for b in [0, FOUR] {
                let p = p.add(b * F::BYTES);
                fetch_ahead(p, FOUR * F::BYTES, 0, 1);
                let codes = F::four(&four_blocks(p, F::BYTES, FOUR));
                for i in 0..T {
                    add_four::<F>(codes, spread_four(factors[i], row * BLOCKS + b), &x[i], b, &mut sums[i]);
                }
            }
            SmallSums::put::<F, T>(&sums, out, r + row0 + row);
        }
    }
}

/// Two rows next to each other, which use the activations that are loaded together.
struct Pair {
    first: *const u8,
    n_blocks: usize,
    row_bytes: usize,
    /// How many rows further on the other lies: a last row without another is its own.
    second: usize,
}

impl Pair {
    /// `n_rows` rows, one or two, of `n_blocks` blocks, the first at `first`.
    #[inline(always)]
    fn new(first: *const u8, n_blocks: usize, block_bytes: usize, n_rows: usize) -> Self {
        Self { first, n_blocks, row_bytes: n_blocks * block_bytes, second: n_rows - 1 }
    }

    /// What lies `at` bytes into row `k`.
    #[inline(always)]
    unsafe fn row(&self, k: usize, at: usize) -> *const u8 {
        self.first.add(k * self.second * self.row_bytes + at)
    }

    /// Fetches ahead as if the rows were read front to back, which memory does best: `lines` behind the `read` bytes that have
    /// been read of both in turns. The second row is needed as soon as the first, so the distances count from a row further on.
    #[inline(always)]
    fn fetch(&self, read: usize, ahead: Ahead, lines: Range<usize>) {
        for line in lines {
            let p = self.first.wrapping_add(read + self.row_bytes + 64 * line);
            fetch_two(p.wrapping_add(ahead.near_bytes), p.wrapping_add(ahead.far_bytes));
        }
    }
}

/// How far ahead of what is read lines are fetched into the first-level cache and into the second-level one.
#[derive(Clone, Copy)]
struct Ahead {
    near_bytes: usize,
    far_bytes: usize,
}

const AHEAD: Ahead = Ahead { near_bytes: 1024, far_bytes: 16384 };
/// Beside the codes there are lines of scales under way.
const BESIDE_AHEAD: Ahead = Ahead { near_bytes: 512, far_bytes: 12288 };

/// Two rows whose scales lie beside them.
#[inline(always)]
unsafe fn two_beside_rows<F: Four, const T: usize>(
    pair: &Pair,
    scales: &RowScales<'_>,
    x: &[Token; T],
    out: &mut [[f32; LANES]; TOKENS],
    r: usize,
) {
    let (n_blocks, four_bytes) = (pair.n_blocks, FOUR * F::BYTES);
    let mut sums = [SmallSums::zeros::<T>(); PAIR];
    for b in (0..n_blocks).step_by(LANES) {
        let d = [scales.sixteen(b, LANES), scales.sixteen(pair.second * n_blocks + b, LANES)];
        let x_scales = each!([d[0]; T], i => _mm512_loadu_ps(x[i].scales.add(b)));
        let factors = each!([d; T], i => each!([d[0]; PAIR], k => _mm512_mul_ps(d[k], x_scales[i])));
        for j in (0..LANES).step_by(FOUR) {
            let at = (b + j) * F::BYTES;
            let mut codes = [[_mm512_setzero_si512(); 2]; PAIR];
            for k in 0..PAIR {
                pair.fetch(PAIR * at + k * four_bytes, BESIDE_AHEAD, lines_of_step(four_bytes, 0, 1));
                codes[k] = F::four(&four_blocks(pair.row(k, at), F::BYTES, FOUR));
            }
            for i in 0..T {
                for k in 0..PAIR {
                    add_four::<F>(codes[k], spread_four(factors[i][k], j), &x[i], b + j, &mut sums[k][i]);
                }
            }
        }
    }
    for k in 0..PAIR {
        SmallSums::put::<F, T>(&sums[k], out, r + k);
    }
}

/// Two rows with their scales in the blocks, which are a multiple of four.
#[inline(always)]
unsafe fn two_small_rows<F: Four, const T: usize>(
    pair: &Pair,
    x: &[Token; T],
    out: &mut [[f32; LANES]; TOKENS],
    r: usize,
) {
    let mut sums = [SmallSums::zeros::<T>(); PAIR];
    for b in (0..pair.n_blocks).step_by(FOUR) {
        let at = b * F::BYTES;
        let mut codes = [[_mm512_setzero_si512(); 2]; PAIR];
        let (mut d, mut m) = ([_mm_setzero_ps(); PAIR], [_mm_setzero_ps(); PAIR]);
        for k in 0..PAIR {
            pair.fetch(PAIR * at, AHEAD, lines_of_step(PAIR * FOUR * F::BYTES, k, PAIR));
            let p = four_blocks(pair.row(k, at), F::BYTES, FOUR);
            d[k] = f16_four::<F>(&p, 0, FOUR);
            if F::HAS_M {
                m[k] = f16_four::<F>(&p, 2, FOUR);
            }
            codes[k] = F::four(&p);
        }
        for i in 0..T {
            let x_scales = _mm_loadu_ps(x[i].scales.add(b));
            for k in 0..PAIR {
                let factors = _mm512_castps128_ps512(_mm_mul_ps(d[k], x_scales));
                add_four::<F>(codes[k], spread_four(factors, 0), &x[i], b, &mut sums[k][i]);
                if F::HAS_M {
                    let terms = _mm_loadu_ps(x[i].sums.add(4 * b).cast());
                    sums[k][i].offsets = _mm_fmadd_ps(m[k], terms, sums[k][i].offsets);
                }
            }
        }
    }
    for k in 0..PAIR {
        SmallSums::put::<F, T>(&sums[k], out, r + k);
    }
}

/// Adds the products of four blocks, the first of them the `b`-th, times `factors`.
#[inline(always)]
unsafe fn add_four<F: Four>(codes: [__m512i; 2], factors: __m512, x: &Token, b: usize, sums: &mut SmallSums) {
    let start = match F::BIAS {
        0 => _mm512_setzero_si512(),
        _ => _mm512_loadu_si512(x.extra.add(16 * b).cast()),
    };
    let dot = _mm512_dpbusd_epi32(start, codes[0], _mm512_loadu_si512(x.codes.add(32 * b).cast()));
    let dot = _mm512_dpbusd_epi32(dot, codes[1], _mm512_loadu_si512(x.codes.add(32 * b + 64).cast()));
    sums.products = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factors, sums.products);
}

/// Rows of blocks of 256, `R` at a time: a pair, or four rows of one block each.
struct Large<F, const R: usize> {
    tokens: [Token; INT_PANEL_TOKENS],
    of: PhantomData<F>,
}

/// Sums of `R` rows of blocks of 256: one, or four of one block each.
struct LargeSums<const T: usize, const R: usize> {
    /// A lane is a dword of the 64 bytes that the codes are read in.
    products: [[__m512; R]; T],
    /// A lane is two sub-blocks. Those of the blocks that are prepared together lie one after the other, in one vector
    /// or two, which are added if they are of one row.
    mins: [[__m512; 2]; T],
}

impl<F: Wide, const R: usize> Few for Large<F, R> {
    const ROWS: usize = R;
    /// What a token brings beside its codes takes as many loads as these, and of four tokens more than all else.
    const TOKENS: usize = if F::EXTRA { 2 } else { TOKENS };

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
        let tokens = each!([self.tokens[0]; T], i => self.tokens[t + i]);
        let n_rows = (job.rows.end - row).min(R);
        if R == FOUR {
            return four_large_rows::<F, T>(p, &tokens, n_rows, out, r);
        }
        // What several tokens share are the codes of a row; with those of two there would be too few registers.
        if T == 1 && n_blocks.is_multiple_of(FOUR) {
            let pair = Pair::new(p, n_blocks, F::BYTES, n_rows);
            return two_large_rows::<F>(&pair, &tokens[0], &mut out[0], r);
        }
        for k in 0..n_rows {
            one_large_row::<F, T>(p.add(k * n_blocks * F::BYTES), &tokens, n_blocks, out, r + k);
        }
    }
}

/// The first `n` of four rows of one block, the first of them at `p`.
#[inline(always)]
unsafe fn four_large_rows<F: Wide, const T: usize>(
    p: *const u8,
    x: &[Token; T],
    n: usize,
    out: &mut [[f32; LANES]; TOKENS],
    r: usize,
) {
    let zero = _mm512_setzero_ps();
    let mut sums = LargeSums { products: [[zero; FOUR]; T], mins: [[zero; 2]; T] };
    let mut room = [const { MaybeUninit::<Prepared<T>>::uninit() }; 1];
    let prepared = in_memory(&mut room);
    prepare::<F, T, FOUR>(p, x, 0, n, prepared);
    multiply::<F, T, FOUR>(p, x, 0, n, prepared, &mut sums);
    for i in 0..T {
        for j in 0..FOUR {
            out[i][r + j] = row_sum::<F>(sums.products[i][j], mins_of::<F>(&sums.mins[i], j));
        }
    }
}

/// A row of `n_blocks` blocks at `p`. Four blocks are prepared before those that come first are multiplied.
#[inline(always)]
unsafe fn one_large_row<F: Wide, const T: usize>(
    p: *const u8,
    x: &[Token; T],
    n_blocks: usize,
    out: &mut [[f32; LANES]; TOKENS],
    r: usize,
) {
    let zero = _mm512_setzero_ps();
    let mut sums = LargeSums { products: [[zero; 1]; T], mins: [[zero; 2]; T] };
    let mut room = [const { MaybeUninit::<Prepared<T>>::uninit() }; 2];
    let prepared = in_memory(&mut room);
    prepare::<F, T, 1>(p, x, 0, n_blocks.min(FOUR), prepared);
    for b in (0..n_blocks).step_by(FOUR) {
        let next = b + FOUR;
        if next < n_blocks {
            let to = prepared.add(next / FOUR % 2);
            prepare::<F, T, 1>(p.add(next * F::BYTES), x, next, (n_blocks - next).min(FOUR), to);
        }
        let (p, n, prepared) = (p.add(b * F::BYTES), n_blocks - b, prepared.add(b / FOUR % 2));
        match n < FOUR {
            false => multiply::<F, T, 1>(p, x, b, FOUR, prepared, &mut sums),
            true => multiply::<F, T, 1>(p, x, b, n, prepared, &mut sums),
        }
    }
    for i in 0..T {
        out[i][r] = row_sum::<F>(sums.products[i][0], fold(sums.mins[i][0]));
    }
}

/// Two rows of blocks of 256, a multiple of four, times one token. Four blocks of both are prepared before those that come
/// first are multiplied.
#[inline(always)]
unsafe fn two_large_rows<F: Wide>(pair: &Pair, x: &Token, out: &mut [f32; LANES], r: usize) {
    let (x, n_blocks, zero) = (&[*x], pair.n_blocks, _mm512_setzero_ps());
    let (mut products, mut mins) = ([zero; PAIR], [zero; PAIR]);
    let mut room = [const { MaybeUninit::<Prepared<1>>::uninit() }; 2 * PAIR];
    let prepared = in_memory(&mut room);
    for k in 0..PAIR {
        prepare::<F, 1, 1>(pair.row(k, 0), x, 0, FOUR, prepared.add(k));
    }
    for b in (0..n_blocks).step_by(FOUR) {
        let next = b + FOUR;
        if next < n_blocks {
            let to = prepared.add(next / FOUR % 2 * PAIR);
            for k in 0..PAIR {
                prepare::<F, 1, 1>(pair.row(k, next * F::BYTES), x, next, FOUR, to.add(k));
            }
        }
        let prepared = prepared.add(b / FOUR % 2 * PAIR);
        let now = each!([pair.first; PAIR], k => pair.row(k, b * F::BYTES));
        let lines = |i| lines_of_step(PAIR * FOUR * F::BYTES, i, 4 * FOUR);
        let fetch = |i| pair.fetch(PAIR * b * F::BYTES, AHEAD, lines(i));
        pair_block::<F, 0>(&now, &x[0], b, prepared, fetch, &mut products);
        pair_block::<F, 1>(&now, &x[0], b, prepared, fetch, &mut products);
        pair_block::<F, 2>(&now, &x[0], b, prepared, fetch, &mut products);
        pair_block::<F, 3>(&now, &x[0], b, prepared, fetch, &mut products);
        for h in 0..if F::HAS_MINS { 32 / F::SUB } else { 0 } {
            let x_sums = _mm512_loadu_si512(x[0].sums.add(b * 512 / F::SUB + 64 * h).cast());
            for k in 0..PAIR {
                mins[k] = add_mins::<F, 1>(prepared.add(k), 0, h, x_sums, mins[k]);
            }
        }
    }
    for k in 0..PAIR {
        out[r + k] = row_sum::<F>(products[k], fold(mins[k]));
    }
}

/// What a row comes to: the sum of its products, less what its minimums take from it.
#[inline(always)]
unsafe fn row_sum<F: Wide>(products: __m512, mins: __m128) -> f32 {
    let sum = sum_four(fold(products));
    if F::HAS_MINS { sum - sum_four(mins) } else { sum }
}

/// Room for what is prepared that the compiler has to keep in memory, see [`Prepared`].
#[inline(always)]
fn in_memory<const T: usize>(room: &mut [MaybeUninit<Prepared<T>>]) -> *mut Prepared<T> {
    black_box(room.as_mut_ptr()).cast()
}

/// The minimums of row `j` of four, down to four lanes.
#[inline(always)]
unsafe fn mins_of<F: Wide>(mins: &[__m512; 2], j: usize) -> __m128 {
    match F::SUB {
        32 => match j {
            0 => _mm512_castps512_ps128(mins[0]),
            1 => _mm512_extractf32x4_ps::<1>(mins[0]),
            2 => _mm512_extractf32x4_ps::<2>(mins[0]),
            _ => _mm512_extractf32x4_ps::<3>(mins[0]),
        },
        _ if j.is_multiple_of(2) => fold_eight(_mm512_castps512_ps256(mins[j / 2])),
        _ => fold_eight(_mm512_extractf32x8_ps::<1>(mins[j / 2])),
    }
}

/// What four blocks have once, with the scales of `T` tokens. It is in memory, where a later instruction can spread a
/// part of it as it loads it, which from a register takes another.
struct Prepared<const T: usize> {
    /// Of the sub-blocks, block after block.
    scales: [[i16; 32]; 2],
    mins: [[i16; 32]; 2],
    /// Scales of blocks and activations multiplied.
    d: [[f32; FOUR]; T],
    dmin: [[f32; FOUR]; T],
}

/// Prepares `n` blocks, the first of them at `p`: `b..b + n` of a row, or the first of as many rows.
#[inline(always)]
unsafe fn prepare<F: Wide, const T: usize, const R: usize>(
    p: *const u8,
    x: &[Token; T],
    b: usize,
    n: usize,
    to: *mut Prepared<T>,
) {
    let Head { scales, mins, d, dmin } = F::head(&four_blocks(p, F::BYTES, n));
    for h in 0..32 / F::SUB {
        _mm512_storeu_si512((&raw mut (*to).scales[h]).cast(), scales[h]);
        if F::HAS_MINS {
            _mm512_storeu_si512((&raw mut (*to).mins[h]).cast(), mins[h]);
        }
    }
    for i in 0..T {
        let x_scales = match R {
            1 => _mm_maskz_loadu_ps(mask_of(n), x[i].scales.add(b)),
            _ => _mm_set1_ps(*x[i].scales),
        };
        _mm_storeu_ps((&raw mut (*to).d[i]).cast(), _mm_mul_ps(d, x_scales));
        if F::HAS_MINS {
            _mm_storeu_ps((&raw mut (*to).dmin[i]).cast(), _mm_mul_ps(dmin, x_scales));
        }
    }
}

/// Adds the products of blocks that were prepared; see [`prepare`].
#[inline(always)]
unsafe fn multiply<F: Wide, const T: usize, const R: usize>(
    p: *const u8,
    x: &[Token; T],
    b: usize,
    n: usize,
    prepared: *const Prepared<T>,
    sums: &mut LargeSums<T, R>,
) {
    let p = four_blocks(p, F::BYTES, n);
    // One after the other by hand: as a loop it would not be unrolled, and look everything up by number.
    large_block::<F, T, R, 0>(&p, x, b, n, prepared, sums);
    large_block::<F, T, R, 1>(&p, x, b, n, prepared, sums);
    large_block::<F, T, R, 2>(&p, x, b, n, prepared, sums);
    large_block::<F, T, R, 3>(&p, x, b, n, prepared, sums);
    if F::HAS_MINS {
        for i in 0..T {
            for h in 0..32 / F::SUB {
                let x_sums = match (R, F::SUB) {
                    (1, _) => _mm512_loadu_si512(x[i].sums.add(b * 512 / F::SUB + 64 * h).cast()),
                    (_, 32) => _mm512_broadcast_i32x4(_mm_loadu_si128(x[i].sums.cast())),
                    _ => _mm512_broadcast_i64x4(_mm256_loadu_si256(x[i].sums.cast())),
                };
                let sum = &mut sums.mins[i][if R == 1 { 0 } else { h }];
                *sum = add_mins::<F, T>(prepared, i, h, x_sums, *sum);
            }
        }
    }
}

/// Adds what minimums `mins[h]` of four blocks take from the products of token `i`, whose sums of sub-blocks are `x_sums`.
#[inline(always)]
unsafe fn add_mins<F: Wide, const T: usize>(
    prepared: *const Prepared<T>,
    i: usize,
    h: usize,
    x_sums: __m512i,
    sum: __m512,
) -> __m512 {
    let dmin = _mm512_castps128_ps512(_mm_loadu_ps((&raw const (*prepared).dmin[i]).cast()));
    let mins = _mm512_loadu_si512((&raw const (*prepared).mins[h]).cast());
    let dots = _mm512_cvtepi32_ps(_mm512_madd_epi16(mins, x_sums));
    _mm512_fmadd_ps(dots, _mm512_permutexvar_ps(mins_blocks::<F>(h), dmin), sum)
}

/// Block `J` of four, if it is one of the `n` that exist.
#[inline(always)]
unsafe fn large_block<F: Wide, const T: usize, const R: usize, const J: usize>(
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
    let codes = F::codes64(p[J]);
    let scales = scales_of::<F, T, J>(prepared);
    let b = if R == 1 { b + J } else { 0 };
    let mut dots = [_mm512_setzero_si512(); T];
    for v in 0..4 {
        fetch_ahead(p[0], FOUR * F::BYTES, 4 * J + v, 4 * FOUR);
        let scale = F::spread_scales(&scales, v);
        for i in 0..T {
            // No lane overflows: it gets 16 products of at most 63·127 times a scale of at most 128, or of
            // 127·127 times one of at most 32.
            let (codes_of_x, extra) = x[i].vector::<F>(256 * b + 64 * v);
            dots[i] = dot_words(dots[i], F::pairs(codes[v], codes_of_x, extra), scale);
        }
    }
    for i in 0..T {
        let sum = &mut sums.products[i][J * R / FOUR];
        *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i]), _mm512_set1_ps((*prepared).d[i][J]), *sum);
    }
}

/// Block `J` of four of two rows, which begin at `p`; `fetch(i)` is told of each of sixteen steps through the four.
#[inline(always)]
unsafe fn pair_block<F: Wide, const J: usize>(
    p: &[*const u8; PAIR],
    x: &Token,
    b: usize,
    prepared: *const Prepared<1>,
    fetch: impl Fn(usize),
    sums: &mut [__m512; PAIR],
) {
    let codes = each!([[_mm512_setzero_si512(); 4]; PAIR], k => F::codes64(p[k].add(J * F::BYTES)));
    let scales = each!([[_mm512_setzero_si512(); 2]; PAIR], k => scales_of::<F, 1, J>(prepared.add(k)));
    let mut dots = [_mm512_setzero_si512(); PAIR];
    for v in 0..4 {
        fetch(4 * J + v);
        let (codes_of_x, extra) = x.vector::<F>(256 * (b + J) + 64 * v);
        for k in 0..PAIR {
            let scale = F::spread_scales(&scales[k], v);
            dots[k] = dot_words(dots[k], F::pairs(codes[k][v], codes_of_x, extra), scale);
        }
    }
    for k in 0..PAIR {
        let d = _mm512_set1_ps((*prepared.add(k)).d[0][J]);
        sums[k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[k]), d, sums[k]);
    }
}

/// The scales of block `J`; see [`Wide::eights`]. They are loaded once for all its products, since a core does not load more than
/// one vector a cycle.
#[inline(always)]
unsafe fn scales_of<F: Wide, const T: usize, const J: usize>(prepared: *const Prepared<T>) -> [__m512i; 2] {
    F::eights((&raw const (*prepared).scales).cast::<i16>().add(J * 256 / F::SUB))
}

/// Which of four blocks each lane of `mins[h]` belongs to.
#[inline(always)]
unsafe fn mins_blocks<F: Wide>(h: usize) -> __m512i {
    let blocks = match F::SUB {
        32 => _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
        _ => _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
    };
    _mm512_add_epi32(blocks, _mm512_set1_epi32(2 * h as i32))
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
