//! Many tokens with vpdpbusd: tiles of 4 rows by up to 3 groups of 16 tokens.
//!
//! Per four columns a tile of 4 by 48 takes 4 broadcasts of weights, 3 loads of activations and 12 dot products, so
//! loads are no limit; per sub-block of 32, 96 dot products stand beside 12 conversions and 12 or 24 multiply-adds,
//! which leaves 73 % (with minimums) or 80 % of the peak where all of these share two ports.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::Avx512;
use super::as_int8::AsInt8;
use crate::kernels::acts::Group;
use crate::kernels::matmul::{Job, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::x86::panel::{Format, InLarge, InSmall, Panel, STRIDE, SUBS, Sweep, product, sums_of};
use crate::kernels::x86::unpack::{Large, Small};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn small<F: Small>(job: &Job<'_>, scratch: &mut Scratch) {
    product::<InSmall<F>, Vnni>(job, scratch);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn large<F: Large>(job: &Job<'_>, scratch: &mut Scratch) {
    product::<InLarge<F>, Vnni>(job, scratch);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn as_int8(job: &Job<'_>, scratch: &mut Scratch) {
    product::<AsInt8, Vnni>(job, scratch);
}

struct Vnni;

impl Sweep for Vnni {
    type Lanes = Avx512;

    /// Nothing: vpdpbusd takes the weights unsigned.
    fn taken_off(_bias: u8) -> u8 {
        0
    }

    #[inline(always)]
    unsafe fn sweep<F: Format>(panel: &Panel, job: &Job<'_>, n_rows: usize, k0: usize, n: usize) {
        let n_groups = job.acts.n_groups();
        let mut g = 0;
        while g < n_groups {
            match n_groups - g {
                1 => groups::<F, 8, 1>(panel, job, n_rows, g, k0, n),
                2 => groups::<F, 4, 2>(panel, job, n_rows, g, k0, n),
                _ => groups::<F, 4, 3>(panel, job, n_rows, g, k0, n),
            }
            g += (n_groups - g).min(3);
        }
    }
}

/// All rows times `G` groups from `g` on, `R` rows at a time.
#[inline(always)]
unsafe fn groups<F: Format, const R: usize, const G: usize>(
    panel: &Panel,
    job: &Job<'_>,
    n_rows: usize,
    g: usize,
    k0: usize,
    n: usize,
) {
    let acts = each!([job.acts.group(g); G], i => job.acts.group(g + i));
    for r in (0..n_rows).step_by(R) {
        tile::<F, R, G>(panel, &acts, r, g, k0, n);
    }
}

#[inline(always)]
unsafe fn tile<F: Format, const R: usize, const G: usize>(
    panel: &Panel,
    acts: &[Group<'_>; G],
    r: usize,
    g: usize,
    k0: usize,
    n: usize,
) {
    let mut floats = [[_mm512_setzero_ps(); G]; R];
    for sub in 0..n / F::SUB {
        let at = k0 + sub * F::SUB;
        let codes = panel.codes.add(r * STRIDE + sub * F::SUB);
        let mut dots = [[_mm512_setzero_si512(); G]; R];
        if F::BIAS != 0 {
            for j in 0..G {
                let sums = _mm512_loadu_si512(sums_of::<F>(&acts[j], at / F::SUB).cast());
                let start = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-i32::from(F::BIAS)));
                for i in 0..R {
                    dots[i][j] = start;
                }
            }
        }
        let x = each!([std::ptr::null(); G], j => acts[j].codes[at * LANES..][..F::SUB * LANES].as_ptr());
        for k in (0..F::SUB).step_by(4) {
            let x = each!([_mm512_setzero_si512(); G], j => _mm512_loadu_si512(x[j].add(k * LANES).cast()));
            for i in 0..R {
                let w = _mm512_set1_epi32(codes.add(i * STRIDE + k).cast::<i32>().read_unaligned());
                for j in 0..G {
                    dots[i][j] = _mm512_dpbusd_epi32(dots[i][j], w, x[j]);
                }
            }
        }
        scale::<F, R, G>(panel, acts, r, at, sub, &dots, &mut floats);
        if ends_block::<F>(sub) {
            close::<F, R, G>(panel, acts, r, g, at, &mut floats);
        }
    }
    if F::BLOCK == 32 {
        close::<F, R, G>(panel, acts, r, g, 0, &mut floats);
    }
}

/// Whether the activations' scale is due after this sub-block; for blocks of 32 every product has it already.
#[inline(always)]
pub(in crate::kernels::x86) fn ends_block<F: Format>(sub: usize) -> bool {
    F::BLOCK == 256 && (sub + 1).is_multiple_of(256 / F::SUB)
}

/// Integers of the sub-block at column `at`, times the scale of its activations where those are in blocks of 32.
#[inline(always)]
unsafe fn scaled<F: Format>(acts: &Group<'_>, at: usize, x: __m512i) -> __m512 {
    match F::BLOCK {
        32 => {
            let scales = _mm512_loadu_ps(acts.scales[at / 32 * LANES..][..LANES].as_ptr());
            _mm512_mul_ps(_mm512_cvtepi32_ps(x), scales)
        }
        _ => _mm512_cvtepi32_ps(x),
    }
}

/// Scales the integer products `dots` of sub-block `sub` of the panel, which begins at column `at`, and adds them.
#[inline(always)]
pub(in crate::kernels::x86) unsafe fn scale<F: Format, const R: usize, const G: usize>(
    panel: &Panel,
    acts: &[Group<'_>; G],
    r: usize,
    at: usize,
    sub: usize,
    dots: &[[__m512i; G]; R],
    floats: &mut [[__m512; G]; R],
) {
    for i in 0..R {
        let scale = _mm512_set1_ps(*panel.scales.add((r + i) * SUBS + sub));
        for j in 0..G {
            floats[i][j] = _mm512_fmadd_ps(scaled::<F>(&acts[j], at, dots[i][j]), scale, floats[i][j]);
        }
    }
    if F::HAS_OFFSETS {
        let sums = each!([_mm512_setzero_ps(); G], j =>
            scaled::<F>(&acts[j], at, _mm512_loadu_si512(sums_of::<F>(&acts[j], at / F::SUB).cast())));
        for i in 0..R {
            let offset = _mm512_set1_ps(*panel.offsets.add((r + i) * SUBS + sub));
            for j in 0..G {
                floats[i][j] = _mm512_fmadd_ps(offset, sums[j], floats[i][j]);
            }
        }
    }
}

/// Adds what has come together since the last time to the sums: a block of 256 (that of column `at`) times the scale
/// of its activations, or a panel of blocks of 32 as it is.
#[inline(always)]
pub(in crate::kernels::x86) unsafe fn close<F: Format, const R: usize, const G: usize>(
    panel: &Panel,
    acts: &[Group<'_>; G],
    r: usize,
    g: usize,
    at: usize,
    floats: &mut [[__m512; G]; R],
) {
    for i in 0..R {
        for j in 0..G {
            let to = panel.sums(g + j, r + i);
            let sum = _mm512_loadu_ps(to);
            let sum = match F::BLOCK {
                256 => {
                    let scale = _mm512_loadu_ps(acts[j].scales[at / 256 * LANES..][..LANES].as_ptr());
                    _mm512_fmadd_ps(floats[i][j], scale, sum)
                }
                _ => _mm512_add_ps(sum, floats[i][j]),
            };
            _mm512_storeu_ps(to, sum);
            floats[i][j] = _mm512_setzero_ps();
        }
    }
}
