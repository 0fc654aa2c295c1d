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

use kestrel_formats::calibration::InputProducts;
use kestrel_formats::{Error, ErrorKind, GgmlType, Result};

use crate::codec::steps::{Parts, Taken, taken};
use crate::codec::{Codec, codec, round_f16};
use crate::isa::{Isa, Work};

/// Added to the diagonal of H, as a share of its mean.
const DAMPING: f64 = 0.01;
/// How many inputs per column weigh as much as the doubt whether columns have anything in common. Half or twice as many make
/// no difference on the tiny model; without doubt, its Q4_K_M diverges 1.6 times as far when 512 tokens are all there is.
const DOUBT: f32 = 2.0;
/// Columns of a group at most, unless asked for.
pub const GROUP_USUAL: usize = 1024;
/// Rows that go together.
const ROWS: usize = 16;
/// Sweeps after which hardly any code or scale still changes.
pub const SWEEPS_BEST: usize = 8;

/// What the inputs of one matrix are like, prepared for quantizing its rows.
#[derive(Default)]
pub struct Feedback {
    group: usize,
    /// H, shrunk and damped: (n_groups, group, group).
    products: Vec<f32>,
    /// I + U of each group, row by row: what is below the diagonal means nothing.
    factor: Vec<f32>,
    /// D (cols).
    importance: Vec<f32>,
    sweeps: usize,
    /// What [`factorize`] works in, (group, group).
    scratch: Vec<f64>,
}

impl Feedback {
    /// Prepares for inputs with these products. Errors and panics: as [`Self::renew`].
    pub fn new(products: &InputProducts<'_>) -> Result<Self> {
        let mut out = Self::default();
        out.renew(products)?;
        Ok(out)
    }

    /// Prepares for other inputs, in the memory that is there. What pairs of columns have in common is trusted the less the
    /// fewer inputs there are: off its diagonal, H is multiplied by `count / (count + 2·group)`. Of fewer inputs than
    /// columns the products are singular, and feedback by them would make a matrix worse than none.
    ///
    /// Errors: `Inconsistent` if they are not those of any inputs: not finite, or not positive definite even when damped;
    /// then nothing may be quantized.
    ///
    /// # Panics
    /// If the products are no whole number of groups.
    pub fn renew(&mut self, products: &InputProducts<'_>) -> Result<()> {
        let InputProducts { means, group, count } = *products;
        assert!(group > 0 && means.len().is_multiple_of(group * group), "whole groups");
        let n_groups = means.len() / (group * group);
        let diagonal = means.chunks(group * group).flat_map(|h| h.iter().step_by(group + 1));
        let mean = diagonal.map(|&x| f64::from(x)).sum::<f64>() / (n_groups * group).max(1) as f64;
        if !mean.is_finite() || mean < 0.0 || !means.iter().all(|x| x.is_finite()) {
            return Err(no_inputs());
        }
        // Inputs that are all zero make every error equal.
        let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        let trust = 1.0 / (1.0 + DOUBT * group as f32 / count);
        self.group = group;
        self.products.clear();
        self.products.reserve_exact(means.len());
        self.products.extend(means.iter().map(|x| trust * x));
        self.factor.resize(means.len(), 0.0);
        self.importance.resize(n_groups * group, 0.0);
        let groups = self.products.chunks_mut(group * group).zip(means.chunks(group * group));
        let factors = self.factor.chunks_mut(group * group).zip(self.importance.chunks_mut(group));
        let prepared = groups.zip(factors).all(|((h, means), (factor, d))| {
            let diagonal = h.iter_mut().step_by(group + 1).zip(means.iter().step_by(group + 1));
            diagonal.for_each(|(x, mean)| *x = mean + damping as f32);
            factorize(h, group, &mut self.scratch, factor, d)
        });
        if group > GROUP_USUAL {
            self.scratch = Vec::new(); // as large as all the rest
        }
        if prepared { Ok(()) } else { Err(no_inputs()) }
    }

    /// Products that there is room for.
    pub fn capacity(&self) -> usize {
        self.products.capacity()
    }

    /// Sets how often codes and scales are gone over after the feedback, at most; 0 unless told otherwise.
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

    /// `sum e H e^T` over rows of errors, H with its damping: what quantizing makes small. The same bits for every
    /// instruction set.
    pub fn output_error(&self, isa: Isa, errors: &[f32]) -> f64 {
        let mut sum = 0.0;
        isa.run(OutputError { feedback: self, errors, sum: &mut sum });
        sum
    }
}

