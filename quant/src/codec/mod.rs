//! The codecs: one file per family of ggml types, and [`codec`] as the only list of them.
//!
//! Each file states the layout of its blocks once, as byte offsets and small functions that take a block apart; the
//! runtime's kernels use those and keep no second copy. Every block type decodes as
//! `weight = scale(sub-block) * code - min(sub-block)`, with codes as signed bytes in the order of the row.
//!
//! Layouts: ggml's public block structures (`ggml-common.h`). The types of bitsandbytes ([`bnb4`], [`bnb8`]) have their
//! scales beside the codes ([`scales`]) and join at [`dequantize`].

pub mod bnb4;
pub mod bnb8;
pub mod iq4;
pub mod plain;
pub mod q2_k;
pub mod q3_k;
pub mod q4;
pub mod q4_k;
pub mod q5;
pub mod q5_k;
pub mod q6_k;
pub mod q8_0;
pub mod scales;

use kestrel_formats::{GgmlType, WeightType};
use scales::Scales;

/// Quantizes and dequantizes rows of one type. `src.len()` is a multiple of the block length and `dst` has exactly
/// the right size; both are asserted at this edge.
pub trait Codec: Sync {
    /// The type in the table.
    fn ggml_type(&self) -> GgmlType;

    /// Quantizes whole blocks. `importance`, if given, has one non-negative weight per column of the row that `src`
    /// is (an importance matrix) and `src` is then exactly one row.
    fn quantize(&self, src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]);

    /// Dequantizes whole blocks, bit-exact with ggml.
    fn dequantize(&self, src: &[u8], dst: &mut [f32]);
}

/// The codec of a type.
pub fn codec(ty: GgmlType) -> &'static dyn Codec {
    match ty {
        GgmlType::F32 => &plain::F32,
        GgmlType::F16 => &plain::F16,
        GgmlType::Bf16 => &plain::Bf16,
        GgmlType::Q8_0 => &q8_0::Q8_0,
        GgmlType::Q4_0 => &q4::Q4_0,
        GgmlType::Q4_1 => &q4::Q4_1,
        GgmlType::Q5_0 => &q5::Q5_0,
        GgmlType::Q5_1 => &q5::Q5_1,
        GgmlType::Q2K => &q2_k::Q2K,
        GgmlType::Q3K => &q3_k::Q3K,
        GgmlType::Q4K => &q4_k::Q4K,
        GgmlType::Q5K => &q5_k::Q5K,
        GgmlType::Q6K => &q6_k::Q6K,
        GgmlType::Iq4Nl => &iq4::Iq4Nl,
        GgmlType::Iq4Xs => &iq4::Iq4Xs,
    }
}

/// Dequantizes weights `first..first + out.len()` of a matrix of any type, whole blocks of it; `bytes` begins with
/// theirs. `scales` are the whole matrix's, of a type that has them beside its codes.
pub fn dequantize(ty: WeightType, bytes: &[u8], first: usize, scales: Option<&Scales<'_>>, out: &mut [f32]) {
    match (ty, scales) {
        (WeightType::Ggml(ty), _) => codec(ty).dequantize(bytes, out),
        (WeightType::Nf4 | WeightType::Fp4, Some(scales)) => bnb4::dequantize(ty, bytes, first, scales, out),
        (WeightType::Int8, Some(scales)) => bnb8::dequantize(bytes, first, scales, out),
        (_, None) => panic!("{ty} without scales"),
    }
}

/// Bits of the nearest f16, ties to even. A NaN becomes the quiet NaN of its sign, as in ggml.
pub fn f16_bits(x: f32) -> u16 {
    if x.is_nan() {
        return ((x.to_bits() >> 16) & 0x8000) as u16 | 0x7e00;
    }
    half::f16::from_f32_const(x).to_bits()
}

/// The f16 at `offset` of a block.
pub fn f16_at(block: &[u8], offset: usize) -> f32 {
    half::f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

/// Stores the nearest f16 at `offset` of a block and returns what was stored.
fn put_f16(block: &mut [u8], offset: usize, x: f32) -> f32 {
    let bits = f16_bits(x);
    block[offset..offset + 2].copy_from_slice(&bits.to_le_bytes());
    half::f16::from_bits(bits).to_f32()
}

/// Cuts `src` and `dst` into blocks of `BYTES` and `LEN` and calls `f` on each pair.
fn for_each_block<const BYTES: usize, const LEN: usize>(
    src: &[u8],
    dst: &mut [f32],
    f: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (blocks, bytes_left) = src.as_chunks::<BYTES>();
    let (outs, floats_left) = dst.as_chunks_mut::<LEN>();
    assert!(bytes_left.is_empty() && floats_left.is_empty() && blocks.len() == outs.len(), "whole blocks");
    for (block, out) in blocks.iter().zip(outs) {
        f(block, out);
    }
}

/// Writes `scale * code - min` for one block whose sub-blocks have `SUB` weights each.
fn expand<const SUB: usize, const LEN: usize>(
    codes: &[i8; LEN],
    scale_min: impl Fn(usize) -> (f32, f32),
    out: &mut [f32; LEN],
) {
    let (codes, _) = codes.as_chunks::<SUB>();
    let (outs, _) = out.as_chunks_mut::<SUB>();
    for (j, (codes, out)) in codes.iter().zip(outs).enumerate() {
        let (scale, min) = scale_min(j);
        for (&c, o) in codes.iter().zip(out) {
            *o = scale * f32::from(c) - min;
        }
    }
}

/// Cuts `src`, `importance` and `dst` into blocks and calls `f` on each.
fn quantize_blocks<const LEN: usize, const BYTES: usize>(
    src: &[f32],
    importance: Option<&[f32]>,
    dst: &mut [u8],
    mut f: impl FnMut(&[f32; LEN], Option<&[f32; LEN]>, &mut [u8; BYTES]),
) {
    let (blocks, floats_left) = src.as_chunks::<LEN>();
    let (outs, bytes_left) = dst.as_chunks_mut::<BYTES>();
    assert!(bytes_left.is_empty() && floats_left.is_empty() && blocks.len() == outs.len(), "whole blocks");
    let weights = importance.map(|w| w.as_chunks::<LEN>().0);
    assert!(weights.is_none_or(|w| w.len() == blocks.len()), "one importance weight per column");
    for (i, (block, out)) in blocks.iter().zip(outs).enumerate() {
        f(block, weights.map(|w| &w[i]), out);
    }
}
