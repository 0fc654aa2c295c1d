//! F32, F16 and BF16: one number after the other, little-endian.

use kestrel_formats::GgmlType;

use super::{Codec, f16_bits, for_each_block, quantize_blocks};

/// IEEE 754 single precision: copied.
pub struct F32;
/// IEEE 754 half precision, rounded to nearest even.
pub struct F16;
/// The upper half of an f32, rounded to nearest even. A NaN stays a (quiet) NaN.
pub struct Bf16;

impl Codec for F32 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::F32
    }

    fn quantize(&self, src: &[f32], _importance: Option<&[f32]>, dst: &mut [u8]) {
        quantize_blocks(src, None, dst, |[x], _, out: &mut [u8; 4]| *out = x.to_le_bytes());
    }

    fn dequantize(&self, src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; 4], out| *out = [f32::from_le_bytes(*b)]);
    }
}

impl Codec for F16 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::F16
    }

    fn quantize(&self, src: &[f32], _importance: Option<&[f32]>, dst: &mut [u8]) {
        quantize_blocks(src, None, dst, |[x], _, out: &mut [u8; 2]| *out = f16_bits(*x).to_le_bytes());
    }

    fn dequantize(&self, src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; 2], out| *out = [half::f16::from_le_bytes(*b).to_f32_const()]);
    }
}

impl Codec for Bf16 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Bf16
    }

    fn quantize(&self, src: &[f32], _importance: Option<&[f32]>, dst: &mut [u8]) {
        quantize_blocks(src, None, dst, |[x], _, out: &mut [u8; 2]| {
            *out = half::bf16::from_f32(*x).to_le_bytes()
        });
    }

    fn dequantize(&self, src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; 2], out| {
            *out = [f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)];
        });
    }
}
