//! Codes with sign: `weight = scale * g`, g a number of a [`Grid`].

use super::grid::Grid;
use super::{
    Lanes, SIDE_BY_SIDE, STARTS, TINY, Tile, integers, inverse, limit, mean_square, round_f16,
    single_level_weight, start_factor, total,
};

/// What a search tries: the largest weight of a sub-block falls on `edge + step * k`, k in `-n ..= n`, where `edge` is
/// each end of the grid.
#[derive(Clone, Copy)]
pub struct Search {
    /// Distance between two candidates.
    pub step: f32,
    /// Candidates on each side.
    pub n: i32,
}

impl<const N: usize, const L: usize> Tile<N, L> {
    /// Sums of w g x and w g g for the grid numbers nearest to `x * inverse`.
    #[inline]
    fn signed_sums<G: Grid>(&self, inverse: &Lanes<L>) -> (Lanes<L>, Lanes<L>) {
        let (mut wgx, mut wgg) = ([0.0; L], [0.0; L]);
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..L {
                let g = G::nearest(x[l] * inverse[l]);
                let wg = w[l] * g;
                wgx[l] += wg * x[l];
                wgg[l] += wg * g;
            }
        }
        (wgx, wgg)
    }

    /// Weighted squared error of each lane after rounding with these scales.
    pub fn signed_error<G: Grid>(&self, scale: &Lanes<L>) -> Lanes<L> {
        let inverse = inverse(scale);
        let mut error = [0.0; L];
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..L {
                let e = x[l] - scale[l] * G::nearest(x[l] * inverse[l]);
                error[l] += w[l] * (e * e);
            }
        }
        error
    }

    /// The grid numbers for these scales, sub-blocks one after the other, each through `code`.
    pub fn signed_codes<G: Grid>(&self, scale: &Lanes<L>, code: impl Fn(f32) -> u8, codes: &mut [u8]) {
        let inverse = inverse(scale);
        for (l, sub) in codes.as_chunks_mut::<N>().0.iter_mut().take(L).enumerate() {
            for (x, c) in self.x.iter().zip(sub) {
                *c = code(G::nearest(x[l] * inverse[l]));
            }
        }
    }

    /// The best scale of each lane on its own.
    pub fn signed_fit<G: Grid>(&self, search: &Search) -> Lanes<L> {
        let mut peak = [0f32; L];
        for x in &self.x {
            for l in 0..L {
                peak[l] = if x[l].abs() > peak[l].abs() { x[l] } else { peak[l] };
            }
        }
        let mut best = peak.map(|p| if p.abs() > TINY { p / G::LOW } else { 0.0 });
        let mut best_gain = [0.0; L];
        let mut try_inverse = |inverse: &Lanes<L>, best: &mut Lanes<L>| {
            let (wgx, wgg) = self.signed_sums::<G>(inverse);
            for l in 0..L {
                // What the least-squares scale takes away from the sum of w x^2; NaN where all g are 0.
                let gain = wgx[l] * wgx[l] / wgg[l];
                if gain > best_gain[l] {
                    best_gain[l] = gain;
                    best[l] = wgx[l] / wgg[l];
                }
            }
        };
        for edge in [G::LOW, G::HIGH] {
            for k in -search.n..=search.n {
                let t = edge + search.step * k as f32;
                try_inverse(&peak.map(|p| if p.abs() > TINY { t / p } else { 0.0 }), &mut best);
            }
        }
        try_inverse(&inverse(&best.clone()), &mut best);
        best
    }
}

/// A block whose scales are `d * sc` with small signed integers `sc` per sub-block.
#[derive(Clone, Copy)]
pub struct Block<const L: usize> {
    /// Scale of the scales, as f16 stores it.
    pub d: f32,
    /// Integer scales.
    pub sc: Lanes<L>,
}

impl<const L: usize> Block<L> {
    /// The scales it stands for.
    pub fn scales(&self) -> Lanes<L> {
        self.sc.map(|v| self.d * v)
    }
}

impl<const N: usize, const L: usize> Tile<N, L> {
    /// Fits a block whose integer scales are `-sub_half ..= sub_half - 1`.
    pub fn signed_block<G: Grid>(&self, search: &Search, sub_half: f32) -> Block<L> {
        let fit = self.signed_fit::<G>(search);
        let peak = fit.iter().fold(0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
        let with_d = |d: f32| {
            let d = round_f16(d);
            Block { d, sc: integers(&fit, d, -sub_half, sub_half - 1.0) }
        };
        let mut block = with_d(peak / -sub_half);
        let mut error = self.signed_error::<G>(&block.scales());
        for k in 1..STARTS {
            let trial = with_d(peak / -sub_half * start_factor(k, sub_half));
            self.keep_better_signed::<G>(trial, &mut block, &mut error);
        }
        for _ in 0..2 {
            self.improve_signed_integers::<G>(&mut block, &mut error, sub_half);
            let (wgx, wgg) = self.signed_sums::<G>(&inverse(&block.scales()));
            let (mut num, mut den) = (0.0, 0.0);
            for l in 0..L {
                num += block.sc[l] * wgx[l];
                den += block.sc[l] * block.sc[l] * wgg[l];
            }
            let trial = Block { d: round_f16(num / den), ..block };
            self.keep_better_signed::<G>(trial, &mut block, &mut error);
        }
        self.improve_signed_integers::<G>(&mut block, &mut error, sub_half);
        block
    }

    /// Replaces the block if the trial as a whole is better.
    fn keep_better_signed<G: Grid>(&self, trial: Block<L>, block: &mut Block<L>, error: &mut Lanes<L>) {
        let e = self.signed_error::<G>(&trial.scales());
        if total(&e) < total(error) {
            *block = trial;
            *error = e;
        }
    }

    /// Tries the neighbours of each integer scale.
    fn improve_signed_integers<G: Grid>(&self, block: &mut Block<L>, error: &mut Lanes<L>, sub_half: f32) {
        let from = block.sc;
        for step in [-1.0, 1.0, -2.0, 2.0] {
            let sc = from.map(|v| limit(v + step, -sub_half, sub_half - 1.0));
            let e = self.signed_error::<G>(&Block { d: block.d, sc }.scales());
            for l in 0..L {
                if e[l] < error[l] {
                    error[l] = e[l];
                    block.sc[l] = sc[l];
                }
            }
        }
    }
}

/// Quantizes blocks of `LEN` weights that have an f16 scale each. `code` turns a grid number into its code, `pack`
/// writes a block.
pub fn quantize_single<G: Grid, const LEN: usize, const BYTES: usize>(
    src: &[f32],
    importance: Option<&[f32]>,
    dst: &mut [u8],
    search: &Search,
    code: impl Fn(f32) -> u8,
    pack: impl Fn(f32, &[u8; LEN], &mut [u8; BYTES]),
) {
    const L: usize = SIDE_BY_SIDE;
    assert!(src.len().is_multiple_of(LEN) && dst.len() / BYTES == src.len() / LEN, "whole blocks");
    let mean_square = mean_square(src);
    for (i, (x, out)) in src.chunks(L * LEN).zip(dst.chunks_mut(L * BYTES)).enumerate() {
        let tile = Tile::<LEN, L>::new(x, single_level_weight(importance, i * L * LEN, mean_square));
        let scale = tile.signed_fit::<G>(search).map(round_f16);
        let mut codes = [[0u8; LEN]; L];
        tile.signed_codes::<G>(&scale, &code, codes.as_flattened_mut());
        for ((block, d), codes) in out.as_chunks_mut::<BYTES>().0.iter_mut().zip(scale).zip(&codes) {
            pack(d, codes, block);
        }
    }
}
