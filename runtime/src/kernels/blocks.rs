//! Products with int8 activations from blocks taken apart by the codecs' own accessors, for the instruction sets that
//! have no faster way. They add up in the order of those that have one, so that all give the same bits.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contract of `matmul::Matmul` alone

use super::as_int8;
use super::matmul::{INT_PANEL_TOKENS, Job, PANEL_COLS};
use super::memory::LANES;
use super::scalar::fused;
use kestrel_formats::GgmlType;
use kestrel_quant::codec::{f16_at, iq4, q2_k, q3_k, q4, q4_k, q5, q5_k, q6_k, q8_0};

/// A block taken apart: `weight = d * scale(sub-block) * code - dmin * min(sub-block)`.
struct Parts {
    d: f32,
    dmin: f32,
    codes: [i8; 256],
    /// Per sub-block of [`sub_len`].
    scales: [i32; 16],
    mins: [i32; 16],
}

/// Weights that share an integer scale.
fn sub_len(ty: GgmlType) -> usize {
    match ty {
        GgmlType::Q2K => q2_k::SUB,
        GgmlType::Q3K => q3_k::SUB,
        GgmlType::Q6K => q6_k::SUB,
        _ => 32,
    }
}

/// Takes one block of a quantized type apart; `block` has exactly its bytes.
fn parts(ty: GgmlType, block: &[u8]) -> Parts {
    fn exactly<const N: usize>(block: &[u8]) -> &[u8; N] {
        block.try_into().expect("one block")
    }
    let mut p = Parts { d: 0.0, dmin: 0.0, codes: [0; 256], scales: [1; 16], mins: [0; 16] };
    match ty {
        GgmlType::Q8_0 => p.small(&q8_0::codes(exactly(block)), f16_at(block, q8_0::D), 0.0),
        GgmlType::Q4_0 => p.small(&q4::q4_0_codes(exactly(block)), f16_at(block, q4::D), 0.0),
        GgmlType::Q4_1 => {
            p.small(&q4::q4_1_codes(exactly(block)), f16_at(block, q4::D), f16_at(block, q4::M))
        }
        GgmlType::Q5_0 => p.small(&q5::q5_0_codes(exactly(block)), f16_at(block, q5::D), 0.0),
        GgmlType::Q5_1 => {
            p.small(&q5::q5_1_codes(exactly(block)), f16_at(block, q5::D), f16_at(block, q5::M))
        }
        GgmlType::Iq4Nl => p.small(&iq4::nl_codes(exactly(block)), f16_at(block, iq4::D), 0.0),
        GgmlType::Q2K => {
            let b = exactly(block);
            p.large(q2_k::codes(b), f16_at(block, q2_k::D), f16_at(block, q2_k::DMIN), |j| {
                let (s, m) = q2_k::scale_min(b, j);
                (s.into(), m.into())
            });
        }
        GgmlType::Q3K => {
            let b = exactly(block);
            p.large(q3_k::codes(b), f16_at(block, q3_k::D), 0.0, |j| (q3_k::scale(b, j).into(), 0));
        }
        GgmlType::Q4K => {
            let b = exactly(block);
            p.large(q4_k::codes(b), f16_at(block, q4_k::D), f16_at(block, q4_k::DMIN), |j| {
                let (s, m) = q4_k::scale_min(q4_k::packed_scales(b), j % 8);
                (s.into(), m.into())
            });
        }
        GgmlType::Q5K => {
            let b = exactly(block);
            p.large(q5_k::codes(b), f16_at(block, q5_k::D), f16_at(block, q5_k::DMIN), |j| {
                let (s, m) = q4_k::scale_min(q5_k::packed_scales(b), j % 8);
                (s.into(), m.into())
            });
        }
        GgmlType::Q6K => {
            let b = exactly(block);
            p.large(q6_k::codes(b), f16_at(block, q6_k::D), 0.0, |j| (q6_k::scale(b, j).into(), 0));
        }
        GgmlType::Iq4Xs => {
            let b = exactly(block);
            p.large(iq4::xs_codes(b), f16_at(block, iq4::D), 0.0, |j| (iq4::xs_scale(b, j % 8).into(), 0));
        }
        GgmlType::F32 | GgmlType::F16 | GgmlType::Bf16 => unreachable!("{ty} has no blocks"),
    }
    p
}

impl Parts {
    /// A block of 32 whose offset is `m`.
    fn small(&mut self, codes: &[i8; 32], d: f32, m: f32) {
        self.codes[..32].copy_from_slice(codes);
        (self.d, self.dmin, self.mins[0]) = (d, -m, 1);
    }

    fn large(&mut self, codes: [i8; 256], d: f32, dmin: f32, scale_min: impl Fn(usize) -> (i32, i32)) {
        (self.codes, self.d, self.dmin) = (codes, d, dmin);
        for j in 0..16 {
            (self.scales[j], self.mins[j]) = scale_min(j);
        }
    }

