//! What happens when the system fails under a command that writes a file: it is killed at every system call, and every
//! system call that touches a file fails in every likely way. The claim: the output's path holds a complete file or
//! exactly what it held before, and at most one file is left beside it, whose name says what it is.
//!
//! The faults are injected by strace (Debian's package of that name), so these tests are ignored unless asked for:
//! `cargo test --release -p kestrel-cli --test faults -- --include-ignored`, as `.ci/run` does.

#![allow(clippy::print_stdout)] // a test says how much it tried

use kestrel_tests::bad_input::with_vocabulary;
use kestrel_tests::checkpoint_builder::CheckpointBuilder;
use kestrel_tests::temp_dir::TempDir;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What was at the output's path before.
const PRECIOUS: &[u8] = b"precious";

/// A command that writes `out` in a folder that has `m.gguf`, `hf/` and `text`.
struct Writer {
    name: &'static str,
    args: &'static [&'static str],
}

const WRITERS: [Writer; 6] = [
    Writer { name: "convert", args: &["convert", "hf", "-o", "out", "--type", "q8_0", "--threads", "1"] },
    Writer {
        name: "quantize",
        args: &["quantize", "m.gguf", "-o", "out", "--type", "bf16", "--threads", "1"],
    },
    Writer {
        name: "state",
        args: &[
            "run",
            "m.gguf",
            "-p",
            "ab",
            "-n",
            "1",
            "--temp",
            "0",
            "--save-state",
            "out",
            "--threads",
            "1",
        ],
    },
    Writer { name: "logits", args: &["logits", "m.gguf", "--tokens", "1,2", "-o", "out", "--threads", "1"] },
    Writer {
        name: "imatrix",
        args: &["imatrix", "m.gguf", "-f", "text", "-c", "8", "-o", "out", "--threads", "1"],
    },
    Writer {
        name: "kl base",
        args: &[
            "perplexity",
            "m.gguf",
            "-f",
            "text",
            "--ctx",
            "8",
            "--save-kl-base",
            "out",
            "--threads",
            "1",
        ],
    },
];

/// A folder with the inputs of every writer.
fn folder() -> TempDir {
    let dir = TempDir::new();
    dir.file("m.gguf", &with_vocabulary().bytes());
    dir.file("text", "ab ".repeat(16).as_bytes());
    let hf = dir.path().join("hf");
    std::fs::create_dir(&hf).expect("a folder");
    CheckpointBuilder::new().write_to(&hf);
    dir
}

/// The files in the folder beside its inputs and the output.
fn left(dir: &TempDir) -> Vec<String> {
    let names = std::fs::read_dir(dir.path()).expect("the folder");
    let names = names.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned());
    names.filter(|n| !["m.gguf", "text", "hf", "out", "log"].contains(&n.as_str())).collect()
}

/// Runs a writer in `dir` under `strace` with these options, or without it if there are none.
fn run(writer: &Writer, dir: &TempDir, strace: &[String], force: bool) -> Output {
    let binary = env!("CARGO_BIN_EXE_kestrel");
    let mut command = match strace {
        [] => Command::new(binary),
        options => {
            let mut command = Command::new("strace");
            command.args(["-f", "-qq"]);
            // Faster, but then only the first system call of a kind gets its signal.
            if !options.iter().any(|o| o.contains("signal=") || o.starts_with("-o") && o != "-o/dev/null") {
                command.arg("--seccomp-bpf");
            }
            command.args(options).arg("--").arg(binary);
            command
        }
    };
    command.args(writer.args).args(force.then_some("--force")).env_remove("KESTREL_ISA");
    command.current_dir(dir.path()).stdin(Stdio::null());
    command.output().expect("strace, which these tests need (Debian's package strace)")
}

/// What a run without faults writes, and how often each thread makes each system call at most.
struct Golden {
    output: Vec<u8>,
    calls: BTreeMap<String, usize>,
}

fn golden(writer: &Writer) -> Golden {
    let dir = folder();
    let log = dir.path().join("log");
    let done = run(writer, &dir, &[format!("-o{}", log.display())], false);
    assert!(done.status.success(), "{}: {}", writer.name, String::from_utf8_lossy(&done.stderr));
    let mut per_thread: BTreeMap<(String, String), usize> = BTreeMap::new();
    for line in std::fs::read_to_string(log).expect("the log").lines() {
        let Some((thread, call)) = line.split_once(' ') else { continue };
        let Some((call, _)) = call.trim_start().split_once('(') else { continue };
        if call.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            *per_thread.entry((thread.to_owned(), call.to_owned())).or_default() += 1;
        }
    }
    let mut calls = BTreeMap::new();
    for ((_, call), n) in per_thread {
        let most = calls.entry(call).or_insert(0);
        *most = n.max(*most);
    }
    let output = std::fs::read(dir.path().join("out")).expect("the output");
    Golden { output, calls }
}

