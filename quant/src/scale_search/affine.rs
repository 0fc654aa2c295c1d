//! Codes without sign: `weight = scale * code - min`, codes `0 ..= n_max`.

// Sub-block j and lane l index several arrays at once.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
use super::vectors::Passes;
use super::{
    Codes, ErrorWeight, Lanes, STARTS, Sub, TINY, Tile, add, any_less, codes, integers, inverse, limit,
    low_byte, map, map2, mean_square, nearest, ratio, round, round_f16, start_factor, store, total,
};
use crate::codec::{Group, groups};

/// Candidates that are tried in one pass over a sub-block. A pass alone is short, and what it begins and ends with would
/// take as long as half of it.
const TOGETHER: usize = 3;

/// The most candidates of a search.
const MOST: usize = 39;

/// How far a scale and an offset of integers are moved, to see whether they are better there.
const STEPS: [f32; 3] = [-1.0, 0.0, 1.0];

/// A scale and an offset that are tried together, each by the number of the fit that it is of.
pub(super) type Pair = (usize, usize);

/// Those that are moved, by their steps, in the order in which they are tried.
const NEIGHBOURS: [Pair; 8] = [(0, 1), (2, 1), (1, 0), (1, 2), (0, 0), (2, 2), (0, 2), (2, 0)];

/// What a search tries.
#[derive(Clone, Copy)]
pub struct Search {
    /// Largest code.
    pub n_max: f32,
    /// The first candidate maps the range of the sub-block to `0 ..= n_max + first` codes ...
    pub first: f32,
    /// ... and each further one to this many more.
    pub step: f32,
    /// Number of candidates.
    pub n: usize,
    /// Whether `min` must not be negative (the K types store it without sign).
    pub min_not_negative: bool,
}

/// A scale and an offset per lane.
#[derive(Clone, Copy)]
pub struct Fit<const L: usize> {
    /// Distance between two codes; not negative.
    pub scale: Lanes<L>,
    /// What is subtracted.
    pub min: Lanes<L>,
}

/// How weights become codes, which are the nearest to `(x + min) * inverse`.
#[derive(Clone, Copy)]
pub(super) struct Ruler<const L: usize> {
    pub min: Lanes<L>,
    pub inverse: Lanes<L>,
}

impl<const L: usize> Ruler<L> {
    #[inline(always)]
    fn of(fit: &Fit<L>) -> Self {
        Self { min: fit.min, inverse: inverse(&fit.scale) }
    }

    /// The same with the offset of another.
    #[inline(always)]
    pub fn at(&self, other: &Self) -> Self {
        Self { min: other.min, ..*self }
    }
}

/// What is known of a sub-block before there are codes.
#[derive(Clone, Copy)]
pub(super) struct Known<const L: usize> {
    /// The smallest weight.
    pub lo: Lanes<L>,
    /// The largest.
    pub hi: Lanes<L>,
    /// Sum of the weights of the errors.
    w: Lanes<L>,
    /// Sum of `w x`.
    wx: Lanes<L>,
}

/// Sums over a sub-block for given codes q.
#[derive(Clone, Copy)]
pub(super) struct Sums<const L: usize> {
    pub wq: Lanes<L>,
    pub wqq: Lanes<L>,
    pub wqx: Lanes<L>,
}

impl<const L: usize> Sums<L> {
    pub const ZERO: Self = Self { wq: [0.0; L], wqq: [0.0; L], wqx: [0.0; L] };
}

