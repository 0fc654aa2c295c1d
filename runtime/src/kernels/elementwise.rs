//! Everything of a layer that is no matrix product, written once over [`Lanes`].
//!
//! The bodies are `inline(always)` and compiled per instruction set by `kernels!` in `mod.rs`.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contract of `Lanes` and of the shared writers alone

use super::acts::{ActKind, ActsWriter, BlockMut, GroupMut};
use super::lanes::{Lanes, exp, load_part, silu, softplus, to_array};
use super::memory::{LANES, read_ahead};

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
    if to.n_groups() > 0 && n.is_multiple_of(SQUARE) {
        for g in 0..to.n_groups() {
            quantize_group::<L>(&to.group(g), x.as_ptr().add(g * LANES * LANES), n_tokens * LANES, col, n);
        }
        return;
    }
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

/// What the scale of a block needs to know of its numbers.
struct Seen<L> {
    largest: L,
    /// NaN as soon as one number is not finite, else 0.
    not_finite: L,
}

impl<L: Lanes> Seen<L> {
    #[inline(always)]
    unsafe fn nothing() -> Self {
        Self { largest: L::splat(0.0), not_finite: L::splat(0.0) }
    }

    #[inline(always)]
    unsafe fn and(self, x: L) -> Self {
        let not_finite = x.mul_add(L::splat(0.0), self.not_finite);
        Self { largest: x.abs().at_least(self.largest), not_finite }
    }

    /// The scale and its inverse. Both are NaN if not all numbers are finite: the block then stands for NaN, so that what went
    /// wrong is seen at the end and not rounded away.
    #[inline(always)]
    unsafe fn scale(self) -> (f32, f32) {
        /// Below this the inverse would overflow; such a block is nothing but zeros.
        const TINY: f32 = 1e-36;
        let largest = self.largest.largest();
        if self.not_finite.sum() != 0.0 {
            (f32::NAN, f32::NAN)
        } else if largest < TINY {
            (0.0, 0.0)
        } else {
            (largest / 127.0, 127.0 / largest)
        }
    }
}

#[inline(always)]
unsafe fn quantize_block<L: Lanes>(block: BlockMut<'_>, load: impl Fn(usize) -> L) {
    let mut seen = Seen::nothing();
    for i in 0..block.len() / LANES {
        seen = seen.and(load(i * LANES));
    }
    let (scale, inverse) = seen.scale();
    block.put_scale(scale);
    let mut sum_of_all = 0;
    for i in 0..block.len() / 32 {
        let (mut codes, mut sums) = ([0; 32], [0; 2]);
        if !inverse.is_nan() {
            for (h, sum) in sums.iter_mut().enumerate() {
                let x = load(32 * i + h * LANES).mul(L::splat(inverse)).round();
                *sum = x.store_i8(codes.as_mut_ptr().add(h * LANES));
            }
        }
        block.put_codes(i, codes, sums);
        sum_of_all += sums[0] + sums[1];
    }
    block.put_sum_of_all(sum_of_all);
}

/// Columns of a group of tokens that are put in its order together: as many times four codes as there are tokens.
const SQUARE: usize = 4 * LANES;

/// [`SQUARE`] codes of each token of a group.
#[repr(align(64))]
struct Square([[i8; SQUARE]; LANES]);

