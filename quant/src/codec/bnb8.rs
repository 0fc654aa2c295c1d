//! The weights of bitsandbytes' LLM.int8: a signed byte each, in row order, and a scale per row beside them.
//!
//! `weight = code * scale / 127`, in f32, where `scale` is the largest magnitude of the row.

use super::scales::Scales;
use kestrel_formats::{Error, ErrorKind, Result};

/// 1/127 as the library multiplies with it.
pub const INVERSE_127: f32 = 7.874_016e-3;

/// Quantizes one row and returns its scale. As in the library the numbers become f16 first. Codes and scale are those
/// of its `int8_vectorwise_quant` without outliers.
///
/// Errors: `OutOfRange` for a number that f16 cannot hold.
pub fn quantize_row(src: &[f32], codes: &mut [u8]) -> Result<f32> {
    assert_eq!(src.len(), codes.len());
    let halves = src.iter().map(|&x| half::f16::from_f32(x).to_f32());
    if let Some((x, _)) = src.iter().zip(halves.clone()).find(|(_, half)| !half.is_finite()) {
        return Err(Error::new(ErrorKind::OutOfRange)
            .expected("numbers that f16 can hold, which the library quantizes")
            .found(x));
    }
    let scale = halves.clone().fold(0f32, |max, x| max.max(x.abs()));
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale * 127.0 };
    for (code, x) in codes.iter_mut().zip(halves) {
        *code = (x * inverse).round_ties_even() as i8 as u8;
    }
    Ok(scale)
}

/// Dequantizes weights `first..first + out.len()` of a matrix; `codes` begins with theirs. Bit for bit what the
/// library's `int8_vectorwise_dequant` gives.
pub fn dequantize(codes: &[u8], first: usize, scales: &Scales<'_>, out: &mut [f32]) {
    assert_eq!(out.len(), codes.len());
    scales.for_each(first, out.len(), |range, scale| {
        for (code, x) in codes[range.clone()].iter().zip(&mut out[range]) {
            *x = scales.round(f32::from(*code as i8) * scale * INVERSE_127);
        }
    });
}
