//! AVX2 and AVX-512. Blocks are taken apart by the same functions for both (`unpack.rs`).

pub(super) mod avx2;
pub(super) mod avx512;
mod few;
mod unpack;
