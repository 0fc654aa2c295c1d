//! The search for block scales of `kestrel_quant`, one block and one number after the other: what its lanes are tested
//! against. It knows nothing of bytes; a block's result is the weights that it stands for.

use kestrel_formats::GgmlType;

/// The weights that a row quantized to `ty` stands for; `None` for types that are rounded without a search.
pub fn quantized_row(ty: GgmlType, x: &[f32], importance: Option<&[f32]>) -> Option<Vec<f32>> {
    let row_mean_square = mean_square(x);
    let mut out = Vec::with_capacity(x.len());
    for (i, block) in x.chunks(ty.block_len()).enumerate() {
        let importance = importance.map(|w| &w[i * ty.block_len()..][..ty.block_len()]);
        out.extend(quantized_block(ty, block, importance, row_mean_square)?);
    }
    Some(out)
}

fn quantized_block(
    ty: GgmlType,
    x: &[f32],
    importance: Option<&[f32]>,
    row_mean_square: f32,
) -> Option<Vec<f32>> {
    let weighted = importance.is_some();
    let affine = |n_max, first, step, n| Affine { n_max, first, step, n, min_not_negative: true };
    let plain_or = |plain: Affine| if weighted { affine(plain.n_max, -0.9, 0.05, 37) } else { plain };
    let single = |n_max| Affine { min_not_negative: false, ..affine(n_max, -0.9, 0.05, 37) };
    let two = 2.0 * mean_square(x);
    Some(match ty {
        GgmlType::Q2K => {
            let w = weights(x, 16, importance, Plain::Abs(0.25), mean_square(x));
            affine_block(x, &w, 16, &plain_or(affine(3.0, -0.5, 0.1, 16)), 15.0)
        }
        GgmlType::Q4K => {
            let w = weights(x, 32, importance, Plain::Abs(1.0), two);
            affine_block(x, &w, 32, &plain_or(affine(15.0, -1.0, 0.1, 21)), 63.0)
        }
        GgmlType::Q5K => {
            let w = weights(x, 32, importance, Plain::Abs(1.0), two);
            affine_block(x, &w, 32, &plain_or(affine(31.0, -0.5, 0.1, 16)), 63.0)
        }
        GgmlType::Q3K => {
            let w = weights(x, 16, importance, Plain::Square, two);
            signed_block(x, &w, 16, &Signed::integers(4), 32.0)
        }
        GgmlType::Q6K => {
            let w = importance.map_or_else(|| weights(x, 16, None, Plain::Square, 0.0), <[f32]>::to_vec);
            signed_block(x, &w, 16, &Signed::integers(32), 128.0)
        }
        GgmlType::Iq4Xs => {
            signed_block(x, &weights(x, 32, importance, Plain::Square, two), 32, &Signed::iq4(), 32.0)
        }
        GgmlType::Iq4Nl => {
            signed_single(x, &weights(x, 32, importance, Plain::Square, row_mean_square), &Signed::iq4())
        }
        GgmlType::Q4_0 | GgmlType::Q5_0 if weighted => {
            let half = if ty == GgmlType::Q4_0 { 8 } else { 16 };
            let w = weights(x, 32, importance, Plain::Square, row_mean_square);
            signed_single(x, &w, &Signed::integers(half))
        }
        GgmlType::Q4_1 | GgmlType::Q5_1 if weighted => {
            let search = single(if ty == GgmlType::Q4_1 { 15.0 } else { 31.0 });
            let w = weights(x, 32, importance, Plain::Square, row_mean_square);
            let fit = affine_fit(x, &w, &search);
            let fit = Fit { scale: f16(fit.scale), min: f16(fit.min) };
            x.iter().map(|&x| fit.scale * fit.code(x, search.n_max) - fit.min).collect()
        }
        _ => return None,
    })
}

#[derive(Clone, Copy)]
enum Plain {
    Abs(f32),
    Square,
}

/// The weight of each squared error.
fn weights(x: &[f32], sub: usize, importance: Option<&[f32]>, plain: Plain, sigma2: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for (j, part) in x.chunks(sub).enumerate() {
        let mean = mean_square(part);
        out.extend(part.iter().enumerate().map(|(i, v)| match (importance, plain) {
            (Some(q), _) => q[j * sub + i] * (sigma2 + v * v).sqrt(),
            (None, Plain::Abs(share)) => v.abs() + share * mean.sqrt(),
            (None, Plain::Square) => v * v + mean,
        }));
    }
    out
}

fn mean_square(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, v| sum + v * v) / x.len() as f32
}