impl<const N: usize, const L: usize> Sub<N, L> {
    /// The sums for the codes of each ruler. `shifted` is `x + min`, where that is the same for all of them.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // `known` is for tables
    #[inline(always)]
    fn affine_sums<const C: usize>(
        &self,
        known: &Known<L>,
        rulers: &[Ruler<L>; C],
        shifted: Option<&[Lanes<L>; N]>,
        n_max: f32,
    ) -> [Sums<L>; C] {
        #[cfg(target_arch = "x86_64")]
        if let Some(passes) = Passes::get() {
            return passes.sums(self, known, rulers, shifted, n_max);
        }
        let mut sums = [Sums::ZERO; C];
        for (i, (x, w)) in self.x.iter().zip(&self.w).enumerate() {
            for (s, Ruler { min, inverse }) in sums.iter_mut().zip(rulers) {
                for l in 0..L {
                    let y = shifted.map_or_else(|| x[l] + min[l], |y| y[i][l]);
                    let q = nearest(y * inverse[l], n_max);
                    let wq = w[l] * q;
                    s.wq[l] += wq;
                    s.wqq[l] += wq * q;
                    s.wqx[l] += wq * x[l];
                }
            }
        }
        sums
    }

    /// Weighted squared errors of each lane after rounding with the scale of one of these fits and the offset of another, for
    /// each of these pairs.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // `known` is for tables
    #[inline(always)]
    fn affine_errors<const F: usize, const C: usize>(
        &self,
        known: &Known<L>,
        fits: &[Fit<L>; F],
        pairs: &[Pair; C],
        n_max: f32,
    ) -> [Lanes<L>; C] {
        let mut rulers = [Ruler::of(&fits[0]); F];
        for f in 1..F {
            rulers[f] = Ruler::of(&fits[f]);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(passes) = Passes::get() {
            return passes.errors(self, known, fits, &rulers, pairs, n_max);
        }
        let mut errors = [[0.0; L]; C];
        // One after the other: together the compiler would take the fits as lanes.
        for (error, &(i, k)) in errors.iter_mut().zip(pairs) {
            let (scale, min) = (fits[i].scale, fits[k].min);
            *error = self.affine_error(&Fit { scale, min }, &rulers[i].at(&rulers[k]), n_max);
        }
        errors
    }

    #[inline(always)]
    fn affine_error(&self, fit: &Fit<L>, ruler: &Ruler<L>, n_max: f32) -> Lanes<L> {
        let mut error = [0.0; L];
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..L {
                let y = x[l] + ruler.min[l];
                let q = nearest(y * ruler.inverse[l], n_max);
                let e = y - fit.scale[l] * q;
                error[l] += w[l] * (e * e);
            }
        }
        error
    }

    /// The best scale and offset of each lane on its own: for each candidate scale and offset the codes, for the codes
    /// the least-squares scale and offset.
    #[inline(always)]
    fn affine_fit(&self, known: &Known<L>, search: &Search) -> Fit<L> {
        let mut lo = known.lo;
        if search.min_not_negative {
            lo = map(&lo, |v| if v < 0.0 { v } else { 0.0 });
        }
        let range = map2(&known.hi, &lo, |hi, lo| hi - lo);
        let mut inverses = [[0.0; L]; MOST];
        for (k, inverse) in inverses.iter_mut().enumerate().take(search.n.next_multiple_of(TOGETHER)) {
            let t = search.n_max + search.first + search.step * k as f32;
            store(inverse, map(&range, |r| ratio(t, r, TINY)));
        }
        let fit = Fit {
            scale: map(&range, |r| if r > TINY { r / search.n_max } else { 0.0 }),
            min: map(&lo, |v| -v),
        };
        let mut best = Best { fit, gain: [f32::NEG_INFINITY; L] };

        // First the smallest weight on code 0, so that none falls below it ...
        let mut above = self.x;
        for x in &mut above {
            let shifted = map2(x, &lo, |x, lo| x - lo);
            store(x, shifted);
        }
        for k in (0..search.n).step_by(TOGETHER) {
            let rulers = each!(c in [0 1 2] => Ruler { min: fit.min, inverse: inverses[k + c] });
            let sums = self.affine_sums(known, &rulers, Some(&above), search.n_max);
            each!(c in [0 1 2] => if k + c < search.n { best.offer(&sums[c], known, search) });
        }
        // ... then half a step below.
        for k in (0..search.n).step_by(TOGETHER) {
            let inverses = each!(c in [0 1 2] => inverses[k + c]);
            let mins = each!(c in [0 1 2] => map2(&inverses[c], &lo, |inverse, lo| {
                let half = 0.5 / inverse;
                let min = if inverse > 0.0 { -lo - half } else { -lo };
                if search.min_not_negative && min < 0.0 { 0.0 } else { min }
            }));
            let rulers = each!(c in [0 1 2] => Ruler { min: mins[c], inverse: inverses[c] });
            let sums = self.affine_sums(known, &rulers, None, search.n_max);
            each!(c in [0 1 2] => if k + c < search.n { best.offer(&sums[c], known, search) });
        }
        for _ in 0..2 {
            let [sums] = self.affine_sums(known, &[Ruler::of(&best.fit)], None, search.n_max);
            best.offer(&sums, known, search);
        }
        best.fit
    }

