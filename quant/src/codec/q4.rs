//! Q4_0 and Q4_1: 32 weights, 4-bit codes and one scale; Q4_1 also has an offset.
//!
//! | Q4_0 | Q4_1 | content |
//! |---|---|---|
//! | 0..2 | 0..2 | `d`, f16 |
//! | | 2..4 | `m`, f16 |
//! | 2..18 | 4..20 | codes: byte i has weight i in its low nibble and weight i + 16 in its high nibble |
//!
//! Q4_0: `weight = d * (code - 8)`. Q4_1: `weight = d * code + m`.

use kestrel_formats::GgmlType;

use super::steps::{Parts, Shape, Steps, stored};
use super::{Format, blocks, expand, f16_at, for_each_block, largest, put_f16};
use crate::scale_search::grid::Grid;
use crate::scale_search::{affine, grid, limit, low_byte, round, signed};

/// Weights in a block.
pub const LEN: usize = 32;
/// Bytes of a Q4_0 block.
pub const Q4_0_BYTES: usize = 18;
/// Bytes of a Q4_1 block.
pub const Q4_1_BYTES: usize = 20;
/// Offset of `d` in both.
pub const D: usize = 0;
/// Offset of `m` in Q4_1.
pub const M: usize = 2;
/// Offset of the codes in Q4_0.
pub const Q4_0_QS: usize = 2;
/// Offset of the codes in Q4_1.
pub const Q4_1_QS: usize = 4;
/// What Q4_0 adds to a code to store it without sign.
pub const Q4_0_BIAS: u8 = 8;

/// Nibbles of 16 bytes in row order: the low ones, then the high ones.
#[inline(always)]
pub fn nibbles(qs: &[u8; 16]) -> [u8; LEN] {
    std::array::from_fn(|i| if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 })
}

/// The inverse of [`nibbles`].
#[inline(always)]
pub fn pack_nibbles(codes: &[u8; LEN]) -> [u8; 16] {
    std::array::from_fn(|i| codes[i] | codes[i + 16] << 4)
}

/// The codes of Q4_0 in row order, sign applied.
pub fn q4_0_codes(block: &[u8; Q4_0_BYTES]) -> [i8; LEN] {
    nibbles(tail(block)).map(|c| c as i8 - Q4_0_BIAS as i8)
}

/// The codes of Q4_1 in row order.
pub fn q4_1_codes(block: &[u8; Q4_1_BYTES]) -> [i8; LEN] {
    nibbles(tail(block)).map(|c| c as i8)
}

/// The last `N` bytes of a block.
pub(super) fn tail<const N: usize>(block: &[u8]) -> &[u8; N] {
    block.last_chunk().expect("a block is longer than its codes")
}

/// The codec of Q4_0.
pub struct Q4_0;
/// The codec of Q4_1.
pub struct Q4_1;

impl Format for Q4_0 {
    const TYPE: GgmlType = GgmlType::Q4_0;

    /// Byte-identical to ggml without importance.
    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        let pack = |d: f32, codes: &[u8; LEN], out: &mut [u8; Q4_0_BYTES]| {
            put_f16(out, D, d);
            out[Q4_0_QS..].copy_from_slice(&pack_nibbles(codes));
        };
        match importance {
            None => {
                for (x, out) in blocks(src, dst) {
                    let (d, codes) = round_signed(x, 8.0);
                    pack(d, &codes, out);
                }
            }
            Some(w) => signed::quantize_single::<grid::Integers<8>, LEN, Q4_0_BYTES, L>(
                src,
                Some(w),
                dst,
                &SIGNED_SEARCH,
                |g| low_byte(g + f32::from(Q4_0_BIAS)),
                pack,
            ),
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; Q4_0_BYTES], out| {
            let d = f16_at(b, D);
            expand::<LEN, LEN>(&q4_0_codes(b), |_| (d, 0.0), out);
        });
    }
}

impl Format for Q4_1 {
    const TYPE: GgmlType = GgmlType::Q4_1;

