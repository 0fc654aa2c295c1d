//! F32, F16 and BF16: one number after the other, little-endian.

use kestrel_formats::GgmlType;

use super::{Format, blocks, f16_bits, f16_to_f32, for_each_block};

/// IEEE 754 single precision: copied.
pub struct F32;
/// IEEE 754 half precision, rounded to nearest even.
pub struct F16;
/// The upper half of an f32, rounded to nearest even. A NaN stays a (quiet) NaN.
pub struct Bf16;

impl Format for F32 {
    const TYPE: GgmlType = GgmlType::F32;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], _importance: Option<&[f32]>, dst: &mut [u8]) {
        for ([x], out) in blocks(src, dst) {
            *out = x.to_le_bytes();
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; 4], out| *out = [f32::from_le_bytes(*b)]);
    }
}

impl Format for F16 {
    const TYPE: GgmlType = GgmlType::F16;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], _importance: Option<&[f32]>, dst: &mut [u8]) {
        for ([x], out) in blocks(src, dst) {
            *out = f16_bits(*x).to_le_bytes();
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; 2], out| *out = [f16_to_f32(u16::from_le_bytes(*b))]);
    }
}

impl Format for Bf16 {
    const TYPE: GgmlType = GgmlType::Bf16;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], _importance: Option<&[f32]>, dst: &mut [u8]) {
        for ([x], out) in blocks(src, dst) {
            *out = bf16_bits(*x).to_le_bytes();
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; 2], out| {
            *out = [f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)];
        });
    }
}

/// Bits of the nearest bf16, ties to even. A NaN keeps its upper bits and becomes quiet.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    ((if x.is_nan() { bits | 0x0040_0000 } else { rounded }) >> 16) as u16
}
