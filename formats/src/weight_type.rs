//! How the weights of a tensor are stored: in one of ggml's types, or as bitsandbytes stores a matrix.
//!
//! A GGUF file holds only [`GgmlType`]s. The types of bitsandbytes have no blocks of their own: their codes are one
//! tensor and their scales another, so a matrix of theirs comes with a
//! [`QuantState`](crate::checkpoint::QuantState).

use crate::GgmlType;

/// The type of a tensor, whatever kind of file it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightType {
    /// A type of ggml's: scales, if any, are in the blocks.
    Ggml(GgmlType),
    /// bitsandbytes' NF4: 4-bit codes, two a byte, the even one in the high half; a scale per block beside them.
    Nf4,
    /// bitsandbytes' FP4, packed as NF4.
    Fp4,
    /// The weights of LLM.int8: signed bytes, a scale per row beside them.
    Int8,
}

/// What the 16 codes of NF4 stand for. Source: bitsandbytes 0.50, `get_4bit_type`.
#[rustfmt::skip]
pub const NF4_VALUES: [f32; 16] = [
    -1.0, -0.696_192_8, -0.525_073_05, -0.394_917_5, -0.284_441_38, -0.184_773_43, -0.091_050_036, 0.0,
    0.079_580_3, 0.160_930_2, 0.246_112_3, 0.337_915_24, 0.440_709_83, 0.562_617, 0.722_956_84, 1.0,
];

/// What the 16 codes of FP4 stand for: 0, 1/16, 8, 12, 4, 6, 2 and 3 twelfths, then their negatives. Same source.
#[rustfmt::skip]
pub const FP4_VALUES: [f32; 16] = [
    0.0, 0.062_5 / 12.0, 8.0 / 12.0, 1.0, 4.0 / 12.0, 0.5, 2.0 / 12.0, 0.25,
    0.0, -0.062_5 / 12.0, -8.0 / 12.0, -1.0, -4.0 / 12.0, -0.5, -2.0 / 12.0, -0.25,
];

impl WeightType {
    /// All types: ggml's in the order of their table, then bitsandbytes'.
    pub fn all() -> impl Iterator<Item = WeightType> {
        GgmlType::all().map(Self::Ggml).chain([Self::Nf4, Self::Fp4, Self::Int8])
    }

    /// ggml's name, or the usual one.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ggml(ty) => ty.name(),
            Self::Nf4 => "NF4",
            Self::Fp4 => "FP4",
            Self::Int8 => "INT8",
        }
    }

    /// Weights in the smallest piece that can be addressed: a block of ggml's, the weights of a byte.
    pub fn block_len(self) -> usize {
        match self {
            Self::Ggml(ty) => ty.block_len(),
            Self::Nf4 | Self::Fp4 => 2,
            Self::Int8 => 1,
        }
    }

    /// Bytes of such a piece, without scales that are elsewhere.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Ggml(ty) => ty.block_bytes(),
            Self::Nf4 | Self::Fp4 | Self::Int8 => 1,
        }
    }

    /// Whether weights are codes with scales rather than numbers.
    pub fn is_quantized(self) -> bool {
        match self {
            Self::Ggml(ty) => ty.is_quantized(),
            Self::Nf4 | Self::Fp4 | Self::Int8 => true,
        }
    }

    /// Bytes of `n` consecutive weights, without scales that are elsewhere; `None` if they are no whole pieces or the
    /// product overflows.
    pub fn bytes_for(self, n: u64) -> Option<u64> {
        let block_len = self.block_len() as u64;
        if !n.is_multiple_of(block_len) {
            return None;
        }
        (n / block_len).checked_mul(self.block_bytes() as u64)
    }

    /// What the 16 codes stand for, of a 4-bit type of bitsandbytes.
    pub fn code_values(self) -> Option<&'static [f32; 16]> {
        match self {
            Self::Nf4 => Some(&NF4_VALUES),
            Self::Fp4 => Some(&FP4_VALUES),
            Self::Ggml(_) | Self::Int8 => None,
        }
    }
}

impl From<GgmlType> for WeightType {
    fn from(ty: GgmlType) -> Self {
        Self::Ggml(ty)
    }
}

impl PartialEq<GgmlType> for WeightType {
    fn eq(&self, other: &GgmlType) -> bool {
        *self == Self::Ggml(*other)
    }
}

impl std::fmt::Display for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_values_are_the_librarys_bits() {
        // From `get_4bit_type` of bitsandbytes 0.50.2, as the bits of their f32.
        let nf4: [u32; 16] = [
            0xbf80_0000,
            0xbf32_39b1,
            0xbf06_6b30,
            0xbeca_32a0,
            0xbe91_a24d,
            0xbe3d_353f,
            0xbdba_7871,
            0,
            0x3da2_faff,
            0x3e24_cae3,
            0x3e7c_04dd,
            0x3ead_033a,
            0x3ee1_a4b8,
            0x3f10_07ab,
            0x3f39_13b3,
            0x3f80_0000,
        ];
        assert_eq!(NF4_VALUES.map(f32::to_bits), nf4);
        let fp4: [u32; 8] =
            [0, 0x3baa_aaab, 0x3f2a_aaab, 0x3f80_0000, 0x3eaa_aaab, 0x3f00_0000, 0x3e2a_aaab, 0x3e80_0000];
        assert_eq!(FP4_VALUES.map(f32::to_bits)[..8], fp4);
        for (a, b) in FP4_VALUES[..8].iter().zip(&FP4_VALUES[8..]) {
            assert_eq!(-a, *b);
        }
    }

    #[test]
    fn bytes_of_packed_codes() {
        assert_eq!(WeightType::Nf4.bytes_for(64), Some(32));
        assert_eq!(WeightType::Fp4.bytes_for(3), None);
        assert_eq!(WeightType::Int8.bytes_for(3), Some(3));
        assert_eq!(WeightType::all().count(), GgmlType::all().count() + 3);
    }
}
