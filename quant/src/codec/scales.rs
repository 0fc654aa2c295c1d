//! Scales that lie beside the codes rather than in blocks, as bitsandbytes has them, and their own quantization.

use kestrel_formats::GgmlType;
use std::sync::LazyLock;

/// Scales that share a scale of their own where the library quantizes them.
pub const NESTED_BLOCKSIZE: usize = 256;

/// The scales of a matrix: `weight = value(code) * scale`.
#[derive(Clone, Copy)]
pub struct Scales<'a> {
    /// Consecutive weights that share a scale, whatever rows they are in.
    pub blocksize: usize,
    /// What the library's dequantization rounds weights to: F32, F16 or BF16.
    pub round_to: GgmlType,
    /// One per block.
    pub absmax: Absmax<'a>,
}

/// The scale of each block.
#[derive(Clone, Copy)]
pub enum Absmax<'a> {
    /// As it is.
    F32(&'a [f32]),
    /// `map[code] * absmax[block / blocksize] + offset`.
    Nested {
        /// One per block.
        codes: &'a [u8],
        /// One per `blocksize` codes.
        absmax: &'a [f32],
        /// Codes that share an absmax.
        blocksize: usize,
        /// What codes stand for.
        map: &'a [f32; 256],
        /// Added to every scale.
        offset: f32,
    },
}

impl Absmax<'_> {
    /// The scale of a block.
    #[inline]
    pub fn get(&self, block: usize) -> f32 {
        match *self {
            Self::F32(scales) => scales[block],
            Self::Nested { codes, absmax, blocksize, map, offset } => {
                map[usize::from(codes[block])] * absmax[block / blocksize] + offset
            }
        }
    }
}

impl Scales<'_> {
    /// Calls `f` with the part of `0..n` and the scale of each block that weights `first..first + n` are in.
    pub(super) fn for_each(&self, first: usize, n: usize, mut f: impl FnMut(std::ops::Range<usize>, f32)) {
        let mut at = 0;
        while at < n {
            let block = (first + at) / self.blocksize;
            let end = ((block + 1) * self.blocksize - first).min(n);
            f(at..end, self.absmax.get(block));
            at = end;
        }
    }

    /// `x` as the library's dequantization rounds it.
    pub(super) fn round(&self, x: f32) -> f32 {
        match self.round_to {
            GgmlType::F16 => half::f16::from_f32(x).to_f32(),
            GgmlType::Bf16 => half::bf16::from_f32(x).to_f32(),
            _ => x,
        }
    }
}

/// Scales quantized to a byte each ("double quantization").
#[derive(Clone, Debug, PartialEq)]
pub struct NestedScales {
    /// One per scale.
    pub codes: Vec<u8>,
    /// One per [`NESTED_BLOCKSIZE`] scales.
    pub absmax: Vec<f32>,
    /// The mean of the scales. Summed in f64; the library sums in f32, in an order that depends on the machine and
    /// its number of threads, so its offset differs in the last bits, and with it now and then a code by one.
    pub offset: f32,
}

/// Quantizes scales as the library's CPU kernel does.
pub fn quantize_scales(scales: &[f32]) -> NestedScales {
    let mean = scales.iter().map(|&x| f64::from(x)).sum::<f64>() / scales.len().max(1) as f64;
    let offset = mean as f32;
    let mut codes = Vec::with_capacity(scales.len());
    let mut absmax = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCKSIZE));
    for block in scales.chunks(NESTED_BLOCKSIZE) {
        let largest = block.iter().fold(0f32, |max, x| max.max((x - offset).abs()));
        absmax.push(largest);
        codes.extend(block.iter().map(|x| match largest {
            0.0 => 0, // what the library's 0/0 ends in
            _ => code_of((x - offset) / largest),
        }));
    }
    NestedScales { codes, absmax, offset }
}

/// Codes of the 65536 numbers evenly spaced from -1 to 1.
static CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let map = dynamic_map();
    let nearest = |x: f32| map.windows(2).take_while(|pair| (pair[0] + pair[1]) / 2.0 < x).count() as u8;
    (0..=u16::MAX).map(|i| nearest(-1.0 + 2.0 * f32::from(i) / 65535.0)).collect()
});

/// The library looks the code up by `x` (-1..=1) rounded to 16 bits; so does this.
fn code_of(x: f32) -> u8 {
    CODES[((x + 1.0) * 32767.5 + 0.5) as usize]
}

/// The library's signed dynamic map: for each of seven decimal exponents, the means of evenly spaced fractions, more of
/// them the larger the exponent, both signs; 0 and 1. Source: `create_dynamic_map` (Dettmers 2015, arXiv 1511.04561).
pub fn dynamic_map() -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for i in 0..7 {
        let n = 1usize << i;
        // torch.linspace(0.1, 1, n + 1): from the nearer end.
        let step = (1.0f32 - 0.1) / n as f32;
        let boundary = |k: usize| match 2 * k < n + 1 {
            true => step.mul_add(k as f32, 0.1),
            false => (-step).mul_add((n - k) as f32, 1.0),
        };
        let power = 10f64.powi(i - 6) as f32;
        for k in 0..n {
            let mean = (boundary(k) + boundary(k + 1)) / 2.0;
            values.extend([power * mean, -power * mean]);
        }
    }
    values.sort_unstable_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
}
