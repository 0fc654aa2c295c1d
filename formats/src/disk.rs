//! Reading what the disk holds, whatever the page cache holds.

use crate::map::open_regular;
use crate::{Error, Result};
use rustix::fs::{Advice, OFlags};
use std::fs::File;
use std::io::ErrorKind as IoKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What offsets, lengths and addresses of direct reads are multiples of; no common disk asks for more.
const ALIGN: usize = 4096;

/// A file that is read past the page cache (`O_DIRECT`), where the file system does that. What is read is dropped from the
/// cache first: where it does not, so that it comes from the disk, and else so that an output that nobody looks at does not
/// take the room of a source that is still to be read.
///
/// What was written to the file must have been forced to disk.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    path: PathBuf,
    direct: bool,
    buffer: Vec<u8>,
}

impl DiskFile {
    /// Opens it. Errors: as [`open_regular`].
    pub fn open(path: &Path) -> Result<Self> {
        let direct = File::options().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path);
        let (file, direct) = match direct {
            Ok(file) => (file, true),
            Err(_) => (open_regular(path)?, false),
        };
        Ok(Self { file, path: path.to_owned(), direct, buffer: Vec::new() })
    }

    /// The `n_bytes` bytes at `offset`.
    pub fn read(&mut self, offset: u64, n_bytes: usize) -> Result<&[u8]> {
        // Failing to drop is no error.
        let _ = rustix::fs::fadvise(&self.file, offset, (n_bytes as u64).try_into().ok(), Advice::DontNeed);
        if self.direct {
            match self.read_aligned(offset, n_bytes) {
                Ok(start) => return Ok(&self.buffer[start..start + n_bytes]),
                // It could be opened, but not be read like that.
                Err(e) if e.kind() == IoKind::InvalidInput => {}
                Err(e) => return Err(self.error(offset, e)),
            }
            (self.file, self.direct) = (open_regular(&self.path)?, false);
        }
        self.buffer.resize(n_bytes, 0);
        let read = self.file.read_exact_at(&mut self.buffer, offset);
        read.map_err(|e| self.error(offset, e))?;
        Ok(&self.buffer)
    }

    /// Reads whole aligned parts around the bytes. Returns where in the buffer they begin.
    fn read_aligned(&mut self, offset: u64, n_bytes: usize) -> std::io::Result<usize> {
        let skipped = (offset % ALIGN as u64) as usize;
        let wanted = skipped + n_bytes;
        let room = wanted.next_multiple_of(ALIGN);
        if self.buffer.len() < room + ALIGN {
            self.buffer.resize(room + ALIGN, 0);
        }
        let start = self.buffer.as_ptr().align_offset(ALIGN);
        let first = offset - skipped as u64;
        let mut done = 0;
        // A read that ends early ends at an aligned place or at the end of the file.
        while done < wanted {
            match self.file.read_at(&mut self.buffer[start + done..start + room], first + done as u64) {
                Ok(0) => return Err(IoKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == IoKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(start + skipped)
    }

    fn error(&self, offset: u64, e: std::io::Error) -> Error {
        Error::io(&self.path, "reading the output back", e).at(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_is_read_whether_directly_or_not() {
        let path = std::env::temp_dir().join(format!("kestrel-disk-{}", std::process::id()));
        let bytes: Vec<u8> = (0..3 * ALIGN + 77).map(|i| (i * 31 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        let mut file = DiskFile::open(&path).unwrap();
        for direct in [file.direct, false] {
            file.direct = direct;
            for (offset, n_bytes) in
                [(0, 1), (0, bytes.len()), (5, ALIGN), (ALIGN, ALIGN), (ALIGN - 1, 2), (3 * ALIGN, 77)]
            {
                let read = file.read(offset as u64, n_bytes).unwrap();
                assert_eq!(read, &bytes[offset..offset + n_bytes], "{offset} {n_bytes}");
            }
            assert!(file.read(3 * ALIGN as u64, 78).is_err());
            if !direct {
                break;
            }
            file = DiskFile { file: File::open(&path).unwrap(), ..file };
        }
        std::fs::remove_file(&path).unwrap();
    }
}
