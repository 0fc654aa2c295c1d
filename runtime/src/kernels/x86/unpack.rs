//! Blocks taken apart with vector instructions. The layouts are the codecs' (`kestrel_quant::codec`), whose scalar
//! accessors are what the tests compare with.
//!
//! Codes come out unsigned: `code = u8 - BIAS`.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for pointers to whole blocks and for AVX2 and F16C, which the callers have

use crate::kernels::beside::codes_of_q8_0;
use kestrel_formats::weight_type::{FP4_VALUES, NF4_VALUES};
use kestrel_quant::codec::{iq4, q2_k, q3_k, q4, q4_k, q5, q5_k, q6_k, q8_0};
use std::arch::x86_64::*;

/// A type with blocks of 32: `weight = d * code + m`.
pub(super) trait Small {
    const BYTES: usize;
    const BIAS: u8;
    /// Whether `d` lies beside the blocks.
    const BESIDE: bool = false;
    /// Whether `m` is other than 0.
    const HAS_M: bool;
    /// 32 codes in row order.
    unsafe fn codes(block: *const u8) -> __m256i;
    /// Offset of `m` is 2 wherever there is one, that of `d` is 0 always.
    const _LAYOUT: () =
        assert!(q4::D == 0 && q5::D == 0 && q8_0::D == 0 && iq4::D == 0 && q4::M == 2 && q5::M == 2);
}

/// A type with blocks of 256: `weight = d * scale * code - dmin * min`.
pub(super) trait Large {
    const BYTES: usize;
    const BIAS: u8;
    /// Bits of a code.
    const BITS: usize;
    /// Weights in a sub-block.
    const SUB: usize;
    const HAS_MINS: bool;
    /// Offsets of the f16 `d` and `dmin`.
    const D: usize;
    const DMIN: usize;
    /// The scales as i8: 16, or 8 and anything.
    unsafe fn scales(block: *const u8) -> __m128i;
    /// The minimums as i8, likewise.
    unsafe fn mins(_block: *const u8) -> __m128i {
        _mm_setzero_si128()
    }
    /// Codes `32 j..32 j + 32`.
    unsafe fn codes(block: *const u8, j: usize) -> __m256i;
}

/// The f16 at `p`.
#[inline(always)]
pub(super) unsafe fn f16(p: *const u8) -> f32 {
    let bits = p.cast::<u16>().read_unaligned();
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}

/// The f16 at `p + at` of each of four blocks.
#[inline(always)]
pub(super) unsafe fn f16_four(p: &[*const u8; 4], at: usize) -> __m128 {
    // Brought together in an integer register: vectors have enough to do.
    _mm_cvtph_ps(_mm_cvtsi64_si128(words_of_four(p, at) as i64))
}

/// The two bytes at `p + at` of each of four blocks, the first block's lowest.
#[inline(always)]
pub(super) unsafe fn words_of_four(p: &[*const u8; 4], at: usize) -> u64 {
    let word = |i: usize| u64::from(p[i].add(at).cast::<u16>().read_unaligned()) << (16 * i);
    word(0) | word(1) | word(2) | word(3)
}

#[inline(always)]
unsafe fn load16(p: *const u8) -> __m128i {
    _mm_loadu_si128(p.cast())
}

#[inline(always)]
unsafe fn load32(p: *const u8) -> __m256i {
    _mm256_loadu_si256(p.cast())
}

#[inline(always)]
unsafe fn u32_at(p: *const u8) -> u32 {
    p.cast::<u32>().read_unaligned()
}

/// Nibbles of 16 bytes: the low ones, then the high ones.
#[inline(always)]
unsafe fn nibbles16(p: *const u8) -> __m256i {
    let bytes = load16(p);
    let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(bytes), _mm_srli_epi16::<4>(bytes));
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// Bytes that the halves of 16 bytes name in a table, first the high, then the low; see `Lanes::look_up_i8`.
#[inline(always)]
pub(super) unsafe fn look_up_bytes(table: &[i8; 16], p: *const u8, to: *mut i8) {
    let (table, bytes) = (load16(table.as_ptr().cast()), load16(p));
    let low = _mm_shuffle_epi8(table, _mm_and_si128(bytes, _mm_set1_epi8(15)));
    let high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15)));
    _mm_storeu_si128(to.cast(), high);
    _mm_storeu_si128(to.add(16).cast(), low);
}

/// `shift`ed fields of 32 bytes under a mask.
#[inline(always)]
unsafe fn field(bytes: __m256i, shift: usize, mask: i8) -> __m256i {
    let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
}

/// Bit i of `bits` as byte i: `value` where it is set.
#[inline(always)]
unsafe fn spread_bits(bits: u32, value: i8) -> __m256i {
    let which = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), which);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    _mm256_and_si256(set, _mm256_set1_epi8(value))
}

