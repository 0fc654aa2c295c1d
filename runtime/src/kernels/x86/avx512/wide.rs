//! Blocks unpacked 64 codes at a time, for [`super::rows`]: four blocks of blocks of 32, or the 64-byte pieces of a block
//! of 256, whose codes keep the order of their bytes.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for pointers to whole blocks and for the instruction set

use crate::kernels::blocks::{Order, order};
use crate::kernels::x86::unpack::{
    self, FourBit, Int8, Iq4Nl, Iq4Xs, Large, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Small,
    f16_four, words_of_four,
};
use kestrel_formats::GgmlType;
use kestrel_quant::codec::{iq4, q2_k, q3_k, q4, q4_k, q5, q5_k, q6_k, q8_0};
use std::arch::x86_64::*;

/// A type with blocks of 32, four blocks at a time.
pub(super) trait Four: Small {
    /// The lower and the upper 16 codes of four blocks, each block in its 128-bit part.
    unsafe fn four(p: &[*const u8; 4]) -> [__m512i; 2];
}

/// The activations of a block of 256 in the order of its codes.
#[derive(Clone, Copy)]
pub(super) struct X {
    pub codes: [__m512i; 4],
    /// What else [`Wide::pairs`] takes.
    pub extra: [__m512i; 4],
}

/// What four blocks' blocks of 256 have besides their codes.
pub(super) struct Head {
    /// The scales of the sub-blocks, block after block, as i16: 8 or 16 each.
    pub scales: [__m512i; 2],
    /// The minimums, likewise.
    pub mins: [__m512i; 2],
    pub d: __m128,
    /// Anything if there are no minimums.
    pub dmin: __m128,
}

impl Head {
    #[inline(always)]
    unsafe fn without_mins(scales: [__m512i; 2], d: __m128) -> Self {
        Self { scales, mins: [_mm512_setzero_si512(); 2], d, dmin: _mm_setzero_ps() }
    }
}

/// A type with blocks of 256.
pub(super) trait Wide: Large {
    const ORDER: Order;
    /// Per vector of codes: where each pair of codes has its scale among the eight that [`Self::eights`] brings to its 128
    /// bits.
    const SCALE_OF: [[u8; 64]; 4] = scale_of(Self::ORDER, Self::SUB);

    /// Whether [`Self::pairs`] takes more than the activations.
    const EXTRA: bool = Self::BIAS != 0;

    /// Four times 64 codes: the fields of each 64 bytes.
    unsafe fn codes64(p: *const u8) -> [__m512i; 4];

    /// The rest of four blocks' blocks.
    unsafe fn head(p: &[*const u8; 4]) -> Head;

    /// The products of 64 codes with activations, summed in pairs; exact.
    #[inline(always)]
    unsafe fn pairs(codes: __m512i, x: __m512i, extra: __m512i) -> __m512i {
        let pairs = _mm512_maddubs_epi16(codes, x); // at most 2·63·127
        if Self::BIAS != 0 { _mm512_sub_epi16(pairs, extra) } else { pairs }
    }

    /// What [`Self::pairs`] takes for 64 activations.
    #[inline(always)]
    unsafe fn prepare(x: __m512i) -> (__m512i, __m512i) {
        match Self::BIAS {
            0 => (x, x),
            bias => (x, _mm512_maddubs_epi16(_mm512_set1_epi8(bias as i8), x)),
        }
    }

    /// The 256 activations at `x`.
    #[inline(always)]
    unsafe fn x(x: *const i8) -> X {
        let order = Self::ORDER;
        let mut prepared = [(_mm512_setzero_si512(), _mm512_setzero_si512()); 4];
        for v in 0..4 {
            let first = order.weight(v, 0);
            prepared[v] = Self::prepare(match order.run {
                64 => load64(x, first),
                32 => {
                    let low = _mm512_castsi256_si512(load32(x, first));
                    _mm512_inserti64x4::<1>(low, load32(x, order.weight(v, 32)))
                }
                // Runs of 16 that alternate between two fields.
                _ if v % 2 == 0 => _mm512_shuffle_i64x2::<0x88>(load64(x, first), load64(x, first + 64)),
                _ => _mm512_shuffle_i64x2::<0xdd>(load64(x, first - 16), load64(x, first + 48)),
            });
        }
        X {
            codes: each!([_mm512_setzero_si512(); 4], v => prepared[v].0),
            extra: each!([_mm512_setzero_si512(); 4], v => prepared[v].1),
        }
    }

