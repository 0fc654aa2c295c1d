//! Codes with sign: `weight = scale * g`, g a number of a [`Grid`].

// Sub-block j and lane l index several arrays at once.
#![allow(clippy::needless_range_loop)]

use super::grid::Grid;
#[cfg(target_arch = "x86_64")]
use super::vectors::Passes;
use super::{
    Codes, ErrorWeight, Lanes, STARTS, Sub, TINY, Tile, add, any_less, codes, integers, inverse, limit, map,
    map2, mean_square, ratio, round_f16, start_factor, total,
};
use crate::codec::{Group, groups};

/// What a search tries: the largest weight of a sub-block falls on `edge + step * k`, k in `-n ..= n`, where `edge` is
/// each end of the grid.
#[derive(Clone, Copy)]
pub struct Search {
    /// Distance between two candidates.
    pub step: f32,
    /// Candidates on each side.
    pub n: i32,
}

/// Scales whose sums are taken in one pass over a sub-block,
const FITS: usize = 3;
/// and trials whose errors are.
const TRIALS: usize = 4;

/// Sums over a sub-block for given numbers g of a grid.
#[derive(Clone, Copy)]
pub(super) struct SignedSums<const L: usize> {
    pub wgx: Lanes<L>,
    pub wgg: Lanes<L>,
}

impl<const L: usize> SignedSums<L> {
    pub const ZERO: Self = Self { wgx: [0.0; L], wgg: [0.0; L] };
}

impl<const N: usize, const L: usize> Sub<N, L> {
    /// The sums for the grid numbers nearest to `x * inverse`, for each of these.
    #[inline(always)]
    fn signed_sums<G: Grid, const C: usize>(&self, inverses: &[Lanes<L>; C]) -> [SignedSums<L>; C] {
        #[cfg(target_arch = "x86_64")]
        if let Some(passes) = Passes::get() {
            return passes.signed_sums::<G, N, C>(self, inverses);
        }
        let mut sums = [SignedSums::ZERO; C];
        // One after the other: together the compiler would take the candidates as lanes.
        for (sums, inverse) in sums.iter_mut().zip(inverses) {
            for (x, w) in self.x.iter().zip(&self.w) {
                for l in 0..L {
                    let g = G::nearest(x[l] * inverse[l]);
                    let wg = w[l] * g;
                    sums.wgx[l] += wg * x[l];
                    sums.wgg[l] += wg * g;
                }
            }
        }
        sums
    }

    /// Weighted squared errors of each lane after rounding with each of these scales.
    #[inline(always)]
    fn signed_errors<G: Grid, const C: usize>(&self, scales: &[Lanes<L>; C]) -> [Lanes<L>; C] {
        let mut inverses = [inverse(&scales[0]); C];
        for c in 1..C {
            inverses[c] = inverse(&scales[c]);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(passes) = Passes::get() {
            return passes.signed_errors::<G, N, C>(self, scales, &inverses);
        }
        let mut errors = [[0.0; L]; C];
        for (error, (scale, inverse)) in errors.iter_mut().zip(scales.iter().zip(&inverses)) {
            for (x, w) in self.x.iter().zip(&self.w) {
                for l in 0..L {
                    let e = x[l] - scale[l] * G::nearest(x[l] * inverse[l]);
                    error[l] += w[l] * (e * e);
                }
            }
        }
        errors
    }

    /// The best scale of each lane on its own.
    #[inline(always)]
    fn signed_fit<G: Grid>(&self, search: &Search) -> Lanes<L> {
        let mut peak = [0f32; L];
        for x in &self.x {
            for l in 0..L {
                peak[l] = if x[l].abs() > peak[l].abs() { x[l] } else { peak[l] };
            }
        }
        let mut best = map(&peak, |p| if p.abs() > TINY { p / G::LOW } else { 0.0 });
        let mut gain = [0.0; L];
        let per_edge = 2 * search.n + 1;
        for i in (0..2 * per_edge).step_by(FITS) {
            let inverses = each!(c in [0 1 2] => {
                let i = i + c as i32;
                let (edge, k) = if i < per_edge { (G::LOW, i) } else { (G::HIGH, i - per_edge) };
                let t = edge + search.step * (k - search.n) as f32;
                map(&peak, |p| ratio(t, p, TINY))
            });
            let sums = self.signed_sums::<G, FITS>(&inverses);
            each!(c in [0 1 2] => if i + (c as i32) < 2 * per_edge { offer(&sums[c], &mut best, &mut gain) });
        }
        let [sums] = self.signed_sums::<G, 1>(&[inverse(&best)]);
        offer(&sums, &mut best, &mut gain);
        best
    }
}

/// Takes the least-squares scale for grid numbers with these sums where it is better.
#[inline(always)]
fn offer<const L: usize>(s: &SignedSums<L>, best: &mut Lanes<L>, best_gain: &mut Lanes<L>) {
    for l in 0..L {
        // What the least-squares scale takes away from the sum of w x^2; NaN where all g are 0.
        let (gain, scale) = (s.wgx[l] * s.wgx[l] / s.wgg[l], s.wgx[l] / s.wgg[l]);
        let better = gain > best_gain[l];
        best_gain[l] = if better { gain } else { best_gain[l] };
        best[l] = if better { scale } else { best[l] };
    }
}

/// Blocks whose scales are `d * sc` with small signed integers `sc` per sub-block.
#[derive(Clone, Copy)]
pub struct Blocks<const S: usize, const L: usize> {
    /// Scale of the scales, as f16 stores it.
    pub d: Lanes<L>,
    /// Integer scales.
    pub sc: [Lanes<L>; S],
}

impl<const S: usize, const L: usize> Blocks<S, L> {
    /// The scales of sub-block j.
    #[inline(always)]
    fn scale(&self, j: usize) -> Lanes<L> {
        scale_of(&self.d, &self.sc[j])
    }