    /// Byte-identical to ggml without importance.
    #[inline(always)]
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        let pack = |d: f32, m: f32, codes: &[u8; LEN], out: &mut [u8; Q4_1_BYTES]| {
            put_f16(out, D, d);
            put_f16(out, M, m);
            out[Q4_1_QS..].copy_from_slice(&pack_nibbles(codes));
        };
        match importance {
            None => {
                for (x, out) in blocks(src, dst) {
                    let (d, m, codes) = round_affine(x, 15.0);
                    pack(d, m, &codes, out);
                }
            }
            Some(w) => {
                let search = affine::Search { n_max: 15.0, ..AFFINE_SEARCH };
                affine::quantize_single::<LEN, Q4_1_BYTES, L>(src, w, dst, &search, pack);
            }
        }
    }

    #[inline(always)]
    fn dequantize(src: &[u8], dst: &mut [f32]) {
        for_each_block(src, dst, |b: &[u8; Q4_1_BYTES], out| {
            let (d, m) = (f16_at(b, D), f16_at(b, M));
            expand::<LEN, LEN>(&q4_1_codes(b), |_| (d, -m), out);
        });
    }
}

impl Steps for Q4_0 {
    const SHAPE: Shape = Shape { sub_len: LEN, sc: None, m: None };

    fn parts(block: &[u8]) -> Parts {
        Parts::new(f16_at(block, D), 0.0)
    }

    fn nearest(t: f32) -> f32 {
        grid::Integers::<8>::nearest(t)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        put_f16(block, D, parts.d);
        let codes = stored(numbers, |g| low_byte(g + f32::from(Q4_0_BIAS)));
        block[Q4_0_QS..].copy_from_slice(&pack_nibbles(&codes));
    }
}

impl Steps for Q4_1 {
    const SHAPE: Shape = Shape { sub_len: LEN, sc: None, m: None };

    fn parts(block: &[u8]) -> Parts {
        Parts::new(f16_at(block, D), -f16_at(block, M))
    }

    fn nearest(t: f32) -> f32 {
        limit(round(t), 0.0, 15.0)
    }

    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]) {
        put_f16(block, D, parts.d);
        put_f16(block, M, -parts.dmin);
        block[Q4_1_QS..].copy_from_slice(&pack_nibbles(&stored(numbers, low_byte)));
    }
}

/// What the importance-weighted quantizers of Q4_0 and Q5_0 try.
pub(super) const SIGNED_SEARCH: signed::Search = signed::Search { step: 0.1, n: 9 };

/// What the importance-weighted quantizers of Q4_1 and Q5_1 try; `n_max` is the type's.
pub(super) const AFFINE_SEARCH: affine::Search =
    affine::Search { n_max: 0.0, first: -0.9, step: 0.05, n: 37, min_not_negative: false };

/// ggml's rounding for Q4_0 and Q5_0: the (first) weight of the largest magnitude becomes the code `-half` exactly. The
/// codes returned have `half` added.
#[inline(always)]
pub(super) fn round_signed(x: &[f32; LEN], half: f32) -> (f32, [u8; LEN]) {
    // One maximum and its sign: two, of the numbers and of their opposites, the compiler would take as pairs.
    let magnitude = largest(x, 0.0, f32::abs);
    let has = |peak: f32| x.iter().fold(false, |any, v| any | (*v == peak));
    let peak = match (has(magnitude), has(-magnitude)) {
        (true, false) => magnitude,
        (false, true) => -magnitude,
        _ => x.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m }),
    };
    let d = peak / -half;
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    (d, codes(x, |v| v * inverse + (half + 0.5), 2.0 * half - 1.0))
}

/// ggml's rounding for Q4_1 and Q5_1: the smallest weight becomes code 0, the largest `n_max`. Returns d, m, codes.
#[inline(always)]
pub(super) fn round_affine(x: &[f32; LEN], n_max: f32) -> (f32, f32, [u8; LEN]) {
    let lo = -largest(x, f32::MIN, |v| -v);
    let hi = largest(x, f32::MIN, |v| v);
    // Of zeros of both signs the first counts.
    let lo = if lo == 0.0 { x.iter().find(|v| **v == 0.0).copied().unwrap_or(lo) } else { lo };
    let hi = if hi == lo { lo } else { hi };
    let d = (hi - lo) / n_max;
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    (d, lo, codes(x, |v| (v - lo) * inverse + 0.5, n_max))
}

/// The integer part of `code` of each weight, limited to `0..=top`; 0 for NaN.
#[inline(always)]
fn codes(x: &[f32; LEN], code: impl Fn(f32) -> f32, top: f32) -> [u8; LEN] {
    let mut codes = [0; LEN];
    for (c, v) in codes.iter_mut().zip(x) {
        let t = code(*v);
        let nearest = round(t);
        let floor = if nearest > t { nearest - 1.0 } else { nearest };
        let floor = if floor > 0.0 { floor } else { 0.0 };
        *c = low_byte(if floor < top { floor } else { top });
    }
    codes
}
