//! Many tokens: tiles of 4 rows by 16 tokens, or 2 by 16, or 4 by 8.
//!
//! Where there is no dot product of bytes to i32, there are two instructions to build it from: one multiplies bytes and sums
//! two products in i16 ([`Bytes`], [`Signs`]), which is exact for small codes and for those of 6 bits still, the other does so
//! with half as many words in i32 ([`Words`]). A tile is the same loop with any, over [`STEP`] bytes of each row and token.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::Avx2;
use crate::kernels::acts::Group;
use crate::kernels::matmul::{Job, PANEL_ROWS, Scratch, panel_rows};
use crate::kernels::memory::LANES;
use crate::kernels::x86::panel::{
    Format, HALF, InLarge, InSmall, Panel, Rows, STRIDE, SUBS, Sweep, WORD_STRIDE, product, sums_of,
};
use crate::kernels::x86::unpack::{Large, Small};
use std::arch::x86_64::*;
use std::hint::black_box;
use std::marker::PhantomData;
use std::ops::Range;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn small<F: Small>(job: &Job<'_>, scratch: &mut Scratch) {
    match InSmall::<F>::BITS {
        8 if panel_rows(job.acts.n_tokens()) < PANEL_ROWS => {
            product::<InSmall<F>, Tiles<Signs>>(job, scratch)
        }
        8 => product::<InSmall<F>, Tiles<Words>>(job, scratch),
        _ => product::<InSmall<F>, Tiles<Bytes>>(job, scratch),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn large<F: Large>(job: &Job<'_>, scratch: &mut Scratch) {
    match F::BITS {
        8 if panel_rows(job.acts.n_tokens()) < PANEL_ROWS => {
            product::<InLarge<F>, Tiles<Signs>>(job, scratch)
        }
        8 => product::<InLarge<F>, Tiles<Words>>(job, scratch),
        _ => product::<InLarge<F>, Tiles<Bytes>>(job, scratch),
    }
}

/// Bytes of a row's codes, and of each token's, in a step.
const STEP: usize = 4;

/// Codes and activations as a multiplication takes them.
#[derive(Clone, Copy)]
struct Operands {
    /// [row][`stride`]
    codes: *const u8,
    stride: usize,
    /// [step][16][[`STEP`]]
    x: *const u8,
}

/// An instruction that multiplies integers.
trait Multiply {
    /// Columns of a step.
    const COLS: usize;
    /// What expansion takes off a code that has `bias`.
    fn taken_off(bias: u8) -> u8;
    /// Steps whose products may be summed as they are, of a sub-block's.
    fn steps<F: Format>() -> usize;
    /// Brings `n` columns of `n_rows` rows of a panel to where [`Self::operands`] has them.
    unsafe fn prepare(panel: &Panel, n_rows: usize, n: usize);
    /// The panel, and of `n` columns of activations that lie at `x`, [column / 4][16][4], the first `H` times eight tokens.
    unsafe fn operands<const H: usize>(panel: &Panel, x: *const i8, n: usize) -> Operands;
    /// Sums of products of neighbours.
    unsafe fn products(codes: __m256i, x: __m256i) -> __m256i;
    /// Sums of these.
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i;
    /// A token's sums in a lane of i32 each.
    unsafe fn widened(sums: __m256i) -> __m256i;
}

/// vpmaddubsw: codes are unsigned, and have at most 6 bits.
struct Bytes;

impl Multiply for Bytes {
    const COLS: usize = STEP;
    /// Nothing; the products get it taken off with the activations' sums.
    fn taken_off(_: u8) -> u8 {
        0
    }
    fn steps<F: Format>() -> usize {
        let mut steps = F::SUB / STEP;
        while steps * 2 * 127 * ((1 << F::BITS) - 1) > i16::MAX as usize {
            steps /= 2;
        }
        steps
    }
    #[inline(always)]
    unsafe fn prepare(_: &Panel, _: usize, _: usize) {}
    #[inline(always)]
    unsafe fn operands<const H: usize>(panel: &Panel, x: *const i8, _: usize) -> Operands {
        Operands { codes: panel.codes, stride: STRIDE, x: x.cast() }
    }
    #[inline(always)]
    unsafe fn products(codes: __m256i, x: __m256i) -> __m256i {
        _mm256_maddubs_epi16(codes, x)
    }
    #[inline(always)]
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi16(a, b)
    }
    #[inline(always)]
    unsafe fn widened(sums: __m256i) -> __m256i {
        _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
    }
}

/// vpmaddubsw by magnitude and sign: codes are signed, and no two products fit i16. For low panels, of which making words would
/// take as long as a tenth of their products and more.
struct Signs;

impl Multiply for Signs {
    const COLS: usize = STEP;
    fn taken_off(bias: u8) -> u8 {
        bias
    }
    fn steps<F: Format>() -> usize {
        1
    }
    #[inline(always)]
    unsafe fn prepare(_: &Panel, _: usize, _: usize) {}
    #[inline(always)]
    unsafe fn operands<const H: usize>(panel: &Panel, x: *const i8, n: usize) -> Operands {
        Bytes::operands::<H>(panel, x, n)
    }
    #[inline(always)]
    unsafe fn products(codes: __m256i, x: __m256i) -> __m256i {
        _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes)) // at most 2·128·127
    }
    #[inline(always)]
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
        Bytes::add(a, b)
    }
    #[inline(always)]
    unsafe fn widened(sums: __m256i) -> __m256i {
        Bytes::widened(sums)
    }
}

