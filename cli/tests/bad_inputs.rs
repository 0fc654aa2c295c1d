//! The table of bad inputs against the binary: each in a child process with limits, judged by its exit status, its
//! error, the heap and time that it took, and what it left behind. Whatever else is asked of the binary about such an
//! input must end cleanly too.
#![forbid(unsafe_code)]

use kestrel_formats::ErrorKind;
use kestrel_tests::bad_input::{Action, Case, Expect, Files, table};
use kestrel_tests::temp_dir::TempDir;
use serde_json::Value as Json;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Heap that a command may take to read an input, as a multiple of its size and beside that.
const HEAP_FACTOR: u64 = 2;
const HEAP_BYTES: u64 = 1 << 20;
/// And what one may take that goes on to compute: buffers of the runtime and of the tokenizer, and what a chat template
/// may make.
const WORKING_HEAP_BYTES: u64 = 6 << 20;
/// Processor time of the command that has to reject or accept.
const TIME: Duration = Duration::from_millis(100);
/// Its elapsed time, in which it may have had to wait for others.
const ELAPSED: Duration = Duration::from_millis(300);
/// How often a command that took longer is given another chance. The other tests and whatever else the machine does
/// delay a command, or stop all of this for a while, but nothing makes it faster than it is: the quickest run counts,
/// and a command that needs the time exceeds it every time.
const TRIES: usize = 10;
/// Elapsed time after which a command hangs.
const HANGS: Duration = Duration::from_secs(30);
/// Bytes of a sparse file that count as its size: a header is all that is read of one.
const SPARSE_BYTES: u64 = 16 << 20;

/// The exact outcome of every case: exit status, kind and offset. Written anew with KESTREL_WRITE_OUTCOMES=1; the
/// table itself says what must be so.
const OUTCOMES: &str = "../tests/data/bad_inputs/outcomes.tsv";

/// How a command ended.
struct End {
    status: Option<i32>,
    stderr: String,
    heap_bytes: u64,
    /// The processor's.
    time: Duration,
    elapsed: Duration,
    /// Files that were not there before. They are removed.
    left: Vec<String>,
}

impl End {
    /// The one error on stderr, if there is one.
    fn error(&self) -> Option<Json> {
        self.stderr.lines().last().and_then(|l| serde_json::from_str(l).ok())
    }

    fn warnings(&self) -> Vec<&str> {
        self.stderr.lines().filter(|l| l.starts_with("warning: ")).collect()
    }
}

/// Builds the library that measures.
fn measure_library() -> &'static Path {
    static BUILT: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/measure.c");
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("measure-{}.so", std::process::id()));
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"]).arg(&out).arg(source);
        assert!(cc.status().expect("a C compiler, which linking Rust needs as well").success());
        out
    })
}

/// The command line of an action; `output` is where it may write.
fn arguments(action: Action, input: &Path, output: &Path) -> Vec<OsString> {
    let good = input.with_file_name("good.gguf");
    let words: &[&str] = match action {
        Action::Inspect => &["inspect", "INPUT"],
        Action::Tokenize => &["tokenize", "INPUT", "-p", "ab"],
        Action::Logits => &["logits", "INPUT", "--tokens", "1,2", "-o", "OUTPUT", "--threads", "1"],
        Action::Run => &["run", "INPUT", "-p", "ab", "-n", "2", "--temp", "0", "--threads", "1"],
        Action::Chat => &["run", "INPUT", "--chat", "-p", "ab", "-n", "2", "--temp", "0", "--threads", "1"],
        Action::Convert if input.is_dir() => {
            &["convert", "INPUT", "-o", "OUTPUT", "--type", "f32", "--threads", "1"]
        }
        Action::Convert => &["quantize", "INPUT", "-o", "OUTPUT", "--type", "f32", "--threads", "1"],
        Action::Verify => &["verify", "INPUT", "--source", "INPUT", "--threads", "1"],
        Action::LoadState => {
            &["run", "GOOD", "-p", "ab", "-n", "2", "--load-state", "INPUT", "--threads", "1"]
        }
        Action::Imatrix => {
            &["quantize", "GOOD", "-o", "OUTPUT", "--type", "q8_0", "--imatrix", "INPUT", "--threads", "1"]
        }
        Action::Calibration => &[
            "quantize",
            "GOOD",
            "-o",
            "OUTPUT",
            "--type",
            "q4_0",
            "--calibration",
            "INPUT",
            "--threads",
            "1",
        ],
        Action::KlBase => &["perplexity", "GOOD", "--kl-base", "INPUT", "--threads", "1"],
        Action::Requests => &["eval", "GOOD", "--requests", "INPUT", "--threads", "1"],
        Action::Diff => &["diff", "INPUT", "INPUT", "--threads", "1"],
    };
    let word = |w: &&str| match *w {
        "INPUT" => input.into(),
        "OUTPUT" => output.into(),
        "GOOD" => good.clone().into(),
        w => w.into(),
    };
    words.iter().map(word).chain(["--error-format".into(), "json".into()]).collect()
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).expect("the folder");
    entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

