//! Output files that appear complete or not at all.
//!
//! The bytes go to a temporary file beside the output, whose space is reserved before the first of them. Only after
//! everything is on disk, has been read back and was found right does the file get its name, in one step that a
//! crash cannot split. Whatever fails before that step leaves the output's name as it was.
//!
//! An output that takes long grows as `OUT.part`, which stays when a run ends early and from which another goes on. Until
//! it is complete, a journal lies behind its last byte: magic, a fingerprint of what determines the output's bytes, and a
//! hash of each part of the output, 0 while it is not written. A hash that does not fit says that the part has to be
//! written again, whether a power cut lost it or something else damaged it.

use crate::disk::DiskFile;
use crate::{Error, ErrorKind, Result};
use rustix::fs::{FallocateFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::io::ErrorKind as IoKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// What a journal begins with.
const JOURNAL_MAGIC: &[u8; 8] = b"KESTRLJ1";
/// Bytes of a file name that every common file system allows.
const NAME_BYTES_MAX: usize = 255;
/// Temporary names tried before giving up: others are left from runs of the same process id that were killed.
const TEMP_NAMES: u32 = 64;

/// A file being written under a temporary name. Dropped without [`AtomicFile::commit`], it is removed, unless another run
/// can go on from it.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temp: PathBuf,
    target: PathBuf,
    force: bool,
    published: bool,
    growth: Option<Growth>,
    journal: Option<Journal>,
}

/// Of an output that grows as [`part_of`] its name.
#[derive(Debug)]
struct Growth {
    /// Bytes of the output; what only its runs need lies behind them.
    file_bytes: u64,
    /// Whether there is something to go on from.
    begun: AtomicBool,
}

/// What tells one interrupted run from another.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Stands for everything that determines the output's bytes.
    pub fingerprint: [u8; 32],
    /// Parts in which the output is written.
    pub n_parts: usize,
}

#[derive(Debug)]
struct Journal {
    /// Where the hashes begin.
    hashes_at: u64,
    /// What earlier runs recorded.
    known: Vec<u64>,
}

impl AtomicFile {
    /// Creates `.NAME.kestrel-partial-PID` beside `target` and reserves `file_bytes` for it.
    ///
    /// Errors: `OutputExists` if the target exists and `force` is false, `NotRegularFile` if it is something that
    /// must not be replaced, `Io` if the folder cannot be written or has too little space.
    pub fn create(target: &Path, file_bytes: u64, force: bool) -> Result<Self> {
        let target = check_target(target, force)?;
        let create = |temp: &Path| File::options().read(true).write(true).create_new(true).open(temp);
        let (file, temp) = create_temp(&target, create)?;
        let out = Self { file, temp, target, force, published: false, growth: None, journal: None };
        out.reserve(file_bytes)?;
        Ok(out)
    }

    /// As [`AtomicFile::create`], for an output that takes long and grows as [`part_of`] its name. With `resume` it goes
    /// on with what an interrupted run left there, if there is something.
    ///
    /// Errors: also `OutputExists` if there is something and `resume` is false, or another run is writing it;
    /// `Inconsistent` if it is of another run.
    pub fn resumable(
        target: &Path,
        file_bytes: u64,
        run: &Run,
        (force, resume): (bool, bool),
    ) -> Result<Self> {
        let real = check_target(target, force)?;
        let head = [JOURNAL_MAGIC.as_slice(), &run.fingerprint].concat();
        let hashes_at = file_bytes.saturating_add(head.len() as u64);
        let all_bytes = hashes_at.saturating_add(8 * run.n_parts as u64);
        let mut known = Vec::new();
        let sizes = (file_bytes, all_bytes);
        let mut out = Self::growing(&real, sizes, (force, resume), &mut |out, found| {
            if !found {
                return out.write_at(file_bytes, &head).map(|()| false);
            }
            known = read_journal(&out.file, &out.temp, &head, sizes)?;
            Ok(known.iter().any(|&hash| hash != 0))
        })?;
        out.journal = Some(Journal { hashes_at, known });
        Ok(out)
    }