/// Columns `col..col + n` of a group := the channels at `x`, [channel / 16][token][16] with `stride` numbers from 16 channels
/// to the next. The same codes, scales and sums as by [`quantize_block`], in half the time: what it finds token by
/// token, and stores four bytes at a time, are vectors over tokens here. `n` is a multiple of [`SQUARE`] and of a block.
#[inline(always)]
unsafe fn quantize_group<L: Lanes>(group: &GroupMut<'_>, x: *const f32, stride: usize, col: usize, n: usize) {
    let (n_tokens, len) = (group.n_tokens(), group.kind().block_len());
    for first in (0..n).step_by(len.max(SQUARE)) {
        let columns = first..first + len.max(SQUARE);
        let mut inverses = [[0.0; LANES]; SQUARE / 32]; // [block of these columns][token]
        for (i, inverses) in columns.clone().step_by(len).zip(&mut inverses) {
            let mut scales = [0.0; LANES];
            for t in 0..n_tokens {
                let mut seen = Seen::<L>::nothing();
                for block in i / LANES..(i + len) / LANES {
                    seen = seen.and(L::load(x.add(block * stride + t * LANES)));
                }
                (scales[t], inverses[t]) = seen.scale();
            }
            group.put_scales((col + i) / len, &scales);
        }
        let mut sums_of_all = [0; LANES];
        for i in columns.clone().step_by(SQUARE) {
            let mut square = Square([[0; SQUARE]; LANES]);
            for k in (0..SQUARE).step_by(LANES) {
                let inverses = &inverses[(i - first + k) / len];
                let x = x.add((i + k) / LANES * stride);
                for t in (0..n_tokens).filter(|&t| !inverses[t].is_nan()) {
                    let codes = L::load(x.add(t * LANES)).mul(L::splat(inverses[t])).round();
                    codes.store_i8(square.0[t].as_mut_ptr().add(k));
                }
            }
            for block in square.0.as_flattened_mut().as_chunks_mut().0 {
                *block = group.kind().in_order(*block);
            }
            let to = group.codes(col + i, SQUARE);
            L::transpose(square.0.as_ptr().cast(), LANES, to.as_mut_ptr().cast());
            for (h, codes) in to.chunks_exact(32 * LANES).enumerate() {
                let mut sums32 = [0; LANES];
                for (q, codes) in codes.chunks_exact(16 * LANES).enumerate() {
                    let mut sums16 = [0; LANES];
                    for four in codes.chunks_exact(SQUARE) {
                        L::add_quads(&mut sums16, four.as_ptr());
                    }
                    group.put_sums(16, (col + i) / 16 + 2 * h + q, &sums16);
                    sums32.iter_mut().zip(sums16).for_each(|(all, sum)| *all += sum);
                }
                group.put_sums(32, (col + i) / 32 + h, &sums32);
                sums_of_all.iter_mut().zip(sums32).for_each(|(all, sum)| *all += sum);
            }
        }
        group.put_sums(256, (col + first) / 256, &sums_of_all);
    }
}

/// The largest d_conv that is executed; the architecture's limit.
pub(crate) const D_CONV_MAX: usize = kestrel_formats::limits::D_CONV_MAX as usize;

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

impl Scan<'_> {
    /// The channels of block `b`, 16 or what is left.
    fn channels(&self, b: usize) -> std::ops::Range<usize> {
        b * LANES..self.d.len().min((b + 1) * LANES)
    }
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
    if s.run.n_tokens == 1 {
        // Each block has one chain, so that those of several blocks are made together.
        for first in (0..n_blocks).step_by(TOGETHER) {
            let blocks = first..n_blocks.min(first + TOGETHER);
            let mut made = [Stateless { delta: L::splat(0.0), gate: L::splat(0.0) }; TOGETHER];
            for (b, made) in blocks.clone().zip(&mut made) {
                *made = Stateless::of(load_part(&s.dt_bias[s.channels(b)]), s.run.of_block(b).start, dt, z);
            }
            for (b, &made) in blocks.zip(&made) {
                ScanBlock::of(s, b, &mut state[b * n..][..n]).step(s, 0, made, u);
            }
        }
        return;
    }
    for b in 0..n_blocks {
        let block = ScanBlock::of(s, b, &mut state[b * n..][..n]);
        let bias: L = load_part(&s.dt_bias[s.channels(b)]);
        let mut made = [Stateless { delta: bias, gate: bias }; TOGETHER];
        for first in (0..s.run.n_tokens).step_by(TOGETHER) {
            let tokens = first..s.run.n_tokens.min(first + TOGETHER);
            for (t, made) in tokens.clone().zip(&mut made) {
                *made = Stateless::of(bias, block.start + t * LANES, dt, z);
            }
            for (t, &made) in tokens.zip(&made) {
                block.step(s, t, made, u);
            }
        }
    }
}

/// A block of 16 channels of a scan.
struct ScanBlock<L> {
    /// Where the numbers of its first token are.
    start: usize,
    d: L,
    /// (d_state, 16), as is `h`.
    a: *const f32,
    h: *mut f32,
}

impl<L: Lanes> ScanBlock<L> {
    /// Block `b`, whose state is `h`.
    #[inline(always)]
    unsafe fn of(s: &Scan<'_>, b: usize, h: &mut [f32]) -> Self {
        let a = &s.a[b * h.len()..][..h.len()];
        // Both are read once, front to back; the numbers that one token brings are soon done.
        for (h, a) in h.chunks_exact(LANES).zip(a.chunks_exact(LANES)) {
            read_ahead(h.as_ptr().cast());
            read_ahead(a.as_ptr().cast());
        }
        let (start, d) = (s.run.of_block(b).start, load_part(&s.d[s.channels(b)]));
        Self { start, d, a: a.as_ptr(), h: h.as_mut_ptr() }
    }

