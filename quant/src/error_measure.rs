//! Measures of quantization error.

use kestrel_formats::GgmlType;

/// How far one set of numbers is from another. Sums are f64: over n numbers of similar size their own error stays below
/// n * 1e-16. Merging the parts of a tensor in a fixed order gives the same bits for any number of threads.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ErrorStats {
    /// Pairs seen.
    pub n: u64,
    /// NaNs among the numbers measured; they are left out of everything below.
    pub n_nan: u64,
    /// Infinities among the numbers measured; they are left out of everything below.
    pub n_inf: u64,
    /// Largest absolute difference.
    pub max_abs: f32,
    sum_squared_error: f64,
    sum_squared_source: f64,
}

impl ErrorStats {
    /// Adds pairs of a source number and what became of it. Panics if the lengths differ.
    pub fn accumulate(&mut self, source: &[f32], got: &[f32]) {
        assert_eq!(source.len(), got.len());
        self.n += source.len() as u64;
        for (&s, &g) in source.iter().zip(got) {
            let e = s - g;
            if !e.is_finite() {
                self.n_nan += u64::from(g.is_nan());
                self.n_inf += u64::from(g.is_infinite());
                continue;
            }
            self.sum_squared_error += f64::from(e) * f64::from(e);
            self.sum_squared_source += f64::from(s) * f64::from(s);
            self.max_abs = self.max_abs.max(e.abs());
        }
    }

    /// Adds what another part of the same tensor gave.
    pub fn merge(&mut self, other: &Self) {
        self.n += other.n;
        self.n_nan += other.n_nan;
        self.n_inf += other.n_inf;
        self.max_abs = self.max_abs.max(other.max_abs);
        self.sum_squared_error += other.sum_squared_error;
        self.sum_squared_source += other.sum_squared_source;
    }

    /// Root of the mean squared error.
    pub fn rmse(&self) -> f64 {
        (self.sum_squared_error / self.n.max(1) as f64).sqrt()
    }

    /// Root mean square of the source.
    pub fn rms_source(&self) -> f64 {
        (self.sum_squared_source / self.n.max(1) as f64).sqrt()
    }

    /// [`rmse`](Self::rmse) over [`rms_source`](Self::rms_source); 0 if there is no error, infinite if there is one and
    /// the source is zero.
    pub fn relative_rmse(&self) -> f64 {
        if self.sum_squared_error == 0.0 {
            0.0
        } else {
            (self.sum_squared_error / self.sum_squared_source).sqrt()
        }
    }
}

/// The largest relative RMSE that a tensor of this type may have against its source.
///
/// For the 16-bit types half a unit in the last place, which only subnormal numbers exceed. For the block types 1.5 times
/// the worst measured over 65536 weights each of normal, uniform, Laplace, Student t (4 and 3 degrees of freedom) and
/// sparse random numbers, Laplace with 0.2 % outliers of twenty times the size, and trained weights. The worst were
/// Student t with 3 degrees, the outliers, and for the types with an offset the sparse numbers; normal numbers are at
/// about half of a limit.
pub fn relative_rmse_limit(ty: GgmlType) -> f64 {
    match ty {
        GgmlType::F32 => 0.0,
        GgmlType::F16 => 1.0 / 2048.0,
        GgmlType::Bf16 => 1.0 / 256.0,
        GgmlType::Q8_0 => 0.015,
        GgmlType::Q6K => 0.042,
        GgmlType::Q5_0 => 0.105,
        GgmlType::Q5_1 => 0.08,
        GgmlType::Q5K => 0.068,
        GgmlType::Q4_0 => 0.19,
        GgmlType::Q4_1 => 0.167,
        GgmlType::Q4K => 0.135,
        GgmlType::Iq4Nl => 0.15,
        GgmlType::Iq4Xs => 0.153,
        GgmlType::Q3K => 0.29,
        GgmlType::Q2K => 0.47,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_small_case() {
        let mut s = ErrorStats::default();
        s.accumulate(&[3.0, 4.0], &[3.0, 3.0]);
        assert_eq!((s.n, s.max_abs), (2, 1.0));
        assert_eq!(s.rmse(), 0.5f64.sqrt());
        assert_eq!(s.relative_rmse(), 0.2);
    }

    #[test]
    fn merging_parts_equals_the_whole() {
        let x: Vec<f32> = (0..100).map(|i| i as f32).collect();
        let y: Vec<f32> = x.iter().map(|v| v + 0.5).collect();
        let mut whole = ErrorStats::default();
        whole.accumulate(&x, &y);
        let (mut a, mut b) = (ErrorStats::default(), ErrorStats::default());
        a.accumulate(&x[..40], &y[..40]);
        b.accumulate(&x[40..], &y[40..]);
        a.merge(&b);
        assert_eq!(a, whole); // all sums here are exact
    }

    #[test]
    fn nan_and_inf_are_counted_and_left_out() {
        let mut s = ErrorStats::default();
        s.accumulate(&[1.0, 1.0, 1.0], &[f32::NAN, f32::NEG_INFINITY, 1.0]);
        assert_eq!((s.n_nan, s.n_inf, s.relative_rmse()), (1, 1, 0.0));
        let mut zero = ErrorStats::default();
        zero.accumulate(&[0.0], &[0.5]);
        assert_eq!(zero.relative_rmse(), f64::INFINITY);
    }
}