    /// What is known before there are codes.
    #[inline(always)]
    fn known(&self) -> Known<L> {
        let mut known = Known { lo: self.x[0], hi: self.x[0], w: [0.0; L], wx: [0.0; L] };
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..L {
                known.lo[l] = if x[l] < known.lo[l] { x[l] } else { known.lo[l] };
                known.hi[l] = if x[l] > known.hi[l] { x[l] } else { known.hi[l] };
                known.w[l] += w[l];
                known.wx[l] += w[l] * x[l];
            }
        }
        known
    }
}

/// The best fit so far and what it takes away from the sum of w x^2.
struct Best<const L: usize> {
    fit: Fit<L>,
    gain: Lanes<L>,
}

impl<const L: usize> Best<L> {
    /// Takes the least-squares fit for codes with these sums where it is better.
    #[inline(always)]
    fn offer(&mut self, s: &Sums<L>, t: &Known<L>, search: &Search) {
        let (mut scale, mut min) = ([0.0; L], [0.0; L]);
        for l in 0..L {
            let det = t.w[l] * s.wqq[l] - s.wq[l] * s.wq[l];
            scale[l] = (t.w[l] * s.wqx[l] - t.wx[l] * s.wq[l]) / det;
            min[l] = (s.wq[l] * s.wqx[l] - s.wqq[l] * t.wx[l]) / det;
        }
        if search.min_not_negative && any_less(&min, &[0.0; L]) {
            for l in 0..L {
                let without = s.wqx[l] / s.wqq[l];
                scale[l] = if min[l] < 0.0 { without } else { scale[l] };
                min[l] = if min[l] < 0.0 { 0.0 } else { min[l] };
            }
        }
        for l in 0..L {
            // NaN, which compares false, where the codes are all equal.
            let gain = scale[l] * (2.0 * s.wqx[l] - scale[l] * s.wqq[l] + 2.0 * min[l] * s.wq[l])
                - min[l] * (2.0 * t.wx[l] + min[l] * t.w[l]);
            let better = (gain > self.gain[l]) & (scale[l] > 0.0);
            self.gain[l] = if better { gain } else { self.gain[l] };
            self.fit.scale[l] = if better { scale[l] } else { self.fit.scale[l] };
            self.fit.min[l] = if better { min[l] } else { self.fit.min[l] };
        }
    }
}

/// Blocks of the K types: `scale = d * sc`, `min = dmin * m` with small integers `sc` and `m` per sub-block.
#[derive(Clone, Copy)]
pub struct Blocks<const S: usize, const L: usize> {
    /// Scale of the scales, as f16 stores it.
    pub d: Lanes<L>,
    /// Scale of the offsets, as f16 stores it.
    pub dmin: Lanes<L>,
    /// Integer scales.
    pub sc: [Lanes<L>; S],
    /// Integer offsets.
    pub m: [Lanes<L>; S],
}

impl<const S: usize, const L: usize> Blocks<S, L> {
    /// The scale and offset of sub-block j.
    #[inline(always)]
    fn fit(&self, j: usize) -> Fit<L> {
        fit_of(&self.d, &self.dmin, &self.sc[j], &self.m[j])
    }

