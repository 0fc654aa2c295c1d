//! What plain loops over lanes cannot say, in instructions of SSE2, AVX2 and AVX-512: candidates go together, and from AVX2 on
//! codes are limited without the pipes that add floats.

use std::arch::x86_64::*;

use super::affine::{Fit, Known, Pair, Ruler, Sums};
use super::grid::{Bins, Grid};
use super::signed::SignedSums;
use super::{Lanes, MAGIC, Sub, limit, low_byte};

/// As many floats as an instruction set takes at once.
trait Vector: Copy {
    const ZERO: Self;
    unsafe fn load<const L: usize>(lanes: &Lanes<L>) -> Self;
    unsafe fn store<const L: usize>(self, lanes: &mut Lanes<L>);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// The nearest integers, ties to even.
    unsafe fn round(self) -> Self;
    /// Limited to `lo ..= hi`, NaN to `hi`.
    unsafe fn limit(self, lo: f32, hi: f32) -> Self;
    /// The nearest number of two, of the bin that each float is in; the floats are within what bins are for.
    unsafe fn look_up(self, bins: &Bins) -> Self;
}

macro_rules! vector {
    ($v:ident of $lanes:literal, $load:ident $store:ident $add:ident $sub:ident $mul:ident $round:ident $splat:ident
        $min:ident $max:ident $look_up:ident) => {
        impl Vector for $v {
            // SAFETY: any bits are floats.
            const ZERO: Self = unsafe { std::mem::zeroed() };
            #[inline(always)]
            unsafe fn load<const L: usize>(lanes: &Lanes<L>) -> Self {
                assert!(L == $lanes);
                // SAFETY: there are so many lanes, and the caller has the features; so below.
                unsafe { $load(lanes.as_ptr()) }
            }
            #[inline(always)]
            unsafe fn store<const L: usize>(self, lanes: &mut Lanes<L>) {
                assert!(L == $lanes);
                // SAFETY: see above.
                unsafe { $store(lanes.as_mut_ptr(), self) };
            }
            #[inline(always)]
            unsafe fn add(self, b: Self) -> Self {
                // SAFETY: see above.
                unsafe { $add(self, b) }
            }
            #[inline(always)]
            unsafe fn sub(self, b: Self) -> Self {
                // SAFETY: see above.
                unsafe { $sub(self, b) }
            }
            #[inline(always)]
            unsafe fn mul(self, b: Self) -> Self {
                // SAFETY: see above.
                unsafe { $mul(self, b) }
            }
            #[inline(always)]
            unsafe fn round(self) -> Self {
                // SAFETY: see above.
                unsafe { $round::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
            }
            #[inline(always)]
            unsafe fn limit(self, lo: f32, hi: f32) -> Self {
                // SAFETY: see above.
                unsafe { $max($min(self, $splat(hi)), $splat(lo)) }
            }
            #[inline(always)]
            unsafe fn look_up(self, bins: &Bins) -> Self {
                // SAFETY: see above.
                unsafe { $look_up(self, bins) }
            }
        }
    };
}

vector!(__m128 of 4, _mm_loadu_ps _mm_storeu_ps _mm_add_ps _mm_sub_ps _mm_mul_ps round_of_sse2
    _mm_set1_ps _mm_min_ps _mm_max_ps look_up_4);
vector!(__m256 of 8, _mm256_loadu_ps _mm256_storeu_ps _mm256_add_ps _mm256_sub_ps _mm256_mul_ps _mm256_round_ps
    _mm256_set1_ps _mm256_min_ps _mm256_max_ps look_up_8);
vector!(__m512 of 16, _mm512_loadu_ps _mm512_storeu_ps _mm512_add_ps _mm512_sub_ps _mm512_mul_ps _mm512_roundscale_ps
    _mm512_set1_ps _mm512_min_ps _mm512_max_ps look_up_16);

/// [`super::round`]; there is no instruction for it, and no other mode.
#[inline(always)]
unsafe fn round_of_sse2<const MODE: i32>(x: __m128) -> __m128 {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_sub_ps(_mm_add_ps(x, _mm_set1_ps(MAGIC)), _mm_set1_ps(MAGIC)) }
}

