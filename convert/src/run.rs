//! The conversion itself: one pass over the source, and a second look at what was written.

use crate::feedback::Feedbacks;
use crate::input::{InputFile, row_bytes};
use crate::metadata::{SOURCE_SHA256, source_sha256};
use crate::plan::{Options, Plan, declarations, importance};
use crate::progress::{Phase, Progress};
use crate::rows::{Quantizing, Rows, pieces};
use crate::stream::{Piece, Streaming, check_cancel, damage_hash, join, stream, take, thread_refused};
use kestrel_formats::atomic_file::{AtomicFile, Run, same_file};
use kestrel_formats::disk::DiskFile;
use kestrel_formats::gguf::{Gguf, layout};
use kestrel_formats::map::Map;
use kestrel_formats::{Error, ErrorKind, Result};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// What a finished conversion did.
#[derive(Clone, Debug)]
pub struct Report {
    /// Bytes of the output.
    pub file_bytes: u64,
    /// Bytes of the source's files.
    pub source_bytes: u64,
    /// Name and SHA-256 of each file of the source.
    pub source_sha256: Vec<(String, String)>,
    /// Bytes of the output that an interrupted run had written.
    pub kept_bytes: u64,
    /// Reading, quantizing and writing, and reading back most of it.
    pub convert_time: Duration,
    /// Forcing the rest of the output to disk and reading it back.
    pub check_time: Duration,
}

/// Bytes that are written before they are forced to disk and read back, while more is converted.
const CHECK_BYTES: u64 = 128 << 20;

/// Bytes that are read back at once.
const READ_BYTES: u64 = 1 << 20;

/// Outputs of pieces that wait to be written, at most, beside one for each worker.
const WAITING: usize = 8;

/// What was written where, so that it can be found again.
#[derive(Clone, Copy, Debug)]
struct Written {
    piece: Piece,
    hash: u64,
}

impl Written {
    fn end(&self) -> u64 {
        self.piece.offset + self.piece.n_bytes as u64
    }
}

/// Reads back what has settled, what lies side by side at once. Calls `done` with the bytes of each piece.
fn read_back(
    plan: &Plan,
    on_disk: &mut DiskFile,
    mut written: Vec<Written>,
    mut done: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    written.sort_unstable_by_key(|w| w.piece.offset);
    let mut left = &written[..];
    while let Some(first) = left.first() {
        let start = first.piece.offset;
        let more = left
            .windows(2)
            .take_while(|w| w[0].end() == w[1].piece.offset && w[1].end() - start <= READ_BYTES);
        let (together, after) = left.split_at(1 + more.count());
        let n_bytes = together.iter().map(|w| w.piece.n_bytes).sum();
        let mut bytes = on_disk.read(start, n_bytes)?;
        for Written { piece, hash } in together {
            let (piece_bytes, after) = bytes.split_at(piece.n_bytes);
            if damage_hash(piece_bytes) != *hash {
                let what = format!("tensor \"{}\" of the output", plan.tensors[piece.tensor].name);
                return Err(damaged(what).at(piece.offset));
            }
            done(piece.n_bytes as u64)?;
            bytes = after;
        }
        left = after;
    }
    Ok(())
}