    /// The same with another `d` and the integers `0 ..= sub_max` that come closest to these scales with it.
    #[inline(always)]
    fn with_d(&self, d: &Lanes<L>, fits: &[Fit<L>; S], sub_max: f32) -> Self {
        let mut blocks = Blocks { d: round_f16(d), ..*self };
        let inverse = inverse(&blocks.d);
        for (sc, fit) in blocks.sc.iter_mut().zip(fits) {
            *sc = integers(&fit.scale, &inverse, 0.0, sub_max);
        }
        blocks
    }

    /// The same with another `dmin`.
    #[inline(always)]
    fn with_dmin(&self, dmin: &Lanes<L>, fits: &[Fit<L>; S], sub_max: f32) -> Self {
        let mut blocks = Blocks { dmin: round_f16(dmin), ..*self };
        let inverse = inverse(&blocks.dmin);
        for (m, fit) in blocks.m.iter_mut().zip(fits) {
            *m = integers(&fit.min, &inverse, 0.0, sub_max);
        }
        blocks
    }

    /// The codes of the blocks that these were found for, with sub-blocks of `N` weights.
    #[inline(always)]
    pub fn codes<const N: usize, const LEN: usize>(
        &self,
        blocks: &[[f32; LEN]],
        n_max: f32,
    ) -> Codes<LEN, L> {
        let mut fits = [self.fit(0); S];
        for j in 1..S {
            fits[j] = self.fit(j);
        }
        codes_of::<N, S, LEN, L>(blocks, &fits, n_max)
    }
}

#[inline(always)]
fn fit_of<const L: usize>(d: &Lanes<L>, dmin: &Lanes<L>, sc: &Lanes<L>, m: &Lanes<L>) -> Fit<L> {
    Fit { scale: map2(d, sc, |d, sc| d * sc), min: map2(dmin, m, |dmin, m| dmin * m) }
}

impl<const N: usize, const S: usize, const L: usize> Tile<N, S, L> {
    /// Fits blocks whose integer scales and offsets are `0 ..= sub_max`.
    #[inline(always)]
    pub fn affine_blocks(&self, search: &Search, sub_max: f32) -> Blocks<S, L> {
        let mut fits = [Fit { scale: [0.0; L], min: [0.0; L] }; S];
        let mut known = [self.0[0].known(); S];
        let (mut top_scale, mut top_min) = ([0.0; L], [0.0; L]);
        for j in 0..S {
            known[j] = self.0[j].known();
            fits[j] = self.0[j].affine_fit(&known[j], search);
            raise(&mut top_scale, &fits[j].scale);
            raise(&mut top_min, &fits[j].min);
        }
        let (d, dmin) = (map(&top_scale, |v| v / sub_max), map(&top_min, |v| v / sub_max));
        let zero = Blocks { d: [0.0; L], dmin: [0.0; L], sc: [[0.0; L]; S], m: [[0.0; L]; S] };
        let mut blocks = zero.with_d(&d, &fits, sub_max).with_dmin(&dmin, &fits, sub_max);
        let mut error = [[0.0; L]; S];
        for j in 0..S {
            [error[j]] = self.0[j].affine_errors(&known[j], &[blocks.fit(j)], &[(0, 0)], search.n_max);
        }
        for k in 1..STARTS {
            let factor = start_factor(k, sub_max);
            // Both trials start from the same blocks.
            let trials = [
                blocks.with_d(&map(&d, |d| d * factor), &fits, sub_max),
                blocks.with_dmin(&map(&dmin, |dmin| dmin * factor), &fits, sub_max),
            ];
            self.keep_better(&trials, &mut blocks, &mut error, &known, search.n_max);
        }
        for round in 0..3 {
            self.improve_integers(&mut blocks, &mut error, &known, search.n_max, sub_max);
            if round < 2 {
                self.improve_d(&mut blocks, &mut error, &known, search.n_max);
            }
        }
        blocks
    }