/// [`Vector::look_up`]; SSE2 has no table, hence one float after the other.
#[inline(always)]
unsafe fn look_up_4(t: __m128, bins: &Bins) -> __m128 {
    let one = |t: __m128| {
        // SAFETY: SSE2 is part of x86-64.
        let t = unsafe { _mm_cvtss_f32(t) };
        let place = low_byte(t * bins.scale + bins.offset) as usize & 15;
        // No branch: it would be guessed wrong every other time.
        [&bins.larger, &bins.smaller][usize::from(t < bins.middle[place])][place]
    };
    // SAFETY: as above.
    unsafe {
        _mm_setr_ps(
            one(t),
            one(_mm_shuffle_ps::<1>(t, t)),
            one(_mm_shuffle_ps::<2>(t, t)),
            one(_mm_shuffle_ps::<3>(t, t)),
        )
    }
}

/// [`Vector::look_up`]; a table of eight for the bins from 0 on, another for those below.
#[inline(always)]
unsafe fn look_up_8(t: __m256, bins: &Bins) -> __m256 {
    // SAFETY: the caller has AVX2; eight floats are read from the halves of sixteen.
    unsafe {
        let bin = t.mul(_mm256_set1_ps(bins.scale)).add(_mm256_set1_ps(bins.offset));
        let bin = _mm256_cvtps_epi32(bin);
        let of_bin = |table: &[f32; 16]| {
            let from_0 = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr()), bin);
            let below = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table[8..].as_ptr()), bin);
            _mm256_blendv_ps(from_0, below, _mm256_castsi256_ps(bin))
        };
        let smaller = _mm256_cmp_ps::<_CMP_LT_OQ>(t, of_bin(&bins.middle));
        _mm256_blendv_ps(of_bin(&bins.larger), of_bin(&bins.smaller), smaller)
    }
}

/// [`Vector::look_up`].
#[inline(always)]
unsafe fn look_up_16(t: __m512, bins: &Bins) -> __m512 {
    // SAFETY: the caller has AVX-512; the tables have sixteen floats.
    unsafe {
        let bin = t.mul(_mm512_set1_ps(bins.scale)).add(_mm512_set1_ps(bins.offset));
        let bin = _mm512_cvtps_epi32(bin);
        let table = |floats: &[f32; 16]| __m512::load(floats);
        let smaller = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(t, _mm512_permutexvar_ps(bin, table(&bins.middle)));
        let larger = _mm512_permutexvar_ps(bin, table(&bins.larger));
        _mm512_mask_permutexvar_ps(larger, smaller, bin, table(&bins.smaller))
    }
}

/// The numbers of a grid that are nearest.
#[inline(always)]
unsafe fn nearest<V: Vector, G: Grid>(t: V) -> V {
    // SAFETY: the caller has the features of the vectors.
    unsafe {
        match G::BINS {
            None => t.round().limit(G::LOW, G::HIGH),
            Some(bins) => t.limit(bins.least, bins.most).look_up(bins),
        }
    }
}

/// A way to the nearest codes, ties to even.
trait Nearest<V>: Copy {
    /// The codes of numbers. Call it with the features of the vectors.
    unsafe fn codes(self, numbers: V) -> V;
}

/// Looks integers up in a table that goes on beyond the codes at both ends. One instruction then limits an integer and makes
/// a float of it.
#[derive(Clone, Copy)]
struct Table {
    /// Codes of the integers 0 to 15.
    low: __m512,
    /// Codes of the integers 16 to 23, then those of -8 to -1: the place of an integer is its low five bits.
    high: __m512,
}