fn no_inputs() -> Error {
    Error::new(ErrorKind::Inconsistent)
        .expected("products of the inputs of a matrix")
        .found("others: not finite, or not positive definite")
}

/// Stores I + U and D of `h = (I + U) D (I + U)^T` in `factor` and `d`; false if `h` is not positive definite.
fn factorize(h: &[f32], n: usize, a: &mut Vec<f64>, factor: &mut [f32], d: &mut [f32]) -> bool {
    // The lower triangle; row j becomes column j of U.
    a.clear();
    a.extend(h.iter().map(|&x| f64::from(x)));
    for j in (0..n).rev() {
        let (above, row) = a.split_at_mut(j * n);
        let (row, pivot) = row[..=j].split_at_mut(j);
        let pivot = pivot[0];
        if !pivot.is_finite() || pivot <= 0.0 {
            return false;
        }
        d[j] = pivot as f32;
        row.iter_mut().for_each(|x| *x /= pivot);
        for (i, u) in row.iter().enumerate() {
            let scaled = u * pivot;
            above[i * n..=i * n + i].iter_mut().zip(row.iter()).for_each(|(a, u)| *a -= scaled * u);
        }
    }
    for k in 0..n {
        for j in 0..k {
            factor[j * n + k] = a[k * n + j] as f32;
        }
        factor[k * n + k] = 1.0;
    }
    true
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

/// What [`Feedback::output_error`] does.
struct OutputError<'a> {
    feedback: &'a Feedback,
    errors: &'a [f32],
    sum: &'a mut f64,
}

