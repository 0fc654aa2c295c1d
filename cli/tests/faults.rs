//! What happens when the system fails under a command that writes a file or a folder: it is killed at every system call,
//! and every system call that touches a file fails in every likely way. The claim: the output's path holds a complete
//! output or exactly what it held before, and at most one file or folder is left beside it, whose name says what it is.
//!
//! The faults are injected by strace (Debian's package of that name), so these tests are ignored unless asked for:
//! `cargo test --release -p kestrel-cli --test faults -- --include-ignored`, as `.ci/run` does.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)] // a test says how much it tried

use kestrel_formats::calibration::{CalibrationSource, CalibrationWriter};
use kestrel_tests::bad_input::with_vocabulary;
use kestrel_tests::checkpoint_builder::CheckpointBuilder;
use kestrel_tests::temp_dir::TempDir;
use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

/// What was at the output's path before.
const PRECIOUS: &[u8] = b"precious";

/// A command that writes `out` in a folder that has `m.gguf`, `c.gguf`, `hf/` and `text`.
struct Writer {
    name: &'static str,
    args: &'static [&'static str],
    /// What it reads with positioned reads rather than through a map, so that a change is an error.
    streams: Option<&'static str>,
    /// Whether it writes a folder.
    folder: bool,
    /// Whether an interrupted run leaves `out.part`, from which `--resume` goes on.
    resumes: bool,
}

/// What [`Writer::resumes`] leaves.
const PART: &str = "out.part";

/// What most of them have in common.
const WRITER: Writer = Writer { name: "", args: &[], streams: None, folder: false, resumes: false };

/// To have a command's faults tried, add it here.
static WRITERS: [Writer; 9] = [
    Writer {
        name: "convert",
        args: &["convert", "hf", "-o", "out", "--type", "q8_0", "--threads", "1"],
        streams: Some("hf/model.safetensors"),
        ..WRITER
    },
    Writer {
        name: "convert with a calibration",
        args: &["convert", "hf", "-o", "out", "--type", "q8_0", "--calibration", "c.gguf", "--threads", "1"],
        streams: Some("hf/model.safetensors"),
        resumes: true,
        ..WRITER
    },
    Writer {
        name: "convert to bitsandbytes",
        args: &["convert", "hf", "-o", "out", "--type", "bnb-nf4", "--double-quant", "--threads", "1"],
        streams: Some("hf/model.safetensors"),
        folder: true,
        ..WRITER
    },
    Writer {
        name: "quantize",
        args: &["quantize", "m.gguf", "-o", "out", "--type", "bf16", "--threads", "1"],
        streams: Some("m.gguf"),
        ..WRITER
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
        ..WRITER
    },
    Writer {
        name: "logits",
        args: &["logits", "m.gguf", "--tokens", "1,2", "-o", "out", "--threads", "1"],
        ..WRITER
    },
    Writer {
        name: "imatrix",
        args: &["imatrix", "m.gguf", "-f", "text", "-c", "8", "-o", "out", "--threads", "1"],
        ..WRITER
    },
    Writer {
        name: "calibration",
        args: &["calibrate", "m.gguf", "-f", "text", "-c", "8", "-o", "out", "--threads", "1"],
        resumes: true,
        ..WRITER
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
        ..WRITER
    },
];

/// All of them; `KESTREL_ONLY_WRITER` picks one while working on it.
fn writers() -> impl Iterator<Item = &'static Writer> {
    let only = std::env::var("KESTREL_ONLY_WRITER").ok();
    WRITERS.iter().filter(move |w| only.as_ref().is_none_or(|name| name == w.name))
}

/// A folder with the inputs of every writer.
fn folder() -> TempDir {
    let dir = TempDir::new();
    dir.file("m.gguf", &with_vocabulary().bytes());
    dir.file("text", "ab ".repeat(16).as_bytes());
    dir.file("c.gguf", calibration());
    let hf = dir.path().join("hf");
    std::fs::create_dir(&hf).expect("a folder");
    // Rows of dt_proj are two columns wide, so that they fill bytes when they are packed.
    let mut model = CheckpointBuilder::new().config(serde_json::json!({"time_step_rank": 2}));
    for t in &mut model.tensors {
        if t.name.ends_with("x_proj.weight") {
            t.shape = vec![6, 16];
        } else if t.name.ends_with("dt_proj.weight") {
            t.shape = vec![16, 2];
        }
    }
    model.write_to(&hf);
    dir
}

