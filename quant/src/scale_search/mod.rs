//! The search for block scales: which scale (and offset) makes rounded codes come closest to the weights.
//!
//! All sub-blocks of a block are searched side by side, one per lane, so that every sum is a vertical one. The
//! arithmetic is plain f32 in a fixed order, hence the same bits on every machine; lanes never mix, hence the same
//! bits however many blocks are quantized together.

pub mod affine;
pub mod grid;
pub mod signed;

/// One number per lane.
pub type Lanes<const L: usize> = [f32; L];

/// Ranges of weights smaller than this are taken as zero: no f16 scale could express them.
const TINY: f32 = 1e-15;

/// `L` sub-blocks of `N` weights, transposed: `x[i][lane]`, with the weight of each squared error in `w`.
pub struct Tile<const N: usize, const L: usize> {
    x: [Lanes<L>; N],
    w: [Lanes<L>; N],
}

/// How much each squared error counts.
///
/// With an importance matrix the weights are ggml's. Without, ggml takes `|x|` for Q2_K and `x^2` for the signed types,
/// which is hard on small weights: here a part of the sub-block's mean is added. The error in ggml's own measure is still
/// smaller than ggml's, the plain one too, and it is the plain one that the divergence of a model follows.
#[derive(Clone, Copy)]
pub enum ErrorWeight<'a> {
    /// `|x|` plus this share of the root mean square of the sub-block. ggml has 1 for Q4_K and Q5_K, 0 for Q2_K.
    Abs(f32),
    /// `x^2` plus the mean square of the sub-block.
    Square,
    /// `importance * sqrt(sigma2 + x^2)`, importance in row order.
    Importance(&'a [f32], f32),
    /// The importance alone.
    ImportanceOnly(&'a [f32]),
}

impl<const N: usize, const L: usize> Tile<N, L> {
    /// Transposes `x`, sub-blocks one after the other; lanes beyond its end are zero.
    pub fn new(x: &[f32], weight: ErrorWeight) -> Self {
        let mut tile = Self { x: [[0.0; L]; N], w: [[0.0; L]; N] };
        for (lane, sub) in x.as_chunks::<N>().0.iter().take(L).enumerate() {
            let mean_square = mean_square(sub);
            let rms = mean_square.sqrt();
            for (i, &v) in sub.iter().enumerate() {
                tile.x[i][lane] = v;
                tile.w[i][lane] = match weight {
                    ErrorWeight::Abs(share) => v.abs() + share * rms,
                    ErrorWeight::Square => v * v + mean_square,
                    ErrorWeight::Importance(q, sigma2) => q[lane * N + i] * (sigma2 + v * v).sqrt(),
                    ErrorWeight::ImportanceOnly(q) => q[lane * N + i],
                };
            }
        }
        tile
    }
}

/// The nearest integer, ties to even, for |x| < 2^22; beyond that the number stays as large as it is.
#[inline(always)]
pub fn round(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23
    (x + MAGIC) - MAGIC
}

/// `x` limited to `lo..=hi` with selects that compile to min and max instructions.
#[inline(always)]
pub fn limit(x: f32, lo: f32, hi: f32) -> f32 {
    let x = if x < hi { x } else { hi };
    if x > lo { x } else { lo }
}

/// How many scales of the scales are tried: the one that maps the largest to the largest integer, and further ones that
/// map it to half an integer less each. They round all the other scales differently.
const STARTS: usize = 9;

/// Factor on the first scale of scales for start `k`, where the largest integer is `top`.
fn start_factor(k: usize, top: f32) -> f32 {
    1.0 + 0.5 * k as f32 / top
}

/// `1 / x`, or 0 where a scale is 0.
#[inline(always)]
fn inverse<const L: usize>(x: &Lanes<L>) -> Lanes<L> {
    x.map(|v| if v != 0.0 { 1.0 / v } else { 0.0 })
}

/// Each `x / d` as an integer in `lo..=hi`.
fn integers<const L: usize>(x: &Lanes<L>, d: f32, lo: f32, hi: f32) -> Lanes<L> {
    let [inverse] = inverse(&[d]);
    x.map(|v| limit(round(v * inverse), lo, hi))
}

/// Sum over the lanes, in lane order.
fn total<const L: usize>(x: &Lanes<L>) -> f32 {
    x.iter().sum()
}

/// Blocks of 32 weights that are quantized side by side where each has its own f16 scale.
const SIDE_BY_SIDE: usize = 8;

/// The error weights for up to [`SIDE_BY_SIDE`] blocks starting at weight `start`, as ggml takes them for types of one
/// level: importance with the row's mean square, or the square of the weight.
fn single_level_weight(importance: Option<&[f32]>, start: usize, mean_square: f32) -> ErrorWeight<'_> {
    match importance {
        Some(w) => ErrorWeight::Importance(&w[start..], mean_square),
        None => ErrorWeight::Square,
    }
}

/// Mean square of a row, summed in a fixed order.
pub fn mean_square(x: &[f32]) -> f32 {
    x.iter().map(|v| v * v).sum::<f32>() / x.len().max(1) as f32
}

/// The nearest f16, as f32.
pub fn round_f16(x: f32) -> f32 {
    half::f16::from_bits(crate::codec::f16_bits(x)).to_f32()
}
