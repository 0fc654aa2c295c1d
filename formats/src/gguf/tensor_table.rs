//! The table of tensors in the header, and the data that follows it.

use super::cursor::Cursor;
use super::read::TensorInfo;
use crate::ggml_type::TypeId;
use crate::limits::{GGUF_DIMS_MAX, GGUF_TENSOR_NAME_BYTES_MAX, TENSORS_MAX};
use crate::{Error, ErrorKind, GgmlType, Result};

/// Least bytes of an entry: name length, one byte of name, number of dimensions, one dimension, type, offset.
const ENTRY_BYTES_MIN: usize = 8 + 1 + 4 + 8 + 4 + 8;

/// The count in the header.
pub(super) fn read_count(cursor: &mut Cursor) -> Result<usize> {
    let at = cursor.pos() as u64;
    let n = cursor.count(ENTRY_BYTES_MIN, "a number of tensors")?;
    if n as u64 > TENSORS_MAX {
        return Err(Error::new(ErrorKind::Limit)
            .at(at)
            .expected(format!("at most {TENSORS_MAX} tensors"))
            .found(n));
    }
    Ok(n)
}

/// Reads the table. Offsets must follow one another without gap or overlap; in the result they still count from
/// the start of the data section.
pub(super) fn read(cursor: &mut Cursor, n_tensors: usize, alignment: u32) -> Result<Vec<TensorInfo>> {
    let mut tensors = Vec::with_capacity(n_tensors);
    let mut next_offset = 0;
    for i in 0..n_tensors {
        let at = cursor.pos() as u64;
        let name = cursor
            .string("a tensor name's length")
            .and_then(|(_, name)| check_tensor_name(name).map_err(|e| e.at(at)))
            .map_err(|e| e.what(format!("tensor {i} of {n_tensors}")))?;
        let (tensor, next) = read_entry(cursor, name, next_offset, alignment.into())
            .map_err(|e| e.what(format!("tensor \"{name}\"")))?;
        next_offset = next;
        tensors.push(tensor);
    }
    Ok(tensors)
}

/// Everything of an entry after its name, and where the next tensor's data has to start.
fn read_entry(cursor: &mut Cursor, name: &str, expected: u64, alignment: u64) -> Result<(TensorInfo, u64)> {
    let at = cursor.pos() as u64;
    let shape = read_shape(cursor)?;
    let dtype = read_type(cursor)?;
    let n_bytes = data_bytes(dtype, &shape).map_err(|e| e.at(at))?;
    let at_offset = cursor.pos() as u64;
    let offset = cursor.u64("an offset")?;
    if offset != expected {
        let problem = match offset {
            o if !o.is_multiple_of(alignment) => "is misaligned",
            o if o < expected => "overlaps another tensor",
            _ => "leaves a gap",
        };
        return Err(Error::new(ErrorKind::BadOffset)
            .at(at_offset)
            .expected(format!("offset {expected} in the data section"))
            .found(format!("{offset}, which {problem}")));
    }
    let next =
        n_bytes.checked_next_multiple_of(alignment).and_then(|n| offset.checked_add(n)).ok_or_else(|| {
            Error::new(ErrorKind::DataOutOfBounds).at(at).found("tensor sizes whose sum overflows 64 bits")
        })?;
    Ok((TensorInfo { name: name.to_owned(), dtype, shape, offset, n_bytes, part: 0 }, next))
}

/// Dimensions, turned from ggml's order (fastest first) to PyTorch's.
fn read_shape(cursor: &mut Cursor) -> Result<Vec<u64>> {
    let at = cursor.pos() as u64;
    let n_dims = cursor.u32("a number of dimensions")?;
    if !(1..=GGUF_DIMS_MAX).contains(&n_dims) {
        return Err(Error::new(ErrorKind::BadShape)
            .at(at)
            .expected(format!("1 to {GGUF_DIMS_MAX} dimensions"))
            .found(n_dims));
    }
    let mut shape = vec![0; n_dims as usize];
    for dim in shape.iter_mut().rev() {
        *dim = cursor.u64("a dimension")?;
    }
    Ok(shape)
}

fn read_type(cursor: &mut Cursor) -> Result<GgmlType> {
    let at = cursor.pos() as u64;
    let id = cursor.u32("a tensor type")?;
    let error = |kind, found: String| Err(Error::new(kind).at(at).found(found).expected(SUPPORTED_TYPES));
    match TypeId::classify(id) {
        TypeId::Supported(ty) => Ok(ty),
        TypeId::Unsupported(name) => error(ErrorKind::Unsupported, format!("{name} (type {id})")),
        TypeId::Removed(name) => {
            error(ErrorKind::RemovedType, format!("{name} (type {id}), which ggml removed"))
        }
        TypeId::Unknown => error(ErrorKind::UnknownType, format!("type {id}")),
    }
}