/// A table of bytes with 128 added.
const fn biased(table: &[i8; 16]) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = (table[i] as u8) ^ 0x80;
        i += 1;
    }
    out
}

/// What the 16 codes of the IQ4 types stand for, with 128 added.
#[inline(always)]
pub(super) unsafe fn iq4_values() -> __m256i {
    const BIASED: [u8; 16] = biased(&iq4::VALUES);
    _mm256_broadcastsi128_si256(load16(BIASED.as_ptr()))
}

/// A 4-bit type of bitsandbytes: 32 weights of a row are a block of [`Small`].
pub(super) trait FourBit {
    /// The values as codes of Q8_0, with 128 added.
    const BIASED: [u8; 16];
}

pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;
pub(super) struct Iq4Nl;
pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;
pub(super) struct Iq4Xs;
pub(super) struct Nf4;
pub(super) struct Fp4;
pub(super) struct Int8;

impl Small for Q8_0 {
    const BYTES: usize = q8_0::BYTES;
    const BIAS: u8 = 128;
    const HAS_M: bool = false;
    #[inline(always)]
    unsafe fn codes(block: *const u8) -> __m256i {
        _mm256_xor_si256(load32(block.add(q8_0::QS)), _mm256_set1_epi8(i8::MIN))
    }
}

impl Small for Q4_0 {
    const BYTES: usize = q4::Q4_0_BYTES;
    const BIAS: u8 = q4::Q4_0_BIAS;
    const HAS_M: bool = false;
    #[inline(always)]
    unsafe fn codes(block: *const u8) -> __m256i {
        nibbles16(block.add(q4::Q4_0_QS))
    }
}

impl Small for Q4_1 {
    const BYTES: usize = q4::Q4_1_BYTES;
    const BIAS: u8 = 0;
    const HAS_M: bool = true;
    #[inline(always)]
    unsafe fn codes(block: *const u8) -> __m256i {
        nibbles16(block.add(q4::Q4_1_QS))
    }
}

impl Small for Q5_0 {
    const BYTES: usize = q5::Q5_0_BYTES;
    const BIAS: u8 = q5::Q5_0_BIAS;
    const HAS_M: bool = false;
    #[inline(always)]
    unsafe fn codes(block: *const u8) -> __m256i {
        let high = spread_bits(u32_at(block.add(q5::Q5_0_QH)), 16);
        _mm256_or_si256(nibbles16(block.add(q5::Q5_0_QS)), high)
    }
}

impl Small for Q5_1 {
    const BYTES: usize = q5::Q5_1_BYTES;
    const BIAS: u8 = 0;
    const HAS_M: bool = true;
    #[inline(always)]
    unsafe fn codes(block: *const u8) -> __m256i {
        let high = spread_bits(u32_at(block.add(q5::Q5_1_QH)), 16);
        _mm256_or_si256(nibbles16(block.add(q5::Q5_1_QS)), high)
    }
}

impl Small for Iq4Nl {
    const BYTES: usize = iq4::NL_BYTES;
    const BIAS: u8 = 128;
    const HAS_M: bool = false;
    #[inline(always)]
    unsafe fn codes(block: *const u8) -> __m256i {
        _mm256_shuffle_epi8(iq4_values(), nibbles16(block.add(iq4::NL_QS)))
    }
}

impl FourBit for Nf4 {
    const BIASED: [u8; 16] = biased(&codes_of_q8_0(&NF4_VALUES));
}

impl FourBit for Fp4 {
    const BIASED: [u8; 16] = biased(&codes_of_q8_0(&FP4_VALUES));
}

impl<F: FourBit> Small for F {
    const BYTES: usize = 16;
    const BIAS: u8 = 128;
    const BESIDE: bool = true;
    const HAS_M: bool = false;
    #[inline(always)]
    unsafe fn codes(block: *const u8) -> __m256i {
        let table = _mm256_broadcastsi128_si256(load16(F::BIASED.as_ptr()));
        // The activations at even places come first, as do the high halves of bytes.
        let both = _mm256_shuffle_epi8(table, nibbles16(block));
        _mm256_permute4x64_epi64::<0b01_00_11_10>(both)
    }
}

impl Small for Int8 {
    const BYTES: usize = 32;
    const BIAS: u8 = 128;
    const BESIDE: bool = true;
    const HAS_M: bool = false;
    #[inline(always)]
    unsafe fn codes(block: *const u8) -> __m256i {
        _mm256_xor_si256(load32(block), _mm256_set1_epi8(i8::MIN))
    }
}

/// The two-bit fields `32 j..` of 64 bytes laid out as in Q2_K.
#[inline(always)]
unsafe fn two_bits(qs: *const u8, j: usize) -> __m256i {
    field(load32(qs.add(j / 4 * 32)), j % 4 * 2, 3)
}

