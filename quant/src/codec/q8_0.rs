//! Q8_0: 32 weights, `weight = d * code`.
//!
//! | bytes | content |
//! |---|---|
//! | 0..2 | `d`, f16 |
//! | 2..34 | codes, i8, in row order |

use kestrel_formats::GgmlType;

use super::{Format, blocks, expand, f16_at, for_each_block, put_f16};

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
            let amax = x.iter().fold(0f32, |m, v| if v.abs() > m { v.abs() } else { m });
            let d = amax / 127.0;
            let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
            put_f16(out, D, d);
            for (q, v) in out[QS..].iter_mut().zip(x) {
                *q = round_half_away(v * inverse) as i8 as u8;
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

/// `x.round()` for |x| < 2^22, in operations that vectorise: rounds to even, then undoes the even tie.
#[inline(always)]
fn round_half_away(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23
    let a = x.abs();
    let even = (a + MAGIC) - MAGIC;
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
