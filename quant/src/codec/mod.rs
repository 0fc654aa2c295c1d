//! The codecs: one file per family of ggml types, and [`codec`] as the only list of them.
//!
//! Each file states the layout of its blocks once, as byte offsets and small functions that take a block apart; the
//! runtime's kernels use those and keep no second copy. Every block type decodes as
//! `weight = scale(sub-block) * code - min(sub-block)`, with codes as signed bytes in the order of the row.
//!
//! Layouts: ggml's public block structures (`ggml-common.h`). The types of bitsandbytes ([`bnb4`], [`bnb8`]) have their
//! scales beside the codes ([`scales`]) and join at [`dequantize`].

pub mod bnb4;
pub mod bnb8;
pub mod iq4;
pub mod plain;
pub mod q2_k;
pub mod q3_k;
pub mod q4;
pub mod q4_k;
pub mod q5;
pub mod q5_k;
pub mod q6_k;
pub mod q8_0;
pub mod scales;
pub mod steps;

use std::marker::PhantomData;

use kestrel_formats::{GgmlType, WeightType};

use scales::Scales;

use crate::isa::{Isa, Work};
use crate::scale_search::Importance;

/// Quantizes and dequantizes rows of one type. `src.len()` is a multiple of the block length and `dst` has exactly
/// the right size; both are asserted at this edge.
pub trait Codec: Sync {
    /// The type in the table.
    fn ggml_type(&self) -> GgmlType;

    /// Quantizes whole blocks. `importance`, if given, has one non-negative weight per column (an importance matrix),
    /// and `src` is then whole rows of that many columns. The bytes are the same for every instruction set.
    fn quantize_with(&self, isa: Isa, src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]);

    /// Quantizes whole blocks with the fastest instruction set of this machine.
    fn quantize(&self, src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        self.quantize_with(Isa::best(), src, importance, dst);
    }

    /// Dequantizes whole blocks, bit-exact with ggml.
    fn dequantize(&self, src: &[u8], dst: &mut [f32]);
}

/// What the file of a type implements; [`Codec`] follows. Both functions are `#[inline(always)]`, as [`crate::isa`] asks.
trait Format: Sync {
    /// The type in the table.
    const TYPE: GgmlType;

    /// [`Codec::quantize`], `L` blocks side by side where that helps.
    fn quantize<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]);

    /// [`Codec::dequantize`].
    fn dequantize(src: &[u8], dst: &mut [f32]);
}

impl<F: Format> Codec for F {
    fn ggml_type(&self) -> GgmlType {
        F::TYPE
    }

    fn quantize_with(&self, isa: Isa, src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
        isa.run(Quantize { format: PhantomData::<F>, src, importance, dst });
    }

    fn dequantize(&self, src: &[u8], dst: &mut [f32]) {
        Isa::best().run(Dequantize { format: PhantomData::<F>, src, dst });
    }
}

struct Quantize<'a, F> {
    format: PhantomData<F>,
    src: &'a [f32],
    importance: Option<&'a [f32]>,
    dst: &'a mut [u8],
}

impl<F: Format> Work for Quantize<'_, F> {
    #[inline(always)]
    fn run<const L: usize>(self) {
        F::quantize::<L>(self.src, self.importance, self.dst);
    }
}

struct Dequantize<'a, F> {
    format: PhantomData<F>,
    src: &'a [u8],
    dst: &'a mut [f32],
}

impl<F: Format> Work for Dequantize<'_, F> {
    #[inline(always)]
    fn run<const L: usize>(self) {
        F::dequantize(self.src, self.dst);
    }
}

/// The codec of a type.
pub fn codec(ty: GgmlType) -> &'static dyn Codec {
    match ty {
        GgmlType::F32 => &plain::F32,
        GgmlType::F16 => &plain::F16,
        GgmlType::Bf16 => &plain::Bf16,
        GgmlType::Q8_0 => &q8_0::Q8_0,
        GgmlType::Q4_0 => &q4::Q4_0,
        GgmlType::Q4_1 => &q4::Q4_1,
        GgmlType::Q5_0 => &q5::Q5_0,
        GgmlType::Q5_1 => &q5::Q5_1,
        GgmlType::Q2K => &q2_k::Q2K,
        GgmlType::Q3K => &q3_k::Q3K,
        GgmlType::Q4K => &q4_k::Q4K,
        GgmlType::Q5K => &q5_k::Q5K,
        GgmlType::Q6K => &q6_k::Q6K,
        GgmlType::Iq4Nl => &iq4::Iq4Nl,
        GgmlType::Iq4Xs => &iq4::Iq4Xs,
    }
}

