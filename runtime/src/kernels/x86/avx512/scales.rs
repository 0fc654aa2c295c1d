//! Scales beside the codes, as those of Q8_0 blocks.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set alone

use crate::kernels::matmul::{Job, MatrixRef};
use crate::kernels::memory::LANES;
use kestrel_quant::codec::bnb8;
use kestrel_quant::codec::scales::Absmax;
use std::arch::x86_64::*;

/// Whether [`sixteen`] takes the matrix, and its rows are whole fours of blocks of 32.
pub(super) fn fit(job: &Job<'_>) -> bool {
    let (scales, first) = job.weights.beside(0);
    let (blocksize, cols) = (scales.blocksize, job.weights.cols);
    cols.is_multiple_of(128) && first.is_multiple_of(32) && blocksize >= 32 && blocksize.is_power_of_two()
}

/// The scales of blocks `b..b + n` of 32 of a row, at most 16, over 127 and rounded to f16; anything after them.
///
/// The blocks that [`fit`] lets through share 2^n of the scales, so consecutive ones need consecutive scales, at most
/// sixteen, which are loaded together and handed out.
#[inline(always)]
pub(super) unsafe fn sixteen(weights: &MatrixRef<'_>, row: usize, b: usize, n: usize) -> __m512 {
    let (scales, first) = weights.beside(row);
    let shift = scales.blocksize.trailing_zeros();
    let at = first + 32 * b;
    let block = at >> shift;
    let n_scales = ((at + 32 * (n - 1)) >> shift) - block + 1;
    let absmax = match &scales.absmax {
        Absmax::F32(all) => {
            let of = &all[block..block + n_scales];
            _mm512_maskz_loadu_ps(((1u32 << n_scales) - 1) as __mmask16, of.as_ptr())
        }
        nested => {
            let mut of = [0.0; LANES];
            for (i, scale) in of[..n_scales].iter_mut().enumerate() {
                *scale = nested.get(block + i);
            }
            _mm512_loadu_ps(of.as_ptr())
        }
    };
    let d = _mm512_mul_ps(absmax, _mm512_set1_ps(bnb8::INVERSE_127));
    let d = _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(d));
    // Block i is (offset of its first weight) / blocksize scales after the first.
    let offset = (at & (scales.blocksize - 1)) as i32;
    let steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let offsets = _mm512_add_epi32(_mm512_slli_epi32::<5>(steps), _mm512_set1_epi32(offset));
    let which = _mm512_srl_epi32(offsets, _mm_cvtsi32_si128(shift as i32));
    _mm512_permutexvar_ps(which, d)
}
