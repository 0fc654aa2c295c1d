//! Runs a model from its mapped file: kernels, state, forward pass, tokenizer, sampler and session. Writes no file.

#![deny(unsafe_code)]

#[allow(unsafe_code)] // SIMD, and numbers that threads share
pub mod kernels;
#[allow(unsafe_code)] // a job that outlives no fork
pub mod pool;

pub mod batch;
pub mod chat;
pub mod evaluate;
pub mod forward;
pub mod likelihood;
mod load;
pub mod matrix;
mod model;
pub mod observe;
pub mod probe;
pub mod reader;
pub mod sampler;
pub mod session;
pub mod state;
pub mod text_stream;
pub mod tokenizer;
mod work;

pub use batch::Batch;
pub use forward::{Runner, RunnerOptions};
pub use load::{LoadOptions, Quantize};
pub use model::Model;
pub use observe::Observer;
pub use session::Session;
pub use state::State;
pub use work::Work;