/// Dequantizes weights `first..first + out.len()` of a matrix of any type, whole blocks of it; `bytes` begins with
/// theirs. `scales` are the whole matrix's, of a type that has them beside its codes.
pub fn dequantize(ty: WeightType, bytes: &[u8], first: usize, scales: Option<&Scales<'_>>, out: &mut [f32]) {
    match (ty, scales) {
        (WeightType::Ggml(ty), _) => codec(ty).dequantize(bytes, out),
        (WeightType::Nf4 | WeightType::Fp4, Some(scales)) => bnb4::dequantize(ty, bytes, first, scales, out),
        (WeightType::Int8, Some(scales)) => bnb8::dequantize(bytes, first, scales, out),
        (_, None) => panic!("{ty} without scales"),
    }
}

/// Bits of the nearest f16, ties to even. A NaN becomes the quiet NaN of its sign, as in ggml.
#[inline(always)]
pub fn f16_bits(x: f32) -> u16 {
    const SMALLEST_NORMAL: f32 = 1.0 / 16384.0;
    const INFINITY: u32 = 0x7c00;
    let (bits, magnitude) = (x.to_bits(), x.abs());
    // The exponents differ by 112; half a unit in the last place less one, and one more if the last bit kept is odd.
    let rounded = magnitude.to_bits().wrapping_add(0xfff + (bits >> 13 & 1));
    let normal = (rounded >> 13).wrapping_sub(112 << 10);
    // The last place of the numbers from 1/2 to 1 is 2^-24, that of the subnormal f16.
    let subnormal = (magnitude + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < SMALLEST_NORMAL { subnormal } else { normal.min(INFINITY) };
    let all = if x.is_nan() { 0x7e00 } else { finite };
    (all | bits >> 16 & 0x8000) as u16
}

/// `f16_to_f32(f16_bits(x))` in fewer steps, all of them f32 and u32, so that lanes stay as wide as they are.
#[inline(always)]
pub fn round_f16(x: f32) -> f32 {
    const SMALLEST_NORMAL: f32 = 1.0 / 16384.0;
    const LARGEST: f32 = 65504.0;
    let magnitude = x.abs();
    let bits = magnitude.to_bits();
    let normal = f32::from_bits(bits.wrapping_add(0xfff + (bits >> 13 & 1)) & !0x1fff);
    let subnormal = (magnitude + 0.5) - 0.5;
    let rounded = if magnitude < SMALLEST_NORMAL { subnormal } else { normal };
    let rounded = if rounded > LARGEST { f32::INFINITY } else { rounded };
    let rounded = if magnitude.is_nan() { f32::NAN } else { rounded };
    f32::from_bits(rounded.to_bits() | x.to_bits() & 0x8000_0000)
}

/// The f32 of an f16's bits. A NaN becomes a quiet one.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    const EXPONENT: u32 = 0x7c00;
    let (sign, magnitude) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
    // The exponents differ by 112. The product is exact, of the subnormal numbers too.
    let finite = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    let special =
        if magnitude > EXPONENT { f32::NAN.to_bits() | magnitude << 13 } else { f32::INFINITY.to_bits() };
    f32::from_bits(sign | if magnitude < EXPONENT { finite.to_bits() } else { special })
}

/// The f16 at `offset` of a block.
pub fn f16_at(block: &[u8], offset: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[offset], block[offset + 1]]))
}

/// Stores the nearest f16 at `offset` of a block.
#[inline(always)]
fn put_f16(block: &mut [u8], offset: usize, x: f32) {
    block[offset..offset + 2].copy_from_slice(&f16_bits(x).to_le_bytes());
}

