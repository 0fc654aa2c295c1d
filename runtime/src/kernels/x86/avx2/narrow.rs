//! Blocks unpacked 32 codes at a time: halves of two blocks of 32, for [`super::pairs`], or the 32-byte pieces of a block of
//! 256, whose codes keep the order of their bytes, for [`super::rows`].

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for pointers to whole blocks and for the instruction set

use crate::kernels::blocks::{Order, order};
use crate::kernels::x86::few::FOUR;
use crate::kernels::x86::unpack::{
    FourBit, Int8, Iq4Nl, Iq4Xs, Large, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Small,
    f16_four, iq4_values,
};
use kestrel_formats::GgmlType;
use kestrel_quant::codec::{iq4, q4, q4_k, q5, q5_k, q8_0};
use std::arch::x86_64::*;

/// A type with blocks of 32, two at a time.
pub(super) trait Two: Small {
    /// Whether signed codes go down to -128, of which there is no magnitude in i8.
    const HAS_MIN: bool = false;
    /// The lower and the upper 16 codes of two blocks, each block in its half; signed where the bias is 128.
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2];
}

/// Pairs of (code - bias) · x.
#[inline(always)]
unsafe fn unbiased(bias: u8, codes: __m256i, x: __m256i) -> __m256i {
    let products = _mm256_maddubs_epi16(codes, x);
    match bias {
        0 => products,
        _ => _mm256_sub_epi16(products, _mm256_maddubs_epi16(_mm256_set1_epi8(bias as i8), x)),
    }
}

/// 16 bytes of each of two rows.
#[inline(always)]
pub(super) unsafe fn gather16(p: &[*const u8; 2], at: usize) -> __m256i {
    let (a, b) = (_mm_loadu_si128(p[0].add(at).cast()), _mm_loadu_si128(p[1].add(at).cast()));
    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b)
}

/// The low and the high nibbles.
#[inline(always)]
pub(super) unsafe fn nibbles(x: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    [_mm256_and_si256(x, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask)]
}

impl Two for Q8_0 {
    const HAS_MIN: bool = true;
    #[inline(always)]
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2] {
        [gather16(p, q8_0::QS), gather16(p, q8_0::QS + 16)]
    }
}

impl Two for Q4_0 {
    #[inline(always)]
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2] {
        nibbles(gather16(p, q4::Q4_0_QS))
    }
}

impl Two for Q4_1 {
    #[inline(always)]
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2] {
        nibbles(gather16(p, q4::Q4_1_QS))
    }
}

/// Fifth bits, 32 per row at `at`, added to nibbles.
#[inline(always)]
unsafe fn with_fifth_bits(p: &[*const u8; 2], at: usize, nibbles: [__m256i; 2]) -> [__m256i; 2] {
    let (a, b) = (p[0].add(at).cast::<i32>().read_unaligned(), p[1].add(at).cast::<i32>().read_unaligned());
    let bits = _mm256_setr_m128i(_mm_set1_epi32(a), _mm_set1_epi32(b));
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let add = |x, first: i64| {
        let which =
            _mm256_set_epi64x(first + 0x0101_0101_0101_0101, first, first + 0x0101_0101_0101_0101, first);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(bits, which), bit), bit);
        _mm256_or_si256(x, _mm256_and_si256(set, _mm256_set1_epi8(16)))
    };
    [add(nibbles[0], 0), add(nibbles[1], 0x0202_0202_0202_0202)]
}

impl Two for Q5_0 {
    #[inline(always)]
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2] {
        with_fifth_bits(p, q5::Q5_0_QH, nibbles(gather16(p, q5::Q5_0_QS)))
    }
}

impl Two for Q5_1 {
    #[inline(always)]
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2] {
        with_fifth_bits(p, q5::Q5_1_QH, nibbles(gather16(p, q5::Q5_1_QS)))
    }
}

