//! Sixteen f32 in four 128-bit registers.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contract of `Lanes` alone

use crate::kernels::lanes::Lanes;
use std::arch::aarch64::*;

/// Sixteen f32 in four registers.
#[derive(Clone, Copy)]
pub(crate) struct Neon([float32x4_t; 4]);

impl Neon {
    #[inline(always)]
    fn map(self, f: impl Fn(float32x4_t) -> float32x4_t) -> Self {
        Self(self.0.map(f))
    }

    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Lanes for Neon {
    const TILE_TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([vdupq_n_f32(x); 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(std::array::from_fn(|i| vld1q_f32(p.add(4 * i))))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        self.0.into_iter().enumerate().for_each(|(i, x)| vst1q_f32(p.add(4 * i), x));
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        let bytes = p.cast::<[[u8; 2]; 16]>().read_unaligned();
        let floats = bytes.map(|b| half::f16::from_le_bytes(b).to_f32_const());
        Self::load(floats.as_ptr())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        let part = |i: usize| {
            let bits = vreinterpret_u16_u8(vld1_u8(p.add(8 * i)));
            vreinterpretq_f32_u32(vshll_n_u16::<16>(bits))
        };
        Self(std::array::from_fn(part))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| vaddq_f32(a, b))
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| vsubq_f32(a, b))
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| vmulq_f32(a, b))
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| vdivq_f32(a, b))
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| vfmaq_f32(c.0[i], self.0[i], b.0[i])))
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        self.map(|x| vabsq_f32(x))
    }
    #[inline(always)]
    unsafe fn at_most(self, limit: Self) -> Self {
        self.zip(limit, |x, limit| vminq_f32(x, limit)) // NaN if either is
    }
    #[inline(always)]
    unsafe fn at_least(self, limit: Self) -> Self {
        self.zip(limit, |x, limit| vmaxq_f32(x, limit))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        self.map(|x| vrndnq_f32(x))
    }
    #[inline(always)]
    unsafe fn scale_by_power(self, n: Self) -> Self {
        // In two steps, so that neither factor leaves the range of normal numbers and only the last one rounds.
        let power = |n| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))));
        self.zip(n, |x, n| {
            let n = vcvtq_s32_f32(n);
            let half = vshrq_n_s32::<1>(n);
            vmulq_f32(vmulq_f32(x, power(half)), power(vsubq_s32(n, half)))
        })
    }
    #[inline(always)]
    unsafe fn look_up(self, p: *const u8) -> (Self, Self) {
        let [a, b, c, d] = self.0.map(|x| vreinterpretq_u8_f32(x));
        let table = uint8x16x4_t(a, b, c, d);
        let (high, low) = halves(p);
        (floats_of(table, high), floats_of(table, low))
    }
    #[inline(always)]
    unsafe fn look_up_i8(table: &[i8; 16], p: *const u8, to: *mut i8) {
        let table = vld1q_s8(table.as_ptr());
        let (high, low) = halves(p);
        vst1q_s8(to, vqtbl1q_s8(table, high));
        vst1q_s8(to.add(16), vqtbl1q_s8(table, low));
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let [a, b, c, d] = self.0;
        let x = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
        let x = vadd_f32(vget_low_f32(x), vget_high_f32(x));
        vget_lane_f32::<0>(x) + vget_lane_f32::<1>(x)
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let [a, b, c, d] = self.0;
        vmaxvq_f32(vmaxq_f32(vmaxq_f32(a, b), vmaxq_f32(c, d)))
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8) -> i32 {
        let [a, b, c, d] = self.0.map(|x| vcvtq_s32_f32(x));
        let low = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b));
        let high = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
        vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
        vaddvq_s32(vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d)))
    }
}

/// The halves of 16 bytes, first the high ones.
#[inline(always)]
unsafe fn halves(p: *const u8) -> (uint8x16_t, uint8x16_t) {
    let bytes = vld1q_u8(p);
    (vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15)))
}

/// The floats of a table of sixteen that codes name.
#[inline(always)]
unsafe fn floats_of(table: uint8x16x4_t, codes: uint8x16_t) -> Neon {
    const FIRST_FOUR: [u8; 16] = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3];
    const BYTE: [u8; 16] = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3];
    Neon(std::array::from_fn(|i| {
        let which = vaddq_u8(vld1q_u8(FIRST_FOUR.as_ptr()), vdupq_n_u8(4 * i as u8));
        let first_byte = vshlq_n_u8::<2>(vqtbl1q_u8(codes, which));
        vreinterpretq_f32_u8(vqtbl4q_u8(table, vaddq_u8(first_byte, vld1q_u8(BYTE.as_ptr()))))
    }))
}