/// Cuts `src` and `dst` into blocks of `BYTES` and `LEN` and calls `f` on each pair.
#[inline(always)]
fn for_each_block<const BYTES: usize, const LEN: usize>(
    src: &[u8],
    dst: &mut [f32],
    f: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (blocks, bytes_left) = src.as_chunks::<BYTES>();
    let (outs, floats_left) = dst.as_chunks_mut::<LEN>();
    assert!(bytes_left.is_empty() && floats_left.is_empty() && blocks.len() == outs.len(), "whole blocks");
    for (block, out) in blocks.iter().zip(outs) {
        f(block, out);
    }
}

/// Writes `scale * code - min` for one block whose sub-blocks have `SUB` weights each.
#[inline(always)]
fn expand<const SUB: usize, const LEN: usize>(
    codes: &[i8; LEN],
    scale_min: impl Fn(usize) -> (f32, f32),
    out: &mut [f32; LEN],
) {
    let (codes, _) = codes.as_chunks::<SUB>();
    let (outs, _) = out.as_chunks_mut::<SUB>();
    for (j, (codes, out)) in codes.iter().zip(outs).enumerate() {
        let (scale, min) = scale_min(j);
        for (&c, o) in codes.iter().zip(out) {
            *o = scale * f32::from(c) - min;
        }
    }
}

/// The largest of `value(x)`, which must not be below `least`; NaN does not count. Sixteen lanes have a maximum each, for
/// which the order does not matter, except that of zeros of both signs either may be returned.
#[inline(always)]
fn largest<const LEN: usize>(x: &[f32; LEN], least: f32, value: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [least; 16];
    for x in x.as_chunks::<16>().0 {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = larger(*lane, value(*x));
        }
    }
    let [largest] = fold::<2, 1>(&fold::<4, 2>(&fold::<8, 4>(&fold::<16, 8>(&lanes))));
    largest
}

/// The larger of lanes `l` and `HALF + l`. (In a loop over the halves their numbers would be none that the compiler knows.)
#[inline(always)]
fn fold<const N: usize, const HALF: usize>(lanes: &[f32; N]) -> [f32; HALF] {
    let mut out = [0.0; HALF];
    for l in 0..HALF {
        out[l] = larger(lanes[l], lanes[HALF + l]);
    }
    out
}

/// The larger number; NaN as a second one does not count.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Pairs of a block of weights and the bytes that it becomes.
#[inline(always)]
fn blocks<'a, const LEN: usize, const BYTES: usize>(
    src: &'a [f32],
    dst: &'a mut [u8],
) -> impl Iterator<Item = (&'a [f32; LEN], &'a mut [u8; BYTES])> {
    let (blocks, floats_left) = src.as_chunks::<LEN>();
    let (outs, bytes_left) = dst.as_chunks_mut::<BYTES>();
    assert!(bytes_left.is_empty() && floats_left.is_empty() && blocks.len() == outs.len(), "whole blocks");
    blocks.iter().zip(outs)
}

/// Up to `L` blocks that are quantized side by side.
pub(crate) struct Group<'a, const LEN: usize, const BYTES: usize> {
    pub x: &'a [[f32; LEN]],
    pub importance: Option<Importance<'a, LEN>>,
    pub out: &'a mut [[u8; BYTES]],
}

/// Cuts whole rows into groups.
#[inline(always)]
pub(crate) fn groups<'a, const LEN: usize, const BYTES: usize, const L: usize>(
    src: &'a [f32],
    importance: Option<&'a [f32]>,
    dst: &'a mut [u8],
) -> impl Iterator<Item = Group<'a, LEN, BYTES>> {
    let (blocks, floats_left) = src.as_chunks::<LEN>();
    let (outs, bytes_left) = dst.as_chunks_mut::<BYTES>();
    assert!(bytes_left.is_empty() && floats_left.is_empty() && blocks.len() == outs.len(), "whole blocks");
    let row = importance.map(|w| w.as_chunks::<LEN>().0);
    assert!(row.is_none_or(|row| blocks.len().is_multiple_of(row.len())), "one importance weight per column");
    blocks.chunks(L).zip(outs.chunks_mut(L)).enumerate().map(move |(i, (x, out))| Group {
        x,
        importance: row.map(|row| Importance { row, first: i * L }),
        out,
    })
}