/// A calibration of no matrix: what it makes a conversion do about interruptions does not depend on that.
fn calibration() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let dir = TempDir::new();
        let path = dir.path().join("c.gguf");
        let source = CalibrationSource { model: 1, tokens: 2, ctx: 8, dataset: "text".into(), types: vec![] };
        let writer = CalibrationWriter::open(&path, &source, &[], (false, false)).expect("a calibration");
        std::fs::read(writer.finish().expect("a calibration")).expect("a calibration")
    })
}

/// The files of an output: one without a name, or those of a folder.
type Tree = BTreeMap<String, Vec<u8>>;

/// What is at the output's path in a folder.
fn output(dir: &TempDir) -> Option<Tree> {
    let path = dir.path().join("out");
    if path.is_dir() {
        let entries = std::fs::read_dir(&path).expect("the output").map(|e| e.expect("an entry"));
        let file = |e: std::fs::DirEntry| {
            let name = e.file_name().to_string_lossy().into_owned();
            (name, std::fs::read(e.path()).expect("a file of the output"))
        };
        return Some(entries.map(file).collect());
    }
    std::fs::read(path).ok().map(|bytes| Tree::from([(String::new(), bytes)]))
}

/// Puts something precious at the output's path.
fn put_precious(writer: &Writer, dir: &TempDir) -> Tree {
    if writer.folder {
        std::fs::create_dir(dir.path().join("out")).expect("a folder");
        dir.file("out/config.json", PRECIOUS);
        dir.file("out/precious", PRECIOUS);
    } else {
        dir.file("out", PRECIOUS);
    }
    output(dir).expect("what was put there")
}

/// The files in the folder beside its inputs and the output.
fn left(dir: &TempDir) -> Vec<String> {
    let names = std::fs::read_dir(dir.path()).expect("the folder");
    let names = names.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned());
    names.filter(|n| !["m.gguf", "c.gguf", "text", "hf", "out", "log"].contains(&n.as_str())).collect()
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
    output: Tree,
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
    Golden { output: output(&dir).expect("the output"), calls }
}

/// Checks the claim after a run that began with `before` at the output's path.
fn intact(dir: &TempDir, before: Option<&Tree>, golden: &Golden) -> Result<(), String> {
    let now = output(dir);
    if now.as_ref() != before && now.as_ref() != Some(&golden.output) {
        let sizes = now.map(|tree| tree.into_iter().map(|(name, b)| (name, b.len())).collect::<Vec<_>>());
        return Err(format!("the output is neither what it was nor complete: {sizes:?}"));
    }
    let left = left(dir);
    match &left[..] {
        [] => Ok(()),
        [one] if one.starts_with(".out.kestrel-partial-") || one == PART => Ok(()),
        _ => Err(format!("{left:?} are left")),
    }
}