/// Converts as planned. `out` appears complete, on disk and read back, or not at all; see
/// [`kestrel_formats::atomic_file`].
///
/// With a calibration, which may take hours, an interrupted run leaves `OUT.part`, and one with `resume` goes on from it:
/// the source is read again, but what is written and undamaged is not quantized again.
///
/// Errors: `OutputExists`, `Usage` if the output is one of the source's files, `NotFinite` and `OutOfRange` with the
/// place of the number, `Changed` if a source file was modified meanwhile, `Io`, `Interrupted` once `cancel` is set.
pub fn run(
    plan: &Plan,
    options: &Options,
    out: &Path,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Report> {
    let started = Instant::now();
    if plan.input.files.iter().any(|f| same_file(&f.path, out)) {
        return Err(Error::new(ErrorKind::Usage)
            .file(out)
            .what("output")
            .expected("another file than the source")
            .found("a file of the source"));
    }
    let pieces = pieces(&plan.input.tensors);
    let file = match &options.calibration {
        None => AtomicFile::create(out, plan.file_bytes, options.force)?,
        Some(_) => {
            let run = Run { fingerprint: fingerprint(plan, options)?, n_parts: pieces.len() };
            AtomicFile::resumable(out, plan.file_bytes, &run, (options.force, options.resume))?
        }
    };
    let interrupted = |e: Error, part: Option<&Path>| match part {
        Some(part) if e.kind() == ErrorKind::Interrupted => {
            e.file(part).hint("the same command with --resume goes on")
        }
        _ => e,
    };
    let (sha256, unchecked, kept_bytes) = convert_all(plan, options, &file, &pieces, progress, cancel)
        .map_err(|e| interrupted(e, file.part()))
        .inspect_err(|e| {
            // The same command would end there again.
            if e.kind().exit_status() == ErrorKind::Usage.exit_status() {
                file.abandon();
            }
        })?;
    plan.input.files.iter().try_for_each(InputFile::check_unchanged)?;
    let header = write_rest(plan, &file, &sha256)?;
    let converted = Instant::now();

    progress.phase(Phase::Check, unchecked.iter().map(|w| w.piece.n_bytes as u64).sum(), 0);
    let all_bytes = plan.file_bytes + file.journal_bytes();
    let part = file.part().map(Path::to_owned);
    let check = |temp: &Path| check_written(plan, (temp, all_bytes), &header, unchecked, progress, cancel);
    file.commit(check).map_err(|e| interrupted(e, part.as_deref()))?;
    let names = plan.input.files.iter().map(InputFile::name);
    Ok(Report {
        file_bytes: plan.file_bytes,
        source_bytes: plan.source_bytes,
        source_sha256: names.zip(sha256).collect(),
        kept_bytes,
        convert_time: converted - started,
        check_time: converted.elapsed(),
    })
}

/// Stands for everything that determines the output's bytes, but those of the files that are read, of which it knows size
/// and time.
fn fingerprint(plan: &Plan, options: &Options) -> Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    // Names, types, places, the recipe, and the version.
    hasher.update(&layout(&plan.metadata, &declarations(&plan.tensors))?.header);
    hasher.update((options.sweeps as u64).to_le_bytes());
    let beside = [options.calibration.as_ref().map(|c| c.path()), options.imatrix.as_ref().map(|i| i.path())];
    let beside = beside.into_iter().flatten().map(InputFile::new).collect::<Result<Vec<_>>>()?;
    for file in plan.input.files.iter().chain(&beside) {
        file.lasting().iter().for_each(|n| hasher.update(n.to_le_bytes()));
    }
    Ok(hasher.finalize().into())
}

/// Quantizes and writes all pieces. Returns the digests of the source's files, what was written and not read back yet, and
/// how many bytes an interrupted run had written.
fn convert_all(
    plan: &Plan,
    options: &Options,
    file: &AtomicFile,
    pieces: &[Piece],
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<(Vec<String>, Vec<Written>, u64)> {
    progress.phase(Phase::Convert, plan.source_bytes, plan.file_bytes);
    let job = Streaming { files: &plan.input.files, pieces, threads: options.threads, sha256: true, cancel };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (made, to_write) = channel();
        let (freed, free) = channel();
        let (written, to_check) = channel();
        for _ in 0..job.n_workers() + WAITING {
            let _ = freed.send(Vec::new());
        }
        let stop = &stop;
        let writer = std::thread::Builder::new()
            .name("kestrel-writer".into())
            .spawn_scoped(scope, move || write_behind(file, &to_write, &freed, &written))
            .map_err(thread_refused)?;
        let checker = std::thread::Builder::new()
            .name("kestrel-checker".into())
            .spawn_scoped(scope, move || check_behind(plan, file, &to_check, CHECK_BYTES, stop))
            .map_err(thread_refused)?;
        let feedbacks = Feedbacks::new(plan, options);
        let (free, kept_bytes) = (Mutex::new(free), AtomicU64::new(0));
        let converting = Converting { plan, options, pieces, feedbacks, file, progress, kept_bytes };
        // Only after an error does nobody listen; it is reported below.
        let nobody = || Error::new(ErrorKind::Interrupted);
        let streamed = stream(job, Vec::new, |floats, piece, bytes| {
            let mut out = take(&free).ok_or_else(nobody)?;
            let (written, part) = convert_piece(&converting, floats, piece, bytes, &mut out)?;
            made.send(Output { written, part, bytes: out }).map_err(|_| nobody())
        });
        drop(made);
        stop.store(true, Ordering::Relaxed);
        let (written, unchecked) = (join(writer), join(checker));
        let unchecked = written.and(unchecked)?;
        Ok((streamed?.sha256, unchecked, converting.kept_bytes.into_inner()))
    })
}