const SUPPORTED_TYPES: &str =
    "one of F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS";

/// Bytes of a tensor of this type and shape. Its number of elements has to fit in an i64, as ggml's do, also
/// where a dimension of 0 hides that the others do not.
pub(super) fn data_bytes(dtype: GgmlType, shape: &[u64]) -> Result<u64> {
    let impossible = |expected: String| {
        Error::new(ErrorKind::BadShape).expected(expected).found(format!("shape {shape:?} of {dtype}"))
    };
    let (&cols, rows) = shape.split_last().ok_or_else(|| impossible("at least one dimension".to_owned()))?;
    let row_bytes = dtype
        .bytes_for(cols)
        .ok_or_else(|| impossible(format!("rows of whole blocks of {}", dtype.block_len())))?;
    let count = |dims: &[u64]| dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d.max(1)));
    count(shape)
        .filter(|&n| i64::try_from(n).is_ok())
        .and_then(|_| count(rows)?.checked_mul(row_bytes))
        .filter(|&n| i64::try_from(n).is_ok())
        .map(|n| if shape.contains(&0) { 0 } else { n })
        .ok_or_else(|| impossible("a size that fits in 63 bits".to_owned()))
}

/// A tensor name is 1 to 63 bytes of UTF-8 without NUL.
pub(super) fn check_tensor_name(name: &[u8]) -> Result<&str> {
    match std::str::from_utf8(name) {
        Ok(text)
            if (1..=GGUF_TENSOR_NAME_BYTES_MAX).contains(&(name.len() as u64)) && !text.contains('\0') =>
        {
            Ok(text)
        }
        _ => Err(Error::new(ErrorKind::BadName)
            .expected(format!(
                "a tensor name of 1 to {GGUF_TENSOR_NAME_BYTES_MAX} bytes of UTF-8 without NUL"
            ))
            .found(format!("{} bytes, \"{}\"", name.len(), name.get(..64).unwrap_or(name).escape_ascii()))),
    }
}

/// The tensor data of one file.
pub(super) struct DataSection<'a> {
    pub file: &'a [u8],
    /// Where the header ends, before padding.
    pub header_end: u64,
    pub alignment: u64,
}

impl DataSection<'_> {
    /// Makes the offsets count from the start of the file, checks that all data lies in it, and looks at what lies
    /// between and behind.
    pub fn place(&self, tensors: &mut [TensorInfo], warnings: &mut Vec<String>) -> Result<()> {
        let len = self.file.len() as u64;
        // The header lies in memory, so rounding its size up cannot overflow.
        let start = self.header_end.next_multiple_of(self.alignment);
        let mut padding = Padding { file: self.file, n_nonzero: 0, first: None };
        padding.look(self.header_end, start);
        let mut end = self.header_end;
        for t in tensors.iter_mut() {
            let range = start.checked_add(t.offset).and_then(|o| Some((o, o.checked_add(t.n_bytes)?)));
            let Some((offset, data_end)) = range.filter(|&(_, data_end)| data_end <= len) else {
                return Err(Error::new(ErrorKind::DataOutOfBounds)
                    .at(start.saturating_add(t.offset))
                    .what(format!("tensor \"{}\"", t.name))
                    .expected(format!("{} bytes of data", t.n_bytes))
                    .found(format!("a file that ends at byte {len}")));
            };
            t.offset = offset;
            end = data_end.next_multiple_of(self.alignment); // a file position, so far from overflow
            padding.look(data_end, end);
        }
        if let Some(first) = padding.first {
            warnings
                .push(format!("{} padding bytes are not zero, the first at byte {first}", padding.n_nonzero));
        }
        if !tensors.is_empty() && end > len {
            warnings.push(format!("the last {} padding bytes are missing", end - len));
        }
        let end = end.max(start);
        if len > end {
            warnings.push(format!("{} bytes follow the last tensor, from byte {end} on", len - end));
        }
        Ok(())
    }
}

/// Counts padding bytes that are not zero.
struct Padding<'a> {
    file: &'a [u8],
    n_nonzero: u64,
    first: Option<u64>,
}

impl Padding<'_> {
    fn look(&mut self, from: u64, to: u64) {
        let to = to.min(self.file.len() as u64) as usize;
        for (i, &byte) in self.file.get(from as usize..to).unwrap_or_default().iter().enumerate() {
            if byte != 0 {
                self.n_nonzero += 1;
                self.first.get_or_insert(from + i as u64);
            }
        }
    }
}
