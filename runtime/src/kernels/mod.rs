//! The arithmetic of the forward pass on a CPU, one set of kernels per instruction set, chosen at run time.
//!
//! What is no matrix product is written once over the `Lanes` trait (16 f32) and compiled for each instruction set;
//! so is the product with f32 activations. Products with int8 activations are written per instruction set. A caller
//! uses [`Compute`], which splits each operation over the threads and holds their scratch; nothing outside this folder
//! and the pool is `unsafe`.
//!
//! Numerics: an integer product is exact within a block (of 32 weights, or a sub-block) and f32 across blocks; a float
//! product keeps several partial sums. The order of these sums is one for few tokens, where a row is sixteen lanes of
//! partial sums, and one for many, where tokens share an expanded panel; so how many tokens go together changes the
//! rounding. One thing else does: AVX-512 and AMX multiply Q4_K as int8 from seventeen tokens on (`as_int8.rs`). For the
//! rest each operation rounds the same way and in the same order on every instruction set (multiply-adds are fused, also
//! where that takes more than one instruction), whatever its tiles are, and for any number of threads. `blocks.rs` has the
//! orders of the integer products in plain Rust.
//!
//! The state of a sequence is laid out as `[channel / 16][..][16]` on every instruction set.

// Loops over the registers of a tile index several arrays by the same number.
#![allow(clippy::needless_range_loop)]

mod acts;
mod as_int8;
mod beside;
mod blocks;
mod compute;
mod elementwise;
mod isa;
mod lanes;
mod matmul;
mod memory;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod peak;
mod scalar;
mod table;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use acts::{ActKind, Acts};
pub(crate) use beside::multiplies_as_q8_0;
pub use compute::{Compute, InProj, Mixer, ScanWeights, Segment, Then};
pub use isa::Isa;
pub use matmul::MatrixRef;
pub(crate) use memory::LayerBlocks;
pub use memory::{ByChannel, Channels, LANES};
pub use table::{Kernels, kernels};
