//! Sixteen f32 side by side, as each instruction set holds them, and the functions that are built from them once for
//! all: exp, sigmoid, softplus.
//!
//! Everything here is `inline(always)`, so that it is compiled into a caller that has the instruction set switched on.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contract of `Lanes` alone

use super::memory::LANES;

/// Sixteen f32. Every function gives the same bits on every instruction set, but for those of a NaN and the sign of a
/// rounded 0.
///
/// # Safety
/// All functions require that the instruction set is present; pointers are valid for 16 numbers of their type.
pub(crate) trait Lanes: Copy {
    /// Tokens of a register tile of 16 rows: as many sums as there are registers for.
    const TILE_TOKENS: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// From 16 little-endian f16.
    unsafe fn load_f16(p: *const u8) -> Self;
    /// From 16 little-endian bf16.
    unsafe fn load_bf16(p: *const u8) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// self·b + c, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    unsafe fn abs(self) -> Self;
    /// The smaller; `self` if it is NaN.
    unsafe fn at_most(self, limit: Self) -> Self;
    /// The larger; `self` if it is NaN.
    unsafe fn at_least(self, limit: Self) -> Self;
    /// To the nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// self·2^n for integral n in -160..=160, rounded once.
    unsafe fn scale_by_power(self, n: Self) -> Self;
    /// Lanes i + 8 are added to lanes i < 8, of these i + 4 to i < 4, then i + 2 and i + 1.
    unsafe fn sum(self) -> f32;
    unsafe fn largest(self) -> f32;
    /// Stores integral numbers within -128..=127 as bytes and returns their sum.
    unsafe fn store_i8(self, p: *mut i8) -> i32;

    /// From 16 signed bytes.
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        let bytes = p.cast::<[i8; LANES]>().read_unaligned();
        Self::load(bytes.map(f32::from).as_ptr())
    }

    /// Of 16 bytes, the numbers that the high halves name in `self`, and those that the low halves name.
    #[inline(always)]
    unsafe fn look_up(self, p: *const u8) -> (Self, Self) {
        let mut table = [0.0; LANES];
        self.store(table.as_mut_ptr());
        let bytes = p.cast::<[u8; LANES]>().read_unaligned();
        let high = bytes.map(|b| table[usize::from(b >> 4)]);
        let low = bytes.map(|b| table[usize::from(b & 15)]);
        (Self::load(high.as_ptr()), Self::load(low.as_ptr()))
    }

    /// The same of a table of bytes: 32 bytes.
    #[inline(always)]
    unsafe fn look_up_i8(table: &[i8; 16], p: *const u8, to: *mut i8) {
        let bytes = p.cast::<[u8; LANES]>().read_unaligned();
        for (i, b) in bytes.into_iter().enumerate() {
            *to.add(i) = table[usize::from(b >> 4)];
            *to.add(LANES + i) = table[usize::from(b & 15)];
        }
    }

    /// Rounded to bf16, ties to even.
    #[inline(always)]
    unsafe fn to_bf16(self) -> Self {
        let mut x = [0.0; LANES];
        self.store(x.as_mut_ptr());
        Self::load(x.map(|x| half::bf16::from_f32(x).to_f32()).as_ptr())
    }

    /// Rounded to f16, ties to even.
    #[inline(always)]
    unsafe fn to_f16(self) -> Self {
        let mut x = [0.0; LANES];
        self.store(x.as_mut_ptr());
        Self::load(x.map(|x| half::f16::from_f32(x).to_f32()).as_ptr())
    }

    /// Adds to each of 16 sums four of 64 signed bytes.
    #[inline(always)]
    unsafe fn add_quads(sums: &mut [i32; LANES], codes: *const i8) {
        let codes = codes.cast::<[[i8; 4]; LANES]>().read_unaligned();
        for (sum, quad) in sums.iter_mut().zip(codes) {
            *sum += quad.map(i32::from).iter().sum::<i32>();
        }
    }

    /// Transposes 16 rows of 16 numbers, `stride` apart: row r of `to` gets column r. Moves bits, whatever they stand for.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32) {
        for r in 0..LANES {
            for c in 0..LANES {
                *to.add(c * LANES + r) = *from.add(r * stride + c);
            }
        }
    }
}

/// e^x. Relative error at most 2e-7 where the result is normal, absolute error at most 1.5e-45 (one step) where it is
/// denormal; 0 for -inf, inf from 88.73 on, NaN for NaN.
///
/// x = n·ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series to the sixth power, whose rest is below 1.3e-7 · e^r.
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    const LN2_HI: f32 = 0.693_359_4; // 355 / 512: n times it is exact
    const LN2_LO: f32 = -2.121_944_4e-4;
    const COEFFICIENTS: [f32; 6] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    // Below -104 everything is 0, above 89 everything is inf.
    let x = x.at_least(L::splat(-104.0)).at_most(L::splat(89.0));
    let n = x.mul(L::splat(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(L::splat(-LN2_HI), x);
    let r = n.mul_add(L::splat(-LN2_LO), r);
    let mut p = L::splat(1.0 / 5040.0);
    for c in COEFFICIENTS {
        p = p.mul_add(r, L::splat(c));
    }
    p.mul_add(r, L::splat(1.0)).scale_by_power(n)
}

/// x·sigmoid(x) = x / (1 + e^-x). Relative error at most 6e-7 for |x| <= 87; below that the result is within 1e-36 of
/// the truth. -inf gives NaN (as in PyTorch), inf gives inf.
#[inline(always)]
pub(crate) unsafe fn silu<L: Lanes>(x: L) -> L {
    let minus = L::splat(0.0).sub(x);
    x.div(exp(minus).add(L::splat(1.0)))
}

/// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|). Relative error at most 6e-7, or three denormal steps; above 20 it is x,
/// as in PyTorch.
///
/// log(1 + u) = 2 artanh(u / (2 + u)) with the argument s in 0..=1/3, by its series to s^15.
#[inline(always)]
pub(crate) unsafe fn softplus<L: Lanes>(x: L) -> L {
    const COEFFICIENTS: [f32; 7] = [1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0];
    let u = exp(L::splat(0.0).sub(x.abs()));
    let s = u.div(u.add(L::splat(2.0)));
    let s2 = s.mul(s);
    let mut p = L::splat(1.0 / 15.0);
    for c in COEFFICIENTS {
        p = p.mul_add(s2, L::splat(c));
    }
    s.add(s).mul_add(p, x.at_least(L::splat(0.0)))
}

/// The first `values.len()` (at most 16) lanes from a slice, zeros after them.
#[inline(always)]
pub(crate) unsafe fn load_part<L: Lanes>(values: &[f32]) -> L {
    if values.len() >= LANES {
        return L::load(values.as_ptr());
    }
    let mut full = [0.0; LANES];
    full[..values.len()].copy_from_slice(values);
    L::load(full.as_ptr())
}

/// As an array.
#[inline(always)]
pub(crate) unsafe fn to_array<L: Lanes>(x: L) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    x.store(out.as_mut_ptr());
    out
}
