//! Numbers on their way from one tensor into another, a few rows at a time.

use crate::input::{Input, InputTensor, PieceScales, row_bytes};
use crate::stream::Piece;
use kestrel_formats::arch::{Role, Transform};
use kestrel_formats::{Error, ErrorKind, GgmlType, Result};
use kestrel_quant::codec::{codec, dequantize};
use kestrel_quant::feedback::Feedback;
use kestrel_quant::isa::Isa;
use kestrel_quant::transform;

/// Weights of one piece, and so what bounds memory: a worker holds a piece's source bytes and its output bytes.
const PIECE_WEIGHTS: u64 = 1 << 18;
/// Weights expanded to f32 at a time; these fit a core's cache together with their bytes.
const STEP_WEIGHTS: usize = 1 << 14;

/// Cuts tensors into pieces, in the order of the files.
pub(crate) fn pieces(tensors: &[InputTensor]) -> Vec<Piece> {
    let mut out = Vec::new();
    for (i, t) in tensors.iter().enumerate() {
        let rows = t.shape.iter().rev().skip(1).product::<u64>();
        let step = (PIECE_WEIGHTS / t.cols().max(1)).max(1);
        for first_row in (0..rows).step_by(step as usize) {
            let n = step.min(rows - first_row);
            out.push(Piece {
                tensor: i,
                first_row,
                rows: n,
                file: t.place.file,
                offset: t.place.offset + first_row * t.row_bytes(),
                n_bytes: (n * t.row_bytes()) as usize,
            });
        }
    }
    out.sort_unstable_by_key(|p| (p.file, p.offset));
    out
}

/// How the numbers of a tensor are quantized.
#[derive(Clone, Copy)]
pub(crate) struct Quantizing<'a> {
    pub dtype: GgmlType,
    pub isa: Isa,
    pub importance: Option<&'a [f32]>,
    pub feedback: Option<&'a Feedback>,
}

/// A tensor's source as f32, transformed and checked, some whole rows at a time.
pub(crate) struct Rows<'a> {
    pub input: &'a Input,
    pub tensor: &'a InputTensor,
    pub piece: &'a Piece,
    pub bytes: &'a [u8],
}

/// Some whole rows of a tensor.
pub(crate) struct Expanded<'a> {
    /// Index of their first weight in the piece.
    pub first: usize,
    /// The source.
    pub bytes: &'a [u8],
    /// As f32, transformed, and finite.
    pub floats: &'a [f32],
    /// The largest magnitude of these.
    pub largest: f32,
}