impl Work for OutputError<'_> {
    #[inline(always)]
    fn run<const L: usize>(self) {
        let (n, cols) = (self.feedback.group, self.feedback.cols());
        for (g, h) in self.feedback.products.chunks(n * n).enumerate() {
            // A row of H for all rows of errors: H does not stay in a cache.
            for (k, h) in h.chunks(n).enumerate() {
                for e in self.errors.chunks(cols) {
                    let e = &e[g * n..][..n];
                    *self.sum += f64::from(e[k]) * f64::from(dot(h, e));
                }
            }
        }
    }
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
                self.codec.quantize_with(
                    self.isa,
                    &block,
                    Some(&importance[start..][..len]),
                    &mut block_bytes,
                );
                for r in 0..n_rows {
                    let p = (self.taken.parts)(&block_bytes[r * bytes..][..bytes]);
                    parts[r * (group / len) + b] = p;
                    let (fed, errors) = (&mut fed[r * group..][..group], &mut errors[r * group..][..group]);
                    for k in start..start + len {
                        let (scale, min) = p.scale_min((k - start) / self.taken.shape.sub_len);
                        let number = (self.taken.nearest)((fed[k] + min) * inverse(scale));
                        numbers[r * group + k] = number;
                        errors[k] = weights(r)[k] - (scale * number - min);
                        add_scaled(
                            &mut fed[k + 1..start + len],
                            errors[k],
                            &factor[k * group..][k + 1..start + len],
                        );
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
        changed |= self.least_squares(
            b,
            |parts, j, number| parts.sc[j] * number,
            |parts, by| {
                parts.d = round_f16(parts.d + by);
            },
        );
        if self.parts[b].dmin != 0.0 {
            changed |= self.least_squares(
                b,
                |parts, j, _| -parts.m[j],
                |parts, by| {
                    parts.dmin = round_f16(parts.dmin + by);
                },
            );
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
        for (i, (v, number)) in v.iter_mut().zip(&self.numbers[start..start + len]).enumerate() {
            *v = direction(&self.parts[b], i / self.taken.shape.sub_len, *number);
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
        let mut moved = [0f32; 256];
        let moved = &mut moved[..n_cols]; // by which the errors change
        let (mut slope, mut curvature) = (0.0, 0.0);
        for (k, moved) in (from..).zip(moved.iter_mut()) {
            let (scale, min) = parts.scale_min(k % self.len / self.taken.shape.sub_len);
            *moved = self.weights[k] - (scale * self.numbers[k] - min) - self.errors[k];
        }
        for (k, by) in (from..).zip(moved.iter()) {
            slope += by * self.gradient[k];
            curvature += by * dot(&self.h[k * n + from..][..n_cols], moved);
        }
        let better = 2.0 * slope + curvature < 0.0;
        if better {
            self.parts[b] = parts;
            for (k, by) in (from..).zip(moved.iter()) {
                self.errors[k] += by;
                add_scaled(self.gradient, *by, &self.h[k * n..][..n]);
            }
        }
        better
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS_TRIED: usize = 20;

    /// Products of so many inputs that they are the truth.
    fn exact(means: &[f32], group: usize) -> InputProducts<'_> {
        InputProducts { means, group, count: f32::INFINITY }
    }

    /// Numbers between -1 and 1 (xorshift).
    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        let mut s = seed;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// Mean products of inputs that share a common part, in groups.
    fn products(cols: usize, group: usize) -> Vec<f32> {
        let n = 3 * cols;
        let x: Vec<f32> = (0..n)
            .flat_map(|t| {
                let own = numbers(1 + t as u64, cols + 4);
                (0..cols).map(move |k| own[k] * (1.0 + (k % 7) as f32) + 2.0 * own[cols + k % 4])
            })
            .collect();
        let mut h = vec![0f32; cols * group];
        for (k, row) in h.chunks_mut(group).enumerate() {
            for (j, to) in row.iter_mut().enumerate() {
                let j = k / group * group + j;
                *to =
                    x.chunks(cols).map(|x| f64::from(x[k]) * f64::from(x[j])).sum::<f64>() as f32 / n as f32;
            }
        }
        h
    }

    fn block_types() -> impl Iterator<Item = GgmlType> {
        GgmlType::all().filter(|ty| taken(*ty).is_some())
    }

    fn dequantized(ty: GgmlType, bytes: &[u8], n: usize) -> Vec<f32> {
        let mut out = vec![0.0; n];
        codec(ty).dequantize(bytes, &mut out);
        out
    }

    fn errors(ty: GgmlType, weights: &[f32], bytes: &[u8]) -> Vec<f32> {
        weights.iter().zip(dequantized(ty, bytes, weights.len())).map(|(w, q)| w - q).collect()
    }

    fn bytes_of(ty: GgmlType, n: usize) -> Vec<u8> {
        vec![0; n / ty.block_len() * ty.block_bytes()]
    }

    #[test]
    fn every_block_comes_apart_and_together_again() {
        for ty in block_types() {
            let (len, n) = (ty.block_len(), 4 * ty.block_len());
            let weights = numbers(5, n);
            let mut bytes = bytes_of(ty, n);
            codec(ty).quantize(&weights, None, &mut bytes);
            let taken = taken(ty).unwrap();
            let values = dequantized(ty, &bytes, n);
            for (block, values) in bytes.chunks(ty.block_bytes()).zip(values.chunks(len)) {
                let parts = (taken.parts)(block);
                let numbers: Vec<f32> = (0..len)
                    .map(|i| {
                        let (scale, min) = parts.scale_min(i / taken.shape.sub_len);
                        let number = (taken.nearest)((values[i] + min) * inverse(scale));
                        assert_eq!(scale * number - min, values[i], "{ty}");
                        number
                    })
                    .collect();
                let mut again = vec![0; block.len()];
                (taken.put)(&parts, &numbers, &mut again);
                // Where a scale is zero every code means the same.
                assert_eq!(dequantized(ty, &again, len), values, "{ty}");
            }
        }
    }

    #[test]
    fn inputs_that_have_nothing_in_common_leave_plain_rounding() {
        // Q8_0 divides by its scale before it rounds that to f16, and ignores the importance.
        for ty in block_types().filter(|ty| *ty != GgmlType::Q8_0) {
            let cols = ty.block_len();
            let mut identity = vec![0f32; cols * cols];
            identity.iter_mut().step_by(cols + 1).for_each(|x| *x = 1.0);
            let feedback = Feedback::new(&exact(&identity, cols)).unwrap().with_sweeps(0);
            let weights = numbers(3, ROWS_TRIED * cols);
            let (mut fed, mut plain) = (bytes_of(ty, weights.len()), bytes_of(ty, weights.len()));
            feedback.quantize_with(Isa::best(), ty, &weights, &mut fed);
            for (weights, plain) in weights.chunks(cols).zip(plain.chunks_mut(ty.block_bytes())) {
                codec(ty).quantize(weights, Some(&feedback.importance), plain);
            }
            assert!(fed == plain, "{ty}");
        }
    }

    /// What remains of the output's error, of that of weighted rounding: between these for every type.
    #[test]
    fn the_outputs_come_out_closer_and_closer_with_sweeps() {
        let (cols, group) = (512, 256);
        let h = products(cols, group);
        let weights = numbers(9, ROWS_TRIED * cols);
        let diagonal: Vec<f32> = h.chunks(group).enumerate().map(|(k, row)| row[k % group]).collect();
        for ty in block_types() {
            let feedback = |sweeps| Feedback::new(&exact(&h, group)).unwrap().with_sweeps(sweeps);
            let error = |bytes: &[u8]| feedback(0).output_error(Isa::best(), &errors(ty, &weights, bytes));
            let mut bytes = bytes_of(ty, weights.len());
            codec(ty).quantize(&weights, Some(&diagonal), &mut bytes);
            let plain = error(&bytes);
            let [none, swept] = [0, 3].map(|sweeps| {
                feedback(sweeps).quantize_with(Isa::best(), ty, &weights, &mut bytes);
                error(&bytes) / plain
            });
            assert!(none < 0.85, "{ty}: {none}");
            assert!(swept < none, "{ty}: {swept} after {none}");
        }
    }

    #[test]
    fn the_same_bytes_on_every_instruction_set_and_however_rows_are_split() {
        let (cols, group) = (512, 256);
        let feedback = Feedback::new(&exact(&products(cols, group), group)).unwrap();
        let weights = numbers(4, ROWS_TRIED * cols);
        for ty in [GgmlType::Q3K, GgmlType::Q4K, GgmlType::Iq4Xs, GgmlType::Q8_0] {
            let mut whole = bytes_of(ty, weights.len());
            feedback.quantize_with(Isa::Baseline, ty, &weights, &mut whole);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
                let mut parts = bytes_of(ty, weights.len());
                let row_bytes = parts.len() / ROWS_TRIED;
                for (weights, dst) in weights.chunks(3 * cols).zip(parts.chunks_mut(3 * row_bytes)) {
                    feedback.quantize_with(isa, ty, weights, dst);
                }
                assert!(parts == whole, "{ty} with {isa:?}");
            }
        }
    }

    /// Optimal brain quantization as it is defined: each column's error goes to the columns after it through the inverse
    /// of H, from which the column is then eliminated (Frantar et al. 2022, equations 2 and 3), in f64.
    fn by_inverse(feedback: &Feedback, ty: GgmlType, weights: &[f32]) -> Vec<f32> {
        let n = feedback.group;
        let mut inverse_h = inverted(&feedback.products, n);
        let mut w: Vec<f64> = weights.iter().map(|&x| x.into()).collect();
        let mut bytes = bytes_of(ty, n);
        let taken = taken(ty).unwrap();
        let mut out = vec![0f32; n];
        for k in 0..n {
            if k % ty.block_len() == 0 {
                let block: Vec<f32> = w[k..k + ty.block_len()].iter().map(|&x| x as f32).collect();
                let importance = &feedback.importance[k..k + ty.block_len()];
                codec(ty).quantize(&block, Some(importance), &mut bytes[..ty.block_bytes()]);
            }
            let parts = (taken.parts)(&bytes[..ty.block_bytes()]);
            let (scale, min) = parts.scale_min(k % ty.block_len() / taken.shape.sub_len);
            let q = scale * (taken.nearest)((w[k] as f32 + min) * inverse(scale)) - min;
            out[k] = q;
            let pivot = inverse_h[k * n + k];
            let row: Vec<f64> = inverse_h[k * n..][..n].to_vec();
            let error = (w[k] - f64::from(q)) / pivot;
            for j in k + 1..n {
                w[j] -= error * row[j];
                for i in k + 1..n {
                    inverse_h[i * n + j] -= row[i] * row[j] / pivot;
                }
            }
        }
        out
    }

    /// Gauss-Jordan.
    fn inverted(h: &[f32], n: usize) -> Vec<f64> {
        let mut a: Vec<f64> = h.iter().map(|&x| x.into()).collect();
        let mut b = vec![0f64; n * n];
        b.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
        for k in 0..n {
            let pivot = a[k * n + k];
            for m in [&mut a, &mut b] {
                m[k * n..][..n].iter_mut().for_each(|x| *x /= pivot);
            }
            for i in (0..n).filter(|i| *i != k) {
                let factor = a[i * n + k];
                for m in [&mut a, &mut b] {
                    for j in 0..n {
                        m[i * n + j] -= factor * m[k * n + j];
                    }
                }
            }
        }
        b
    }

    #[test]
    fn the_feedback_is_that_of_optimal_brain_quantization() {
        for ty in [GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q4K, GgmlType::Q3K] {
            let n = 256;
            let feedback = Feedback::new(&exact(&products(n, n), n)).unwrap().with_sweeps(0);
            let weights = numbers(6, 4 * n);
            let mut bytes = bytes_of(ty, weights.len());
            feedback.quantize_with(Isa::best(), ty, &weights, &mut bytes);
            let ours = dequantized(ty, &bytes, weights.len());
            let expected: Vec<f32> = weights.chunks(n).flat_map(|w| by_inverse(&feedback, ty, w)).collect();
            let errors = |q: &[f32]| weights.iter().zip(q).map(|(w, q)| w - q).collect::<Vec<_>>();
            // What f32 rounds otherwise now and then changes a little of all that follows in its row.
            let rms = (errors(&expected).iter().map(|e| e * e).sum::<f32>() / ours.len() as f32).sqrt();
            let same = ours.iter().zip(&expected).filter(|(a, b)| (*a - *b).abs() < 0.5 * rms).count();
            assert!(same * 10 >= ours.len() * 8, "{ty}: {same} of {}", ours.len());
            let ratio = feedback.output_error(Isa::best(), &errors(&ours))
                / feedback.output_error(Isa::best(), &errors(&expected));
            assert!((0.98..1.02).contains(&ratio), "{ty}: {ratio}");
        }
    }

    #[test]
    fn what_was_prepared_before_leaves_nothing_behind() {
        let mut renewed = Feedback::new(&exact(&products(512, 512), 512)).unwrap();
        let next = products(512, 256);
        renewed.renew(&exact(&next, 256)).unwrap();
        let weights = numbers(7, 4 * 512);
        let [a, b] = [&renewed, &Feedback::new(&exact(&next, 256)).unwrap()].map(|feedback| {
            let mut bytes = bytes_of(GgmlType::Q4K, weights.len());
            feedback.quantize_with(Isa::best(), GgmlType::Q4K, &weights, &mut bytes);
            bytes
        });
        assert!(a == b);
    }

    #[test]
    fn what_few_inputs_have_in_common_is_doubted() {
        let (cols, few, many) = (256, 64, 8192);
        // Each input has half of the one before it.
        let independent = numbers(8, cols * many + 1);
        let inputs: Vec<f32> = independent.windows(2).map(|x| x[1] + 0.5 * x[0]).collect();
        let means = |n: usize| -> Vec<f32> {
            let mut sums = vec![0f32; cols * cols];
            for x in inputs.chunks(cols).take(n) {
                sums.chunks_mut(cols).zip(x).for_each(|(row, a)| add_scaled(row, a / n as f32, x));
            }
            sums
        };
        let (of_few, of_many) = (means(few), means(many));
        let truth = Feedback::new(&exact(&of_many, cols)).unwrap();
        let weights = numbers(5, ROWS_TRIED * cols);
        let error = |count: f32| {
            let products = InputProducts { means: &of_few, group: cols, count };
            let mut bytes = bytes_of(GgmlType::Q4K, weights.len());
            let feedback = Feedback::new(&products).unwrap().with_sweeps(SWEEPS_BEST);
            feedback.quantize_with(Isa::best(), GgmlType::Q4K, &weights, &mut bytes);
            truth.output_error(Isa::best(), &errors(GgmlType::Q4K, &weights, &bytes))
        };
        let mut bytes = bytes_of(GgmlType::Q4K, weights.len());
        codec(GgmlType::Q4K).quantize(&weights, None, &mut bytes);
        let plain = truth.output_error(Isa::best(), &errors(GgmlType::Q4K, &weights, &bytes));
        let (doubted, trusted) = (error(few as f32) / plain, error(f32::INFINITY) / plain);
        assert!(doubted < 1.0, "{doubted} times the error of plain rounding");
        assert!(trusted > 1.5, "{trusted} times without a doubt");
    }

    #[test]
    fn what_cannot_be_products_is_refused_and_silence_is_not() {
        assert!(Feedback::new(&exact(&[f32::NAN; 4], 2)).is_err());
        assert!(Feedback::new(&exact(&[1.0, f32::NAN, 0.0, 1.0], 2)).is_err());
        assert!(Feedback::new(&exact(&[1.0, 9.0, 9.0, 1.0], 2)).is_err());
        assert!(Feedback::new(&exact(&[-1.0, 0.0, 0.0, -1.0], 2)).is_err());
        let silent = Feedback::new(&exact(&[0.0; 32 * 32], 32)).unwrap();
        let weights = numbers(2, 32);
        let mut bytes = bytes_of(GgmlType::Q4_0, 32);
        silent.quantize_with(Isa::best(), GgmlType::Q4_0, &weights, &mut bytes);
        assert!(errors(GgmlType::Q4_0, &weights, &bytes).iter().all(|e| e.abs() < 0.1));
        assert!(!silent.takes(GgmlType::Q4K));
    }
}
