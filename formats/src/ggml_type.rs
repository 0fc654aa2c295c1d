//! The ggml type table: ids, names and block sizes of everything that a GGUF file of ours may hold.
//!
//! Source of ids and block sizes: ggml's public type table (`ggml.h`, `ggml-common.h`).

/// How the numbers of a tensor are stored. Variants carry ggml's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the table below says all there is to say
pub enum GgmlType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Bf16,
}

/// One row of the table.
struct Row {
    ty: GgmlType,
    id: u32,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
}

const fn row(ty: GgmlType, id: u32, name: &'static str, block_len: usize, block_bytes: usize) -> Row {
    Row { ty, id, name, block_len, block_bytes }
}

/// In the order of the enum, so that `ty as usize` indexes it.
#[rustfmt::skip]
const TABLE: [Row; 15] = [
    //                  id  name      weights  bytes
    row(GgmlType::F32,   0, "F32",      1,   4),
    row(GgmlType::F16,   1, "F16",      1,   2),
    row(GgmlType::Q4_0,  2, "Q4_0",    32,  18),
    row(GgmlType::Q4_1,  3, "Q4_1",    32,  20),
    row(GgmlType::Q5_0,  6, "Q5_0",    32,  22),
    row(GgmlType::Q5_1,  7, "Q5_1",    32,  24),
    row(GgmlType::Q8_0,  8, "Q8_0",    32,  34),
    row(GgmlType::Q2K,  10, "Q2_K",   256,  84),
    row(GgmlType::Q3K,  11, "Q3_K",   256, 110),
    row(GgmlType::Q4K,  12, "Q4_K",   256, 144),
    row(GgmlType::Q5K,  13, "Q5_K",   256, 176),
    row(GgmlType::Q6K,  14, "Q6_K",   256, 210),
    row(GgmlType::Iq4Nl,20, "IQ4_NL",  32,  18),
    row(GgmlType::Iq4Xs,23, "IQ4_XS", 256, 136),
    row(GgmlType::Bf16, 30, "BF16",     1,   2),
];

/// What a type id in a file stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TypeId {
    /// A type that is read.
    Supported(GgmlType),
    /// A type of ggml's that is not read here.
    Unsupported(&'static str),
    /// A type that ggml itself no longer reads.
    Removed(&'static str),
    /// Not an id of ggml's.
    Unknown,
}

impl TypeId {
    /// Looks an id up. Source: the enumeration in `ggml.h`, in which the ids of removed types stay taken.
    pub fn classify(id: u32) -> Self {
        if let Some(ty) = GgmlType::from_id(id) {
            return Self::Supported(ty);
        }
        match id {
            4 => Self::Removed("Q4_2"),
            5 => Self::Removed("Q4_3"),
            31 => Self::Removed("Q4_0_4_4"),
            32 => Self::Removed("Q4_0_4_8"),
            33 => Self::Removed("Q4_0_8_8"),
            36 => Self::Removed("IQ4_NL_4_4"),
            37 => Self::Removed("IQ4_NL_4_8"),
            38 => Self::Removed("IQ4_NL_8_8"),
            9 => Self::Unsupported("Q8_1"),
            15 => Self::Unsupported("Q8_K"),
            16 => Self::Unsupported("IQ2_XXS"),
            17 => Self::Unsupported("IQ2_XS"),
            18 => Self::Unsupported("IQ3_XXS"),
            19 => Self::Unsupported("IQ1_S"),
            21 => Self::Unsupported("IQ3_S"),
            22 => Self::Unsupported("IQ2_S"),
            24 => Self::Unsupported("I8"),
            25 => Self::Unsupported("I16"),
            26 => Self::Unsupported("I32"),
            27 => Self::Unsupported("I64"),
            28 => Self::Unsupported("F64"),
            29 => Self::Unsupported("IQ1_M"),
            34 => Self::Unsupported("TQ1_0"),
            35 => Self::Unsupported("TQ2_0"),
            39 => Self::Unsupported("MXFP4"),
            40 => Self::Unsupported("NVFP4"),
            41 => Self::Unsupported("Q1_0"),
            42 => Self::Unsupported("Q2_0"),
            _ => Self::Unknown,
        }
    }
}

impl GgmlType {
    /// All types, in table order.
    pub fn all() -> impl Iterator<Item = GgmlType> {
        TABLE.iter().map(|r| r.ty)
    }

    /// The type with this id in a GGUF file.
    pub fn from_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|r| r.id == id).map(|r| r.ty)
    }

    /// The type with ggml's name (`q4_k` and `Q4_K` alike).
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|r| r.name.eq_ignore_ascii_case(name)).map(|r| r.ty)
    }

    /// The id in a GGUF file.
    pub fn id(self) -> u32 {
        TABLE[self as usize].id
    }

    /// ggml's name, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].name
    }

    /// Weights in one block.
    pub fn block_len(self) -> usize {
        TABLE[self as usize].block_len
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        TABLE[self as usize].block_bytes
    }

    /// Whether weights are stored in blocks with scales rather than one by one.
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Bits per weight, scales included.
    pub fn bits_per_weight(self) -> f64 {
        8.0 * self.block_bytes() as f64 / self.block_len() as f64
    }

    /// Bytes of `n` consecutive weights; `None` if blocks do not divide `n` or the product overflows.
    pub fn bytes_for(self, n: u64) -> Option<u64> {
        let block_len = self.block_len() as u64;
        if !n.is_multiple_of(block_len) {
            return None;
        }
        (n / block_len).checked_mul(self.block_bytes() as u64)
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_enum_order() {
        for (i, r) in TABLE.iter().enumerate() {
            assert_eq!(r.ty as usize, i, "{}", r.name);
        }
    }

    #[test]
    fn every_id_of_ggml_is_classified() {
        let unknown: Vec<u32> = (0..45).filter(|&id| TypeId::classify(id) == TypeId::Unknown).collect();
        assert_eq!(unknown, [43, 44]);
        assert_eq!(TypeId::classify(12), TypeId::Supported(GgmlType::Q4K));
    }

    #[test]
    fn bytes_for_checks_blocks_and_overflow() {
        assert_eq!(GgmlType::Q4K.bytes_for(512), Some(288));
        assert_eq!(GgmlType::Q4K.bytes_for(128), None);
        assert_eq!(GgmlType::F32.bytes_for(u64::MAX), None);
    }
}
