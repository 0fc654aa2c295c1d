//! The readable reference model and helpers for the tests in `tests/`.

pub mod alloc_count;
pub mod bitsandbytes;
pub mod checkpoint_builder;
pub mod gguf_builder;
pub mod goldens;
pub mod load_reference;
pub mod npy;
pub mod plain_search;
pub mod random_model;
pub mod reference;
pub mod running;
pub mod safetensors;
pub mod temp_dir;