impl Rows<'_> {
    /// Calls `f` with successive groups of rows.
    pub(crate) fn for_each(
        &self,
        floats: &mut Vec<f32>,
        mut f: impl FnMut(Expanded<'_>) -> Result<()>,
    ) -> Result<()> {
        let cols = self.tensor.cols() as usize;
        let rows = (STEP_WEIGHTS / cols.max(1)).max(1);
        let step_bytes = rows * self.tensor.row_bytes() as usize;
        let scales = self.input.scales(
            self.tensor,
            self.piece.first_row * self.tensor.cols(),
            self.piece.rows * self.tensor.cols(),
        )?;
        let first_of_piece = scales.as_ref().map_or(0, |s| s.first);
        let scales = scales.as_ref().map(PieceScales::view);
        let expand = |first: usize, bytes: &[u8], floats: &mut [f32]| {
            dequantize(self.tensor.dtype, bytes, first_of_piece + first, scales.as_ref(), floats);
        };
        for (i, bytes) in self.bytes.chunks(step_bytes.max(1)).enumerate() {
            let first = i * rows * cols;
            floats.resize(bytes.len() / self.tensor.dtype.block_bytes() * self.tensor.dtype.block_len(), 0.0);
            expand(first, bytes, floats);
            let Ok(largest) = transform::apply(self.tensor.transform, &self.input.h, floats) else {
                let mut source = vec![0.0; floats.len()];
                expand(first, bytes, &mut source);
                return Err(self.not_finite(first, &source, floats));
            };
            if self.tensor.spec.role == Role::SsmA
                && let Some(i) = floats.iter().position(|x| *x > 0.0)
            {
                return Err(self
                    .error(ErrorKind::OutOfRange, first + i)
                    .expected("a negative number: a positive one lets the state grow without end")
                    .found(floats[i]));
            }
            f(Expanded { first, bytes, floats, largest })?;
        }
        Ok(())
    }

    /// Names the first culprit: the transform leaves NaN and infinite numbers as such, and may make some.
    fn not_finite(&self, first: usize, source: &[f32], floats: &[f32]) -> Error {
        let i = floats.iter().position(|x| !x.is_finite()).unwrap_or(0);
        let found = source.get(i).copied().unwrap_or(f32::NAN);
        let expected = match self.tensor.transform {
            Transform::NegExp if found.is_finite() => "A_log of at most 88.7, whose exp is finite in f32",
            _ => "a finite number",
        };
        self.error(ErrorKind::NotFinite, first + i).expected(expected).found(found)
    }

    /// An error about weight `i` of the piece.
    fn error(&self, kind: ErrorKind, i: usize) -> Error {
        let (cols, dtype) = (self.tensor.cols(), self.tensor.dtype);
        let (row, col) = (self.piece.first_row + i as u64 / cols, i as u64 % cols);
        let block = (i / dtype.block_len() * dtype.block_bytes()) as u64;
        Error::new(kind)
            .file(&self.input.files[self.piece.file].path)
            .at(self.piece.offset + block)
            .what(format!("tensor \"{}\", row {row}, column {col}", self.tensor.source_name))
    }

    /// Quantizes the piece into `out`. Numbers that the type cannot hold are an error.
    pub(crate) fn quantize(
        &self,
        floats: &mut Vec<f32>,
        Quantizing { dtype, isa, importance, feedback }: Quantizing<'_>,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let row_out = row_bytes(dtype, self.tensor.cols()) as usize;
        out.clear();
        out.resize(self.piece.rows as usize * row_out, 0);
        // A tensor that keeps its type keeps its bytes: quantizing twice would only lose.
        let copy = self.tensor.dtype == dtype && self.tensor.transform == Transform::None;
        let codec = codec(dtype);
        let mut rest = out.as_mut_slice();
        self.for_each(floats, |expanded| {
            let Expanded { bytes, floats, .. } = expanded;
            let n = floats.len() / dtype.block_len() * dtype.block_bytes();
            let (dst, tail) = std::mem::take(&mut rest).split_at_mut(n);
            rest = tail;
            if copy {
                dst.copy_from_slice(bytes);
                return Ok(());
            }
            match feedback {
                Some(feedback) => feedback.quantize_with(isa, dtype, floats, dst),
                None => codec.quantize_with(isa, floats, importance, dst),
            }
            self.check_range(&expanded, dtype, dst)
        })
    }

    /// Scales are f16, and so are the numbers of an F16 file: far beyond its range they become infinite.
    fn check_range(&self, expanded: &Expanded<'_>, dtype: GgmlType, stored: &[u8]) -> Result<()> {
        // A fitted minimum can lie beyond every number of its block, though not by such a factor.
        let safe = half::f16::MAX.to_f32() / 16.0;
        let Expanded { first, floats, largest, .. } = *expanded;
        if dtype == GgmlType::F32 || largest < safe {
            return Ok(());
        }
        let mut back = vec![0.0; floats.len()];
        codec(dtype).dequantize(stored, &mut back);
        let Some(bad) = back.iter().position(|x| !x.is_finite()) else { return Ok(()) };
        // One number spoils its whole block: the largest.
        let block = bad / dtype.block_len() * dtype.block_len();
        let culprit =
            (block..block + dtype.block_len()).max_by(|&a, &b| floats[a].abs().total_cmp(&floats[b].abs()));
        let culprit = culprit.unwrap_or(bad);
        Err(self
            .error(ErrorKind::OutOfRange, first + culprit)
            .expected(format!("numbers that {dtype} can hold"))
            .found(floats[culprit])
            .hint("bf16 and f32 hold larger numbers"))
    }
}