    /// See [`super::as_int8`].
    fn become_int8(&mut self) {
        let (scale, tables) = as_int8::tables(self.d, self.dmin, |j| (self.scales[j], self.mins[j]));
        for (codes, table) in self.codes.as_chunks_mut::<32>().0.iter_mut().zip(tables) {
            *codes = codes.map(|q| as_int8::code(table, q as u8));
        }
        (self.d, self.dmin, self.scales[0], self.mins) = (scale, 0.0, 1, [0; 16]);
    }
}

/// Tokens that share the taking apart of a block.
const TOKENS: usize = 16;
/// Sums of four products in a block at most.
pub(super) const QUADS: usize = 64;

/// Weights times int8 activations: integer sums within a block, f32 across blocks. `quads` multiplies the codes of a
/// block with activations and sums each four products. With `Q4K_AS_INT8`, see `as_int8.rs`.
///
/// # Safety
/// [`super::matmul::Matmul`].
#[inline(always)]
pub(super) unsafe fn int_matmul<const Q4K_AS_INT8: bool>(
    job: &Job<'_>,
    quads: impl Fn(&[i8], &[i8]) -> [i32; QUADS],
) {
    match (job.acts.n_tokens() < INT_PANEL_TOKENS, job.weights.dtype.block_len()) {
        (true, 32) => sum_blocks::<FewSmall>(job, false, quads),
        (true, _) => sum_blocks::<FewLarge>(job, false, quads),
        (false, 32) => sum_blocks::<ManySmall>(job, false, quads),
        (false, _) => sum_blocks::<ManyLarge>(job, Q4K_AS_INT8 && as_int8::applies(job), quads),
    }
}

#[inline(always)]
unsafe fn sum_blocks<S: Sum>(job: &Job<'_>, as_int8: bool, quads: impl Fn(&[i8], &[i8]) -> [i32; QUADS]) {
    let ty = job.weights.ggml();
    let (len, sub) = (ty.block_len(), if as_int8 { ty.block_len() } else { sub_len(ty) });
    let n_subs = len / sub;
    for row0 in job.rows.clone().step_by(LANES) {
        let n_rows = LANES.min(job.rows.end - row0);
        for t0 in (0..job.acts.n_tokens()).step_by(TOKENS) {
            let tokens = t0..(t0 + TOKENS).min(job.acts.n_tokens());
            let mut out = [[0.0; LANES]; TOKENS];
            for r in 0..n_rows {
                let mut sums = [S::default(); TOKENS];
                for (b, block) in job.weights.row(row0 + r).chunks_exact(ty.block_bytes()).enumerate() {
                    let mut parts = parts(ty, block);
                    if as_int8 {
                        parts.become_int8();
                    }
                    for t in tokens.clone() {
                        let (mut x, mut sums_of) = ([0; 256], [0; 16]);
                        job.acts.copy_codes(t, b * len, &mut x[..len]);
                        for (i, sum) in sums_of[..n_subs].iter_mut().enumerate() {
                            *sum = job.acts.sum(t, sub, b * n_subs + i);
                        }
                        sums[t - t0].add(&Product {
                            parts: &parts,
                            quads: quads(&parts.codes[..len], &x[..len]),
                            sub,
                            order: order(ty),
                            b,
                            scale: job.acts.scale(t, b),
                            sums: &sums_of[..n_subs],
                        });
                    }
                }
                for t in tokens.clone() {
                    out[t - t0][r] = sums[t - t0].total();
                }
            }
            for t in tokens {
                job.out.put(row0, t, &out[t - t0][..n_rows]);
            }
        }
    }
}

/// A block times the activations of its columns, in integers.
struct Product<'a> {
    parts: &'a Parts,
    quads: [i32; QUADS],
    /// Weights in a sub-block.
    sub: usize,
    /// Where a block of 256 has its codes.
    order: Order,
    /// Which block of its row.
    b: usize,
    /// The activations' scale, and the sums of their codes per sub-block.
    scale: f32,
    sums: &'a [i32],
}

/// One row times one token, block after block: the order of the roundings.
trait Sum: Copy + Default {
    fn add(&mut self, x: &Product<'_>);
    fn total(self) -> f32;
}

/// Lanes in the order of [`super::lanes::Lanes::sum`].
fn sum_lanes(x: [f32; LANES]) -> f32 {
    let y: [f32; 8] = std::array::from_fn(|i| x[i] + x[i + 8]);
    sum_four(std::array::from_fn(|i| y[i] + y[i + 4]))
}

/// The last steps of that.
fn sum_four(x: [f32; 4]) -> f32 {
    (x[0] + x[2]) + (x[1] + x[3])
}

/// Few tokens, blocks of 32: four blocks have four lanes each, in turn; lane i sums the codes 4·i..4·i + 4 and
/// 16 + 4·i..20 + 4·i. Offsets have four sums of their own, in turn.
#[derive(Clone, Copy, Default)]
struct FewSmall {
    lanes: [f32; LANES],
    offsets: [f32; 4],
}

impl Sum for FewSmall {
    #[inline(always)]
    fn add(&mut self, x: &Product<'_>) {
        let factor = x.parts.d * x.scale;
        for (i, lane) in self.lanes[x.b % 4 * 4..][..4].iter_mut().enumerate() {
            *lane = fused((x.quads[i] + x.quads[i + 4]) as f32, factor, *lane);
        }
        let offset = &mut self.offsets[x.b % 4];
        *offset = fused(-x.parts.dmin, x.scale * x.sums[0] as f32, *offset);
    }

