//! Q4_K: 256 weights in 8 sub-blocks of 32, `weight = d * scale * code - dmin * min`.
//!
//! | bytes | content |
//! |---|---|
//! | 0..2 | `d`, f16 |
//! | 2..4 | `dmin`, f16 |
//! | 4..16 | eight 6-bit scales and eight 6-bit mins, see [`scale_min`] |
//! | 16..144 | codes: each 32 bytes hold one sub-block in the low and the next in the high nibbles |

use kestrel_formats::GgmlType;

use super::steps::{Parts, Shape, Steps, stored, whole};
use super::{Format, Group, expand, f16_at, for_each_block, groups, put_f16};
use crate::scale_search::affine::{Blocks, Search};
use crate::scale_search::{Codes, ErrorWeight, Importance, Tile, limit, low_byte, round};

/// Weights in a block.
pub const LEN: usize = 256;
/// Bytes of a block.
pub const BYTES: usize = 144;
/// Weights in a sub-block.
pub const SUB: usize = 32;
/// Offset of `d`.
pub const D: usize = 0;
/// Offset of `dmin`.
pub const DMIN: usize = 2;
/// Offset of the packed scales and mins.
pub const SCALES: usize = 4;
/// Offset of the codes.
pub const QS: usize = 16;

/// Scale and min of sub-block `j` (0..8) from the 12 packed bytes, shared with Q5_K: those of the first four are the
/// low six bits of bytes j and j + 4; of the others, byte j + 4 has the low four bits of both, and the upper two are the
/// upper two bits of bytes j - 4 and j.
pub fn scale_min(scales: &[u8; 12], j: usize) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let low = scales[j + 4];
        ((low & 15) | (scales[j - 4] >> 6) << 4, (low >> 4) | (scales[j] >> 6) << 4)
    }
}

/// The inverse of [`scale_min`].
#[inline(always)]
pub fn pack_scale_min(sc: &[u8; 8], m: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..4 => sc[i] | (sc[i + 4] >> 4) << 6,
        4..8 => m[i - 4] | (m[i] >> 4) << 6,
        _ => (sc[i - 4] & 15) | (m[i - 4] & 15) << 4,
    })
}

/// The 12 packed bytes of a block.
pub fn packed_scales(block: &[u8; BYTES]) -> &[u8; 12] {
    block[SCALES..].first_chunk().expect("12 bytes")
}

/// The codes in row order.
pub fn codes(block: &[u8; BYTES]) -> [i8; LEN] {
    std::array::from_fn(|i| {
        let byte = block[QS + i / 64 * 32 + i % 32];
        (if i % 64 < 32 { byte & 15 } else { byte >> 4 }) as i8
    })
}

/// Stores the codes.
#[inline(always)]
fn put_codes(codes: &[u8; LEN], out: &mut [u8; BYTES]) {
    for (bytes, codes) in out[QS..].as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks::<64>().0) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = codes[i] | codes[i + 32] << 4;
        }
    }
}

/// The codec of Q4_K.
pub struct Q4K;

impl Format for Q4K {
    const TYPE: GgmlType = GgmlType::Q4K;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        const PLAIN: Search = Search { n_max: 15.0, first: -1.0, step: 0.1, n: 21, min_not_negative: true };
        const WEIGHTED: Search = Search { first: -0.9, step: 0.05, n: 37, ..PLAIN };
        let search = if importance.is_some() { &WEIGHTED } else { &PLAIN };
        let mut tile = Tile::EMPTY;
        for Group { x, importance, out } in groups::<LEN, BYTES, L>(src, importance, dst) {
            let (fitted, codes) = fit_blocks::<L>(&mut tile, x, importance, search);
            for (l, (out, codes)) in out.iter_mut().zip(&codes).enumerate() {
                out[..QS].copy_from_slice(&pack_head(&fitted, l));
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

/// Scale and minimum of each sub-block of a Q4_K or Q5_K block.
pub(super) fn sub_scales(packed: &[u8; 12], d: f32, dmin: f32) -> impl Fn(usize) -> (f32, f32) {
    move |j| {
        let (sc, m) = scale_min(packed, j);
        (d * f32::from(sc), dmin * f32::from(m))
    }
}

/// Fits the scales and codes of Q4_K or Q5_K blocks, with ggml's error weights.
#[inline(always)]
pub(super) fn fit_blocks<const L: usize>(
    tile: &mut Tile<SUB, 8, L>,
    x: &[[f32; LEN]],
    importance: Option<Importance<LEN>>,
    search: &Search,
) -> (Blocks<8, L>, Codes<LEN, L>) {
    let weight = match importance {
        Some(_) => ErrorWeight::Importance(2.0),
        None => ErrorWeight::Abs(1.0),
    };
    tile.load(x, importance, weight);
    let fitted = tile.affine_blocks(search, 63.0);
    let codes = fitted.codes::<SUB, LEN>(x, search.n_max);
    (fitted, codes)
}

/// The first 16 bytes of the Q4_K or Q5_K block in lane l.
#[inline(always)]
pub(super) fn pack_head<const L: usize>(fitted: &Blocks<8, L>, l: usize) -> [u8; QS] {
    let (sc, m) = (fitted.sc.map(|sc| sc[l] as u8), fitted.m.map(|m| m[l] as u8));
    head(fitted.d[l], fitted.dmin[l], &sc, &m)
}

#[inline(always)]
fn head(d: f32, dmin: f32, sc: &[u8; 8], m: &[u8; 8]) -> [u8; QS] {
    let mut head = [0; QS];
    put_f16(&mut head, D, d);
    put_f16(&mut head, DMIN, dmin);
    head[SCALES..].copy_from_slice(&pack_scale_min(sc, m));
    head
}

/// The scales of a Q4_K or Q5_K block.
pub(super) fn parts(block: &[u8]) -> Parts {
    let packed = block[SCALES..].first_chunk().expect("12 bytes");
    let mut parts = Parts::new(f16_at(block, D), f16_at(block, DMIN));
    for j in 0..8 {
        let (sc, m) = scale_min(packed, j);
        (parts.sc[j], parts.m[j]) = (f32::from(sc), f32::from(m));
    }
    parts
}

/// The inverse of [`parts`]: the first bytes of a block.
pub(super) fn parts_head(parts: &Parts) -> [u8; QS] {
    let byte = |x: f32| x as u8;
    let (sc, m) = (std::array::from_fn(|j| byte(parts.sc[j])), std::array::from_fn(|j| byte(parts.m[j])));
    head(parts.d, parts.dmin, &sc, &m)
}

impl Steps for Q4K {
    const SHAPE: Shape = Shape { sub_len: SUB, sc: Some((0.0, 63.0)), m: Some((0.0, 63.0)) };

    fn parts(block: &[u8]) -> Parts {
        parts(block)
    }

    fn nearest(t: f32) -> f32 {
        limit(round(t), 0.0, 15.0)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        let block = whole(block);
        block[..QS].copy_from_slice(&parts_head(parts));
        put_codes(&stored(numbers, low_byte), block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_scales_come_back() {
        let sc = std::array::from_fn(|i| (i * 23 % 64) as u8);
        let m = std::array::from_fn(|i| (i * 41 + 7) as u8 % 64);
        let packed = pack_scale_min(&sc, &m);
        for j in 0..8 {
            assert_eq!(scale_min(&packed, j), (sc[j], m[j]));
        }
    }
}