impl Table {
    /// The table has the codes of numbers between these.
    const LEAST: f32 = -8.5;
    const MOST: f32 = 23.5;
    /// The largest code that finds room.
    const N_MAX: f32 = 15.0;

    /// For codes `0 ..= n_max`.
    #[inline(always)]
    unsafe fn to(n_max: f32) -> Self {
        let (mut low, mut high) = ([0.0; 16], [0.0; 16]);
        for i in 0..16 {
            low[i] = limit(i as f32, 0.0, n_max);
            high[i] = if i < 8 { n_max } else { 0.0 };
        }
        // SAFETY: the caller has the features.
        unsafe { Self { low: __m512::load(&low), high: __m512::load(&high) } }
    }

    /// Whether it has the codes of all weights with each of these rulers.
    #[inline(always)]
    unsafe fn reaches<const C: usize, const L: usize>(
        known: &Known<L>,
        rulers: &[Ruler<L>; C],
        n_max: f32,
    ) -> bool {
        if n_max > Self::N_MAX {
            return false;
        }
        let mut reaches = u16::MAX;
        // SAFETY: the caller has the features and `L` is 16.
        unsafe {
            // Not to stop at the first that it does not reach keeps the loop free of branches.
            for ruler in rulers {
                let (min, inverse) = (__m512::load(&ruler.min), __m512::load(&ruler.inverse));
                // Larger weights have larger numbers, so that the ends speak for all.
                let least = __m512::load(&known.lo).add(min).mul(inverse);
                let most = __m512::load(&known.hi).add(min).mul(inverse);
                reaches &= _mm512_cmp_ps_mask::<_CMP_GT_OQ>(least, _mm512_set1_ps(Self::LEAST))
                    & _mm512_cmp_ps_mask::<_CMP_LT_OQ>(most, _mm512_set1_ps(Self::MOST));
            }
        }
        reaches == u16::MAX
    }
}

impl Nearest<__m512> for Table {
    #[inline(always)]
    unsafe fn codes(self, numbers: __m512) -> __m512 {
        // SAFETY: the caller has the features.
        unsafe { _mm512_permutex2var_ps(self.low, _mm512_cvtps_epi32(numbers), self.high) }
    }
}

/// Rounds, and limits the bits as integers: floats that are not negative are ordered as their bits are, and integers leave
/// the pipes free that add floats.
#[derive(Clone, Copy)]
struct Limit {
    /// The bits of the largest code.
    n_max: i32,
}

impl Limit {
    /// For codes `0 ..= n_max`.
    #[inline(always)]
    fn to(n_max: f32) -> Self {
        Self { n_max: n_max.to_bits() as i32 }
    }
}

impl Nearest<__m128> for Limit {
    /// As floats: SSE2 has no minimum of integers.
    #[inline(always)]
    unsafe fn codes(self, numbers: __m128) -> __m128 {
        // SAFETY: the caller has the features.
        unsafe { numbers.round().limit(0.0, f32::from_bits(self.n_max as u32)) }
    }
}

impl Nearest<__m512> for Limit {
    #[inline(always)]
    unsafe fn codes(self, numbers: __m512) -> __m512 {
        // SAFETY: the caller has the features.
        unsafe {
            let bits = _mm512_castps_si512(numbers.round());
            let bits = _mm512_min_epi32(bits, _mm512_set1_epi32(self.n_max));
            _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_setzero_si512()))
        }
    }
}

impl Nearest<__m256> for Limit {
    #[inline(always)]
    unsafe fn codes(self, numbers: __m256) -> __m256 {
        // SAFETY: the caller has the features.
        unsafe {
            let bits = _mm256_castps_si256(numbers.round());
            let bits = _mm256_min_epi32(bits, _mm256_set1_epi32(self.n_max));
            _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_setzero_si256()))
        }
    }
}