/// What a worker made of a piece.
struct Output {
    written: Written,
    /// Its part in the journal, unless an interrupted run wrote it.
    part: Option<usize>,
    bytes: Vec<u8>,
}

/// Writes what the workers make, gives its buffers back and passes it on to the checker. While that reads the file past the
/// cache, ext4 lets nobody write to it, which workers should not wait for.
fn write_behind(
    file: &AtomicFile,
    made: &Receiver<Output>,
    freed: &Sender<Vec<u8>>,
    to_check: &Sender<Written>,
) -> Result<()> {
    for Output { written, part, bytes } in made {
        if let Some(part) = part {
            file.write_at(written.piece.offset, &bytes)?;
            file.record(part, written.hash)?;
        }
        let _ = freed.send(bytes);
        if to_check.send(written).is_err() {
            break; // the checker has found an error
        }
    }
    Ok(())
}

/// What all workers share.
struct Converting<'a> {
    plan: &'a Plan,
    options: &'a Options,
    pieces: &'a [Piece],
    feedbacks: Feedbacks<'a>,
    file: &'a AtomicFile,
    progress: &'a dyn Progress,
    kept_bytes: AtomicU64,
}

impl Converting<'_> {
    /// Quantizes a piece. Returns its hash.
    fn quantize(&self, floats: &mut Vec<f32>, piece: &Piece, bytes: &[u8], out: &mut Vec<u8>) -> Result<u64> {
        let Self { plan, options, .. } = *self;
        let (target, tensor) = (&plan.tensors[piece.tensor], &plan.input.tensors[piece.tensor]);
        let importance =
            if target.weighted { importance(options, &target.name, tensor.cols())? } else { None };
        let rows = Rows { input: &plan.input, tensor, piece, bytes };
        let feedback = self.feedbacks.of(piece.tensor)?;
        let quantizing =
            Quantizing { dtype: target.dtype, isa: options.isa, importance, feedback: feedback.as_deref() };
        rows.quantize(floats, quantizing, out)?;
        Ok(damage_hash(out))
    }

    /// The hash of what an interrupted run wrote, if it is there and undamaged.
    fn kept(&self, part: usize, offset: u64, n_bytes: usize, out: &mut Vec<u8>) -> Result<Option<u64>> {
        let Some(recorded) = self.file.recorded(part) else { return Ok(None) };
        out.resize(n_bytes, 0);
        self.file.read_at(offset, out)?;
        let kept = damage_hash(out) == recorded;
        if kept {
            self.kept_bytes.fetch_add(n_bytes as u64, Ordering::Relaxed);
        }
        Ok(kept.then_some(recorded))
    }
}

