//! Block types taken apart, for quantizers that choose codes one column after the other, or scales once the codes are
//! chosen: `weight = d * sc * number - dmin * m`, with `sc` and `m` per sub-block and `number` per weight.

use kestrel_formats::GgmlType;

use super::{iq4, q2_k, q3_k, q4, q4_k, q5, q5_k, q6_k, q8_0};

/// Sub-blocks of a block at most.
pub const SUBS_MAX: usize = 16;

/// The scales of one block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parts {
    /// Scale of the scales, as f16 stores it.
    pub d: f32,
    /// Scale of the minima, as f16 stores it; 0 in types without.
    pub dmin: f32,
    /// Integer scale of each sub-block, 1 in types without.
    pub sc: [f32; SUBS_MAX],
    /// Integer minimum of each sub-block, 1 in types without.
    pub m: [f32; SUBS_MAX],
}

impl Parts {
    /// One sub-block with these, or several whose integers are still to be filled in.
    pub fn new(d: f32, dmin: f32) -> Self {
        Self { d, dmin, sc: [1.0; SUBS_MAX], m: [1.0; SUBS_MAX] }
    }

    /// Scale and minimum of sub-block `j`.
    #[inline(always)]
    pub fn scale_min(&self, j: usize) -> (f32, f32) {
        (self.d * self.sc[j], self.dmin * self.m[j])
    }
}

/// What varies in a block of a type beside `d` and the codes.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Weights of a sub-block.
    pub sub_len: usize,
    /// Smallest and largest integer scale, if there are any.
    pub sc: Option<(f32, f32)>,
    /// Smallest and largest integer minimum, if there are any.
    pub m: Option<(f32, f32)>,
}

/// What a block type implements.
pub(super) trait Steps {
    /// Its shape.
    const SHAPE: Shape;
    /// The scales of a block.
    fn parts(block: &[u8]) -> Parts;
    /// The number of the grid nearest to `t`.
    fn nearest(t: f32) -> f32;
    /// Stores scales, and numbers of the grid as codes.
    fn put(parts: &Parts, numbers: &[f32], block: &mut [u8]);
}

/// `Steps` of a type, as functions.
#[derive(Clone, Copy)]
pub struct Taken {
    /// What varies.
    pub shape: Shape,
    /// The scales of a block.
    pub parts: fn(&[u8]) -> Parts,
    /// The number of the grid nearest to a weight in units of its scale.
    pub nearest: fn(f32) -> f32,
    /// Stores the scales and, as codes, the numbers of all weights of a block.
    pub put: fn(&Parts, &[f32], &mut [u8]),
}

/// A block type taken apart; `None` for types without blocks.
pub fn taken(ty: GgmlType) -> Option<Taken> {
    const fn of<S: Steps>() -> Taken {
        Taken { shape: S::SHAPE, parts: S::parts, nearest: S::nearest, put: S::put }
    }
    Some(match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::Bf16 => return None,
        GgmlType::Q8_0 => of::<q8_0::Q8_0>(),
        GgmlType::Q4_0 => of::<q4::Q4_0>(),
        GgmlType::Q4_1 => of::<q4::Q4_1>(),
        GgmlType::Q5_0 => of::<q5::Q5_0>(),
        GgmlType::Q5_1 => of::<q5::Q5_1>(),
        GgmlType::Q2K => of::<q2_k::Q2K>(),
        GgmlType::Q3K => of::<q3_k::Q3K>(),
        GgmlType::Q4K => of::<q4_k::Q4K>(),
        GgmlType::Q5K => of::<q5_k::Q5K>(),
        GgmlType::Q6K => of::<q6_k::Q6K>(),
        GgmlType::Iq4Nl => of::<iq4::Iq4Nl>(),
        GgmlType::Iq4Xs => of::<iq4::Iq4Xs>(),
    })
}

/// Numbers of the grid as codes without sign.
pub(super) fn stored<const LEN: usize>(numbers: &[f32], code: impl Fn(f32) -> u8) -> [u8; LEN] {
    assert_eq!(numbers.len(), LEN);
    std::array::from_fn(|i| code(numbers[i]))
}

/// The bytes of one block.
pub(super) fn whole<const BYTES: usize>(block: &mut [u8]) -> &mut [u8; BYTES] {
    block.try_into().expect("one block")
}