    /// The grid numbers of the blocks that these were found for, with sub-blocks of `N` weights, each through `code`.
    #[inline(always)]
    pub fn codes<G: Grid, const N: usize, const LEN: usize>(
        &self,
        blocks: &[[f32; LEN]],
        code: impl Fn(f32) -> u8,
    ) -> Codes<LEN, L> {
        let mut scales = [self.scale(0); S];
        for j in 1..S {
            scales[j] = self.scale(j);
        }
        codes_of::<G, N, S, LEN, L>(blocks, &scales, code)
    }
}

#[inline(always)]
fn scale_of<const L: usize>(d: &Lanes<L>, sc: &Lanes<L>) -> Lanes<L> {
    map2(d, sc, |d, sc| d * sc)
}

impl<const N: usize, const S: usize, const L: usize> Tile<N, S, L> {
    /// Fits blocks whose integer scales are `-sub_half ..= sub_half - 1`.
    #[inline(always)]
    pub fn signed_blocks<G: Grid>(&self, search: &Search, sub_half: f32) -> Blocks<S, L> {
        let mut fits = [[0.0; L]; S];
        let mut peak = [0f32; L];
        for j in 0..S {
            fits[j] = self.0[j].signed_fit::<G>(search);
            for l in 0..L {
                peak[l] = if fits[j][l].abs() > peak[l].abs() { fits[j][l] } else { peak[l] };
            }
        }
        let with_d = |d: &Lanes<L>| {
            let mut blocks = Blocks { d: round_f16(d), sc: [[0.0; L]; S] };
            let inverse = inverse(&blocks.d);
            for (sc, fit) in blocks.sc.iter_mut().zip(&fits) {
                *sc = integers(fit, &inverse, -sub_half, sub_half - 1.0);
            }
            blocks
        };
        let mut blocks = with_d(&map(&peak, |p| p / -sub_half));
        let mut error = [[0.0; L]; S];
        for j in 0..S {
            [error[j]] = self.0[j].signed_errors::<G, 1>(&[blocks.scale(j)]);
        }
        for k in (1..STARTS).step_by(TRIALS) {
            let trials = each!(c in [0 1 2 3] => with_d(&map(&peak, |p| p / -sub_half * start_factor(k + c, sub_half))));
            self.keep_better_signed::<G, TRIALS>(&trials, &mut blocks, &mut error);
        }
        for round in 0..3 {
            self.improve_signed_integers::<G>(&mut blocks, &mut error, sub_half);
            if round < 2 {
                let (mut num, mut den) = ([0.0; L], [0.0; L]);
                for j in 0..S {
                    let [s] = self.0[j].signed_sums::<G, 1>(&[inverse(&blocks.scale(j))]);
                    let sc = &blocks.sc[j];
                    for l in 0..L {
                        num[l] += sc[l] * s.wgx[l];
                        den[l] += sc[l] * sc[l] * s.wgg[l];
                    }
                }
                let d = map2(&num, &den, |num, den| num / den);
                let trial = Blocks { d: round_f16(&d), ..blocks };
                self.keep_better_signed::<G, 1>(&[trial], &mut blocks, &mut error);
            }
        }
        blocks
    }

