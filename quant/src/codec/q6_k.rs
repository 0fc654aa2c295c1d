//! Q6_K: 256 weights in 16 sub-blocks of 16, `weight = d * scale * code`, codes -32..=31.
//!
//! | bytes | content |
//! |---|---|
//! | 0..128 | low four bits: of each 128 weights, byte i of 64 has weight i in the low, i + 64 in the high nibble |
//! | 128..192 | upper two bits, as the codes of Q2_K |
//! | 192..208 | scales, i8 |
//! | 208..210 | `d`, f16 |

use kestrel_formats::GgmlType;

use super::q2_k::{pack_two_bits, two_bits};
use super::steps::{Parts, Shape, Steps, stored, whole};
use super::{Format, Group, expand, f16_at, for_each_block, groups, put_f16};
use crate::scale_search::grid::{Grid, Integers};
use crate::scale_search::signed::Search;
use crate::scale_search::{ErrorWeight, Tile, low_byte};

/// Weights in a block.
pub const LEN: usize = 256;
/// Bytes of a block.
pub const BYTES: usize = 210;
/// Weights in a sub-block.
pub const SUB: usize = 16;
/// Offset of the low four bits.
pub const QL: usize = 0;
/// Offset of the upper two bits.
pub const QH: usize = 128;
/// Offset of the scales.
pub const SCALES: usize = 192;
/// Offset of `d`.
pub const D: usize = 208;

/// The codes in row order, sign applied.
pub fn codes(block: &[u8; BYTES]) -> [i8; LEN] {
    let high = two_bits(block[QH..].first_chunk().expect("64 bytes"));
    std::array::from_fn(|i| {
        let byte = block[QL + i / 128 * 64 + i % 64];
        let low = if i % 128 < 64 { byte & 15 } else { byte >> 4 };
        (low | high[i] << 4) as i8 - 32
    })
}

/// Scale of sub-block `j` (0..16).
pub fn scale(block: &[u8; BYTES], j: usize) -> i8 {
    block[SCALES + j] as i8
}

/// Stores codes that have 32 added.
#[inline(always)]
fn put_codes(codes: &[u8; LEN], out: &mut [u8; BYTES]) {
    for (i, byte) in out[..QH].iter_mut().enumerate() {
        let at = i / 64 * 128 + i % 64;
        *byte = (codes[at] & 15) | (codes[at + 64] & 15) << 4;
    }
    out[QH..SCALES].copy_from_slice(&pack_two_bits(&codes.map(|c| c >> 4)));
}

/// The codec of Q6_K.
pub struct Q6K;

impl Format for Q6K {
    const TYPE: GgmlType = GgmlType::Q6K;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        const SEARCH: Search = Search { step: 0.1, n: 9 };
        let weight = match importance {
            Some(_) => ErrorWeight::ImportanceOnly,
            None => ErrorWeight::Square,
        };
        let mut tile = Tile::<SUB, { LEN / SUB }, L>::EMPTY;
        for Group { x, importance, out } in groups::<LEN, BYTES, L>(src, importance, dst) {
            tile.load(x, importance, weight);
            let fitted = tile.signed_blocks::<Integers<32>>(&SEARCH, 128.0);
            let codes = fitted.codes::<Integers<32>, SUB, LEN>(x, |g| low_byte(g + 32.0));
            for (l, (out, codes)) in out.iter_mut().zip(&codes).enumerate() {
                put_codes(codes, out);
                for (byte, sc) in out[SCALES..D].iter_mut().zip(&fitted.sc) {
                    *byte = sc[l] as i8 as u8;
                }
                put_f16(out, D, fitted.d[l]);
            }
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; BYTES], out| {
            let d = f16_at(b, D);
            expand::<SUB, LEN>(&codes(b), |j| (d * f32::from(scale(b, j)), 0.0), out);
        });
    }
}

impl Steps for Q6K {
    const SHAPE: Shape = Shape { sub_len: SUB, sc: Some((-128.0, 127.0)), m: None };

    fn parts(block: &[u8]) -> Parts {
        let block = block.first_chunk().expect("a block");
        let mut parts = Parts::new(f16_at(block, D), 0.0);
        parts.sc.iter_mut().enumerate().for_each(|(j, sc)| *sc = f32::from(scale(block, j)));
        parts
    }

    fn nearest(t: f32) -> f32 {
        Integers::<32>::nearest(t)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        let block = whole(block);
        put_codes(&stored(numbers, |g| low_byte(g + 32.0)), block);
        for (byte, sc) in block[SCALES..D].iter_mut().zip(&parts.sc) {
            *byte = *sc as i8 as u8;
        }
        put_f16(block, D, parts.d);
    }
}