    /// Opens what an interrupted run left at [`part_of`] `target`, a path that was checked, or creates it: the bytes of the
    /// output, and with those that only its runs need. `prepare` learns whether something was found, and says whether there
    /// is something to go on from; it refuses what is of another run, or fills a new file before that gets its name, so that
    /// whatever has this name can be told from other files.
    pub(crate) fn growing(
        target: &Path,
        (file_bytes, all_bytes): (u64, u64),
        (force, resume): (bool, bool),
        prepare: &mut dyn FnMut(&Self, bool) -> Result<bool>,
    ) -> Result<Self> {
        let part = part_of(target);
        let found = match std::fs::symlink_metadata(&part) {
            Err(e) if e.kind() == IoKind::NotFound => false,
            Err(e) => return Err(Error::io(&part, "looking at the interrupted run", e)),
            Ok(_) if !resume => return Err(interrupted_run(&part)),
            Ok(found) if !found.is_file() => {
                return Err(Error::new(ErrorKind::NotRegularFile).file(&part).what("interrupted run"));
            }
            Ok(_) => true,
        };
        if found {
            let file = File::options().read(true).write(true).open(&part);
            let file = file.map_err(|e| Error::io(&part, "opening the interrupted run", e))?;
            lock(&file, &part)?;
            // Until it is known to be this run's, it stays whatever happens.
            let growth = Some(Growth { file_bytes, begun: AtomicBool::new(true) });
            let target = target.to_owned();
            let out = Self { file, temp: part, target, force, published: false, growth, journal: None };
            out.set_begun(prepare(&out, true)?);
            return Ok(out);
        }
        let mut out = Self::create(target, all_bytes, force)?;
        // Where space cannot be reserved.
        out.file.set_len(all_bytes).map_err(|e| out.io("creating the output", e))?;
        let begun = prepare(&out, false)?;
        lock(&out.file, &out.temp)?;
        rename_new(&out.temp, &part).map_err(|e| match e.kind() {
            IoKind::AlreadyExists => interrupted_run(&part),
            _ => Error::io(&part, "creating the output", e),
        })?;
        out.temp = part;
        // The run that had this name until now has made the output, if it came to its end since the output was looked for.
        check_target(target, force)?;
        out.growth = Some(Growth { file_bytes, begun: AtomicBool::new(begun) });
        Ok(out)
    }

    /// The hash that an earlier run recorded of this part of the output.
    pub fn recorded(&self, part: usize) -> Option<u64> {
        self.journal.as_ref()?.known.get(part).copied().filter(|&hash| hash != 0)
    }

    /// Says that a part of the output is written and has this hash. Does nothing for a file that no run goes on from.
    pub fn record(&self, part: usize, hash: u64) -> Result<()> {
        let Some(journal) = &self.journal else { return Ok(()) };
        self.set_begun(true);
        self.write_at(journal.hashes_at + 8 * part as u64, &hash.to_le_bytes())
    }

    /// What another run can go on from, if this one ends now.
    pub fn part(&self) -> Option<&Path> {
        let growth = self.growth.as_ref()?;
        growth.begun.load(Ordering::Relaxed).then_some(&*self.temp)
    }

    /// Nobody will go on from it: what is there goes away unless it is committed.
    pub fn abandon(&self) {
        self.set_begun(false);
    }

    fn set_begun(&self, begun: bool) {
        if let Some(growth) = &self.growth {
            growth.begun.store(begun, Ordering::Relaxed);
        }
    }

    /// Bytes of the file under its temporary name that are not the output's.
    pub fn journal_bytes(&self) -> u64 {
        let Some(growth) = &self.growth else { return 0 };
        self.file.metadata().map_or(0, |meta| meta.len().saturating_sub(growth.file_bytes))
    }

