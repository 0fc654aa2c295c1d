//! Codes without sign: `weight = scale * code - min`, codes `0 ..= n_max`.

use super::{
    Lanes, SIDE_BY_SIDE, TINY, Tile, inverse, limit, mean_square, round, round_f16, single_level_weight,
    total,
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

    /// The best scale and offset of each lane on its own: for each candidate scale the codes, for the codes the
    /// least-squares scale and offset.
    pub fn affine_fit(&self, search: &Search) -> Fit<L> {
        let Search { n_max, .. } = *search;
        let (mut lo, mut hi) = (self.x[0], self.x[0]);
        let (mut sw, mut swx) = ([0.0; L], [0.0; L]);
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..L {
                lo[l] = if x[l] < lo[l] { x[l] } else { lo[l] };
                hi[l] = if x[l] > hi[l] { x[l] } else { hi[l] };
                sw[l] += w[l];
                swx[l] += w[l] * x[l];
            }
        }
        if search.min_not_negative {
            lo = lo.map(|v| if v < 0.0 { v } else { 0.0 });
        }
        let range: Lanes<L> = std::array::from_fn(|l| hi[l] - lo[l]);
        let min: Lanes<L> = lo.map(|v| -v);
        let mut best = Fit { scale: range.map(|r| if r > TINY { r / n_max } else { 0.0 }), min };
        let mut best_gain = [f32::NEG_INFINITY; L];
        for k in 0..search.n + 2 {
            // The last two rounds start from the best so far instead of from the grid.
            let (inverse, from) = if k < search.n {
                let t = n_max + search.first + search.step * k as f32;
                (range.map(|r| if r > TINY { t / r } else { 0.0 }), min)
            } else {
                (inverse(&best.scale), best.min)
            };
            let s = self.affine_sums(&inverse, &from, n_max);
            for l in 0..L {
                let det = sw[l] * s.wqq[l] - s.wq[l] * s.wq[l];
                let mut scale = (sw[l] * s.wqx[l] - swx[l] * s.wq[l]) / det;
                let mut min = (s.wq[l] * s.wqx[l] - s.wqq[l] * swx[l]) / det;
                if search.min_not_negative && min < 0.0 {
                    min = 0.0;
                    scale = s.wqx[l] / s.wqq[l];
                }
                // What the fit takes away from the sum of w x^2; NaN where the codes are all equal.
                let gain = scale * (2.0 * s.wqx[l] - scale * s.wqq[l] + 2.0 * min * s.wq[l])
                    - min * (2.0 * swx[l] + min * sw[l]);
                if gain > best_gain[l] && scale > 0.0 {
                    best_gain[l] = gain;
                    best.scale[l] = scale;
                    best.min[l] = min;
                }
            }
        }
        best
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
        let d = round_f16(fit.scale.iter().fold(0.0, |a: f32, &b| if b > a { b } else { a }) / sub_max);
        let dmin = round_f16(fit.min.iter().fold(0.0, |a: f32, &b| if b > a { b } else { a }) / sub_max);
        let (id, idmin) = (if d > 0.0 { 1.0 / d } else { 0.0 }, if dmin > 0.0 { 1.0 / dmin } else { 0.0 });
        let mut block = Block {
            d,
            dmin,
            sc: fit.scale.map(|v| limit(round(v * id), 0.0, sub_max)),
            m: fit.min.map(|v| limit(round(v * idmin), 0.0, sub_max)),
        };
        let mut error = self.affine_error(&block.fit(), search.n_max);
        for _ in 0..2 {
            self.improve_integers(&mut block, &mut error, search.n_max, sub_max);
            self.improve_d(&mut block, &mut error, search.n_max);
        }
        self.improve_integers(&mut block, &mut error, search.n_max, sub_max);
        block
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
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0, 0.0, 0.0, 0.0, 0.0);
        let (mut sw, mut swx) = ([0.0; L], [0.0; L]);
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..L {
                sw[l] += w[l];
                swx[l] += w[l] * x[l];
            }
        }
        for l in 0..L {
            let (sc, m) = (block.sc[l], block.m[l]);
            aa += sc * sc * s.wqq[l];
            ab += sc * m * s.wq[l];
            bb += m * m * sw[l];
            ax += sc * s.wqx[l];
            bx += m * swx[l];
        }
        let det = aa * bb - ab * ab;
        let (d, dmin) =
            if det > 0.0 { ((ax * bb - ab * bx) / det, (ab * ax - aa * bx) / det) } else { (ax / aa, 0.0) };
        let trial = Block { d: round_f16(d), dmin: round_f16(dmin), ..*block };
        if !(trial.d > 0.0 && trial.dmin >= 0.0) {
            return;
        }
        let e = self.affine_error(&trial.fit(), n_max);
        if total(&e) < total(error) {
            *block = trial;
            *error = e;
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
