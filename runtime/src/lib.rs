//! Runs a model from its mapped file: kernels, state, forward pass, tokenizer, sampler and session. Writes no file.

pub mod kernels;
pub mod pool;
