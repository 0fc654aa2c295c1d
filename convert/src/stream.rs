//! Reads files front to back and hands pieces of them to worker threads, in bounded memory.
//!
//! Few readers (one per file, at most one per four workers and one more) walk their files in order, which suits disks and
//! lets the SHA-256 of a whole file come out of the same pass; one alone hashes less than two workers may round. Buffers go
//! round: reader, worker, reader.

use crate::input::InputFile;
use kestrel_formats::map::open_regular;
use kestrel_formats::{Error, ErrorKind, Result};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use twox_hash::XxHash3_64;

/// Bytes hashed at a time where no piece lies.
const GAP_BYTES: u64 = 1 << 20;
/// Above this many workers the buffers would no longer fit the memory that a conversion may take.
const THREADS_MAX: usize = 128;

/// A range of a file that one worker handles at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Index of the tensor.
    pub tensor: usize,
    /// First row of the tensor.
    pub first_row: u64,
    /// Rows.
    pub rows: u64,
    /// Index of the file.
    pub file: usize,
    /// Byte offset in the file.
    pub offset: u64,
    /// Bytes.
    pub n_bytes: usize,
}

/// What a [`stream`] needs to know besides the work.
#[derive(Clone, Copy)]
pub(crate) struct Streaming<'a> {
    pub files: &'a [InputFile],
    /// Sorted by file and offset, without overlap.
    pub pieces: &'a [Piece],
    pub threads: usize,
    /// Whether every byte of every file is read, for its SHA-256, or only the pieces.
    pub sha256: bool,
    pub cancel: &'a AtomicBool,
}

impl Streaming<'_> {
    /// How many workers there are.
    pub fn n_workers(&self) -> usize {
        self.threads.clamp(1, THREADS_MAX)
    }
}

/// What comes out of a [`stream`].
pub(crate) struct Streamed<T> {
    /// One result per piece, in the order of the pieces.
    pub results: Vec<T>,
    /// One lower-case hexadecimal SHA-256 per file, if asked for.
    pub sha256: Vec<String>,
}

/// Calls `work` with every piece and its bytes, on `threads` threads. `scratch` makes what a worker keeps between
/// pieces. The first error (by piece) stops everything, and so does `cancel`.
pub(crate) fn stream<S, T: Send>(
    job: Streaming<'_>,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &Piece, &[u8]) -> Result<T> + Sync,
) -> Result<Streamed<T>> {
    let threads = job.n_workers();
    let n_readers = job.files.len().min(1 + threads.div_ceil(4)).max(1);
    let (full_in, full_out) = channel::<(usize, Vec<u8>)>();
    let (free_in, free_out) = channel::<Vec<u8>>();
    for _ in 0..threads + 2 * n_readers {
        let _ = free_in.send(Vec::new());
    }
    let (full_out, free_out) = (Mutex::new(full_out), Mutex::new(free_out));
    let failure = Failure::default();
    let next_file = AtomicUsize::new(0);

    let (mut done, mut sha256) = std::thread::scope(|scope| {
        let mut workers = Vec::new();
        let mut readers = Vec::new();
        for _ in 0..threads {
            let (free_in, full_out, failure, scratch, work) =
                (free_in.clone(), &full_out, &failure, &scratch, &work);
            let run = move || {
                let mut scratch = scratch();
                let mut done = Vec::new();
                while let Some((i, bytes)) = take(full_out) {
                    if !failure.stopped(job.cancel) {
                        match work(&mut scratch, &job.pieces[i], &bytes) {
                            Ok(result) => done.push((i, result)),
                            Err(e) => failure.set(i, e),
                        }
                    }
                    let _ = free_in.send(bytes);
                }
                done
            };
            match Builder::new().name("kestrel-worker".into()).spawn_scoped(scope, run) {
                Ok(handle) => workers.push(handle),
                Err(e) => failure.set(0, thread_refused(e)),
            }
        }
        drop(free_in); // a reader that waits for a buffer notices when no worker is left
        for _ in 0..n_readers {
            let (full_in, free_out, failure, next_file) = (full_in.clone(), &free_out, &failure, &next_file);
            let run = move || {
                let mut hashes = Vec::new();
                loop {
                    let file = next_file.fetch_add(1, Ordering::Relaxed);
                    if file >= job.files.len() {
                        return hashes;
                    }
                    let reader = Reader { job, file, full: &full_in, free: free_out, failure };
                    match reader.run() {
                        Ok(hash) => hashes.push((file, hash)),
                        Err((piece, e)) => failure.set(piece, e),
                    }
                }
            };
            match Builder::new().name("kestrel-reader".into()).spawn_scoped(scope, run) {
                Ok(handle) => readers.push(handle),
                Err(e) => failure.set(0, thread_refused(e)),
            }
        }
        drop(full_in); // workers end when the last reader has
        let hashes: Vec<_> = readers.into_iter().flat_map(join).collect();
        (workers.into_iter().flat_map(join).collect::<Vec<_>>(), hashes)
    });
    failure.into_result(job.cancel)?;
    done.sort_unstable_by_key(|(i, _)| *i);
    sha256.sort_unstable();
    Ok(Streamed {
        results: done.into_iter().map(|(_, result)| result).collect(),
        sha256: sha256.into_iter().filter_map(|(_, hash)| hash).collect(),
    })
}

