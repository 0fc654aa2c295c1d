//! A model file that changes while text is generated from it: truncated, overwritten or replaced. Each ends in one line
//! and exit status 3, and no text that was not the model's is printed before.
#![forbid(unsafe_code)]

use kestrel_tests::running::convert;
use kestrel_tests::temp_dir::TempDir;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny-falcon-mamba")
}

fn model(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("m.gguf");
    convert(&tiny(), "q8_0", &path);
    path
}

/// Starts to generate and waits for the first byte.
fn generating(model: &Path, n_tokens: &str, more: &[&str]) -> (Child, u8) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kestrel"))
        .args(["run", "-p", "It was the", "--temp", "0", "--ignore-eos", "-n", n_tokens])
        .args(more)
        .arg(model)
        .env_remove("KESTREL_ISA")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut first = [0];
    child.stdout.as_mut().expect("piped").read_exact(&mut first).expect("streamed text");
    (child, first[0])
}

/// The text that came after the first byte, and the one line on stderr, of a run that ended with status 3.
fn ended(child: Child) -> (String, String) {
    let Output { status, stdout, stderr } = child.wait_with_output().expect("the end");
    let stderr = String::from_utf8(stderr).expect("UTF-8");
    assert_eq!(status.code(), Some(3), "{status}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    (String::from_utf8(stdout).expect("UTF-8"), stderr)
}

/// What an undisturbed run prints.
fn text(model: &Path, n_tokens: &str) -> String {
    let (child, first) = generating(model, n_tokens, &[]);
    let output = child.wait_with_output().expect("the end");
    assert_eq!(output.status.code(), Some(0));
    format!("{}{}", first as char, String::from_utf8(output.stdout).expect("UTF-8"))
}

/// More tokens than a test waits for.
const FOREVER: &str = "100000000";

/// Changes the model while text is generated without end; the text before is the model's own.
fn changed_by(change: impl Fn(&File), says: &str, more: &[&str]) -> String {
    let dir = TempDir::new();
    let path = model(&dir);
    let (child, first) = generating(&path, FOREVER, more);
    change(&File::options().write(true).open(&path).expect("the model"));
    let (rest, line) = ended(child);
    assert!(line.contains(says) && line.contains(&*path.to_string_lossy()), "{line}");
    std::fs::remove_file(&path).expect("the changed model");
    let generated = format!("{}{rest}", first as char);
    // Greedy, so that it is always the same; some tokens more than what was printed.
    let whole = text(&model(&dir), &(generated.len() + 8).to_string());
    assert!(whole.starts_with(&generated), "{generated:?} is not how {whole:?} begins");
    line
}

#[test]
fn a_truncated_model_ends_in_one_line() {
    for n_bytes in [0, 4096, 1 << 20] {
        changed_by(|file| file.set_len(n_bytes).expect("truncating"), "meanwhile", &[]);
    }
    for threads in ["1", "3"] {
        changed_by(|file| file.set_len(0).expect("truncating"), "meanwhile", &["--threads", threads]);
    }
}

#[test]
fn the_line_is_json_if_asked_for() {
    let line =
        changed_by(|file| file.set_len(0).expect("truncating"), "meanwhile", &["--error-format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&line).expect("one JSON object");
    assert_eq!((json["kind"].as_str(), json["exit_status"].as_u64()), (Some("Changed"), Some(3)), "{line}");
}

#[test]
fn an_overwritten_model_ends_in_one_line() {
    let zeros = |file: &File| file.write_all_at(&[0; 1 << 16], 2 << 20).expect("overwriting");
    changed_by(zeros, "written to meanwhile", &[]);
}

/// The old file stays until the last process lets go of it, so the text is the old model's to its end.
#[test]
fn a_replaced_model_is_told_at_the_end() {
    let dir = TempDir::new();
    let path = model(&dir);
    let whole = text(&path, "300");
    let other = dir.path().join("other.gguf");
    convert(&tiny(), "q4_0", &other);
    let (child, first) = generating(&path, "300", &[]);
    std::fs::rename(&other, &path).expect("replacing the model");
    let (rest, line) = ended(child);
    assert!(line.contains("another file in its place"), "{line}");
    assert_eq!(format!("{}{rest}", first as char), whole);
}

#[test]
fn a_removed_model_makes_no_difference() {
    let dir = TempDir::new();
    let path = model(&dir);
    let whole = text(&path, "100");
    let (child, first) = generating(&path, "100", &[]);
    std::fs::remove_file(&path).expect("removing the model");
    let output = child.wait_with_output().expect("the end");
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
    assert_eq!(format!("{}{}", first as char, String::from_utf8(output.stdout).expect("UTF-8")), whole);
}

/// A bus error that has nothing to do with a map is none of ours: it kills the process as before.
#[test]
fn other_bus_errors_are_left_alone() {
    let dir = TempDir::new();
    let (mut child, _) = generating(&model(&dir), FOREVER, &[]);
    let kill = Command::new("sh").arg("-c").arg(format!("kill -BUS {}", child.id())).status().expect("kill");
    assert!(kill.success());
    let status = child.wait().expect("the end");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(7), "{status}");
}
