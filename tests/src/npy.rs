//! Two-dimensional arrays in NumPy's .npy format, version 1, little-endian, C order: as much as golden files need.

use std::path::Path;

/// Rows and columns, then the raw little-endian bytes after checking that the file holds `descr` (such as `<i2`).
fn parse<'a>(bytes: &'a [u8], descr: &str) -> Option<(usize, usize, &'a [u8])> {
    let header_bytes = usize::from(u16::from_le_bytes(bytes.get(8..10)?.try_into().ok()?));
    let header = std::str::from_utf8(bytes.get(10..10 + header_bytes)?).ok()?;
    if !header.contains(&format!("'descr': '{descr}'")) || !header.contains("'fortran_order': False") {
        return None;
    }
    let shape = header.split_once("'shape': (")?.1.split_once(')')?.0;
    let mut dims = shape.split(',').map(|d| d.trim().parse::<usize>().ok());
    Some((dims.next()??, dims.next()??, &bytes[10 + header_bytes..]))
}

fn read<T, const N: usize>(path: &Path, descr: &str, from: fn([u8; N]) -> T) -> (usize, usize, Vec<T>) {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (rows, cols, data) =
        parse(&bytes, descr).unwrap_or_else(|| panic!("{}: not a 2-D {descr} .npy file", path.display()));
    let values: Vec<T> = data.as_chunks::<N>().0.iter().map(|&b| from(b)).collect();
    assert_eq!(values.len(), rows * cols, "{}", path.display());
    (rows, cols, values)
}

/// (rows, cols, values) of an i16 array.
pub fn read_i16(path: &Path) -> (usize, usize, Vec<i16>) {
    read(path, "<i2", i16::from_le_bytes)
}

/// (rows, cols, values) of an f32 array.
pub fn read_f32(path: &Path) -> (usize, usize, Vec<f32>) {
    read(path, "<f4", f32::from_le_bytes)
}
