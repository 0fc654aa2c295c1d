//! Everything of a layer that is no matrix product, written once over [`Lanes`].
//!
//! The bodies are `inline(always)` and compiled per instruction set by `kernels!` in `mod.rs`.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contract of `Lanes` and of the shared writers alone

use super::acts::{ActKind, ActsWriter, BlockMut};
use super::lanes::{Lanes, exp, load_part, silu, softplus, to_array};
use super::memory::LANES;

/// Applies `f` to each number.
#[inline(always)]
pub(crate) unsafe fn map<L: Lanes>(x: &mut [f32], f: impl Fn(L) -> L) {
    for chunk in x.chunks_mut(LANES) {
        let y = to_array(f(load_part(chunk)));
        chunk.copy_from_slice(&y[..chunk.len()]);
    }
}

/// 1 / sqrt(mean(x²) + eps).
#[inline(always)]
unsafe fn rms_factor<L: Lanes>(x: &[f32], eps: f32) -> f32 {
    let mut sums = [L::splat(0.0); 4];
    for (i, chunk) in x.chunks(LANES).enumerate() {
        let v: L = load_part(chunk);
        sums[i % 4] = v.mul_add(v, sums[i % 4]);
    }
    let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// x / rms(x), without weights.
#[inline(always)]
pub(crate) unsafe fn rms_norm<L: Lanes>(x: &mut [f32], eps: f32) {
    let factor = L::splat(rms_factor::<L>(x, eps));
    map::<L>(x, |v| v.mul(factor));
}

/// Token `t` of `to` := x / rms(x) · weight; without weights if there are none.
#[inline(always)]
pub(crate) unsafe fn rms_norm_acts<L: Lanes>(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    to: &ActsWriter<'_>,
    t: usize,
) {
    let factor = L::splat(rms_factor::<L>(x, eps));
    put_columns::<L>(to, t, 0, x.len(), |i, n| {
        let v = load_part::<L>(&x[i..i + n]).mul(factor);
        if weight.is_empty() { v } else { v.mul(load_part(&weight[i..i + n])) }
    });
}

/// Token `t` of `to` := x.
#[inline(always)]
pub(crate) unsafe fn row_acts<L: Lanes>(x: &[f32], to: &ActsWriter<'_>, t: usize) {
    put_columns::<L>(to, t, 0, x.len(), |i, n| load_part(&x[i..i + n]));
}

/// Columns `col..` of all tokens of `to` := the channels `x` ([channel / 16][token][16], `n` channels in use).
#[inline(always)]
pub(crate) unsafe fn channel_acts<L: Lanes>(
    x: &[f32],
    n_tokens: usize,
    to: &ActsWriter<'_>,
    col: usize,
    n: usize,
) {
    assert!(x.len() >= n.div_ceil(LANES) * n_tokens * LANES);
    for t in 0..n_tokens {
        put_columns::<L>(to, t, col, n, |i, _| L::load(x.as_ptr().add((i / LANES * n_tokens + t) * LANES)));
    }
}

/// Fills columns `col..col + n` of token `t`; `load(i, k)` gives numbers `i..i + k` of them.
#[inline(always)]
unsafe fn put_columns<L: Lanes>(
    to: &ActsWriter<'_>,
    t: usize,
    col: usize,
    n: usize,
    load: impl Fn(usize, usize) -> L,
) {
    if to.kind == ActKind::F32 {
        for (i, chunk) in to.floats(t, col, n).chunks_mut(LANES).enumerate() {
            let v = load(i * LANES, chunk.len());
            if chunk.len() == LANES {
                v.store(chunk.as_mut_ptr());
            } else {
                chunk.copy_from_slice(&to_array(v)[..chunk.len()]);
            }
        }
        return;
    }
    let len = to.kind.block_len();
    assert!(col.is_multiple_of(len) && n.is_multiple_of(len), "whole blocks");
    for b in 0..n / len {
        quantize_block::<L>(to.block(t, col / len + b), |i| load(b * len + i, LANES));
    }
}

#[inline(always)]
unsafe fn quantize_block<L: Lanes>(block: BlockMut<'_>, load: impl Fn(usize) -> L) {
    let (mut largest, mut not_finite) = (L::splat(0.0), L::splat(0.0));
    for i in 0..block.len() / LANES {
        let x = load(i * LANES);
        largest = x.abs().at_least(largest);
        not_finite = x.mul_add(L::splat(0.0), not_finite); // NaN as soon as one number is not finite
    }
    if not_finite.sum() != 0.0 {
        // The block stands for NaN, so that what went wrong is seen at the end and not rounded away.
        block.put_scale(f32::NAN);
        (0..block.len() / LANES).for_each(|i| block.put_codes(i, &[0; LANES], 0));
        (0..block.len() / 32).for_each(|i| block.put_sum32(i, 0));
        block.put_sum_of_all(0);
        return;
    }
    let largest = largest.largest();
    // Below this the inverse would overflow; such a block is nothing but zeros.
    const TINY: f32 = 1e-36;
    let (scale, inverse) = if largest < TINY { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) };
    block.put_scale(scale);
    let inverse = L::splat(inverse);
    let mut sum_of_all = 0;
    for i in 0..block.len() / 32 {
        let mut sum32 = 0;
        for h in [2 * i, 2 * i + 1] {
            let mut codes = [0; LANES];
            let sum = load(h * LANES).mul(inverse).round().store_i8(codes.as_mut_ptr());
            block.put_codes(h, &codes, sum);
            sum32 += sum;
        }
        block.put_sum32(i, sum32);
        sum_of_all += sum32;
    }
    block.put_sum_of_all(sum_of_all);
}

