//! Q8_0: 32 weights, `weight = d * code`.
//!
//! | bytes | content |
//! |---|---|
//! | 0..2 | `d`, f16 |
//! | 2..34 | codes, i8, in row order |

use kestrel_formats::GgmlType;

use super::steps::{Parts, Shape, Steps, stored};
use super::{Format, blocks, expand, f16_at, for_each_block, largest, put_f16};
use crate::scale_search::{limit, low_byte, round};

/// Weights in a block.
pub const LEN: usize = 32;
/// Bytes of a block.
pub const BYTES: usize = 34;
/// Offset of `d`.
pub const D: usize = 0;
/// Offset of the codes.
pub const QS: usize = 2;

/// The codes in row order.
pub fn codes(block: &[u8; BYTES]) -> [i8; LEN] {
    std::array::from_fn(|i| block[QS + i] as i8)
}

/// The codec of Q8_0.
pub struct Q8_0;

impl Format for Q8_0 {
    const TYPE: GgmlType = GgmlType::Q8_0;

    /// Byte-identical to ggml, which also ignores the importance here.
    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], _importance: Option<&[f32]>, dst: &mut [u8]) {
        for (x, out) in blocks::<LEN, BYTES>(src, dst) {
            let amax = largest(x, 0.0, f32::abs);
            let d = amax / 127.0;
            let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
            put_f16(out, D, d);
            for (q, v) in out[QS..].iter_mut().zip(x) {
                // Where d is so small that its inverse is infinite, the largest code, and none for 0.
                let code = round_half_away(v * inverse);
                let code = if code.is_nan() { 0.0 } else { code };
                *q = low_byte(limit(code, -128.0, 127.0));
            }
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; BYTES], out| {
            let d = f16_at(b, D);
            expand::<LEN, LEN>(&codes(b), |_| (d, 0.0), out);
        });
    }
}

impl Steps for Q8_0 {
    const SHAPE: Shape = Shape { sub_len: LEN, sc: None, m: None };

    fn parts(block: &[u8]) -> Parts {
        Parts::new(f16_at(block, D), 0.0)
    }

    fn nearest(t: f32) -> f32 {
        limit(round(t), -127.0, 127.0)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        put_f16(block, D, parts.d);
        block[QS..].copy_from_slice(&stored::<LEN>(numbers, low_byte));
    }
}

/// `x.round()` for |x| < 2^22, in operations that vectorise: rounds to even, then undoes the even tie.
#[inline(always)]
fn round_half_away(x: f32) -> f32 {
    let a = x.abs();
    let even = round(a);
    let away = if a - even == 0.5 { even + 1.0 } else { even };
    if x < 0.0 { -away } else { away }
}

#[cfg(test)]
mod tests {
    use super::round_half_away;

    #[test]
    fn rounds_like_the_standard_library() {
        for i in -1024..=1024 {
            let x = i as f32 / 8.0;
            for x in [x, x.next_up(), x.next_down()] {
                assert_eq!(round_half_away(x), x.round(), "{x}");
            }
        }
    }
}
