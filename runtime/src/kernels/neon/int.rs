//! Products with int8 activations: a block is taken apart by the codecs' accessors and multiplied by the dot-product
//! instruction, whose lanes are sums of four products.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use crate::kernels::blocks::{self, QUADS};
use crate::kernels::matmul::{Job, Scratch};
use std::arch::aarch64::*;
use std::arch::asm;

/// Weights times int8 activations.
///
/// # Safety
/// That of [`crate::kernels::matmul::Matmul`].
#[target_feature(enable = "neon,dotprod")]
pub(crate) unsafe fn int_matmul(job: &Job<'_>, _scratch: &mut Scratch) {
    // SAFETY: the instruction set is that of this function.
    blocks::int_matmul::<false>(job, |w, x| unsafe { quads(w, x) });
}

/// Sums of four products each.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn quads(w: &[i8], x: &[i8]) -> [i32; QUADS] {
    let mut sums = [0; QUADS];
    let parts = w.as_chunks::<16>().0.iter().zip(x.as_chunks::<16>().0);
    for ((w, x), sums) in parts.zip(sums.as_chunks_mut::<4>().0) {
        vst1q_s32(sums.as_mut_ptr(), dot_16(vdupq_n_s32(0), vld1q_s8(w.as_ptr()), vld1q_s8(x.as_ptr())));
    }
    sums
}

/// Adds to each lane the products of four signed bytes. The intrinsic for it is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dot_16(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b,
         options(pure, nomem, nostack, preserves_flags));
    sum
}