    /// The scales of a block, from where they lie in memory: eight in each 128 bits, those that vectors `2 h` and `2 h + 1` of
    /// codes need there.
    #[inline(always)]
    unsafe fn eights(scales: *const i16) -> [__m512i; 2] {
        each!([_mm512_setzero_si512(); 2], h => {
            let at = |byte| Self::ORDER.weight(2 * h, byte) / Self::SUB / 8 * 8;
            let eight = |byte| _mm_loadu_si128(scales.add(at(byte)).cast());
            let lower = _mm512_broadcast_i32x4(eight(0));
            match at(0) == at(32) {
                true => lower,
                false => _mm512_inserti64x4::<1>(lower, _mm256_broadcastsi128_si256(eight(32))),
            }
        })
    }

    /// The scale of each pair of vector `v`.
    #[inline(always)]
    unsafe fn spread_scales(eights: &[__m512i; 2], v: usize) -> __m512i {
        _mm512_shuffle_epi8(eights[v / 2], _mm512_loadu_si512(Self::SCALE_OF[v].as_ptr().cast()))
    }
}

const fn scale_of(order: Order, sub: usize) -> [[u8; 64]; 4] {
    let mut out = [[0; 64]; 4];
    let mut i = 0;
    while i < 256 {
        let (v, byte) = (i / 64, i % 64);
        let scale = order.weight(v, byte) / sub;
        // All of a half of a vector are among the same eight, which are also those of the vector beside it.
        assert!(scale / 8 == order.weight(v / 2 * 2, byte / 32 * 32) / sub / 8);
        out[v][byte] = (2 * (scale % 8) + byte % 2) as u8;
        i += 1;
    }
    out
}

#[inline(always)]
unsafe fn bytes(x: u8) -> __m512i {
    _mm512_set1_epi8(x as i8)
}

/// 16 bytes of each of four blocks.
#[inline(always)]
unsafe fn gather16(p: &[*const u8; 4], at: usize) -> __m512i {
    let load = |i: usize| _mm_loadu_si128(p[i].add(at).cast());
    let x = _mm512_castsi128_si512(load(0));
    let x = _mm512_inserti32x4::<1>(x, load(1));
    let x = _mm512_inserti32x4::<2>(x, load(2));
    _mm512_inserti32x4::<3>(x, load(3))
}

/// The lower and the upper 16 of 32 signed bytes of each of four blocks, with 128 added.
#[inline(always)]
unsafe fn biased32(p: &[*const u8; 4], at: usize) -> [__m512i; 2] {
    let load = |i: usize| _mm256_loadu_si256(p[i].add(at).cast());
    let two = |i| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(load(i)), load(i + 1));
    let (x, y) = (two(0), two(2));
    let halves = [_mm512_shuffle_i64x2::<0x88>(x, y), _mm512_shuffle_i64x2::<0xdd>(x, y)];
    each!([x; 2], h => _mm512_xor_si512(halves[h], bytes(0x80)))
}

/// [`gather16`] of blocks of `BYTES`. If they lie one after the other, what is wanted of three of them is brought together from
/// the first 64 bytes, which hold the blocks' scales besides.
#[inline(always)]
unsafe fn gather16_of<const BYTES: usize, const AT: usize>(p: &[*const u8; 4]) -> __m512i {
    if p[3] != p[0].wrapping_add(3 * BYTES) {
        return gather16(p, AT);
    }
    let places = const { three_of_four(BYTES, AT) };
    let places = _mm512_loadu_si512(places.as_ptr().cast());
    let three = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(p[0].cast()));
    _mm512_inserti32x4::<3>(three, _mm_loadu_si128(p[3].add(AT).cast()))
}