/// What the codes of the IQ4 types stand for.
#[inline(always)]
unsafe fn iq4(codes: __m256i) -> __m256i {
    let values = _mm256_xor_si256(iq4_values(), _mm256_set1_epi8(i8::MIN));
    _mm256_shuffle_epi8(values, codes)
}

impl Two for Iq4Nl {
    #[inline(always)]
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2] {
        let [low, high] = nibbles(gather16(p, iq4::NL_QS));
        [iq4(low), iq4(high)]
    }
}

impl<F: FourBit> Two for F {
    /// Of two blocks that lie one after the other, as all do.
    #[inline(always)]
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2] {
        let table = _mm_xor_si128(_mm_loadu_si128(F::BIASED.as_ptr().cast()), _mm_set1_epi8(i8::MIN));
        let table = _mm256_broadcastsi128_si256(table);
        // The activations at even places come first, as do the high halves of bytes.
        let [low, high] = nibbles(_mm256_loadu_si256(p[0].cast()));
        [_mm256_shuffle_epi8(table, high), _mm256_shuffle_epi8(table, low)]
    }
}

impl Two for Int8 {
    const HAS_MIN: bool = true;
    #[inline(always)]
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2] {
        [gather16(p, 0), gather16(p, 16)]
    }
}

/// What four blocks of 256 have once.
pub(super) struct Heads {
    pub d: __m128,
    pub dmin: __m128,
    /// Of two blocks each, a block in each half: 16 as i8, or 8 and anything.
    pub scales: [__m256i; 2],
    pub mins: [__m256i; 2],
}

/// A type with blocks of 256; `v` and `half` count 64 codes and their halves.
pub(super) trait Narrow: Large {
    const ORDER: Order;

    /// 32 codes.
    #[inline(always)]
    unsafe fn codes32(p: *const u8, v: usize, half: usize) -> __m256i {
        Self::codes(p, Self::ORDER.weight(v, 32 * half) / 32)
    }

    /// Their activations.
    #[inline(always)]
    unsafe fn x32(x: *const i8, v: usize, half: usize) -> __m256i {
        _mm256_loadu_si256(x.add(Self::ORDER.weight(v, 32 * half)).cast())
    }

    /// Products of 32 codes with activations, summed in pairs; exact.
    #[inline(always)]
    unsafe fn pairs(codes: __m256i, x: __m256i) -> __m256i {
        unbiased(Self::BIAS, codes, x) // at most 2·63·127
    }

    /// What four blocks have once.
    #[inline(always)]
    unsafe fn heads(p: &[*const u8; FOUR]) -> Heads {
        let zero = _mm256_setzero_si256();
        let mut heads =
            Heads { d: f16_four(p, Self::D), dmin: _mm_setzero_ps(), scales: [zero; 2], mins: [zero; 2] };
        for h in 0..2 {
            heads.scales[h] = _mm256_set_m128i(Self::scales(p[2 * h + 1]), Self::scales(p[2 * h]));
        }
        if Self::HAS_MINS {
            heads.dmin = f16_four(p, Self::DMIN);
            for h in 0..2 {
                heads.mins[h] = _mm256_set_m128i(Self::mins(p[2 * h + 1]), Self::mins(p[2 * h]));
            }
        }
        heads
    }

    /// The scale of each pair of codes; each is twice in a dword of `scales`, where fours of them are eight dwords apart.
    #[inline(always)]
    unsafe fn spread_scales(scales: *const i32, v: usize, half: usize) -> __m256i {
        let sub = |i| Self::ORDER.weight(v, 32 * half + i) / Self::SUB;
        let spread = |sub: usize| _mm256_set1_epi32(*scales.add(sub / 4 * 8 + sub % 4));
        match (sub(0), sub(16)) {
            (low, high) if low == high => spread(low),
            (low, high) => _mm256_blend_epi32::<0xf0>(spread(low), spread(high)),
        }
    }
}

