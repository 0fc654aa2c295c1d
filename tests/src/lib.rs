//! The readable reference model and helpers for the tests in `tests/`.