/// Where 16 bytes of each of three blocks are, which 64 bytes must hold.
const fn three_of_four(block_bytes: usize, at: usize) -> [u8; 64] {
    assert!(4 * block_bytes >= 64 && at + 2 * block_bytes + 16 <= 64);
    let mut out = [0; 64];
    let mut i = 0;
    while i < 48 {
        out[i] = (at + i / 16 * block_bytes + i % 16) as u8;
        i += 1;
    }
    out
}

/// The low and the high nibbles.
#[inline(always)]
unsafe fn nibbles(x: __m512i) -> [__m512i; 2] {
    // One instruction in place of a shift and a mask: bit i of a byte is the parity of what byte 7 - i of this has in common
    // with it, so that bits 4 to 7 become bits 0 to 3.
    let high = _mm512_set1_epi64(0x1020_4080_0000_0000);
    [_mm512_and_si512(x, bytes(15)), _mm512_gf2p8affine_epi64_epi8::<0>(x, high)]
}

/// `mask & a | !mask & b`
#[inline(always)]
unsafe fn select(mask: __m512i, a: __m512i, b: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0xca>(mask, a, b)
}

impl Four for Q8_0 {
    #[inline(always)]
    unsafe fn four(p: &[*const u8; 4]) -> [__m512i; 2] {
        biased32(p, q8_0::QS)
    }
}

impl Four for Q4_0 {
    #[inline(always)]
    unsafe fn four(p: &[*const u8; 4]) -> [__m512i; 2] {
        nibbles(gather16_of::<{ Self::BYTES }, { q4::Q4_0_QS }>(p))
    }
}

impl Four for Q4_1 {
    #[inline(always)]
    unsafe fn four(p: &[*const u8; 4]) -> [__m512i; 2] {
        nibbles(gather16_of::<{ Self::BYTES }, { q4::Q4_1_QS }>(p))
    }
}

/// Fifth bits, 32 per row at `at`, added to nibbles.
#[inline(always)]
unsafe fn with_fifth_bits(p: &[*const u8; 4], at: usize, nibbles: [__m512i; 2]) -> [__m512i; 2] {
    let add = |x, mask| _mm512_mask_add_epi8(x, mask, x, bytes(16));
    [add(nibbles[0], words_of_four(p, at)), add(nibbles[1], words_of_four(p, at + 2))]
}

impl Four for Q5_0 {
    #[inline(always)]
    unsafe fn four(p: &[*const u8; 4]) -> [__m512i; 2] {
        with_fifth_bits(p, q5::Q5_0_QH, nibbles(gather16(p, q5::Q5_0_QS)))
    }
}

impl Four for Q5_1 {
    #[inline(always)]
    unsafe fn four(p: &[*const u8; 4]) -> [__m512i; 2] {
        with_fifth_bits(p, q5::Q5_1_QH, nibbles(gather16(p, q5::Q5_1_QS)))
    }
}

impl Four for Iq4Nl {
    #[inline(always)]
    unsafe fn four(p: &[*const u8; 4]) -> [__m512i; 2] {
        let values = _mm512_broadcast_i64x4(unpack::iq4_values());
        let codes = nibbles(gather16_of::<{ Self::BYTES }, { iq4::NL_QS }>(p));
        each!([values; 2], h => _mm512_shuffle_epi8(values, codes[h]))
    }
}

impl<F: FourBit> Four for F {
    #[inline(always)]
    unsafe fn four(p: &[*const u8; 4]) -> [__m512i; 2] {
        // Four times the same, so that the upper two of the six bits that name a place need not be cleared.
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(F::BIASED.as_ptr().cast()));
        // Such blocks lie together. The activations at even places come first, as do the high halves of bytes.
        let low = _mm512_loadu_si512(p[0].cast());
        let high = _mm512_srli_epi16::<4>(low);
        [_mm512_permutexvar_epi8(high, table), _mm512_permutexvar_epi8(low, table)]
    }
}