/// Those of Q4_K and Q5_K, whose blocks begin with 16 bytes of them.
#[inline(always)]
unsafe fn six_bit_heads(p: &[*const u8; FOUR]) -> Heads {
    const { assert!(q4_k::D == 0 && q4_k::DMIN == 2 && q4_k::SCALES == 4) }
    const { assert!(q5_k::D == 0 && q5_k::DMIN == 2 && q5_k::SCALES == 4) }
    let heads = [gather16(&[p[0], p[1]], 0), gather16(&[p[2], p[3]], 0)];
    // d and dmin of blocks 0 and 2 in the lower half, of 1 and 3 in the upper one.
    let both = _mm256_unpacklo_epi32(heads[0], heads[1]);
    let both = _mm_unpacklo_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both));
    let both = _mm256_cvtph_ps(both);
    let (two, more) = (_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
    let scales = each!([heads[0]; 2], h => six_bit_scales(heads[h]));
    Heads {
        d: _mm_shuffle_ps::<0b10_00_10_00>(two, more),
        dmin: _mm_shuffle_ps::<0b11_01_11_01>(two, more),
        scales,
        mins: each!([heads[0]; 2], h => _mm256_unpackhi_epi64(scales[h], _mm256_setzero_si256())),
    }
}

/// The 6-bit scales of two blocks, each block's first 16 bytes in its half: the eight scales, then the eight minimums.
#[inline(always)]
unsafe fn six_bit_scales(heads: __m256i) -> __m256i {
    let fields = |a, b, c, d| _mm256_setr_epi32(a, b, c, d, a, b, c, d);
    // Dwords 1 and 2 hold the first four scales and minimums whole, and the upper two bits of the others, whose lower four
    // bits are the nibbles of dword 3.
    let low = _mm256_srlv_epi32(_mm256_shuffle_epi32::<0b11_10_11_01>(heads), fields(0, 0, 0, 4));
    let low = _mm256_and_si256(low, fields(0x3f3f_3f3f, 0x0f0f_0f0f, 0x3f3f_3f3f, 0x0f0f_0f0f));
    let high = _mm256_srli_epi32::<2>(_mm256_shuffle_epi32::<0b10_10_01_01>(heads));
    _mm256_or_si256(low, _mm256_and_si256(high, fields(0, 0x3030_3030, 0, 0x3030_3030)))
}

impl Narrow for Q2K {
    const ORDER: Order = order(GgmlType::Q2K);
}

impl Narrow for Q3K {
    const ORDER: Order = order(GgmlType::Q3K);
}

impl Narrow for Q4K {
    const ORDER: Order = order(GgmlType::Q4K);
    #[inline(always)]
    unsafe fn heads(p: &[*const u8; FOUR]) -> Heads {
        six_bit_heads(p)
    }
}

impl Narrow for Q5K {
    const ORDER: Order = order(GgmlType::Q5K);
    #[inline(always)]
    unsafe fn heads(p: &[*const u8; FOUR]) -> Heads {
        six_bit_heads(p)
    }
}

impl Narrow for Q6K {
    const ORDER: Order = order(GgmlType::Q6K);
}

impl Narrow for Iq4Xs {
    const ORDER: Order = order(GgmlType::Iq4Xs);
    #[inline(always)]
    unsafe fn codes32(p: *const u8, v: usize, half: usize) -> __m256i {
        let bytes = _mm256_loadu_si256(p.add(iq4::XS_QS + 64 * (v / 2) + 32 * half).cast());
        iq4(nibbles(bytes)[v % 2])
    }
    /// Runs of 16 of two sub-blocks.
    #[inline(always)]
    unsafe fn x32(x: *const i8, v: usize, half: usize) -> __m256i {
        let load = |i| _mm_loadu_si128(x.add(Self::ORDER.weight(v, 32 * half + i)).cast());
        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load(0)), load(16))
    }
    #[inline(always)]
    unsafe fn pairs(codes: __m256i, x: __m256i) -> __m256i {
        _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(codes, x)) // at most 2·127·127
    }
}
