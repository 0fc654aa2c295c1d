//! Error feedback: rounding a matrix so that what it multiplies comes out right, not so that each weight does.
//!
//! With inputs x of a layer, `H = mean(x x^T)` and `e` the error of one row, the mean squared error of that row's output
//! is `e H e^T`. Columns are rounded in order, and each column is first corrected for what the columns before it did
//! wrong, as far as their inputs are correlated: with `H = (I + U) D (I + U)^T`, U strictly upper triangular,
//!
//!     q[k] = round(w[k] + sum_{j<k} (w[j] - q[j]) U[j][k])
//!
//! and the output's error becomes `sum_k D[k] r[k]^2`, r what the rounding itself lost. (LDLQ, Chee et al. 2023; the same
//! as GPTQ, Frantar et al. 2022.) The scales of a block are searched when its first column is due, on the corrected
//! weights and with D as their importance. Then single codes and scales are changed as long as that makes `e H e^T`
//! smaller ([`Feedback::with_sweeps`]). The blocks are those of the type, and nothing reads them differently.
//!
//! H is kept for columns in groups, products between groups count as zero. Sums are f32 in a fixed order.

use kestrel_formats::GgmlType;

use crate::codec::steps::{Parts, Taken, taken};
use crate::codec::{Codec, codec, round_f16};
use crate::isa::{Isa, Work};

/// Added to the diagonal of H, as a share of its mean.
const DAMPING: f64 = 0.01;
/// Rows that go together.
const ROWS: usize = 16;
/// How often codes and scales are gone over after the feedback, unless told otherwise.
const SWEEPS: usize = 3;

/// What the inputs of one matrix are like, prepared for quantizing its rows.
pub struct Feedback {
    group: usize,
    /// H, damped: (n_groups, group, group).
    products: Vec<f32>,
    /// I + U of each group, row by row: what is below the diagonal means nothing.
    factor: Vec<f32>,
    /// D (cols).
    importance: Vec<f32>,
    sweeps: usize,
}

impl Feedback {
    /// `products` are those of the inputs in groups of `group` columns: (cols / group, group, group), symmetric. `None`
    /// where they are not those of any inputs: not finite, or not positive definite even when damped.
    ///
    /// # Panics
    /// If `products` is no whole number of groups.
    pub fn new(products: &[f32], group: usize) -> Option<Self> {
        assert!(group > 0 && products.len().is_multiple_of(group * group), "whole groups");
        let n_groups = products.len() / (group * group);
        let diagonal = products.chunks(group * group).flat_map(|h| h.iter().step_by(group + 1));
        let mean = diagonal.map(|&x| f64::from(x)).sum::<f64>() / (n_groups * group).max(1) as f64;
        if !mean.is_finite() || mean < 0.0 {
            return None;
        }
        // Inputs that are all zero make every error equal.
        let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        let mut out =
            Self { group, products: products.to_vec(), factor: Vec::new(), importance: Vec::new(), sweeps: SWEEPS };
        for h in out.products.chunks_mut(group * group) {
            h.iter_mut().step_by(group + 1).for_each(|x| *x += damping as f32);
            let (factor, d) = factorize(h, group)?;
            out.factor.extend(factor);
            out.importance.extend(d);
        }
        Some(out)
    }

    /// Sets how often codes and scales are gone over after the feedback.
    pub fn with_sweeps(self, sweeps: usize) -> Self {
        Self { sweeps, ..self }
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.importance.len()
    }

    /// Whether blocks of this type can be quantized: they must not lie in two groups.
    pub fn takes(&self, ty: GgmlType) -> bool {
        taken(ty).is_some() && self.group.is_multiple_of(ty.block_len())
    }