/// Bytes of all files in a folder and below, sparse ones as they are read.
fn input_bytes(path: &Path) -> u64 {
    let meta = std::fs::symlink_metadata(path).expect("what the case made");
    match std::fs::read_dir(path) {
        Ok(entries) if meta.is_dir() => entries.map(|e| input_bytes(&e.expect("an entry").path())).sum(),
        _ => meta.len().min(SPARSE_BYTES),
    }
}

fn run(action: Action, input: &Path, dir: &TempDir) -> End {
    let before = names(dir.path());
    let report = TempDir::new();
    let measured = report.path().join("measured");
    let started = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_kestrel"))
        .args(arguments(action, input, &dir.path().join("output")))
        .env_remove("KESTREL_ISA")
        .env("LD_PRELOAD", measure_library())
        .env("KESTREL_MEASURE", &measured)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(report.path().join("stderr")).expect("a file"))
        .spawn()
        .expect("the binary starts");
    let status = loop {
        match child.try_wait().expect("waiting") {
            Some(status) => break status,
            None if started.elapsed() > HANGS => {
                child.kill().expect("killing what hangs");
                break child.wait().expect("waiting");
            }
            None => std::thread::sleep(Duration::from_micros(500)),
        }
    };
    let elapsed = started.elapsed();
    let text = std::fs::read_to_string(&measured).unwrap_or_default();
    let mut numbers = text.split_whitespace().map(|n| n.parse().expect("a number"));
    let left: Vec<String> = names(dir.path()).difference(&before).cloned().collect();
    for name in &left {
        std::fs::remove_file(dir.path().join(name)).expect("removing an output");
    }
    End {
        status: status.code(),
        stderr: String::from_utf8(std::fs::read(report.path().join("stderr")).expect("stderr"))
            .expect("UTF-8"),
        heap_bytes: numbers.next().unwrap_or(u64::MAX),
        time: Duration::from_micros(numbers.next().unwrap_or(0)),
        elapsed,
        left,
    }
}

/// The quickest of several runs if the first took longer than one of the limits.
fn run_within(limit: Duration, elapsed: Duration, action: Action, input: &Path, dir: &TempDir) -> End {
    let mut quickest = run(action, input, dir);
    for _ in 1..TRIES {
        if quickest.time <= limit && quickest.elapsed <= elapsed {
            break;
        }
        let again = run(action, input, dir);
        if again.elapsed < quickest.elapsed {
            quickest = again;
        }
    }
    quickest
}

/// What every end must be, whatever the input: a known status, one error if it failed, and no file unless it succeeded at
/// writing one.
fn clean(action: Action, end: &End) -> Result<(), String> {
    let writes = matches!(action, Action::Logits | Action::Convert | Action::Imatrix | Action::Calibration);
    match end.status {
        Some(0) if writes && end.left == ["output"] || end.left.is_empty() => Ok(()),
        Some(0) => Err(format!("succeeded and left {:?}", end.left)),
        Some(status @ 2..=4) => {
            let error = end.error().ok_or_else(|| format!("no error on stderr: {}", end.stderr))?;
            if error["exit_status"] != status || end.stderr.lines().any(|l| !l.starts_with(['w', '{'])) {
                return Err(format!("status {status} and {}", end.stderr));
            }
            match end.left.is_empty() {
                true => Ok(()),
                false => Err(format!("failed and left {:?}", end.left)),
            }
        }
        status => Err(format!("status {status:?}: {}", end.stderr)),
    }
}

/// Whether a case gets beyond reading its input.
fn computes(case: &Case) -> bool {
    let accepted = matches!(case.expect, Expect::Accept | Expect::Warn(_));
    match case.action {
        Action::Inspect | Action::Diff => false,
        Action::Tokenize | Action::Imatrix | Action::Calibration => accepted,
        // What is wrong with a weight is found while computing with it.
        Action::Logits | Action::Convert | Action::Verify => {
            accepted
                || case.group == "weights"
                || matches!(case.expect, Expect::RejectWith(ErrorKind::NotFinite, _))
        }
        // A saved state and a template are read when the model is ready to run.
        Action::Run | Action::Chat | Action::LoadState | Action::KlBase | Action::Requests => true,
    }
}

