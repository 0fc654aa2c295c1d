//! Runs a model from its mapped file: kernels, state, forward pass, tokenizer, sampler and session. Writes no file.

pub mod kernels;
pub mod pool;

pub mod batch;
pub mod evaluate;
pub mod forward;
mod load;
mod matrix;
mod model;
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
pub use state::State;
pub use work::Work;
