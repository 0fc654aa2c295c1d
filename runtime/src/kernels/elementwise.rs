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

/// A causal depthwise convolution of some channels.
pub(crate) struct Conv<'a> {
    /// (channels, d_conv), the newest input's tap last.
    pub weight: &'a [f32],
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
    assert!((1..=D_CONV_MAX).contains(&k) && conv.weight.len() == conv.bias.len() * k);
    let n_blocks = conv.bias.len().div_ceil(LANES);
    assert!(x.len() >= n_blocks * conv.run.n_all * LANES && state.len() >= n_blocks * (k - 1) * LANES);
    for (b, bias) in conv.bias.chunks(LANES).enumerate() {
        let x = &mut x[conv.run.of_block(b)];
        if bias.len() < LANES {
            // Channels that do not exist must not leave in the state what the buffer held before.
            x.chunks_exact_mut(LANES).for_each(|x| x[bias.len()..].fill(0.0));
        }
        let state = &mut state[b * (k - 1) * LANES..][..(k - 1) * LANES];
        let weight = &conv.weight[b * LANES * k..][..bias.len() * k];
        match k {
            4 => conv_block::<L, 4>(weight, k, bias, x, state),
            _ => conv_block::<L, D_CONV_MAX>(weight, k, bias, x, state),
        }
    }
}

/// One block of 16 channels with `k <= K` taps.
#[inline(always)]
unsafe fn conv_block<L: Lanes, const K: usize>(
    weight: &[f32],
    k: usize,
    bias: &[f32],
    x: &mut [f32],
    state: &mut [f32],
) {
    let mut taps = [[0.0; LANES]; K];
    for (c, row) in weight.chunks_exact(k).enumerate() {
        row.iter().zip(&mut taps).for_each(|(&w, tap)| tap[c] = w);
    }
    let (x, _) = x.as_chunks_mut::<LANES>();
    let (state, _) = state.as_chunks_mut::<LANES>();
    let (n, n_old) = (x.len(), state.len());
    let mut old = [[0.0; LANES]; K];
    old[..n_old].copy_from_slice(state);
    for (i, to) in state.iter_mut().enumerate() {
        // The inputs are the old state followed by x; the new state is their end.
        *to = if n + i < n_old { old[n + i] } else { x[n + i - n_old] };
    }
    let bias = load_part::<L>(bias);
    // Backwards, because the output of a token overwrites its input, which only later tokens need.
    for t in (0..n).rev() {
        let mut sum = bias;
        for (j, tap) in taps[..k].iter().enumerate() {
            let input = if t + j + 1 >= k { &x[t + j + 1 - k] } else { &old[t + j] };
            sum = L::load(tap.as_ptr()).mul_add(L::load(input.as_ptr()), sum);
        }
        silu(sum).store(x[t].as_mut_ptr());
    }
}

/// The selective scan of some channels.
pub(crate) struct Scan<'a> {
    /// (channels, d_state), negative.
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
    let d_state = s.d_state;
    let n_blocks = s.d.len().div_ceil(LANES);
    assert!(s.dt_bias.len() == s.d.len() && s.a.len() == s.d.len() * d_state);
    assert!([u.len(), z.len(), dt.len()].iter().all(|&len| len >= n_blocks * s.run.n_all * LANES));
    assert!(state.len() >= n_blocks * d_state * LANES);
    let end = s.run.first + s.run.n_tokens;
    assert!(end <= s.run.n_all && (end == 0 || s.bc.len() >= (end - 1) * s.bc_stride + 2 * d_state));
    for b in 0..n_blocks {
        let tokens = s.run.of_block(b);
        let (u, z, dt) = (&mut u[tokens.clone()], &z[tokens.clone()], &dt[tokens]);
        let h = &mut state[b * d_state * LANES..][..d_state * LANES];
        match d_state {
            16 => scan_block::<L, 16>(s, b, u, z, dt, h),
            8 => scan_block::<L, 8>(s, b, u, z, dt, h),
            _ => {
                let lanes = s.d.len().min((b + 1) * LANES) - b * LANES;
                scan_block_any::<L>(s, b, lanes, u, z, dt, h);
            }
        }
    }
}

