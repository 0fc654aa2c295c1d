//! Q5_0 and Q5_1: 32 weights, 5-bit codes and one scale; Q5_1 also has an offset.
//!
//! | Q5_0 | Q5_1 | content |
//! |---|---|---|
//! | 0..2 | 0..2 | `d`, f16 |
//! | | 2..4 | `m`, f16 |
//! | 2..6 | 4..8 | fifth bits, u32 little-endian: bit i belongs to weight i |
//! | 6..22 | 8..24 | low four bits, nibbles as in Q4_0 |
//!
//! Q5_0: `weight = d * (code - 16)`. Q5_1: `weight = d * code + m`.

use kestrel_formats::GgmlType;

use super::q4::{AFFINE_SEARCH, SIGNED_SEARCH, nibbles, pack_nibbles, round_affine, round_signed, tail};
use super::steps::{Parts, Shape, Steps, stored};
use super::{Format, blocks, expand, f16_at, for_each_block, put_f16};
use crate::scale_search::grid::Grid;
use crate::scale_search::{affine, grid, limit, low_byte, round, signed};

/// Weights in a block.
pub const LEN: usize = 32;
/// Bytes of a Q5_0 block.
pub const Q5_0_BYTES: usize = 22;
/// Bytes of a Q5_1 block.
pub const Q5_1_BYTES: usize = 24;
/// Offset of `d` in both.
pub const D: usize = 0;
/// Offset of `m` in Q5_1.
pub const M: usize = 2;
/// Offset of the fifth bits in Q5_0.
pub const Q5_0_QH: usize = 2;
/// Offset of the fifth bits in Q5_1.
pub const Q5_1_QH: usize = 4;
/// Offset of the low four bits in Q5_0.
pub const Q5_0_QS: usize = 6;
/// Offset of the low four bits in Q5_1.
pub const Q5_1_QS: usize = 8;
/// What Q5_0 adds to a code to store it without sign.
pub const Q5_0_BIAS: u8 = 16;

/// Codes in row order from the fifth bits and the nibbles that follow them.
#[inline(always)]
fn unpack(qh_qs: &[u8; 20]) -> [u8; LEN] {
    let (qh, qs) = qh_qs.split_first_chunk::<4>().expect("4 of 20 bytes");
    let qh = u32::from_le_bytes(*qh);
    let low = nibbles(tail(qs));
    std::array::from_fn(|i| low[i] | ((qh >> i & 1) as u8) << 4)
}

/// The inverse of [`unpack`].
#[inline(always)]
fn pack_codes(codes: &[u8; LEN]) -> [u8; 20] {
    let qh = codes.iter().enumerate().fold(0u32, |bits, (i, c)| bits | u32::from(c >> 4 & 1) << i);
    let mut out = [0; 20];
    out[..4].copy_from_slice(&qh.to_le_bytes());
    out[4..].copy_from_slice(&pack_nibbles(&codes.map(|c| c & 15)));
    out
}

/// The codes of Q5_0 in row order, sign applied.
pub fn q5_0_codes(block: &[u8; Q5_0_BYTES]) -> [i8; LEN] {
    unpack(tail(block)).map(|c| c as i8 - Q5_0_BIAS as i8)
}

/// The codes of Q5_1 in row order.
pub fn q5_1_codes(block: &[u8; Q5_1_BYTES]) -> [i8; LEN] {
    unpack(tail(block)).map(|c| c as i8)
}

/// The codec of Q5_0.
pub struct Q5_0;
/// The codec of Q5_1.
pub struct Q5_1;

impl Format for Q5_0 {
    const TYPE: GgmlType = GgmlType::Q5_0;

    /// Byte-identical to ggml without importance.
    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        let pack = |d: f32, codes: &[u8; LEN], out: &mut [u8; Q5_0_BYTES]| {
            put_f16(out, D, d);
            out[Q5_0_QH..].copy_from_slice(&pack_codes(codes));
        };
        match importance {
            None => {
                for (x, out) in blocks(src, dst) {
                    let (d, codes) = round_signed(x, 16.0);
                    pack(d, &codes, out);
                }
            }
            Some(w) => signed::quantize_single::<grid::Integers<16>, LEN, Q5_0_BYTES, L>(
                src,
                Some(w),
                dst,
                &SIGNED_SEARCH,
                |g| low_byte(g + f32::from(Q5_0_BIAS)),
                pack,
            ),
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; Q5_0_BYTES], out| {
            let d = f16_at(b, D);
            expand::<LEN, LEN>(&q5_0_codes(b), |_| (d, 0.0), out);
        });
    }
}

impl Format for Q5_1 {
    const TYPE: GgmlType = GgmlType::Q5_1;

    /// Byte-identical to ggml without importance.
    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        let pack = |d: f32, m: f32, codes: &[u8; LEN], out: &mut [u8; Q5_1_BYTES]| {
            put_f16(out, D, d);
            put_f16(out, M, m);
            out[Q5_1_QH..].copy_from_slice(&pack_codes(codes));
        };
        match importance {
            None => {
                for (x, out) in blocks(src, dst) {
                    let (d, m, codes) = round_affine(x, 31.0);
                    pack(d, m, &codes, out);
                }
            }
            Some(w) => {
                let search = affine::Search { n_max: 31.0, ..AFFINE_SEARCH };
                affine::quantize_single::<LEN, Q5_1_BYTES, L>(src, w, dst, &search, pack);
            }
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; Q5_1_BYTES], out| {
            let (d, m) = (f16_at(b, D), f16_at(b, M));
            expand::<LEN, LEN>(&q5_1_codes(b), |_| (d, -m), out);
        });
    }
}

impl Steps for Q5_0 {
    const SHAPE: Shape = Shape { sub_len: LEN, sc: None, m: None };

    fn parts(block: &[u8]) -> Parts {
        Parts::new(f16_at(block, D), 0.0)
    }

    fn nearest(t: f32) -> f32 {
        grid::Integers::<16>::nearest(t)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        put_f16(block, D, parts.d);
        let codes = stored(numbers, |g| low_byte(g + f32::from(Q5_0_BIAS)));
        block[Q5_0_QH..].copy_from_slice(&pack_codes(&codes));
    }
}

impl Steps for Q5_1 {
    const SHAPE: Shape = Shape { sub_len: LEN, sc: None, m: None };

    fn parts(block: &[u8]) -> Parts {
        Parts::new(f16_at(block, D), -f16_at(block, M))
    }

    fn nearest(t: f32) -> f32 {
        limit(round(t), 0.0, 31.0)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        put_f16(block, D, parts.d);
        put_f16(block, M, -parts.dmin);
        block[Q5_1_QH..].copy_from_slice(&pack_codes(&stored(numbers, low_byte)));
    }
}
