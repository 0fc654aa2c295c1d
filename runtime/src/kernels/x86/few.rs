//! What the products with few tokens have in common: the walk over rows and tokens, and fetching ahead.
//!
//! A decoded token reads every weight once, and a processor reads memory fastest front to back: rows are taken one
//! after the other, or in pairs that are fetched so, and four consecutive blocks of a row together (on two Granite Rapids
//! cores 35 of 37 GB/s, where eight rows side by side got 20).

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for `Matmul`'s contract and for pointers to whole rows

use crate::kernels::matmul::Job;
use crate::kernels::memory::LANES;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

/// Tokens that share unpacked codes at most.
pub(super) const TOKENS: usize = 4;
/// Blocks that are prepared together.
pub(super) const FOUR: usize = 4;

/// A product with few tokens.
pub(super) trait Few {
    /// Rows that are multiplied together.
    const ROWS: usize;
    /// Tokens that are: [`TOKENS`], or 2.
    const TOKENS: usize = TOKENS;

    /// Rows `row..row + ROWS` (of those beyond the job's last, anything) times tokens `t..t + T`, to
    /// `out[token][r + row]`.
    unsafe fn product<const T: usize>(
        &self,
        job: &Job<'_>,
        row: usize,
        t: usize,
        out: &mut [[f32; LANES]; TOKENS],
        r: usize,
    );
}

/// All rows times all tokens.
#[inline(always)]
pub(super) unsafe fn walk<F: Few>(few: &F, job: &Job<'_>) {
    for row0 in job.rows.clone().step_by(LANES) {
        let n_rows = LANES.min(job.rows.end - row0);
        let mut t = 0;
        while t < job.acts.n_tokens() {
            let mut out = [[0.0; LANES]; TOKENS];
            let n = match job.acts.n_tokens() - t {
                1 => 1,
                2 | 3 => 2,
                _ => F::TOKENS,
            };
            for r in (0..n_rows).step_by(F::ROWS) {
                match n {
                    1 => few.product::<1>(job, row0 + r, t, &mut out, r),
                    2 => few.product::<2>(job, row0 + r, t, &mut out, r),
                    _ => few.product::<TOKENS>(job, row0 + r, t, &mut out, r),
                }
            }
            for (i, out) in out[..n].iter().enumerate() {
                job.out.put(row0, t + i, &out[..n_rows]);
            }
            t += n;
        }
    }
}

/// Whether a matrix with scales beside its codes has rows of whole fours of blocks of 32, and scales that each serve 2^n
/// weights, `least` of them or more, and begin with as many.
pub(super) fn fit(job: &Job<'_>, least: usize) -> bool {
    let (scales, first) = job.weights.beside(0);
    let (blocksize, cols) = (scales.blocksize, job.weights.cols);
    cols.is_multiple_of(128)
        && first.is_multiple_of(least)
        && blocksize >= least
        && blocksize.is_power_of_two()
}

/// The four consecutive blocks at `p`, or as many as `n` times and the last of them again.
#[inline(always)]
pub(super) unsafe fn four_blocks(p: *const u8, block_bytes: usize, n: usize) -> [*const u8; FOUR] {
    each!([p; FOUR], i => p.add(i.min(n - 1) * block_bytes))
}

/// Fetches what will be needed some time after `p`: step `i` of `n` over `n_bytes` at `p`, of which a line at a time is
/// fetched between the products; a row of fetches would fill the buffers for misses and hold up everything behind it.
#[inline(always)]
pub(super) fn fetch_ahead(p: *const u8, n_bytes: usize, i: usize, n: usize) {
    for line in lines_of_step(n_bytes, i, n) {
        fetch_line(p.wrapping_add(64 * line));
    }
}

/// The lines of `n_bytes` that are fetched in step `i` of `n`.
#[inline(always)]
pub(super) fn lines_of_step(n_bytes: usize, i: usize, n: usize) -> Range<usize> {
    let lines = n_bytes / 64;
    i * lines / n..(i + 1) * lines / n
}

/// Fetches what follows the line at `p` at two distances, each into a cache of its own: the processor's own prefetching
/// ends with each page, so a line is called into the second-level cache four pages ahead, and into the first-level cache
/// one page ahead. (On two Zen 4 cores Q4_K is read at 34 of 37 GB/s so, and at 28 with 5 KB and 2 KB.)
#[inline(always)]
pub(super) fn fetch_line(p: *const u8) {
    const PAGE_BYTES: usize = 4096;
    fetch_two(p.wrapping_add(PAGE_BYTES), p.wrapping_add(4 * PAGE_BYTES));
}

/// Fetches the line at `near` into the first-level cache and that at `far` into the second-level one.
#[inline(always)]
pub(super) fn fetch_two(near: *const u8, far: *const u8) {
    // Else the compiler brings all loads of a step together, which costs up to a quarter of the speed.
    compiler_fence(Ordering::SeqCst);
    // SAFETY: SSE is part of x86-64; a prefetch accesses nothing that a program can see.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(near.cast());
        _mm_prefetch::<_MM_HINT_T1>(far.cast());
    }
}
