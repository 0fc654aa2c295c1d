//! Codes without sign: `weight = scale * code - min`, codes `0 ..= n_max`.

use super::{
    Lanes, SIDE_BY_SIDE, STARTS, TINY, Tile, integers, inverse, limit, mean_square, round, round_f16,
    single_level_weight, start_factor, total,
};

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

/// Sums over a sub-block that do not depend on codes.
struct Totals<const L: usize> {
    w: Lanes<L>,
    wx: Lanes<L>,
}

/// Sums over a sub-block for given codes q.
struct Sums<const L: usize> {
    wq: Lanes<L>,
    wqq: Lanes<L>,
    wqx: Lanes<L>,
}

impl<const N: usize, const L: usize> Tile<N, L> {
    fn affine_sums(&self, inverse: &Lanes<L>, min: &Lanes<L>, n_max: f32) -> Sums<L> {
        let mut s = Sums { wq: [0.0; L], wqq: [0.0; L], wqx: [0.0; L] };
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..L {
                let q = limit(round((x[l] + min[l]) * inverse[l]), 0.0, n_max);
                let wq = w[l] * q;
                s.wq[l] += wq;
                s.wqq[l] += wq * q;
                s.wqx[l] += wq * x[l];
            }
        }
        s
    }

    /// Weighted squared error of each lane after rounding with this fit.
    pub fn affine_error(&self, fit: &Fit<L>, n_max: f32) -> Lanes<L> {
        let inverse = inverse(&fit.scale);
        let mut error = [0.0; L];
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..L {
                let y = x[l] + fit.min[l];
                let q = limit(round(y * inverse[l]), 0.0, n_max);
                let e = y - fit.scale[l] * q;
                error[l] += w[l] * (e * e);
            }
        }
        error
    }

    /// The codes for a fit, sub-blocks one after the other.
    pub fn affine_codes(&self, fit: &Fit<L>, n_max: f32, codes: &mut [u8]) {
        let inverse = inverse(&fit.scale);
        for (l, sub) in codes.as_chunks_mut::<N>().0.iter_mut().take(L).enumerate() {
            for (x, code) in self.x.iter().zip(sub) {
                *code = limit(round((x[l] + fit.min[l]) * inverse[l]), 0.0, n_max) as u8;
            }
        }
    }

    /// The best scale and offset of each lane on its own: for each candidate scale and offset the codes, for the codes
    /// the least-squares scale and offset.
    pub fn affine_fit(&self, search: &Search) -> Fit<L> {
        let totals = self.totals();
        let (mut lo, hi) = self.range();
        if search.min_not_negative {
            lo = lo.map(|v| if v < 0.0 { v } else { 0.0 });
        }
        let range: Lanes<L> = std::array::from_fn(|l| hi[l] - lo[l]);
        let of_range = |t: f32| range.map(|r| if r > TINY { t / r } else { 0.0 });
        let fit =
            Fit { scale: range.map(|r| if r > TINY { r / search.n_max } else { 0.0 }), min: lo.map(|v| -v) };
        let mut best = Best { fit, gain: [f32::NEG_INFINITY; L] };
        for clipped in CLIPPED {
            for k in 0..search.n {
                let inverse = of_range(search.n_max + search.first + search.step * k as f32);
                let min = std::array::from_fn(|l| {
                    let min = if inverse[l] > 0.0 { -lo[l] - clipped / inverse[l] } else { -lo[l] };
                    if search.min_not_negative && min < 0.0 { 0.0 } else { min }
                });
                best.offer(&self.affine_sums(&inverse, &min, search.n_max), &totals, search);
            }
        }
        for _ in 0..2 {
            let sums = self.affine_sums(&inverse(&best.fit.scale), &best.fit.min, search.n_max);
            best.offer(&sums, &totals, search);
        }
        best.fit
    }

    /// Smallest and largest weight of each lane.
    fn range(&self) -> (Lanes<L>, Lanes<L>) {
        let (mut lo, mut hi) = (self.x[0], self.x[0]);
        for x in &self.x {
            for l in 0..L {
                lo[l] = if x[l] < lo[l] { x[l] } else { lo[l] };
                hi[l] = if x[l] > hi[l] { x[l] } else { hi[l] };
            }
        }
        (lo, hi)
    }

    fn totals(&self) -> Totals<L> {
        let mut t = Totals { w: [0.0; L], wx: [0.0; L] };
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..L {
                t.w[l] += w[l];
                t.wx[l] += w[l] * x[l];
            }
        }
        t
    }
}