/// vpmaddwd: codes are signed.
struct Words;

impl Multiply for Words {
    const COLS: usize = STEP / 2;
    fn taken_off(bias: u8) -> u8 {
        bias
    }
    fn steps<F: Format>() -> usize {
        F::SUB / Self::COLS
    }
    #[inline(always)]
    unsafe fn prepare(panel: &Panel, n_rows: usize, n: usize) {
        for r in 0..n_rows.next_multiple_of(4) {
            let (from, to) = (panel.codes.add(r * STRIDE), panel.words.add(r * WORD_STRIDE));
            for k in (0..n).step_by(16) {
                let words = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.add(k).cast()));
                _mm256_storeu_si256(to.add(2 * k).cast(), words);
            }
        }
    }
    #[inline(always)]
    unsafe fn operands<const H: usize>(panel: &Panel, x: *const i8, n: usize) -> Operands {
        let to: *mut u8 = panel.tiles.cast();
        // The first and the last two of a token's four columns, each as the upper byte of a word.
        let upper = |a: i8, b: i8| {
            let four = |i: i8| {
                _mm_setr_epi8(-1, i + a, -1, i + b, -1, i + 4 + a, -1, i + 4 + b, 0, 0, 0, 0, 0, 0, 0, 0)
            };
            _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(four(0), four(8)))
        };
        let pairs = [upper(0, 1), upper(2, 3)];
        for k in (0..n).step_by(4) {
            for half in (0..H).map(|h| 32 * h) {
                let x = _mm256_loadu_si256(x.add(k * LANES + half).cast());
                for (i, &pair) in pairs.iter().enumerate() {
                    let words = _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(x, pair));
                    _mm256_storeu_si256(to.add((k / 2 + i) * LANES * STEP + half).cast(), words);
                }
            }
        }
        Operands { codes: panel.words, stride: WORD_STRIDE, x: to }
    }
    #[inline(always)]
    unsafe fn products(codes: __m256i, x: __m256i) -> __m256i {
        _mm256_madd_epi16(codes, x)
    }
    #[inline(always)]
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn widened(sums: __m256i) -> __m256i {
        sums
    }
}

struct Tiles<M>(PhantomData<M>);

impl<F: Format, M: Multiply> Sweep<F> for Tiles<M> {
    type Lanes = Avx2;
    /// Between its tiles, fetching costs 3 %.
    const FETCHES_NEXT: bool = false;

    #[inline(always)]
    unsafe fn expand(step: usize, rows: &Rows, prepared: *mut F::Prepared) {
        F::expand(step, rows, M::taken_off(F::BIAS), prepared);
    }

