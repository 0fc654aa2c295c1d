//! The last steps of `Lanes::sum`: lanes i + 4 are added to lanes i < 4, of these i + 2 and then i + 1.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set, AVX, which the callers have

use std::arch::x86_64::*;

/// Lanes i + 4 added to lanes i.
#[inline(always)]
pub(super) unsafe fn fold_eight(x: __m256) -> __m128 {
    _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
}

/// The sum of four lanes.
#[inline(always)]
pub(super) unsafe fn sum_four(x: __m128) -> f32 {
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}
