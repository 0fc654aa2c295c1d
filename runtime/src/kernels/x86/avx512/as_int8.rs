//! Q4_K as int8, see `kernels/as_int8.rs`: tables for four blocks at a time, then codes 64 at a time.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for pointers to whole blocks and for the instruction set

use super::wide::Wide;
use crate::kernels::as_int8::{HALF, INVERSE_127, ONE};
use crate::kernels::x86::few::FOUR;
use crate::kernels::x86::panel::{Format, Row, Sweep};
use crate::kernels::x86::unpack::Q4K;
use kestrel_quant::codec::q4_k;
use std::arch::x86_64::*;

/// Panels of Q4_K as int8.
pub(in crate::kernels::x86) struct AsInt8;

impl Format for AsInt8 {
    const BLOCK: usize = 256;
    const SUB: usize = 256;
    const BITS: usize = 8;
    const BIAS: u8 = 128;
    const HAS_OFFSETS: bool = false;
    const BYTES: usize = q4_k::BYTES;
    type Prepared = Tables;

    #[inline(always)]
    unsafe fn prepare(blocks: &[*const u8; FOUR], to: *mut Tables) {
        Tables::prepare(blocks, to);
    }

    #[inline(always)]
    unsafe fn expand<S: Sweep>(tables: *const Tables, i: usize, block: *const u8, n: usize, to: Row) {
        assert!(n == 256); // what a panel has at most
        *to.scales = Tables::codes(tables, i, block, to.codes, S::taken_off(Self::BIAS));
    }
}

/// What four blocks' tables are made from.
#[repr(C, align(64))]
pub(in crate::kernels::x86) struct Tables {
    /// [block][sub-block]
    steps: [[u16; 8]; FOUR],
    /// With a bias of 128 codes, as vpdpbusd takes them unsigned.
    starts: [[u16; 8]; FOUR],
    scales: [f32; FOUR],
}