impl Large for Q2K {
    const BYTES: usize = q2_k::BYTES;
    const BIAS: u8 = 0;
    const BITS: usize = 2;
    const SUB: usize = q2_k::SUB;
    const HAS_MINS: bool = true;
    const D: usize = q2_k::D;
    const DMIN: usize = q2_k::DMIN;
    #[inline(always)]
    unsafe fn scales(block: *const u8) -> __m128i {
        _mm_and_si128(load16(block.add(q2_k::SCALES)), _mm_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn mins(block: *const u8) -> __m128i {
        _mm_and_si128(_mm_srli_epi16::<4>(load16(block.add(q2_k::SCALES))), _mm_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn codes(block: *const u8, j: usize) -> __m256i {
        two_bits(block.add(q2_k::QS), j)
    }
}

impl Large for Q3K {
    const BYTES: usize = q3_k::BYTES;
    const BIAS: u8 = 4;
    const BITS: usize = 3;
    const SUB: usize = q3_k::SUB;
    const HAS_MINS: bool = false;
    const D: usize = q3_k::D;
    const DMIN: usize = q3_k::D;
    #[inline(always)]
    unsafe fn scales(block: *const u8) -> __m128i {
        // Bytes 0..8 hold the low nibbles of scales 0..8, then of 8..16; bytes 8..12 two upper bits each.
        let s = block.add(q3_k::SCALES);
        let nibbles = s.cast::<u64>().read_unaligned();
        let low = _mm_set_epi64x((nibbles >> 4) as i64, nibbles as i64);
        let high = u32_at(s.add(8));
        let high = _mm_setr_epi32(high as i32, (high >> 2) as i32, (high >> 4) as i32, (high >> 6) as i32);
        let high = _mm_slli_epi16::<4>(_mm_and_si128(high, _mm_set1_epi8(3)));
        let biased = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi8(15)), high);
        _mm_sub_epi8(biased, _mm_set1_epi8(32))
    }
    #[inline(always)]
    unsafe fn codes(block: *const u8, j: usize) -> __m256i {
        let third = field(load32(block.add(q3_k::HMASK)), j, 1);
        _mm256_or_si256(two_bits(block.add(q3_k::QS), j), _mm256_slli_epi16::<2>(third))
    }
}

/// The eight scales and the eight minimums of Q4_K and Q5_K, one byte each.
#[inline(always)]
unsafe fn six_bit_scales(p: *const u8) -> (u64, u64) {
    let (a, b, c) = (u32_at(p), u32_at(p.add(4)), u32_at(p.add(8)));
    let pack = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let upper = |x: u32| (x >> 2) & 0x3030_3030; // the upper two bits of each byte, as bits 4 and 5
    let scales = pack(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | upper(a));
    let mins = pack(b & 0x3f3f_3f3f, (c >> 4) & 0x0f0f_0f0f | upper(b));
    (scales, mins)
}

impl Large for Q4K {
    const BYTES: usize = q4_k::BYTES;
    const BIAS: u8 = 0;
    const BITS: usize = 4;
    const SUB: usize = q4_k::SUB;
    const HAS_MINS: bool = true;
    const D: usize = q4_k::D;
    const DMIN: usize = q4_k::DMIN;
    #[inline(always)]
    unsafe fn scales(block: *const u8) -> __m128i {
        _mm_cvtsi64_si128(six_bit_scales(block.add(q4_k::SCALES)).0 as i64)
    }
    #[inline(always)]
    unsafe fn mins(block: *const u8) -> __m128i {
        _mm_cvtsi64_si128(six_bit_scales(block.add(q4_k::SCALES)).1 as i64)
    }
    #[inline(always)]
    unsafe fn codes(block: *const u8, j: usize) -> __m256i {
        field(load32(block.add(q4_k::QS + j / 2 * 32)), j % 2 * 4, 15)
    }
}

impl Large for Q5K {
    const BYTES: usize = q5_k::BYTES;
    const BIAS: u8 = 0;
    const BITS: usize = 5;
    const SUB: usize = q5_k::SUB;
    const HAS_MINS: bool = true;
    const D: usize = q5_k::D;
    const DMIN: usize = q5_k::DMIN;
    #[inline(always)]
    unsafe fn scales(block: *const u8) -> __m128i {
        _mm_cvtsi64_si128(six_bit_scales(block.add(q5_k::SCALES)).0 as i64)
    }
    #[inline(always)]
    unsafe fn mins(block: *const u8) -> __m128i {
        _mm_cvtsi64_si128(six_bit_scales(block.add(q5_k::SCALES)).1 as i64)
    }
    #[inline(always)]
    unsafe fn codes(block: *const u8, j: usize) -> __m256i {
        let low = field(load32(block.add(q5_k::QS + j / 2 * 32)), j % 2 * 4, 15);
        let fifth = field(load32(block.add(q5_k::QH)), j, 1);
        _mm256_or_si256(low, _mm256_slli_epi16::<4>(fifth))
    }
}

impl Large for Q6K {
    const BYTES: usize = q6_k::BYTES;
    const BIAS: u8 = 32;
    const BITS: usize = 6;
    const SUB: usize = q6_k::SUB;
    const HAS_MINS: bool = false;
    const D: usize = q6_k::D;
    const DMIN: usize = q6_k::D;
    #[inline(always)]
    unsafe fn scales(block: *const u8) -> __m128i {
        load16(block.add(q6_k::SCALES))
    }
    #[inline(always)]
    unsafe fn codes(block: *const u8, j: usize) -> __m256i {
        // Of each 128 weights, 64 bytes have 0..64 in the low and 64..128 in the high nibbles.
        let low = field(load32(block.add(q6_k::QL + j / 4 * 64 + j % 2 * 32)), j % 4 / 2 * 4, 15);
        let high = two_bits(block.add(q6_k::QH), j);
        _mm256_or_si256(low, _mm256_slli_epi16::<4>(high))
    }
}

impl Large for Iq4Xs {
    const BYTES: usize = iq4::XS_BYTES;
    const BIAS: u8 = 128;
    const BITS: usize = 8;
    const SUB: usize = iq4::SUB;
    const HAS_MINS: bool = false;
    const D: usize = iq4::D;
    const DMIN: usize = iq4::D;
    #[inline(always)]
    unsafe fn scales(block: *const u8) -> __m128i {
        let low = u32_at(block.add(iq4::XS_SCALES_L));
        let high = u32::from(block.add(iq4::XS_SCALES_H).cast::<u16>().read_unaligned());
        // Nibble j of `low` and bits 2 j of `high` are brought to byte j.
        let low = _mm_unpacklo_epi8(_mm_cvtsi32_si128(low as i32), _mm_cvtsi32_si128((low >> 4) as i32));
        let shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
        let high =
            _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(high as i32), shifts), _mm256_set1_epi32(3));
        let high = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high));
        let high = _mm_slli_epi16::<4>(_mm_packus_epi16(high, high));
        let biased = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi8(15)), high);
        _mm_sub_epi8(biased, _mm_set1_epi8(32))
    }
    #[inline(always)]
    unsafe fn codes(block: *const u8, j: usize) -> __m256i {
        _mm256_shuffle_epi8(iq4_values(), nibbles16(block.add(iq4::XS_QS + 16 * j)))
    }
}