    /// Replaces the blocks for which a trial as a whole is better; of several that are, by the best, and the first of those.
    #[inline(always)]
    fn keep_better<const C: usize>(
        &self,
        trials: &[Blocks<S, L>; C],
        blocks: &mut Blocks<S, L>,
        error: &mut [Lanes<L>; S],
        known: &[Known<L>; S],
        n_max: f32,
    ) {
        let mut best = total(error);
        let (mut errors, mut sums) = ([[[0.0; L]; C]; S], [[0.0; L]; C]);
        for j in 0..S {
            let (mut fits, mut own) = ([trials[0].fit(j); C], [(0, 0); C]);
            for c in 1..C {
                (fits[c], own[c]) = (trials[c].fit(j), (c, c));
            }
            errors[j] = self.0[j].affine_errors(&known[j], &fits, &own, n_max);
            let mut possible = false;
            for c in 0..C {
                add(&mut sums[c], &errors[j][c]);
                possible |= any_less(&sums[c], &best);
            }
            // Errors are not negative: the sums only grow.
            if !possible {
                return;
            }
        }
        for (c, trial) in trials.iter().enumerate() {
            for l in 0..L {
                let better = sums[c][l] < best[l];
                let keep = |old: &mut f32, new: f32| *old = if better { new } else { *old };
                keep(&mut best[l], sums[c][l]);
                keep(&mut blocks.d[l], trial.d[l]);
                keep(&mut blocks.dmin[l], trial.dmin[l]);
                for j in 0..S {
                    keep(&mut blocks.sc[j][l], trial.sc[j][l]);
                    keep(&mut blocks.m[j][l], trial.m[j][l]);
                    keep(&mut error[j][l], errors[j][c][l]);
                }
            }
        }
    }

    /// Tries the neighbours of each integer scale and offset.
    #[inline(always)]
    fn improve_integers(
        &self,
        blocks: &mut Blocks<S, L>,
        error: &mut [Lanes<L>; S],
        known: &[Known<L>; S],
        n_max: f32,
        sub_max: f32,
    ) {
        for j in 0..S {
            let (from_sc, from_m) = (blocks.sc[j], blocks.m[j]);
            let (mut best_error, mut best_sc, mut best_m) = (error[j], from_sc, from_m);
            let sc = each!(i in [0 1 2] => map(&from_sc, |v| limit(v + STEPS[i], 0.0, sub_max)));
            let m = each!(i in [0 1 2] => map(&from_m, |v| limit(v + STEPS[i], 0.0, sub_max)));
            let fits = each!(i in [0 1 2] => fit_of(&blocks.d, &blocks.dmin, &sc[i], &m[i]));
            let errors = self.0[j].affine_errors(&known[j], &fits, &NEIGHBOURS, n_max);
            each!(c in [0 1 2 3 4 5 6 7] => {
                let (i, k) = NEIGHBOURS[c];
                let better = map2(&errors[c], &best_error, |e, best| if e < best { 1.0 } else { 0.0 });
                best_error = choose(&better, &errors[c], &best_error);
                best_sc = choose(&better, &sc[i], &best_sc);
                best_m = choose(&better, &m[k], &best_m);
            });
            (error[j], blocks.sc[j], blocks.m[j]) = (best_error, best_sc, best_m);
        }
    }