/// Makes the output of a piece; also returns its part in the journal if it has to be written.
fn convert_piece(
    job: &Converting<'_>,
    floats: &mut Vec<f32>,
    piece: &Piece,
    bytes: &[u8],
    out: &mut Vec<u8>,
) -> Result<(Written, Option<usize>)> {
    let (target, tensor) = (&job.plan.tensors[piece.tensor], &job.plan.input.tensors[piece.tensor]);
    if piece.first_row == 0 {
        job.progress.tensor(&target.name);
    }
    let row_bytes = row_bytes(target.dtype, tensor.cols());
    let (offset, n_bytes) = (target.offset + piece.first_row * row_bytes, (piece.rows * row_bytes) as usize);
    let place = |p: &Piece| (p.file, p.offset);
    let part = job.pieces.partition_point(|p| place(p) < place(piece));
    let (hash, part) = match job.kept(part, offset, n_bytes, out)? {
        Some(hash) => (hash, None),
        None => (job.quantize(floats, piece, bytes, out)?, Some(part)),
    };
    job.feedbacks.done(piece);
    job.progress.bytes(piece.n_bytes as u64, n_bytes as u64);
    Ok((Written { piece: Piece { file: 0, offset, n_bytes, ..*piece }, hash }, part))
}

/// Writes the padding behind each tensor and, now that the source's digests are known, the header.
fn write_rest(plan: &Plan, file: &AtomicFile, digests: &[String]) -> Result<Vec<u8>> {
    let mut metadata = plan.metadata.clone();
    if let Some((_, value)) = metadata.iter_mut().find(|(key, _)| key == SOURCE_SHA256) {
        *value = source_sha256(&plan.input, digests);
    }
    let layout = layout(&metadata, &declarations(&plan.tensors))?;
    let ends = plan.tensors.iter().map(|t| t.offset + t.n_bytes);
    let nexts = plan.tensors.iter().skip(1).map(|t| t.offset).chain([plan.file_bytes]);
    for (end, next) in ends.zip(nexts) {
        file.write_at(end, &vec![0; (next - end) as usize])?;
    }
    file.write_at(0, &layout.header)?;
    Ok(layout.header)
}

/// Follows the conversion: each time that `batch_bytes` or more have been written, forces them to disk, reads them back and
/// compares. Returns what is left once `stop` is set and nothing more comes.
fn check_behind(
    plan: &Plan,
    file: &AtomicFile,
    written: &Receiver<Written>,
    batch_bytes: u64,
    stop: &AtomicBool,
) -> Result<Vec<Written>> {
    let (mut batch, mut n_bytes) = (Vec::new(), 0);
    let mut on_disk = file.on_disk()?;
    while let Ok(next) = written.recv() {
        n_bytes += next.piece.n_bytes as u64;
        batch.push(next);
        if n_bytes < batch_bytes || stop.load(Ordering::Relaxed) {
            continue;
        }
        // What was written meanwhile is forced to disk as well.
        batch.extend(written.try_iter());
        file.settle()?;
        read_back(plan, &mut on_disk, std::mem::take(&mut batch), |_| Ok(()))
            .map_err(|e| e.file(file.target()))?;
        n_bytes = 0;
    }
    Ok(batch)
}

/// The output is not what was written.
fn damaged(what: String) -> Error {
    Error::new(ErrorKind::Io)
        .what(what)
        .expected("the bytes that were written")
        .found("others, when read back")
        .hint("the disk or the memory is faulty")
}

/// Reads the rest of the output back and compares it with what was meant to be written: the header byte by byte, the
/// tensors piece by piece.
fn check_written(
    plan: &Plan,
    (temp, all_bytes): (&Path, u64),
    header: &[u8],
    written: Vec<Written>,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<()> {
    check_cancel(cancel)?;
    let map = Map::open(temp)?;
    let mut on_disk = DiskFile::open(temp)?;
    if map.len() as u64 != all_bytes || on_disk.read(0, header.len())? != header {
        return Err(damaged("header of the output".to_owned()));
    }
    let read = Gguf::parse(map)?;
    let same = |(t, p): (&kestrel_formats::gguf::TensorInfo, &crate::PlannedTensor)| {
        (&t.name, t.dtype, &t.shape, t.offset, t.n_bytes) == (&p.name, p.dtype, &p.shape, p.offset, p.n_bytes)
    };
    if read.tensors().len() != plan.tensors.len() || !read.tensors().iter().zip(&plan.tensors).all(same) {
        return Err(damaged("tensor table of the output".to_owned()));
    }
    read_back(plan, &mut on_disk, written, |n_bytes| {
        progress.bytes(n_bytes, 0);
        check_cancel(cancel)
    })
}
