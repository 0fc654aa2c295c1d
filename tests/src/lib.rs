//! The readable reference model and helpers for the tests in `tests/`.

#![deny(unsafe_code)]

#[allow(unsafe_code)] // an allocator
pub mod alloc_count;
pub mod bad_input;
pub mod bitsandbytes;
pub mod bnb_builder;
pub mod checkpoint_builder;
pub mod fuzz;
pub mod gguf_builder;
pub mod goldens;
#[allow(unsafe_code)] // memory that ends at a page
pub mod guard;
pub mod load_reference;
pub mod npy;
pub mod plain_search;
pub mod random_model;
pub mod reference;
pub mod running;
pub mod safetensors;
pub mod temp_dir;
