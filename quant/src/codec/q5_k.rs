//! Q5_K: 256 weights in 8 sub-blocks of 32, `weight = d * scale * code - dmin * min`.
//!
//! | bytes | content |
//! |---|---|
//! | 0..16 | `d`, `dmin` and the packed scales and mins, as in Q4_K |
//! | 16..48 | fifth bits: bit j of byte i belongs to weight i of sub-block j |
//! | 48..176 | low four bits, nibbles as in Q4_K |

use kestrel_formats::GgmlType;

use super::q4_k::{self, fit_blocks, pack_head, sub_scales};
use super::steps::{Parts, Shape, Steps, stored, whole};
use super::{Format, Group, expand, f16_at, for_each_block, groups};
use crate::scale_search::Tile;
use crate::scale_search::affine::Search;
use crate::scale_search::{limit, low_byte, round};

/// Weights in a block.
pub const LEN: usize = 256;
/// Bytes of a block.
pub const BYTES: usize = 176;
/// Weights in a sub-block.
pub const SUB: usize = 32;
/// Offset of `d`.
pub const D: usize = 0;
/// Offset of `dmin`.
pub const DMIN: usize = 2;
/// Offset of the packed scales and mins; [`super::q4_k::scale_min`] takes them apart.
pub const SCALES: usize = 4;
/// Offset of the fifth bits.
pub const QH: usize = 16;
/// Offset of the low four bits.
pub const QS: usize = 48;

/// The 12 packed bytes of a block.
pub fn packed_scales(block: &[u8; BYTES]) -> &[u8; 12] {
    block[SCALES..].first_chunk().expect("12 bytes")
}

/// The codes in row order.
pub fn codes(block: &[u8; BYTES]) -> [i8; LEN] {
    std::array::from_fn(|i| {
        let byte = block[QS + i / 64 * 32 + i % 32];
        let low = if i % 64 < 32 { byte & 15 } else { byte >> 4 };
        (low | (block[QH + i % 32] >> (i / 32) & 1) << 4) as i8
    })
}

/// Stores the codes.
#[inline(always)]
fn put_codes(codes: &[u8; LEN], out: &mut [u8; BYTES]) {
    for i in 0..32 {
        out[QH + i] = (0..8).fold(0, |bits, j| bits | (codes[32 * j + i] >> 4) << j);
    }
    for (i, byte) in out[QS..].iter_mut().enumerate() {
        let at = i / 32 * 64 + i % 32;
        *byte = (codes[at] & 15) | (codes[at + 32] & 15) << 4;
    }
}

/// The codec of Q5_K.
pub struct Q5K;

impl Format for Q5K {
    const TYPE: GgmlType = GgmlType::Q5K;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        const PLAIN: Search = Search { n_max: 31.0, first: -0.5, step: 0.1, n: 16, min_not_negative: true };
        const WEIGHTED: Search = Search { first: -0.9, step: 0.05, n: 37, ..PLAIN };
        let search = if importance.is_some() { &WEIGHTED } else { &PLAIN };
        let mut tile = Tile::EMPTY;
        for Group { x, importance, out } in groups::<LEN, BYTES, L>(src, importance, dst) {
            let (fitted, codes) = fit_blocks::<L>(&mut tile, x, importance, search);
            for (l, (out, codes)) in out.iter_mut().zip(&codes).enumerate() {
                out[..QH].copy_from_slice(&pack_head(&fitted, l));
                put_codes(codes, out);
            }
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; BYTES], out| {
            expand::<SUB, LEN>(&codes(b), sub_scales(packed_scales(b), f16_at(b, D), f16_at(b, DMIN)), out);
        });
    }
}

impl Steps for Q5K {
    const SHAPE: Shape = Shape { sub_len: SUB, sc: Some((0.0, 63.0)), m: Some((0.0, 63.0)) };

    fn parts(block: &[u8]) -> Parts {
        q4_k::parts(block)
    }

    fn nearest(t: f32) -> f32 {
        limit(round(t), 0.0, 31.0)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        let block = whole(block);
        block[..QH].copy_from_slice(&q4_k::parts_head(parts));
        put_codes(&stored(numbers, low_byte), block);
    }
}
