//! Sixteen f32 in two 256-bit registers.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contract of `Lanes` alone

use crate::kernels::lanes::Lanes;
use crate::kernels::x86::sums::{fold_eight, sum_four};
use crate::kernels::x86::unpack::look_up_bytes;
use std::arch::x86_64::*;

/// Sixteen f32 in two registers.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

/// The same operation on both registers.
macro_rules! both {
    ($f:ident, $($x:expr),+) => { Self($f($($x.0),+), $f($($x.1),+)) };
}

impl Lanes for Avx2 {
    const TILE_TOKENS: usize = 6;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(_mm256_set1_ps(x), _mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        _mm256_storeu_ps(p, self.0);
        _mm256_storeu_ps(p.add(8), self.1);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        let half = |p: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        Self(half(p), half(p.add(16)))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        let half = |p: *const u8| {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        };
        Self(half(p), half(p.add(16)))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        both!(_mm256_add_ps, self, b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        both!(_mm256_sub_ps, self, b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        both!(_mm256_mul_ps, self, b)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        both!(_mm256_div_ps, self, b)
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        both!(_mm256_fmadd_ps, self, b, c)
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        let sign = Self::splat(-0.0);
        both!(_mm256_andnot_ps, sign, self)
    }
    #[inline(always)]
    unsafe fn at_most(self, limit: Self) -> Self {
        both!(_mm256_min_ps, limit, self) // the second operand if either is NaN
    }
    #[inline(always)]
    unsafe fn at_least(self, limit: Self) -> Self {
        both!(_mm256_max_ps, limit, self)
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        let round = |x| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        Self(round(self.0), round(self.1))
    }
    #[inline(always)]
    unsafe fn scale_by_power(self, n: Self) -> Self {
        // In two steps, so that neither factor leaves the range of normal numbers and only the last one rounds.
        both!(scale_by_power, self, n)
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        sum_floats(_mm256_add_ps(self.0, self.1))
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let x = _mm256_max_ps(self.0, self.1);
        let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        let half = |p: *const u8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
        Self(half(p), half(p.add(8)))
    }
    #[inline(always)]
    unsafe fn look_up(self, p: *const u8) -> (Self, Self) {
        // Bit 3 of an index, brought to the sign, says which half of the table.
        let one = |index: __m256i| {
            let low = _mm256_permutevar8x32_ps(self.0, index);
            let high = _mm256_permutevar8x32_ps(self.1, index);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
        };
        let a = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
        let b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()));
        let high = Self(one(_mm256_srli_epi32::<4>(a)), one(_mm256_srli_epi32::<4>(b)));
        (high, Self(one(a), one(b)))
    }
    #[inline(always)]
    unsafe fn look_up_i8(table: &[i8; 16], p: *const u8, to: *mut i8) {
        look_up_bytes(table, p, to);
    }
    #[inline(always)]
    unsafe fn to_bf16(self) -> Self {
        let one = |x: __m256| {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(!0xffff)))
        };
        Self(one(self.0), one(self.1))
    }
    #[inline(always)]
    unsafe fn to_f16(self) -> Self {
        let one = |x: __m256| _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        Self(one(self.0), one(self.1))
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8) -> i32 {
        let (a, b) = (_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
        // Packing works within 128-bit lanes: a0 b0 | a1 b1, put back in order by quadwords.
        let words = _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_packs_epi32(a, b));
        let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        _mm_storeu_si128(p.cast(), bytes);
        sum_dwords(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    unsafe fn add_quads(sums: &mut [i32; 16], codes: *const i8) {
        for half in 0..2 {
            let pairs = _mm256_loadu_si256(codes.add(32 * half).cast());
            let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), pairs);
            let quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            let to = sums.as_mut_ptr().add(8 * half).cast();
            _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), quads));
        }
    }
}

/// 2^n of small whole numbers.
#[inline(always)]
unsafe fn power_of_two(n: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
}

/// x·2^n
#[inline(always)]
unsafe fn scale_by_power(x: __m256, n: __m256) -> __m256 {
    let n = _mm256_cvtps_epi32(n);
    let half = _mm256_srai_epi32::<1>(n);
    _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(n, half)))
}

/// The sum of eight i32.
#[inline(always)]
unsafe fn sum_dwords(x: __m256i) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b0100_1110>(x));
    _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b1011_0001>(x)))
}

/// The sum of eight f32.
#[inline(always)]
pub(super) unsafe fn sum_floats(x: __m256) -> f32 {
    sum_four(fold_eight(x))
}
