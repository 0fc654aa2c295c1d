//! Many tokens: 32 rows are expanded once, some columns at a time, and multiplied with all tokens in tiles of 32 rows
//! by 6 tokens: 24 sums, 2 registers of weights, 1 of activations.
//!
//! A panel is [column / 4][row][4] codes, unsigned (vpdpbusd takes its weights so), and [sub-block][row] scales and
//! offsets as f32. What the codes' bias adds to a sum, bias · Σ activations, is taken off by starting the sum there.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::lanes::transpose_dwords;
use crate::kernels::matmul::{Job, PANEL_COLS, PANEL_ROWS, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::x86::unpack::{Large, Small, f16};
use std::arch::x86_64::*;

/// Sub-blocks of a panel at most.
const SUBS: usize = PANEL_COLS / 16;
const _: () = assert!(PANEL_ROWS == 2 * LANES);

/// What the inner loops read; all in the worker's scratch.
struct Panel {
    codes: *mut u8,
    scales: *mut f32,
    /// Added to a weight: -dmin·min, or m.
    offsets: *mut f32,
    /// [token][sub-block]: i32 -bias·Σ, or f32 Σ (times the activations' scale for blocks of 32).
    terms: *mut f32,
    sums: *mut f32,
}

impl Panel {
    fn new(scratch: &mut Scratch) -> Self {
        let (scales, offsets) = scratch.scales.split_at_mut(SUBS * PANEL_ROWS);
        Self {
            codes: scratch.panel.as_mut_ptr().cast(),
            scales: scales.as_mut_ptr(),
            offsets: offsets.as_mut_ptr(),
            terms: scratch.terms.as_mut_ptr(),
            sums: scratch.sums.as_mut_ptr(),
        }
    }

    /// Stores 16 rows of 64 codes as rows `16 half..` of columns `k..k + 64`.
    #[inline(always)]
    unsafe fn put_codes(&self, k: usize, half: usize, rows: &mut [__m512i; LANES]) {
        transpose_dwords(rows);
        for (i, column) in rows.iter().enumerate() {
            let to = self.codes.add((k / 4 + i) * 4 * PANEL_ROWS + half * 64);
            _mm512_storeu_si512(to.cast(), *column);
        }
    }
}

/// Goes through the panels: `expand(panel, rows, k0, n)` fills one, `sweep(panel, k0, n)` adds its products to the sums.
macro_rules! for_panels {
    ($job:ident, $scratch:ident, $expand:ident, $sweep:ident, $type:ident) => {
        let n_tokens = $job.acts.n_tokens();
        for row0 in $job.rows.clone().step_by(PANEL_ROWS) {
            let n_rows = PANEL_ROWS.min($job.rows.end - row0);
            $scratch.sums[..n_tokens * PANEL_ROWS].fill(0.0);
            let panel = Panel::new($scratch);
            // Rows that do not exist are copies of the last one; their results are dropped.
            let rows: [usize; PANEL_ROWS] = std::array::from_fn(|r| row0 + r.min(n_rows - 1));
            for k0 in (0..$job.weights.cols).step_by(PANEL_COLS) {
                let n = PANEL_COLS.min($job.weights.cols - k0);
                $expand::<$type>(&panel, $job, &rows, k0, n);
                let mut t = 0;
                while t + 6 <= n_tokens {
                    $sweep::<$type, 6>(&panel, $job, t, k0, n);
                    t += 6;
                }
                while t + 3 <= n_tokens {
                    $sweep::<$type, 3>(&panel, $job, t, k0, n);
                    t += 3;
                }
                while t < n_tokens {
                    $sweep::<$type, 1>(&panel, $job, t, k0, n);
                    t += 1;
                }
            }
            for (half, row) in (row0..row0 + n_rows).step_by(LANES).enumerate() {
                for t in 0..n_tokens {
                    let sums = &$scratch.sums[t * PANEL_ROWS + half * LANES..];
                    $job.out.put(row, t, &sums[..LANES.min(row0 + n_rows - row)]);
                }
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
unsafe fn expand_small<F: Small>(
    panel: &Panel,
    job: &Job<'_>,
    rows: &[usize; PANEL_ROWS],
    k0: usize,
    n: usize,
) {
    for half in 0..2 {
        for k in (0..n).step_by(64) {
            let mut codes = [_mm512_setzero_si512(); LANES];
            for (r, codes) in codes.iter_mut().enumerate() {
                let r = half * LANES + r;
                let p = job.weights.row(rows[r]).as_ptr().add((k0 + k) / 32 * F::BYTES);
                let mut high = _mm256_setzero_si256();
                for sub in 0..if n - k > 32 { 2 } else { 1 } {
                    let p = p.add(sub * F::BYTES);
                    let at = (k / 32 + sub) * PANEL_ROWS + r;
                    *panel.scales.add(at) = f16(p);
                    if F::HAS_M {
                        *panel.offsets.add(at) = f16(p.add(2));
                    }
                    if sub == 1 {
                        high = F::codes(p);
                    }
                }
                *codes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(F::codes(p)), high);
            }
            panel.put_codes(k, half, &mut codes);
        }
    }
    for t in 0..job.acts.n_tokens() {
        let (sums, scales) = (job.acts.sums32(t), job.acts.scales(t));
        for s in 0..n / 32 {
            let (sum, to) = (sums[k0 / 32 + s], panel.terms.add(t * SUBS + s));
            match F::HAS_M {
                true => *to = sum as f32 * scales[k0 / 32 + s],
                false => *to.cast::<i32>() = -i32::from(F::BIAS) * sum,
            }
        }
    }
}

#[inline(always)]
unsafe fn expand_large<F: Large>(
    panel: &Panel,
    job: &Job<'_>,
    rows: &[usize; PANEL_ROWS],
    k0: usize,
    n: usize,
) {
    let n_subs = 256 / F::SUB;
    for k in (0..n).step_by(256) {
        let block = |r: usize| job.weights.row(rows[r]).as_ptr().add((k0 + k) / 256 * F::BYTES);
        for r in 0..PANEL_ROWS {
            let p = block(r);
            let scaled = |x: __m128i, d: f32| -> [f32; 16] {
                let mut out = [0.0; 16];
                let x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)), _mm512_set1_ps(d));
                _mm512_storeu_ps(out.as_mut_ptr(), x);
                out
            };
            let at = k / F::SUB * PANEL_ROWS + r;
            for (s, v) in scaled(F::scales(p), f16(p.add(F::D))).into_iter().enumerate().take(n_subs) {
                *panel.scales.add(at + s * PANEL_ROWS) = v;
            }
            if F::HAS_MINS {
                for (s, v) in scaled(F::mins(p), -f16(p.add(F::DMIN))).into_iter().enumerate().take(n_subs) {
                    *panel.offsets.add(at + s * PANEL_ROWS) = v;
                }
            }
        }
        for half in 0..2 {
            for j in 0..4 {
                let mut codes = [_mm512_setzero_si512(); LANES];
                for (r, codes) in codes.iter_mut().enumerate() {
                    let p = block(half * LANES + r);
                    let low = _mm512_castsi256_si512(F::codes(p, 2 * j));
                    *codes = _mm512_inserti64x4::<1>(low, F::codes(p, 2 * j + 1));
                }
                panel.put_codes(k + 64 * j, half, &mut codes);
            }
        }
    }
    for t in 0..job.acts.n_tokens() {
        let sums = if F::SUB == 16 { job.acts.sums16(t) } else { job.acts.sums32(t) };
        for (s, &sum) in sums[k0 / F::SUB..(k0 + n) / F::SUB].iter().enumerate() {
            let to = panel.terms.add(t * SUBS + s);
            match F::HAS_MINS {
                true => *to = sum as f32,
                false => *to.cast::<i32>() = -i32::from(F::BIAS) * sum,
            }
        }
    }
}

/// Integer products of sub-block `sub` (columns `k..k + SUB` of the panel) with `T` tokens; `x` are their codes.
#[inline(always)]
unsafe fn dot_tile<const SUB: usize, const BIAS: u8, const T: usize>(
    panel: &Panel,
    x: &[*const i8; T],
    t0: usize,
    sub: usize,
) -> [[__m512i; T]; 2] {
    let mut sums = [[_mm512_setzero_si512(); T]; 2];
    if BIAS != 0 {
        for i in 0..T {
            let start = _mm512_set1_epi32(*panel.terms.add((t0 + i) * SUBS + sub).cast::<i32>());
            (sums[0][i], sums[1][i]) = (start, start);
        }
    }
    let codes = panel.codes.add(sub * SUB * PANEL_ROWS);
    for k in 0..SUB / 4 {
        let w0 = _mm512_loadu_si512(codes.add(k * 4 * PANEL_ROWS).cast());
        let w1 = _mm512_loadu_si512(codes.add(k * 4 * PANEL_ROWS + 64).cast());
        for i in 0..T {
            let x = _mm512_set1_epi32(x[i].add(sub * SUB + 4 * k).cast::<i32>().read_unaligned());
            sums[0][i] = _mm512_dpbusd_epi32(sums[0][i], w0, x);
            sums[1][i] = _mm512_dpbusd_epi32(sums[1][i], w1, x);
        }
    }
    sums
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
    let scales: [*const f32; T] = std::array::from_fn(|i| job.acts.scales(t0 + i)[k0 / 32..].as_ptr());
    let mut sums = [[_mm512_setzero_ps(); T]; 2];
    for sub in 0..n / 32 {
        let dots = match F::BIAS {
            0 => dot_tile::<32, 0, T>(panel, &x, t0, sub),
            _ => dot_tile::<32, 1, T>(panel, &x, t0, sub),
        };
        for half in 0..2 {
            let at = sub * PANEL_ROWS + half * LANES;
            let d = _mm512_loadu_ps(panel.scales.add(at));
            for i in 0..T {
                let dot =
                    _mm512_mul_ps(_mm512_cvtepi32_ps(dots[half][i]), _mm512_set1_ps(*scales[i].add(sub)));
                sums[half][i] = _mm512_fmadd_ps(dot, d, sums[half][i]);
            }
            if F::HAS_M {
                let m = _mm512_loadu_ps(panel.offsets.add(at));
                for i in 0..T {
                    let term = _mm512_set1_ps(*panel.terms.add((t0 + i) * SUBS + sub));
                    sums[half][i] = _mm512_fmadd_ps(m, term, sums[half][i]);
                }
            }
        }
    }
    for half in 0..2 {
        for i in 0..T {
            let to = panel.sums.add((t0 + i) * PANEL_ROWS + half * LANES);
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sums[half][i]));
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
        let mut sums = [[_mm512_setzero_ps(); T]; 2];
        for sub in block * n_subs..(block + 1) * n_subs {
            let dots = match (F::SUB, F::BIAS) {
                (16, 0) => dot_tile::<16, 0, T>(panel, &x, t0, sub),
                (16, _) => dot_tile::<16, 1, T>(panel, &x, t0, sub),
                (_, 0) => dot_tile::<32, 0, T>(panel, &x, t0, sub),
                _ => dot_tile::<32, 1, T>(panel, &x, t0, sub),
            };
            for half in 0..2 {
                let at = sub * PANEL_ROWS + half * LANES;
                let scale = _mm512_loadu_ps(panel.scales.add(at));
                for i in 0..T {
                    sums[half][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[half][i]), scale, sums[half][i]);
                }
                if F::HAS_MINS {
                    let offset = _mm512_loadu_ps(panel.offsets.add(at));
                    for i in 0..T {
                        let term = _mm512_set1_ps(*panel.terms.add((t0 + i) * SUBS + sub));
                        sums[half][i] = _mm512_fmadd_ps(offset, term, sums[half][i]);
                    }
                }
            }
        }
        for i in 0..T {
            let scale = _mm512_set1_ps(job.acts.scales(t0 + i)[k0 / 256 + block]);
            for half in 0..2 {
                let to = panel.sums.add((t0 + i) * PANEL_ROWS + half * LANES);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(sums[half][i], scale, _mm512_loadu_ps(to)));
            }
        }
    }
}
