//! AVX2, FMA and F16C.

mod lanes;
mod narrow;
mod pairs;
mod panel;
mod rows;

pub(crate) use lanes::Avx2;

use super::few;
use super::unpack::{self, by_type, by_type_beside};
use crate::kernels::matmul::{INT_PANEL_TOKENS, Job, Scratch};
use kestrel_formats::{GgmlType, WeightType};
use pairs::small;

/// Weights times int8 activations.
///
/// # Safety
/// That of [`crate::kernels::matmul::Matmul`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn int_matmul(job: &Job<'_>, scratch: &mut Scratch) {
    use panel::{large as panel_large, small as panel_small};
    use rows::large as rows_large;
    // SAFETY: the caller's.
    unsafe {
        if job.acts.n_tokens() < INT_PANEL_TOKENS {
            by_type!(job.weights.ggml(), small, rows_large, (job, scratch));
        } else {
            by_type!(job.weights.ggml(), panel_small, panel_large, (job, scratch));
        }
    }
}

/// A matrix with scales beside its codes times the int8 activations of few tokens; false if it has another shape than
/// this can take.
///
/// # Safety
/// That of [`crate::kernels::matmul::Matmul`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn beside_rows(job: &Job<'_>, scratch: &mut Scratch) -> bool {
    if !few::fit(job, pairs::PAIR) {
        return false;
    }
    // SAFETY: the caller's.
    unsafe { by_type_beside!(job.weights.dtype, small, (job, scratch)) };
    true
}
