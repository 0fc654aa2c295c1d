//! Q3_K: 256 weights in 16 sub-blocks of 16, `weight = d * scale * code`, codes -4..=3.
//!
//! | bytes | content |
//! |---|---|
//! | 0..32 | third bits: bit k of byte i belongs to weight 32 k + i; set where the code is not negative |
//! | 32..96 | low two bits, as in Q2_K |
//! | 96..108 | sixteen 6-bit scales with 32 added, see [`scale`] |
//! | 108..110 | `d`, f16 |

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
pub const BYTES: usize = 110;
/// Weights in a sub-block.
pub const SUB: usize = 16;
/// Offset of the third bits.
pub const HMASK: usize = 0;
/// Offset of the low two bits.
pub const QS: usize = 32;
/// Offset of the packed scales.
pub const SCALES: usize = 96;
/// Offset of `d`.
pub const D: usize = 108;

/// Scale of sub-block `j` (0..16), sign applied: the low four bits are a nibble of byte `j % 8` (low nibbles first),
/// the upper two are bits `2 (j / 4)` of byte `8 + j % 4`.
pub fn scale(block: &[u8; BYTES], j: usize) -> i8 {
    let s = &block[SCALES..D];
    let low = s[j % 8] >> (j / 8 * 4) & 15;
    let high = s[8 + j % 4] >> (j / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// The inverse of [`scale`].
#[inline(always)]
fn pack_scales(scales: &[i8; 16]) -> [u8; 12] {
    let s = scales.map(|v| (v + 32) as u8);
    std::array::from_fn(|i| match i {
        0..8 => (s[i] & 15) | (s[i + 8] & 15) << 4,
        _ => (0..4).fold(0, |byte, k| byte | (s[4 * k + i - 8] >> 4) << (2 * k)),
    })
}

/// The codes in row order, sign applied.
pub fn codes(block: &[u8; BYTES]) -> [i8; LEN] {
    let low = two_bits(block[QS..].first_chunk().expect("64 bytes"));
    std::array::from_fn(|i| (low[i] | (block[HMASK + i % 32] >> (i / 32) & 1) << 2) as i8 - 4)
}

/// Stores codes that have 4 added.
#[inline(always)]
fn put_codes(codes: &[u8; LEN], out: &mut [u8; BYTES]) {
    for i in 0..32 {
        out[HMASK + i] = (0..8).fold(0, |bits, k| bits | (codes[32 * k + i] >> 2) << k);
    }
    out[QS..SCALES].copy_from_slice(&pack_two_bits(codes));
}

/// The codec of Q3_K.
pub struct Q3K;

impl Format for Q3K {
    const TYPE: GgmlType = GgmlType::Q3K;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        const SEARCH: Search = Search { step: 0.1, n: 9 };
        let weight = match importance {
            Some(_) => ErrorWeight::Importance(2.0),
            None => ErrorWeight::Square,
        };
        let mut tile = Tile::<SUB, { LEN / SUB }, L>::EMPTY;
        for Group { x, importance, out } in groups::<LEN, BYTES, L>(src, importance, dst) {
            tile.load(x, importance, weight);
            let fitted = tile.signed_blocks::<Integers<4>>(&SEARCH, 32.0);
            let codes = fitted.codes::<Integers<4>, SUB, LEN>(x, |g| low_byte(g + 4.0));
            for (l, (out, codes)) in out.iter_mut().zip(&codes).enumerate() {
                put_codes(codes, out);
                out[SCALES..D].copy_from_slice(&pack_scales(&fitted.sc.map(|sc| sc[l] as i8)));
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

impl Steps for Q3K {
    const SHAPE: Shape = Shape { sub_len: SUB, sc: Some((-32.0, 31.0)), m: None };

    fn parts(block: &[u8]) -> Parts {
        let block = block.first_chunk().expect("a block");
        let mut parts = Parts::new(f16_at(block, D), 0.0);
        parts.sc.iter_mut().enumerate().for_each(|(j, sc)| *sc = f32::from(scale(block, j)));
        parts
    }

    fn nearest(t: f32) -> f32 {
        Integers::<4>::nearest(t)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        let block = whole(block);
        put_codes(&stored(numbers, |g| low_byte(g + 4.0)), block);
        block[SCALES..D].copy_from_slice(&pack_scales(&parts.sc.map(|sc| sc as i8)));
        put_f16(block, D, parts.d);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_scales_come_back() {
        let scales: [i8; 16] = std::array::from_fn(|i| (i * 29 % 64) as i8 - 32);
        let mut block = [0; BYTES];
        block[SCALES..D].copy_from_slice(&pack_scales(&scales));
        assert_eq!(std::array::from_fn(|j| scale(&block, j)), scales);
    }
}
