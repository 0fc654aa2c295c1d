//! Blocks unpacked 32 codes at a time, for [`super::rows`]: two rows of blocks of 32, or the 32-byte pieces of a block
//! of 256, whose codes keep the order of their bytes.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for pointers to whole blocks and for the instruction set

use crate::kernels::blocks::{Order, order};
use crate::kernels::x86::unpack::{
    Iq4Nl, Iq4Xs, Large, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Small, iq4_values,
};
use kestrel_formats::GgmlType;
use kestrel_quant::codec::{iq4, q4, q5, q8_0};
use std::arch::x86_64::*;

/// A type with blocks of 32, two rows at a time.
pub(super) trait Two: Small {
    /// The lower and the upper 16 codes of two blocks, each block in its half; signed where the bias is 128.
    unsafe fn two(p: &[*const u8; 2]) -> [__m256i; 2];
}

/// Products of 32 codes with 32 activations, summed in pairs to i16. None overflows: codes of at most 5 bits are
/// multiplied as they are (2·31·127), others by magnitude (2·128·127 = 32512).
#[inline(always)]
pub(super) unsafe fn pairs<F: Small>(codes: __m256i, x: __m256i) -> __m256i {
    if F::BIAS == 128 {
        return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    }
    unbiased(F::BIAS, codes, x)
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
unsafe fn gather16(p: &[*const u8; 2], at: usize) -> __m256i {
    let (a, b) = (_mm_loadu_si128(p[0].add(at).cast()), _mm_loadu_si128(p[1].add(at).cast()));
    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b)
}

/// The low and the high nibbles.
#[inline(always)]
unsafe fn nibbles(x: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    [_mm256_and_si256(x, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask)]
}

impl Two for Q8_0 {
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

/// A type with blocks of 256; `v` and `half` count 64 codes and their halves.
pub(super) trait Narrow: Large {
    const ORDER: Order;
    /// Where each pair of codes has its scale among those of [`Self::spread_scales`].
    const SCALE_OF: [[[u8; 32]; 2]; 4] = scale_of(Self::ORDER, Self::SUB);

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

    /// The scale of each pair, from the first and the second eight, which are in both halves.
    #[inline(always)]
    unsafe fn spread_scales(scales: &[__m256i; 2], v: usize, half: usize) -> __m256i {
        let from = scales[Self::ORDER.weight(v, 32 * half) / Self::SUB / 8];
        _mm256_shuffle_epi8(from, _mm256_loadu_si256(Self::SCALE_OF[v][half].as_ptr().cast()))
    }
}

const fn scale_of(order: Order, sub: usize) -> [[[u8; 32]; 2]; 4] {
    let mut out = [[[0; 32]; 2]; 4];
    let mut i = 0;
    while i < 256 {
        let (v, half, byte) = (i / 64, i / 32 % 2, i % 32);
        let scale = order.weight(v, i % 64) / sub % 8;
        out[v][half][byte] = (2 * scale + byte % 2) as u8;
        i += 1;
    }
    out
}

impl Narrow for Q2K {
    const ORDER: Order = order(GgmlType::Q2K);
}

impl Narrow for Q3K {
    const ORDER: Order = order(GgmlType::Q3K);
}

impl Narrow for Q4K {
    const ORDER: Order = order(GgmlType::Q4K);
}

impl Narrow for Q5K {
    const ORDER: Order = order(GgmlType::Q5K);
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
