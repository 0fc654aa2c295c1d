//! Better files, as a user makes them: calibrate on one text, choose types, measure on another.
#![forbid(unsafe_code)]

use serde_json::Value as Json;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(name)
}

/// A folder of a test's own, removed at its end, in which commands run.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kestrel-calibration-{test}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        // No byte of the text is in both parts.
        let text = std::fs::read(data("texts/a-tale-of-two-cities-200000.txt")).unwrap();
        let part = |range: std::ops::Range<usize>| String::from_utf8_lossy(&text[range]).into_owned();
        std::fs::write(path.join("calibration.txt"), part(0..80_000)).unwrap();
        std::fs::write(path.join("held-out.txt"), part(120_000..150_000)).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Runs `kestrel` with these words.
    fn kestrel(&self, words: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kestrel"));
        command.args(words.split(' ')).current_dir(&self.0).stdin(Stdio::null()).output().unwrap()
    }

    #[track_caller]
    fn ok(&self, words: &str) -> String {
        let output = self.kestrel(words);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), stderr.as_str()), (Some(0), ""), "{words}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The error of a run that fails.
    #[track_caller]
    fn error(&self, words: &str) -> Json {
        let output = self.kestrel(&format!("{words} --error-format json"));
        let json: Json = serde_json::from_slice(&output.stderr).unwrap_or_else(|e| panic!("{words}: {e}"));
        assert_eq!(output.status.code().map(i64::from), json["exit_status"].as_i64(), "{words}");
        json
    }

    fn kl(&self, file: &str) -> f64 {
        let json = self.ok(&format!("perplexity {file} --kl-base base.kl --json"));
        serde_json::from_str::<Json>(&json).unwrap()["mean_kl"].as_f64().unwrap()
    }

    fn n_bytes(&self, file: &str) -> u64 {
        std::fs::metadata(self.path(file)).unwrap().len()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const CALIBRATE: &str = "calibrate base.gguf -f calibration.txt -o c.gguf --chunks 24 --kl-chunks 2";

#[test]
fn a_calibrated_file_has_its_size_and_diverges_by_six_tenths() {
    let dir = Folder::new("better");
    std::os::unix::fs::symlink(data("tiny-falcon-mamba"), dir.path("tiny")).unwrap();
    dir.ok("convert tiny -o base.gguf --type f32");
    dir.ok("perplexity base.gguf -f held-out.txt --save-kl-base base.kl");
    dir.ok(CALIBRATE);

    // Beside the same type for nearly all, with nothing else changed.
    dir.ok("quantize base.gguf -o plain.gguf --type q4_k_m");
    dir.ok("quantize base.gguf -o fed.gguf --type q4_k_m --calibration c.gguf");
    dir.ok("quantize base.gguf -o best.gguf --type q4_k_m --calibration c.gguf --search best");
    let (plain, fed, best) = (dir.kl("plain.gguf"), dir.kl("fed.gguf"), dir.kl("best.gguf"));
    assert!(fed < 0.9 * plain && best < fed, "{plain} {fed} {best}");
    dir.ok("verify best.gguf --source tiny");

    // The sizes of llama-quantize's Q3_K_M, Q4_K_M and Q5_K_M, and its divergence at the second.
    for size in [3_464_800, 4_139_360, 4_774_240] {
        let options = format!("--calibration c.gguf --search best --target-size {size}");
        dir.ok(&format!("quantize base.gguf -o t{size}.gguf {options}"));
        let n_bytes = dir.n_bytes(&format!("t{size}.gguf"));
        assert!(n_bytes <= size && n_bytes * 100 >= size * 99, "{n_bytes} for {size}");
    }
    let target = dir.kl("t4139360.gguf");
    assert!(target < 0.6 * plain, "{target} instead of {plain}");
    let ours = dir.ok("inspect t4139360.gguf --json");
    let ours: Json = serde_json::from_str(&ours).unwrap();
    let metadata = |key: &str| ours["metadata"][key].clone();
    let predicted = metadata("kestrel.predicted_kl").as_f64().unwrap();
    // Of another text, without `--search best`, with f32 activations and each matrix alone.
    assert!((0.4 * target..2.5 * target).contains(&predicted), "{predicted} for {target}");
    assert!(metadata("kestrel.recipe").as_str().unwrap().ends_with("--target-size 4139360"));

    // The same file for another number of threads, from the checkpoint too as far as the tensors go.
    dir.ok("quantize base.gguf -o again.gguf --calibration c.gguf --search best --target-size 4139360 --threads 1");
    assert!(
        std::fs::read(dir.path("again.gguf")).unwrap() == std::fs::read(dir.path("t4139360.gguf")).unwrap()
    );

    // The other two goals, and what was measured.
    dir.ok("quantize base.gguf -o bpw.gguf --calibration c.gguf --target-bpw 5.0");
    let wanted = 5.0 * 6_200_064.0 / 8.0;
    assert!((0.99 * wanted..=wanted).contains(&(dir.n_bytes("bpw.gguf") as f64)));
    let planned = |options: &str| {
        let plan = dir.ok(&format!("quantize base.gguf --dry-run --calibration c.gguf {options}"));
        let predicted = plan.lines().last().unwrap().rsplit(' ').next().unwrap().parse::<f64>().unwrap();
        (plan, predicted)
    };
    let (plan, predicted) = planned("--target-kl 0.01");
    // Types are chosen in steps, of which the large matrices' are coarse.
    assert!((0.0095..=0.01).contains(&predicted), "{plan}");
    // What the user's own types cost is part of it.
    let (with_type, predicted) = planned("--target-kl 0.01 --tensor-type ssm_in=q4_k");
    assert!(with_type.contains("Q4_K") && (0.0095..=0.01).contains(&predicted), "{with_type}");
    // Written, each is about as far off as predicted, and says on a terminal what it will be.
    let done = dir.kestrel("quantize base.gguf -o kl.gguf --calibration c.gguf --target-kl 0.01 --verbose");
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(stderr.contains(plan.lines().last().unwrap()), "{stderr}");
    for (file, option) in [("bpw.gguf", "--target-bpw 5"), ("kl.gguf", "--target-kl 0.01")] {
        let metadata = dir.ok(&format!("inspect {file} --json"));
        let metadata = &serde_json::from_str::<Json>(&metadata).unwrap()["metadata"];
        let (predicted, measured) = (metadata["kestrel.predicted_kl"].as_f64().unwrap(), dir.kl(file));
        assert!((0.4 * measured..2.5 * measured).contains(&predicted), "{file}: {predicted} for {measured}");
        assert!(metadata["kestrel.recipe"].as_str().unwrap().ends_with(option), "{metadata}");
    }
    let sensitivity = dir.ok("inspect c.gguf --sensitivity");
    assert_eq!(sensitivity.lines().count(), 1 + 6 * 4 + 2, "{sensitivity}");
    let json: Json = serde_json::from_str(&dir.ok("inspect c.gguf --sensitivity --json")).unwrap();
    let of = |name: &str, ty: &str| json["mean_kl"][name][ty].as_f64().unwrap();
    assert!(of("output.weight", "Q3_K") > 10.0 * of("output.weight", "Q5_K"));
    assert!(of("blk.0.ssm_in.weight", "Q4_K") > of("blk.3.ssm_dt.weight", "Q4_K"));

    // A type that the user gives stays.
    let plan = dir.ok(
        "quantize base.gguf --dry-run --calibration c.gguf --target-size 4139360 --tensor-type ssm_dt=q8_0",
    );
    assert_eq!(plan.lines().filter(|l| l.contains("ssm_dt.weight") && l.contains(" Q8_0 ")).count(), 6);

    for (options, kind, what) in [
        ("--target-size 4139360", "Usage", "--calibration"),
        ("--type q4_k_m --search best", "Usage", "--calibration"),
        ("--calibration c.gguf --target-size 1MB", "Usage", "smallest"),
        ("--calibration c.gguf --target-kl 0.0000001", "Usage", "best file"),
        ("--calibration c.gguf --target-bpw 1", "Usage", "smallest"),
        ("--calibration c.gguf --target-size 4GX", "Usage", "GiB"),
        ("--calibration c.gguf --target-size 4MB --target-kl 1", "Usage", "cannot be used with"),
        ("--calibration c.gguf --type f16 --target-size 4139360", "Usage", "quantized"),
        ("--calibration base.gguf --type q4_k_m", "Unexpected", "kestrel calibrate"),
        ("--calibration base.kl --type q4_k_m", "BadMagic", ""),
        ("--calibration nowhere --type q4_k_m", "Io", "nowhere"),
    ] {
        let error = dir.error(&format!("quantize base.gguf -o no.gguf {options}"));
        assert_eq!(error["kind"], kind, "{options}: {error}");
        assert!(error.to_string().contains(what), "{options}: {error}");
        assert!(!dir.path("no.gguf").exists(), "{options}");
    }
}

/// A matrix is tried by reading on from its layer; a file in which it alone is quantized reads everything.
#[test]
fn divergences_are_those_of_files_with_one_matrix_quantized() {
    let dir = Folder::new("one-matrix");
    std::os::unix::fs::symlink(data("tiny-falcon-mamba"), dir.path("tiny")).unwrap();
    dir.ok("convert tiny -o base.gguf --type f32");
    dir.ok(CALIBRATE);
    dir.ok(
        "perplexity base.gguf -f calibration.txt --chunks 2 --save-kl-base base.kl --kl-base-f32 --precise",
    );
    let json: Json = serde_json::from_str(&dir.ok("inspect c.gguf --sensitivity --json")).unwrap();
    for name in ["token_embd", "output", "blk.0.ssm_in", "blk.3.ssm_x", "blk.5.ssm_out"] {
        // Nothing is multiplied by the embedding.
        let calibration = if name == "token_embd" { "" } else { " --calibration c.gguf" };
        let only = format!("--type q3_k_m --tensor-type ^{name}=q3_k --tensor-type .=f32{calibration}");
        dir.ok(&format!("quantize base.gguf -o one.gguf --force {only}"));
        let (measured, expected) = (
            json["mean_kl"][format!("{name}.weight")]["Q3_K"].as_f64().unwrap(),
            dir.kl("one.gguf --precise"),
        );
        assert!((measured / expected - 1.0).abs() < 1e-3, "{name}: {measured} instead of {expected}");
    }
}

#[test]
fn an_interrupted_calibration_goes_on() {
    let dir = Folder::new("resumed");
    std::os::unix::fs::symlink(data("tiny-falcon-mamba"), dir.path("tiny")).unwrap();
    dir.ok("convert tiny -o base.gguf --type bf16");
    let calibrate = "calibrate base.gguf -f calibration.txt -o c.gguf --chunks 2 --kl-chunks 1";
    dir.ok(calibrate);
    let whole = std::fs::read(dir.path("c.gguf")).unwrap();
    assert_eq!(dir.error(calibrate)["kind"], "OutputExists");

    // What a run leaves that was stopped before the output matrix's divergence: the last tensors are zero.
    let mut left = whole.clone();
    let n = left.len();
    let kl = n - 32..n;
    assert!(left[kl.clone()].iter().any(|&byte| byte != 0), "the last tensor is a divergence");
    left[kl].fill(0);
    left.extend([1; 5000]); // what it had set aside
    std::fs::remove_file(dir.path("c.gguf")).unwrap();
    std::fs::write(dir.path("c.gguf.part"), &left).unwrap();
    assert_eq!(dir.error(calibrate)["kind"], "OutputExists");
    assert_eq!(dir.error(&format!("{calibrate} --group 256 --resume"))["kind"], "Inconsistent");
    dir.ok(&format!("{calibrate} --resume"));
    assert!(std::fs::read(dir.path("c.gguf")).unwrap() == whole, "another file than in one run");
    assert!(!dir.path("c.gguf.part").exists());
}

/// The part is bounded, however many windows the divergence is measured on: what the model predicts there, 100 MB, is not
/// kept in memory. RLIMIT_DATA bounds all that a process has beside mapped files.
#[test]
fn calibrating_on_many_windows_takes_no_more_memory() {
    let dir = Folder::new("windows");
    std::os::unix::fs::symlink(data("tiny-falcon-mamba"), dir.path("tiny")).unwrap();
    dir.ok("convert tiny -o base.gguf --type bf16");
    let calibrate = "calibrate base.gguf -f calibration.txt -o c.gguf --chunks 24 --threads 2";
    dir.ok(&format!("{calibrate} --kl-chunks 1"));
    // All but the last matrix is measured.
    let mut left = std::fs::read(dir.path("c.gguf")).unwrap();
    let n = left.len();
    left[n - 32..].fill(0);
    let limited = |mib: usize| {
        std::fs::write(dir.path("c.gguf.part"), &left).unwrap();
        let script = format!(
            "ulimit -c 0; ulimit -d {}; exec \"$0\" {calibrate} --kl-chunks 24 --resume --force",
            mib << 10
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_kestrel")]).current_dir(&dir.0).stdin(Stdio::null());
        shell.output().unwrap()
    };
    let done = limited(80);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(!limited(10).status.success(), "the limit limits nothing");
}

/// Killed or interrupted in the middle, a conversion goes on to the same bytes.
#[test]
fn an_interrupted_conversion_with_a_calibration_goes_on() {
    let dir = Folder::new("conversion");
    std::os::unix::fs::symlink(data("tiny-falcon-mamba"), dir.path("tiny")).unwrap();
    dir.ok("convert tiny -o base.gguf --type bf16");
    dir.ok("calibrate base.gguf -f calibration.txt -o c.gguf --chunks 2 --kl-chunks 0");
    let convert = "convert tiny -o x.gguf --type q4_k_m --calibration c.gguf --search best --threads 1";
    dir.ok(convert);
    let whole = std::fs::read(dir.path("x.gguf")).unwrap();
    assert_eq!(dir.error(&format!("{convert} --resume"))["kind"], "OutputExists");
    assert_eq!(dir.error("convert tiny -o y.gguf --type q4_k_m --resume")["kind"], "Usage");
    for (signal, status) in [("KILL", None), ("INT", Some(130))] {
        // It can be done before the signal comes, or have done nothing yet; then the next try.
        let went_on = (0..20).any(|round| {
            std::fs::remove_file(dir.path("x.gguf")).unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_kestrel"));
            command.args(convert.split(' ')).current_dir(&dir.0).stdin(Stdio::null()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            while child.try_wait().unwrap().is_none() && !dir.path("x.gguf.part").exists() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            std::thread::sleep(std::time::Duration::from_millis(20 << round.min(5)));
            Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).output().unwrap();
            let ended = child.wait().unwrap();
            if ended.success() {
                return false;
            }
            assert_eq!(ended.code(), status, "{signal}");
            let resumed = dir.kestrel(&format!("{convert} --resume --verbose"));
            let stderr = String::from_utf8_lossy(&resumed.stderr);
            assert!(resumed.status.success(), "{signal}: {stderr}");
            assert!(std::fs::read(dir.path("x.gguf")).unwrap() == whole, "{signal}: another file");
            assert!(!dir.path("x.gguf.part").exists());
            stderr.contains("from an interrupted run")
        });
        assert!(went_on, "{signal}: 20 conversions, none of which was interrupted in the middle");
    }
}
