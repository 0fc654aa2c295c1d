//! Q2_K: 256 weights in 16 sub-blocks of 16, `weight = d * scale * code - dmin * min`.
//!
//! | bytes | content |
//! |---|---|
//! | 0..16 | one byte per sub-block: scale in the low, min in the high nibble |
//! | 16..80 | codes: byte i of each 32 has weights i, i + 32, i + 64, i + 96 of its 128, two bits each, lowest first |
//! | 80..82 | `d`, f16 |
//! | 82..84 | `dmin`, f16 |

use kestrel_formats::GgmlType;

use super::steps::{Parts, Shape, Steps, stored};
use super::{Format, Group, expand, f16_at, for_each_block, groups, put_f16};
use crate::scale_search::affine::Search;
use crate::scale_search::{ErrorWeight, Tile, limit, low_byte, round};

/// Weights in a block.
pub const LEN: usize = 256;
/// Bytes of a block.
pub const BYTES: usize = 84;
/// Weights in a sub-block.
pub const SUB: usize = 16;
/// Offset of the scales and mins.
pub const SCALES: usize = 0;
/// Offset of the codes.
pub const QS: usize = 16;
/// Offset of `d`.
pub const D: usize = 80;
/// Offset of `dmin`.
pub const DMIN: usize = 82;

/// Scale and min of sub-block `j` (0..16).
pub fn scale_min(block: &[u8; BYTES], j: usize) -> (u8, u8) {
    let byte = block[SCALES + j];
    (byte & 15, byte >> 4)
}

/// Two-bit fields of 64 bytes in row order, for Q2_K and Q3_K.
#[inline(always)]
pub(super) fn two_bits(qs: &[u8; 64]) -> [u8; LEN] {
    std::array::from_fn(|i| qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3)
}

/// The inverse of [`two_bits`]; only the low two bits of each code count.
#[inline(always)]
pub(super) fn pack_two_bits(codes: &[u8; LEN]) -> [u8; 64] {
    std::array::from_fn(|i| {
        let at = i / 32 * 128 + i % 32;
        (0..4).fold(0, |byte, k| byte | (codes[at + 32 * k] & 3) << (2 * k))
    })
}

/// The codes in row order.
pub fn codes(block: &[u8; BYTES]) -> [i8; LEN] {
    two_bits(block[QS..].first_chunk().expect("64 bytes")).map(|c| c as i8)
}

/// The codec of Q2_K.
pub struct Q2K;

impl Format for Q2K {
    const TYPE: GgmlType = GgmlType::Q2K;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        const PLAIN: Search = Search { n_max: 3.0, first: -0.5, step: 0.1, n: 16, min_not_negative: true };
        const WEIGHTED: Search = Search { first: -0.9, step: 0.05, n: 37, ..PLAIN };
        let (search, weight) = match importance {
            Some(_) => (&WEIGHTED, ErrorWeight::Importance(1.0)),
            None => (&PLAIN, ErrorWeight::Abs(0.25)),
        };
        let mut tile = Tile::<SUB, { LEN / SUB }, L>::EMPTY;
        for Group { x, importance, out } in groups::<LEN, BYTES, L>(src, importance, dst) {
            tile.load(x, importance, weight);
            let fitted = tile.affine_blocks(search, 15.0);
            let codes = fitted.codes::<SUB, LEN>(x, search.n_max);
            for (l, (out, codes)) in out.iter_mut().zip(&codes).enumerate() {
                for (byte, (sc, m)) in out[SCALES..QS].iter_mut().zip(fitted.sc.iter().zip(&fitted.m)) {
                    *byte = sc[l] as u8 | (m[l] as u8) << 4;
                }
                out[QS..D].copy_from_slice(&pack_two_bits(codes));
                put_f16(out, D, fitted.d[l]);
                put_f16(out, DMIN, fitted.dmin[l]);
            }
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; BYTES], out| {
            let (d, dmin) = (f16_at(b, D), f16_at(b, DMIN));
            let scale = |j| {
                let (sc, m) = scale_min(b, j);
                (d * f32::from(sc), dmin * f32::from(m))
            };
            expand::<SUB, LEN>(&codes(b), scale, out);
        });
    }
}

impl Steps for Q2K {
    const SHAPE: Shape = Shape { sub_len: SUB, sc: Some((0.0, 15.0)), m: Some((0.0, 15.0)) };

    fn parts(block: &[u8]) -> Parts {
        let block = block.first_chunk().expect("a block");
        let mut parts = Parts::new(f16_at(block, D), f16_at(block, DMIN));
        for j in 0..LEN / SUB {
            let (sc, m) = scale_min(block, j);
            (parts.sc[j], parts.m[j]) = (f32::from(sc), f32::from(m));
        }
        parts
    }

    fn nearest(t: f32) -> f32 {
        limit(round(t), 0.0, 3.0)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        for (byte, (sc, m)) in block[SCALES..QS].iter_mut().zip(parts.sc.iter().zip(&parts.m)) {
            *byte = *sc as u8 | (*m as u8) << 4;
        }
        block[QS..D].copy_from_slice(&pack_two_bits(&stored(numbers, low_byte)));
        put_f16(block, D, parts.d);
        put_f16(block, DMIN, parts.dmin);
    }
}