fn f16(x: f32) -> f32 {
    half::f16::from_f32(x).to_f32()
}

fn limit(x: f32, lo: f32, hi: f32) -> f32 {
    let x = if x < hi { x } else { hi };
    if x > lo { x } else { lo }
}

fn inverse(x: f32) -> f32 {
    if x != 0.0 { 1.0 / x } else { 0.0 }
}

fn integer(x: f32, d: f32, lo: f32, hi: f32) -> f32 {
    limit((x * inverse(d)).round_ties_even(), lo, hi)
}

#[derive(Clone, Copy)]
struct Affine {
    n_max: f32,
    first: f32,
    step: f32,
    n: usize,
    min_not_negative: bool,
}

#[derive(Clone, Copy)]
struct Fit {
    scale: f32,
    min: f32,
}

impl Fit {
    fn code(self, x: f32, n_max: f32) -> f32 {
        code(x, inverse(self.scale), self.min, n_max)
    }

    fn error(self, x: &[f32], w: &[f32], n_max: f32) -> f32 {
        x.iter().zip(w).fold(0.0, |sum, (x, w)| {
            let e = (x + self.min) - self.scale * self.code(*x, n_max);
            sum + w * (e * e)
        })
    }
}

fn code(x: f32, inverse: f32, min: f32, n_max: f32) -> f32 {
    limit(((x + min) * inverse).round_ties_even(), 0.0, n_max)
}

/// Sums of w, w x, w q, w q q and w q x.
fn affine_sums(x: &[f32], w: &[f32], code: impl Fn(f32) -> f32) -> [f32; 5] {
    x.iter().zip(w).fold([0.0; 5], |[sw, swx, swq, swqq, swqx], (&x, &w)| {
        let q = code(x);
        let wq = w * q;
        [sw + w, swx + w * x, swq + wq, swqq + wq * q, swqx + wq * x]
    })
}

fn affine_fit(x: &[f32], w: &[f32], search: &Affine) -> Fit {
    let (mut lo, mut hi) = (x[0], x[0]);
    for &v in x {
        lo = if v < lo { v } else { lo };
        hi = if v > hi { v } else { hi };
    }
    if search.min_not_negative && lo >= 0.0 {
        lo = 0.0;
    }
    let range = hi - lo;
    let fit = Fit { scale: if range > 1e-15 { range / search.n_max } else { 0.0 }, min: -lo };
    let mut best = (fit, f32::NEG_INFINITY);
    let offer = |best: &mut (Fit, f32), inverse: f32, offset: f32| {
        let [sw, swx, swq, swqq, swqx] = affine_sums(x, w, |x| code(x, inverse, offset, search.n_max));
        let det = sw * swqq - swq * swq;
        let mut scale = (sw * swqx - swx * swq) / det;
        let mut min = (swq * swqx - swqq * swx) / det;
        if search.min_not_negative && min < 0.0 {
            (scale, min) = (swqx / swqq, 0.0);
        }
        let gain = scale * (2.0 * swqx - scale * swqq + 2.0 * min * swq) - min * (2.0 * swx + min * sw);
        if gain > best.1 && scale > 0.0 {
            *best = (Fit { scale, min }, gain);
        }
    };
    for below in [0.0, 0.5] {
        for k in 0..search.n {
            let t = search.n_max + search.first + search.step * k as f32;
            let inverse = if range > 1e-15 { t / range } else { 0.0 };
            let offset = if inverse > 0.0 { -lo - below / inverse } else { -lo };
            offer(&mut best, inverse, if search.min_not_negative && offset < 0.0 { 0.0 } else { offset });
        }
    }
    for _ in 0..2 {
        let fit = best.0;
        offer(&mut best, inverse(fit.scale), fit.min);
    }
    best.0
}

#[derive(Clone)]
struct AffineBlock {
    d: f32,
    dmin: f32,
    sc: Vec<f32>,
    m: Vec<f32>,
}

impl AffineBlock {
    fn fit(&self, j: usize) -> Fit {
        Fit { scale: self.d * self.sc[j], min: self.dmin * self.m[j] }
    }
}

