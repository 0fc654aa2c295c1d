//! The memory map, and what happens when a mapped file changes. All `unsafe` of this crate is here.
//!
//! Touching a page of a map behind the end of its file, because the file was truncated meanwhile or cannot be read any
//! more, raises SIGBUS. [`exit_on_fault`] makes that an error message and an exit status: the message is made when the
//! file is mapped, so that the signal handler has only to find the map that the address belongs to, write the message
//! and end the process.

use crate::{Error, ErrorKind, Result};
use std::fs::{File, Metadata};
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// A read-only map of a whole regular file, shared by whoever holds a clone.
#[derive(Clone, Debug)]
pub struct Map(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    File { map: memmap2::Mmap, file: File, stamp: Stamp, slot: Option<usize> },
    Memory(Vec<u8>),
}

impl Map {
    /// Maps `path`. Folders, pipes, devices and sockets are refused; an empty file is an empty map.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        let stamp = stamp_of(&file, path)?;
        // SAFETY: the map is private and read-only. Its bytes are only ever read as bytes (any value is valid), so
        // another process that writes to the file can change results but not memory safety. Truncation by another
        // process raises SIGBUS, which stops the process, with a message if `exit_on_fault` was called.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, "mapping the file", e))?;
        // Decoding walks the whole file for every token: with pages of 4 KiB, the page tables cost two Zen 4 cores a
        // third of the bandwidth (two cores of a Xeon nothing that five turns showed: 82 to 85 % of reading either
        // way). Advice only: where the system has no large pages for files, nothing changes.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        if stamp_of(&file, path)? != stamp {
            return Err(changed(path).found("one that was written to while it was opened"));
        }
        let slot = Slot::register(&map, path);
        Ok(Self(Arc::new(Inner { path: path.to_owned(), bytes: Bytes::File { map, file, stamp, slot } })))
    }

    /// Brings the file into memory front to back, if memory has room for it and not all of it is there, as far as
    /// a sample of its pages tells. For a file of which everything will be used, before several threads use it: those
    /// that touch a file for the first time move its one window of reading ahead together, and where they cross the
    /// system takes small pages.
    ///
    /// Nothing is promised: what cannot be read shows when it is touched.
    pub fn preload(&self) {
        #[cfg(target_os = "linux")]
        if let Bytes::File { map, .. } = &self.0.bytes {
            let has_room =
                || crate::proc::available_bytes().is_none_or(|available| map.len() as u64 <= available);
            if !sampled_are_cached(map) && has_room() {
                let _ = map.advise(memmap2::Advice::PopulateRead);
            }
        }
    }

    /// Bytes in memory in place of a file that `path` names in errors.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Self {
        Self(Arc::new(Inner { path: path.to_owned(), bytes: Bytes::Memory(bytes) }))
    }

    /// The mapped file's path.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// `Changed` if the mapped file was written to since it was mapped, as far as its size and time of modification
    /// tell. One system call.
    pub fn check_unmodified(&self) -> Result<()> {
        let Bytes::File { file, stamp, .. } = &self.0.bytes else { return Ok(()) };
        match stamp_of(file, self.path())? == *stamp {
            true => Ok(()),
            false => Err(changed(self.path()).found("one that was written to meanwhile")),
        }
    }

    /// As [`Self::check_unmodified`], and `Changed` if the path now leads to another file. In that case everything that
    /// was read is right, but not what the path now stands for. A file that was only removed is no change.
    pub fn check_unchanged(&self) -> Result<()> {
        self.check_unmodified()?;
        let Bytes::File { stamp, .. } = &self.0.bytes else { return Ok(()) };
        let error = |found: &str| Err(changed(self.path()).found(found));
        match std::fs::metadata(self.path()) {
            Ok(now) if !Stamp::of(&now).is_same_file(stamp) => {
                error("another file in its place; what was read is the old one's")
            }
            _ => Ok(()),
        }
    }

    /// Whether both are the same map, not only of the same file.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

fn changed(path: &Path) -> Error {
    Error::new(ErrorKind::Changed)
        .file(path)
        .what("mapped file")
        .expected("the file that was opened, unchanged")
}

/// How many pages of a map are looked at to tell whether it is in the page cache.
#[cfg(target_os = "linux")]
const SAMPLES: usize = 64;

/// Whether [`SAMPLES`] pages, evenly spread over the map, are in the page cache; true if the system does not tell.
#[cfg(target_os = "linux")]
fn sampled_are_cached(map: &memmap2::Mmap) -> bool {
    /// A multiple of every system's page size.
    const PAGE_BYTES: usize = 64 << 10;
    (0..SAMPLES).all(|i| {
        let at = map.len() / PAGE_BYTES * i / SAMPLES * PAGE_BYTES;
        let mut state = 1;
        // SAFETY: the page begins within the map, or at the beginning of an empty one, for which the call fails; one
        // byte is written for one page.
        let told = unsafe { libc::mincore(map.as_ptr().add(at).cast_mut().cast(), 1, &raw mut state) };
        told != 0 || state & 1 != 0
    })
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0.bytes {
            Bytes::File { map, .. } => map,
            Bytes::Memory(bytes) => bytes,
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Before the map itself goes: its addresses may soon be somebody else's.
        if let Bytes::File { slot: Some(slot), .. } = self.bytes {
            Slot::release(slot);
        }
    }
}

/// What tells whether a file is still the same: equal unless it was replaced or written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    /// Bytes of the file.
    pub n_bytes: u64,
    /// Time of modification: seconds and nanoseconds.
    pub modified: (i64, i64),
}

impl Stamp {
    /// That of a file with this metadata.
    pub fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            n_bytes: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        }
    }

    fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

