//! IQ4_NL and IQ4_XS: 4-bit codes that stand for the unevenly spaced numbers of [`VALUES`].
//!
//! IQ4_NL has blocks of 32 weights, `weight = d * VALUES[code]`:
//!
//! | bytes | content |
//! |---|---|
//! | 0..2 | `d`, f16 |
//! | 2..18 | codes, nibbles as in Q4_0 |
//!
//! IQ4_XS has 256 weights in 8 sub-blocks of 32, `weight = d * scale * VALUES[code]`:
//!
//! | bytes | content |
//! |---|---|
//! | 0..2 | `d`, f16 |
//! | 2..4 | upper two bits of the scales, u16: bits 2 j of sub-block j |
//! | 4..8 | low four bits of the scales, nibbles, low first; a scale has 32 added |
//! | 8..136 | codes: sixteen bytes per sub-block, nibbles as in Q4_0 |

use kestrel_formats::GgmlType;

use super::q4::{nibbles, pack_nibbles};
use super::steps::{Parts, Shape, Steps, stored, whole};
use super::{Format, Group, expand, f16_at, for_each_block, groups, put_f16};
use crate::scale_search::grid::{Grid, Iq4, iq4_index};
use crate::scale_search::{ErrorWeight, Tile, signed};

pub use crate::scale_search::grid::IQ4_VALUES as VALUES;

/// Weights in an IQ4_NL block and in a sub-block of IQ4_XS.
pub const SUB: usize = 32;
/// Bytes of an IQ4_NL block.
pub const NL_BYTES: usize = 18;
/// Offset of the codes in IQ4_NL.
pub const NL_QS: usize = 2;
/// Weights in an IQ4_XS block.
pub const XS_LEN: usize = 256;
/// Bytes of an IQ4_XS block.
pub const XS_BYTES: usize = 136;
/// Offset of the upper bits of the scales in IQ4_XS.
pub const XS_SCALES_H: usize = 2;
/// Offset of the low bits of the scales in IQ4_XS.
pub const XS_SCALES_L: usize = 4;
/// Offset of the codes in IQ4_XS.
pub const XS_QS: usize = 8;
/// Offset of `d` in both.
pub const D: usize = 0;

const SEARCH: signed::Search = signed::Search { step: 1.0, n: 7 };

/// The values of an IQ4_NL block in row order.
pub fn nl_codes(block: &[u8; NL_BYTES]) -> [i8; SUB] {
    nibbles(block[NL_QS..].first_chunk().expect("16 bytes")).map(|c| VALUES[usize::from(c)])
}

/// The values of an IQ4_XS block in row order.
pub fn xs_codes(block: &[u8; XS_BYTES]) -> [i8; XS_LEN] {
    std::array::from_fn(|i| {
        let byte = block[XS_QS + i / 32 * 16 + i % 16];
        VALUES[usize::from(if i % 32 < 16 { byte & 15 } else { byte >> 4 })]
    })
}

/// Scale of sub-block `j` (0..8) of an IQ4_XS block, sign applied.
pub fn xs_scale(block: &[u8; XS_BYTES], j: usize) -> i8 {
    let low = block[XS_SCALES_L + j / 2] >> (j % 2 * 4) & 15;
    let high = u16::from_le_bytes([block[XS_SCALES_H], block[XS_SCALES_H + 1]]) >> (2 * j) & 3;
    (low | (high as u8) << 4) as i8 - 32
}

/// The inverse of [`xs_scale`].
#[inline(always)]
fn put_xs_scales(sc: &[f32; 8], out: &mut [u8; XS_BYTES]) {
    let sc = sc.map(|sc| (sc + 32.0) as u8);
    let high = sc.iter().enumerate().fold(0u16, |bits, (j, s)| bits | u16::from(s >> 4) << (2 * j));
    out[XS_SCALES_H..XS_SCALES_L].copy_from_slice(&high.to_le_bytes());
    for (j, byte) in out[XS_SCALES_L..XS_QS].iter_mut().enumerate() {
        *byte = (sc[2 * j] & 15) | (sc[2 * j + 1] & 15) << 4;
    }
}

