//! Sixteen f32 in one 512-bit register.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contract of `Lanes` alone

use crate::kernels::lanes::Lanes;
use crate::kernels::x86::sums::{fold_eight, sum_four};
use crate::kernels::x86::unpack::look_up_bytes;
use std::arch::x86_64::*;

/// Sixteen f32 in a register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

impl Lanes for Avx512 {
    const TILE_TOKENS: usize = 12;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(_mm512_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        _mm512_storeu_ps(p, self.0);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        Self(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Self(_mm512_add_ps(self.0, b.0))
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        Self(_mm512_sub_ps(self.0, b.0))
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        Self(_mm512_mul_ps(self.0, b.0))
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        Self(_mm512_div_ps(self.0, b.0))
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(_mm512_fmadd_ps(self.0, b.0, c.0))
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        Self(_mm512_abs_ps(self.0))
    }
    #[inline(always)]
    unsafe fn at_most(self, limit: Self) -> Self {
        Self(_mm512_min_ps(limit.0, self.0)) // the second operand if either is NaN
    }
    #[inline(always)]
    unsafe fn at_least(self, limit: Self) -> Self {
        Self(_mm512_max_ps(limit.0, self.0))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0))
    }
    #[inline(always)]
    unsafe fn scale_by_power(self, n: Self) -> Self {
        Self(_mm512_scalef_ps(self.0, n.0))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        sum_floats(self.0)
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        _mm512_reduce_max_ps(self.0)
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8) -> i32 {
        let codes = _mm512_cvtps_epi32(self.0);
        _mm_storeu_si128(p.cast(), _mm512_cvtsepi32_epi8(codes));
        _mm512_reduce_add_epi32(codes)
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))))
    }
    #[inline(always)]
    unsafe fn look_up(self, p: *const u8) -> (Self, Self) {
        let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
        // Only the lowest four bits of an index count.
        let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), self.0);
        (Self(high), Self(_mm512_permutexvar_ps(bytes, self.0)))
    }
    #[inline(always)]
    unsafe fn look_up_i8(table: &[i8; 16], p: *const u8, to: *mut i8) {
        look_up_bytes(table, p, to);
    }
    #[inline(always)]
    unsafe fn to_bf16(self) -> Self {
        let bits = _mm512_castps_si512(self.0);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        Self(_mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(!0xffff))))
    }
    #[inline(always)]
    unsafe fn to_f16(self) -> Self {
        Self(_mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)))
    }
    #[inline(always)]
    unsafe fn add_quads(sums: &mut [i32; 16], codes: *const i8) {
        let (all, codes) = (_mm512_loadu_si512(sums.as_ptr().cast()), _mm512_loadu_si512(codes.cast()));
        let all = _mm512_dpbusd_epi32(all, _mm512_set1_epi8(1), codes);
        _mm512_storeu_si512(sums.as_mut_ptr().cast(), all);
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32) {
        let mut rows = [_mm512_setzero_si512(); 16];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = _mm512_loadu_si512(from.add(r * stride).cast());
        }
        transpose_dwords(&mut rows);
        for (r, row) in rows.iter().enumerate() {
            _mm512_storeu_si512(to.add(r * 16).cast(), *row);
        }
    }
}

/// The sum of sixteen f32, in the order of [`Lanes::sum`].
#[inline(always)]
unsafe fn sum_floats(x: __m512) -> f32 {
    sum_four(fold_eight(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x))))
}

/// Transposes 16 rows of 16 dwords.
#[inline(always)]
pub(super) unsafe fn transpose_dwords(rows: &mut [__m512i; 16]) {
    let mut a = *rows;
    // Dwords of row pairs, then qwords of those: t[4q + k] has column 4·lane + k of rows 4q..4q + 4 in each lane.
    for i in (0..16).step_by(2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    let mut t = a;
    for q in (0..16).step_by(4) {
        t[q] = _mm512_unpacklo_epi64(a[q], a[q + 2]);
        t[q + 1] = _mm512_unpackhi_epi64(a[q], a[q + 2]);
        t[q + 2] = _mm512_unpacklo_epi64(a[q + 1], a[q + 3]);
        t[q + 3] = _mm512_unpackhi_epi64(a[q + 1], a[q + 3]);
    }
    // Then 128-bit lanes: column 4·lane + k gathers lane `lane` of t[k], t[4 + k], t[8 + k], t[12 + k].
    for k in 0..4 {
        let low01 = _mm512_shuffle_i32x4::<0x44>(t[k], t[4 + k]);
        let high01 = _mm512_shuffle_i32x4::<0xee>(t[k], t[4 + k]);
        let low23 = _mm512_shuffle_i32x4::<0x44>(t[8 + k], t[12 + k]);
        let high23 = _mm512_shuffle_i32x4::<0xee>(t[8 + k], t[12 + k]);
        rows[k] = _mm512_shuffle_i32x4::<0x88>(low01, low23);
        rows[4 + k] = _mm512_shuffle_i32x4::<0xdd>(low01, low23);
        rows[8 + k] = _mm512_shuffle_i32x4::<0x88>(high01, high23);
        rows[12 + k] = _mm512_shuffle_i32x4::<0xdd>(high01, high23);
    }
}