/// Whether a case ended as its row says.
fn as_expected(case: &Case, end: &End, input_bytes: u64) -> Result<(), String> {
    clean(case.action, end)?;
    let base = if computes(case) { WORKING_HEAP_BYTES } else { HEAP_BYTES };
    let budget = base + HEAP_FACTOR * input_bytes;
    if end.heap_bytes > budget {
        return Err(format!("{} bytes of heap for an input of {input_bytes}", end.heap_bytes));
    }
    if end.time > TIME || end.elapsed > ELAPSED {
        return Err(format!("took {:?} of {:?}", end.time, end.elapsed));
    }
    let error = end.error().unwrap_or_default();
    let is =
        |kind| end.status != Some(0) && error["kind"] == format!("{kind:?}") && error["file"].is_string();
    let right = match case.expect {
        Expect::Reject(kind) => is(kind),
        Expect::RejectAt(kind, at) => is(kind) && error["offset"] == at,
        Expect::RejectWith(kind, text) => is(kind) && end.stderr.replace("\\\"", "").contains(text),
        Expect::Accept => end.status == Some(0) && end.warnings().is_empty(),
        Expect::Warn(text) => end.status == Some(0) && matches!(end.warnings()[..], [w] if w.contains(text)),
    };
    if right {
        Ok(())
    } else {
        Err(format!("wanted {:?}, got {:?} {}", case.expect, end.status, end.stderr.trim()))
    }
}

/// Everything that is asked about a case's input beside what its row says.
fn other_actions(case: &Case) -> Vec<Action> {
    use Action::*;
    let all: &[Action] = match case.action {
        LoadState | Imatrix | Calibration | KlBase | Requests => &[],
        _ => &[Inspect, Tokenize, Logits, Run, Chat, Convert, Verify, Diff],
    };
    all.iter().copied().filter(|a| *a != case.action).collect()
}

/// Runs one case; its line for [`OUTCOMES`], or what is wrong.
fn judge(case: &Case) -> Result<String, String> {
    let dir = TempDir::new();
    let path = case.make(&dir);
    let n_bytes = input_bytes(dir.path());
    let end = run_within(TIME, ELAPSED, case.action, &path, &dir);
    as_expected(case, &end, n_bytes)?;
    for action in other_actions(case) {
        let end = run_within(HANGS, HANGS, action, &path, &dir);
        clean(action, &end).map_err(|problem| format!("{action:?}: {problem}"))?;
    }
    let error = end.error().unwrap_or_default();
    let kind = error["kind"].as_str().unwrap_or("-");
    let offset = error["offset"].as_u64().map_or("-".to_owned(), |n| n.to_string());
    Ok(format!(
        "{}\t{}\t{:?}\t{}\t{kind}\t{offset}",
        case.group,
        case.name,
        case.action,
        end.status.unwrap_or(-1)
    ))
}

/// Judges all cases, some at a time.
fn judge_all(cases: &[Case]) -> Vec<Result<String, String>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                while let Some((i, case)) = {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    cases.get(i).map(|c| (i, c))
                } {
                    let line = judge(case).map_err(|problem| format!("{}: {problem}", case.name));
                    done.lock().expect("no panic").insert(i, line);
                }
            });
        }
    });
    done.into_inner().expect("no panic").into_values().collect()
}

#[test]
fn every_bad_input_ends_as_the_table_says() {
    let mut cases = table();
    if let Ok(only) = std::env::var("KESTREL_ONLY_CASES") {
        cases.retain(|c| c.name.contains(&only));
    }
    let names: BTreeSet<&str> = cases.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "names are unique");
    let judged = judge_all(&cases);
    let failures: Vec<&str> = judged.iter().filter_map(|j| j.as_ref().err().map(String::as_str)).collect();
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(OUTCOMES);
    let mut text = "group\tcase\tcommand\tstatus\tkind\toffset\n".to_owned();
    judged.iter().flatten().for_each(|line| writeln!(text, "{line}").expect("a String takes it"));
    if std::env::var_os("KESTREL_WRITE_OUTCOMES").is_some() {
        std::fs::write(&path, &text).expect("writing the outcomes");
    }
    let wanted = std::fs::read_to_string(&path).expect("the recorded outcomes");
    let differ = |pair: &(&str, &str)| pair.0 != pair.1;
    if let Some((wanted, got)) = wanted.lines().zip(text.lines()).find(differ) {
        panic!("recorded: {wanted}\ngot:      {got}");
    }
    assert_eq!(wanted.lines().count(), text.lines().count(), "cases and recorded outcomes");
}

#[test]
fn the_table_is_as_large_as_it_says() {
    let cases = table();
    let llama_cpp: Vec<_> = cases.iter().filter(|c| c.group == "llama.cpp").collect();
    let n_accepted = llama_cpp.iter().filter(|c| matches!(c.expect, Expect::Accept)).count();
    assert_eq!((llama_cpp.len(), n_accepted), (34, 7), "llama.cpp's own test");
    assert!(cases.len() >= 34 + 225, "{}", cases.len());
    let n_gguf = cases.iter().filter(|c| matches!(c.files, Files::Gguf(_))).count();
    assert!(n_gguf >= 150, "{n_gguf}");
}