/// What a token brings to its block of channels: Δ, Δ·u, D·u and where its numbers are.
#[inline(always)]
unsafe fn step<L: Lanes>(bias: L, d: L, u: *const f32, dt: *const f32) -> (L, L, L) {
    let delta = softplus(L::load(dt).add(bias));
    let u = L::load(u);
    (delta, delta.mul(u), d.mul(u))
}

/// 16 channels with `N` states, which stay in registers for all tokens.
#[inline(always)]
unsafe fn scan_block<L: Lanes, const N: usize>(
    s: &Scan<'_>,
    b: usize,
    u: &mut [f32],
    z: &[f32],
    dt: &[f32],
    state: &mut [f32],
) {
    let lanes = s.d.len().min((b + 1) * LANES) - b * LANES;
    let mut a = [[0.0f32; LANES]; N];
    let rows = &s.a[b * LANES * N..][..lanes * N];
    if N == LANES && lanes == LANES {
        L::transpose(rows.as_ptr(), LANES, a.as_mut_ptr().cast());
    } else {
        for (c, row) in rows.chunks_exact(N).enumerate() {
            row.iter().zip(&mut a).for_each(|(&v, a)| a[c] = v);
        }
    }
    let channels = b * LANES..b * LANES + lanes;
    let (d, bias) = (load_part(&s.d[channels.clone()]), load_part(&s.dt_bias[channels]));
    let mut h: [L; N] = [L::splat(0.0); N];
    for (i, h) in h.iter_mut().enumerate() {
        *h = L::load(state.as_ptr().add(i * LANES));
    }
    for t in 0..s.run.n_tokens {
        let at = t * LANES;
        let (delta, delta_u, mut y) = step::<L>(bias, d, u.as_ptr().add(at), dt.as_ptr().add(at));
        let bc = s.bc.as_ptr().add((s.run.first + t) * s.bc_stride);
        let mut y2 = L::splat(0.0);
        for i in 0..N {
            let decay = exp(delta.mul(L::load(a[i].as_ptr())));
            h[i] = decay.mul_add(h[i], delta_u.mul(L::splat(*bc.add(i))));
            let c = L::splat(*bc.add(N + i));
            if i % 2 == 0 {
                y = h[i].mul_add(c, y);
            } else {
                y2 = h[i].mul_add(c, y2);
            }
        }
        y.add(y2).mul(silu(L::load(z.as_ptr().add(at)))).store(u.as_mut_ptr().add(at));
    }
    for (i, h) in h.iter().enumerate() {
        h.store(state.as_mut_ptr().add(i * LANES));
    }
}

/// 16 channels with any number of states, which stay in memory.
#[inline(always)]
unsafe fn scan_block_any<L: Lanes>(
    s: &Scan<'_>,
    b: usize,
    lanes: usize,
    u: &mut [f32],
    z: &[f32],
    dt: &[f32],
    state: &mut [f32],
) {
    let channels = b * LANES..b * LANES + lanes;
    let (d, bias) = (load_part(&s.d[channels.clone()]), load_part(&s.dt_bias[channels.clone()]));
    for t in 0..s.run.n_tokens {
        let at = t * LANES;
        let (delta, delta_u, mut y) = step::<L>(bias, d, u.as_ptr().add(at), dt.as_ptr().add(at));
        let (input, output) = s.bc[(s.run.first + t) * s.bc_stride..][..2 * s.d_state].split_at(s.d_state);
        for i in 0..s.d_state {
            let mut a = [0.0; LANES];
            a.iter_mut().zip(channels.clone()).for_each(|(a, c)| *a = s.a[c * s.d_state + i]);
            let p = state.as_mut_ptr().add(i * LANES);
            let decay = exp(delta.mul(L::load(a.as_ptr())));
            let h = decay.mul_add(L::load(p), delta_u.mul(L::splat(input[i])));
            h.store(p);
            y = h.mul_add(L::splat(output[i]), y);
        }
        y.mul(silu(L::load(z.as_ptr().add(at)))).store(u.as_mut_ptr().add(at));
    }
}
