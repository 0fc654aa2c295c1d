//! AMX: the integer products of many tokens come from its tiles, all else is AVX-512's.
//!
//! A tile product is 16 rows of weights by 16 tokens over one sub-block, so the integers and all that follows are those
//! of AVX-512, to the bit. The unit multiplies 16 by 16 by 64 bytes in 16 cycles and as fast with 32 (half) or 16 (a
//! quarter) columns; per sub-block, 16 conversions and 16 or 32 multiply-adds on two ports take 16 or 24 cycles. So it
//! is the scaling that limits K types, to 340 products per cycle with minimums against 128 for all of vpdpbusd's.
//!
//! The compiler has no stable intrinsics for it, hence the assembly. Linux alone: there a process asks for permission.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use super::avx512::{self, AsInt8, Avx512, close, ends_block, scale};
use super::panel::{Format, HALF, InLarge, InSmall, NextActs, Panel, Rows, STRIDE, Sweep, product};
use super::unpack::{self, Large, Small, by_type};
use crate::kernels;
use crate::kernels::acts::Group;
use crate::kernels::matmul::{Job, Scratch, TILE_SUBS};
use crate::kernels::memory::LANES;
use kestrel_formats::GgmlType;
use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Whether the processor has AMX with int8 and the system lets this process use it.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let features = __cpuid_count(7, 0).edx;
        // Bits 24 and 25 of leaf 7: AMX-TILE and AMX-INT8.
        __cpuid(0).eax >= 7 && features >> 24 & 3 == 3 && permitted()
    })
}

