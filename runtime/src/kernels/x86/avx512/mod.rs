//! AVX-512 with VNNI.

mod lanes;
mod panel;
mod rows;
mod wide;

pub(crate) use lanes::Avx512;
pub(super) use panel::{close, ends_block, scale};

use super::unpack::{self, by_type};
use crate::kernels::matmul::{INT_PANEL_TOKENS, Job, Scratch};
use kestrel_formats::GgmlType;

/// Weights times int8 activations.
///
/// # Safety
/// That of [`crate::kernels::matmul::Matmul`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(crate) unsafe fn int_matmul(job: &Job<'_>, scratch: &mut Scratch) {
    use panel::{large, small};
    // SAFETY: the caller's.
    unsafe {
        if job.acts.n_tokens() < INT_PANEL_TOKENS {
            int_rows(job, scratch);
        } else {
            by_type!(job.weights.ggml(), small, large, (job, scratch));
        }
    }
}

/// Weights times the int8 activations of few tokens.
///
/// # Safety
/// That of [`crate::kernels::matmul::Matmul`].
#[inline(always)]
pub(super) unsafe fn int_rows(job: &Job<'_>, scratch: &mut Scratch) {
    use rows::{large, small};
    // SAFETY: the caller's.
    unsafe { by_type!(job.weights.ggml(), small, large, (job, scratch)) };
}
