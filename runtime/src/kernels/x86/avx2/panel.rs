//! Many tokens: 16 rows are expanded once, some columns at a time, and multiplied with all tokens in tiles of 16 rows
//! by 4 tokens.
//!
//! A panel is [column / 4][row][4] codes and [sub-block][row] scales and offsets as f32. Without a dot-product
//! instruction, products are summed in i16 as long as the codes' size allows it exactly, then widened.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use crate::kernels::matmul::{Job, PANEL_COLS, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::x86::unpack::{Large, Small, f16};
use std::arch::x86_64::*;

/// Sub-blocks of a panel at most.
const SUBS: usize = PANEL_COLS / 16;
/// Tokens of a tile.
const TOKENS: usize = 4;

/// What the inner loops read; all in the worker's scratch.
struct Panel {
    codes: *mut u8,
    scales: *mut f32,
    /// Added to a weight: -dmin·min, or m.
    offsets: *mut f32,
    sums: *mut f32,
}

impl Panel {
    fn new(scratch: &mut Scratch) -> Self {
        let (scales, offsets) = scratch.scales.split_at_mut(SUBS * LANES);
        Self {
            codes: scratch.panel.as_mut_ptr().cast(),
            scales: scales.as_mut_ptr(),
            offsets: offsets.as_mut_ptr(),
            sums: scratch.sums.as_mut_ptr(),
        }
    }

    /// Stores columns `k..k + 32` of row `r`; codes with a bias of 128 with their sign.
    #[inline(always)]
    unsafe fn put_codes(&self, k: usize, r: usize, codes: __m256i, bias: u8) {
        let flip = if bias == 128 { _mm256_set1_epi8(i8::MIN) } else { _mm256_setzero_si256() };
        let mut dwords = [0u32; 8];
        _mm256_storeu_si256(dwords.as_mut_ptr().cast(), _mm256_xor_si256(codes, flip));
        for (i, dword) in dwords.into_iter().enumerate() {
            self.codes.cast::<u32>().add((k / 4 + i) * LANES + r).write(dword);
        }
    }
}

/// Goes through the panels: `expand(panel, row, r, k0, n)` fills row `r` of one, `sweep(panel, t, k0, n)` adds its
/// products with some tokens to the sums.
macro_rules! for_panels {
    ($job:ident, $scratch:ident, $expand:ident, $sweep:ident, $type:ident) => {
        let n_tokens = $job.acts.n_tokens();
        for row0 in $job.rows.clone().step_by(LANES) {
            let n_rows = LANES.min($job.rows.end - row0);
            $scratch.sums[..n_tokens * LANES].fill(0.0);
            let panel = Panel::new($scratch);
            for k0 in (0..$job.weights.cols).step_by(PANEL_COLS) {
                let n = PANEL_COLS.min($job.weights.cols - k0);
                for r in 0..n_rows {
                    $expand::<$type>(&panel, $job.weights.row(row0 + r), r, k0, n);
                }
                for t in (0..n_tokens / TOKENS * TOKENS).step_by(TOKENS) {
                    $sweep::<$type, TOKENS>(&panel, $job, t, k0, n);
                }
                for t in n_tokens / TOKENS * TOKENS..n_tokens {
                    $sweep::<$type, 1>(&panel, $job, t, k0, n);
                }
            }
            for t in 0..n_tokens {
                $job.out.put(row0, t, &$scratch.sums[t * LANES..][..n_rows]);
            }
        }
    };
}

#[inline(always)]
pub(super) unsafe fn small<F: Small>(job: &Job<'_>, scratch: &mut Scratch) {
    for_panels!(job, scratch, expand_small, sweep_small, F);
}

#[inline(always)]
pub(super) unsafe fn large<F: Large>(job: &Job<'_>, scratch: &mut Scratch) {
    for_panels!(job, scratch, expand_large, sweep_large, F);
}

