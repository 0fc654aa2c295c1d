//! The search for block scales: which scale (and offset) makes rounded codes come closest to the weights.
//!
//! Blocks are searched side by side, one per lane, so that every sum is a vertical one. The arithmetic is plain f32 in
//! a fixed order and lanes never mix, hence the same bits on every machine, however many blocks go together.
//!
//! Everything here is `#[inline(always)]`, so that it is compiled with the features of [`crate::isa`]'s functions.

/// An array of what the expression is for each number. In a loop over candidates around one over lanes the compiler would
/// take the candidates as lanes, and scatter and gather.
macro_rules! each {
    ($c:ident in [$($n:literal)*] => $of:expr) => { [$({ let $c: usize = $n; $of }),*] };
}

pub mod affine;
pub mod grid;
pub mod signed;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // instructions
mod vectors;

/// One number per block.
pub type Lanes<const L: usize> = [f32; L];

/// Ranges of weights smaller than this are taken as zero: no f16 scale could express them.
const TINY: f32 = 1e-15;

/// A sub-block of `N` weights of each of `L` blocks: `x[i][lane]`, with the weight of each squared error in `w`. Aligned, so
/// that no lane array lies across two cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Sub<const N: usize, const L: usize> {
    x: [Lanes<L>; N],
    w: [Lanes<L>; N],
}

/// `L` blocks of `S` sub-blocks of `N` weights.
pub struct Tile<const N: usize, const S: usize, const L: usize>([Sub<N, L>; S]);

/// The importance of the weights of successive blocks: rows of a matrix have the same columns, so it repeats.
#[derive(Clone, Copy)]
pub struct Importance<'a, const LEN: usize> {
    /// Importance of the columns of a row, cut into blocks.
    pub row: &'a [[f32; LEN]],
    /// The first block's place in its row.
    pub first: usize,
}

/// How much each squared error counts.
///
/// With an importance matrix the weights are ggml's. Without, ggml takes `|x|` for Q2_K and `x^2` for the signed types,
/// which is hard on small weights: here a part of the sub-block's mean is added. The error in ggml's own measure is still
/// smaller than ggml's, the plain one too, and it is the plain one that the divergence of a model follows.
#[derive(Clone, Copy)]
pub enum ErrorWeight {
    /// `|x|` plus this share of the root mean square of the sub-block. ggml has 1 for Q4_K and Q5_K, 0 for Q2_K.
    Abs(f32),
    /// `x^2` plus the mean square of the sub-block.
    Square,
    /// `importance * sqrt(sigma2 + x^2)`, where `sigma2` is this many times the mean square of the block.
    Importance(f32),
    /// `importance * sqrt(sigma2 + x^2)`.
    ImportanceSigma2(f32),
    /// The importance alone.
    ImportanceOnly,
}

impl<const N: usize, const S: usize, const L: usize> Tile<N, S, L> {
    /// A place for blocks.
    pub const EMPTY: Self = Self([Sub { x: [[0.0; L]; N], w: [[0.0; L]; N] }; S]);

    /// Takes up to `L` blocks; further lanes are zero.
    #[inline(always)]
    pub fn load<const LEN: usize>(
        &mut self,
        blocks: &[[f32; LEN]],
        importance: Option<Importance<LEN>>,
        weight: ErrorWeight,
    ) {
        const { assert!(LEN == N * S, "a block is its sub-blocks") };
        for (j, Sub { x, w }) in self.0.iter_mut().enumerate() {
            transpose(|lane| blocks.get(lane), j * N, x);
            if let Some(Importance { row, first }) = importance {
                let block = |lane| (lane < blocks.len()).then(|| &row[(first + lane) % row.len()]);
                transpose(block, j * N, w);
            }
        }
        self.weigh(weight);
    }

