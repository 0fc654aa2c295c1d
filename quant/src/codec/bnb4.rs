//! NF4 and FP4 of bitsandbytes: 4-bit codes in flat blocks over the whole matrix, the scales beside them.
//!
//! | byte | content |
//! |---|---|
//! | i | weight 2 i in bits 4..8, weight 2 i + 1 in bits 0..4 |
//!
//! `weight = value(code) * absmax(block)`, rounded to the dtype that was quantized.

use super::scales::Scales;
use crate::transform::check_finite;
use kestrel_formats::{Error, ErrorKind, Result, WeightType};
use std::sync::LazyLock;

/// Code of each interval between [`BOUNDS`], and the bounds: midpoints between neighbouring values.
struct Buckets {
    bounds: [f32; 15],
    codes: [u8; 16],
}

impl Buckets {
    fn of(ty: WeightType) -> Self {
        let values = values(ty);
        let mut codes: [u8; 16] = std::array::from_fn(|i| i as u8);
        codes.sort_by(|&a, &b| values[usize::from(a)].partial_cmp(&values[usize::from(b)]).expect("no NaN"));
        let value = |i: usize| values[usize::from(codes[i])];
        Self { bounds: std::array::from_fn(|i| (value(i) + value(i + 1)) / 2.0), codes }
    }

    /// Codes of numbers from -1 to 1, two a byte. A number on a bound takes the lower code.
    fn pack(&self, x: &[f32], bytes: &mut [u8]) {
        const STEP: usize = 32;
        for (x, bytes) in x.chunks(STEP).zip(bytes.chunks_mut(STEP / 2)) {
            // How many bounds are below: this order of the loops vectorises.
            let mut below = [0u32; STEP];
            for bound in self.bounds {
                for (n, x) in below.iter_mut().zip(x) {
                    *n += u32::from(bound < *x);
                }
            }
            for (byte, pair) in bytes.iter_mut().zip(below.as_chunks::<2>().0) {
                *byte = self.codes[pair[0] as usize] << 4 | self.codes[pair[1] as usize];
            }
        }
    }
}

static NF4: LazyLock<Buckets> = LazyLock::new(|| Buckets::of(WeightType::Nf4));
static FP4: LazyLock<Buckets> = LazyLock::new(|| Buckets::of(WeightType::Fp4));

/// The smallest scale that is divided by.
const SCALE_MIN: f32 = 1e-38;

/// What the codes of a 4-bit type stand for.
fn values(ty: WeightType) -> &'static [f32; 16] {
    ty.code_values().expect("a type with 4-bit codes")
}

/// Quantizes numbers that begin at a block: `codes` has a byte for two of them, `absmax` one scale per `blocksize`.
/// Codes and scales are those of the library's CPU kernel (`quantize_4bit`).
///
/// Errors: `NotFinite` if a number is NaN or infinite.
pub fn quantize(
    ty: WeightType,
    blocksize: usize,
    src: &[f32],
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    check_finite(src, "in the source")?;
    assert!(src.len() == 2 * codes.len() && src.len().div_ceil(blocksize) == absmax.len(), "whole blocks");
    let buckets = if ty == WeightType::Nf4 { &*NF4 } else { &*FP4 };
    let mut normal = vec![0.0; blocksize];
    let blocks = src.chunks(blocksize).zip(codes.chunks_mut(blocksize / 2)).zip(absmax);
    for ((block, codes), absmax) in blocks {
        let normal = &mut normal[..block.len()];
        *absmax = block.iter().fold(0f32, |max, x| max.max(x.abs()));
        // A last block that is not full is divided by its scale, all others are multiplied by the reciprocal.
        if block.len() == blocksize {
            let inverse = 1.0 / absmax.max(SCALE_MIN);
            normal.iter_mut().zip(block).for_each(|(to, x)| *to = (x * inverse).clamp(-1.0, 1.0));
        } else {
            *absmax = absmax.max(SCALE_MIN);
            normal.iter_mut().zip(block).for_each(|(to, x)| *to = (x / *absmax).clamp(-1.0, 1.0));
        }
        buckets.pack(normal, codes);
    }
    Ok(())
}

/// The error for a matrix whose rows are no whole bytes.
pub fn odd_row(cols: usize) -> Error {
    Error::new(ErrorKind::Unsupported).expected("an even number of columns, for two codes a byte").found(cols)
}

/// Dequantizes weights `first..first + out.len()` of a matrix; both ends are even. `codes` begins with theirs.
/// Bit for bit what the library's dequantization gives.
pub fn dequantize(ty: WeightType, codes: &[u8], first: usize, scales: &Scales<'_>, out: &mut [f32]) {
    assert!(out.len() == 2 * codes.len() && first.is_multiple_of(2), "whole bytes");
    let values = values(ty);
    scales.for_each(first, out.len(), |range, scale| {
        let scaled = values.map(|value| scales.round(value * scale));
        let codes = &codes[range.start / 2..range.end / 2];
        for (byte, pair) in codes.iter().zip(out[range].as_chunks_mut::<2>().0) {
            *pair = [scaled[usize::from(byte >> 4)], scaled[usize::from(byte & 15)]];
        }
    });
}