fn affine_block(x: &[f32], w: &[f32], sub: usize, search: &Affine, sub_max: f32) -> Vec<f32> {
    let subs: Vec<(&[f32], &[f32])> = x.chunks(sub).zip(w.chunks(sub)).collect();
    let fits: Vec<Fit> = subs.iter().map(|(x, w)| affine_fit(x, w, search)).collect();
    let top = |of: fn(&Fit) -> f32| fits.iter().map(of).fold(0.0, |a, b| if b > a { b } else { a }) / sub_max;
    let (d, dmin) = (top(|f| f.scale), top(|f| f.min));
    let with_d = |block: &AffineBlock, d: f32| AffineBlock {
        d: f16(d),
        sc: fits.iter().map(|f| integer(f.scale, f16(d), 0.0, sub_max)).collect(),
        ..block.clone()
    };
    let with_dmin = |block: &AffineBlock, dmin: f32| AffineBlock {
        dmin: f16(dmin),
        m: fits.iter().map(|f| integer(f.min, f16(dmin), 0.0, sub_max)).collect(),
        ..block.clone()
    };
    let errors = |block: &AffineBlock| -> Vec<f32> {
        subs.iter().enumerate().map(|(j, (x, w))| block.fit(j).error(x, w, search.n_max)).collect()
    };
    let zero = AffineBlock { d: 0.0, dmin: 0.0, sc: vec![0.0; subs.len()], m: vec![0.0; subs.len()] };
    let mut block = with_dmin(&with_d(&zero, d), dmin);
    let mut error = errors(&block);
    let keep_better = |trial: AffineBlock, block: &mut AffineBlock, error: &mut Vec<f32>| {
        let e = errors(&trial);
        if total(&e) < total(error) {
            (*block, *error) = (trial, e);
        }
    };
    for k in 1..9 {
        let factor = 1.0 + 0.5 * k as f32 / sub_max;
        for trial in [with_d(&block, d * factor), with_dmin(&block, dmin * factor)] {
            keep_better(trial, &mut block, &mut error);
        }
    }
    for round in 0..3 {
        let from = block.clone();
        for (dsc, dm) in
            [(-1., 0.), (1., 0.), (0., -1.), (0., 1.), (-1., -1.), (1., 1.), (-1., 1.), (1., -1.)]
        {
            for (j, (x, w)) in subs.iter().enumerate() {
                let sc = limit(from.sc[j] + dsc, 0.0, sub_max);
                let m = limit(from.m[j] + dm, 0.0, sub_max);
                let e = Fit { scale: from.d * sc, min: from.dmin * m }.error(x, w, search.n_max);
                if e < error[j] {
                    (error[j], block.sc[j], block.m[j]) = (e, sc, m);
                }
            }
        }
        if round == 2 {
            break;
        }
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (j, (x, w)) in subs.iter().enumerate() {
            let (fit, sc, m) = (block.fit(j), block.sc[j], block.m[j]);
            let [sw, swx, swq, swqq, swqx] = affine_sums(x, w, |x| fit.code(x, search.n_max));
            aa += sc * sc * swqq;
            ab += sc * m * swq;
            bb += m * m * sw;
            ax += sc * swqx;
            bx += m * swx;
        }
        let det = aa * bb - ab * ab;
        let (d, dmin) =
            if det > 0.0 { ((ax * bb - ab * bx) / det, (ab * ax - aa * bx) / det) } else { (ax / aa, 0.0) };
        let trial = AffineBlock { d: f16(d), dmin: f16(dmin), ..block.clone() };
        if trial.d > 0.0 && trial.dmin >= 0.0 {
            keep_better(trial, &mut block, &mut error);
        }
    }
    let weight = |(i, &x): (usize, &f32)| {
        let fit = block.fit(i / sub);
        fit.scale * fit.code(x, search.n_max) - fit.min
    };
    x.iter().enumerate().map(weight).collect()
}

fn total(errors: &[f32]) -> f32 {
    errors.iter().fold(0.0, |sum, e| sum + e)
}

struct Signed {
    /// The numbers that a code may stand for, rising.
    grid: Vec<f32>,
    /// Whether they are all integers from the first to the last.
    integers: bool,
    step: f32,
    n: i32,
}

impl Signed {
    fn integers(half: i32) -> Self {
        Self { grid: (-half..half).map(|v| v as f32).collect(), integers: true, step: 0.1, n: 9 }
    }

    fn iq4() -> Self {
        let grid = kestrel_quant::codec::iq4::VALUES.map(f32::from).to_vec();
        Self { grid, integers: false, step: 1.0, n: 7 }
    }

    fn ends(&self) -> [f32; 2] {
        [self.grid[0], self.grid[self.grid.len() - 1]]
    }