    /// Replaces the blocks for which a trial as a whole is better; of several that are, by the best, and the first of those.
    #[inline(always)]
    fn keep_better_signed<G: Grid, const C: usize>(
        &self,
        trials: &[Blocks<S, L>; C],
        blocks: &mut Blocks<S, L>,
        error: &mut [Lanes<L>; S],
    ) {
        let mut best = total(error);
        let (mut errors, mut sums) = ([[[0.0; L]; C]; S], [[0.0; L]; C]);
        for j in 0..S {
            let mut scales = [trials[0].scale(j); C];
            for c in 1..C {
                scales[c] = trials[c].scale(j);
            }
            errors[j] = self.0[j].signed_errors::<G, C>(&scales);
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
                for j in 0..S {
                    keep(&mut blocks.sc[j][l], trial.sc[j][l]);
                    keep(&mut error[j][l], errors[j][c][l]);
                }
            }
        }
    }

    /// Tries the neighbours of each integer scale.
    #[inline(always)]
    fn improve_signed_integers<G: Grid>(
        &self,
        blocks: &mut Blocks<S, L>,
        error: &mut [Lanes<L>; S],
        sub_half: f32,
    ) {
        const STEPS: [f32; TRIALS] = [-1.0, 1.0, -2.0, 2.0];
        for j in 0..S {
            let from = blocks.sc[j];
            let sc = each!(c in [0 1 2 3] => map(&from, |v| limit(v + STEPS[c], -sub_half, sub_half - 1.0)));
            let scales = each!(c in [0 1 2 3] => scale_of(&blocks.d, &sc[c]));
            let errors = self.0[j].signed_errors::<G, TRIALS>(&scales);
            each!(c in [0 1 2 3] => {
                for l in 0..L {
                    let better = errors[c][l] < error[j][l];
                    error[j][l] = if better { errors[c][l] } else { error[j][l] };
                    blocks.sc[j][l] = if better { sc[c][l] } else { blocks.sc[j][l] };
                }
            });
        }
    }
}

/// The grid numbers of the blocks that a scale per sub-block was found for, each through `code`.
#[inline(always)]
fn codes_of<G: Grid, const N: usize, const S: usize, const LEN: usize, const L: usize>(
    blocks: &[[f32; LEN]],
    scales: &[Lanes<L>; S],
    code: impl Fn(f32) -> u8,
) -> Codes<LEN, L> {
    let mut inverses = [[0.0; L]; S];
    for (to, scale) in inverses.iter_mut().zip(scales) {
        *to = inverse(scale);
    }
    codes::<N, LEN, L>(blocks, |j, l, x| code(G::nearest(x * inverses[j][l])))
}

/// Quantizes blocks of `LEN` weights that have an f16 scale each. `code` turns a grid number into its code, `pack`
/// writes a block.
#[inline(always)]
pub fn quantize_single<G: Grid, const LEN: usize, const BYTES: usize, const L: usize>(
    src: &[f32],
    importance: Option<&[f32]>,
    dst: &mut [u8],
    search: &Search,
    code: impl Fn(f32) -> u8,
    pack: impl Fn(f32, &[u8; LEN], &mut [u8; BYTES]),
) {
    let cols = importance.map_or(src.len(), <[f32]>::len).max(1);
    let mut tile = Tile::<LEN, 1, L>::EMPTY;
    for (src, dst) in src.chunks(cols).zip(dst.chunks_mut(cols / LEN * BYTES)) {
        let weight = match importance {
            Some(_) => ErrorWeight::ImportanceSigma2(mean_square(src)),
            None => ErrorWeight::Square,
        };
        for Group { x, importance, out } in groups::<LEN, BYTES, L>(src, importance, dst) {
            tile.load(x, importance, weight);
            let scale = round_f16(&tile.0[0].signed_fit::<G>(search));
            let codes = codes_of::<G, LEN, 1, LEN, L>(x, &[scale], &code);
            for ((block, d), codes) in out.iter_mut().zip(scale).zip(&codes) {
                pack(d, codes, block);
            }
        }
    }
}