    #[inline(always)]
    unsafe fn sweep(panel: &Panel, job: &Job<'_>, n_rows: usize, k0: usize, n: usize) {
        M::prepare(panel, n_rows, n);
        for g in 0..job.acts.n_groups() {
            match job.acts.n_tokens() - g * LANES {
                0..=HALF => group::<F, M, 4, 1>(panel, job, n_rows, g, k0, n),
                _ if is_tall::<F, M>() => group::<F, M, 4, 2>(panel, job, n_rows, g, k0, n),
                _ => group::<F, M, 2, 2>(panel, job, n_rows, g, k0, n),
            }
        }
    }
}

/// Whether a tile has four rows instead of two: not if it needs two sets of sums, in i16 and i32, or multiplies quickly and
/// has minimums every 32 columns, beside which the sums of four would not stay in registers.
fn is_tall<F: Format, M: Multiply>() -> bool {
    M::steps::<F>() * M::COLS == F::SUB && !(F::SUB == 32 && F::HAS_OFFSETS)
}

/// All rows times the tokens of group `g`, or its first eight.
#[inline(always)]
unsafe fn group<F: Format, M: Multiply, const R: usize, const H: usize>(
    panel: &Panel,
    job: &Job<'_>,
    n_rows: usize,
    g: usize,
    k0: usize,
    n: usize,
) {
    let acts = job.acts.group(g);
    let operands = M::operands::<H>(panel, acts.codes[k0 * LANES..][..n * LANES].as_ptr(), n);
    for r in (0..n_rows).step_by(R) {
        tile::<F, M, R, H>(panel, &Tile::new::<F>(panel, &acts, &operands, r, k0, n), r, g, n);
    }
}

/// What a tile reads, from its first row and column on.
struct Tile {
    operands: Operands,
    /// [row][[`SUBS`]]
    scales: *const f32,
    offsets: *const f32,
    /// [sub-block][16]
    x_sums: *const i32,
    /// [block][16]
    x_scales: *const f32,
}

impl Tile {
    /// Rows `r..` of the panel and `n` columns, `k0..` of the activations. That these have so many is checked here, once.
    #[inline(always)]
    unsafe fn new<F: Format>(
        panel: &Panel,
        acts: &Group<'_>,
        operands: &Operands,
        r: usize,
        k0: usize,
        n: usize,
    ) -> Self {
        let sums = sums_of::<F>(acts, (k0 + n) / F::SUB - 1); // the last
        Self {
            operands: Operands { codes: operands.codes.add(r * operands.stride), ..*operands },
            scales: panel.scales.add(r * SUBS),
            offsets: panel.offsets.add(r * SUBS),
            x_sums: sums.sub((n / F::SUB - 1) * LANES),
            x_scales: acts.scales[k0 / F::BLOCK * LANES..][..n / F::BLOCK * LANES].as_ptr(),
        }
    }
}

/// Four rows by `H` times eight tokens.
#[inline(always)]
unsafe fn tile<F: Format, M: Multiply, const R: usize, const H: usize>(
    panel: &Panel,
    tile: &Tile,
    r: usize,
    g: usize,
    n: usize,
) {
    let mut floats = [[_mm256_setzero_ps(); H]; R];
    for sub in 0..n / F::SUB {
        let sums = tile.x_sums.add(sub * LANES);
        let sums = each!([_mm256_setzero_si256(); H], h => _mm256_loadu_si256(sums.add(8 * h).cast()));
        let dots = dots::<F, M, R, H>(tile, sub, &sums);
        scale::<F, R, H>(tile, sub, &dots, &sums, &mut floats);
        if F::BLOCK == 256 && (sub + 1).is_multiple_of(256 / F::SUB) {
            let scales = tile.x_scales.add(sub * F::SUB / 256 * LANES);
            for i in 0..R {
                for h in 0..H {
                    let to = panel.sums(g, r + i).add(8 * h);
                    let scale = _mm256_loadu_ps(scales.add(8 * h));
                    _mm256_storeu_ps(to, _mm256_fmadd_ps(floats[i][h], scale, _mm256_loadu_ps(to)));
                    floats[i][h] = _mm256_setzero_ps();
                }
            }
        }
    }
    if F::BLOCK == 32 {
        for i in 0..R {
            for h in 0..H {
                let to = panel.sums(g, r + i).add(8 * h);
                _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), floats[i][h]));
            }
        }
    }
}