    /// Quantizes whole rows. The bytes are the same for every instruction set and however rows are split.
    ///
    /// # Panics
    /// If the type is not one that [`takes`](Self::takes) allows, or the lengths do not fit.
    pub fn quantize_with(&self, isa: Isa, ty: GgmlType, rows: &[f32], dst: &mut [u8]) {
        assert!(self.takes(ty), "{ty} in groups of {}", self.group);
        let taken = taken(ty).expect("a block type");
        let row_bytes = self.cols() / ty.block_len() * ty.block_bytes();
        assert_eq!(rows.len() / self.cols() * row_bytes, dst.len());
        let codec = codec(ty);
        for (rows, dst) in rows.chunks(ROWS * self.cols()).zip(dst.chunks_mut(ROWS * row_bytes)) {
            isa.run(Rows { feedback: self, isa, codec, taken, rows, dst });
        }
    }

    /// `sum e H e^T` over rows of errors, H with its damping: what quantizing makes small.
    pub fn output_error(&self, errors: &[f32]) -> f64 {
        let (n, mut sum) = (self.group, 0.0);
        for e in errors.chunks(self.cols()) {
            for (e, h) in e.chunks(n).zip(self.products.chunks(n * n)) {
                for (e_k, h) in e.iter().zip(h.chunks(n)) {
                    let dot: f64 = h.iter().zip(e).map(|(h, e)| f64::from(*h) * f64::from(*e)).sum();
                    sum += f64::from(*e_k) * dot;
                }
            }
        }
        sum
    }
}

/// I + U and D of `h = (I + U) D (I + U)^T`; `None` if `h` is not positive definite.
fn factorize(h: &[f32], n: usize) -> Option<(Vec<f32>, Vec<f32>)> {
    // The lower triangle; row j becomes column j of U.
    let mut a: Vec<f64> = h.iter().map(|&x| f64::from(x)).collect();
    let mut d = vec![0f32; n];
    for j in (0..n).rev() {
        let (above, row) = a.split_at_mut(j * n);
        let (row, pivot) = row[..=j].split_at_mut(j);
        let pivot = pivot[0];
        if !pivot.is_finite() || pivot <= 0.0 {
            return None;
        }
        d[j] = pivot as f32;
        row.iter_mut().for_each(|x| *x /= pivot);
        for (i, u) in row.iter().enumerate() {
            let scaled = u * pivot;
            above[i * n..=i * n + i].iter_mut().zip(row.iter()).for_each(|(a, u)| *a -= scaled * u);
        }
    }
    let mut factor = vec![0f32; n * n];
    for k in 0..n {
        for j in 0..k {
            factor[j * n + k] = a[k * n + j] as f32;
        }
        factor[k * n + k] = 1.0;
    }
    Some((factor, d))
}

/// `y += a * x`.
#[inline(always)]
fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// Sixteen sums side by side, so that it vectorises in a fixed order.
#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (xs, x_rest) = x.as_chunks::<16>();
    let (ys, y_rest) = y.as_chunks::<16>();
    for (x, y) in xs.iter().zip(ys) {
        for l in 0..16 {
            lanes[l] += x[l] * y[l];
        }
    }
    lanes.iter().sum::<f32>() + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f32>()
}

/// A few rows on their way into blocks.
struct Rows<'a> {
    feedback: &'a Feedback,
    isa: Isa,
    codec: &'static dyn Codec,
    taken: Taken,
    rows: &'a [f32],
    dst: &'a mut [u8],
}