/// What `$call` is with the vectors `$v` that have `$lanes` lanes.
macro_rules! by_lanes {
    ($lanes:expr, $v:ident => $call:expr) => {
        match $lanes {
            4 => {
                type $v = __m128;
                $call
            }
            8 => {
                type $v = __m256;
                $call
            }
            _ => {
                type $v = __m512;
                $call
            }
        }
    };
}

/// The passes over a sub-block. That there are any says that `L` is 4, 8 or 16, of which the latter are for `isa::avx2` and
/// `isa::avx512` alone, and so that the features are there.
pub struct Passes<const L: usize>(());

impl<const L: usize> Passes<L> {
    /// The passes, if as many lanes go together as a vector has.
    #[inline(always)]
    pub fn get() -> Option<Self> {
        matches!(L, 4 | 8 | 16).then_some(Self(()))
    }

    /// `Sub::affine_sums`.
    #[inline(always)]
    pub fn sums<const N: usize, const C: usize>(
        &self,
        sub: &Sub<N, L>,
        known: &Known<L>,
        rulers: &[Ruler<L>; C],
        shifted: Option<&[Lanes<L>; N]>,
        n_max: f32,
    ) -> [Sums<L>; C] {
        // SAFETY: there are passes, hence the features for so many lanes.
        unsafe {
            if L == 16 && Table::reaches(known, rulers, n_max) {
                return sums::<__m512, N, C, L>(sub, rulers, shifted, Table::to(n_max));
            }
            by_lanes!(L, V => sums::<V, N, C, L>(sub, rulers, shifted, Limit::to(n_max)))
        }
    }

    /// `Sub::affine_errors`.
    #[inline(always)]
    pub fn errors<const N: usize, const F: usize, const C: usize>(
        &self,
        sub: &Sub<N, L>,
        known: &Known<L>,
        fits: &[Fit<L>; F],
        rulers: &[Ruler<L>; F],
        pairs: &[Pair; C],
        n_max: f32,
    ) -> [Lanes<L>; C] {
        let mut tried = [rulers[0]; C];
        for (tried, &(i, k)) in tried.iter_mut().zip(pairs) {
            *tried = rulers[i].at(&rulers[k]);
        }
        // SAFETY: as above.
        unsafe {
            if L == 16 && Table::reaches(known, &tried, n_max) {
                return errors::<__m512, N, F, C, L>(sub, fits, rulers, pairs, Table::to(n_max));
            }
            by_lanes!(L, V => errors::<V, N, F, C, L>(sub, fits, rulers, pairs, Limit::to(n_max)))
        }
    }

    /// `Sub::signed_sums`.
    #[inline(always)]
    pub fn signed_sums<G: Grid, const N: usize, const C: usize>(
        &self,
        sub: &Sub<N, L>,
        inverses: &[Lanes<L>; C],
    ) -> [SignedSums<L>; C] {
        // SAFETY: as above.
        unsafe { by_lanes!(L, V => signed_sums::<V, G, N, C, L>(sub, inverses)) }
    }

    /// `Sub::signed_errors`.
    #[inline(always)]
    pub fn signed_errors<G: Grid, const N: usize, const C: usize>(
        &self,
        sub: &Sub<N, L>,
        scales: &[Lanes<L>; C],
        inverses: &[Lanes<L>; C],
    ) -> [Lanes<L>; C] {
        // SAFETY: as above.
        unsafe { by_lanes!(L, V => signed_errors::<V, G, N, C, L>(sub, scales, inverses)) }
    }
}