/// Stores the codes of an IQ4_XS block.
#[inline(always)]
fn put_xs_codes(codes: &[u8; XS_LEN], out: &mut [u8; XS_BYTES]) {
    for (sub, qs) in codes.as_chunks::<SUB>().0.iter().zip(out[XS_QS..].as_chunks_mut::<16>().0) {
        *qs = pack_nibbles(sub);
    }
}

/// The codec of IQ4_NL.
pub struct Iq4Nl;
/// The codec of IQ4_XS.
pub struct Iq4Xs;

impl Format for Iq4Nl {
    const TYPE: GgmlType = GgmlType::Iq4Nl;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        let pack = |d: f32, codes: &[u8; SUB], out: &mut [u8; NL_BYTES]| {
            put_f16(out, D, d);
            out[NL_QS..].copy_from_slice(&pack_nibbles(codes));
        };
        signed::quantize_single::<Iq4, SUB, NL_BYTES, L>(src, importance, dst, &SEARCH, iq4_index, pack);
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; NL_BYTES], out| {
            let d = f16_at(b, D);
            expand::<SUB, SUB>(&nl_codes(b), |_| (d, 0.0), out);
        });
    }
}

impl Format for Iq4Xs {
    const TYPE: GgmlType = GgmlType::Iq4Xs;

    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        let weight = match importance {
            Some(_) => ErrorWeight::Importance(2.0),
            None => ErrorWeight::Square,
        };
        let mut tile = Tile::<SUB, { XS_LEN / SUB }, L>::EMPTY;
        for Group { x, importance, out } in groups::<XS_LEN, XS_BYTES, L>(src, importance, dst) {
            tile.load(x, importance, weight);
            let fitted = tile.signed_blocks::<Iq4>(&SEARCH, 32.0);
            let codes = fitted.codes::<Iq4, SUB, XS_LEN>(x, iq4_index);
            for (l, (out, codes)) in out.iter_mut().zip(&codes).enumerate() {
                put_f16(out, D, fitted.d[l]);
                put_xs_scales(&fitted.sc.map(|sc| sc[l]), out);
                put_xs_codes(codes, out);
            }
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; XS_BYTES], out| {
            let d = f16_at(b, D);
            expand::<SUB, XS_LEN>(&xs_codes(b), |j| (d * f32::from(xs_scale(b, j)), 0.0), out);
        });
    }
}

impl Steps for Iq4Nl {
    const SHAPE: Shape = Shape { sub_len: SUB, sc: None, m: None };

    fn parts(block: &[u8]) -> Parts {
        Parts::new(f16_at(block, D), 0.0)
    }

    fn nearest(t: f32) -> f32 {
        Iq4::nearest(t)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        put_f16(block, D, parts.d);
        block[NL_QS..].copy_from_slice(&pack_nibbles(&stored(numbers, iq4_index)));
    }
}

impl Steps for Iq4Xs {
    const SHAPE: Shape = Shape { sub_len: SUB, sc: Some((-32.0, 31.0)), m: None };

    fn parts(block: &[u8]) -> Parts {
        let block = block.first_chunk().expect("a block");
        let mut parts = Parts::new(f16_at(block, D), 0.0);
        parts.sc[..8].iter_mut().enumerate().for_each(|(j, sc)| *sc = f32::from(xs_scale(block, j)));
        parts
    }

    fn nearest(t: f32) -> f32 {
        Iq4::nearest(t)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        let block = whole(block);
        put_f16(block, D, parts.d);
        put_xs_scales(parts.sc.first_chunk().expect("8 of 16"), block);
        put_xs_codes(&stored(numbers, iq4_index), block);
    }
}