impl Four for Int8 {
    #[inline(always)]
    unsafe fn four(p: &[*const u8; 4]) -> [__m512i; 2] {
        biased32(p, 0)
    }
}

/// Two words of the first 16 bytes of each of four blocks, as f16.
#[inline(always)]
unsafe fn f16_of_heads(heads: __m512i, first: i16, second: i16) -> (__m128, __m128) {
    let (a, b) = (first, second);
    let which = _mm256_castsi128_si256(_mm_setr_epi16(a, a + 8, a + 16, a + 24, b, b + 8, b + 16, b + 24));
    let words = _mm512_permutexvar_epi16(_mm512_castsi256_si512(which), heads);
    let both = _mm256_cvtph_ps(_mm512_castsi512_si128(words));
    (_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both))
}

/// Four rows of Q4_K or Q5_K, from the first 16 bytes of their blocks.
#[inline(always)]
unsafe fn six_bits(p: &[*const u8; 4]) -> Head {
    const _: () = assert!(q4_k::D == 0 && q4_k::DMIN == 2 && q4_k::SCALES == 4);
    const _: () = assert!(q5_k::D == 0 && q5_k::DMIN == 2 && q5_k::SCALES == 4);
    // A row's dwords are (d, dmin), a, b, c: a and b hold the lower four scales and minimums and the upper two bits of
    // the upper four, whose lower four bits are the nibbles of c.
    let heads = gather16(p, 0);
    let abcc = _mm512_shuffle_epi32::<0b11_11_10_01>(heads);
    let each = |a, b, c, d| _mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
    let low = _mm512_srlv_epi32(abcc, each(0, 0, 0, 4));
    let low = _mm512_and_si512(low, each(0x3f3f_3f3f, 0x3f3f_3f3f, 0x0f0f_0f0f, 0x0f0f_0f0f));
    let upper = _mm512_shuffle_epi32::<0b10_01_11_11>(_mm512_srli_epi32::<2>(heads));
    let all = _mm512_ternarylogic_epi64::<0xf8>(low, upper, each(0, 0, 0x3030_3030, 0x3030_3030)); // a | b & c
    let zero = -1;
    let words = |at: i8| {
        let z = zero;
        _mm_setr_epi8(at, z, at + 1, z, at + 2, z, at + 3, z, at + 8, z, at + 9, z, at + 10, z, at + 11, z)
    };
    let words = |at| _mm512_shuffle_epi8(all, _mm512_broadcast_i32x4(words(at)));
    let (d, dmin) = f16_of_heads(heads, 0, 1);
    Head { scales: [words(0); 2], mins: [words(4); 2], d, dmin }
}

/// The nibbles of the two 64 bytes at `p`.
#[inline(always)]
unsafe fn nibbles128(p: *const u8) -> [__m512i; 4] {
    let [low0, high0] = nibbles(_mm512_loadu_si512(p.cast()));
    let [low1, high1] = nibbles(_mm512_loadu_si512(p.add(64).cast()));
    [low0, high0, low1, high1]
}

/// 32 bytes twice.
#[inline(always)]
unsafe fn twice(p: *const u8) -> __m512i {
    _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast()))
}

/// Qwords of the lower and of the upper half.
#[inline(always)]
unsafe fn halves(low: i64, high: i64) -> __m512i {
    _mm512_setr_epi64(low, low, low, low, high, high, high, high)
}

impl Wide for Q4K {
    const ORDER: Order = order(GgmlType::Q4K);
    #[inline(always)]
    unsafe fn codes64(p: *const u8) -> [__m512i; 4] {
        nibbles128(p.add(q4_k::QS))
    }
    #[inline(always)]
    unsafe fn head(p: &[*const u8; 4]) -> Head {
        six_bits(p)
    }
}