#[inline(always)]
unsafe fn expand_small<F: Small>(panel: &Panel, row: &[u8], r: usize, k0: usize, n: usize) {
    for b in 0..n / 32 {
        let p = row[(k0 / 32 + b) * F::BYTES..][..F::BYTES].as_ptr();
        panel.put_codes(32 * b, r, F::codes(p), F::BIAS);
        *panel.scales.add(b * LANES + r) = f16(p);
        if F::HAS_M {
            *panel.offsets.add(b * LANES + r) = f16(p.add(2));
        }
    }
}

#[inline(always)]
unsafe fn expand_large<F: Large>(panel: &Panel, row: &[u8], r: usize, k0: usize, n: usize) {
    let n_subs = 256 / F::SUB;
    for b in 0..n / 256 {
        let p = row[(k0 / 256 + b) * F::BYTES..][..F::BYTES].as_ptr();
        for j in 0..8 {
            panel.put_codes(256 * b + 32 * j, r, F::codes(p, j), F::BIAS);
        }
        let put = |to: *mut f32, x: __m128i, d: f32| {
            let mut values = [0i8; 16];
            _mm_storeu_si128(values.as_mut_ptr().cast(), x);
            for (s, v) in values.into_iter().enumerate().take(n_subs) {
                *to.add((b * n_subs + s) * LANES + r) = d * f32::from(v);
            }
        };
        put(panel.scales, F::scales(p), f16(p.add(F::D)));
        if F::HAS_MINS {
            put(panel.offsets, F::mins(p), -f16(p.add(F::DMIN)));
        }
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

/// Integer products of sub-block `sub` with `T` tokens whose codes are `x`; codes are below `1 << BITS`, or signed
/// bytes for 8 bits. `bias` (per token) is taken off.
#[inline(always)]
unsafe fn dot_tile<const SUB: usize, const BITS: usize, const T: usize>(
    panel: &Panel,
    x: &[*const i8; T],
    bias: &[i32; T],
    sub: usize,
) -> [[__m256i; T]; 2] {
    let mut sums = [[_mm256_setzero_si256(); T]; 2];
    for i in 0..T {
        (sums[0][i], sums[1][i]) = (_mm256_set1_epi32(-bias[i]), _mm256_set1_epi32(-bias[i]));
    }
    let ones = _mm256_set1_epi16(1);
    let codes = panel.codes.add(sub * SUB * LANES);
    let weights = |k: usize, half: usize| _mm256_loadu_si256(codes.add(k * 4 * LANES + half * 32).cast());
    let tokens =
        |i: usize, k: usize| _mm256_set1_epi32(x[i].add(sub * SUB + 4 * k).cast::<i32>().read_unaligned());
    let steps = if BITS == 8 { 1 } else { exact_steps((1 << BITS) - 1, SUB) };
    for k0 in (0..SUB / 4).step_by(steps) {
        for half in 0..2 {
            let mut pairs = [_mm256_setzero_si256(); T];
            for k in k0..k0 + steps {
                let w = weights(k, half);
                for i in 0..T {
                    let x = tokens(i, k);
                    let products = match BITS {
                        8 => _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)),
                        _ => _mm256_maddubs_epi16(w, x),
                    };
                    pairs[i] = _mm256_add_epi16(pairs[i], products);
                }
            }
            for i in 0..T {
                sums[half][i] = _mm256_add_epi32(sums[half][i], _mm256_madd_epi16(pairs[i], ones));
            }
        }
    }
    sums
}

/// What `code · x` has too much because of the bias, from the sum of the activations.
#[inline(always)]
fn bias_term(bias: u8, sum: i32) -> i32 {
    if bias == 128 { 0 } else { i32::from(bias) * sum }
}

/// Eight rows' numbers times one, added to their sums.
#[inline(always)]
unsafe fn add_product(rows: *const f32, factor: __m256, sum: __m256) -> __m256 {
    _mm256_fmadd_ps(factor, _mm256_loadu_ps(rows), sum)
}

