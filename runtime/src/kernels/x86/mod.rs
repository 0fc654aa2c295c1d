//! AVX2, AVX-512 and AMX. Blocks are taken apart (`unpack.rs`) and expanded (`panel.rs`) by the same functions for all.

/// An array of `$first`s, each then set to what `$of` gives for its place. A loop, and no closure: that would not inherit
/// the instruction set, and what is passed to `array::from_fn` or `map` may be called instead of inlined.
macro_rules! each {
    ([$first:expr; $n:expr], $i:ident => $of:expr) => {{
        let mut all = [$first; $n];
        for $i in 0..$n {
            all[$i] = $of;
        }
        all
    }};
}

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512;
mod few;
mod panel;
mod sums;
mod unpack;