impl Wide for Q5K {
    const ORDER: Order = order(GgmlType::Q5K);
    #[inline(always)]
    unsafe fn codes64(p: *const u8) -> [__m512i; 4] {
        let n = nibbles128(p.add(q5_k::QS));
        // Bit j of the bytes belongs to sub-block j, and becomes bit 4.
        let bits = twice(p.add(q5_k::QH));
        let fifth = [
            _mm512_sllv_epi64(bits, halves(4, 2)),
            _mm512_sllv_epi64(bits, halves(3, 1)),
            _mm512_srlv_epi64(bits, halves(0, 2)),
            _mm512_srlv_epi64(bits, halves(1, 3)),
        ];
        let mut codes = n;
        for v in 0..4 {
            codes[v] = select(bytes(16), fifth[v], n[v]);
        }
        codes
    }
    #[inline(always)]
    unsafe fn head(p: &[*const u8; 4]) -> Head {
        six_bits(p)
    }
}

/// 16 signed bytes of each of four blocks as i16.
#[inline(always)]
unsafe fn widen(x: __m512i) -> [__m512i; 2] {
    [_mm512_cvtepi8_epi16(_mm512_castsi512_si256(x)), _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64::<1>(x))]
}

impl Wide for Q6K {
    const ORDER: Order = order(GgmlType::Q6K);
    #[inline(always)]
    unsafe fn codes64(p: *const u8) -> [__m512i; 4] {
        let n = nibbles128(p.add(q6_k::QL));
        let (a, b) = (twice(p.add(q6_k::QH)), twice(p.add(q6_k::QH + 32)));
        let (left, right) = (halves(4, 2), halves(0, 2));
        let upper = [
            _mm512_sllv_epi64(a, left),
            _mm512_srlv_epi64(a, right),
            _mm512_sllv_epi64(b, left),
            _mm512_srlv_epi64(b, right),
        ];
        let mut codes = n;
        for v in 0..4 {
            codes[v] = select(bytes(0x30), upper[v], n[v]);
        }
        codes
    }
    #[inline(always)]
    unsafe fn head(p: &[*const u8; 4]) -> Head {
        Head::without_mins(widen(gather16(p, q6_k::SCALES)), f16_four(p, q6_k::D))
    }
}

/// The four two-bit fields of the 64 bytes at `p`.
#[inline(always)]
unsafe fn two_bits(p: *const u8) -> [__m512i; 4] {
    let x = _mm512_loadu_si512(p.cast());
    let shifted = [x, _mm512_srli_epi16::<2>(x), _mm512_srli_epi16::<4>(x), _mm512_srli_epi16::<6>(x)];
    each!([x; 4], v => _mm512_and_si512(shifted[v], bytes(3)))
}

impl Wide for Q2K {
    const ORDER: Order = order(GgmlType::Q2K);
    #[inline(always)]
    unsafe fn codes64(p: *const u8) -> [__m512i; 4] {
        two_bits(p.add(q2_k::QS))
    }
    #[inline(always)]
    unsafe fn head(p: &[*const u8; 4]) -> Head {
        let [scales, mins] = nibbles(gather16(p, q2_k::SCALES));
        let (d, dmin) = (f16_four(p, q2_k::D), f16_four(p, q2_k::DMIN));
        Head { scales: widen(scales), mins: widen(mins), d, dmin }
    }
}

impl Wide for Q3K {
    const ORDER: Order = order(GgmlType::Q3K);
    #[inline(always)]
    unsafe fn codes64(p: *const u8) -> [__m512i; 4] {
        let two = two_bits(p.add(q3_k::QS));
        // Bit j of the bytes belongs to weights 32·j.. and becomes bit 2.
        let bits = twice(p.add(q3_k::HMASK));
        let right = |low, high| _mm512_srlv_epi64(bits, halves(low, high));
        let third = [
            _mm512_rolv_epi64(bits, halves(2, 62)),
            _mm512_rolv_epi64(bits, halves(1, 61)),
            right(0, 4),
            right(1, 5),
        ];
        let mut codes = two;
        for v in 0..4 {
            codes[v] = select(bytes(4), third[v], two[v]);
        }
        codes
    }
    #[inline(always)]
    unsafe fn head(p: &[*const u8; 4]) -> Head {
        let scales = each!([_mm_setzero_si128(); 4], r => Q3K::scales(p[r]));
        let widened = [
            _mm512_cvtepi8_epi16(_mm256_setr_m128i(scales[0], scales[1])),
            _mm512_cvtepi8_epi16(_mm256_setr_m128i(scales[2], scales[3])),
        ];
        Head::without_mins(widened, f16_four(p, q3_k::D))
    }
}