/// From what a killed run left, another makes the output, unless it was killed in the moments when the part is no part yet
/// or no part any more; then it is refused and nothing changes.
fn goes_on(
    writer: &Writer,
    dir: &TempDir,
    before: Option<&Tree>,
    golden: &Golden,
    n_resumed: &AtomicUsize,
) -> Result<(), String> {
    let words = [writer.args, &["--resume"]].concat().leak();
    let resumed = run(&Writer { args: words, ..*writer }, dir, &[], before.is_some());
    intact(dir, before, golden)?;
    let stderr = String::from_utf8_lossy(&resumed.stderr);
    match resumed.status.code() {
        Some(0) if left(dir).is_empty() && output(dir).as_ref() == Some(&golden.output) => {
            n_resumed.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        Some(2) if stderr.contains("Inconsistent") && output(dir).as_ref() == before => Ok(()),
        status => Err(format!("--resume ended with {status:?}: {stderr}")),
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

/// How often threads wait for each other is chance.
const WAITING: &str = "futex";

#[test]
#[ignore = "needs strace"]
fn killed_at_every_system_call() {
    for writer in writers() {
        let golden = golden(writer);
        let points: Vec<(&str, usize, bool)> = golden
            .calls
            .iter()
            .filter(|(call, _)| *call != "execve")
            .flat_map(|(call, &n)| (1..=n).flat_map(move |k| [(call.as_str(), k, false), (call, k, true)]))
            .collect();
        println!("{}: {} kills", writer.name, points.len());
        let (killed, n_resumed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        try_all(&points, |&(call, k, force)| {
            let dir = folder();
            let before = force.then(|| put_precious(writer, &dir));
            let done = run(writer, &dir, &inject(call, "signal=SIGKILL", k), force);
            let died = done.status.code().is_none_or(|c| c >= 128);
            killed.fetch_add(usize::from(died && call != WAITING), Ordering::Relaxed);
            let intact_then = intact(&dir, before.as_ref(), &golden);
            let problem = intact_then.and_then(|()| match left(&dir) == [PART] {
                true => goes_on(writer, &dir, before.as_ref(), &golden, &n_resumed),
                false => Ok(()),
            });
            Some(format!("{} killed at {call} {k}, force {force}: {}", writer.name, problem.err()?))
        });
        println!("{}: {} went on", writer.name, n_resumed.load(Ordering::Relaxed));
        assert!(!writer.resumes || n_resumed.into_inner() > 0, "{}: none went on", writer.name);
        // Threads start in another order now and then; nearly all points are met.
        let (killed, n) = (killed.into_inner(), points.iter().filter(|(call, ..)| *call != WAITING).count());
        assert!(killed * 10 >= n * 9, "{}: {killed} of {n} were killed", writer.name);
    }
}

/// System calls that touch files, and how they can fail.
const FAILING: [(&str, &[&str]); 25] = [
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
    ("unlinkat", &["EIO", "EROFS"]),
    ("mkdir", &["EIO", "ENOSPC", "EROFS", "EACCES", "EINTR"]),
    ("rmdir", &["EIO", "EROFS"]),
    ("getdents64", &["EIO"]),
    ("ftruncate", &["EIO", "ENOSPC"]),
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
    for writer in writers() {
        let golden = golden(writer);
        let mut points = Vec::new();
        for (call, errors) in FAILING {
            for k in 1..=golden.calls.get(call).copied().unwrap_or(0) {
                // An earlier output matters to what writes; for what reads, every other time is enough.
                let reads = ["openat", "read", "pread64", "statx", "close", "munmap", "getdents64"];
                let writes = !reads.contains(&call);
                let both = errors.iter().flat_map(|&e| [(call, k, e, false), (call, k, e, true)]);
                points.extend(both.filter(|&(_, k, _, force)| writes || force == k.is_multiple_of(2)));
            }
        }
        println!("{}: {} failures", writer.name, points.len());
        try_all(&points, |&(call, k, error, force)| {
            let dir = folder();
            let before = force.then(|| put_precious(writer, &dir));
            let done = run(writer, &dir, &inject(call, &format!("error={error}"), k), force);
            let stderr = String::from_utf8_lossy(&done.stderr);
            let problem = intact(&dir, before.as_ref(), &golden).and_then(|()| {
                let complete = output(&dir).is_some_and(|now| now == golden.output);
                match done.status.code() {
                    Some(0) if complete => Ok(()),
                    Some(0) => Err("success without the output".to_owned()),
                    // stderr itself may be what cannot be written.
                    Some(2..=4) if one_error(&stderr) || call == "write" => Ok(()),
                    _ if failed_in_the_loader(&done) => Ok(()),
                    // An assertion of the standard library, which Linux cannot break: closing a folder never fails.
                    Some(70) if call == "close" && stderr.contains("closedir") => Ok(()),
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
    for writer in writers() {
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
        let nothing = left(&dir).iter().all(|name| writer.resumes && name == PART);
        assert!(output(&dir).is_none() && nothing, "{}", writer.name);
        for place in ["/sys/out", "/proc/out", "no/such/folder/out"] {
            let args = writer.args.iter().map(|&a| if a == "out" { place } else { a });
            let done = Command::new(env!("CARGO_BIN_EXE_kestrel"))
                .args(args)
                .current_dir(dir.path())
                .stdin(Stdio::null())
                .output()
                .expect("the binary starts");
            let stderr = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.code() == Some(3) && one_error(&stderr), "{}: {stderr}", writer.name);
        }
    }
}

/// A folder that may be read and not written. Root may write everywhere, so that it hands the command to nobody.
#[test]
fn a_read_only_folder() {
    let tools = TempDir::new();
    let binary = tools.path().join("kestrel"); // where another user may find it
    std::fs::copy(env!("CARGO_BIN_EXE_kestrel"), &binary).expect("a copy of the binary");
    let open =
        |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
    open(tools.path(), 0o755);
    for writer in writers() {
        let dir = folder();
        open(dir.path(), 0o555);
        let mut command = Command::new(&binary);
        command.args(writer.args).current_dir(dir.path()).stdin(Stdio::null());
        if std::fs::metadata("/proc/self").expect("this process").uid() == 0 {
            command.uid(NOBODY).gid(NOBODY);
        }
        let done = command.output().expect("the binary starts");
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.code() == Some(3) && one_error(&stderr), "{}: {stderr}", writer.name);
        assert!(output(&dir).is_none() && left(&dir).is_empty(), "{}", writer.name);
        open(dir.path(), 0o755);
    }
}

/// The user without rights of most systems.
const NOBODY: u32 = 65534;

/// A control group whose processes have this much memory, file pages included.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    /// `None` where none can be made: without the right to, or without the controller.
    fn new(bytes: u64) -> Option<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("kestrel-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
            .into_iter()
            .find_map(|(root, limit)| {
                let path = Path::new(root).join(&name);
                std::fs::create_dir(&path).ok()?;
                let group = Self(path);
                let limited = group.0.join(limit);
                (limited.exists() && std::fs::write(limited, bytes.to_string()).is_ok()).then_some(group)
            })
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Runs a writer after a line of shell.
fn run_limited(writer: &Writer, dir: &TempDir, limit: &str) -> Output {
    Command::new("sh")
        .args(["-c", &format!("ulimit -c 0; {limit}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_kestrel")])
        .args(writer.args)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .output()
        .expect("a shell")
}

/// Little memory: the command ends with an error, is ended, or succeeds; it leaves no output that is not complete. Limits
/// of the process's data, and of a control group, where memory runs out without an error that a program could see.
#[test]
#[ignore = "needs strace"]
fn little_memory() {
    let group_kib: &[u64] = match MemoryGroup::new(1 << 20) {
        Some(_) => &[256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 65536],
        None => {
            println!("no control group can be made here: memory is limited by RLIMIT_DATA alone");
            &[]
        }
    };
    let mut n_ended = 0;
    for writer in writers() {
        let golden = golden(writer);
        let judge = |dir: &TempDir, done: &Output| {
            intact(dir, None, &golden).and_then(|()| match done.status.success() == output(dir).is_some() {
                true => Ok(()),
                false => Err(format!("{done:?}")),
            })
        };
        let sizes: Vec<u32> = (0..40).map(|i| 512 + 256 * i).collect(); // KiB
        try_all(&sizes, |kib| {
            let dir = folder();
            let done = run_limited(writer, &dir, &format!("ulimit -d {kib}"));
            Some(format!("{} with {kib} KiB: {}", writer.name, judge(&dir, &done).err()?))
        });
        // One after the other: what is loaded belongs to the group that loaded it.
        for kib in group_kib {
            let dir = folder();
            let group = MemoryGroup::new(kib << 10).expect("a control group, as before");
            let done = run_limited(writer, &dir, &format!("echo $$ >{}/cgroup.procs", group.0.display()));
            n_ended += usize::from(!done.status.success());
            let problem = judge(&dir, &done).err();
            assert!(problem.is_none(), "{} with {kib} KiB in a group: {problem:?}", writer.name);
            let most = group_kib.last() == Some(kib);
            assert!(done.status.success() || !most, "{}: {done:?}", writer.name);
        }
    }
    println!("{n_ended} commands were ended in a control group");
    assert!(group_kib.is_empty() || n_ended > 0, "the groups limited nothing");
}

/// An output holds nothing of what was in memory before: with memory that malloc fills with other bytes it is the same.
#[test]
fn memory_does_not_leak_into_an_output() {
    for writer in writers() {
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
            output(&dir).expect("the output")
        });
        assert!(outputs[0] == outputs[1], "{}", writer.name);
    }
}

/// Without --force one is done and one is refused; with it, over an earlier output, both are done, unless they would
/// share what can be resumed.
#[test]
fn two_writers_of_one_output() {
    for writer in writers() {
        let golden = {
            let dir = folder();
            assert!(run(writer, &dir, &[], false).status.success());
            output(&dir).expect("the output")
        };
        for round in 0..8 {
            for force in [false, true] {
                let dir = folder();
                if force {
                    put_precious(writer, &dir);
                }
                let ends: Vec<Option<i32>> = std::thread::scope(|scope| {
                    let start = || scope.spawn(|| run(writer, &dir, &[], force).status.code());
                    let both = [start(), start()];
                    both.map(|t| t.join().expect("no panic")).to_vec()
                });
                let n_done = ends.iter().filter(|end| **end == Some(0)).count();
                let refused = ends.iter().filter(|end| **end == Some(2)).count();
                // The part that can be resumed is one writer's.
                let both_may = force && !(writer.resumes && refused == 1);
                let right = if both_may { n_done == 2 } else { (n_done, refused) == (1, 1) };
                assert!(right, "{}, round {round}, force {force}: {ends:?}", writer.name);
                assert!(output(&dir).expect("the output") == golden, "{}", writer.name);
                assert!(left(&dir).is_empty(), "{}: {:?}", writer.name, left(&dir));
            }
        }
    }
}

/// Whether what a command said is one error, beside warnings.
fn one_error(stderr: &str) -> bool {
    stderr.lines().filter(|l| !l.starts_with("warning: ")).count() == 1
}

/// A change to an input while the conversion runs.
type Change = (&'static str, fn(&Path));

/// strace holds the conversion before its first write; meanwhile the shard, or the GGUF file, changes.
#[test]
#[ignore = "needs strace"]
fn an_input_that_changes_during_the_conversion() {
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
    let streamed = writers().filter_map(|w| Some((w, w.streams?)));
    let cases: Vec<_> = streamed.flat_map(|(w, input)| changes.map(|change| (w, input, change))).collect();
    try_all(&cases, |(writer, input, (name, change))| {
        let dir = folder();
        let input = dir.path().join(input);
        let delay = [
            "-o/dev/null".into(),
            "-etrace=fallocate".into(),
            "-einject=fallocate:delay_exit=1500000".into(),
        ];
        let done = std::thread::scope(|scope| {
            let conversion = scope.spawn(|| run(writer, &dir, &delay, false));
            let started = std::time::Instant::now();
            while left(&dir).is_empty() && started.elapsed().as_secs() < 30 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            change(&input);
            conversion.join().expect("no panic")
        });
        let stderr = String::from_utf8_lossy(&done.stderr);
        let clean = done.status.code() == Some(3) && one_error(&stderr);
        let nothing = output(&dir).is_none() && left(&dir).iter().all(|name| writer.resumes && name == PART);
        (!clean || !nothing).then(|| format!("{}, {name}: {:?}, {stderr}", writer.name, done.status))
    });
}

/// G100 of the bad inputs: strace holds a reader between asking for the file's size and mapping it; meanwhile the file
/// shrinks.
#[test]
#[ignore = "needs strace"]
fn a_model_that_shrinks_before_it_is_mapped() {
    let readers: [&[&str]; 2] = [&["inspect"], &["run", "-p", "a", "-n", "1"]];
    let cases: Vec<_> = readers.iter().flat_map(|args| [0, 100, 4096].map(|size| (args, size))).collect();
    try_all(&cases, |(args, size)| {
        let dir = folder();
        let path = dir.path().join("m.gguf");
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", "log", "-e", "trace=openat,mmap", "-P"]).arg(&path);
        command.args(["-e", "inject=mmap:delay_enter=1500000", env!("CARGO_BIN_EXE_kestrel"), args[0]]);
        command.arg(&path).args(&args[1..]);
        command.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().expect("strace");
        let (log, started) = (dir.path().join("log"), std::time::Instant::now());
        while std::fs::read_to_string(&log).map_or(true, |log| !log.contains("m.gguf"))
            && started.elapsed().as_secs() < 30
        {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        // The file is open now, and is mapped when the delay is over.
        std::thread::sleep(std::time::Duration::from_millis(300));
        let shrunk = std::fs::File::options().write(true).open(&path).and_then(|f| f.set_len(*size));
        shrunk.expect("truncating");
        let done = child.wait_with_output().expect("the end");
        let stderr = String::from_utf8_lossy(&done.stderr);
        let mapped = std::fs::read_to_string(&log).is_ok_and(|log| log.contains("mmap("));
        let clean =
            done.status.code() == Some(3) && one_error(&stderr) && stderr.contains("Changed") && mapped;
        (!clean).then(|| format!("{args:?} to {size}: {:?}, mapped {mapped}, {stderr}", done.status))
    });
}