    #[inline(always)]
    fn total(self) -> f32 {
        sum_lanes(self.lanes) + sum_four(self.offsets)
    }
}

/// Where the codes of a block of 256 lie: each `group` of weights in `run` bytes, byte i of them holding weights i,
/// i + run.. in as many fields (in its low bits, that is; further bits may lie elsewhere).
#[derive(Clone, Copy)]
pub(super) struct Order {
    pub group: usize,
    pub run: usize,
}

impl Order {
    /// The weight whose code is in byte `i` of the `v`-th 64 codes, when each 64 bytes are taken field after field.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub const fn weight(self, v: usize, i: usize) -> usize {
        let fields = self.group / self.run;
        let byte = v / fields * 64 + i;
        byte / self.run * self.group + v % fields * self.run + byte % self.run
    }

    /// The byte that holds weight `w`.
    const fn byte(self, w: usize) -> usize {
        w / self.group * self.run + w % self.run
    }
}

/// The order of a type with blocks of 256.
pub(super) const fn order(ty: GgmlType) -> Order {
    let (group, run) = match ty {
        GgmlType::Q2K | GgmlType::Q3K => (128, 32),
        GgmlType::Q6K => (128, 64),
        GgmlType::Iq4Xs => (32, 16),
        _ => (64, 32),
    };
    Order { group, run }
}

/// Few tokens, blocks of 256: lane i sums the codes whose bytes are dword i of each 64 bytes. Minimums have
/// sixteen lanes of their own, of two sub-blocks each, so that two or four blocks have theirs in turn.
#[derive(Clone, Copy, Default)]
struct FewLarge {
    lanes: [f32; LANES],
    mins: [f32; LANES],
}

impl Sum for FewLarge {
    #[inline(always)]
    fn add(&mut self, x: &Product<'_>) {
        let mut dots = [0; LANES];
        for (q, quad) in x.quads.iter().enumerate() {
            dots[x.order.byte(4 * q) / 4 % LANES] += quad * x.parts.scales[4 * q / x.sub];
        }
        let (d, dmin) = (x.parts.d * x.scale, x.parts.dmin * x.scale);
        for (lane, dot) in self.lanes.iter_mut().zip(dots) {
            *lane = fused(dot as f32, d, *lane);
        }
        let mins = x.parts.mins.as_chunks::<2>().0.iter().zip(x.sums.as_chunks::<2>().0);
        let n_pairs = 128 / x.sub;
        let lanes = &mut self.mins[x.b * n_pairs % LANES..][..n_pairs];
        for (lane, (min, sum)) in lanes.iter_mut().zip(mins) {
            *lane = fused((min[0] * sum[0] + min[1] * sum[1]) as f32, dmin, *lane);
        }
    }

    #[inline(always)]
    fn total(self) -> f32 {
        sum_lanes(self.lanes) - sum_lanes(self.mins)
    }
}

/// Many tokens, blocks of 32: block after block within a panel, then panel after panel.
#[derive(Clone, Copy, Default)]
struct ManySmall {
    panel: f32,
    panels: f32,
}

impl Sum for ManySmall {
    #[inline(always)]
    fn add(&mut self, x: &Product<'_>) {
        if x.b > 0 && x.b.is_multiple_of(PANEL_COLS / 32) {
            self.panels += self.panel;
            self.panel = 0.0;
        }
        let dot: i32 = x.quads[..8].iter().sum();
        self.panel = fused(dot as f32 * x.scale, x.parts.d, self.panel);
        self.panel = fused(-x.parts.dmin, x.sums[0] as f32 * x.scale, self.panel);
    }

    #[inline(always)]
    fn total(self) -> f32 {
        self.panels + self.panel
    }
}

/// Many tokens, blocks of 256: sub-block after sub-block, each its products and its minimum, then block after block.
#[derive(Clone, Copy, Default)]
struct ManyLarge {
    blocks: f32,
}

impl Sum for ManyLarge {
    #[inline(always)]
    fn add(&mut self, x: &Product<'_>) {
        let mut block = 0.0;
        for (j, (quads, &sum)) in x.quads.chunks_exact(x.sub / 4).zip(x.sums).enumerate() {
            let (dot, scale, min) =
                (quads.iter().sum::<i32>(), x.parts.scales[j] as f32, x.parts.mins[j] as f32);
            block = fused(dot as f32, scale * x.parts.d, block);
            block = fused(min * -x.parts.dmin, sum as f32, block);
        }
        self.blocks = fused(block, x.scale, self.blocks);
    }

    #[inline(always)]
    fn total(self) -> f32 {
        self.blocks
    }
}