impl Wide for Iq4Xs {
    const ORDER: Order = order(GgmlType::Iq4Xs);
    /// The bytes as they are and shifted: [`Self::pairs`] looks up what they stand for.
    #[inline(always)]
    unsafe fn codes64(p: *const u8) -> [__m512i; 4] {
        let load = |at: usize| _mm512_loadu_si512(p.add(iq4::XS_QS + at).cast());
        let (a, b) = (load(0), load(64));
        [a, _mm512_srli_epi16::<4>(a), b, _mm512_srli_epi16::<4>(b)]
    }
    /// |x| is what can be unsigned. The value takes the sign of x: bit 4 of its place in a table of both.
    #[inline(always)]
    unsafe fn pairs(codes: __m512i, x: __m512i, signs: __m512i) -> __m512i {
        const SIGNED: [i8; 64] = {
            let mut out = [0; 64];
            let mut i = 0;
            while i < 16 {
                (out[i], out[i + 16]) = (iq4::VALUES[i], -iq4::VALUES[i]);
                i += 1;
            }
            out
        };
        let places = select(bytes(15), codes, signs);
        let values = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(SIGNED.as_ptr().cast()));
        _mm512_maddubs_epi16(x, values) // at most 2·127·127
    }
    #[inline(always)]
    unsafe fn prepare(x: __m512i) -> (__m512i, __m512i) {
        (_mm512_abs_epi8(x), _mm512_maskz_mov_epi8(_mm512_movepi8_mask(x), bytes(16)))
    }
    #[inline(always)]
    unsafe fn head(p: &[*const u8; 4]) -> Head {
        const _: () = assert!(iq4::D == 0 && iq4::XS_SCALES_H == 2 && iq4::XS_SCALES_L == 4);
        let heads = gather16(p, 0);
        let each = |x| _mm512_shuffle_epi8(heads, _mm512_broadcast_i32x4(x));
        let shifts = |x| _mm512_broadcast_i32x4(x);
        // Word j: nibble j of a dword, and bits 2·j and 2·j + 1 of a word.
        let z = -1;
        let low = each(_mm_setr_epi8(4, z, 4, z, 5, z, 5, z, 6, z, 6, z, 7, z, 7, z));
        let low = _mm512_srlv_epi16(low, shifts(_mm_setr_epi16(0, 4, 0, 4, 0, 4, 0, 4)));
        let high = each(_mm_set1_epi16(0x0302));
        let high = _mm512_srlv_epi16(high, shifts(_mm_setr_epi16(0, 2, 4, 6, 8, 10, 12, 14)));
        let high = _mm512_and_si512(_mm512_slli_epi16::<4>(high), _mm512_set1_epi16(0x30));
        let word = |x| _mm512_set1_epi16(x);
        let biased = _mm512_ternarylogic_epi64::<0xf8>(high, low, word(15)); // high | low & 15
        let (d, _) = f16_of_heads(heads, 0, 0);
        Head::without_mins([_mm512_sub_epi16(biased, word(32)); 2], d)
    }
}

#[inline(always)]
unsafe fn load32(x: *const i8, at: usize) -> __m256i {
    _mm256_loadu_si256(x.add(at).cast())
}

#[inline(always)]
unsafe fn load64(x: *const i8, at: usize) -> __m512i {
    _mm512_loadu_si512(x.add(at).cast())
}