/// Checks the claim after a run that began with `before` at the output's path.
fn intact(dir: &TempDir, before: Option<&[u8]>, golden: &Golden) -> Result<(), String> {
    let now = std::fs::read(dir.path().join("out")).ok();
    if now.as_deref() != before && now.as_deref() != Some(&golden.output) {
        return Err(format!("the output has {:?} bytes that were not there before", now.map(|b| b.len())));
    }
    let left = left(dir);
    match &left[..] {
        [] => Ok(()),
        [one] if one.starts_with(".out.kestrel-partial-") => Ok(()),
        _ => Err(format!("{left:?} are left")),
    }
}

/// Tries all faults, some at a time, and reports every violation.
fn try_all<F: Sync>(faults: &[F], violates: impl Fn(&F) -> Option<String> + Sync) {
    let next = AtomicUsize::new(0);
    let problems = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(fault) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
                    problems.lock().expect("no panic").extend(violates(fault));
                }
            });
        }
    });
    let problems = problems.into_inner().expect("no panic");
    assert!(problems.is_empty(), "{} of {} faults:\n{}", problems.len(), faults.len(), problems.join("\n"));
}

fn inject(call: &str, what: &str, k: usize) -> Vec<String> {
    vec!["-o/dev/null".to_owned(), format!("-etrace={call}"), format!("-einject={call}:{what}:when={k}")]
}

#[test]
#[ignore = "needs strace"]
fn killed_at_every_system_call() {
    for writer in &WRITERS {
        let golden = golden(writer);
        let points: Vec<(&str, usize, bool)> = golden
            .calls
            .iter()
            .filter(|(call, _)| *call != "execve")
            .flat_map(|(call, &n)| (1..=n).flat_map(move |k| [(call.as_str(), k, false), (call, k, true)]))
            .collect();
        println!("{}: {} kills", writer.name, points.len());
        let killed = AtomicUsize::new(0);
        try_all(&points, |&(call, k, force)| {
            let dir = folder();
            let before = force.then_some(PRECIOUS);
            before.map(|bytes| dir.file("out", bytes));
            let done = run(writer, &dir, &inject(call, "signal=SIGKILL", k), force);
            killed.fetch_add(usize::from(done.status.code().is_none_or(|c| c >= 128)), Ordering::Relaxed);
            let problem = intact(&dir, before, &golden).err()?;
            Some(format!("{} killed at {call} {k}, force {force}: {problem}", writer.name))
        });
        // Threads start in another order now and then; nearly all points are met.
        let killed = killed.into_inner();
        assert!(killed * 10 >= points.len() * 9, "{}: {killed} of {} were killed", writer.name, points.len());
    }
}

/// System calls that touch files, and how they can fail.
const FAILING: [(&str, &[&str]); 20] = [
    ("openat", &["EIO", "ENOSPC", "EROFS", "EACCES", "EMFILE", "EINTR"]),
    ("read", &["EIO", "EINTR"]),
    ("pread64", &["EIO", "EINTR"]),
    ("write", &["EIO", "ENOSPC", "EINTR"]),
    ("pwrite64", &["EIO", "ENOSPC", "EDQUOT", "EINTR", "EROFS", "EFBIG"]),
    ("fallocate", &["EIO", "ENOSPC", "EINTR", "EOPNOTSUPP", "EROFS"]),
    ("fadvise64", &["EIO", "EINVAL"]),
    ("fsync", &["EIO", "ENOSPC", "EINTR", "EROFS"]),
    ("fdatasync", &["EIO", "ENOSPC"]),
    ("rename", &["EIO", "ENOSPC", "EROFS", "EXDEV", "EINTR"]),
    ("renameat2", &["EIO", "ENOSPC", "EROFS", "EINVAL", "EINTR"]),
    ("linkat", &["EIO", "EPERM"]),
    ("unlink", &["EIO", "EROFS"]),
    ("statx", &["EIO", "EACCES"]),
    ("fstat", &["EIO"]),
    ("newfstatat", &["EIO"]),
    ("lseek", &["EIO"]),
    ("readlinkat", &["EIO"]),
    ("close", &["EIO", "EINTR"]),
    ("munmap", &["EINVAL"]),
];

