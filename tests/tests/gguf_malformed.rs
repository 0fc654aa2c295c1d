//! Broken GGUF files, each with the outcome that it must have. The reader may not panic, and may not allocate more
//! than 1 MiB plus twice the file's size, whatever the file says.

mod container;
mod files;
mod llama_cpp;
mod model;

use kestrel_formats::gguf::{Gguf, model_of};
use kestrel_formats::{Error, ErrorKind, ErrorKind as Kind};
use kestrel_tests::alloc_count::peak_during;
use kestrel_tests::gguf_builder::{GgufBuilder, Raw, RawTensor};
use kestrel_tests::temp_dir::TempDir;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// What has to come out.
enum Expect {
    Reject(ErrorKind),
    /// With the byte offset in the error.
    RejectAt(ErrorKind, u64),
    /// Without warnings.
    Accept,
    /// With exactly one warning, which contains this.
    Warn(&'static str),
}

/// How far a file is read.
#[derive(Clone, Copy)]
enum Stage {
    /// Only the container.
    Container,
    /// Also the model in it.
    Model,
}

struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    stage: Stage,
    expect: Expect,
}

fn case(name: &'static str, bytes: impl Into<Vec<u8>>, expect: Expect) -> Case {
    Case { name, bytes: bytes.into(), stage: Stage::Container, expect }
}

fn model_case(name: &'static str, file: GgufBuilder, expect: Expect) -> Case {
    Case { name, bytes: file.bytes(), stage: Stage::Model, expect }
}

use Expect::{Accept, Reject, RejectAt, Warn};

/// Opens a file and returns its warnings.
fn read(path: &Path, stage: Stage) -> Result<Vec<String>, Error> {
    let file = Gguf::open(path)?;
    // What the reader vouches for has to hold: every tensor's bytes can be touched.
    for t in file.tensors() {
        let view = file.tensor(&t.name).expect("a listed tensor is found");
        assert_eq!(view.bytes.len() as u64, t.n_bytes, "{}", t.name);
    }
    let mut warnings = file.warnings().to_vec();
    if let Stage::Model = stage {
        warnings.extend(model_of(&file)?.warnings);
    }
    Ok(warnings)
}

/// Reads a file as a case wants and says what is wrong with the outcome.
fn check(path: &Path, file_bytes: usize, stage: Stage, expect: &Expect) -> Result<(), String> {
    let (outcome, peak) = peak_during(|| catch_unwind(AssertUnwindSafe(|| read(path, stage))));
    let Ok(outcome) = outcome else { return Err("panicked".to_owned()) };
    let budget = (1 << 20) + 2 * file_bytes;
    if peak > budget {
        return Err(format!("allocated {peak} bytes for a file of {file_bytes}"));
    }
    match (&outcome, expect) {
        (Err(e), Reject(kind)) if e.kind() == *kind => names_the_file(e),
        (Err(e), RejectAt(kind, at)) if e.kind() == *kind && e.details().offset == Some(*at) => {
            names_the_file(e)
        }
        (Ok(warnings), Accept) if warnings.is_empty() => Ok(()),
        (Ok(warnings), Warn(text)) if matches!(&warnings[..], [w] if w.contains(text)) => Ok(()),
        (Err(e), _) => Err(format!("rejected: {e}")),
        (Ok(warnings), _) => Err(format!("accepted with warnings {warnings:?}")),
    }
}

fn names_the_file(e: &Error) -> Result<(), String> {
    match e.details().file {
        Some(_) => Ok(()),
        None => Err(format!("the error names no file: {e}")),
    }
}

/// A folder in which the files of all container cases are kept when this is set: scripts/peers/gguf-rs/malformed.
const KEEP_IN: &str = "KESTREL_MALFORMED_OUT";

/// Writes the files of container cases, with what is expected of any reader in front of the name.
fn keep(folder: &Path, cases: &[Case]) {
    for (i, c) in cases.iter().enumerate().filter(|(_, c)| matches!(c.stage, Stage::Container)) {
        let expected = match c.expect {
            // Nothing is wrong with such a file, it is only that we do not read it.
            Reject(Kind::Unsupported) | RejectAt(Kind::Unsupported, _) => "either-Unsupported".to_owned(),
            Reject(kind) | RejectAt(kind, _) => format!("reject-{kind:?}"),
            Accept | Warn(_) => "accept".to_owned(),
        };
        let name = format!("{expected}.{}.{i}.gguf", c.name.replace(' ', "_"));
        std::fs::write(folder.join(name), &c.bytes).expect("writing a case");
    }
}

/// Runs all cases and reports every failure.
fn run(cases: Vec<Case>) {
    if let Some(folder) = std::env::var_os(KEEP_IN) {
        keep(Path::new(&folder), &cases);
    }
    let dir = TempDir::new();
    let mut failures = Vec::new();
    for c in &cases {
        let path = dir.file("case.gguf", &c.bytes);
        if let Err(problem) = check(&path, c.bytes.len(), c.stage, &c.expect) {
            failures.push(format!("{}: {problem}", c.name));
        }
        // A new inode for every case: the last one is still mapped if its test leaked it.
        std::fs::remove_file(path).expect("removing the case");
    }
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

fn empty() -> GgufBuilder {
    GgufBuilder::default()
}

/// A file with one pair and two tensors whose sizes the alignment divides, so that its last byte is data.
fn small() -> GgufBuilder {
    empty().kv("k", Raw::u32(7)).tensor(RawTensor::f32("a", &[8])).tensor(RawTensor::f32("b", &[8, 2]))
}

/// The same with one tensor of this entry in the middle.
fn with_tensor(t: RawTensor) -> GgufBuilder {
    empty().tensor(RawTensor::f32("a", &[8])).tensor(t)
}

/// A file that follows and states an alignment, with tensors that need padding for it.
fn aligned(alignment: u32) -> GgufBuilder {
    let file = GgufBuilder { alignment: alignment.into(), ..empty() };
    file.kv("general.alignment", Raw::u32(alignment))
        .tensor(RawTensor::f32("a", &[3]))
        .tensor(RawTensor::f32("b", &[5]))
}

fn cut(file: GgufBuilder, n_bytes: usize) -> Vec<u8> {
    let mut bytes = file.bytes();
    bytes.truncate(bytes.len() - n_bytes);
    bytes
}

/// Position of a one-letter first key's length, text, type and value.
const KEY: u64 = 24;
const KEY_TYPE: u64 = 33;
const VALUE: u64 = 37;
