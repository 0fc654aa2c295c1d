//! Bytes to meaning and back: GGUF files, Hugging Face checkpoint folders, the ggml type table, and one
//! table per architecture.
//!
//! Everything here treats its input as hostile. A [`gguf::Gguf`] or a [`checkpoint::Checkpoint`] that exists has
//! been validated completely; nothing after it re-checks bounds, shapes or names. No weight is computed with here.

#![deny(unsafe_code)]

pub mod arch;
pub mod atomic_file;
pub mod atomic_folder;
pub mod calibration;
pub mod checkpoint;
pub mod disk;
pub mod error;
pub mod ggml_type;
pub mod gguf;
pub mod imatrix;
mod json;
pub mod kl_base;
pub mod limits;
#[allow(unsafe_code)] // the map, and the handler of its faults
pub mod map;
pub mod proc;
pub mod tokenizer;
pub mod weight_type;

pub use error::{Error, ErrorKind, Result};
pub use ggml_type::GgmlType;
pub use weight_type::WeightType;