/// Before the program's own first instruction the dynamic loader opens and reads libraries.
fn failed_in_the_loader(done: &Output) -> bool {
    done.status.code() == Some(127) || String::from_utf8_lossy(&done.stderr).contains("shared libraries")
}

#[test]
#[ignore = "needs strace"]
fn every_system_call_on_a_file_fails() {
    for writer in &WRITERS {
        let golden = golden(writer);
        let mut points = Vec::new();
        for (call, errors) in FAILING {
            for k in 1..=golden.calls.get(call).copied().unwrap_or(0) {
                // An earlier output matters to what writes; for what reads, every other time is enough.
                let writes = !["openat", "read", "pread64", "statx", "close", "munmap"].contains(&call);
                let both = errors.iter().flat_map(|&e| [(call, k, e, false), (call, k, e, true)]);
                points.extend(both.filter(|&(_, k, _, force)| writes || force == k.is_multiple_of(2)));
            }
        }
        println!("{}: {} failures", writer.name, points.len());
        try_all(&points, |&(call, k, error, force)| {
            let dir = folder();
            let before = force.then_some(PRECIOUS);
            before.map(|bytes| dir.file("out", bytes));
            let done = run(writer, &dir, &inject(call, &format!("error={error}"), k), force);
            let stderr = String::from_utf8_lossy(&done.stderr);
            let problem = intact(&dir, before, &golden).and_then(|()| {
                let complete = std::fs::read(dir.path().join("out")).is_ok_and(|now| now == golden.output);
                match done.status.code() {
                    Some(0) if complete => Ok(()),
                    Some(0) => Err("success without the output".to_owned()),
                    // stderr itself may be what cannot be written.
                    Some(2..=4) if stderr.lines().count() == 1 || call == "write" => Ok(()),
                    _ if failed_in_the_loader(&done) => Ok(()),
                    status => Err(format!("status {status:?}: {stderr}")),
                }
            });
            let problem = problem.err()?;
            Some(format!("{}: {call} {k} fails with {error}, force {force}: {problem}", writer.name))
        });
    }
}

/// With a file-size limit, a full device, a folder that cannot be written: an error with status 3, and nothing is left.
#[test]
fn places_that_take_no_file() {
    for writer in &WRITERS {
        let golden_dir = folder();
        let done = run(writer, &golden_dir, &[], false);
        assert!(done.status.success(), "{}: {}", writer.name, String::from_utf8_lossy(&done.stderr));
        let dir = folder();
        let limited = Command::new("sh")
            .args(["-c", "ulimit -f 0; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_kestrel")])
            .args(writer.args)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .output()
            .expect("a shell");
        assert_eq!(limited.status.code(), Some(3), "{}: {limited:?}", writer.name);
        assert!(!dir.path().join("out").exists() && left(&dir).is_empty(), "{}", writer.name);
        for place in ["/sys/out", "/proc/out", "no/such/folder/out"] {
            let args = writer.args.iter().map(|&a| if a == "out" { place } else { a });
            let done = Command::new(env!("CARGO_BIN_EXE_kestrel"))
                .args(args)
                .current_dir(dir.path())
                .stdin(Stdio::null())
                .output()
                .expect("the binary starts");
            let stderr = String::from_utf8_lossy(&done.stderr);
            assert_eq!(
                (done.status.code(), stderr.lines().count()),
                (Some(3), 1),
                "{}: {stderr}",
                writer.name
            );
        }
    }
}

/// Little memory: the command ends with an error or succeeds; it leaves no output that is not complete.
#[test]
#[ignore = "needs strace"]
fn little_memory() {
    for writer in &WRITERS {
        let golden = golden(writer);
        let sizes: Vec<u32> = (0..40).map(|i| 512 + 256 * i).collect(); // KiB
        try_all(&sizes, |kib| {
            let dir = folder();
            let script = format!("ulimit -c 0; ulimit -d {kib}; exec \"$0\" \"$@\"");
            let done = Command::new("sh")
                .args(["-c", &script, env!("CARGO_BIN_EXE_kestrel")])
                .args(writer.args)
                .current_dir(dir.path())
                .stdin(Stdio::null())
                .output()
                .expect("a shell");
            let problem = intact(&dir, None, &golden).and_then(|()| {
                let exists = dir.path().join("out").exists();
                if done.status.success() == exists {
                    Ok(())
                } else {
                    Err(format!("{done:?}, output {exists}"))
                }
            });
            Some(format!("{} with {kib} KiB: {}", writer.name, problem.err()?))
        });
    }
}

