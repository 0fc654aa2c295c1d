//! The readable reference model and helpers for the tests in `tests/`.

pub mod goldens;
pub mod npy;
pub mod random_model;
pub mod reference;