/// Asks Linux for the state that tiles need: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA). Threads inherit it.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XTILEDATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that takes two numbers and touches no memory of ours; it clobbers rcx and r11. A system
    // that does not know it answers with an error.
    unsafe {
        asm!("syscall", inout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XTILEDATA,
            out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Weights times int8 activations.
///
/// # Safety
/// That of [`crate::kernels::matmul::Matmul`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
pub(crate) unsafe fn int_matmul(job: &Job<'_>, scratch: &mut Scratch) {
    // SAFETY: the caller's.
    unsafe {
        if job.acts.n_tokens() <= HALF {
            avx512::int_matmul(job, scratch); // of a tile half would be idle
        } else if kernels::as_int8::applies(job) {
            as_int8(job, scratch);
        } else {
            by_type!(job.weights.ggml(), small, large, (job, scratch));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
unsafe fn small<F: Small>(job: &Job<'_>, scratch: &mut Scratch) {
    with_tiles::<InSmall<F>>(job, scratch);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
unsafe fn large<F: Large>(job: &Job<'_>, scratch: &mut Scratch) {
    with_tiles::<InLarge<F>>(job, scratch);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
unsafe fn as_int8(job: &Job<'_>, scratch: &mut Scratch) {
    with_tiles::<AsInt8>(job, scratch);
}

/// The operand of ldtilecfg: rows and bytes per row of each tile (Intel's manual, volume 1, section 18.2).
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Columns of a tile of weights.
const fn tile_cols<F: Format>() -> usize {
    if F::SUB < 64 { F::SUB } else { 64 }
}

/// Sets the tiles up for `F`, multiplies, and leaves the thread without tile state, which the system would else save
/// at every switch.
#[inline(always)]
unsafe fn with_tiles<F: Format>(job: &Job<'_>, scratch: &mut Scratch) {
    let mut config =
        TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for tile in 0..4 {
        (config.rows[tile], config.row_bytes[tile]) = (16, 64); // products: row of weights, token
    }
    for tile in 4..6 {
        (config.rows[tile], config.row_bytes[tile]) = (tile_cols::<F>() as u8 / 4, 64); // activations: column / 4, token
    }
    for tile in 6..8 {
        (config.rows[tile], config.row_bytes[tile]) = (16, tile_cols::<F>() as u16); // weights: row, column
    }
    // SAFETY: AMX is present by the caller's promise; the configuration is a valid one of palette 1.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
    product::<F, Amx>(job, scratch);
    // SAFETY: as above.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

struct Amx;

impl<F: Format> Sweep<F> for Amx {
    type Lanes = Avx512;

    /// All of the bias is taken off: the tiles multiply signed bytes.
    #[inline(always)]
    unsafe fn expand(step: usize, rows: &Rows, prepared: *mut F::Prepared) {
        F::expand(step, rows, F::BIAS, prepared);
    }

    #[inline(always)]
    unsafe fn sweep(panel: &Panel, job: &Job<'_>, n_rows: usize, k0: usize, n: usize) {
        let n_groups = job.acts.n_groups();
        for g in (0..n_groups).step_by(2) {
            let next = NextActs::<2>::after(panel, job, g, k0, n);
            for r in (0..n_rows).step_by(LANES) {
                if let Some(next) = &next {
                    next.fetch(r / LANES, n_rows.div_ceil(LANES));
                }
                if g == 0 {
                    panel.fetch_next(r..r + LANES);
                }
                match n_groups - g {
                    1 => rows::<F, 1>(panel, &[job.acts.group(g)], r, g, k0, n),
                    _ => rows::<F, 2>(panel, &[job.acts.group(g), job.acts.group(g + 1)], r, g, k0, n),
                }
            }
        }
    }
}

/// 16 rows from `r` on times `G` groups: some sub-blocks' integer products, then their scaling, in turn.
#[inline(always)]
unsafe fn rows<F: Format, const G: usize>(
    panel: &Panel,
    acts: &[Group<'_>; G],
    r: usize,
    g: usize,
    k0: usize,
    n: usize,
) {
    /// Rows that are scaled side by side.
    const R: usize = 4;
    let n_subs = n / F::SUB;
    let mut floats = [[[_mm512_setzero_ps(); G]; R]; LANES / R];
    for sub0 in (0..n_subs).step_by(TILE_SUBS) {
        let subs = sub0..n_subs.min(sub0 + TILE_SUBS);
        for sub in subs.clone().step_by(2) {
            multiply::<F, G>(panel, acts, r, sub, k0 + sub * F::SUB, sub - sub0, sub + 1 < subs.end);
        }
        for (i, floats) in floats.iter_mut().enumerate() {
            let mut sums = *floats;
            for sub in subs.clone() {
                let at = k0 + sub * F::SUB;
                let mut dots = [[_mm512_setzero_si512(); G]; R];
                for row in 0..R {
                    for j in 0..G {
                        let from = tile(panel, sub - sub0, j).add((i * R + row) * LANES);
                        dots[row][j] = _mm512_loadu_si512(from.cast());
                    }
                }
                scale::<F, R, G>(panel, acts, r + i * R, at, sub, &dots, &mut sums);
                if ends_block::<F>(sub) {
                    close::<F, R, G>(panel, acts, r + i * R, g, at, &mut sums);
                }
            }
            *floats = sums;
        }
    }
    if F::BLOCK == 32 {
        for (i, floats) in floats.iter_mut().enumerate() {
            close::<F, R, G>(panel, acts, r + i * R, g, 0, floats);
        }
    }
}

/// Where the products of the `i`th sub-block with group `j` wait for their scales.
#[inline(always)]
unsafe fn tile(panel: &Panel, i: usize, j: usize) -> *mut i32 {
    panel.tiles.add((2 * i + j) * LANES * LANES)
}

/// Integer products of 16 rows' sub-block `sub`, at column `at`, with `G` groups, into the `i`th tiles; and of the next
/// sub-block if there are `two`, so that one product's way through the unit hides behind another's.
#[inline(always)]
unsafe fn multiply<F: Format, const G: usize>(
    panel: &Panel,
    acts: &[Group<'_>; G],
    r: usize,
    sub: usize,
    at: usize,
    i: usize,
    two: bool,
) {
    let weights = panel.codes.add(r * STRIDE + sub * F::SUB);
    let n = if two { 2 } else { 1 };
    let x =
        each!([std::ptr::null::<i8>(); G], j => acts[j].codes[at * LANES..][..n * F::SUB * LANES].as_ptr());
    zero::<0>();
    zero::<1>();
    zero::<2>();
    zero::<3>();
    for k in (0..F::SUB).step_by(tile_cols::<F>()) {
        load::<6>(weights.add(k), STRIDE);
        load::<4>(x[0].add(k * LANES).cast(), 64);
        dot::<0, 6, 4>();
        if G == 2 {
            load::<5>(x[1].add(k * LANES).cast(), 64);
            dot::<1, 6, 5>();
        }
        if two {
            load::<7>(weights.add(F::SUB + k), STRIDE);
            load::<4>(x[0].add((F::SUB + k) * LANES).cast(), 64);
            dot::<2, 7, 4>();
            if G == 2 {
                load::<5>(x[1].add((F::SUB + k) * LANES).cast(), 64);
                dot::<3, 7, 5>();
            }
        }
    }
    store::<0>(tile(panel, i, 0));
    if G == 2 {
        store::<1>(tile(panel, i, 1));
    }
    if two {
        store::<2>(tile(panel, i + 1, 0));
        if G == 2 {
            store::<3>(tile(panel, i + 1, 1));
        }
    }
}

/// Tile `T` := rows that are `stride` bytes apart.
#[inline(always)]
unsafe fn load<const T: usize>(rows: *const u8, stride: usize) {
    // SAFETY: the caller has set the tiles up and owns memory of their shape, here and below.
    asm!("tileloadd tmm{t}, [{p} + {s}]", t = const T, p = in(reg) rows, s = in(reg) stride,
        options(nostack, readonly));
}

/// Tile `C` := 0.
#[inline(always)]
unsafe fn zero<const C: usize>() {
    // SAFETY: see `load`.
    asm!("tilezero tmm{c}", c = const C, options(nostack, nomem));
}

/// Adds to tile `C` the products of `W`, four columns at a time, with `X`.
#[inline(always)]
unsafe fn dot<const C: usize, const W: usize, const X: usize>() {
    // SAFETY: see `load`.
    asm!("tdpbssd tmm{c}, tmm{w}, tmm{x}", c = const C, w = const W, x = const X, options(nostack, nomem));
}

/// Stores tile `T` as 16 rows of 16.
#[inline(always)]
unsafe fn store<const T: usize>(to: *mut i32) {
    // SAFETY: see `load`.
    asm!("tilestored [{p} + {s}], tmm{t}", t = const T, p = in(reg) to, s = in(reg) 64usize, options(nostack));
}
