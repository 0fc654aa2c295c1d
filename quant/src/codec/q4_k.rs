//! Q4_K: 256 weights in 8 sub-blocks of 32, `weight = d * scale * code - dmin * min`.
//!
//! | bytes | content |
//! |---|---|
//! | 0..2 | `d`, f16 |
//! | 2..4 | `dmin`, f16 |
//! | 4..16 | eight 6-bit scales and eight 6-bit mins, see [`scale_min`] |
//! | 16..144 | codes: each 32 bytes hold one sub-block in the low and the next in the high nibbles |

use kestrel_formats::GgmlType;

use super::{Codec, expand, f16_at, for_each_block, put_f16, quantize_blocks};
use crate::scale_search::affine::{Block, Search};
use crate::scale_search::{ErrorWeight, Tile, mean_square};

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

/// The codec of Q4_K.
pub struct Q4K;

impl Codec for Q4K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q4K
    }

    fn quantize(&self, src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        const PLAIN: Search = Search { n_max: 15.0, first: -1.0, step: 0.1, n: 21, min_not_negative: true };
        const WEIGHTED: Search = Search { first: -0.9, step: 0.05, n: 37, ..PLAIN };
        quantize_blocks(src, importance, dst, |x: &[f32; LEN], w, out: &mut [u8; BYTES]| {
            let search = if w.is_some() { &WEIGHTED } else { &PLAIN };
            let (block, codes) = fit_block(x, w, search);
            out[..QS].copy_from_slice(&pack_head(&block));
            for (i, byte) in out[QS..].iter_mut().enumerate() {
                let at = i / 32 * 64 + i % 32;
                *byte = codes[at] | codes[at + 32] << 4;
            }
        });
    }

    fn dequantize(&self, src: &[u8], dst: &mut [f32]) {
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

/// Fits the scales and codes of a Q4_K or Q5_K block, with ggml's error weights.
pub(super) fn fit_block(
    x: &[f32; LEN],
    importance: Option<&[f32; LEN]>,
    search: &Search,
) -> (Block<8>, [u8; LEN]) {
    let weight = match importance {
        Some(w) => ErrorWeight::Importance(w, 2.0 * mean_square(x)),
        None => ErrorWeight::Abs(1.0),
    };
    let tile = Tile::<SUB, 8>::new(x, weight);
    let block = tile.affine_block(search, 63.0);
    let mut codes = [0; LEN];
    tile.affine_codes(&block.fit(), search.n_max, &mut codes);
    (block, codes)
}

/// The first 16 bytes of a Q4_K or Q5_K block.
pub(super) fn pack_head(block: &Block<8>) -> [u8; QS] {
    let mut head = [0; QS];
    put_f16(&mut head, D, block.d);
    put_f16(&mut head, DMIN, block.dmin);
    head[SCALES..].copy_from_slice(&pack_scale_min(&block.sc.map(|v| v as u8), &block.m.map(|v| v as u8)));
    head
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
