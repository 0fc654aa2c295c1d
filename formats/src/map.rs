//! The memory map, the only `unsafe` of this crate.

use crate::{Error, ErrorKind, Result};
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A read-only map of a whole regular file, shared by whoever holds a clone.
#[derive(Clone, Debug)]
pub struct Map(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    map: memmap2::Mmap,
}

impl Map {
    /// Maps `path`. Folders, pipes, devices and sockets are refused; an empty file is an empty map.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        // SAFETY: the map is private and read-only. Its bytes are only ever read as bytes (any value is valid), so
        // another process that writes to the file can change results but not memory safety. Truncation by another
        // process raises SIGBUS, which stops the process; documented in ARCHITECTURE.md.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, "mapping the file", e))?;
        // Decoding walks the whole file for every token: with pages of 4 KiB, the page tables cost a third of the
        // bandwidth. Advice only: where the system has no large pages for files, nothing changes.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self(Arc::new(Inner { path: path.to_owned(), map })))
    }

    /// The mapped file's path.
    pub fn path(&self) -> &Path {
        &self.0.path
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.map
    }
}

/// The same bytes as little-endian f32, if they are aligned for it; `None` on a big-endian machine.
pub fn f32s(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: every bit pattern is an f32, and `align_to` keeps what is misaligned out of the middle.
    let (head, floats, tail) = unsafe { bytes.align_to::<f32>() };
    (head.is_empty() && tail.is_empty() && cfg!(target_endian = "little")).then_some(floats)
}

/// Opens a regular file for reading without blocking on pipes.
pub fn open_regular(path: &Path) -> Result<File> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "opening the file", e))?;
    if !meta.is_file() {
        return Err(Error::new(ErrorKind::NotRegularFile)
            .file(path)
            .expected("a regular file")
            .found(if meta.is_dir() { "a folder" } else { "a pipe, device or socket" }));
    }
    File::open(path).map_err(|e| Error::io(path, "opening the file", e))
}