    fn nearest(&self, t: f32) -> f32 {
        let [low, high] = self.ends();
        if self.integers {
            return limit(t.round_ties_even(), low, high);
        }
        // The middle of the bin of half a unit that t lies in: no midpoint between two numbers does.
        let bin = ((limit(t, low, high) + 128.0) * 2.0 - 0.5).round_ties_even();
        let middle = bin / 2.0 - 127.75;
        let nearer = |a: f32, b: f32| if (b - middle).abs() < (a - middle).abs() { b } else { a };
        self.grid.iter().copied().reduce(nearer).unwrap_or(0.0)
    }

    /// Sums of w g x and w g g.
    fn sums(&self, x: &[f32], w: &[f32], inverse: f32) -> (f32, f32) {
        x.iter().zip(w).fold((0.0, 0.0), |(wgx, wgg), (x, w)| {
            let g = self.nearest(x * inverse);
            (wgx + w * g * x, wgg + w * g * g)
        })
    }

    fn error(&self, x: &[f32], w: &[f32], scale: f32) -> f32 {
        x.iter().zip(w).fold(0.0, |sum, (x, w)| {
            let e = x - scale * self.nearest(x * inverse(scale));
            sum + w * (e * e)
        })
    }

    fn fit(&self, x: &[f32], w: &[f32]) -> f32 {
        let peak = largest(x);
        let ends = self.ends();
        let mut best = (if peak.abs() > 1e-15 { peak / ends[0] } else { 0.0 }, 0.0);
        let offer = |best: &mut (f32, f32), inverse: f32| {
            let (wgx, wgg) = self.sums(x, w, inverse);
            let gain = wgx * wgx / wgg;
            if gain > best.1 {
                *best = (wgx / wgg, gain);
            }
        };
        for edge in ends {
            for k in -self.n..=self.n {
                let t = edge + self.step * k as f32;
                offer(&mut best, if peak.abs() > 1e-15 { t / peak } else { 0.0 });
            }
        }
        let inverse = inverse(best.0);
        offer(&mut best, inverse);
        best.0
    }
}

/// The (first) number of the largest magnitude.
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0f32, |a, &b| if b.abs() > a.abs() { b } else { a })
}

fn signed_single(x: &[f32], w: &[f32], search: &Signed) -> Vec<f32> {
    let scale = f16(search.fit(x, w));
    x.iter().map(|x| scale * search.nearest(x * inverse(scale))).collect()
}

fn signed_block(x: &[f32], w: &[f32], sub: usize, search: &Signed, sub_half: f32) -> Vec<f32> {
    let subs: Vec<(&[f32], &[f32])> = x.chunks(sub).zip(w.chunks(sub)).collect();
    let fits: Vec<f32> = subs.iter().map(|(x, w)| search.fit(x, w)).collect();
    let first = largest(&fits) / -sub_half;
    let errors = |d: f32, sc: &[f32]| -> Vec<f32> {
        subs.iter().zip(sc).map(|((x, w), sc)| search.error(x, w, d * sc)).collect()
    };
    let with_d = |d: f32| -> (f32, Vec<f32>) {
        (f16(d), fits.iter().map(|fit| integer(*fit, f16(d), -sub_half, sub_half - 1.0)).collect())
    };
    let (mut d, mut sc) = with_d(first);
    let mut error = errors(d, &sc);
    for k in 1..9 {
        let trial = with_d(first * (1.0 + 0.5 * k as f32 / sub_half));
        let e = errors(trial.0, &trial.1);
        if total(&e) < total(&error) {
            ((d, sc), error) = (trial, e);
        }
    }
    for round in 0..3 {
        let from = sc.clone();
        for step in [-1.0, 1.0, -2.0, 2.0] {
            for (j, (x, w)) in subs.iter().enumerate() {
                let trial = limit(from[j] + step, -sub_half, sub_half - 1.0);
                let e = search.error(x, w, d * trial);
                if e < error[j] {
                    (error[j], sc[j]) = (e, trial);
                }
            }
        }
        if round == 2 {
            break;
        }
        let (mut num, mut den) = (0.0, 0.0);
        for ((x, w), sc) in subs.iter().zip(&sc) {
            let (wgx, wgg) = search.sums(x, w, inverse(d * sc));
            num += sc * wgx;
            den += sc * sc * wgg;
        }
        let trial = f16(num / den);
        let e = errors(trial, &sc);
        if total(&e) < total(&error) {
            (d, error) = (trial, e);
        }
    }
    let weight = |(i, &x): (usize, &f32)| {
        let scale = d * sc[i / sub];
        scale * search.nearest(x * inverse(scale))
    };
    x.iter().enumerate().map(weight).collect()
}
