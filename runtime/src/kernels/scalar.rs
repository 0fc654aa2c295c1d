//! Plain Rust: the lanes as an array, and the integer products from the codecs' own accessors.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contracts of `Lanes` and `matmul::Matmul` alone

use super::blocks::{self, QUADS};
use super::lanes::Lanes;
use super::matmul::{Job, Scratch};
use super::memory::LANES;

/// Sixteen f32 as an array.
#[derive(Clone, Copy)]
pub(crate) struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Lanes for Scalar {
    const TILE_TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(p.cast::<[f32; LANES]>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        p.cast::<[f32; LANES]>().write_unaligned(self.0);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        let bytes = p.cast::<[[u8; 2]; LANES]>().read_unaligned();
        Self(bytes.map(|b| half::f16::from_le_bytes(b).to_f32_const()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        let bytes = p.cast::<[[u8; 2]; LANES]>().read_unaligned();
        Self(bytes.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| fused(self.0[i], b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        Self(self.0.map(f32::abs))
    }
    #[inline(always)]
    unsafe fn at_most(self, limit: Self) -> Self {
        self.zip(limit, |a, l| if l < a { l } else { a })
    }
    #[inline(always)]
    unsafe fn at_least(self, limit: Self) -> Self {
        self.zip(limit, |a, l| if l > a { l } else { a })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        const MAGIC: f32 = 12_582_912.0; // 1.5 · 2^23: adding it leaves no fraction bits; callers stay below 2^22
        Self(self.0.map(|x| (x + MAGIC) - MAGIC))
    }
    #[inline(always)]
    unsafe fn scale_by_power(self, n: Self) -> Self {
        // In two steps, so that neither factor leaves the range of normal numbers and only the last one rounds.
        let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
        self.zip(n, |x, n| {
            let n = n as i32;
            let half = n >> 1;
            x * power(half) * power(n - half)
        })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let x = self.0;
        let y: [f32; 8] = std::array::from_fn(|i| x[i] + x[i + 8]);
        let z: [f32; 4] = std::array::from_fn(|i| y[i] + y[i + 4]);
        (z[0] + z[2]) + (z[1] + z[3])
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8) -> i32 {
        let codes = self.0.map(|x| x as i8);
        p.cast::<[i8; LANES]>().write_unaligned(codes);
        codes.iter().map(|&q| i32::from(q)).sum()
    }
}

/// a·b + c, rounded once: `f32::mul_add`, which is a slow library call where the target has no such instruction, and
/// this code is what runs on machines without one.
///
/// The product is exact in f64. Its sum with c is rounded there to odd (if inexact, to the neighbour whose last bit is
/// set), which the second rounding, to f32, cannot mistake for a tie.
#[inline(always)]
pub(super) fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        return a.mul_add(b, c);
    }
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = p + c;
    let c_part = sum - p;
    let rest = (p - (sum - c_part)) + (c - c_part); // what the sum lacks, exactly; NaN if it is not finite
    let outward = if (rest > 0.0) == (sum > 0.0) { 1i64 } else { -1 };
    let step = if rest.abs() > 0.0 { outward } else { 0 };
    let bits = sum.to_bits();
    let if_even = (bits & 1).wrapping_sub(1);
    f64::from_bits(bits.wrapping_add(step as u64 & if_even)) as f32
}

/// Weights times int8 activations.
///
/// # Safety
/// [`super::matmul::Matmul`].
pub(crate) unsafe fn int_matmul(job: &Job<'_>, _scratch: &mut Scratch) {
    blocks::int_matmul::<false>(job, quads);
}

/// The same with Q4_K as int8 for many tokens.
///
/// # Safety
/// [`super::matmul::Matmul`].
pub(crate) unsafe fn int8_matmul(job: &Job<'_>, _scratch: &mut Scratch) {
    blocks::int_matmul::<true>(job, quads);
}

/// Sums of four products each.
fn quads(w: &[i8], x: &[i8]) -> [i32; QUADS] {
    let mut sums = [0; QUADS];
    for ((w, x), sum) in w.as_chunks::<4>().0.iter().zip(x.as_chunks::<4>().0).zip(&mut sums) {
        *sum = (0..4).map(|i| i32::from(w[i]) * i32::from(x[i])).sum();
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::fused;

    #[test]
    fn fused_rounds_once() {
        let mut state = 1u64;
        let mut bits = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 32) as u32
        };
        for i in 0..2_000_000 {
            let (a, b) = (f32::from_bits(bits()), f32::from_bits(bits()));
            // Anything; the neighbourhood of the product; the product cancelled; denormal results.
            let c = match i % 4 {
                0 => f32::from_bits(bits()),
                1 => a * b * (bits() as f32 - 2e9) / 1e9,
                2 => -(a * b),
                _ => f32::from_bits(bits() & 0x80ff_ffff),
            };
            let (got, truth) = (fused(a, b, c), a.mul_add(b, c));
            assert!(
                got.to_bits() == truth.to_bits() || got.is_nan() && truth.is_nan(),
                "{a:e} {b:e} {c:e}: {got:e}"
            );
        }
    }
}
