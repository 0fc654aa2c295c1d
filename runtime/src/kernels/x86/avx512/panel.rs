//! Many tokens with vpdpbusd: tiles of 4 rows by up to 3 groups of 16 tokens, of 8 rows where no scales come between.
//!
//! Per four columns a tile of 4 by 48 takes 4 broadcasts of weights, 3 loads of activations and 12 dot products, so
//! loads are no limit; per sub-block of 32, 96 dot products stand beside 12 conversions and 12 or 24 multiply-adds,
//! which leaves 73 % (with minimums) or 80 % of the peak where all of these share two ports. Where dot products have both
//! (Intel), each of 12 sums is ready only just when its turn comes again, and 4 by 48 in the first-level cache comes to
//! 70 % of the peak; 8 by 48 comes to 90.
//!
//! With at most eight tokens lanes are two rows by eight tokens ([`InPairs`]): half as many dot products.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::Avx512;
use super::as_int8::AsInt8;
use crate::kernels::acts::Group;
use crate::kernels::matmul::{Job, PANEL_COLS, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::x86::panel::{
    AHEAD_COLS, Ahead, Format, HALF, InLarge, InSmall, NextActs, Panel, Rows, STRIDE, SUBS, Sweep, half_of,
    product, sums_of,
};
use crate::kernels::x86::unpack::{Large, Small, f16};
use std::arch::asm;
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
pub(super) unsafe fn small<F: Small>(job: &Job<'_>, scratch: &mut Scratch) {
    many::<InSmall<F>>(job, scratch);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
pub(super) unsafe fn large<F: Large>(job: &Job<'_>, scratch: &mut Scratch) {
    many::<InLarge<F>>(job, scratch);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
pub(super) unsafe fn as_int8(job: &Job<'_>, scratch: &mut Scratch) {
    product::<AsInt8, Vnni>(job, scratch);
}

/// The sweep that fits the number of tokens.
#[inline(always)]
unsafe fn many<F: Paired>(job: &Job<'_>, scratch: &mut Scratch) {
    match job.acts.n_tokens() {
        0..=HALF => product::<F, InPairs>(job, scratch),
        _ => product::<F, Vnni>(job, scratch),
    }
}

struct Vnni;

/// As many as a tile has at most: then the rows are swept over once.
const FEW_GROUPS: usize = 3;

/// Whether a tile is one sub-block. Then no floats stand beside its integers, and it can have twice as many rows.
const fn is_wide<F: Format>() -> bool {
    F::SUB == PANEL_COLS
}

impl<F: Format> Sweep<F> for Vnni {
    type Lanes = Avx512;

    /// Nothing is taken off: vpdpbusd takes the weights unsigned.
    #[inline(always)]
    unsafe fn expand(step: usize, rows: &Rows, prepared: *mut F::Prepared) {
        F::expand(step, rows, 0, prepared);
    }

    /// Where the rows are swept over once, and a tile is one sub-block, so that the compiler knows which step is when.
    /// Beside one of several sweeps it gains nothing, and in tiles of one group, which have fewer products, it loses.
    fn ahead(n_groups: usize) -> Option<usize> {
        (is_wide::<F>() && (2..=FEW_GROUPS).contains(&n_groups)).then_some(4)
    }

    #[inline(always)]
    unsafe fn sweep(panel: &Panel, job: &Job<'_>, n_rows: usize, k0: usize, n: usize) {
        let n_groups = job.acts.n_groups();
        let wide = is_wide::<F>() && panel.is_high();
        let mut g = 0;
        while g < n_groups {
            match n_groups - g {
                1 => groups::<F, 8, 1>(panel, job, n_rows, g, k0, n),
                2 if wide => groups::<F, 8, 2>(panel, job, n_rows, g, k0, n),
                2 => groups::<F, 4, 2>(panel, job, n_rows, g, k0, n),
                _ if wide => groups::<F, 8, 3>(panel, job, n_rows, g, k0, n),
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
    let ahead = <Vnni as Sweep<F>>::ahead(job.acts.n_groups()) == Some(R);
    let next = NextActs::<G>::after(panel, job, g, k0, n);
    for r in (0..n_rows).step_by(R) {
        if g == 0 {
            panel.fetch_next(r..r + R);
        }
        if let Some(next) = &next {
            next.fetch(r / R, n_rows.div_ceil(R));
        }
        match ahead {
            true => tile::<F, R, G, true>(panel, &acts, r, g, k0, n),
            false => tile::<F, R, G, false>(panel, &acts, r, g, k0, n),
        }
    }
}

/// `AHEAD`: rows that make way are expanded meanwhile, for a sub-block as wide as the panel.
#[inline(always)]
unsafe fn tile<F: Format, const R: usize, const G: usize, const AHEAD: bool>(
    panel: &Panel,
    acts: &[Group<'_>; G],
    r: usize,
    g: usize,
    k0: usize,
    n: usize,
) {
    let mut ahead = Ahead::<F, Vnni, R>::of_tile(panel, r);
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
        if AHEAD {
            sixteen_times!(PART => {
                ahead.at(PART * AHEAD_COLS);
                for k in (PART * AHEAD_COLS..(PART + 1) * AHEAD_COLS).step_by(4) {
                    four_columns::<R, G, true>(&mut dots, codes, &x, k);
                }
            });
        } else {
            for k in (0..F::SUB).step_by(4) {
                match is_wide::<F>() {
                    true => four_columns::<R, G, true>(&mut dots, codes, &x, k),
                    false => four_columns::<R, G, false>(&mut dots, codes, &x, k),
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

/// Adds the products of columns `k..k + 4`. `IN_ORDER`: in this order, in which a tile of 8 by 3 has registers enough.
#[inline(always)]
unsafe fn four_columns<const R: usize, const G: usize, const IN_ORDER: bool>(
    dots: &mut [[__m512i; G]; R],
    codes: *const u8,
    x: &[*const i8; G],
    k: usize,
) {
    let x = each!([_mm512_setzero_si512(); G], j => _mm512_loadu_si512(x[j].add(k * LANES).cast()));
    for i in 0..R {
        let w = _mm512_set1_epi32(codes.add(i * STRIDE + k).cast::<i32>().read_unaligned());
        for j in 0..G {
            dots[i][j] = _mm512_dpbusd_epi32(dots[i][j], w, x[j]);
            if IN_ORDER {
                dots[i][j] = here(dots[i][j]);
            }
        }
    }
}

/// Whether the activations' scale is due after this sub-block; for blocks of 32 every product has it already.
#[inline(always)]
pub(in crate::kernels::x86) fn ends_block<F: Format>(sub: usize) -> bool {
    F::BLOCK == 256 && (sub + 1).is_multiple_of(256 / F::SUB)
}

/// Integers as floats, times the scales of their activations where those are in blocks of 32.
#[inline(always)]
unsafe fn scaled<F: Format>(x: __m512i, scales: __m512) -> __m512 {
    match F::BLOCK {
        32 => _mm512_mul_ps(_mm512_cvtepi32_ps(x), scales),
        _ => _mm512_cvtepi32_ps(x),
    }
}

/// The scales of a group's activations at column `at`.
#[inline(always)]
unsafe fn scales_at<F: Format>(acts: &Group<'_>, at: usize) -> __m512 {
    _mm512_loadu_ps(acts.scales[at / F::BLOCK * LANES..][..LANES].as_ptr())
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
    let x_scales = each!([_mm512_setzero_ps(); G], j => scales_at::<F>(&acts[j], at));
    for i in 0..R {
        let scale = _mm512_set1_ps(*panel.scales.add((r + i) * SUBS + sub));
        for j in 0..G {
            floats[i][j] = _mm512_fmadd_ps(scaled::<F>(dots[i][j], x_scales[j]), scale, floats[i][j]);
        }
    }
    if F::HAS_OFFSETS {
        let sums = each!([_mm512_setzero_ps(); G], j =>
            scaled::<F>(_mm512_loadu_si512(sums_of::<F>(&acts[j], at / F::SUB).cast()), x_scales[j]));
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
                256 => _mm512_fmadd_ps(floats[i][j], scales_at::<F>(&acts[j], at), sum),
                _ => _mm512_add_ps(sum, floats[i][j]),
            };
            _mm512_storeu_ps(to, sum);
            floats[i][j] = _mm512_setzero_ps();
        }
    }
}

/// Columns of which a pair of rows has the codes in the place of one row.
const HALF_COLS: usize = PANEL_COLS / 2;
/// Pairs of rows in a tile: those of 16 rows.
const PAIRS: usize = LANES / 2;

/// At most half a group of tokens: lanes are two rows by eight tokens, row by row for each token.
///
/// Rows go in pairs, a row's four codes beside the other's, so that one broadcast of 64 bits has both: columns
/// 0..128 in the place of the first row, the rest in that of the second. Scales and offsets are [sub-block][2].
struct InPairs;

impl<F: Paired> Sweep<F> for InPairs {
    type Lanes = Avx512;
    const ROWS: usize = 2;
    const STEPS: usize = 2;

    #[inline(always)]
    unsafe fn expand(half: usize, rows: &Rows, _: *mut F::Prepared) {
        F::expand_pair(half, rows);
    }

    fn ahead(_n_groups: usize) -> Option<usize> {
        Some(2 * PAIRS)
    }

    #[inline(always)]
    unsafe fn sweep(panel: &Panel, job: &Job<'_>, n_rows: usize, k0: usize, n: usize) {
        let acts = job.acts.group(0);
        for r in (0..n_rows).step_by(2 * PAIRS) {
            pairs::<F>(panel, &acts, r, k0, n);
        }
    }

    #[inline(always)]
    unsafe fn by_token(panel: &Panel, g: usize, r: usize, to: &mut [f32; LANES * LANES]) {
        for i in 0..PAIRS {
            let of_pair = panel.sums(g, r + i);
            for t in 0..HALF {
                let both = of_pair.add(2 * t).cast::<[f32; 2]>().read();
                to.as_mut_ptr().add(t * LANES + 2 * i).cast::<[f32; 2]>().write(both);
            }
        }
    }
}

/// A format that can be expanded in pairs of rows.
trait Paired: Format {
    /// Expands a half of the columns of two rows.
    unsafe fn expand_pair(half: usize, rows: &Rows);
}

impl<F: Small> Paired for InSmall<F> {
    #[inline(always)]
    unsafe fn expand_pair(half: usize, rows: &Rows) {
        for b in half_of(half, rows.n_cols) {
            let block = each!([rows.blocks[0]; 2], i => rows.blocks[i].add(b * F::BYTES));
            put_pair(rows, b, F::codes(block[0]), F::codes(block[1]));
            for i in 0..2 {
                *rows.to.scales.add(2 * b + i) = f16(block[i]);
                if F::HAS_M {
                    *rows.to.offsets.add(2 * b + i) = f16(block[i].add(2));
                }
            }
        }
    }
}

impl<F: Large> Paired for InLarge<F> {
    #[inline(always)]
    unsafe fn expand_pair(half: usize, rows: &Rows) {
        let [a, b, ..] = rows.blocks;
        if half == 0 {
            put_pair(rows, 0, F::codes(a, 0), F::codes(b, 0));
            put_pair(rows, 1, F::codes(a, 1), F::codes(b, 1));
            put_pair(rows, 2, F::codes(a, 2), F::codes(b, 2));
            put_pair(rows, 3, F::codes(a, 3), F::codes(b, 3));
            put_pair_scaled::<F>(
                rows.to.scales,
                F::scales(a),
                F::scales(b),
                f16(a.add(F::D)),
                f16(b.add(F::D)),
            );
        } else {
            put_pair(rows, 4, F::codes(a, 4), F::codes(b, 4));
            put_pair(rows, 5, F::codes(a, 5), F::codes(b, 5));
            put_pair(rows, 6, F::codes(a, 6), F::codes(b, 6));
            put_pair(rows, 7, F::codes(a, 7), F::codes(b, 7));
            if F::HAS_MINS {
                put_pair_scaled::<F>(
                    rows.to.offsets,
                    F::mins(a),
                    F::mins(b),
                    -f16(a.add(F::DMIN)),
                    -f16(b.add(F::DMIN)),
                );
            }
        }
    }
}

/// Stores the codes of columns `32 j..` of two rows.
#[inline(always)]
unsafe fn put_pair(rows: &Rows, j: usize, a: __m256i, b: __m256i) {
    let by_turns = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let both = _mm512_permutex2var_epi32(_mm512_castsi256_si512(a), by_turns, _mm512_castsi256_si512(b));
    let to = rows.to.codes.add(32 * j / HALF_COLS * STRIDE + 32 * j % HALF_COLS * 2);
    _mm512_storeu_si512(to.cast(), both);
}

/// Stores one number per sub-block of a block of two rows each, times `d`.
#[inline(always)]
unsafe fn put_pair_scaled<F: Large>(to: *mut f32, a: __m128i, b: __m128i, d_a: f32, d_b: f32) {
    let d = [d_a, d_b];
    let d = both(d.as_ptr());
    let by_turns = _mm_unpacklo_epi8(a, b);
    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(by_turns)), d));
    if F::SUB == 16 {
        let by_turns = _mm_unpackhi_epi8(a, b);
        _mm512_storeu_ps(to.add(LANES), _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(by_turns)), d));
    }
}

/// Eight dwords, each twice.
#[inline(always)]
unsafe fn twice(x: *const i32) -> __m512i {
    let which = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    _mm512_permutexvar_epi32(which, _mm512_castsi256_si512(_mm256_loadu_si256(x.cast())))
}

/// Two numbers by turns.
#[inline(always)]
unsafe fn both(x: *const f32) -> __m512 {
    _mm512_castpd_ps(_mm512_set1_pd(x.cast::<f64>().read_unaligned()))
}

/// Rows `r..r + 16` in pairs times the tokens of a group's first half.
#[inline(always)]
unsafe fn pairs<F: Paired>(panel: &Panel, acts: &Group<'_>, r: usize, k0: usize, n: usize) {
    let mut ahead = Ahead::<F, InPairs, { 2 * PAIRS }>::of_tile(panel, r);
    let mut floats = [_mm512_setzero_ps(); PAIRS];
    let n_subs = n / F::SUB;
    for sub in 0..n_subs {
        panel.fetch_next(r + 2 * PAIRS * sub / n_subs..r + 2 * PAIRS * (sub + 1) / n_subs);
        let at = k0 + sub * F::SUB;
        let sums = twice(sums_of::<F>(acts, at / F::SUB));
        let x_scales = twice(acts.scales[at / F::BLOCK * LANES..][..LANES].as_ptr().cast());
        let x_scales = _mm512_castsi512_ps(x_scales);
        let start = match F::BIAS {
            0 => _mm512_setzero_si512(),
            bias => _mm512_mullo_epi32(sums, _mm512_set1_epi32(-i32::from(bias))),
        };
        let mut dots = [start; PAIRS];
        let x = acts.codes[at * LANES..][..F::SUB * LANES].as_ptr();
        sixteen_times!(PART => {
            let part = PART * AHEAD_COLS;
            if part < F::SUB {
                let k = sub * F::SUB + part;
                ahead.at(k);
                let codes = panel.codes.add(r * STRIDE + k / HALF_COLS * STRIDE + k % HALF_COLS * 2);
                for k in (0..AHEAD_COLS).step_by(4) {
                    let x = twice(x.add((part + k) * LANES).cast());
                    for i in 0..PAIRS {
                        let w = codes.add(2 * i * STRIDE + 2 * k).cast::<i64>().read_unaligned();
                        dots[i] = here(_mm512_dpbusd_epi32(dots[i], _mm512_set1_epi64(w), x));
                    }
                }
            }
        });
        let sums = scaled::<F>(sums, x_scales);
        for i in 0..PAIRS {
            let of_pair = (r + 2 * i) * SUBS + 2 * sub;
            let dots = scaled::<F>(dots[i], x_scales);
            floats[i] = _mm512_fmadd_ps(dots, both(panel.scales.add(of_pair)), floats[i]);
            if F::HAS_OFFSETS {
                floats[i] = _mm512_fmadd_ps(both(panel.offsets.add(of_pair)), sums, floats[i]);
            }
        }
        // A loop of its own: a condition between the products would keep them from going side by side.
        if ends_block::<F>(sub) {
            for i in 0..PAIRS {
                let to = panel.sums(0, r + i);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(floats[i], x_scales, _mm512_loadu_ps(to)));
                floats[i] = _mm512_setzero_ps();
            }
        }
    }
    ahead.rest(n);
    if F::BLOCK == 32 {
        for i in 0..PAIRS {
            let to = panel.sums(0, r + i);
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), floats[i]));
        }
    }
}

/// `x`, computed here. Else the compiler would gather what computes it where it is used, behind all of what stands between,
/// and keep what it needs for that in memory; and would load here what is needed only later.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn here(mut x: __m512i) -> __m512i {
    // SAFETY: no instruction at all.
    asm!("/* {0} */", inout(zmm_reg) x, options(nostack, preserves_flags));
    x
}
