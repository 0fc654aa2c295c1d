//! Perplexity and Kullback-Leibler divergence: windows, scored positions and the sums over them.
//!
//! Pure functions on logits. The windows and the scored half are those of llama.cpp's `llama-perplexity`, so that its
//! numbers and ours can be compared: the text is cut into windows of `n_ctx` tokens that do not overlap, a rest at the
//! end is dropped, each window starts from an empty state, and of each only the second half is scored. All sums are f64.

pub use kestrel_formats::kl_base::scored;

use std::ops::Range;

/// The windows of a text of `n_tokens`, as ranges of its tokens. Empty if the text is shorter than one window or
/// `n_ctx` is zero.
pub fn windows(n_tokens: usize, n_ctx: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let n_windows = n_tokens.checked_div(n_ctx).unwrap_or(0);
    (0..n_windows).map(move |i| i * n_ctx..(i + 1) * n_ctx)
}

/// ln of the softmax: `out[i] = logits[i] - ln(sum_j exp(logits[j]))`, in f64 and safe for large logits.
///
/// # Panics
/// If the lengths differ.
pub fn log_softmax(logits: &[f32], out: &mut [f64]) {
    assert_eq!(logits.len(), out.len());
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    // Not l - (max + ln sum), which is 0 for several tokens at once where max is so large that adding does not change it.
    let log_sum = sum.ln();
    for (o, &l) in out.iter_mut().zip(logits) {
        *o = f64::from(l) - f64::from(max) - log_sum;
    }
}

/// A mean and how sure it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The estimate itself.
    pub value: f64,
    /// One standard deviation of it; NaN for fewer than two samples.
    pub standard_error: f64,
}

/// Count, sum and sum of squares: enough for a mean with its standard error.
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    n: usize,
    sum: f64,
    sum_of_squares: f64,
}

impl Moments {
    fn add(&mut self, x: f64) {
        self.n += 1;
        self.sum += x;
        self.sum_of_squares += x * x;
    }

    fn mean(&self) -> Estimate {
        let n = self.n as f64;
        let mean = self.sum / n;
        let variance = (self.sum_of_squares / n - mean * mean).max(0.0);
        let standard_error = if self.n > 1 { (variance / (n - 1.0)).sqrt() } else { f64::NAN };
        Estimate { value: mean, standard_error }
    }
}

/// Perplexity: the exponential of the mean negative log-likelihood per scored token.
#[derive(Clone, Copy, Debug, Default)]
pub struct Perplexity(Moments);

impl Perplexity {
    /// Counts one scored position: log-probabilities over the vocabulary, and the token that really follows.
    ///
    /// # Panics
    /// If `next` is outside the vocabulary.
    pub fn add(&mut self, log_probs: &[f64], next: u32) {
        self.0.add(-log_probs[next as usize]);
    }

    /// Scored tokens so far.
    pub fn n_scored(&self) -> usize {
        self.0.n
    }

    /// The perplexity so far; its error is the first-order one of the mean, exp(m)·σ(m). NaN before the first token.
    pub fn estimate(&self) -> Estimate {
        exponential(self.0.mean())
    }
}

/// Divergence of a model's predictions from a base model's.
#[derive(Clone, Debug, Default)]
pub struct Divergence {
    kl: Vec<f64>,
    same_top1: usize,
    squared_change: Moments,
    log_ratio: Moments,
}

/// What [`Divergence`] amounts to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DivergenceSummary {
    /// Scored positions.
    pub n_scored: usize,
    /// Mean KL divergence in nats.
    pub mean_kl: Estimate,
    /// Median KL divergence in nats.
    pub median_kl: Estimate,
    /// 99th percentile in nats.
    pub p99_kl: Estimate,
    /// Largest in nats.
    pub max_kl: f64,
    /// Share of positions where both find the same token most likely, 0 to 1.
    pub same_top1: Estimate,
    /// Root mean square of the change of the probability of the token that really follows, 0 to 1.
    pub rms_change: Estimate,
    /// Perplexity over the base's. Its error is far below that of either, since both read the same text.
    pub perplexity_ratio: Estimate,
}

impl Divergence {
    /// Counts one position: KL(base ‖ model) = sum_i p_i·(ln p_i - ln q_i) for log-probabilities ln p and ln q, and what
    /// becomes of the token that really follows.
    ///
    /// # Panics
    /// If the lengths differ, or `next` is outside the vocabulary.
    pub fn add(&mut self, base: &[f64], model: &[f64], next: u32) {
        assert_eq!(base.len(), model.len());
        // A probability of zero on the base side contributes nothing, whatever the model says.
        let term = |(&p, &q): (&f64, &f64)| if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) };
        self.kl.push(base.iter().zip(model).map(term).sum());
        self.same_top1 += usize::from(argmax(base) == argmax(model));
        let (p, q) = (base[next as usize], model[next as usize]);
        self.squared_change.add((q.exp() - p.exp()).powi(2));
        self.log_ratio.add(p - q);
    }

    /// Mean KL divergence so far, in nats; NaN before the first position.
    pub fn mean_kl(&self) -> f64 {
        self.kl.iter().sum::<f64>() / self.kl.len() as f64
    }

    /// The figures over all positions so far; NaN before the first.
    pub fn summary(&self) -> DivergenceSummary {
        let mut moments = Moments::default();
        self.kl.iter().for_each(|&kl| moments.add(kl));
        let mut sorted = self.kl.clone();
        sorted.sort_by(f64::total_cmp);
        let n = self.kl.len() as f64;
        let same = self.same_top1 as f64 / n;
        let same_error = if self.kl.len() > 1 { (same * (1.0 - same) / (n - 1.0)).sqrt() } else { f64::NAN };
        DivergenceSummary {
            n_scored: self.kl.len(),
            mean_kl: moments.mean(),
            median_kl: quantile(&sorted, 0.5),
            p99_kl: quantile(&sorted, 0.99),
            max_kl: sorted.last().copied().unwrap_or(f64::NAN),
            same_top1: Estimate { value: same, standard_error: same_error },
            rms_change: root(self.squared_change.mean()),
            perplexity_ratio: exponential(self.log_ratio.mean()),
        }
    }
}

