//! Runs a model from its mapped file: kernels, state, forward pass, tokenizer, sampler and session. Writes no file.

#![deny(unsafe_code)]

#[allow(unsafe_code)] // SIMD, and numbers that threads share
pub mod kernels;
#[allow(unsafe_code)] // a job that outlives no fork
pub mod pool;

pub mod batch;
mod bpe;
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

/// Both results, made at the same time: what is done once, when a model is opened. The first is made on the caller's
/// thread, where the system's allocator is quickest; a pool would move both away.
pub fn at_once<A, B: Send>(a: impl FnOnce() -> A, b: impl FnOnce() -> B + Send) -> (A, B) {
    std::thread::scope(|scope| {
        let b = scope.spawn(b);
        (a(), b.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
