//! Q4_K as int8, see `kernels/as_int8.rs`: tables for four blocks at a time, then codes 64 at a time.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for pointers to whole blocks and for the instruction set

use super::wide::{Head, Wide};
use crate::kernels::as_int8::{HALF, INVERSE_127, ONE};
use crate::kernels::x86::few::FOUR;
use crate::kernels::x86::panel::{Format, Rows};
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
    const STEPS: usize = Self::PREPARING + 2 * FOUR;
    const PREPARING: usize = 4;

    #[inline(always)]
    unsafe fn expand(step: usize, rows: &Rows, minus: u8, tables: *mut Tables) {
        match step {
            0 => Tables::read(tables, &rows.blocks),
            1 | 2 => Tables::measure(tables, step - 1),
            3 => Tables::finish(tables),
            _ => {
                let (i, half) = ((step - 4) / 2, step % 2);
                let to = rows.to.behind(i);
                Tables::codes(tables, i, half, rows.blocks[i], to.codes, minus);
                if half == 0 {
                    *to.scales = (*tables).scales[i];
                }
            }
        }
    }
}

/// Four blocks' tables, and what they are made from. Whatever is per sub-block is [block][sub-block].
#[repr(C, align(64))]
pub(in crate::kernels::x86) struct Tables {
    head: Head,
    /// Of two blocks each.
    ends: [Ends; 2],
    /// 16 bits each, of two blocks each.
    steps: [__m256i; 2],
    /// Likewise, with a bias of 128 codes, as vpdpbusd takes them unsigned.
    starts: [__m256i; 2],
    scales: [f32; FOUR],
}

/// What the sub-blocks of two blocks express, eight lanes each.
#[derive(Clone, Copy)]
struct Ends {
    /// From a code to the next.
    step: __m512,
    /// Code 0.
    start: __m512,
    /// The largest magnitude of each block, in eight lanes.
    largest: __m512,
}

/// Each is a step of an expansion; the last is taken for every half of every block.
impl Tables {
    /// Reads scales and minimums of the blocks at `p`.
    #[inline(always)]
    unsafe fn read(this: *mut Self, p: &[*const u8; FOUR]) {
        (*this).head = Q4K::head(p);
    }

    /// What blocks `2 h` and `2 h + 1` express.
    #[inline(always)]
    unsafe fn measure(this: *mut Self, h: usize) {
        let head = &(*this).head;
        let minus_dmin = _mm_sub_ps(_mm_setzero_ps(), head.dmin);
        let step = _mm512_mul_ps(floats(head.scales[0], h), per_block(head.d, h));
        let start = _mm512_mul_ps(floats(head.mins[0], h), per_block(minus_dmin, h));
        let last = _mm512_fmadd_ps(step, _mm512_set1_ps(15.0), start);
        let largest = largest_of_eight(_mm512_max_ps(_mm512_abs_ps(last), _mm512_abs_ps(start)));
        (*this).ends[h] = Ends { step, start, largest };
    }

    /// The blocks' scales, and the tables in fixed point.
    #[inline(always)]
    unsafe fn finish(this: *mut Self) {
        let (head, ends) = (&(*this).head, &(*this).ends);
        // Each block's eight lanes are the same: one lane of each.
        let which = _mm512_castsi128_si512(_mm_setr_epi32(0, 8, 16, 24));
        let largest = _mm512_permutex2var_ps(ends[0].largest, which, ends[1].largest);
        let largest = _mm512_castps512_ps128(largest);
        let zero = _mm_setzero_ps();
        let not_finite = _mm_fmadd_ps(head.d, zero, _mm_mul_ps(head.dmin, zero));
        let scales = _mm_fmadd_ps(largest, _mm_set1_ps(INVERSE_127), not_finite);
        _mm_storeu_ps((&raw mut (*this).scales).cast(), scales);
        let some = _mm_cmp_ps_mask::<_CMP_GT_OQ>(largest, zero);
        let inverse = _mm_maskz_div_ps(some, _mm_set1_ps(127.0 * ONE), largest);
        for h in 0..2 {
            let inverse = per_block(inverse, h);
            let steps = _mm512_mul_ps(ends[h].step, inverse);
            let starts = _mm512_fmadd_ps(ends[h].start, inverse, _mm512_set1_ps(HALF));
            let words = |x| _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x));
            (*this).steps[h] = words(steps);
            (*this).starts[h] = _mm256_xor_si256(words(starts), _mm256_set1_epi16(i16::MIN));
        }
    }

    /// Stores a half of the codes of block `i` of the four, at `p`, with their bias less `minus`.
    #[inline(always)]
    unsafe fn codes(this: *const Self, i: usize, half: usize, p: *const u8, codes: *mut u8, minus: u8) {
        let eight =
            |of: *const [__m256i; 2]| _mm512_broadcast_i32x4(_mm_load_si128(of.cast::<__m128i>().add(i)));
        let (steps, starts) = (eight(&raw const (*this).steps), eight(&raw const (*this).starts));
        // 128 bits are the table of a sub-block; four of them are this half's.
        let of_subs =
            _mm512_add_epi8(_mm512_loadu_si512(WORDS.as_ptr().cast()), _mm512_set1_epi8(8 * half as i8));
        let (step, start) = (_mm512_shuffle_epi8(steps, of_subs), _mm512_shuffle_epi8(starts, of_subs));
        let first = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
        let low = _mm512_add_epi16(_mm512_mullo_epi16(first, step), start);
        let high = _mm512_add_epi16(low, _mm512_slli_epi16::<3>(step));
        let tables = _mm512_packus_epi16(_mm512_srli_epi16::<8>(low), _mm512_srli_epi16::<8>(high));
        let shifts = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(4));
        for v in 0..2 {
            // The low nibbles of 32 bytes are a sub-block, the high ones the next.
            let bytes = _mm256_loadu_si256(p.add(q4_k::QS + 64 * half + 32 * v).cast());
            let shifted = _mm512_srlv_epi16(_mm512_broadcast_i64x4(bytes), shifts);
            let sub = (2 * v * 16) as i8;
            let table = _mm512_inserti64x4::<1>(_mm512_set1_epi8(sub), _mm256_set1_epi8(sub + 16));
            // table | shifted & 15
            let which = _mm512_ternarylogic_epi32::<0xf8>(table, shifted, _mm512_set1_epi8(15));
            let of_subs = _mm512_permutexvar_epi8(which, tables);
            let of_subs = _mm512_sub_epi8(of_subs, _mm512_set1_epi8(minus as i8));
            _mm512_storeu_si512(codes.add(128 * half + 64 * v).cast(), of_subs);
        }
    }
}

/// The first four of eight words, each eight times.
const WORDS: [u8; 64] = {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        out[i] = (i / 16 * 2 + i % 2) as u8;
        i += 1;
    }
    out
};

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