#[inline(always)]
unsafe fn sums<V: Vector, const N: usize, const C: usize, const L: usize>(
    sub: &Sub<N, L>,
    rulers: &[Ruler<L>; C],
    shifted: Option<&[Lanes<L>; N]>,
    nearest: impl Nearest<V>,
) -> [Sums<L>; C] {
    let mut sums = [Sums::ZERO; C];
    // SAFETY: the caller has the features of the vectors, which have `L` lanes.
    unsafe {
        let (mut wq, mut wqq, mut wqx) = ([V::ZERO; C], [V::ZERO; C], [V::ZERO; C]);
        for i in 0..N {
            let (x, w) = (V::load(&sub.x[i]), V::load(&sub.w[i]));
            for c in 0..C {
                let y = match shifted {
                    Some(y) => V::load(&y[i]),
                    None => x.add(V::load(&rulers[c].min)),
                };
                let q = nearest.codes(y.mul(V::load(&rulers[c].inverse)));
                let product = w.mul(q);
                wq[c] = wq[c].add(product);
                wqq[c] = wqq[c].add(product.mul(q));
                wqx[c] = wqx[c].add(product.mul(x));
            }
        }
        for c in 0..C {
            wq[c].store(&mut sums[c].wq);
            wqq[c].store(&mut sums[c].wqq);
            wqx[c].store(&mut sums[c].wqx);
        }
    }
    sums
}

/// What pairs have in common is calculated once.
#[inline(always)]
unsafe fn errors<V: Vector, const N: usize, const F: usize, const C: usize, const L: usize>(
    sub: &Sub<N, L>,
    fits: &[Fit<L>; F],
    rulers: &[Ruler<L>; F],
    pairs: &[Pair; C],
    nearest: impl Nearest<V>,
) -> [Lanes<L>; C] {
    let mut errors = [[0.0; L]; C];
    // SAFETY: the caller has the features of the vectors, which have `L` lanes.
    unsafe {
        let mut sums = [V::ZERO; C];
        for i in 0..N {
            let (x, w) = (V::load(&sub.x[i]), V::load(&sub.w[i]));
            let mut y = [x; F];
            for f in 0..F {
                y[f] = x.add(V::load(&rulers[f].min));
            }
            for c in 0..C {
                let (f, k) = pairs[c];
                let q = nearest.codes(y[k].mul(V::load(&rulers[f].inverse)));
                let e = y[k].sub(V::load(&fits[f].scale).mul(q));
                sums[c] = sums[c].add(w.mul(e.mul(e)));
            }
        }
        for c in 0..C {
            sums[c].store(&mut errors[c]);
        }
    }
    errors
}

#[inline(always)]
unsafe fn signed_sums<V: Vector, G: Grid, const N: usize, const C: usize, const L: usize>(
    sub: &Sub<N, L>,
    inverses: &[Lanes<L>; C],
) -> [SignedSums<L>; C] {
    let mut sums = [SignedSums::ZERO; C];
    // SAFETY: the caller has the features of the vectors, which have `L` lanes.
    unsafe {
        let (mut wgx, mut wgg) = ([V::ZERO; C], [V::ZERO; C]);
        for i in 0..N {
            let (x, w) = (V::load(&sub.x[i]), V::load(&sub.w[i]));
            for c in 0..C {
                let g = nearest::<V, G>(x.mul(V::load(&inverses[c])));
                let product = w.mul(g);
                wgx[c] = wgx[c].add(product.mul(x));
                wgg[c] = wgg[c].add(product.mul(g));
            }
        }
        for c in 0..C {
            wgx[c].store(&mut sums[c].wgx);
            wgg[c].store(&mut sums[c].wgg);
        }
    }
    sums
}

#[inline(always)]
unsafe fn signed_errors<V: Vector, G: Grid, const N: usize, const C: usize, const L: usize>(
    sub: &Sub<N, L>,
    scales: &[Lanes<L>; C],
    inverses: &[Lanes<L>; C],
) -> [Lanes<L>; C] {
    let mut errors = [[0.0; L]; C];
    // SAFETY: the caller has the features of the vectors, which have `L` lanes.
    unsafe {
        let mut sums = [V::ZERO; C];
        for i in 0..N {
            let (x, w) = (V::load(&sub.x[i]), V::load(&sub.w[i]));
            for c in 0..C {
                let g = nearest::<V, G>(x.mul(V::load(&inverses[c])));
                let e = x.sub(V::load(&scales[c]).mul(g));
                sums[c] = sums[c].add(w.mul(e.mul(e)));
            }
        }
        for c in 0..C {
            sums[c].store(&mut errors[c]);
        }
    }
    errors
}

