//! Plain Rust: the lanes as an array, and the integer products from the codecs' own accessors.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the contracts of `Lanes` and `matmul::Matmul` alone

use super::lanes::Lanes;
use super::matmul::Job;
use super::memory::LANES;
use kestrel_formats::GgmlType;
use kestrel_quant::codec::{f16_at, iq4, q2_k, q3_k, q4, q4_k, q5, q5_k, q6_k, q8_0};

/// Sixteen f32 as an array.
#[derive(Clone, Copy)]
pub(crate) struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Lanes for Scalar {
    const TILE_TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(p.cast::<[f32; LANES]>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        p.cast::<[f32; LANES]>().write_unaligned(self.0);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        let bytes = p.cast::<[[u8; 2]; LANES]>().read_unaligned();
        Self(bytes.map(|b| half::f16::from_le_bytes(b).to_f32_const()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        let bytes = p.cast::<[[u8; 2]; LANES]>().read_unaligned();
        Self(bytes.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // Not `f32::mul_add`, which is a slow library call where the target has no such instruction.
        Self(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        Self(self.0.map(f32::abs))
    }
    #[inline(always)]
    unsafe fn at_most(self, limit: Self) -> Self {
        self.zip(limit, |a, l| if l < a { l } else { a })
    }
    #[inline(always)]
    unsafe fn at_least(self, limit: Self) -> Self {
        self.zip(limit, |a, l| if l > a { l } else { a })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        const MAGIC: f32 = 12_582_912.0; // 1.5 · 2^23: adding it leaves no fraction bits; callers stay below 2^22
        Self(self.0.map(|x| (x + MAGIC) - MAGIC))
    }
    #[inline(always)]
    unsafe fn scale_by_power(self, n: Self) -> Self {
        // In two steps, so that neither factor leaves the range of normal numbers and only the last one rounds.
        let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
        self.zip(n, |x, n| {
            let n = n as i32;
            let half = n >> 1;
            x * power(half) * power(n - half)
        })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let x = self.0;
        let y: [f32; 8] = std::array::from_fn(|i| x[i] + x[i + 8]);
        let z: [f32; 4] = std::array::from_fn(|i| y[i] + y[i + 4]);
        (z[0] + z[2]) + (z[1] + z[3])
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8) -> i32 {
        let codes = self.0.map(|x| x as i8);
        p.cast::<[i8; LANES]>().write_unaligned(codes);
        codes.iter().map(|&q| i32::from(q)).sum()
    }
}

/// A block taken apart: `weight = d * scale(sub-block) * code - dmin * min(sub-block)`.
pub(crate) struct Parts {
    pub d: f32,
    pub dmin: f32,
    pub codes: [i8; 256],
    /// Per sub-block of [`sub_len`].
    pub scales: [i32; 16],
    pub mins: [i32; 16],
}

/// Weights that share an integer scale.
pub(crate) fn sub_len(ty: GgmlType) -> usize {
    match ty {
        GgmlType::Q2K => q2_k::SUB,
        GgmlType::Q3K => q3_k::SUB,
        GgmlType::Q6K => q6_k::SUB,
        _ => 32,
    }
}

/// Takes one block of a quantized type apart; `block` has exactly its bytes.
pub(crate) fn parts(ty: GgmlType, block: &[u8]) -> Parts {
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
}

/// Weights times int8 activations: integer sums within a block, f32 across blocks.
///
/// # Safety
/// [`super::matmul::Matmul`].
pub(crate) unsafe fn int_matmul(job: &Job<'_>, _scratch: &mut super::matmul::Scratch) {
    let bytes = job.weights.dtype.block_bytes();
    for row0 in job.rows.clone().step_by(LANES) {
        let n_rows = LANES.min(job.rows.end - row0);
        for t0 in (0..job.acts.n_tokens()).step_by(TOKENS) {
            let tokens = t0..(t0 + TOKENS).min(job.acts.n_tokens());
            let mut out = [[0.0; LANES]; TOKENS];
            for r in 0..n_rows {
                for (b, block) in job.weights.row(row0 + r).chunks_exact(bytes).enumerate() {
                    let parts = parts(job.weights.dtype, block);
                    for t in tokens.clone() {
                        out[t - t0][r] += block_product(job, &parts, t, b);
                    }
                }
            }
            for t in tokens {
                job.out.put(row0, t, &out[t - t0][..n_rows]);
            }
        }
    }
}

/// Tokens that share the taking apart of a block.
const TOKENS: usize = 16;

/// One block times the activations of its columns.
fn block_product(job: &Job<'_>, p: &Parts, t: usize, b: usize) -> f32 {
    let (len, sub) = (job.weights.dtype.block_len(), sub_len(job.weights.dtype));
    let codes = &job.acts.codes(t)[b * len..][..len];
    let (mut dot, mut mins) = (0i32, 0i32);
    for (j, (w, a)) in p.codes[..len].chunks_exact(sub).zip(codes.chunks_exact(sub)).enumerate() {
        let products: i32 = w.iter().zip(a).map(|(&w, &a)| i32::from(w) * i32::from(a)).sum();
        dot += p.scales[j] * products;
        mins += p.mins[j] * a.iter().map(|&a| i32::from(a)).sum::<i32>();
    }
    job.acts.scales(t)[b] * (p.d * dot as f32 - p.dmin * mins as f32)
}
