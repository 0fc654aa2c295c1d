//! Weights where they lie: in the mapped file, or in memory when they were quantized at load.

use crate::kernels::{self, ActKind, MatrixRef};
use kestrel_formats::map::{Map, f32s};
use kestrel_formats::{GgmlType, Result, WeightType};
use kestrel_quant::codec::scales::{self, Absmax};
use std::ops::{Deref, Range};
use std::sync::Arc;

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

/// Scales beside the codes of a matrix; see [`scales::Scales`].
pub struct Scales {
    /// Consecutive weights that share a scale.
    pub blocksize: usize,
    /// What weights are rounded to.
    pub round_to: GgmlType,
    /// The scales, or those of the scales.
    pub absmax: Floats,
    /// A byte per scale, where the scales are quantized.
    pub nested: Option<Nested>,
    /// No scale is larger; the largest, or a little more where scales are quantized.
    pub largest: f32,
}

/// How bytes become scales; see [`Absmax::Nested`].
pub struct Nested {
    /// One per scale.
    pub codes: Bytes,
    /// Scales that share an absmax.
    pub blocksize: usize,
    /// What the codes stand for.
    pub map: Arc<[f32; 256]>,
    /// Added to every scale.
    pub offset: f32,
}

impl Scales {
    fn view(&self) -> scales::Scales<'_> {
        let absmax = match &self.nested {
            None => Absmax::F32(&self.absmax),
            Some(nested) => Absmax::Nested {
                codes: &nested.codes,
                absmax: &self.absmax,
                blocksize: nested.blocksize,
                map: &nested.map,
                offset: nested.offset,
            },
        };
        scales::Scales { blocksize: self.blocksize, round_to: self.round_to, absmax }
    }

    /// Bytes of the scales.
    fn n_bytes(&self) -> usize {
        4 * self.absmax.len() + self.nested.as_ref().map_or(0, |n| n.codes.len())
    }
}

/// A weight matrix (rows, cols) of any type.
pub struct Matrix {
    /// How the weights are stored.
    pub dtype: WeightType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    bytes: Bytes,
    scales: Option<Scales>,
}

impl Matrix {
    /// Checks that `bytes` is exactly rows × cols weights of `dtype`.
    pub fn new(dtype: GgmlType, rows: usize, cols: usize, bytes: Bytes) -> Result<Self> {
        Self::with_scales(dtype.into(), rows, cols, bytes, None)
    }

    /// As [`new`](Self::new), with the scales that the type asks for.
    pub fn with_scales(
        dtype: WeightType,
        rows: usize,
        cols: usize,
        bytes: Bytes,
        scales: Option<Scales>,
    ) -> Result<Self> {
        MatrixRef::with_scales(dtype, rows, cols, &bytes, scales.as_ref().map(Scales::view))?;
        Ok(Self { dtype, rows, cols, bytes, scales })
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
        let scales = self.scales.as_ref().map(Scales::view);
        MatrixRef::with_scales(self.dtype, self.rows, self.cols, &self.bytes, scales)
            .expect("checked when the matrix was made")
    }

    /// The form of the activations that it multiplies; `precise` keeps f32 whatever the weights are. What bitsandbytes
    /// made is multiplied as Q8_0.
    pub(crate) fn act_kind(&self, precise: bool) -> ActKind {
        match (self.dtype, &self.scales) {
            (WeightType::Ggml(ty), _) => ActKind::for_weights(ty, precise),
            (dtype, Some(scales))
                if !precise && kernels::multiplies_as_q8_0(self.cols, scales.blocksize, scales.largest) =>
            {
                ActKind::for_weights_of_bnb(dtype)
            }
            _ => ActKind::F32,
        }
    }

    /// Whether it may be multiplied as Q8_0, for which the kernels need room.
    pub(crate) fn has_scales_beside(&self) -> bool {
        self.scales.is_some()
    }

    /// Bytes of the weights, scales included.
    pub fn n_bytes(&self) -> usize {
        self.bytes.len() + self.scales.as_ref().map_or(0, Scales::n_bytes)
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