fn stamp_of(file: &File, path: &Path) -> Result<Stamp> {
    file.metadata().map(|meta| Stamp::of(&meta)).map_err(|e| Error::io(path, "reading the file's size", e))
}

/// A map as the signal handler sees it. It is in use from the store of `end` to that of zero there.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    /// Written to stderr; never freed.
    message: AtomicPtr<String>,
}

/// Maps beyond these are not recognised by the handler; the largest split file has as many parts.
const SLOTS: usize = 1024;
/// `end` of a slot that is being filled.
const RESERVED: usize = 1;

static SLOT: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        message: AtomicPtr::new(std::ptr::null_mut()),
    }
}; SLOTS];

/// How the error of [`exit_on_fault`] is written.
static RENDER: OnceLock<fn(&Error) -> String> = OnceLock::new();

impl Slot {
    /// Makes the handler know `map`; `None` if there is no handler or no room.
    fn register(map: &[u8], path: &Path) -> Option<usize> {
        let render = RENDER.get()?;
        if map.is_empty() {
            return None;
        }
        let error = changed(path).found("one that was truncated meanwhile, or that can no longer be read");
        let range = map.as_ptr_range();
        let free =
            |s: &Slot| s.end.compare_exchange(0, RESERVED, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let slot = SLOT.iter().position(free)?;
        let Slot { start, end, message } = &SLOT[slot];
        // A process maps few files, and a handler may be reading the message of any.
        message.store(Box::leak(Box::new(render(&error) + "\n")), Ordering::Relaxed);
        start.store(range.start as usize, Ordering::Relaxed);
        end.store(range.end as usize, Ordering::Release);
        Some(slot)
    }

    fn release(slot: usize) {
        SLOT[slot].end.store(0, Ordering::Release);
    }

    /// The message of the map that holds an address.
    fn message_for(address: usize) -> Option<&'static str> {
        let slot = SLOT.iter().find(|s| {
            // A map ends in the middle of its last page.
            let end = s.end.load(Ordering::Acquire);
            end > RESERVED && (s.start.load(Ordering::Relaxed)..=end | 0xffff).contains(&address)
        })?;
        // SAFETY: a filled slot's message is a leaked string.
        unsafe { slot.message.load(Ordering::Relaxed).as_ref() }.map(String::as_str)
    }
}

/// The handler that [`on_bus_error`] hands over to.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// From now on a fault in a map opened afterwards prints `render(error)` to stderr and ends the process with the exit
/// status of [`ErrorKind::Changed`]. Other bus errors go where they went before. For binaries; call it once.
///
/// Errors: `Limit` if the system refuses the handler.
pub fn exit_on_fault(render: fn(&Error) -> String) -> Result<()> {
    if RENDER.set(render).is_err() {
        return Ok(());
    }
    // SAFETY: zeroed is a valid `sigaction`; the calls get pointers to it and to nothing else. The handler only loads
    // atomics and calls functions that are async-signal-safe.
    let previous = unsafe {
        let mut previous: libc::sigaction = std::mem::zeroed();
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        // On the alternate stack that Rust gives every thread: the fault may happen on a nearly full one.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        match libc::sigaction(libc::SIGBUS, &action, &mut previous) {
            0 => Ok(previous),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    let previous = previous
        .map_err(|e| Error::new(ErrorKind::Limit).what("handling faults in mapped files").found(e))?;
    let _ = PREVIOUS.set(previous);
    Ok(())
}

/// SIGBUS. Everything in it is async-signal-safe.
extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands over a valid `siginfo_t`, which for a fault has an address.
    let (sent, address) = unsafe { ((*info).si_code <= 0, (*info).si_addr() as usize) };
    if sent {
        // By a process, not by a fault: there is no instruction that would run into the next handler.
        // SAFETY: both calls are async-signal-safe; the signal is delivered when this handler returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    if let Some(message) = Slot::message_for(address) {
        // Several threads fault at once; the first prints, and the others wait for its end of the process.
        static PRINTED: AtomicBool = AtomicBool::new(false);
        while PRINTED.swap(true, Ordering::Relaxed) {
            // SAFETY: async-signal-safe; returns after a signal.
            unsafe { libc::pause() };
        }
        // SAFETY: a pointer and a length of one string; then the process ends without running anything else of it.
        unsafe {
            libc::write(libc::STDERR_FILENO, message.as_ptr().cast(), message.len());
            libc::_exit(ErrorKind::Changed.exit_status().into());
        }
    }
    // Not ours: the instruction that faulted runs again and meets the handler that was there before.
    if let Some(previous) = PREVIOUS.get() {
        // SAFETY: the action that an earlier call returned.
        unsafe { libc::sigaction(signal, previous, std::ptr::null_mut()) };
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use rustix::fs::{Advice, fadvise};

    #[test]
    fn preload_brings_a_file_into_memory() {
        // Where the build's files are, since what lies in memory alone is always there.
        let path = std::env::current_exe()
            .expect("a path")
            .with_extension(format!("{}.preload", std::process::id()));
        std::fs::write(&path, vec![7; 8 << 20]).expect("writes");
        let map = Map::open(&path).expect("maps");
        let Bytes::File { map: bytes, file, .. } = &map.0.bytes else { panic!("a file") };
        file.sync_all().expect("syncs");
        fadvise(file, 0, None, Advice::DontNeed).expect("drops");
        map.preload();
        assert!(sampled_are_cached(bytes));
        assert!(map.iter().all(|&byte| byte == 7));
        // A file that has meanwhile lost its bytes is left to whoever touches them.
        File::options().write(true).open(&path).and_then(|file| file.set_len(0)).expect("truncates");
        assert!(!sampled_are_cached(bytes));
        map.preload();
        std::fs::remove_file(&path).expect("removes");
    }
}
