//! AVX2, AVX-512 and AMX. Blocks are taken apart (`unpack.rs`) and expanded (`panel.rs`) by the same functions for all.

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512;
mod few;
mod panel;
mod unpack;
