//! Weights where they lie: in the mapped file, or in memory when they were quantized at load.

use crate::kernels::MatrixRef;
use kestrel_formats::map::{Map, f32s};
use kestrel_formats::{GgmlType, Result};
use std::ops::{Deref, Range};

/// Bytes that are borrowed from a map for as long as the model lives, or owned by it.
pub enum Bytes {
    /// A range of a mapped file.
    Mapped(Map, Range<usize>),
    /// Made at load.
    Owned(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            // The range was validated when the file was parsed.
            Self::Mapped(map, range) => &map[range.clone()],
            Self::Owned(bytes) => bytes,
        }
    }
}

/// A weight matrix (rows, cols) of any type.
pub struct Matrix {
    /// How the weights are stored.
    pub dtype: GgmlType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    bytes: Bytes,
}

impl Matrix {
    /// Checks that `bytes` is exactly rows × cols weights of `dtype`.
    pub fn new(dtype: GgmlType, rows: usize, cols: usize, bytes: Bytes) -> Result<Self> {
        MatrixRef::new(dtype, rows, cols, &bytes)?;
        Ok(Self { dtype, rows, cols, bytes })
    }

    /// The map that the weights lie in, unless they are in memory.
    pub fn map(&self) -> Option<&Map> {
        match &self.bytes {
            Bytes::Mapped(map, _) => Some(map),
            Bytes::Owned(_) => None,
        }
    }

    /// The form that kernels take.
    pub fn view(&self) -> MatrixRef<'_> {
        MatrixRef { dtype: self.dtype, rows: self.rows, cols: self.cols, bytes: &self.bytes }
    }
}

/// A small f32 tensor: norms, biases, convolution taps, A and D.
pub enum Floats {
    /// In the map, aligned.
    Mapped(Map, Range<usize>),
    /// Converted at load, or misaligned in its file.
    Owned(Vec<f32>),
}

impl Floats {
    /// The f32 tensor in `range` of `map`; copied only if the file places it at an odd address.
    pub fn mapped(map: &Map, range: Range<usize>) -> Self {
        let bytes = &map[range.clone()];
        match f32s(bytes) {
            Some(_) => Self::Mapped(map.clone(), range),
            None => Self::Owned(
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            ),
        }
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            // `mapped` saw that the cast holds, and a map does not move.
            Self::Mapped(map, range) => f32s(&map[range.clone()]).unwrap_or_default(),
            Self::Owned(v) => v,
        }
    }
}