    /// Solves for `d` and `dmin` with everything else fixed and keeps the result if the block is better for it.
    #[inline(always)]
    fn improve_d(
        &self,
        blocks: &mut Blocks<S, L>,
        error: &mut [Lanes<L>; S],
        known: &[Known<L>; S],
        n_max: f32,
    ) {
        let [mut aa, mut ab, mut bb, mut ax, mut bx] = [[0.0; L]; 5];
        for j in 0..S {
            let [s] = self.0[j].affine_sums(&known[j], &[Ruler::of(&blocks.fit(j))], None, n_max);
            for l in 0..L {
                let (sc, m) = (blocks.sc[j][l], blocks.m[j][l]);
                aa[l] += sc * sc * s.wqq[l];
                ab[l] += sc * m * s.wq[l];
                bb[l] += m * m * known[j].w[l];
                ax[l] += sc * s.wqx[l];
                bx[l] += m * known[j].wx[l];
            }
        }
        let (mut d, mut dmin) = ([0.0; L], [0.0; L]);
        for l in 0..L {
            let det = aa[l] * bb[l] - ab[l] * ab[l];
            d[l] = if det > 0.0 { (ax[l] * bb[l] - ab[l] * bx[l]) / det } else { ax[l] / aa[l] };
            dmin[l] = if det > 0.0 { (ab[l] * ax[l] - aa[l] * bx[l]) / det } else { 0.0 };
        }
        let mut trial = Blocks { d: round_f16(&d), dmin: round_f16(&dmin), ..*blocks };
        for l in 0..L {
            // What stays as it is is not better than itself.
            let possible = (trial.d[l] > 0.0) & (trial.dmin[l] >= 0.0);
            trial.d[l] = if possible { trial.d[l] } else { blocks.d[l] };
            trial.dmin[l] = if possible { trial.dmin[l] } else { blocks.dmin[l] };
        }
        self.keep_better(&[trial], blocks, error, known, n_max);
    }
}

/// The codes of the blocks that a fit per sub-block was found for.
#[inline(always)]
fn codes_of<const N: usize, const S: usize, const LEN: usize, const L: usize>(
    blocks: &[[f32; LEN]],
    fits: &[Fit<L>; S],
    n_max: f32,
) -> Codes<LEN, L> {
    let mut inverses = [[0.0; L]; S];
    for (to, fit) in inverses.iter_mut().zip(fits) {
        *to = inverse(&fit.scale);
    }
    codes::<N, LEN, L>(blocks, |j, l, x| {
        // Not `Nearest`: here what becomes of a NaN shows.
        low_byte(limit(round((x + fits[j].min[l]) * inverses[j][l]), 0.0, n_max))
    })
}

/// `a` where `which` is not 0, else `b`.
#[inline(always)]
fn choose<const L: usize>(which: &Lanes<L>, a: &Lanes<L>, b: &Lanes<L>) -> Lanes<L> {
    let mut out = [0.0; L];
    for l in 0..L {
        out[l] = if which[l] != 0.0 { a[l] } else { b[l] };
    }
    out
}

/// Raises `top` to `x` where that is larger.
#[inline(always)]
fn raise<const L: usize>(top: &mut Lanes<L>, x: &Lanes<L>) {
    for (top, x) in top.iter_mut().zip(x) {
        *top = if *x > *top { *x } else { *top };
    }
}

/// Quantizes blocks of `LEN` weights that have an f16 scale and an f16 offset each; `pack` gets the scale, the offset
/// that is added, and the codes.
#[inline(always)]
pub fn quantize_single<const LEN: usize, const BYTES: usize, const L: usize>(
    src: &[f32],
    importance: &[f32],
    dst: &mut [u8],
    search: &Search,
    pack: impl Fn(f32, f32, &[u8; LEN], &mut [u8; BYTES]),
) {
    let cols = importance.len();
    let mut tile = Tile::<LEN, 1, L>::EMPTY;
    for (src, dst) in src.chunks(cols).zip(dst.chunks_mut(cols / LEN * BYTES)) {
        let sigma2 = mean_square(src);
        for Group { x, importance, out } in groups::<LEN, BYTES, L>(src, Some(importance), dst) {
            tile.load(x, importance, ErrorWeight::ImportanceSigma2(sigma2));
            let sub = &tile.0[0];
            let fit = sub.affine_fit(&sub.known(), search);
            let fit = Fit { scale: round_f16(&fit.scale), min: round_f16(&fit.min) };
            let codes = codes_of::<LEN, 1, LEN, L>(x, &[fit], search.n_max);
            for (l, block) in out.iter_mut().enumerate() {
                pack(fit.scale[l], -fit.min[l], &codes[l], block);
            }
        }
    }
}