impl Tables {
    /// Of the blocks at `p`, to `to`.
    #[inline(always)]
    pub unsafe fn prepare(p: &[*const u8; FOUR], to: *mut Self) {
        let head = Q4K::head(p);
        let minus_dmin = _mm_sub_ps(_mm_setzero_ps(), head.dmin);
        let mut ends = [[_mm512_setzero_ps(); 2]; 2]; // of two blocks each: steps, starts
        let mut largest = [_mm512_setzero_ps(); 2];
        for h in 0..2 {
            let (step, start) = (per_block(head.d, h), per_block(minus_dmin, h));
            ends[h] = [
                _mm512_mul_ps(floats(head.scales[0], h), step),
                _mm512_mul_ps(floats(head.mins[0], h), start),
            ];
            let last = _mm512_fmadd_ps(ends[h][0], _mm512_set1_ps(15.0), ends[h][1]);
            largest[h] = largest_of_eight(_mm512_max_ps(_mm512_abs_ps(last), _mm512_abs_ps(ends[h][1])));
        }
        // Each block's eight lanes are the same now: one lane of each.
        let which = _mm512_castsi128_si512(_mm_setr_epi32(0, 8, 16, 24));
        let largest = _mm512_castps512_ps128(_mm512_permutex2var_ps(largest[0], which, largest[1]));
        let zero = _mm_setzero_ps();
        let not_finite = _mm_fmadd_ps(head.d, zero, _mm_mul_ps(head.dmin, zero));
        _mm_storeu_ps(
            (&raw mut (*to).scales).cast(),
            _mm_fmadd_ps(largest, _mm_set1_ps(INVERSE_127), not_finite),
        );
        let some = _mm_cmp_ps_mask::<_CMP_GT_OQ>(largest, zero);
        let inverse = _mm_maskz_div_ps(some, _mm_set1_ps(127.0 * ONE), largest);
        for h in 0..2 {
            let inverse = per_block(inverse, h);
            let steps = _mm512_mul_ps(ends[h][0], inverse);
            let starts = _mm512_fmadd_ps(ends[h][1], inverse, _mm512_set1_ps(HALF));
            let words = |x| _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x));
            _mm256_storeu_si256((&raw mut (*to).steps).cast::<__m256i>().add(h), words(steps));
            let starts = _mm256_xor_si256(words(starts), _mm256_set1_epi16(i16::MIN));
            _mm256_storeu_si256((&raw mut (*to).starts).cast::<__m256i>().add(h), starts);
        }
    }

    /// Stores the codes of block `i` of the four, at `p`, with their bias less `minus`, and returns its scale.
    #[inline(always)]
    pub unsafe fn codes(this: *const Self, i: usize, p: *const u8, codes: *mut u8, minus: u8) -> f32 {
        let eight = |of: *const [u16; 8]| _mm512_broadcast_i32x4(_mm_loadu_si128(of.add(i).cast()));
        let (steps, starts) =
            (eight((&raw const (*this).steps).cast()), eight((&raw const (*this).starts).cast()));
        // 128 bits are the table of a sub-block.
        let tables = each!([_mm512_setzero_si512(); 2], h => {
            let quarter = |j: i64| (0x0101_0101_0101_0101 * 2 * (4 * h as i64 + j)) + 0x0100_0100_0100_0100;
            let which = _mm512_setr_epi64(
                quarter(0), quarter(0), quarter(1), quarter(1), quarter(2), quarter(2), quarter(3), quarter(3),
            );
            let (step, start) = (_mm512_shuffle_epi8(steps, which), _mm512_shuffle_epi8(starts, which));
            let first = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
            let low = _mm512_add_epi16(_mm512_mullo_epi16(first, step), start);
            let high = _mm512_add_epi16(low, _mm512_slli_epi16::<3>(step));
            _mm512_packus_epi16(_mm512_srli_epi16::<8>(low), _mm512_srli_epi16::<8>(high))
        });
        let shifts = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(4));
        for v in 0..4 {
            // The low nibbles of 32 bytes are a sub-block, the high ones the next.
            let bytes = _mm256_loadu_si256(p.add(q4_k::QS + 32 * v).cast());
            let shifted = _mm512_srlv_epi16(_mm512_broadcast_i64x4(bytes), shifts);
            let sub = (2 * v % 4 * 16) as i8;
            let table = _mm512_inserti64x4::<1>(_mm512_set1_epi8(sub), _mm256_set1_epi8(sub + 16));
            // table | shifted & 15
            let which = _mm512_ternarylogic_epi32::<0xf8>(table, shifted, _mm512_set1_epi8(15));
            let of_subs = _mm512_permutexvar_epi8(which, tables[v / 2]);
            let of_subs = _mm512_sub_epi8(of_subs, _mm512_set1_epi8(minus as i8));
            _mm512_storeu_si512(codes.add(64 * v).cast(), of_subs);
        }
        (*this).scales[i]
    }
}

/// Blocks `2 h` and `2 h + 1` of four, in eight lanes each.
#[inline(always)]
unsafe fn per_block(x: __m128, h: usize) -> __m512 {
    let which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    let which = _mm512_add_epi32(which, _mm512_set1_epi32(2 * h as i32));
    _mm512_permutexvar_ps(which, _mm512_castps128_ps512(x))
}

/// Sixteen of 32 numbers.
#[inline(always)]
unsafe fn floats(x: __m512i, h: usize) -> __m512 {
    let half = if h == 0 { _mm512_castsi512_si256(x) } else { _mm512_extracti64x4_epi64::<1>(x) };
    _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half))
}

/// The largest of the lower eight lanes in all of these, and of the upper.
#[inline(always)]
unsafe fn largest_of_eight(x: __m512) -> __m512 {
    let x = _mm512_max_ps(x, _mm512_shuffle_f32x4::<0xb1>(x, x));
    let x = _mm512_max_ps(x, _mm512_permute_ps::<0x4e>(x));
    _mm512_max_ps(x, _mm512_permute_ps::<0xb1>(x))
}