/// The largest d_conv that is executed; the architecture's limit.
pub(crate) const D_CONV_MAX: usize = kestrel_formats::limits::D_CONV_MAX as usize;

/// What each channel has `n` numbers of, (channels, n), as [channel / 16][n][16], with zeros for channels that do not
/// exist.
#[inline(always)]
pub(crate) unsafe fn by_channel<L: Lanes>(rows: &[f32], n: usize, to: &mut [f32]) {
    assert!(to.len() >= (rows.len() / n).next_multiple_of(LANES) * n);
    for (block, to) in rows.chunks(LANES * n).zip(to.chunks_exact_mut(LANES * n)) {
        if n == LANES && block.len() == LANES * n {
            block.chunks_exact(LANES).for_each(|line| L::fetch_ahead(line.as_ptr().cast()));
            L::transpose(block.as_ptr(), LANES, to.as_mut_ptr());
        } else {
            to.fill(0.0);
            for (c, row) in block.chunks_exact(n).enumerate() {
                row.iter().zip(to.chunks_exact_mut(LANES)).for_each(|(&x, to)| to[c] = x);
            }
        }
    }
}

/// A causal depthwise convolution of some channels.
pub(crate) struct Conv<'a> {
    /// [channel / 16][d_conv][16], the newest input's tap last.
    pub taps: &'a [f32],
    /// (channels)
    pub bias: &'a [f32],
    pub d_conv: usize,
    pub run: Run,
}

/// Consecutive tokens of one sequence among all that are computed together.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    pub first: usize,
    pub n_tokens: usize,
    /// Tokens of all sequences.
    pub n_all: usize,
}

impl Run {
    /// Where these tokens' numbers of channels `16 b..` are in [channel / 16][token][16].
    fn of_block(&self, b: usize) -> std::ops::Range<usize> {
        let start = (b * self.n_all + self.first) * LANES;
        start..start + self.n_tokens * LANES
    }
}

/// x := silu(conv(x) + bias) in place; `x` [channel / 16][token][16], `state` [channel / 16][d_conv - 1][16], the
/// oldest input first.
#[inline(always)]
pub(crate) unsafe fn conv_silu<L: Lanes>(conv: &Conv<'_>, x: &mut [f32], state: &mut [f32]) {
    let k = conv.d_conv;
    let n_blocks = conv.bias.len().div_ceil(LANES);
    assert!((1..=D_CONV_MAX).contains(&k) && conv.taps.len() >= n_blocks * k * LANES);
    assert!(x.len() >= n_blocks * conv.run.n_all * LANES && state.len() >= n_blocks * (k - 1) * LANES);
    for (b, bias) in conv.bias.chunks(LANES).enumerate() {
        let x = &mut x[conv.run.of_block(b)];
        if bias.len() < LANES {
            // Channels that do not exist must not leave in the state what the buffer held before.
            x.chunks_exact_mut(LANES).for_each(|x| x[bias.len()..].fill(0.0));
        }
        let state = &mut state[b * (k - 1) * LANES..][..(k - 1) * LANES];
        let taps = &conv.taps[b * k * LANES..][..k * LANES];
        match k {
            4 => conv_block::<L, 3>(taps, bias, x, state),
            _ => conv_block::<L, { D_CONV_MAX - 1 }>(taps, bias, x, state),
        }
    }
}

/// Row `i` of `of` [i][16].
#[inline(always)]
unsafe fn row<L: Lanes>(of: &[f32], i: usize) -> L {
    L::load(of[i * LANES..][..LANES].as_ptr())
}

/// One block of 16 channels that remembers at most `N` inputs.
#[inline(always)]
unsafe fn conv_block<L: Lanes, const N: usize>(taps: &[f32], bias: &[f32], x: &mut [f32], state: &mut [f32]) {
    let (n, n_old) = (x.len() / LANES, state.len() / LANES);
    // The inputs are the old ones followed by x; what is remembered is their end.
    let mut old = [L::splat(0.0); N];
    for (i, old) in old[..n_old].iter_mut().enumerate() {
        *old = row(state, i);
    }
    for i in 0..n_old {
        let input = if n + i < n_old { old[n + i] } else { row(x, n + i - n_old) };
        input.store(state[i * LANES..][..LANES].as_mut_ptr());
    }
    let bias = load_part::<L>(bias);
    // Backwards, because the output of a token overwrites its input, which only later tokens need.
    for t in (0..n).rev() {
        let mut sum = bias;
        for j in 0..=n_old {
            let input = if t + j < n_old { old[t + j] } else { row(x, t + j - n_old) };
            sum = row::<L>(taps, j).mul_add(input, sum);
        }
        silu(sum).store(x[t * LANES..][..LANES].as_mut_ptr());
    }
}