/// Calls `$f::<T>($args)` for the block type `$dtype`: small types with `$small`, large ones with `$large`.
macro_rules! by_type {
    ($dtype:expr, $small:ident, $large:ident, ($($arg:expr),*)) => {
        match $dtype {
            GgmlType::Q8_0 => $small::<unpack::Q8_0>($($arg),*),
            GgmlType::Q4_0 => $small::<unpack::Q4_0>($($arg),*),
            GgmlType::Q4_1 => $small::<unpack::Q4_1>($($arg),*),
            GgmlType::Q5_0 => $small::<unpack::Q5_0>($($arg),*),
            GgmlType::Q5_1 => $small::<unpack::Q5_1>($($arg),*),
            GgmlType::Iq4Nl => $small::<unpack::Iq4Nl>($($arg),*),
            GgmlType::Q2K => $large::<unpack::Q2K>($($arg),*),
            GgmlType::Q3K => $large::<unpack::Q3K>($($arg),*),
            GgmlType::Q4K => $large::<unpack::Q4K>($($arg),*),
            GgmlType::Q5K => $large::<unpack::Q5K>($($arg),*),
            GgmlType::Q6K => $large::<unpack::Q6K>($($arg),*),
            GgmlType::Iq4Xs => $large::<unpack::Iq4Xs>($($arg),*),
            GgmlType::F32 | GgmlType::F16 | GgmlType::Bf16 => unreachable!("{} has no blocks", $dtype),
        }
    };
}
pub(super) use by_type;

/// Calls `$f::<T>($args)` for the type `$dtype` that has its scales beside its codes.
macro_rules! by_type_beside {
    ($dtype:expr, $f:ident, ($($arg:expr),*)) => {
        match $dtype {
            WeightType::Nf4 => $f::<unpack::Nf4>($($arg),*),
            WeightType::Fp4 => $f::<unpack::Fp4>($($arg),*),
            WeightType::Int8 => $f::<unpack::Int8>($($arg),*),
            WeightType::Ggml(ty) => unreachable!("{ty} has its scales in its blocks"),
        }
    };
}
pub(super) use by_type_beside;