impl Work for Rows<'_> {
    #[inline(always)]
    fn run<const L: usize>(self) {
        let Feedback { group, sweeps, .. } = *self.feedback;
        let cols = self.feedback.cols();
        let n_rows = self.rows.len() / cols;
        let ty = self.codec.ggml_type();
        let (len, bytes) = (ty.block_len(), ty.block_bytes());
        let row_bytes = cols / len * bytes;
        let mut fed = vec![0f32; n_rows * group]; // (n_rows, group) the weights, corrected
        let mut errors = vec![0f32; n_rows * group]; // (n_rows, group) w - q
        let mut numbers = vec![0f32; n_rows * group]; // (n_rows, group)
        let mut parts = vec![Parts::new(0.0, 0.0); n_rows * group / len]; // (n_rows, group / len)
        let mut block = vec![0f32; n_rows * len];
        let mut block_bytes = vec![0u8; n_rows * bytes];
        for g in 0..cols / group {
            let square = g * group * group..(g + 1) * group * group;
            let (h, factor) = (&self.feedback.products[square.clone()], &self.feedback.factor[square]);
            let importance = &self.feedback.importance[g * group..(g + 1) * group];
            let weights = |r: usize| &self.rows[r * cols + g * group..][..group];
            for r in 0..n_rows {
                fed[r * group..][..group].copy_from_slice(weights(r));
            }
            for (b, start) in (0..group).step_by(len).enumerate() {
                for r in 0..n_rows {
                    block[r * len..][..len].copy_from_slice(&fed[r * group + start..][..len]);
                }
                self.codec.quantize_with(self.isa, &block, Some(&importance[start..][..len]), &mut block_bytes);
                for r in 0..n_rows {
                    let p = (self.taken.parts)(&block_bytes[r * bytes..][..bytes]);
                    parts[r * (group / len) + b] = p;
                    let (fed, errors) = (&mut fed[r * group..][..group], &mut errors[r * group..][..group]);
                    for k in start..start + len {
                        let (scale, min) = p.scale_min((k - start) / self.taken.shape.sub_len);
                        let number = (self.taken.nearest)((fed[k] + min) * inverse(scale));
                        numbers[r * group + k] = number;
                        errors[k] = weights(r)[k] - (scale * number - min);
                        add_scaled(&mut fed[k + 1..start + len], errors[k], &factor[k * group..][k + 1..start + len]);
                    }
                }
                for k in start..start + len {
                    let factor = &factor[k * group..][start + len..group];
                    for r in 0..n_rows {
                        let error = errors[r * group + k];
                        add_scaled(&mut fed[r * group + start + len..][..group - start - len], error, factor);
                    }
                }
            }
            for r in 0..n_rows {
                let n_blocks = group / len;
                let mut row = Row {
                    taken: &self.taken,
                    len,
                    h,
                    weights: weights(r),
                    errors: &mut errors[r * group..][..group],
                    numbers: &mut numbers[r * group..][..group],
                    parts: &mut parts[r * n_blocks..][..n_blocks],
                    gradient: &mut fed[r * group..][..group],
                };
                if sweeps > 0 {
                    row.refine(sweeps);
                }
                let dst = &mut self.dst[r * row_bytes + g * n_blocks * bytes..][..n_blocks * bytes];
                let blocks = dst.chunks_mut(bytes).zip(row.numbers.chunks(len)).zip(row.parts.iter());
                blocks.for_each(|((dst, numbers), parts)| (self.taken.put)(parts, numbers, dst));
            }
        }
    }
}

/// `1 / x`, or 0 where a scale is 0.
#[inline(always)]
fn inverse(x: f32) -> f32 {
    if x != 0.0 { 1.0 / x } else { 0.0 }
}

/// One row within one group, after the feedback.
struct Row<'a> {
    taken: &'a Taken,
    /// Weights of a block.
    len: usize,
    h: &'a [f32],
    weights: &'a [f32],
    /// w - q.
    errors: &'a mut [f32],
    numbers: &'a mut [f32],
    parts: &'a mut [Parts],
    /// H e: half the slope of `e H e^T`.
    gradient: &'a mut [f32],
}