    /// Token `t`.
    #[inline(always)]
    unsafe fn step(&self, s: &Scan<'_>, t: usize, made: Stateless<L>, u: &mut [f32]) {
        let u = u.as_mut_ptr().add(self.start + t * LANES);
        let x = L::load(u);
        let bc = s.bc.as_ptr().add((s.run.first + t) * s.bc_stride);
        let Stateless { delta, gate } = made;
        let token = Token { delta, delta_u: delta.mul(x), b: bc, c: bc.add(s.d_state) };
        let mut y = [self.d.mul(x), L::splat(0.0)];
        for i in (1..s.d_state).step_by(2) {
            y = [token.advance(i - 1, self.a, self.h, y[0]), token.advance(i, self.a, self.h, y[1])];
        }
        if !s.d_state.is_multiple_of(2) {
            y[0] = token.advance(s.d_state - 1, self.a, self.h, y[0]);
        }
        y[0].add(y[1]).mul(gate).store(u);
    }
}

/// Tokens, or blocks, whose [`Stateless`] is made together: each is a long chain of operations, for whose end the states
/// wait, and several chains fill each other's gaps.
const TOGETHER: usize = 16;

/// What of a token does not depend on the states.
#[derive(Clone, Copy)]
struct Stateless<L> {
    /// Δ
    delta: L,
    /// silu(z)
    gate: L,
}

impl<L: Lanes> Stateless<L> {
    /// Of the 16 channels that `dt` and `z` have from `at` on.
    #[inline(always)]
    unsafe fn of(bias: L, at: usize, dt: &[f32], z: &[f32]) -> Self {
        let delta = softplus(L::load(dt.as_ptr().add(at)).add(bias));
        Self { delta, gate: silu(L::load(z.as_ptr().add(at))) }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::acts::Acts;
    use crate::kernels::isa::Isa;
    use crate::kernels::table::kernels;

    /// Numbers in -1..1, of which some blocks are zero, tiny or not finite.
    fn numbers(n_tokens: usize, cols: usize) -> Vec<f32> {
        let mut x: Vec<f32> = (0..n_tokens * cols).map(|i| (i * 7919 % 2003) as f32 / 1001.0 - 1.0).collect();
        x[..cols].fill(0.0);
        x[cols..2 * cols].fill(1e-37);
        x[2 * cols + 40] = f32::NAN;
        x[3 * cols + 1] = f32::INFINITY;
        x[(n_tokens - 1) * cols] = 100.0;
        x
    }

    #[test]
    fn a_group_of_tokens_is_quantized_as_each_of_them() {
        use ActKind::*;
        for isa in Isa::all_supported() {
            let kernels = kernels(isa);
            for (kind, cols, n_tokens) in [Q8x32, Q8x32EvenOdd, Q8x256]
                .into_iter()
                .flat_map(|kind| [(kind, 512), (kind, 768)])
                .chain([(Q8x32, 64), (Q8x32EvenOdd, 96), (Q8x32, 192)])
                .flat_map(|(kind, cols)| [5, 6, 16, 17, 40].map(|n_tokens| (kind, cols, n_tokens)))
            {
                let x = numbers(n_tokens, cols);
                let mut channels = vec![0.0; x.len()];
                for (i, x) in x.iter().enumerate() {
                    let (t, c) = (i / cols, i % cols);
                    channels[(c / LANES * n_tokens + t) * LANES + c % LANES] = *x;
                }
                let made = |by_channel: bool| {
                    let mut acts = Acts::with_capacity(n_tokens, cols);
                    acts.reset(kind, n_tokens, cols);
                    // SAFETY: the instruction set is present, and nobody else writes.
                    unsafe {
                        let to = acts.writer();
                        match by_channel {
                            true => (kernels.channel_acts)(&channels, n_tokens, &to, 0, cols),
                            false => {
                                (0..n_tokens).for_each(|t| (kernels.row_acts)(&x[t * cols..][..cols], &to, t))
                            }
                        }
                    }
                    acts
                };
                let (got, truth) = (made(true), made(false));
                let what = format!("{} {kind:?} {n_tokens} by {cols}", isa.name());
                for t in 0..n_tokens {
                    let codes = |acts: &Acts| {
                        let mut codes = vec![0; cols];
                        acts.copy_codes(t, 0, &mut codes);
                        codes
                    };
                    assert_eq!(codes(&got), codes(&truth), "{what}: codes of {t}");
                    for b in 0..cols / kind.block_len() {
                        let bits = |acts: &Acts| acts.scale(t, b).to_bits();
                        assert_eq!(bits(&got), bits(&truth), "{what}: scale {b} of {t}");
                    }
                    let subs: &[usize] = if kind == Q8x256 { &[16, 32, 256] } else { &[32] };
                    for &sub in subs {
                        for i in 0..cols / sub {
                            assert_eq!(
                                got.sum(t, sub, i),
                                truth.sum(t, sub, i),
                                "{what}: sum {sub} {i} of {t}"
                            );
                        }
                    }
                }
            }
        }
    }
}
