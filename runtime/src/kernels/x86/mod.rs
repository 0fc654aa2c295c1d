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

/// Does something sixteen times, for the constants 0 to 15: a loop that is unrolled for sure, so that what depends on the
/// constant is decided by the compiler.
macro_rules! sixteen_times {
    ($i:ident => $do:block) => { sixteen_times!(@ $i $do 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    (@ $i:ident $do:block $($n:literal)*) => {
        $({
            const $i: usize = $n;
            $do
        })*
    };
}

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512;
mod few;
mod panel;
mod sums;
mod unpack;
