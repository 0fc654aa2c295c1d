//! NEON with the dot-product extension.

mod int;
mod lanes;

pub(crate) use int::int_matmul;
pub(crate) use lanes::Neon;
