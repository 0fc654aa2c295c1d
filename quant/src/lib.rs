//! Block quantization: one codec per ggml type, recipes that choose types, and measures of the error.
//!
//! Opens no file. Everything here is a pure function of its input: the same numbers give the same bytes on every
//! machine, whatever the instruction set or the number of threads.

#![deny(unsafe_code)]

pub mod allocate;
pub mod codec;
pub mod error_measure;
pub mod feedback;
#[allow(unsafe_code)] // calls into code compiled for an instruction set that was found
pub mod isa;
pub mod recipe;
mod scale_search;
pub mod transform;

pub use codec::{Codec, codec};