/// How far below code 0 the smallest weight falls, in steps, in the candidates.
const CLIPPED: [f32; 2] = [0.0, 0.5];

/// The best fit so far and what it takes away from the sum of w x^2.
struct Best<const L: usize> {
    fit: Fit<L>,
    gain: Lanes<L>,
}

impl<const L: usize> Best<L> {
    /// Takes the least-squares fit for codes with these sums where it is better.
    fn offer(&mut self, s: &Sums<L>, t: &Totals<L>, search: &Search) {
        for l in 0..L {
            let det = t.w[l] * s.wqq[l] - s.wq[l] * s.wq[l];
            let mut scale = (t.w[l] * s.wqx[l] - t.wx[l] * s.wq[l]) / det;
            let mut min = (s.wq[l] * s.wqx[l] - s.wqq[l] * t.wx[l]) / det;
            if search.min_not_negative && min < 0.0 {
                min = 0.0;
                scale = s.wqx[l] / s.wqq[l];
            }
            // NaN, which compares false, where the codes are all equal.
            let gain = scale * (2.0 * s.wqx[l] - scale * s.wqq[l] + 2.0 * min * s.wq[l])
                - min * (2.0 * t.wx[l] + min * t.w[l]);
            if gain > self.gain[l] && scale > 0.0 {
                self.gain[l] = gain;
                self.fit.scale[l] = scale;
                self.fit.min[l] = min;
            }
        }
    }
}

/// A block of the K types: `scale = d * sc`, `min = dmin * m` with small integers `sc` and `m` per sub-block.
#[derive(Clone, Copy)]
pub struct Block<const L: usize> {
    /// Scale of the scales, as f16 stores it.
    pub d: f32,
    /// Scale of the offsets, as f16 stores it.
    pub dmin: f32,
    /// Integer scales.
    pub sc: Lanes<L>,
    /// Integer offsets.
    pub m: Lanes<L>,
}

impl<const L: usize> Block<L> {
    /// The scales and offsets it stands for.
    pub fn fit(&self) -> Fit<L> {
        Fit { scale: self.sc.map(|v| self.d * v), min: self.m.map(|v| self.dmin * v) }
    }
}

impl<const N: usize, const L: usize> Tile<N, L> {
    /// Fits a block whose integer scales and offsets are `0 ..= sub_max`.
    pub fn affine_block(&self, search: &Search, sub_max: f32) -> Block<L> {
        let fit = self.affine_fit(search);
        let top = |x: &Lanes<L>| x.iter().fold(0f32, |a, &b| if b > a { b } else { a }) / sub_max;
        let (d, dmin) = (top(&fit.scale), top(&fit.min));
        let with_d = |block: Block<L>, d: f32| {
            let d = round_f16(d);
            Block { d, sc: integers(&fit.scale, d, 0.0, sub_max), ..block }
        };
        let with_dmin = |block: Block<L>, dmin: f32| {
            let dmin = round_f16(dmin);
            Block { dmin, m: integers(&fit.min, dmin, 0.0, sub_max), ..block }
        };
        let zero = Block { d: 0.0, dmin: 0.0, sc: [0.0; L], m: [0.0; L] };
        let mut block = with_dmin(with_d(zero, d), dmin);
        let mut error = self.affine_error(&block.fit(), search.n_max);
        for k in 1..STARTS {
            let factor = start_factor(k, sub_max);
            for trial in [with_d(block, d * factor), with_dmin(block, dmin * factor)] {
                self.keep_better(trial, &mut block, &mut error, search.n_max);
            }
        }
        for _ in 0..2 {
            self.improve_integers(&mut block, &mut error, search.n_max, sub_max);
            self.improve_d(&mut block, &mut error, search.n_max);
        }
        self.improve_integers(&mut block, &mut error, search.n_max, sub_max);
        block
    }