    /// Sets the weights of the errors; the importance, where there is one, is in their place.
    #[inline(always)]
    fn weigh(&mut self, weight: ErrorWeight) {
        let sigma2 = match weight {
            ErrorWeight::Importance(factor) => {
                map(&mean_squares(self.0.iter().flat_map(|sub| &sub.x)), |m| factor * m)
            }
            ErrorWeight::ImportanceSigma2(sigma2) => [sigma2; L],
            _ => [0.0; L],
        };
        for Sub { x, w } in &mut self.0 {
            let mean_square = mean_squares(x.iter());
            let rms = map(&mean_square, f32::sqrt);
            for (x, w) in x.iter().zip(w) {
                let new = match weight {
                    ErrorWeight::Abs(share) => map2(x, &rms, |x, rms| x.abs() + share * rms),
                    ErrorWeight::Square => map2(x, &mean_square, |x, mean_square| x * x + mean_square),
                    ErrorWeight::Importance(_) | ErrorWeight::ImportanceSigma2(_) => {
                        map2(w, &map2(x, &sigma2, |x, sigma2| (sigma2 + x * x).sqrt()), |w, root| w * root)
                    }
                    ErrorWeight::ImportanceOnly => *w,
                };
                store(w, new);
            }
        }
    }
}

/// Puts weights `first .. first + N` of up to `L` blocks into `lanes`, a block in each; further lanes become zero. `block`
/// gives the block of a lane.
#[inline(always)]
fn transpose<'a, const N: usize, const L: usize, const LEN: usize>(
    block: impl Fn(usize) -> Option<&'a [f32; LEN]>,
    first: usize,
    lanes: &mut [Lanes<L>; N],
) {
    #[cfg(target_arch = "x86_64")]
    if L == 16 && N.is_multiple_of(16) && block(15).is_some() {
        for (i, lanes) in lanes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let row =
                |lane| block(lane).expect("all lanes")[first + 16 * i..].first_chunk().expect("16 weights");
            vectors::transpose(row, lanes);
        }
        return;
    }
    for lane in 0..L {
        let block = block(lane);
        for (i, to) in lanes.iter_mut().enumerate() {
            to[lane] = block.map_or(0.0, |block| block[first + i]);
        }
    }
}

/// Stores the lanes. In a loop that sums nothing the compiler would rather take sixteen weights of one lane together, and
/// gather and scatter them; that it does not see what becomes of the lanes keeps it from that.
#[inline(always)]
fn store<const L: usize>(to: &mut Lanes<L>, lanes: Lanes<L>) {
    *to = lanes;
    std::hint::black_box(to);
}

/// Mean square of each lane, summed in order.
#[inline(always)]
fn mean_squares<'a, const L: usize>(x: impl Iterator<Item = &'a Lanes<L>>) -> Lanes<L> {
    let (mut sum, mut n) = ([0.0; L], 0);
    for x in x {
        for l in 0..L {
            sum[l] += x[l] * x[l];
        }
        n += 1;
    }
    map(&sum, |s| s / n as f32)
}

/// `f` of each lane. (The methods of arrays are not always inlined, and are then compiled without the features.)
#[inline(always)]
fn map<const L: usize>(x: &Lanes<L>, f: impl Fn(f32) -> f32) -> Lanes<L> {
    let mut out = [0.0; L];
    for (out, x) in out.iter_mut().zip(x) {
        *out = f(*x);
    }
    out
}

/// `f` of each pair of lanes.
#[inline(always)]
fn map2<const L: usize>(x: &Lanes<L>, y: &Lanes<L>, f: impl Fn(f32, f32) -> f32) -> Lanes<L> {
    let mut out = [0.0; L];
    for (out, (x, y)) in out.iter_mut().zip(x.iter().zip(y)) {
        *out = f(*x, *y);
    }
    out
}

/// `a / b`, or 0 where `b` is not above `least` in magnitude. Dividing first and choosing then leaves no branch.
#[inline(always)]
fn ratio(a: f32, b: f32, least: f32) -> f32 {
    let ratio = a / b;
    if b.abs() > least { ratio } else { 0.0 }
}

/// 1.5 * 2^23: a number with this added has its integer in the low bits.
const MAGIC: f32 = 12_582_912.0;

