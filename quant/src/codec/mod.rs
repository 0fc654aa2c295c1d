//! The codecs: one file per ggml type, and [`codec`] as the only list of them.

use kestrel_formats::GgmlType;

/// Quantizes and dequantizes rows of one type. `src.len()` is a multiple of the block length and `dst` has exactly
/// the right size; both are asserted at this edge.
pub trait Codec: Sync {
    /// The type in the table.
    fn ggml_type(&self) -> GgmlType;

    /// Quantizes whole blocks. `importance`, if given, has one non-negative weight per column of the row that `src`
    /// is (an importance matrix) and `src` is then exactly one row.
    fn quantize(&self, src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]);

    /// Dequantizes whole blocks, bit-exact with ggml.
    fn dequantize(&self, src: &[u8], dst: &mut [f32]);
}
