//! Q4_K as int8: where many tokens share an expanded panel, a block of 256 becomes codes of a byte with one scale.
//!
//! Q4_K has a scale and a minimum per 32 weights; applying them costs a quarter as much as the products themselves. With
//! one scale per block next to nothing is left of that, and the products come close to the peak of the dot product.
//!
//! `w = scale · code` with `scale = largest / 127`, where `largest` is the largest magnitude that the block's sub-blocks
//! can express. A sub-block has only sixteen values, so its codes are looked up in a table, which is made in fixed point:
//! `table[q] = (q · step + start) / 256`, rounded down, with `step` and `start` 16-bit integers, so that every instruction
//! set makes the same table.
//!
//! It pays where a processor has a dot product of bytes: AVX-512 and AMX do it. AVX2, which would take twice as long for
//! codes of eight bits as for four, does not.
//!
//! What it costs: codes are off by 1/2 + 8/256 at most, evenly spread, so a weight's error has a standard deviation of
//! scale · 0.29. Q4_K's own is 0.29 of a step of its sub-block, which for weights from a normal distribution is about eleven
//! times as much: the variance grows by about 1 % (`the_error_of_q4_k_as_int8` in `tests/tests/kernels.rs` measures
//! it). The other K types have finer steps, where it would be 3 % and more.

use super::matmul::Job;
use super::memory::LANES;
use super::scalar::fused;
use kestrel_formats::GgmlType;

/// From this many tokens on: for one group of sixteen the tables cost more than they save.
const MIN_TOKENS: usize = LANES + 1;

/// Whether this product is one of Q4_K as int8, where the instruction set does that.
#[inline(always)]
pub(super) fn applies(job: &Job<'_>) -> bool {
    job.weights.ggml() == GgmlType::Q4K && job.acts.n_tokens() >= MIN_TOKENS
}

/// What `step` and `start` count in a code.
pub(super) const ONE: f32 = 256.0;
/// `start` without a minimum: it is what rounds to the nearest.
pub(super) const HALF: f32 = 0.5 * ONE;
/// `scale / largest`
pub(super) const INVERSE_127: f32 = 1.0 / 127.0;

/// A block in plain Rust: from `d`, `dmin` and the eight scales and minimums, the scale and eight pairs of step and start.
/// A block whose `d` or `dmin` is not finite stands for NaN.
pub(super) fn tables(d: f32, dmin: f32, scale_min: impl Fn(usize) -> (i32, i32)) -> (f32, [[i16; 2]; 8]) {
    let ends = std::array::from_fn::<_, 8, _>(|j| {
        let (scale, min) = scale_min(j);
        (d * scale as f32, -dmin * min as f32)
    });
    let mut largest = 0.0f32;
    for (step, start) in ends {
        for end in [start, fused(step, 15.0, start)] {
            largest = if end.abs() > largest { end.abs() } else { largest };
        }
    }
    let inverse = if largest > 0.0 { 127.0 * ONE / largest } else { 0.0 };
    let fixed = |x: f32| x.round_ties_even() as i16;
    let tables = ends.map(|(step, start)| [fixed(step * inverse), fixed(fused(start, inverse, HALF))]);
    let not_finite = d * 0.0 + dmin * 0.0; // 0 or NaN
    (fused(largest, INVERSE_127, not_finite), tables)
}

/// The code of `q` by a table.
pub(super) fn code([step, start]: [i16; 2], q: u8) -> i8 {
    (i16::from(q).wrapping_mul(step).wrapping_add(start) >> 8) as i8
}