/// The selective scan of some channels.
pub(crate) struct Scan<'a> {
    /// [channel / 16][d_state][16], negative.
    pub a: &'a [f32],
    /// (channels)
    pub d: &'a [f32],
    /// (channels)
    pub dt_bias: &'a [f32],
    pub d_state: usize,
    pub run: Run,
    /// B and C of token t start at `t * bc_stride` and `t * bc_stride + d_state`.
    pub bc: &'a [f32],
    pub bc_stride: usize,
}

/// Per token, with Δ = softplus(dt + dt_bias): h := exp(Δ·A)·h + Δ·B·u; u := (C·h + D·u) · silu(z), in place.
/// `u`, `z`, `dt` are [channel / 16][token][16], `state` (h) is [channel / 16][d_state][16].
#[inline(always)]
pub(crate) unsafe fn scan<L: Lanes>(s: &Scan<'_>, u: &mut [f32], z: &[f32], dt: &[f32], state: &mut [f32]) {
    let n_blocks = s.d.len().div_ceil(LANES);
    let n = s.d_state * LANES;
    assert!(s.dt_bias.len() == s.d.len() && s.a.len() >= n_blocks * n && state.len() >= n_blocks * n);
    assert!([u.len(), z.len(), dt.len()].iter().all(|&len| len >= n_blocks * s.run.n_all * LANES));
    let end = s.run.first + s.run.n_tokens;
    assert!(end <= s.run.n_all && (end == 0 || s.bc.len() >= (end - 1) * s.bc_stride + 2 * s.d_state));
    for b in 0..n_blocks {
        let h = &mut state[b * n..][..n];
        h.chunks_exact(LANES).for_each(|line| L::fetch_ahead(line.as_ptr().cast()));
        let tokens = s.run.of_block(b);
        scan_block::<L>(s, b, &mut u[tokens.clone()], &z[tokens.clone()], &dt[tokens], h);
    }
}

/// Block `b` of 16 channels.
#[inline(always)]
unsafe fn scan_block<L: Lanes>(
    s: &Scan<'_>,
    b: usize,
    u: &mut [f32],
    z: &[f32],
    dt: &[f32],
    state: &mut [f32],
) {
    let channels = b * LANES..s.d.len().min((b + 1) * LANES);
    let (d, bias) = (load_part::<L>(&s.d[channels.clone()]), load_part::<L>(&s.dt_bias[channels]));
    let a = s.a[b * state.len()..][..state.len()].as_ptr();
    let h = state.as_mut_ptr();
    let mut made = [Stateless { delta: d, gate: d }; TOGETHER];
    for first in (0..s.run.n_tokens).step_by(TOGETHER) {
        let tokens = first..s.run.n_tokens.min(first + TOGETHER);
        for (t, made) in tokens.clone().zip(&mut made) {
            let at = t * LANES;
            made.delta = softplus(L::load(dt.as_ptr().add(at)).add(bias));
            made.gate = silu(L::load(z.as_ptr().add(at)));
        }
        for (t, &Stateless { delta, gate }) in tokens.zip(&made) {
            let at = t * LANES;
            let x = L::load(u.as_ptr().add(at));
            let bc = s.bc.as_ptr().add((s.run.first + t) * s.bc_stride);
            let token = Token { delta, delta_u: delta.mul(x), b: bc, c: bc.add(s.d_state) };
            let mut y = [d.mul(x), L::splat(0.0)];
            for i in (1..s.d_state).step_by(2) {
                y = [token.advance(i - 1, a, h, y[0]), token.advance(i, a, h, y[1])];
            }
            if !s.d_state.is_multiple_of(2) {
                y[0] = token.advance(s.d_state - 1, a, h, y[0]);
            }
            y[0].add(y[1]).mul(gate).store(u.as_mut_ptr().add(at));
        }
    }
}

/// Tokens whose [`Stateless`] is made together: each is a long chain of operations, for whose end the token's states
/// wait, and the chains of several tokens fill each other's gaps.
const TOGETHER: usize = 16;

/// What of a token does not depend on the states.
#[derive(Clone, Copy)]
struct Stateless<L> {
    /// Δ
    delta: L,
    /// silu(z)
    gate: L,
}

/// What a token brings to 16 channels.
struct Token<L> {
    delta: L,
    delta_u: L,
    /// (d_state), as is C.
    b: *const f32,
    c: *const f32,
}

impl<L: Lanes> Token<L> {
    /// h[i] := exp(Δ·A[i])·h[i] + Δ·u·B[i]; y + C[i]·h[i].
    #[inline(always)]
    unsafe fn advance(&self, i: usize, a: *const f32, h: *mut f32, y: L) -> L {
        let h = h.add(i * LANES);
        let decay = exp(self.delta.mul(L::load(a.add(i * LANES))));
        let next = decay.mul_add(L::load(h), self.delta_u.mul(L::splat(*self.b.add(i))));
        next.store(h);
        next.mul_add(L::splat(*self.c.add(i)), y)
    }
}