    /// Writes all of `bytes` at `offset`; callable from many threads at once.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|e| self.io("writing the output", e).at(offset))
    }

    /// Forces what was written so far to disk. Other threads may go on writing.
    pub fn settle(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| self.io("forcing the output to disk", e))
    }

    /// Opens the file under its temporary name, to see what the disk holds of what has settled.
    pub fn on_disk(&self) -> Result<DiskFile> {
        DiskFile::open(&self.temp)
    }

    /// Reads exactly `buf.len()` bytes at `offset`.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|e| self.io("reading the output back", e).at(offset))
    }

    /// Where it is until the output appears.
    pub(crate) fn path(&self) -> &Path {
        &self.temp
    }

    /// Where the output will appear.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Forces the bytes to disk, lets `check` look at them under the temporary name ([`DiskFile`] sees what the disk
    /// holds), and only then gives the file its name and forces the folder to disk.
    pub fn commit(mut self, check: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        self.file.sync_all().map_err(|e| self.io("forcing the output to disk", e))?;
        check(&self.temp)?;
        if let Some(growth) = &self.growth {
            // Without its journal no run goes on from it, so whatever keeps it from its name should show before.
            check_target(&self.target, self.force)?;
            let cut = self.file.set_len(growth.file_bytes).and_then(|()| self.file.sync_all());
            cut.map_err(|e| self.io("cutting off what only its runs needed", e))?;
        }
        self.publish()?;
        self.published = true;
        sync_folder(&self.target)
    }

    /// A full disk should show in the first second, not after minutes. File systems that cannot reserve are used
    /// without.
    fn reserve(&self, file_bytes: u64) -> Result<()> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
        if limit.is_some_and(|limit| limit < file_bytes) {
            // Writing beyond it would raise SIGXFSZ, which kills a process that does not handle it, and is late anyway.
            let found = format!("a limit of {} bytes per file", limit.unwrap_or(0));
            return Err(Error::new(ErrorKind::Io)
                .file(&self.target)
                .what("reserving space for the output")
                .expected(format!("{file_bytes} bytes"))
                .found(found)
                .hint("raise it with ulimit -f"));
        }
        if file_bytes == 0 {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, file_bytes) {
            Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => {
                let free = rustix::fs::fstatvfs(&self.file).map(|s| s.f_bavail.saturating_mul(s.f_frsize));
                let found = match free {
                    Ok(free) if e == Errno::NOSPC => format!("{free} bytes free"),
                    _ => e.to_string(),
                };
                Err(Error::new(ErrorKind::Io)
                    .file(&self.target)
                    .what("reserving space for the output")
                    .expected(format!("{file_bytes} bytes free"))
                    .found(found))
            }
            Err(e @ Errno::IO) => Err(self.io("reserving space for the output", e.into())),
            _ => Ok(()),
        }
    }

    fn publish(&self) -> Result<()> {
        let renamed = if self.force {
            std::fs::rename(&self.temp, &self.target)
        } else {
            rename_new(&self.temp, &self.target)
        };
        renamed.map_err(|e| match e.kind() {
            IoKind::AlreadyExists => output_exists(&self.target),
            _ => self.io("giving the output its name", e),
        })
    }

    fn io(&self, doing: &str, e: std::io::Error) -> Error {
        Error::io(&self.target, doing, e)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.published && self.part().is_none() {
            let _ = std::fs::remove_file(&self.temp);
        }
    }
}

/// Refuses, before any work, an output that [`AtomicFile::create`] would refuse; returns the path that will be
/// replaced or created (a symbolic link is followed, so that it stays one).
pub fn check_target(target: &Path, force: bool) -> Result<PathBuf> {
    if target.file_name().is_none() {
        return Err(Error::new(ErrorKind::Usage).file(target).what("output").expected("a file name"));
    }
    let found = match std::fs::symlink_metadata(target) {
        Err(e) if e.kind() == IoKind::NotFound => return Ok(target.to_owned()),
        Err(e) => return Err(Error::io(target, "looking at the output", e)),
        Ok(found) => found,
    };
    if !force {
        return Err(output_exists(target));
    }
    let real = if found.is_symlink() {
        std::fs::canonicalize(target).map_err(|e| Error::io(target, "following the link", e))?
    } else {
        target.to_owned()
    };
    crate::map::open_regular(&real)?;
    Ok(real)
}