impl Row<'_> {
    /// Changes single codes and scales for the better, until `sweeps` are over or nothing changes.
    #[inline(always)]
    fn refine(&mut self, sweeps: usize) {
        let n = self.weights.len();
        for k in 0..n {
            self.gradient[k] = dot(&self.h[k * n..][..n], self.errors);
        }
        for _ in 0..sweeps {
            let mut changed = false;
            for b in 0..self.parts.len() {
                changed |= self.refine_scales(b);
            }
            for k in 0..n {
                changed |= self.refine_code(k);
            }
            if !changed {
                break;
            }
        }
    }

    /// The best code of column k, all else as it is.
    #[inline(always)]
    fn refine_code(&mut self, k: usize) -> bool {
        let n = self.weights.len();
        let (scale, min) = self.parts[k / self.len].scale_min(k % self.len / self.taken.shape.sub_len);
        let h = &self.h[k * n..][..n];
        let q = self.weights[k] - self.errors[k];
        let number = (self.taken.nearest)((q + self.gradient[k] / h[k] + min) * inverse(scale));
        if number == self.numbers[k] || scale == 0.0 {
            return false;
        }
        let error = self.weights[k] - (scale * number - min);
        add_scaled(self.gradient, error - self.errors[k], h);
        (self.numbers[k], self.errors[k]) = (number, error);
        true
    }

    /// Better scales for the codes of block b: `d` and `dmin` by least squares, the integers of each sub-block by steps
    /// of one.
    #[inline(always)]
    fn refine_scales(&mut self, b: usize) -> bool {
        let shape = self.taken.shape;
        let (start, n_subs) = (b * self.len, self.len / shape.sub_len);
        let mut changed = false;
        for j in 0..n_subs {
            let from = start + j * shape.sub_len;
            for step in [1.0, -1.0] {
                if let Some((lo, hi)) = shape.sc {
                    let mut parts = self.parts[b];
                    parts.sc[j] = (parts.sc[j] + step).clamp(lo, hi);
                    changed |= self.offer(b, parts, from, shape.sub_len);
                }
                if let Some((lo, hi)) = shape.m {
                    let mut parts = self.parts[b];
                    parts.m[j] = (parts.m[j] + step).clamp(lo, hi);
                    changed |= self.offer(b, parts, from, shape.sub_len);
                }
            }
        }
        changed |= self.least_squares(b, |parts, j, number| parts.sc[j] * number, |parts, by| {
            parts.d = round_f16(parts.d + by);
        });
        if self.parts[b].dmin != 0.0 {
            changed |= self.least_squares(b, |parts, j, _| -parts.m[j], |parts, by| {
                parts.dmin = round_f16(parts.dmin + by);
            });
        }
        changed
    }

    /// Moves block b as far along `direction` (sub-block, number) as makes the error smallest.
    #[inline(always)]
    fn least_squares(
        &mut self,
        b: usize,
        direction: impl Fn(&Parts, usize, f32) -> f32,
        step: impl Fn(&mut Parts, f32),
    ) -> bool {
        let (n, start, len) = (self.weights.len(), b * self.len, self.len);
        let mut v = [0f32; 256];
        for i in 0..len {
            v[i] = direction(&self.parts[b], i / self.taken.shape.sub_len, self.numbers[start + i]);
        }
        let slope = dot(&v[..len], &self.gradient[start..start + len]);
        let curvature: f32 =
            (0..len).map(|i| v[i] * dot(&self.h[(start + i) * n + start..][..len], &v[..len])).sum();
        let mut parts = self.parts[b];
        step(&mut parts, slope * inverse(curvature));
        let possible = parts.d.is_finite() && parts.dmin.is_finite();
        possible && self.offer(b, parts, start, len)
    }

    /// Takes other scales for block b, which differ in columns `from .. from + n_cols` only, if the codes are closer
    /// with them.
    #[inline(always)]
    fn offer(&mut self, b: usize, parts: Parts, from: usize, n_cols: usize) -> bool {
        let n = self.weights.len();
        let mut moved = [0f32; 256]; // by which the errors change
        let (mut slope, mut curvature) = (0.0, 0.0);
        for i in 0..n_cols {
            let k = from + i;
            let (scale, min) = parts.scale_min(k % self.len / self.taken.shape.sub_len);
            moved[i] = self.weights[k] - (scale * self.numbers[k] - min) - self.errors[k];
        }
        for i in 0..n_cols {
            slope += moved[i] * self.gradient[from + i];
            curvature += moved[i] * dot(&self.h[(from + i) * n + from..][..n_cols], &moved[..n_cols]);
        }
        let better = 2.0 * slope + curvature < 0.0;
        if better {
            self.parts[b] = parts;
            for i in 0..n_cols {
                self.errors[from + i] += moved[i];
                add_scaled(self.gradient, moved[i], &self.h[(from + i) * n..][..n]);
            }
        }
        better
    }
}
