//! NumPy's `.npy`, written row by row.

use kestrel_formats::Result;
use kestrel_formats::atomic_file::AtomicFile;
use std::path::Path;

/// A `.npy` file of little-endian f32 (rows, cols) that appears when it is complete.
pub struct NpyWriter {
    file: AtomicFile,
    header_bytes: u64,
    cols: usize,
}

impl NpyWriter {
    /// Reserves the space. Errors: those of [`AtomicFile::create`].
    pub fn create(path: &Path, rows: usize, cols: usize, force: bool) -> Result<Self> {
        let header = header(rows, cols);
        let header_bytes = header.len() as u64;
        let file = AtomicFile::create(path, header_bytes + 4 * rows as u64 * cols as u64, force)?;
        file.write_at(0, &header)?;
        Ok(Self { file, header_bytes, cols })
    }

    /// Writes row `row` (cols).
    pub fn row(&self, row: usize, values: &[f32]) -> Result<()> {
        debug_assert_eq!(values.len(), self.cols);
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.file.write_at(self.header_bytes + 4 * row as u64 * self.cols as u64, &bytes)
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<()> {
        self.file.commit(|_| Ok(()))
    }
}

/// Version 1.0 header: magic, version, length, then a Python dict padded so that the data begins at a multiple of 64.
/// Source: NumPy's `numpy/lib/format.py` documentation.
fn header(rows: usize, cols: usize) -> Vec<u8> {
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    let unpadded = 10 + dict.len() + 1;
    dict.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
    dict.push('\n');
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend((dict.len() as u16).to_le_bytes());
    out.extend(dict.as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::header;

    #[test]
    fn the_header_is_what_numpy_writes() {
        let h = header(3, 4096);
        assert_eq!(h.len() % 64, 0);
        assert_eq!(&h[..10], b"\x93NUMPY\x01\x00\x76\x00");
        let text = std::str::from_utf8(&h[10..]).unwrap();
        assert!(text.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4096), } "));
        assert!(text.ends_with(" \n"));
    }
}