/// Whether both paths lead to one file, whatever their spelling. False if either does not exist.
pub fn same_file(a: &Path, b: &Path) -> bool {
    match (std::fs::metadata(a), std::fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Where an output that takes long grows: `OUT.part`.
pub fn part_of(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    target.with_file_name(name)
}

/// There is an interrupted run, and nobody said that it should go on.
pub fn interrupted_run(part: &Path) -> Error {
    Error::new(ErrorKind::OutputExists)
        .file(part)
        .expected("no interrupted run")
        .found("what one left")
        .hint("--resume goes on from it; without the file it begins anew")
}

/// There is an interrupted run, but not one of what is `expected`.
pub fn other_run(part: &Path, expected: &str) -> Error {
    Error::new(ErrorKind::Inconsistent).file(part).what("interrupted run").expected(expected).found("another")
}

/// Keeps a second run from writing the same part, or one that has just become the output.
fn lock(file: &File, path: &Path) -> Result<()> {
    let error = |found: &str| {
        Error::new(ErrorKind::OutputExists).file(path).expected("an interrupted run").found(found)
    };
    // File systems that cannot lock are used without.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        return Err(error("one that another process goes on with"));
    }
    let io = |e| Error::io(path, "looking at the interrupted run", e);
    let ours = file.metadata().map_err(io)?;
    match std::fs::metadata(path) {
        Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => Ok(()),
        _ => Err(error("one that another process has finished")),
    }
}

/// The hashes of a file that is `all_bytes` long, behind `head` at `at`.
fn read_journal(file: &File, part: &Path, head: &[u8], (at, all_bytes): (u64, u64)) -> Result<Vec<u64>> {
    let io = |e| Error::io(part, "reading the interrupted run", e);
    let mut bytes = vec![0; (all_bytes - at) as usize];
    let same = file.metadata().map_err(io)?.len() == all_bytes && {
        file.read_exact_at(&mut bytes, at).map_err(io)?;
        bytes.starts_with(head)
    };
    if !same {
        return Err(
            other_run(part, "one of the same source and options").hint("without the file it begins anew")
        );
    }
    Ok(bytes[head.len()..].as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

pub(crate) fn output_exists(target: &Path) -> Error {
    Error::new(ErrorKind::OutputExists)
        .file(target)
        .expected("a path that does not exist yet")
        .found("an existing file")
        .hint("--force replaces it")
}

/// Calls `create` with names beside `target` until one is free.
pub(crate) fn create_temp<T>(
    target: &Path,
    create: impl Fn(&Path) -> std::io::Result<T>,
) -> Result<(T, PathBuf)> {
    let name = target.file_name().unwrap_or_default().as_bytes();
    for attempt in 0..TEMP_NAMES {
        let suffix = match attempt {
            0 => format!(".kestrel-partial-{}", std::process::id()),
            n => format!(".kestrel-partial-{}-{n}", std::process::id()),
        };
        let kept = &name[..name.len().min(NAME_BYTES_MAX - 1 - suffix.len())];
        let temp = target.with_file_name(OsString::from_vec([b".", kept, suffix.as_bytes()].concat()));
        match create(&temp) {
            Ok(made) => return Ok((made, temp)),
            Err(e) if e.kind() == IoKind::AlreadyExists => continue,
            Err(e) => return Err(Error::io(target, "creating a temporary beside the output", e)),
        }
    }
    Err(Error::new(ErrorKind::OutputExists)
        .file(target)
        .what("temporary file beside the output")
        .found(format!("{TEMP_NAMES} left-over .kestrel-partial files"))
        .hint("remove them"))
}

/// Renames without replacing. File systems that cannot do it in one step get a hard link, and those without hard
/// links a check and a rename.
pub(crate) fn rename_new(temp: &Path, target: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, renameat_with};
    match renameat_with(CWD, temp, CWD, target, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        done => return Ok(done?),
    }
    match std::fs::hard_link(temp, target) {
        Ok(()) => std::fs::remove_file(temp),
        Err(e) if e.kind() == IoKind::AlreadyExists => Err(e),
        Err(_) if std::fs::symlink_metadata(target).is_ok() => Err(IoKind::AlreadyExists.into()),
        Err(_) => std::fs::rename(temp, target),
    }
}

/// Makes the new name survive a power cut. Some network file systems cannot sync a folder, which is no error.
pub(crate) fn sync_folder(target: &Path) -> Result<()> {
    let folder = match target.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    match File::open(folder).and_then(|f| Ok(rustix::fs::fsync(f)?)) {
        Err(e) if e.raw_os_error() != Some(Errno::INVAL.raw_os_error()) => {
            Err(Error::io(folder, "forcing the output's folder to disk", e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of its own, removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("kestrel-atomic-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn names(&self) -> Vec<OsString> {
            std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name()).collect()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_name_appears_only_with_the_commit() {
        let dir = Folder::new("commit");
        let out = dir.0.join("a.gguf");
        let file = AtomicFile::create(&out, 8, false).unwrap();
        file.write_at(4, b"5678").unwrap();
        file.write_at(0, b"1234").unwrap();
        assert!(!out.exists());
        file.commit(|temp| {
            assert_eq!(std::fs::read(temp).unwrap(), b"12345678");
            Ok(())
        })
        .unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), b"12345678");
        assert_eq!(dir.names(), ["a.gguf"]);
    }

    #[test]
    fn a_failed_check_and_a_drop_leave_the_old_file_and_nothing_else() {
        let dir = Folder::new("fail");
        let out = dir.0.join("a.gguf");
        std::fs::write(&out, b"old").unwrap();
        let file = AtomicFile::create(&out, 3, true).unwrap();
        file.write_at(0, b"new").unwrap();
        let err = file.commit(|_| Err(Error::new(ErrorKind::Interrupted))).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Interrupted);
        drop(AtomicFile::create(&out, 3, true).unwrap());
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        assert_eq!(dir.names(), ["a.gguf"]);
    }

    #[test]
    fn an_existing_output_needs_force_even_if_it_appears_late() {
        let dir = Folder::new("exists");
        let out = dir.0.join("a.gguf");
        let late = AtomicFile::create(&out, 3, false).unwrap();
        late.write_at(0, b"new").unwrap();
        std::fs::write(&out, b"old").unwrap();
        assert_eq!(late.commit(|_| Ok(())).unwrap_err().kind(), ErrorKind::OutputExists);
        assert_eq!(AtomicFile::create(&out, 3, false).unwrap_err().kind(), ErrorKind::OutputExists);
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        let forced = AtomicFile::create(&out, 3, true).unwrap();
        forced.write_at(0, b"new").unwrap();
        forced.commit(|_| Ok(())).unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), b"new");
        assert_eq!(dir.names(), ["a.gguf"]);
    }

    const RUN: Run = Run { fingerprint: [7; 32], n_parts: 2 };

    #[test]
    fn an_output_that_takes_long_grows_over_several_runs() {
        let dir = Folder::new("resumed");
        let out = dir.0.join("a.gguf");
        let open = |run: &Run, resume| AtomicFile::resumable(&out, 8, run, (false, resume));
        // What recorded nothing leaves nothing.
        drop(open(&RUN, false).unwrap());
        assert!(dir.names().is_empty());

        let first = open(&RUN, false).unwrap();
        first.write_at(0, b"1234").unwrap();
        assert!(first.part().is_none());
        first.record(1, 99).unwrap();
        assert_eq!(first.part(), Some(dir.0.join("a.gguf.part").as_path()));
        let found = |opened: Result<AtomicFile>| {
            opened.err().map(|e| (e.kind(), e.details().found.clone().unwrap_or_default()))
        };
        assert_eq!(
            found(open(&RUN, true)).unwrap(),
            (ErrorKind::OutputExists, "one that another process goes on with".into())
        );
        drop(first);
        assert_eq!(dir.names(), ["a.gguf.part"]);
        assert_eq!(found(open(&RUN, false)).unwrap().0, ErrorKind::OutputExists);
        for other in [Run { fingerprint: [8; 32], ..RUN }, Run { n_parts: 3, ..RUN }] {
            assert_eq!(found(open(&other, true)).unwrap().0, ErrorKind::Inconsistent);
        }

        let second = open(&RUN, true).unwrap();
        assert_eq!((second.recorded(0), second.recorded(1), second.recorded(2)), (None, Some(99), None));
        assert_eq!(second.journal_bytes(), 8 + 32 + 16);
        second.write_at(4, b"5678").unwrap();
        second.commit(|_| Ok(())).unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), b"12345678");
        assert_eq!(dir.names(), ["a.gguf"]);
        assert_eq!(found(open(&RUN, true)).unwrap().0, ErrorKind::OutputExists);
    }

    /// An output that appears late does not cost the run what it did.
    #[test]
    fn a_part_that_cannot_get_its_name_stays_whole() {
        let dir = Folder::new("late");
        let out = dir.0.join("a.gguf");
        let file = AtomicFile::resumable(&out, 4, &RUN, (false, false)).unwrap();
        file.record(0, 1).unwrap();
        std::fs::write(&out, b"old").unwrap();
        assert_eq!(file.commit(|_| Ok(())).unwrap_err().kind(), ErrorKind::OutputExists);
        let again = AtomicFile::resumable(&out, 4, &RUN, (true, true)).unwrap();
        assert_eq!(again.recorded(0), Some(1));
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
    }

    /// Of two runs one may come to its end between the other's look at the output and its claim to the part.
    #[test]
    fn a_part_that_comes_too_late_is_no_part() {
        let dir = Folder::new("too-late");
        let out = dir.0.join("a.gguf");
        let late = |force| {
            AtomicFile::growing(&out, (4, 4), (force, false), &mut |_, _| {
                std::fs::write(&out, b"done").unwrap();
                Ok(true)
            })
        };
        assert_eq!(late(false).err().map(|e| e.kind()), Some(ErrorKind::OutputExists));
        assert_eq!(dir.names(), ["a.gguf"]);
        late(true).unwrap().commit(|_| Ok(())).unwrap();
        assert_eq!(dir.names(), ["a.gguf"]);
        assert_eq!(std::fs::read(&out).unwrap(), [0; 4]);
    }

    #[test]
    fn a_part_that_is_no_file_or_no_journal_is_refused() {
        let dir = Folder::new("no-part");
        let out = dir.0.join("a.gguf");
        let kind = || AtomicFile::resumable(&out, 4, &RUN, (false, true)).err().map(|e| e.kind());
        let part = dir.0.join("a.gguf.part");
        for bytes in [vec![], vec![0; 4], vec![0; 4 + 8 + 32 + 16]] {
            std::fs::write(&part, bytes).unwrap();
            assert_eq!(kind(), Some(ErrorKind::Inconsistent));
        }
        std::fs::rename(&part, dir.0.join("real")).unwrap();
        std::os::unix::fs::symlink("real", &part).unwrap();
        assert_eq!(kind(), Some(ErrorKind::NotRegularFile));
    }

    #[test]
    fn two_writers_and_left_over_files_do_not_share_a_temporary() {
        let dir = Folder::new("two");
        let out = dir.0.join("a.gguf");
        let first = AtomicFile::create(&out, 1, false).unwrap();
        let second = AtomicFile::create(&out, 1, false).unwrap();
        assert_ne!(first.temp, second.temp);
    }

    #[test]
    fn folders_pipes_and_impossible_sizes_are_refused() {
        let dir = Folder::new("refused");
        assert_eq!(AtomicFile::create(&dir.0, 1, true).unwrap_err().kind(), ErrorKind::NotRegularFile);
        assert_eq!(AtomicFile::create(Path::new("/"), 1, true).unwrap_err().kind(), ErrorKind::Usage);
        let absent = dir.0.join("no/such/folder/a.gguf");
        assert_eq!(AtomicFile::create(&absent, 1, false).unwrap_err().kind(), ErrorKind::Io);
        let err = AtomicFile::create(&dir.0.join("a.gguf"), 1 << 60, false).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Io);
        assert!(err.to_string().contains("1152921504606846976 bytes"), "{err}");
        assert!(dir.names().is_empty());
    }

    #[test]
    fn long_and_odd_names_work() {
        let dir = Folder::new("names");
        let out = dir.0.join(OsString::from_vec([b"\xff \n".as_slice(), &[b'x'; 252]].concat()));
        let file = AtomicFile::create(&out, 1, false).unwrap();
        file.write_at(0, b"x").unwrap();
        file.commit(|_| Ok(())).unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), b"x");
    }

    #[test]
    fn with_force_a_link_stays_a_link() {
        let dir = Folder::new("link");
        let (real, link) = (dir.0.join("real"), dir.0.join("link"));
        std::fs::write(&real, b"old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(same_file(&real, &link));
        let file = AtomicFile::create(&link, 3, true).unwrap();
        file.write_at(0, b"new").unwrap();
        file.commit(|_| Ok(())).unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read(&real).unwrap(), b"new");
    }
}
