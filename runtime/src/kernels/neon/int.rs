//! Products with int8 activations: a block is taken apart once by the codecs' accessors and multiplied with all
//! tokens by the dot-product instruction.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set and for `Matmul`'s contract alone

use crate::kernels::matmul::{Job, Scratch};
use crate::kernels::memory::LANES;
use crate::kernels::scalar::{Parts, parts, sub_len};
use std::arch::aarch64::*;
use std::arch::asm;

/// Tokens that share the taking apart of a block.
const TOKENS: usize = 16;

/// Weights times int8 activations.
///
/// # Safety
/// That of [`crate::kernels::matmul::Matmul`].
#[target_feature(enable = "neon,dotprod")]
pub(crate) unsafe fn int_matmul(job: &Job<'_>, _scratch: &mut Scratch) {
    let dtype = job.weights.dtype;
    let (len, sub) = (dtype.block_len(), sub_len(dtype));
    for row0 in job.rows.clone().step_by(LANES) {
        let n_rows = LANES.min(job.rows.end - row0);
        for t0 in (0..job.acts.n_tokens()).step_by(TOKENS) {
            let tokens = t0..(t0 + TOKENS).min(job.acts.n_tokens());
            let mut out = [[0.0; LANES]; TOKENS];
            for r in 0..n_rows {
                for (b, block) in job.weights.row(row0 + r).chunks_exact(dtype.block_bytes()).enumerate() {
                    let parts = parts(dtype, block);
                    for t in tokens.clone() {
                        out[t - t0][r] += block_product(job, &parts, len, sub, t, b);
                    }
                }
            }
            for t in tokens {
                job.out.put(row0, t, &out[t - t0][..n_rows]);
            }
        }
    }
}

/// One block times the activations of its columns; the same integers as on every instruction set.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn block_product(job: &Job<'_>, p: &Parts, len: usize, sub: usize, t: usize, b: usize) -> f32 {
    let codes = &job.acts.codes(t)[b * len..][..len];
    let sums = if sub == 16 { job.acts.sums16(t) } else { job.acts.sums32(t) };
    let mut dots = vdupq_n_s32(0);
    let mut mins = 0;
    for j in 0..len / sub {
        let mut dot = vdupq_n_s32(0);
        for k in (j * sub..(j + 1) * sub).step_by(16) {
            dot = dot_16(dot, vld1q_s8(p.codes[k..].as_ptr()), vld1q_s8(codes[k..].as_ptr()));
        }
        dots = vmlaq_n_s32(dots, dot, p.scales[j]);
        mins += p.mins[j] * sums[b * (len / sub) + j];
    }
    job.acts.scales(t)[b] * (p.d * vaddvq_s32(dots) as f32 - p.dmin * mins as f32)
}

/// Adds to each lane the products of four signed bytes. The intrinsic for it is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dot_16(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b,
         options(pure, nomem, nostack, preserves_flags));
    sum
}
