//! What gguf-rs makes of GGUF files. `read FILE...` prints JSON lines: for each file one for its header and metadata,
//! then one per tensor. `malformed DIR` reads every file of a folder that the tests filled (KESTREL_MALFORMED_OUT), each
//! in a process of its own with bounded memory, and counts how that ended.

use gguf_rs::{GGMLType, get_gguf_container_array_size};
use serde_json::json;
use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Address space of a child. The largest malformed file has 1 MiB.
const LIMIT_KIB: u32 = 256 << 10;
const LIMIT_TIME: Duration = Duration::from_secs(20);
/// What Rust's runtime exits with after a panic.
const PANICKED: i32 = 101;

fn main() -> ExitCode {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let done = match args.split_first() {
        Some((mode, files)) if mode == Path::new("read") => files.iter().try_for_each(|file| read(file)),
        Some((mode, [folder])) if mode == Path::new("malformed") => malformed(folder),
        _ => Err("usage: kestrel-peer-gguf-rs read FILE... | malformed DIR".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

/// Prints everything that gguf-rs gives for a file. Dimensions are in ggml's order, fastest first; `offset` counts from
/// `data_offset`.
fn read(path: &Path) -> Result<(), Box<dyn Error>> {
    let model = get_gguf_container_array_size(path.to_str().ok_or("a path that is not UTF-8")?, u64::MAX)?
        .decode()?;
    println!(
        "{}",
        json!({
            "file": path.to_str(), "version": model.get_version(), "alignment": model.alignment(),
            "data_offset": model.data_offset(), "n_kv": model.num_kv(), "n_tensors": model.num_tensor(),
            "metadata": model.metadata(),
        })
    );
    for t in model.tensors() {
        let ty = GGMLType::try_from(t.kind)?.to_string();
        println!(
            "{}",
            json!({
                "name": t.name, "kind": t.kind, "type": ty, "shape": t.shape, "offset": t.offset, "size": t.size,
            })
        );
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Outcome {
    Rejected,
    Accepted,
    Panicked,
    /// By a signal: out of memory or time.
    Killed,
}

/// Prints a line for every file that ended otherwise than its name says, and a table. Names begin with `accept.`,
/// `reject-KIND.` or, for sound files of kinds that only Kestrel does not support, `either-KIND.`
fn malformed(folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|f| Ok(f?.path())).collect::<std::io::Result<_>>()?;
    files.sort();
    let mut counts: BTreeMap<(String, Outcome), usize> = BTreeMap::new();
    for file in &files {
        let name = file.file_name().and_then(OsStr::to_str).ok_or("a name that is not UTF-8")?;
        let (expected, _) = name.split_once('.').ok_or("a name without what is expected")?;
        let group = expected.split('-').next().unwrap_or(expected);
        let (outcome, message) = in_child(file)?;
        *counts.entry((group.to_owned(), outcome)).or_default() += 1;
        let as_expected = match outcome {
            Outcome::Rejected => group != "accept",
            Outcome::Accepted => group != "reject",
            Outcome::Panicked | Outcome::Killed => false,
        };
        if !as_expected {
            println!("{outcome:?}: {name}: {}", message.lines().next().unwrap_or_default());
        }
    }
    println!("{} files", files.len());
    for ((group, outcome), n) in counts {
        println!("to {group}: {n} {outcome:?}");
    }
    if files.is_empty() { Err("no files".into()) } else { Ok(()) }
}

/// Reads a file in a child and returns what it wrote to stderr.
fn in_child(file: &Path) -> Result<(Outcome, String), Box<dyn Error>> {
    let mut child = Command::new("sh")
        .args(["-c", &format!("ulimit -c 0; ulimit -v {LIMIT_KIB}; exec \"$0\" read \"$1\"")])
        .arg(std::env::current_exe()?)
        .arg(file)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > LIMIT_TIME {
            child.kill()?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let done = child.wait_with_output()?;
    Ok((outcome(done.status)?, String::from_utf8_lossy(&done.stderr).trim().to_owned()))
}

fn outcome(status: ExitStatus) -> Result<Outcome, Box<dyn Error>> {
    Ok(match status.code() {
        Some(0) => Outcome::Accepted,
        Some(1) => Outcome::Rejected,
        Some(PANICKED) => Outcome::Panicked,
        Some(code) => return Err(format!("the child did not start: {code}").into()),
        None => Outcome::Killed,
    })
}
