//! Many tokens: tiles of 2 rows by 16 tokens, or 4 rows by 8.
//!
//! Without a dot-product instruction, products are summed in i16 as long as the codes' size allows it exactly, then
//! widened.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::Avx2;
use crate::kernels::acts::Group;
use crate::kernels::matmul::{Job, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::x86::panel::{
    Format, HALF, InLarge, InSmall, Panel, Rows, STRIDE, SUBS, Sweep, product, sums_of,
};
use crate::kernels::x86::unpack::{Large, Small};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn small<F: Small>(job: &Job<'_>, scratch: &mut Scratch) {
    product::<InSmall<F>, Maddubs>(job, scratch);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn large<F: Large>(job: &Job<'_>, scratch: &mut Scratch) {
    product::<InLarge<F>, Maddubs>(job, scratch);
}

struct Maddubs;

impl<F: Format> Sweep<F> for Maddubs {
    type Lanes = Avx2;
    /// Between its tiles, fetching costs 3 %.
    const FETCHES_NEXT: bool = false;

    #[inline(always)]
    unsafe fn expand(step: usize, rows: &Rows, prepared: *mut F::Prepared) {
        F::expand(step, rows, taken_off(F::BIAS), prepared);
    }

    #[inline(always)]
    unsafe fn sweep(panel: &Panel, job: &Job<'_>, n_rows: usize, k0: usize, n: usize) {
        for g in 0..job.acts.n_groups() {
            match job.acts.n_tokens() - g * LANES {
                0..=HALF => group::<F, 4, 1>(panel, job, n_rows, g, k0, n),
                _ => group::<F, 2, 2>(panel, job, n_rows, g, k0, n),
            }
        }
    }
}

/// What expansion takes off a code that has `bias`: that of codes of 8 bits, which are multiplied by size and sign; smaller
/// ones are unsigned.
const fn taken_off(bias: u8) -> u8 {
    if bias == 128 { 128 } else { 0 }
}

/// All rows times the tokens of group `g`, or its first eight, `R` rows at a time.
#[inline(always)]
unsafe fn group<F: Format, const R: usize, const H: usize>(
    panel: &Panel,
    job: &Job<'_>,
    n_rows: usize,
    g: usize,
    k0: usize,
    n: usize,
) {
    let acts = job.acts.group(g);
    for r in (0..n_rows).step_by(R) {
        tile::<F, R, H>(panel, &acts, r, g, k0, n);
    }
}

/// Columns / 4 whose pairs of products may be summed in i16: 2·127·code each.
const fn exact_steps(max_code: usize, sub: usize) -> usize {
    let mut steps = sub / 4;
    while steps * 2 * 127 * max_code > i16::MAX as usize {
        steps /= 2;
    }
    steps
}

/// What a tile reads, from its first row and column on.
struct Tile {
    /// [row][[`STRIDE`]]
    codes: *const u8,
    /// [row][[`SUBS`]]
    scales: *const f32,
    offsets: *const f32,
    /// [column / 4][16][4]
    x: *const i8,
    /// [sub-block][16]
    x_sums: *const i32,
    /// [block][16]
    x_scales: *const f32,
}

impl Tile {
    /// Rows `r..` of the panel and `n` columns, `k0..` of the activations. That they have these is checked here, once.
    #[inline(always)]
    unsafe fn new<F: Format>(panel: &Panel, acts: &Group<'_>, r: usize, k0: usize, n: usize) -> Self {
        let sums = sums_of::<F>(acts, (k0 + n) / F::SUB - 1); // the last
        Self {
            codes: panel.codes.add(r * STRIDE),
            scales: panel.scales.add(r * SUBS),
            offsets: panel.offsets.add(r * SUBS),
            x: acts.codes[k0 * LANES..][..n * LANES].as_ptr(),
            x_sums: sums.sub((n / F::SUB - 1) * LANES),
            x_scales: acts.scales[k0 / F::BLOCK * LANES..][..n / F::BLOCK * LANES].as_ptr(),
        }
    }
}

/// `R` rows by `H` times eight tokens.
#[inline(always)]
unsafe fn tile<F: Format, const R: usize, const H: usize>(
    panel: &Panel,
    acts: &Group<'_>,
    r: usize,
    g: usize,
    k0: usize,
    n: usize,
) {
    let tile = Tile::new::<F>(panel, acts, r, k0, n);
    let mut floats = [[_mm256_setzero_ps(); H]; R];
    for sub in 0..n / F::SUB {
        let sums = tile.x_sums.add(sub * LANES);
        let sums = each!([_mm256_setzero_si256(); H], h => _mm256_loadu_si256(sums.add(8 * h).cast()));
        let dots = dots::<F, R, H>(&tile, sub, &sums);
        scale::<F, R, H>(&tile, sub, &dots, &sums, &mut floats);
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
unsafe fn dots<F: Format, const R: usize, const H: usize>(
    tile: &Tile,
    sub: usize,
    sums: &[__m256i; H],
) -> [[__m256i; H]; R] {
    let left = F::BIAS - taken_off(F::BIAS);
    let mut dots = [[_mm256_setzero_si256(); H]; R];
    if left != 0 {
        let start = _mm256_set1_epi32(-i32::from(left));
        dots = [each!([start; H], h => _mm256_mullo_epi32(sums[h], start)); R];
    }
    let ones = _mm256_set1_epi16(1);
    let (codes, x) = (tile.codes.add(sub * F::SUB), tile.x.add(sub * F::SUB * LANES));
    let steps = if F::BITS == 8 { 1 } else { exact_steps((1 << F::BITS) - 1, F::SUB) };
    for k0 in (0..F::SUB / 4).step_by(steps) {
        let mut pairs = [[_mm256_setzero_si256(); H]; R];
        for k in k0..k0 + steps {
            let x = each!([ones; H], h => _mm256_loadu_si256(x.add(4 * k * LANES + 32 * h).cast()));
            for i in 0..R {
                let w = _mm256_set1_epi32(codes.add(i * STRIDE + 4 * k).cast::<i32>().read_unaligned());
                for h in 0..H {
                    let products = match F::BITS {
                        8 => _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x[h], w)),
                        _ => _mm256_maddubs_epi16(w, x[h]),
                    };
                    pairs[i][h] = _mm256_add_epi16(pairs[i][h], products);
                }
            }
        }
        for i in 0..R {
            for h in 0..H {
                dots[i][h] = _mm256_add_epi32(dots[i][h], _mm256_madd_epi16(pairs[i][h], ones));
            }
        }
    }
    dots
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
