//! Arithmetic between a checkpoint and a GGUF file.

use kestrel_formats::arch::{HyperParams, Transform};
use kestrel_formats::{Error, ErrorKind, GgmlType, Result};

use crate::isa::{Isa, Work};

/// Expands stored numbers to f32. Exact for F32, F16 and BF16, the types of a checkpoint; block types are dequantized.
/// Panics if `bytes` and `out` do not have the same number of weights.
pub fn to_f32(dtype: GgmlType, bytes: &[u8], out: &mut [f32]) {
    crate::codec(dtype).dequantize(bytes, out);
}

/// Applies the transform of one tensor of the architecture table to (part of) that tensor, in place.
///
/// `NegExp` is `-exp(x)`, computed in f64 by a portable implementation and rounded once, so that the result is the same
/// on every machine. Returns the largest magnitude of the result. Fails with [`ErrorKind::NotFinite`], naming the element
/// counted from the start of `x`, if the source or the result is NaN or infinite.
pub fn apply(transform: Transform, h: &HyperParams, x: &mut [f32]) -> Result<f32> {
    let largest = check_finite(x, "in the source")?;
    match transform {
        Transform::None => return Ok(largest),
        Transform::NegExp => x.iter_mut().for_each(|v| *v = -libm::exp(f64::from(*v)) as f32),
        Transform::RmsEpsScale => {
            let scale = h.x_proj_scale();
            x.iter_mut().for_each(|v| *v *= scale);
        }
    }
    check_finite(x, "after the transform")
}

/// The largest magnitude; or `NotFinite`, naming the first NaN or infinity by its position, if there is one.
pub(crate) fn check_finite(x: &[f32], place: &str) -> Result<f32> {
    let mut bits = 0;
    Isa::best().run(Largest { x, bits: &mut bits });
    let largest = f32::from_bits(bits);
    if largest.is_finite() {
        return Ok(largest);
    }
    let at = x.iter().position(|v| !v.is_finite()).unwrap_or_default();
    Err(Error::new(ErrorKind::NotFinite)
        .expected("finite numbers")
        .found(format!("{} {place}, at element {at}", x[at])))
}

/// Finds the bits of the largest magnitude. Magnitudes are ordered as their bits, those of NaN last, and the largest integer
/// is found in any order, so many at a time.
struct Largest<'a> {
    x: &'a [f32],
    bits: &'a mut u32,
}

impl Work for Largest<'_> {
    #[inline(always)]
    fn run<const L: usize>(self) {
        *self.bits = self.x.iter().fold(0, |largest, x| x.abs().to_bits().max(largest));
    }
}

#[cfg(test)]
mod tests {
    use kestrel_formats::arch::Arch;

    use super::*;

    const H: HyperParams = HyperParams {
        arch: Arch::FalconMamba,
        d_model: 4,
        d_inner: 8,
        d_state: 2,
        d_conv: 4,
        dt_rank: 1,
        n_layer: 1,
        vocab_size: 8,
        layer_norm_epsilon: 1e-5,
        mixer_rms_eps: 1e-6,
    };

    #[test]
    fn neg_exp_is_correctly_rounded_for_known_values() {
        // exp of 0, 1, ln 16 as f32 (16.00000012), -3.
        let mut x = [0.0, 1.0, 2.772_588_7, -3.0];
        apply(Transform::NegExp, &H, &mut x).unwrap();
        assert_eq!(x, [-1.0, -std::f64::consts::E, -16.0, -0.049_787_068_367_863_944].map(|v: f64| v as f32));
    }

    #[test]
    fn the_eps_scale_multiplies() {
        let mut x = [1.0, -2.0];
        let largest = apply(Transform::RmsEpsScale, &H, &mut x).unwrap();
        let s = 10f32.sqrt();
        assert_eq!(largest, 2.0 * s);
        assert_eq!(x, [s, -2.0 * s]);
    }

    #[test]
    fn nan_inf_and_overflow_are_refused() {
        for (t, bad) in
            [(Transform::None, f32::NAN), (Transform::None, f32::INFINITY), (Transform::NegExp, 100.0)]
        {
            let e = apply(t, &H, &mut [0.0, bad]).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::NotFinite);
            assert!(e.to_string().contains("element 1"), "{e}");
        }
    }
}
