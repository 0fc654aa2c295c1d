//! Scales beside the codes, as those of Q8_0 blocks.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set alone

use crate::kernels::matmul::MatrixRef;
use crate::kernels::memory::LANES;
use crate::kernels::x86::few::fetch_line;
use kestrel_quant::codec::bnb8;
use kestrel_quant::codec::scales::{Absmax, Scales};
use std::arch::x86_64::*;
use std::ops::Range;

/// The scales of the blocks of 32 of consecutive rows.
pub(super) struct RowScales<'a> {
    scales: &'a Scales<'a>,
    /// What they call the first weight.
    first: usize,
    /// Those of the rows, where they are plain numbers and sixteen blocks of 32 begin with a block of theirs.
    plain: Option<&'a [f32]>,
    shift: u32,
    /// Ones for as many as sixteen blocks of 32 have.
    mask: __mmask16,
    /// The scale of each of sixteen blocks, from such a beginning.
    which: __m512i,
}

impl<'a> RowScales<'a> {
    #[inline(always)]
    pub unsafe fn of(weights: &'a MatrixRef<'_>, rows: Range<usize>) -> Self {
        let (scales, first) = weights.beside(rows.start);
        let shift = scales.blocksize.trailing_zeros();
        let plain = match &scales.absmax {
            Absmax::F32(all) if scales.blocksize <= 32 * LANES && first & (scales.blocksize - 1) == 0 => {
                Some(&all[first >> shift..][..(rows.len() * weights.cols).div_ceil(scales.blocksize)])
            }
            _ => None,
        };
        Self { scales, first, plain, shift, mask: mask_of(n_scales(LANES, shift)), which: which(0, shift) }
    }

    /// The scales of blocks `b..b + n` of 32, at most 16 and `b` a multiple of 16, over 127 and rounded to f16; anything
    /// after them.
    ///
    /// The blocks that `few::fit` lets through share 2^n of the scales, so consecutive ones need consecutive scales, at most
    /// sixteen, which are loaded together and handed out.
    #[inline(always)]
    pub unsafe fn sixteen(&self, b: usize, n: usize) -> __m512 {
        if let Some(plain) = self.plain {
            let at = (32 * b) >> self.shift;
            debug_assert!(at + n_scales(n, self.shift) <= plain.len());
            // Of those that do not exist the mask keeps off; they are not handed out.
            let mask = if n == LANES { self.mask } else { mask_of(n_scales(n, self.shift)) };
            let p = plain.as_ptr().add(at);
            // A stream of its own beside the codes, which the processor's own prefetching leaves at the end of each page.
            fetch_line(p.cast());
            let scales = _mm512_maskz_loadu_ps(mask, p);
            return _mm512_permutexvar_ps(self.which, rounded_all(scales));
        }
        let at = self.first + 32 * b;
        let block = at >> self.shift;
        let n_scales = ((at + 32 * (n - 1)) >> self.shift) - block + 1;
        let scales = match &self.scales.absmax {
            Absmax::F32(all) => rounded(&all[block..block + n_scales]),
            nested => {
                let mut of = [0.0; LANES];
                for (i, scale) in of[..n_scales].iter_mut().enumerate() {
                    *scale = nested.get(block + i);
                }
                rounded(&of)
            }
        };
        // Block i is (offset of its first weight) / blocksize scales after the first.
        let offset = (at & (self.scales.blocksize - 1)) as i32;
        _mm512_permutexvar_ps(which(offset, self.shift), scales)
    }
}

/// Where sixteen blocks of 32 have their scales, of which each serves `1 << shift` weights, the first from `-offset` on.
#[inline(always)]
unsafe fn which(offset: i32, shift: u32) -> __m512i {
    let steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let offsets = _mm512_add_epi32(_mm512_slli_epi32::<5>(steps), _mm512_set1_epi32(offset));
    _mm512_srl_epi32(offsets, _mm_cvtsi32_si128(shift as i32))
}

/// At most sixteen scales over 127 and rounded to f16.
#[inline(always)]
unsafe fn rounded(absmax: &[f32]) -> __m512 {
    rounded_all(_mm512_maskz_loadu_ps(mask_of(absmax.len()), absmax.as_ptr()))
}

#[inline(always)]
unsafe fn rounded_all(absmax: __m512) -> __m512 {
    let d = _mm512_mul_ps(absmax, _mm512_set1_ps(bnb8::INVERSE_127));
    _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(d))
}

/// Scales of `n` blocks of 32 that begin with one of them, each of which serves `1 << shift` weights.
#[inline(always)]
fn n_scales(n: usize, shift: u32) -> usize {
    (32 * n).div_ceil(1 << shift)
}

/// Ones for the first `n` of sixteen.
#[inline(always)]
pub(super) fn mask_of(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}
