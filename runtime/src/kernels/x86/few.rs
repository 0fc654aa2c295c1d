//! What the products with few tokens have in common: the walk over rows and tokens, and fetching ahead.

use std::arch::x86_64::*;

/// Calls `product::<F, T>(job, rows, next, token, out)` for groups of `$rows` rows and of `T` tokens (1, 2 or 4), and
/// stores what it leaves in `out`, [token][row]. `next` is where the rows after these begin.
macro_rules! for_groups {
    ($job:ident, $rows:ident, $product:ident, $type:ident) => {
        for row0 in $job.rows.clone().step_by(LANES) {
            let n_rows = LANES.min($job.rows.end - row0);
            let mut t = 0;
            while t < $job.acts.n_tokens() {
                let mut out = [[0.0; LANES]; 4];
                let n = match $job.acts.n_tokens() - t {
                    1 => 1,
                    2 | 3 => 2,
                    _ => 4,
                };
                for r in (0..n_rows).step_by($rows) {
                    // Rows beyond the last are the last again.
                    let row = |i: usize| $job.weights.row(row0 + (r + i).min(n_rows - 1)).as_ptr();
                    let rows: [*const u8; $rows] = std::array::from_fn(row);
                    let next = rows[0].wrapping_add($rows * $job.weights.row_bytes());
                    let mut results = [[0.0; $rows]; 4];
                    match n {
                        1 => $product::<$type, 1>($job, &rows, next, t, &mut results),
                        2 => $product::<$type, 2>($job, &rows, next, t, &mut results),
                        _ => $product::<$type, 4>($job, &rows, next, t, &mut results),
                    }
                    for (out, results) in out.iter_mut().zip(results) {
                        out[r..r + $rows].copy_from_slice(&results);
                    }
                }
                for (i, out) in out[..n].iter().enumerate() {
                    $job.out.put(row0, t + i, &out[..n_rows]);
                }
                t += n;
            }
        }
    };
}
pub(super) use for_groups;

/// Fetches `n_bytes` at `p`, which need not exist. Rows lie one after the other: while some are read side by side, the
/// ones after them are fetched front to back, which is the pattern that the processor's own prefetching follows.
#[inline(always)]
pub(super) fn fetch(p: *const u8, n_bytes: usize) {
    for line in 0..n_bytes.div_ceil(64) {
        // SAFETY: SSE is part of x86-64; a prefetch accesses nothing that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(64 * line).cast()) };
    }
}