    /// Replaces the block if the trial as a whole is better.
    fn keep_better(&self, trial: Block<L>, block: &mut Block<L>, error: &mut Lanes<L>, n_max: f32) {
        let e = self.affine_error(&trial.fit(), n_max);
        if total(&e) < total(error) {
            *block = trial;
            *error = e;
        }
    }

    /// Tries the neighbours of each integer scale and offset.
    fn improve_integers(&self, block: &mut Block<L>, error: &mut Lanes<L>, n_max: f32, sub_max: f32) {
        let from = *block;
        for (dsc, dm) in
            [(-1., 0.), (1., 0.), (0., -1.), (0., 1.), (-1., -1.), (1., 1.), (-1., 1.), (1., -1.)]
        {
            let trial = Block {
                sc: from.sc.map(|v| limit(v + dsc, 0.0, sub_max)),
                m: from.m.map(|v| limit(v + dm, 0.0, sub_max)),
                ..from
            };
            let e = self.affine_error(&trial.fit(), n_max);
            for l in 0..L {
                if e[l] < error[l] {
                    error[l] = e[l];
                    block.sc[l] = trial.sc[l];
                    block.m[l] = trial.m[l];
                }
            }
        }
    }

    /// Solves for `d` and `dmin` with everything else fixed and keeps the result if the block is better for it.
    fn improve_d(&self, block: &mut Block<L>, error: &mut Lanes<L>, n_max: f32) {
        let fit = block.fit();
        let s = self.affine_sums(&inverse(&fit.scale), &fit.min, n_max);
        let t = self.totals();
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for l in 0..L {
            let (sc, m) = (block.sc[l], block.m[l]);
            aa += sc * sc * s.wqq[l];
            ab += sc * m * s.wq[l];
            bb += m * m * t.w[l];
            ax += sc * s.wqx[l];
            bx += m * t.wx[l];
        }
        let det = aa * bb - ab * ab;
        let (d, dmin) =
            if det > 0.0 { ((ax * bb - ab * bx) / det, (ab * ax - aa * bx) / det) } else { (ax / aa, 0.0) };
        let trial = Block { d: round_f16(d), dmin: round_f16(dmin), ..*block };
        if trial.d > 0.0 && trial.dmin >= 0.0 {
            self.keep_better(trial, block, error, n_max);
        }
    }
}

/// Quantizes blocks of `LEN` weights that have an f16 scale and an f16 offset each; `pack` gets the scale, the offset
/// that is added, and the codes.
pub fn quantize_single<const LEN: usize, const BYTES: usize>(
    src: &[f32],
    importance: &[f32],
    dst: &mut [u8],
    search: &Search,
    pack: impl Fn(f32, f32, &[u8; LEN], &mut [u8; BYTES]),
) {
    const L: usize = SIDE_BY_SIDE;
    assert!(src.len().is_multiple_of(LEN) && dst.len() / BYTES == src.len() / LEN, "whole blocks");
    let mean_square = mean_square(src);
    for (i, (x, out)) in src.chunks(L * LEN).zip(dst.chunks_mut(L * BYTES)).enumerate() {
        let tile = Tile::<LEN, L>::new(x, single_level_weight(Some(importance), i * L * LEN, mean_square));
        let fit = tile.affine_fit(search);
        let fit = Fit { scale: fit.scale.map(round_f16), min: fit.min.map(round_f16) };
        let mut codes = [[0u8; LEN]; L];
        tile.affine_codes(&fit, search.n_max, codes.as_flattened_mut());
        for (l, block) in out.as_chunks_mut::<BYTES>().0.iter_mut().enumerate() {
            pack(fit.scale[l], -fit.min[l], &codes[l], block);
        }
    }
}