/// Reads exactly `buf.len()` bytes at `offset`; a file that ends earlier has changed since it was opened first.
pub(crate) fn read_at(file: &File, input: &InputFile, offset: u64, buf: &mut [u8]) -> Result<()> {
    file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::new(ErrorKind::Changed)
            .file(&input.path)
            .at(offset)
            .expected(format!("{} bytes, as when it was opened", input.n_bytes()))
            .found("a shorter file"),
        _ => Error::io(&input.path, "reading", e).at(offset),
    })
}

struct Reader<'a> {
    job: Streaming<'a>,
    file: usize,
    full: &'a Sender<(usize, Vec<u8>)>,
    free: &'a Mutex<Receiver<Vec<u8>>>,
    failure: &'a Failure,
}

impl Reader<'_> {
    /// Reads one file to its end, or to the failure of somebody. An error carries the piece it belongs to.
    fn run(&self) -> std::result::Result<Option<String>, (usize, Error)> {
        let input = &self.job.files[self.file];
        let pieces = self.pieces();
        let file = open_regular(&input.path).map_err(|e| (pieces.start, e))?;
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
        let mut hasher = self.job.sha256.then(Sha256::new);
        let mut at = 0;
        for i in pieces.clone() {
            let piece = self.job.pieces[i];
            self.gap(&file, at..piece.offset, hasher.as_mut()).map_err(|e| (i, e))?;
            let Some(mut bytes) = self.buffer() else { return Ok(None) };
            bytes.resize(piece.n_bytes, 0);
            read_at(&file, input, piece.offset, &mut bytes).map_err(|e| (i, e))?;
            if let Some(hasher) = &mut hasher {
                hasher.update(&bytes);
            }
            if self.full.send((i, bytes)).is_err() {
                return Ok(None);
            }
            at = piece.offset + piece.n_bytes as u64;
        }
        self.gap(&file, at..input.n_bytes(), hasher.as_mut()).map_err(|e| (pieces.end, e))?;
        Ok(hasher.map(|h| h.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The pieces of this file.
    fn pieces(&self) -> Range<usize> {
        let start = self.job.pieces.partition_point(|p| p.file < self.file);
        start..self.job.pieces.partition_point(|p| p.file <= self.file)
    }

    /// Hashes what lies between pieces.
    fn gap(&self, file: &File, mut range: Range<u64>, hasher: Option<&mut Sha256>) -> Result<()> {
        let Some(hasher) = hasher else { return Ok(()) };
        let mut bytes = Vec::new();
        while range.start < range.end && !self.failure.stopped(self.job.cancel) {
            bytes.resize((range.end - range.start).min(GAP_BYTES) as usize, 0);
            read_at(file, &self.job.files[self.file], range.start, &mut bytes)?;
            hasher.update(&bytes);
            range.start += bytes.len() as u64;
        }
        Ok(())
    }

    /// A buffer that a worker has finished with; `None` when the run has stopped.
    fn buffer(&self) -> Option<Vec<u8>> {
        if self.failure.stopped(self.job.cancel) { None } else { take(self.free) }
    }
}

/// The error of the earliest piece that failed.
#[derive(Default)]
struct Failure {
    stop: AtomicBool,
    first: Mutex<Option<(usize, Error)>>,
}

impl Failure {
    fn set(&self, piece: usize, error: Error) {
        let mut first = lock(&self.first);
        if first.as_ref().is_none_or(|(i, _)| piece < *i) {
            *first = Some((piece, error));
        }
        self.stop.store(true, Ordering::Relaxed);
    }

    fn stopped(&self, cancel: &AtomicBool) -> bool {
        self.stop.load(Ordering::Relaxed) || cancel.load(Ordering::Relaxed)
    }

    fn into_result(self, cancel: &AtomicBool) -> Result<()> {
        match self.first.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some((_, error)) => Err(error),
            None => check_cancel(cancel),
        }
    }
}

/// `Interrupted` once the user has asked to stop.
pub(crate) fn check_cancel(cancel: &AtomicBool) -> Result<()> {
    if cancel.load(Ordering::Relaxed) { Err(Error::new(ErrorKind::Interrupted)) } else { Ok(()) }
}

/// Recognises accidental damage to what was written.
pub(crate) fn damage_hash(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// The next message, or `None` when no sender is left.
pub(crate) fn take<T>(from: &Mutex<Receiver<T>>) -> Option<T> {
    lock(from).recv().ok()
}

/// What a mutex guards, also after a panic elsewhere, which is raised again by whoever joins that thread.
pub(crate) fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread's result; its panic goes on in the caller.
pub(crate) fn join<T>(handle: std::thread::ScopedJoinHandle<'_, T>) -> T {
    handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

pub(crate) fn thread_refused(e: std::io::Error) -> Error {
    Error::new(ErrorKind::Limit).what("starting a thread").found(e).hint("use fewer --threads")
}