/// Integer products of a sub-block; `sums` are those of the activations' codes.
#[inline(always)]
unsafe fn dots<F: Format, M: Multiply, const R: usize, const H: usize>(
    tile: &Tile,
    sub: usize,
    sums: &[__m256i; H],
) -> [[__m256i; H]; R] {
    let all = F::SUB / M::COLS;
    let steps = M::steps::<F>();
    let mut dots = [[_mm256_setzero_si256(); H]; R];
    let left = F::BIAS - M::taken_off(F::BIAS);
    if left != 0 {
        let start = _mm256_set1_epi32(-i32::from(left));
        dots = [each!([start; H], h => _mm256_mullo_epi32(sums[h], start)); R];
    }
    for step in (sub * all..(sub + 1) * all).step_by(steps) {
        let mut end = step + steps;
        if R * H == 8 && steps == all {
            // Were the number known, the compiler would take row after row, and put the activations on the stack.
            end = black_box(end);
        }
        let some = run::<F, M, R, H>(&tile.operands, step..end);
        for i in 0..R {
            for h in 0..H {
                dots[i][h] = _mm256_add_epi32(dots[i][h], M::widened(some[i][h]));
            }
        }
    }
    dots
}

/// Sums of the products of `n` steps from `first` on.
#[inline(always)]
unsafe fn run<F: Format, M: Multiply, const R: usize, const H: usize>(
    operands: &Operands,
    steps: Range<usize>,
) -> [[__m256i; H]; R] {
    let Operands { codes, stride, x } = *operands;
    let mut sums = [[_mm256_setzero_si256(); H]; R];
    let together = if M::steps::<F>() == 1 { 1 } else { 2 };
    for step in steps.step_by(together) {
        for step in step..step + together {
            let x = each!([_mm256_setzero_si256(); H], h => _mm256_loadu_si256(
                x.add((step * LANES + 8 * h) * STEP).cast()
            ));
            for i in 0..R {
                let codes = codes.add(i * stride + STEP * step).cast::<i32>().read_unaligned();
                for h in 0..H {
                    sums[i][h] = M::add(sums[i][h], M::products(_mm256_set1_epi32(codes), x[h]));
                }
            }
        }
    }
    sums
}

/// Integers of a sub-block, times the scale of its activations where those are in blocks of 32.
#[inline(always)]
unsafe fn scaled<F: Format>(tile: &Tile, sub: usize, h: usize, x: __m256i) -> __m256 {
    match F::BLOCK {
        32 => {
            let scales = _mm256_loadu_ps(tile.x_scales.add(sub * LANES + 8 * h));
            _mm256_mul_ps(_mm256_cvtepi32_ps(x), scales)
        }
        _ => _mm256_cvtepi32_ps(x),
    }
}

/// Scales integer products and adds them; `sums` are those of the activations' codes.
#[inline(always)]
unsafe fn scale<F: Format, const R: usize, const H: usize>(
    tile: &Tile,
    sub: usize,
    dots: &[[__m256i; H]; R],
    sums: &[__m256i; H],
    floats: &mut [[__m256; H]; R],
) {
    for i in 0..R {
        let scale = _mm256_set1_ps(*tile.scales.add(i * SUBS + sub));
        for h in 0..H {
            floats[i][h] = _mm256_fmadd_ps(scaled::<F>(tile, sub, h, dots[i][h]), scale, floats[i][h]);
            if F::HAS_OFFSETS {
                let offset = _mm256_set1_ps(*tile.offsets.add(i * SUBS + sub));
                floats[i][h] = _mm256_fmadd_ps(offset, scaled::<F>(tile, sub, h, sums[h]), floats[i][h]);
            }
        }
    }
}
