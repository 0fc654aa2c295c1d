//! AVX-512 with VNNI.

mod as_int8;
mod lanes;
mod panel;
mod rows;
mod scales;
mod wide;

pub(super) use as_int8::AsInt8;
pub(crate) use lanes::Avx512;
pub(super) use panel::{close, ends_block, scale};

use super::few;
use super::unpack::{self, by_type, by_type_beside};
use crate::kernels;
use crate::kernels::matmul::{INT_PANEL_TOKENS, Job, Scratch};
use kestrel_formats::{GgmlType, WeightType};

/// Weights times int8 activations.
///
/// # Safety
/// That of [`crate::kernels::matmul::Matmul`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
pub(crate) unsafe fn int_matmul(job: &Job<'_>, scratch: &mut Scratch) {
    use panel::{large, small};
    // SAFETY: the caller's.
    unsafe {
        if job.acts.n_tokens() < INT_PANEL_TOKENS {
            int_rows(job, scratch);
        } else if kernels::as_int8::applies(job) {
            panel::as_int8(job, scratch);
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
unsafe fn int_rows(job: &Job<'_>, scratch: &mut Scratch) {
    use rows::{large, small};
    // SAFETY: the caller's.
    unsafe { by_type!(job.weights.ggml(), small, large, (job, scratch)) };
}

/// A matrix with scales beside its codes times the int8 activations of few tokens; false if it has another shape than
/// this can take.
///
/// # Safety
/// That of [`crate::kernels::matmul::Matmul`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
pub(crate) unsafe fn beside_rows(job: &Job<'_>, scratch: &mut Scratch) -> bool {
    if !few::fit(job, 32) {
        return false;
    }
    use rows::small;
    // SAFETY: the caller's.
    unsafe { by_type_beside!(job.weights.dtype, small, (job, scratch)) };
    true
}