/// Puts rows `0 .. 16` side by side. Each step interleaves pieces that are twice as long as those of the step before:
/// floats, pairs of them, then quarters of the vectors twice. Nothing happens unless `L` is 16.
#[inline(always)]
pub fn transpose<'a, const L: usize>(row: impl Fn(usize) -> &'a [f32; 16], lanes: &mut [Lanes<L>; 16]) {
    if L != 16 {
        return;
    }
    // SAFETY: the arrays have sixteen floats; sixteen lanes are for `isa::avx512` alone, which has the features.
    unsafe {
        let zero = _mm512_setzero_ps();
        let (mut pairs, mut fours) = ([zero; 16], [zero; 16]);
        for i in (0..16).step_by(2) {
            let (a, b) = (__m512::load(row(i)), __m512::load(row(i + 1)));
            pairs[i] = _mm512_unpacklo_ps(a, b);
            pairs[i + 1] = _mm512_unpackhi_ps(a, b);
        }
        for i in (0..16).step_by(4) {
            for half in 0..2 {
                let (a, b) = (_mm512_castps_pd(pairs[i + half]), _mm512_castps_pd(pairs[i + 2 + half]));
                fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        // Quarter q of fours[i + c] has column 4 q + c of rows i .. i + 4.
        for c in 0..4 {
            let (a, b, d, e) = (fours[c], fours[4 + c], fours[8 + c], fours[12 + c]);
            let even = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(d, e));
            let odd = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(d, e));
            _mm512_shuffle_f32x4::<0x88>(even.0, even.1).store(&mut lanes[c]);
            _mm512_shuffle_f32x4::<0x88>(odd.0, odd.1).store(&mut lanes[4 + c]);
            _mm512_shuffle_f32x4::<0xdd>(even.0, even.1).store(&mut lanes[8 + c]);
            _mm512_shuffle_f32x4::<0xdd>(odd.0, odd.1).store(&mut lanes[12 + c]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::grid::Iq4;
    use super::*;
    use crate::isa::Isa;

    fn check<V: Vector, const L: usize>(isa: Isa, nearest_of: unsafe fn(V) -> V) {
        if !isa.supported() {
            return;
        }
        // Numbers at and close to everything that may be a midpoint, far from it, and none.
        let half_steps = (-300..300).map(|k| k as f32 / 2.0);
        let close =
            half_steps.flat_map(|t| (-40..=40).map(move |n| f32::from_bits((t.to_bits() as i32 + n) as u32)));
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38, 1e-40, -0.0];
        let numbers: Vec<f32> =
            close.chain(odd).chain((0..40_000).map(|i| i as f32 / 130.0 - 154.0)).collect();
        for numbers in numbers.as_chunks::<L>().0 {
            let mut found = [0.0; L];
            // SAFETY: the machine has the set, whose vectors have `L` lanes.
            unsafe { nearest_of(V::load(numbers)).store(&mut found) };
            assert_eq!(found, numbers.map(Iq4::nearest), "{isa:?}: {numbers:?}");
        }
    }

    #[test]
    fn bins_have_the_nearest_numbers() {
        #[target_feature(enable = "avx2")]
        unsafe fn avx2(t: __m256) -> __m256 {
            // SAFETY: the features are this function's.
            unsafe { nearest::<_, Iq4>(t) }
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        unsafe fn avx512(t: __m512) -> __m512 {
            // SAFETY: the features are this function's.
            unsafe { nearest::<_, Iq4>(t) }
        }
        check::<__m128, 4>(Isa::Baseline, nearest::<_, Iq4>);
        check::<__m256, 8>(Isa::Avx2, avx2);
        check::<__m512, 16>(Isa::Avx512, avx512);
    }
}