/// An output holds nothing of what was in memory before: with memory that malloc fills with other bytes it is the same.
#[test]
fn memory_does_not_leak_into_an_output() {
    for writer in &WRITERS {
        let outputs = [165, 90].map(|fill| {
            let dir = folder();
            let done = Command::new(env!("CARGO_BIN_EXE_kestrel"))
                .args(writer.args)
                .env("GLIBC_TUNABLES", format!("glibc.malloc.perturb={fill}"))
                .current_dir(dir.path())
                .stdin(Stdio::null())
                .output()
                .expect("the binary starts");
            assert!(done.status.success(), "{}: {}", writer.name, String::from_utf8_lossy(&done.stderr));
            std::fs::read(dir.path().join("out")).expect("the output")
        });
        assert_eq!(outputs[0], outputs[1], "{}", writer.name);
    }
}

#[test]
fn two_writers_of_one_output() {
    let golden = {
        let dir = folder();
        assert!(run(&WRITERS[0], &dir, &[], false).status.success());
        std::fs::read(dir.path().join("out")).expect("the output")
    };
    for round in 0..20 {
        for force in [false, true] {
            let dir = folder();
            let ends: Vec<Option<i32>> = std::thread::scope(|scope| {
                let start = || scope.spawn(|| run(&WRITERS[0], &dir, &[], force).status.code());
                let both = [start(), start()];
                both.map(|t| t.join().expect("no panic")).to_vec()
            });
            let n_done = ends.iter().filter(|end| **end == Some(0)).count();
            let refused = ends.iter().filter(|end| **end == Some(2)).count();
            let right = if force { n_done == 2 } else { (n_done, refused) == (1, 1) };
            assert!(right, "round {round}, force {force}: {ends:?}");
            assert_eq!(std::fs::read(dir.path().join("out")).expect("the output"), golden);
            assert!(left(&dir).is_empty());
        }
    }
}

/// A change to a shard while the conversion runs.
type Change = (&'static str, fn(&Path));

/// strace holds the conversion at its first write; meanwhile the shard changes.
#[test]
#[ignore = "needs strace"]
fn a_shard_that_changes_during_the_conversion() {
    let changes: [Change; 5] = [
        ("truncated", |shard| {
            std::fs::File::options()
                .write(true)
                .open(shard)
                .and_then(|f| f.set_len(900))
                .expect("truncating");
        }),
        ("grown", |shard| {
            let bytes = std::fs::read(shard).expect("the shard");
            std::fs::write(shard, [&bytes[..], b"more"].concat()).expect("growing");
        }),
        ("overwritten", |shard| {
            let bytes = std::fs::read(shard).expect("the shard");
            std::fs::write(shard, bytes).expect("overwriting");
        }),
        ("replaced", |shard| {
            let other: PathBuf = shard.with_file_name("other");
            std::fs::copy(shard, &other).and_then(|_| std::fs::rename(&other, shard)).expect("replacing");
        }),
        ("removed", |shard| std::fs::remove_file(shard).expect("removing")),
    ];
    try_all(&changes, |(name, change)| {
        let dir = folder();
        let shard = dir.path().join("hf/model.safetensors");
        let delay = [
            "-o/dev/null".into(),
            "-etrace=fallocate".into(),
            "-einject=fallocate:delay_exit=1500000".into(),
        ];
        let done = std::thread::scope(|scope| {
            let conversion = scope.spawn(|| run(&WRITERS[0], &dir, &delay, false));
            let started = std::time::Instant::now();
            while left(&dir).is_empty() && started.elapsed().as_secs() < 30 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            change(&shard);
            conversion.join().expect("no panic")
        });
        let stderr = String::from_utf8_lossy(&done.stderr);
        let clean = done.status.code() == Some(3) && stderr.lines().count() == 1;
        let nothing = !dir.path().join("out").exists() && left(&dir).is_empty();
        (!clean || !nothing).then(|| format!("{name}: {:?}, {stderr}", done.status))
    });
}