/// Adds `T` tokens times a panel of a type with blocks of 32 to the sums.
#[inline(always)]
unsafe fn sweep_small<F: Small, const T: usize>(
    panel: &Panel,
    job: &Job<'_>,
    t0: usize,
    k0: usize,
    n: usize,
) {
    let x: [*const i8; T] = std::array::from_fn(|i| job.acts.codes(t0 + i)[k0..].as_ptr());
    let mut sums = [[_mm256_setzero_ps(); T]; 2];
    for sub in 0..n / 32 {
        let terms: [i32; T] = std::array::from_fn(|i| job.acts.sums32(t0 + i)[k0 / 32 + sub]);
        let bias = terms.map(|sum| bias_term(F::BIAS, sum));
        let dots = match F::BIAS {
            128 => dot_tile::<32, 8, T>(panel, &x, &bias, sub),
            8 => dot_tile::<32, 4, T>(panel, &x, &bias, sub),
            _ => dot_tile::<32, 5, T>(panel, &x, &bias, sub),
        };
        for half in 0..2 {
            for i in 0..T {
                let (at, factor) = (sub * LANES + 8 * half, job.acts.scales(t0 + i)[k0 / 32 + sub]);
                let dot = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[half][i]), _mm256_set1_ps(factor));
                sums[half][i] = add_product(panel.scales.add(at), dot, sums[half][i]);
                if F::HAS_M {
                    let term = _mm256_set1_ps(terms[i] as f32 * factor);
                    sums[half][i] = add_product(panel.offsets.add(at), term, sums[half][i]);
                }
            }
        }
    }
    for half in 0..2 {
        for i in 0..T {
            let to = panel.sums.add((t0 + i) * LANES + 8 * half);
            _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sums[half][i]));
        }
    }
}

/// Adds `T` tokens times a panel of a type with blocks of 256 to the sums.
#[inline(always)]
unsafe fn sweep_large<F: Large, const T: usize>(
    panel: &Panel,
    job: &Job<'_>,
    t0: usize,
    k0: usize,
    n: usize,
) {
    let x: [*const i8; T] = std::array::from_fn(|i| job.acts.codes(t0 + i)[k0..].as_ptr());
    let n_subs = 256 / F::SUB;
    for block in 0..n / 256 {
        let mut sums = [[_mm256_setzero_ps(); T]; 2];
        for sub in block * n_subs..(block + 1) * n_subs {
            let terms: [i32; T] = std::array::from_fn(|i| match F::SUB {
                16 => job.acts.sums16(t0 + i)[k0 / 16 + sub],
                _ => job.acts.sums32(t0 + i)[k0 / 32 + sub],
            });
            let bias = terms.map(|sum| bias_term(F::BIAS, sum));
            let dots = match (F::SUB, F::BITS) {
                (16, 6) => dot_tile::<16, 6, T>(panel, &x, &bias, sub),
                (16, _) => dot_tile::<16, 3, T>(panel, &x, &bias, sub),
                (_, 4) => dot_tile::<32, 4, T>(panel, &x, &bias, sub),
                (_, 5) => dot_tile::<32, 5, T>(panel, &x, &bias, sub),
                _ => dot_tile::<32, 8, T>(panel, &x, &bias, sub),
            };
            for half in 0..2 {
                for i in 0..T {
                    let (at, dot) = (sub * LANES + 8 * half, _mm256_cvtepi32_ps(dots[half][i]));
                    sums[half][i] = add_product(panel.scales.add(at), dot, sums[half][i]);
                    if F::HAS_MINS {
                        let term = _mm256_set1_ps(terms[i] as f32);
                        sums[half][i] = add_product(panel.offsets.add(at), term, sums[half][i]);
                    }
                }
            }
        }
        for i in 0..T {
            let scale = _mm256_set1_ps(job.acts.scales(t0 + i)[k0 / 256 + block]);
            for half in 0..2 {
                let to = panel.sums.add((t0 + i) * LANES + 8 * half);
                _mm256_storeu_ps(to, _mm256_fmadd_ps(sums[half][i], scale, _mm256_loadu_ps(to)));
            }
        }
    }
}