/// The exponential of a mean; its error is the first-order one, exp(m)·σ(m).
fn exponential(mean: Estimate) -> Estimate {
    let value = mean.value.exp();
    Estimate { value, standard_error: value * mean.standard_error }
}

/// The root of a mean; its error is the first-order one, σ(m) / 2·sqrt(m).
fn root(mean: Estimate) -> Estimate {
    let value = mean.value.sqrt();
    let standard_error = if mean.standard_error == 0.0 { 0.0 } else { mean.standard_error / (2.0 * value) };
    Estimate { value, standard_error }
}

/// A quantile of ascending values. How many of n samples lie below it has the standard deviation sqrt(n·f·(1 - f)),
/// whatever the distribution; the error is half the way between the values so many ranks below and above.
fn quantile(sorted: &[f64], fraction: f64) -> Estimate {
    let n = sorted.len() as f64;
    let deviation = (fraction * (1.0 - fraction) / n).sqrt();
    let at = |f: f64| percentile(sorted, f.clamp(0.0, 1.0));
    let standard_error = match sorted.len() {
        0 | 1 => f64::NAN,
        _ => (at(fraction + deviation) - at(fraction - deviation)) / 2.0,
    };
    Estimate { value: percentile(sorted, fraction), standard_error }
}

/// Linear interpolation between the two nearest ranks of ascending values.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let rank = fraction * last as f64;
    let (low, high) = (rank.floor() as usize, rank.ceil() as usize);
    sorted[low] + (rank - rank.floor()) * (sorted[high] - sorted[low])
}

/// Index of the largest, the first of equals.
fn argmax(x: &[f64]) -> usize {
    x.iter().enumerate().fold(0, |best, (i, &v)| if v > x[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    }

    #[test]
    fn windows_do_not_overlap_and_drop_the_rest() {
        assert_eq!(windows(1030, 512).collect::<Vec<_>>(), [0..512, 512..1024]);
        assert_eq!(windows(511, 512).count(), 0);
        assert_eq!(windows(10, 0).count(), 0);
    }

    #[test]
    fn log_softmax_sums_to_one_and_survives_large_logits() {
        let mut out = [0.0; 3];
        log_softmax(&[1000.0, 1001.0, 999.0], &mut out);
        close(out.iter().map(|l| l.exp()).sum(), 1.0);
        close(out[1] - out[0], 1.0);
        // So large that adding ln 2 changes nothing: the fuzz target kl_base found two tokens of probability 1.
        log_softmax(&[6e23, 0.0, 6e23], &mut out);
        close(out.iter().map(|l| l.exp()).sum(), 1.0);
    }

    #[test]
    fn perplexity_of_a_uniform_model_is_the_vocabulary_size() {
        let mut p = Perplexity::default();
        for next in 0..4 {
            p.add(&[0.25f64.ln(); 4], next);
        }
        close(p.estimate().value, 4.0);
        close(p.estimate().standard_error, 0.0);
        assert_eq!(p.n_scored(), 4);
    }

    #[test]
    fn divergence_by_hand() {
        let mut d = Divergence::default();
        let ln = |p: [f64; 2]| p.map(f64::ln);
        d.add(&ln([0.5, 0.5]), &ln([0.25, 0.75]), 0); // ½ ln 2 + ½ ln ⅔ = ½ ln 4⁄3, another top-1
        d.add(&ln([1.0, 0.0]), &ln([0.5, 0.5]), 0); // ln 2, and 0·ln 0 = 0
        let (a, b) = (0.5 * (4.0f64 / 3.0).ln(), 2f64.ln());
        let s = d.summary();
        close(s.mean_kl.value, (a + b) / 2.0);
        close(s.mean_kl.standard_error, (b - a) / 2.0);
        close(s.median_kl.value, (a + b) / 2.0);
        close(s.max_kl, b);
        close(s.p99_kl.value, a + 0.99 * (b - a));
        close(s.same_top1.value, 0.5);
        assert_eq!(s.n_scored, 2);
        // Squared changes of 1/16 and 1/4: their mean is 5/32, its error 3/32.
        close(s.rms_change.value, (5f64 / 32.0).sqrt());
        close(s.rms_change.standard_error, 3.0 / 64.0 / (5f64 / 32.0).sqrt());
        // Both halve the probability.
        close(s.perplexity_ratio.value, 2.0);
        close(s.perplexity_ratio.standard_error, 0.0);
    }

    /// For a uniform distribution the quantile's error is known: sqrt(f·(1 - f) / n).
    #[test]
    fn errors_of_quantiles() {
        let sorted: Vec<f64> = (0..10_001).map(|i| f64::from(i) / 10_000.0).collect();
        let median = quantile(&sorted, 0.5);
        close(median.value, 0.5);
        assert!((median.standard_error - 0.005).abs() < 1e-6, "{median:?}");
        let p99 = quantile(&sorted, 0.99);
        assert!((p99.standard_error - 0.000_994_94).abs() < 1e-6, "{p99:?}");
        assert!(quantile(&[1.0], 0.5).standard_error.is_nan());
    }

    #[test]
    fn nothing_scored_is_nan_not_a_panic() {
        assert!(Divergence::default().summary().mean_kl.value.is_nan());
        assert!(Divergence::default().summary().max_kl.is_nan());
        assert!(Perplexity::default().estimate().value.is_nan());
    }
}
