//! A bounded walk over the head of a GGUF file.

use super::value::ValueType;
use crate::limits::{GGUF_METADATA_BYTES_MAX, GGUF_STRING_BYTES_MAX};
use crate::{Error, ErrorKind, Result};

/// Where a value lies: its type, its element type if it is an array, and its bytes in the file.
///
/// Positions fit in 32 bits because the cursor never goes beyond [`GGUF_METADATA_BYTES_MAX`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub ty: ValueType,
    /// Element type of an array; for a scalar the same as `ty`.
    pub element: ValueType,
    /// First byte of the number, the text or the first element.
    pub start: u32,
    pub n_bytes: u32,
    /// Elements of an array, else 1.
    pub count: u32,
}

/// Reads little-endian fields in order. Nothing is allocated; every error carries the offset of its field.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
    /// The file goes on after `bytes`, so running out of them means a limit and not a truncated file.
    capped: bool,
}

impl<'a> Cursor<'a> {
    /// At the start of a file, of which at most [`GGUF_METADATA_BYTES_MAX`] bytes will be read.
    pub fn new(file: &'a [u8]) -> Self {
        let cap = usize::try_from(GGUF_METADATA_BYTES_MAX).unwrap_or(usize::MAX);
        Self { bytes: &file[..file.len().min(cap)], pos: 0, capped: file.len() > cap }
    }

    /// Offset of the next byte.
    pub fn pos(&self) -> usize {
        self.pos
    }

    fn remaining(&self) -> usize {
        self.bytes.len() - self.pos
    }

    /// The next `n` bytes.
    fn take(&mut self, n: usize, field: &str) -> Result<&'a [u8]> {
        let Some(bytes) = self.bytes.get(self.pos..).and_then(|rest| rest.get(..n)) else {
            let kind = if self.capped { ErrorKind::Limit } else { ErrorKind::Truncated };
            return Err(Error::new(kind)
                .at(self.pos as u64)
                .expected(format!("{n} bytes of {field}"))
                .found(self.what_is_left()));
        };
        self.pos += n;
        Ok(bytes)
    }

    fn what_is_left(&self) -> String {
        match self.capped {
            true => format!("a header longer than {GGUF_METADATA_BYTES_MAX} bytes"),
            false => format!("{} bytes to the end of the file", self.remaining()),
        }
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, field)?);
        Ok(out)
    }

    pub fn u32(&mut self, field: &str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: &str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `min_bytes` each, which the rest of the file must be able to hold.
    pub fn count(&mut self, min_bytes: usize, field: &str) -> Result<usize> {
        let at = self.pos as u64;
        let count = self.u64(field)?;
        let most = self.remaining() / min_bytes;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(Error::new(if self.capped { ErrorKind::Limit } else { ErrorKind::CountExceedsFile })
                .at(at)
                .expected(format!("{field} of at most {most}"))
                .found(format!("{count}, with {}", self.what_is_left()))),
        }
    }

    /// A length and that many bytes; returns where the bytes start, and them.
    pub fn string(&mut self, field: &str) -> Result<(usize, &'a [u8])> {
        let n = self.count(1, field)?;
        let start = self.pos;
        Ok((start, self.take(n, field)?))
    }

    /// A value's type id.
    pub fn value_type(&mut self) -> Result<ValueType> {
        let at = self.pos as u64;
        ValueType::from_id(self.u32("a value type")?).map_err(|e| e.at(at))
    }

    /// Walks over a value of type `ty` and checks it.
    pub fn value(&mut self, ty: ValueType) -> Result<Extent> {
        match ty {
            ValueType::Array => self.array_value(),
            ValueType::String => {
                let (start, text) = self.string_value()?;
                if std::str::from_utf8(text).is_err() {
                    return Err(Error::new(ErrorKind::OutOfRange)
                        .at(start as u64)
                        .expected("UTF-8 text")
                        .found("other bytes"));
                }
                Ok(self.extent(ty, ty, start, 1))
            }
            _ => {
                let start = self.pos;
                let bytes = self.take(ty.min_bytes(), "a value")?;
                check_bools(ty, bytes, start)?;
                Ok(self.extent(ty, ty, start, 1))
            }
        }
    }

    fn string_value(&mut self) -> Result<(usize, &'a [u8])> {
        let at = self.pos as u64;
        let (start, text) = self.string("a string's length")?;
        if text.len() as u64 > GGUF_STRING_BYTES_MAX {
            return Err(Error::new(ErrorKind::Limit)
                .at(at)
                .expected(format!("a string of at most {GGUF_STRING_BYTES_MAX} bytes"))
                .found(text.len()));
        }
        Ok((start, text))
    }

    fn array_value(&mut self) -> Result<Extent> {
        let at = self.pos as u64;
        let element = self.value_type()?;
        if element == ValueType::Array {
            return Err(Error::new(ErrorKind::Unsupported)
                .at(at)
                .expected("an array of numbers, bools or strings")
                .found("an array of arrays"));
        }
        let count = self.count(element.min_bytes(), "an array's length")?;
        let start = self.pos;
        if element == ValueType::String {
            for _ in 0..count {
                self.string_value()?;
            }
        } else {
            // `count` made sure that the product is at most what is left.
            let bytes = self.take(count.saturating_mul(element.min_bytes()), "array elements")?;
            check_bools(element, bytes, start)?;
        }
        Ok(self.extent(ValueType::Array, element, start, count))
    }

    /// From `start` to here.
    fn extent(&self, ty: ValueType, element: ValueType, start: usize, count: usize) -> Extent {
        Extent { ty, element, start: start as u32, n_bytes: (self.pos - start) as u32, count: count as u32 }
    }
}

/// Bools are 0 or 1 and nothing else.
fn check_bools(ty: ValueType, bytes: &[u8], start: usize) -> Result<()> {
    if ty != ValueType::Bool {
        return Ok(());
    }
    match bytes.iter().position(|&b| b > 1) {
        None => Ok(()),
        Some(i) => Err(Error::new(ErrorKind::OutOfRange)
            .at((start + i) as u64)
            .expected("a bool of 0 or 1")
            .found(bytes.get(i).copied().unwrap_or(0))),
    }
}
