//! Opening the files of a folder, and only those.
//!
//! Names come from files that others wrote (an index, a symbolic link). A name is one path component; the file
//! behind it is opened relative to the folder and without following a link, except in the two forms in which a
//! link is followed by hand: to a sibling, and `../../blobs/<hash>`, which is how the Hugging Face cache stores
//! every file of a snapshot.

use crate::map::Map;
use crate::{Error, ErrorKind, Result};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A folder held open, so that renaming it or replacing its parents changes nothing.
pub(crate) struct Folder {
    path: PathBuf,
    fd: OwnedFd,
}

/// An opened regular file and what it was when opened.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) n_bytes: u64,
    map: OnceLock<Map>,
}

impl Opened {
    /// The file's map, made at the first call. Errors: `Changed` if the file has another size by now.
    pub(crate) fn map(&self) -> Result<&Map> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let map = Map::open(&self.path)?;
        if map.len() as u64 != self.n_bytes {
            return Err(self.changed(format!("{} bytes", map.len())));
        }
        Ok(self.map.get_or_init(|| map))
    }

    /// Brings the file into memory if it is mapped, see [`Map::preload`].
    pub(crate) fn preload(&self) {
        if let Some(map) = self.map.get() {
            map.preload();
        }
    }

    /// Fills `buf` from `offset`, from the map if there is one. Positioned, so threads may read at once.
    ///
    /// Errors: `Changed` if the file ends early, so has shrunk since its size was checked; `Io`.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let shorter = || self.changed("a shorter file".to_owned()).at(offset);
        if let Some(map) = self.map.get() {
            let rest = usize::try_from(offset).ok().and_then(|start| map.get(start..));
            buf.copy_from_slice(rest.and_then(|rest| rest.get(..buf.len())).ok_or_else(shorter)?);
            return Ok(());
        }
        self.file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => shorter(),
            _ => Error::io(&self.path, "reading the file", e).at(offset),
        })
    }

    /// That the file is not what it was.
    pub(crate) fn changed(&self, found: String) -> Error {
        Error::new(ErrorKind::Changed)
            .file(&self.path)
            .expected(format!("{} bytes, unchanged since the file was opened", self.n_bytes))
            .found(found)
    }
}

impl Folder {
    /// Opens a folder.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { path: path.to_owned(), fd }),
            Err(rustix::io::Errno::NOTDIR) => Err(Error::new(ErrorKind::Usage)
                .file(path)
                .expected("a folder with config.json and safetensors files")
                .found("a file")),
            Err(e) => Err(Error::io(path, "opening the folder", e)),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file `name`; `None` if there is none.
    ///
    /// Errors: `BadPath` for a name that is not one component or a link that leaves the folder, `NotRegularFile`.
    pub(crate) fn file(&self, name: &str) -> Result<Option<Opened>> {
        check_component(name).map_err(|e| e.file(&self.path))?;
        let path = self.path.join(name);
        let file = match self.open_no_follow(name) {
            Ok(file) => file,
            Err(rustix::io::Errno::LOOP) => match self.follow(name)? {
                Some(file) => file,
                None => return Ok(None),
            },
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(e) => return Err(Error::io(&path, "opening the file", e)),
        };
        let meta = file.metadata().map_err(|e| Error::io(&path, "reading the file's size", e))?;
        if !meta.is_file() {
            return Err(Error::new(ErrorKind::NotRegularFile)
                .file(&path)
                .expected("a regular file")
                .found(if meta.is_dir() { "a folder" } else { "a pipe, device or socket" }));
        }
        Ok(Some(Opened { path, file, n_bytes: meta.len(), map: OnceLock::new() }))
    }

    /// The bytes of a small file; `None` if there is none, `Limit` if it has more than `limit` bytes.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Option<(PathBuf, Vec<u8>)>> {
        let Some(opened) = self.file(name)? else { return Ok(None) };
        let Opened { path, file, n_bytes, .. } = opened;
        let too_large = |n: u64| {
            Error::new(ErrorKind::Limit)
                .file(&path)
                .expected(format!("at most {limit} bytes"))
                .found(format!("{n}"))
        };
        if n_bytes > limit {
            return Err(too_large(n_bytes));
        }
        let mut bytes = Vec::with_capacity(n_bytes as usize);
        // One more than the limit, should the file grow meanwhile.
        (&file)
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io(&path, "reading the file", e))?;
        if bytes.len() as u64 > limit {
            return Err(too_large(bytes.len() as u64));
        }
        Ok(Some((path, bytes)))
    }

    /// Whether any entry's name ends in one of `suffixes`; gives the first in sorted order.
    pub(crate) fn find(&self, suffixes: &[&str]) -> Result<Option<String>> {
        let entries =
            std::fs::read_dir(&self.path).map_err(|e| Error::io(&self.path, "listing the folder", e))?;
        let mut names: Vec<String> = entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names.into_iter().find(|n| suffixes.iter().any(|s| n.ends_with(s))))
    }

    fn open_no_follow(&self, name: &str) -> std::result::Result<File, rustix::io::Errno> {
        // Without NONBLOCK, opening a pipe would wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, name, flags, Mode::empty()).map(File::from)
    }

    /// Follows the symbolic link `name` if its target is one of the two allowed forms.
    fn follow(&self, name: &str) -> Result<Option<File>> {
        let path = self.path.join(name);
        let target = rustix::fs::readlinkat(&self.fd, name, Vec::new())
            .map_err(|e| Error::io(&path, "reading the link", e))?;
        let refused = |found: String| {
            Error::new(ErrorKind::BadPath)
                .file(&path)
                .expected("a file, or a link to ../../blobs/<hash> as in the Hugging Face cache")
                .found(found)
        };
        let target = target.to_str().map_err(|_| refused("a link to a name that is not UTF-8".to_owned()))?;
        if !is_cache_blob(target) && check_component(target).is_err() {
            return Err(refused(format!("a link to {}", crate::json::shorten(target))));
        }
        match self.open_no_follow(target) {
            Ok(file) => Ok(Some(file)),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(rustix::io::Errno::LOOP) => Err(refused("a link to a link".to_owned())),
            Err(e) => Err(Error::io(&path, "opening the link's target", e)),
        }
    }
}

/// `../../blobs/` and the hexadecimal hash (SHA-1 of git or SHA-256 of LFS) of a Hugging Face cache entry.
fn is_cache_blob(target: &str) -> bool {
    target
        .strip_prefix("../../blobs/")
        .is_some_and(|hash| matches!(hash.len(), 40 | 64) && hash.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// `BadPath` unless `name` is one path component that is safe on every system.
pub(crate) fn check_component(name: &str) -> Result<()> {
    let bad = |found: &str| {
        Err(Error::new(ErrorKind::BadPath)
            .what(format!("file name \"{}\"", crate::json::shorten(name)))
            .expected("a plain file name")
            .found(found))
    };
    match name {
        "" => bad("an empty name"),
        "." | ".." => bad("a folder"),
        _ if name.len() > 255 => bad("a name of more than 255 bytes"),
        _ if name.contains(['/', '\\']) => bad("a path with folders"),
        _ if name.chars().any(char::is_control) => bad("a control character"),
        _ => Ok(()),
    }
}