/// The nearest integer, ties to even, for |x| < 2^22; beyond that the number stays as large as it is.
#[inline(always)]
pub fn round(x: f32) -> f32 {
    (x + MAGIC) - MAGIC
}

/// The low byte of an integer. Rust's `as` saturates, which does not vectorise.
#[inline(always)]
pub fn low_byte(integer: f32) -> u8 {
    (integer + MAGIC).to_bits() as u8
}

/// `x` limited to `lo..=hi` with selects that compile to min and max instructions.
#[inline(always)]
pub const fn limit(x: f32, lo: f32, hi: f32) -> f32 {
    let x = if x < hi { x } else { hi };
    if x > lo { x } else { lo }
}

/// The nearest integer in `0..=hi`, ties to even; of a NaN any of them.
#[inline(always)]
fn nearest(x: f32, hi: f32) -> f32 {
    limit(round(x), 0.0, hi)
}

/// How many scales of the scales are tried: the one that maps the largest to the largest integer, and further ones that
/// map it to half an integer less each. They round all the other scales differently.
const STARTS: usize = 9;

/// Factor on the first scale of scales for start `k`, where the largest integer is `top`.
#[inline(always)]
fn start_factor(k: usize, top: f32) -> f32 {
    1.0 + 0.5 * k as f32 / top
}

/// `1 / x`, or 0 where a scale is 0.
#[inline(always)]
fn inverse<const L: usize>(x: &Lanes<L>) -> Lanes<L> {
    map(x, |v| {
        let inverse = 1.0 / v;
        if v != 0.0 { inverse } else { 0.0 }
    })
}

/// Each `x * inverse` as an integer in `lo..=hi`.
#[inline(always)]
fn integers<const L: usize>(x: &Lanes<L>, inverse: &Lanes<L>, lo: f32, hi: f32) -> Lanes<L> {
    map2(x, inverse, |x, inverse| limit(round(x * inverse), lo, hi))
}

/// Adds `b` to `a`.
#[inline(always)]
fn add<const L: usize>(a: &mut Lanes<L>, b: &Lanes<L>) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

/// Whether `a < b` in any lane.
#[inline(always)]
fn any_less<const L: usize>(a: &Lanes<L>, b: &Lanes<L>) -> bool {
    let mut any = [0; L];
    for (any, (a, b)) in any.iter_mut().zip(a.iter().zip(b)) {
        *any = u32::from(a < b);
    }
    any.iter().fold(0, |all, any| all | any) != 0
}

/// Sum over the sub-blocks, in order.
#[inline(always)]
fn total<const S: usize, const L: usize>(x: &[Lanes<L>; S]) -> Lanes<L> {
    let mut sum = [0.0; L];
    for x in x {
        add(&mut sum, x);
    }
    sum
}

/// The codes of up to `L` blocks, each in row order.
pub type Codes<const LEN: usize, const L: usize> = [[u8; LEN]; L];

/// `code(j, l, x)` for each weight x of sub-block j, of `N` weights, of block l.
#[inline(always)]
fn codes<const N: usize, const LEN: usize, const L: usize>(
    blocks: &[[f32; LEN]],
    code: impl Fn(usize, usize, f32) -> u8,
) -> Codes<LEN, L> {
    let mut codes = [[0; LEN]; L];
    for (l, (block, codes)) in blocks.iter().zip(&mut codes).enumerate() {
        let subs = block.as_chunks::<N>().0.iter().zip(codes.as_chunks_mut::<N>().0);
        for (j, (x, codes)) in subs.enumerate() {
            for (x, to) in x.iter().zip(codes) {
                *to = code(j, l, *x);
            }
        }
    }
    codes
}

/// Mean square of a row, summed in a fixed order.
#[inline(always)]
pub fn mean_square(x: &[f32]) -> f32 {
    x.iter().map(|v| v * v).sum::<f32>() / x.len().max(1) as f32
}

/// The nearest f16 of each lane, as f32.
#[inline(always)]
pub fn round_f16<const L: usize>(x: &Lanes<L>) -> Lanes<L> {
    map(x, crate::codec::round_f16)
}
