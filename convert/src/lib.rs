//! From a checkpoint or a GGUF file to a quantized GGUF file in one streaming pass: plan, read, transform,
//! quantize, write, verify. Runs no model.
//!
//! [`plan()`] decides everything; [`run()`] does it in bounded memory, with the same bytes for any number of threads;
//! [`verify()`] compares a finished file with its source, [`diff()`] any two files. [`plan_bnb()`] and [`run_bnb()`] write a checkpoint folder of
//! bitsandbytes instead.

#![forbid(unsafe_code)]

mod bnb;
mod diff;
mod feedback;
mod input;
mod metadata;
mod plan;
mod progress;
mod rows;
mod run;
mod stream;
mod verify;

pub use bnb::{BnbOptions, BnbPlan, BnbTensor, plan_bnb, run_bnb};
pub use diff::{TensorDiff, diff};
pub use input::{SSM_X_SCALE, Source};
pub use metadata::SOURCE_SHA256;
pub use plan::{Options, Plan, PlannedTensor, Target, plan};
pub use progress::{Phase, Progress};
pub use run::{Report, run};
pub use verify::{TensorReport, VerifyReport, verify};
