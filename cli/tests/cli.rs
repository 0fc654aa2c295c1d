//! The binary as users and scripts meet it: child processes, their exit status, stdout and stderr.
#![forbid(unsafe_code)]

use serde_json::Value as Json;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const COMMANDS: [&str; 13] = [
    "demo",
    "convert",
    "quantize",
    "inspect",
    "run",
    "logits",
    "tokenize",
    "bench",
    "perplexity",
    "imatrix",
    "eval",
    "diff",
    "verify",
];

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny-falcon-mamba")
}

/// A folder of a test's own, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kestrel-cli-{test}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Names in the folder, hidden ones included.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The tiny model as a GGUF of this type.
    fn convert(&self, ty: &str) -> PathBuf {
        let out = self.path(&format!("{ty}.gguf"));
        ok(kestrel(args!["convert", tiny(), "-o", out, "--type", ty]));
        out
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A list of arguments of different string types.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { vec![$(AsRef::<OsStr>::as_ref(&$arg).to_owned()),*] };
}
use args;

fn command<S: AsRef<OsStr>>(args: Vec<S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kestrel"));
    command.args(args).stdin(Stdio::null()).env_remove("KESTREL_ISA");
    command
}

fn kestrel<S: AsRef<OsStr>>(args: Vec<S>) -> Output {
    command(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// stdout of a run that has to succeed and, stderr being no terminal, to be quiet.
#[track_caller]
fn ok(output: Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    String::from_utf8(output.stdout).unwrap()
}

/// The one JSON object on stderr of a run that has to fail, with nothing on stdout and the status it names.
#[track_caller]
fn error(mut args: Vec<std::ffi::OsString>) -> Json {
    args.extend(args!["--error-format", "json"]);
    let shown = format!("{args:?}");
    check_error(kestrel(args), &shown)
}

#[track_caller]
fn check_error(output: Output, shown: &str) -> Json {
    assert!(output.stdout.is_empty(), "{shown}: something on stdout");
    let text = stderr(&output);
    assert_eq!(text.lines().count(), 1, "{shown}: {text}");
    let json: Json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{shown}: {e}: {text}"));
    assert_eq!(output.status.code().map(i64::from), json["exit_status"].as_i64(), "{shown}: {text}");
    json
}

#[test]
fn every_help_has_an_example() {
    for name in COMMANDS {
        let help = ok(kestrel(args![name, "--help"]));
        assert!(help.contains("Example:\n  "), "{name}: {help}");
        assert!(help.contains(&format!("kestrel {name}")), "{name}: the example is of another command");
    }
    let top = ok(kestrel(args!["--help"]));
    assert!(top.contains("Example:"));
    for name in COMMANDS {
        assert!(top.contains(&format!("\n  {name} ")), "{name} is not listed");
    }
    assert_eq!(ok(kestrel(args!["--version"])), format!("kestrel {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn misuse_of_arguments_is_a_usage_error() {
    let t = tiny();
    let cases = [
        args![],
        args!["frobnicate"],
        args!["convert"],
        args!["convert", t, "--type", "q4_k_m"],
        args!["convert", t, "-o", "x.gguf"],
        args!["convert", t, "-o", "x.gguf", "--type", "q9_x"],
        args!["convert", t, "--dry-run", "--type", "q4_k_m", "--tensor-type", "ssm_x"],
        args!["convert", t, "--dry-run", "--type", "q4_k_m", "--tensor-type", "ssm_x=q9"],
        args!["convert", t, "--dry-run", "--type", "q4_k_m", "--tensor-type", "(=q8_0"],
        args!["convert", t, "--dry-run", "--type", "q4_k_m", "--tensor-type", "=q8_0"],
        args!["convert", t, "--dry-run", "--type", "q4_k_m", "--threads", "0"],
        args!["convert", t, "-o", "/", "--type", "q4_k_m"],
        args!["run", t],
        args!["run", t, "-p", "a", "-f", "b"],
        args!["run", t, "-p", ""],
        args!["run", t, "-p", "a", "-n", "-1"],
        args!["run", t, "-p", "a", "-n", "many"],
        args!["run", t, "-p", "a", "-n", "4294967296"],
        args!["run", t, "-p", "a", "--temp", "-1"],
        args!["run", t, "-p", "a", "--temp", "nan"],
        args!["run", t, "-p", "a", "--top-p", "1.5"],
        args!["run", t, "-p", "a", "--min-p", "inf"],
        args!["run", t, "-p", "a", "--repeat-penalty", "0"],
        args!["run", t, "-p", "a", "--seed", "-3"],
        args!["run", t, "-p", "a", "--stop", ""],
        args!["run", t, "-p", "a", "--load-in-4bit", "--load-in-8bit"],
        args!["run", t, "-p", "a", "--force"],
        args!["logits", t, "--tokens", "", "-o", "x.npy"],
        args!["logits", t, "--tokens", "1,x", "-o", "x.npy"],
        args!["tokenize", t],
        args!["perplexity", t, "-f", "x", "--ctx", "1"],
        args!["perplexity", t, "-f", "x", "--chunks", "0"],
        args!["perplexity", t, "-f", "x", "--kl-base", "a", "--save-kl-base", "b"],
        args!["perplexity", t],
        args!["perplexity", t, "-f", "x", "--kl-base-f32"],
        args!["imatrix", t, "-f", "x"],
        args!["imatrix", t, "-f", "x", "-o", "y", "-c", "0"],
        args!["eval", t],
        args!["eval", t, "--requests", "x", "--max-length", "0"],
        args!["diff", "x"],
        args!["bench", t, "-r", "0"],
        args!["bench", t, "--threads", "0"],
        args!["bench", t, "--threads", "1,"],
        args!["bench", t, "--threads", "1,x"],
        args!["bench", t, "--depth", "-1"],
    ];
    for args in cases {
        let shown = format!("{args:?}");
        let json = error(args);
        assert_eq!(
            (json["kind"].as_str(), json["exit_status"].as_i64()),
            (Some("Usage"), Some(2)),
            "{shown}"
        );
    }
}

#[test]
fn an_unknown_type_is_answered_with_the_types() {
    let output = kestrel(args!["convert", tiny(), "--dry-run", "--type", "q4_k_x"]);
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(["f32", "bf16", "q4_k_m", "iq4_xs"].iter().all(|ty| text.contains(ty)), "{text}");
}

#[test]
fn what_is_no_model_is_named() {
    let folder = Folder::new("no-model");
    let (text, empty, truncated) =
        (folder.path("text.gguf"), folder.path("empty.gguf"), folder.path("cut.gguf"));
    std::fs::write(&text, "just some text, long enough for a header").unwrap();
    std::fs::write(&empty, "").unwrap();
    std::fs::write(&truncated, b"GGUF\x03\0\0\0\x01\0\0\0").unwrap();
    let missing = folder.path("missing.gguf");
    let cases = [
        (&missing, "Missing"),
        (&folder.0, "Missing"),
        (&text, "BadMagic"),
        (&empty, "Truncated"),
        (&truncated, "Truncated"),
        (&PathBuf::from("/dev/zero"), "NotRegularFile"),
    ];
    for (path, kind) in cases {
        let commands = [
            args!["inspect", path],
            args!["run", path, "-p", "a"],
            args!["tokenize", path, "-p", "a"],
            args!["logits", path, "--tokens", "1", "-o", folder.path("x.npy")],
            args!["bench", path],
            args!["convert", path, "-o", folder.path("x.gguf"), "--type", "q8_0"],
            args!["quantize", path, "-o", folder.path("x.gguf"), "--type", "q8_0"],
            args!["verify", path, "--source", tiny()],
            args!["verify", path, "--source", path],
            args!["demo", "--model", path],
        ];
        for args in commands {
            let shown = format!("{args:?}");
            let json = error(args);
            assert_eq!(json["kind"], kind, "{shown}: {json}");
            assert_eq!(json["file"].as_str().map(Path::new), Some(path.as_path()), "{shown}: {json}");
        }
    }
    assert_eq!(folder.names(), ["cut.gguf", "empty.gguf", "text.gguf"]);
}

#[test]
fn the_usual_mixups_get_a_hint() {
    let folder = Folder::new("hints");
    let gguf = folder.convert("q8_0");
    let out = folder.path("out.gguf");
    let cases = [
        (args!["inspect", "tiiuae/falcon-mamba-7b"], "hf download tiiuae/falcon-mamba-7b"),
        (args!["run", folder.0, "-p", "a"], "q8_0.gguf"),
        (args!["convert", gguf, "-o", out, "--type", "q4_0"], "kestrel quantize"),
        (args!["quantize", tiny(), "-o", out, "--type", "q4_0"], "kestrel convert"),
        (args!["run", gguf, "-p", "a", "--load-in-4bit"], "kestrel quantize"),
        (args!["convert", tiny(), "-o", gguf, "--type", "q4_0"], "--force"),
        (args!["verify", tiny(), "--source", tiny()], "--source"),
    ];
    for (args, hint) in cases {
        let shown = format!("{args:?}");
        let json = error(args);
        assert!(json["hint"].as_str().unwrap_or_default().contains(hint), "{shown}: {json}");
    }
    assert_eq!(folder.names(), ["q8_0.gguf"]);
}

#[test]
fn an_unknown_instruction_set_is_an_error() {
    for name in ["sse9", "AVX2", ""] {
        let args = args!["run", tiny(), "-p", "a", "-n", "1", "--error-format", "json"];
        let output = command(args).env("KESTREL_ISA", name).output().unwrap();
        let json = check_error(output, name);
        assert_eq!(
            (json["kind"].as_str(), json["what"].as_str()),
            (Some("Usage"), Some("KESTREL_ISA")),
            "{json}"
        );
    }
}

#[test]
fn convert_inspect_verify_run_logits_and_tokenize_work_together() {
    let folder = Folder::new("path");
    let gguf = folder.path("tiny.gguf");
    assert_eq!(
        ok(kestrel(args!["convert", tiny(), "-o", gguf, "--type", "Q4_K_M"])),
        "",
        "the result is the file"
    );

    let inspected: Json = serde_json::from_str(&ok(kestrel(args!["inspect", gguf, "--json"]))).unwrap();
    assert_eq!(inspected["metadata"]["general.architecture"], "mamba");
    assert_eq!(inspected["tensors"].as_array().unwrap().len(), 63);
    assert_eq!(inspected["totals"]["Q6_K"]["n_tensors"], 1);
    assert_eq!(inspected["file_bytes"], std::fs::metadata(&gguf).unwrap().len());
    let text = ok(kestrel(args!["inspect", gguf]));
    assert!(text.contains("blk.5.ssm_out.weight") && text.contains("bits per weight"), "{text}");
    assert!(ok(kestrel(args!["inspect", tiny()])).contains("backbone.layers.0.mixer.A_log"));

    let verified: Json =
        serde_json::from_str(&ok(kestrel(args!["verify", gguf, "--source", tiny(), "--json"]))).unwrap();
    assert_eq!(verified["ok"], true);
    assert_eq!(verified["tensors"].as_array().unwrap().len(), 63);

    let run = |n: &str, extra: &[&str]| {
        let mut args = args!["run", gguf, "-p", "It was the", "-n", n, "--seed", "5"];
        args.extend(extra.iter().map(|a| a.into()));
        ok(kestrel(args))
    };
    let drawn = run("12", &[]);
    assert!(!drawn.is_empty());
    assert_eq!(drawn, run("12", &[]), "one seed, one text");
    assert_eq!(run("12", &["--echo"]), format!("It was the{drawn}"));
    assert_eq!(run("0", &[]), "");
    let first = drawn.chars().nth(3).unwrap().to_string();
    assert_eq!(run("12", &["--stop", &first]), drawn.split(&first).next().unwrap());

    let ids = ok(kestrel(args!["tokenize", gguf, "-p", "It was the"]));
    let parsed: Vec<u32> = serde_json::from_str(&ids).unwrap();
    assert!(!parsed.is_empty());
    assert_eq!(ids, ok(kestrel(args!["tokenize", tiny(), "-p", "It was the", "--json"])), "the folder's ids");

    let npy = folder.path("l.npy");
    assert_eq!(ok(kestrel(args!["logits", gguf, "--tokens", ids.trim(), "-o", npy])), "");
    let bytes = std::fs::read(&npy).unwrap();
    assert_eq!(bytes.len(), 128 + 4 * 4096 * parsed.len());
    let last = bytes[bytes.len() - 4 * 4096..].chunks_exact(4);
    let last: Vec<f32> = last.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
    let greedy = run("1", &["--temp", "0"]);
    let with_greedy = ok(kestrel(args!["tokenize", gguf, "-p", format!("It was the{greedy}")]));
    assert_eq!(serde_json::from_str::<Vec<usize>>(&with_greedy).unwrap().last(), Some(&best));
    assert_eq!(folder.names(), ["l.npy", "tiny.gguf"]);
}

#[test]
fn an_existing_output_stays_unless_forced() {
    let folder = Folder::new("force");
    let out = folder.path("out");
    let text = folder.path("text");
    std::fs::write(&text, "It was the best of times, it was the worst of times, it was the age.".repeat(4))
        .unwrap();
    let commands = [
        args!["convert", tiny(), "-o", out, "--type", "q8_0"],
        args!["logits", tiny(), "--tokens", "1", "-o", out],
        args!["run", tiny(), "-p", "a", "-n", "1", "--save-state", out],
        args!["perplexity", tiny(), "-f", text, "--ctx", "16", "--chunks", "1", "--save-kl-base", out],
        args!["imatrix", tiny(), "-f", text, "--ctx", "16", "--chunks", "1", "-o", out],
    ];
    for mut args in commands {
        std::fs::write(&out, "precious").unwrap();
        let json = error(args.clone());
        assert_eq!(json["kind"], "OutputExists", "{args:?}");
        assert_eq!(std::fs::read(&out).unwrap(), b"precious");
        args.push("--force".into());
        ok(kestrel(args.clone()));
        assert_ne!(std::fs::read(&out).unwrap(), b"precious", "{args:?}");
    }
    assert_eq!(folder.names(), ["out", "text"]);
}

#[test]
fn a_dry_run_says_what_the_run_then_does() {
    let folder = Folder::new("dry");
    let plan =
        ok(kestrel(args!["convert", tiny(), "--type", "iq4_xs", "--dry-run", "--tensor-type", "ssm_x=q8_0"]));
    let ssm_x = plan.lines().find(|l| l.contains("blk.3.ssm_x.weight")).unwrap();
    assert!(
        ssm_x.contains("backbone.layers.3.mixer.x_proj.weight") && ssm_x.contains("BF16  Q8_0"),
        "{ssm_x}"
    );
    let out = folder.path("x.gguf");
    ok(kestrel(args!["convert", tiny(), "-o", out, "--type", "iq4_xs", "--tensor-type", "ssm_x=q8_0"]));
    let file_bytes = std::fs::metadata(&out).unwrap().len();
    assert!(plan.contains(&format!("write: {file_bytes} bytes")), "{plan}");
}

#[test]
fn a_state_goes_on_where_it_was_saved() {
    let folder = Folder::new("state");
    let (gguf, state) = (folder.convert("q8_0"), folder.path("s.state"));
    let greedy = |extra: Vec<std::ffi::OsString>| {
        let mut args = args!["run", gguf, "--temp", "0"];
        args.extend(extra);
        ok(kestrel(args))
    };
    let whole = greedy(args!["-p", "She had heard her and", "-n", "8"]);
    assert_eq!(greedy(args!["-p", "She had heard", "-n", "0", "--save-state", state]), "");
    assert_eq!(greedy(args!["-p", " her and", "-n", "8", "--load-state", state]), whole);

    let mut bytes = std::fs::read(&state).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&state, bytes).unwrap();
    let json = error(args!["run", gguf, "-p", "a", "--load-state", state]);
    assert_eq!(
        (json["kind"].as_str(), json["file"].as_str()),
        (Some("Inconsistent"), state.to_str()),
        "{json}"
    );
}

#[test]
fn a_folder_runs_directly_and_quantized_in_memory() {
    let run = |flag: Option<&str>| {
        let mut args = args!["run", tiny(), "-p", "It was", "-n", "6", "--temp", "0"];
        args.extend(flag.map(Into::into));
        ok(kestrel(args))
    };
    assert!(!run(None).is_empty());
    assert_eq!(run(None), run(Some("--load-in-8bit")), "six greedy tokens do not change at 8 bits");
    assert!(!run(Some("--load-in-4bit")).is_empty());
}

#[test]
fn bitsandbytes_folders_are_written_inspected_and_run() {
    let dir = Folder::new("bnb");
    let out = dir.path("nf4");
    let write = || args!["convert", tiny(), "-o", out, "--type", "bnb-nf4", "--compute-dtype", "bfloat16"];
    ok(kestrel(write()));
    assert_eq!(dir.names(), ["nf4"]);
    assert_eq!(error(write())["kind"], "OutputExists");
    let mut again = write();
    again.extend(args!["--force", "--double-quant"]);
    ok(kestrel(again));

    let inspected: Json = serde_json::from_str(&ok(kestrel(args!["inspect", out, "--json"]))).unwrap();
    assert_eq!(inspected["totals"]["NF4"]["n_tensors"], 24);
    assert_eq!(inspected["metadata"]["quantization_config"]["bnb_4bit_compute_dtype"], "bfloat16");
    let packed = inspected["tensors"].as_array().unwrap().iter().find(|t| t["type"] == "NF4").unwrap();
    let bits = packed["bits_per_weight"].as_f64().unwrap();
    assert!((4.125..4.13).contains(&bits), "{bits}");
    assert!(packed["quantization"].as_str().unwrap().contains("scales in blocks of 256"), "{packed}");

    let run = |args: Vec<std::ffi::OsString>| {
        ok(kestrel([args, args!["-p", "It was", "-n", "6", "--temp", "0"]].concat()))
    };
    let at_load = args!["--load-in-4bit", "--bnb-4bit-quant-type", "nf4", "--bnb-4bit-use-double-quant"];
    assert_eq!(run(args!["run", out]), run([args!["run", tiny()], at_load].concat()));
    assert!(!run(args!["run", tiny(), "--load-in-8bit", "--quant-type", "int8"]).is_empty());

    let gguf = dir.path("x.gguf");
    let warned = kestrel(args!["convert", out, "-o", gguf, "--type", "q8_0"]);
    assert_eq!(warned.status.code(), Some(0));
    assert!(stderr(&warned).contains("24 tensors are quantized already"), "{}", stderr(&warned));
    ok(kestrel(args!["verify", gguf, "--source", out]));
    let other = dir.path("other");
    for usage in [
        args!["convert", tiny(), "-o", other, "--type", "bnb-nf4", "--blocksize", "48"],
        args!["convert", tiny(), "-o", other, "--type", "bnb-int8", "--double-quant"],
        args!["convert", tiny(), "-o", other, "--type", "q8_0", "--blocksize", "64"],
        args!["convert", tiny(), "-o", other, "--type", "bnb-fp4", "--tensor-type", "x=q8_0"],
        args!["quantize", gguf, "-o", other, "--type", "bnb-nf4"],
        args!["run", tiny(), "-p", "a", "--bnb-4bit-quant-type", "nf4"],
        args!["run", tiny(), "-p", "a", "--load-in-4bit", "--bnb-4bit-use-double-quant"],
    ] {
        assert_eq!(error(usage)["kind"], "Usage");
    }
    assert_eq!(dir.names(), ["nf4", "x.gguf"]);
}

#[test]
fn perplexity_and_divergence_come_as_numbers() {
    let folder = Folder::new("perplexity");
    let corpus = std::fs::read(tiny().join("../texts/a-tale-of-two-cities-200000.txt")).unwrap();
    let (text, base) = (folder.path("text"), folder.path("base.kl"));
    std::fs::write(&text, &corpus[100_000..106_000]).unwrap();
    let ppl = |model: PathBuf, extra: Vec<std::ffi::OsString>| -> Json {
        let mut args = args!["perplexity", model, "-f", text, "--ctx", "128", "--chunks", "4", "--json"];
        args.extend(extra);
        serde_json::from_str(&ok(kestrel(args))).unwrap()
    };
    let of_base = ppl(tiny(), args!["--save-kl-base", base]);
    assert_eq!(of_base["n_scored"], 4 * 63);
    let number = |json: &Json, key: &str| json[key].as_f64().unwrap_or_else(|| panic!("{key}: {json}"));
    let p = number(&of_base, "perplexity");
    assert!((20.0..120.0).contains(&p), "{p}");
    let q4 = folder.convert("q4_0");
    let of_q4 = ppl(q4.clone(), args!["--kl-base", base]);
    let kl = number(&of_q4, "mean_kl");
    assert!((0.002..0.05).contains(&kl), "{kl}");
    let ratio = number(&of_q4, "perplexity") / p;
    assert!((number(&of_q4, "perplexity_ratio") - ratio).abs() < 1e-5 * ratio);
    for key in ["mean_kl", "median_kl", "p99_kl", "same_top1", "rms_change", "perplexity_ratio"] {
        let (value, error) = (number(&of_q4, key), number(&of_q4, &format!("{key}_stderr")));
        assert!(value > 0.0 && error > 0.0 && error < value, "{key}: {value} ± {error}");
    }
    assert!(number(&of_q4, "median_kl") < kl && kl < number(&of_q4, "p99_kl"));
    assert!(number(&of_q4, "p99_kl") <= number(&of_q4, "max_kl"));

    // A base in 32 bits says the same within the rounding of one in 16, and neither text nor window need to be given.
    let exact = folder.path("exact.kl");
    ppl(tiny(), args!["--save-kl-base", exact, "--kl-base-f32"]);
    let size = |path: &Path| std::fs::metadata(path).unwrap().len();
    assert_eq!(
        (size(&base), size(&exact)),
        (20 + 512 * 4 + 252 * 2 * (4096 + 4), 24 + 512 * 4 + 252 * 4 * 4096)
    );
    let from = |base: &Path, extra: Vec<std::ffi::OsString>| -> Json {
        let args = [args!["perplexity", q4, "--json", "--kl-base", base], extra].concat();
        serde_json::from_str(&ok(kestrel(args))).unwrap()
    };
    assert_eq!(from(&base, args![]), of_q4);
    let of_exact = from(&exact, args![]);
    assert!((number(&of_exact, "mean_kl") - kl).abs() < 2e-3 * kl, "{kl} and {of_exact}");
    assert_eq!(from(&base, args!["--chunks", "1"])["n_scored"], 63);
    let json: Json =
        serde_json::from_str(&ok(kestrel(args!["perplexity", tiny(), "--json", "--kl-base", exact])))
            .unwrap();
    assert!(number(&json, "mean_kl").abs() < 1e-9, "a model from itself: {json}");

    let json = error(args!["perplexity", tiny(), "-f", text, "--ctx", "64", "--kl-base", base]);
    assert_eq!(json["kind"], "Inconsistent", "another window: {json}");
    let other = folder.path("other");
    std::fs::write(&other, &corpus[..6_000]).unwrap();
    let json = error(args!["perplexity", tiny(), "-f", other, "--kl-base", base]);
    assert_eq!(json["kind"], "Inconsistent", "another text: {json}");
    let json = error(args!["perplexity", tiny(), "-f", text, "--kl-base", text]);
    assert_eq!(json["kind"], "BadMagic", "{json}");
}

/// What an interrupted run leaves has the form of a result, so that a shorter run's result stands for it here.
#[test]
fn an_importance_matrix_goes_on_where_it_was_interrupted() {
    let folder = Folder::new("imatrix");
    let text = tiny().join("../texts/a-tale-of-two-cities-200000.txt");
    let (whole, out, part) = (folder.path("whole"), folder.path("out"), folder.path("out.part"));
    let run = |out: &Path, extra: Vec<std::ffi::OsString>| {
        [args!["imatrix", tiny(), "-f", text, "-c", "64", "-o", out], extra].concat()
    };
    ok(kestrel(run(&whole, args!["--chunks", "5"])));
    ok(kestrel(run(&part, args!["--chunks", "2"])));
    let json = error(run(&out, args!["--chunks", "5"]));
    assert_eq!(
        (json["kind"].as_str(), json["file"].as_str()),
        (Some("OutputExists"), part.to_str()),
        "{json}"
    );
    for other in [args!["--chunks", "1", "--resume"], args!["--chunks", "5", "--resume", "-c", "32"]] {
        let command: Vec<std::ffi::OsString> = run(&out, other);
        // The later -c would be a usage error; the first is left out.
        let command = if command.iter().filter(|a| *a == "-c").count() == 2 {
            [&command[..4], &command[6..]].concat()
        } else {
            command
        };
        assert_eq!(error(command)["kind"], "Inconsistent");
    }
    ok(kestrel(run(&out, args!["--chunks", "5", "--resume"])));
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&whole).unwrap());
    assert_eq!(folder.names(), ["out", "whole"]);
    // Where nothing was interrupted, --resume begins.
    ok(kestrel(run(&out, args!["--chunks", "5", "--resume", "--force"])));
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&whole).unwrap());

    let gguf = folder.path("x.gguf");
    ok(kestrel(args!["convert", tiny(), "-o", gguf, "--type", "q3_k_m", "--imatrix", out]));
    let file: Json = serde_json::from_str(&ok(kestrel(args!["inspect", gguf, "--json"]))).unwrap();
    assert_eq!(file["metadata"]["quantize.imatrix.file"].as_str(), out.to_str());
    assert_eq!(file["metadata"]["quantize.imatrix.dataset"].as_str(), text.to_str());
    assert_eq!(file["metadata"]["quantize.imatrix.entries_count"], 25);
    assert_eq!(file["metadata"]["quantize.imatrix.chunks_count"], 5);
}

#[test]
fn continuations_and_whole_texts_are_scored() {
    let folder = Folder::new("eval");
    let requests = folder.path("requests");
    let lines = [
        r#"{"context": "It was the", "continuation": " best of times"}"#,
        r#"{"context": "It was the ", "continuation": "best of times"}"#,
        r#"{"rolling": "It was the best of times"}"#,
        r#"{"rolling": ""}"#,
    ];
    std::fs::write(&requests, lines.join("\n")).unwrap();
    let out = ok(kestrel(args!["eval", tiny(), "--requests", requests]));
    let found: Vec<Json> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(found.len(), 4);
    assert_eq!(found[0], found[1], "white space belongs to the continuation");
    assert_eq!(found[3], serde_json::json!({"loglikelihood": 0.0, "is_greedy": true, "n_tokens": 0}));
    let (pair, all) =
        (found[0]["loglikelihood"].as_f64().unwrap(), found[2]["loglikelihood"].as_f64().unwrap());
    assert!(all < pair && pair < 0.0, "{out}");
    assert_eq!(found[0]["is_greedy"], false);
    let json = error(args!["eval", tiny(), "--requests", requests, "--max-length", "1"]);
    assert_eq!(json["kind"], "Limit", "{json}");
}

#[test]
fn two_files_side_by_side() {
    let folder = Folder::new("diff");
    let (q8, q4) = (folder.convert("q8_0"), folder.convert("q4_k_m"));
    let same: Json = serde_json::from_str(&ok(kestrel(args!["diff", q8, q8, "--json"]))).unwrap();
    let all = |json: &Json, of: &str| json[of].as_array().unwrap().clone();
    assert!(all(&same, "metadata").iter().all(|key| key["same"] == true));
    assert!(all(&same, "tensors").iter().all(|t| t["rmse"] == 0.0));
    assert!(ok(kestrel(args!["diff", q8, q8])).contains("0 of 63 tensors differ"));

    let json: Json = serde_json::from_str(&ok(kestrel(args!["diff", q8, q4, "--json"]))).unwrap();
    let differ: Vec<_> = all(&json, "metadata").into_iter().filter(|k| k["same"] == false).collect();
    assert_eq!(differ.len(), 2, "file type and recipe: {differ:?}");
    let tensors = all(&json, "tensors");
    let find = |name: &str| tensors.iter().find(|t| t["name"] == name).unwrap();
    let ssm_in = find("blk.1.ssm_in.weight");
    assert_eq!((&ssm_in["a"]["type"], &ssm_in["b"]["type"]), (&"Q8_0".into(), &"Q4_K".into()));
    let relative = ssm_in["relative_rmse"].as_f64().unwrap();
    assert!((0.05..0.12).contains(&relative), "{relative}");
    assert_eq!(find("output_norm.weight")["max_abs"], 0.0);
    let shown = ok(kestrel(args!["diff", q8, q4, "--threads", "3"]));
    assert!(shown.contains("26 of 63 tensors differ") && shown.contains("kestrel.recipe"), "{shown}");

    // A file that has nothing in common with it.
    let other = tiny().join("../imatrix/tiny.gguf");
    let json: Json = serde_json::from_str(&ok(kestrel(args!["diff", q8, other, "--json"]))).unwrap();
    let tensors = all(&json, "tensors");
    assert_eq!(tensors.len(), 63 + 48);
    assert!(tensors[0]["b"].is_null() && tensors[63]["a"].is_null() && tensors[0]["rmse"].is_null());
}

const BENCH_FIGURES: [&str; 11] = [
    "prefill_tok_s",
    "decode_tok_s",
    "decode_gb_s",
    "prefill_gmac_s",
    "read_gb_s",
    "read_between_gb_s",
    "decode_read_share",
    "int8_peak_gmac_s",
    "f32_peak_gmac_s",
    "first_token_ms",
    "rss_anon_bytes",
];

/// `bench` with `--json`: one object per number of threads.
fn bench_json(mut args: Vec<std::ffi::OsString>) -> Vec<Json> {
    args.push("--json".into());
    let lines: Vec<Json> = ok(kestrel(args)).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    for json in &lines {
        let flat = json.as_object().unwrap().values().all(|v| !v.is_object() && !v.is_array());
        assert!(flat, "{json}");
    }
    lines
}

#[test]
fn bench_prints_flat_json_for_each_number_of_threads() {
    let lines = bench_json(args!["bench", tiny(), "-p", "16", "-n", "4", "-r", "2", "--threads", "1,2"]);
    assert_eq!(lines.iter().map(|j| j["threads"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for json in &lines {
        for key in BENCH_FIGURES {
            let on_linux = key != "rss_anon_bytes" || cfg!(target_os = "linux");
            assert!(!on_linux || json[key].as_f64().unwrap() > 0.0, "{key}: {json}");
        }
        // With one thread nobody answers; with two, one may be held up.
        assert!(json["answer_ns"].is_null() || json["threads"] == 2, "{json}");
        assert!(json["isa"].is_string(), "{json}");
        let [least, median, most] =
            ["_min", "", "_max"].map(|end| json[format!("decode_tok_s{end}")].as_f64().unwrap());
        assert!(least <= median && median <= most, "{json}");
        // Without the buffer that the memory is measured on.
        assert!(json["rss_anon_bytes"].as_u64().is_none_or(|n| n < 1 << 28), "{json}");
    }
}

#[test]
fn bench_figures_follow_from_the_models_size() {
    // Tiny model: ssm_in, ssm_x, ssm_dt, ssm_out of each layer, and the output matrix.
    let inspected: Json = serde_json::from_str(&ok(kestrel(args!["inspect", tiny(), "--json"]))).unwrap();
    let tensors = inspected["tensors"].as_array().unwrap();
    let weights = |end: &str| -> f64 {
        let found = tensors.iter().filter(|t| t["name"].as_str().unwrap().ends_with(end));
        found
            .map(|t| t["shape"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).product::<f64>())
            .sum()
    };
    let layers: f64 =
        ["in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"].map(weights).iter().sum();
    let output = ["lm_head.weight", "embeddings.weight"].map(weights).into_iter().find(|&n| n > 0.0).unwrap();
    let json =
        bench_json(args!["bench", tiny(), "-p", "8", "-n", "1", "-r", "1", "--threads", "1"]).remove(0);
    let gmac_per_token = json["prefill_gmac_s"].as_f64().unwrap() / json["prefill_tok_s"].as_f64().unwrap();
    let expected = (layers + output / 8.0) / 1e9;
    assert!((gmac_per_token / expected - 1.0).abs() < 1e-9, "{gmac_per_token} {expected}");
}

#[test]
fn bench_leaves_out_what_was_not_measured() {
    let json =
        bench_json(args!["bench", tiny(), "-p", "0", "-n", "1", "-r", "1", "--depth", "3", "--threads", "1"])
            .remove(0);
    for key in ["prefill_tok_s", "prefill_gmac_s"] {
        assert_eq!(json[key], Json::Null, "{json}");
    }
    assert!(json["decode_tok_s"].as_f64().unwrap() > 0.0);
    assert_eq!(json["depth"], 3);
    let table = ok(kestrel(args!["bench", tiny(), "-p", "2", "-n", "0", "-r", "1", "--threads", "1"]));
    for shown in ["threads: 1", "int8 peak, GMAC/s", "prefill of 2, tok/s", "RssAnon at most"] {
        assert!(table.contains(shown), "{table}");
    }
    let decode = table.lines().find(|l| l.contains("decode of 1 x 0")).unwrap();
    assert!(decode.ends_with('-'), "{table}");
}

#[test]
fn the_demo_runs_anywhere_in_the_repository() {
    let shown = ok(command(args!["demo"]).current_dir(tiny()).output().unwrap());
    assert!(shown.contains("It was the best of times,") && shown.contains("blk.*.ssm_in.weight"), "{shown}");
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    for args in [args!["inspect", tiny()], args!["--help"], args!["run", tiny(), "-p", "a"]] {
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
    }
}

#[test]
fn a_full_disk_behind_stdout_is_an_io_error() {
    let Ok(full) = std::fs::File::options().write(true).open("/dev/full") else { return };
    let args = args!["inspect", tiny(), "--error-format", "json"];
    let output = command(args).stdout(full).output().unwrap();
    let json = check_error(output, "inspect > /dev/full");
    assert_eq!((json["kind"].as_str(), json["exit_status"].as_i64()), (Some("Io"), Some(3)));
}

fn kill(child: &std::process::Child, signal: &str) {
    Command::new("sh").arg("-c").arg(format!("kill -{signal} {}", child.id())).output().unwrap();
}

#[test]
fn generation_can_be_interrupted() {
    let args = args!["run", tiny(), "-p", "It was", "-n", "100000000", "--ignore-eos"];
    let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Text arrives while the run goes on, which it would do for hours: it is streamed. How much follows is chance.
    let mut first = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).expect("streamed text");
    kill(&child, "INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(130), ""));
}

/// Interrupts a conversion while its temporary file is there.
fn interrupted_conversion(folder: &Folder, signal: &str) -> Option<Output> {
    let args = args!["convert", tiny(), "-o", folder.path("x.gguf"), "--type", "q2_k", "--threads", "1"];
    let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while child.try_wait().unwrap().is_none() && !folder.names().iter().any(|n| n.contains("partial")) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    kill(&child, signal);
    let output = child.wait_with_output().unwrap();
    (output.status.code() != Some(0)).then_some(output)
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    for signal in ["INT", "TERM", "HUP"] {
        let folder = Folder::new(signal);
        // The tiny model can be done before the signal comes; then the next try.
        let output = (0..20).find_map(|_| {
            let output = interrupted_conversion(&folder, signal);
            if output.is_none() {
                std::fs::remove_file(folder.path("x.gguf")).unwrap();
            }
            output
        });
        let output = output.expect("20 conversions, none of which lasted long enough to be interrupted");
        assert_eq!(output.status.code(), Some(130), "{signal}: {}", stderr(&output));
        assert!(stderr(&output).contains("Interrupted"), "{signal}: {}", stderr(&output));
        assert_eq!(folder.names(), [""; 0], "{signal}");
    }
}

#[test]
fn a_text_that_is_not_utf8_is_an_error_with_its_place() {
    let folder = Folder::new("utf8");
    let text = folder.path("t");
    std::fs::write(&text, b"abc\xff").unwrap();
    let json = error(args!["tokenize", tiny(), "-f", text]);
    assert_eq!((json["kind"].as_str(), json["offset"].as_u64()), (Some("WrongType"), Some(3)), "{json}");
    assert_eq!(error(args!["tokenize", tiny(), "-f", folder.0])["kind"], "NotRegularFile");
    assert_eq!(error(args!["tokenize", tiny(), "-f", folder.path("none")])["exit_status"], 3);
}

/// `kestrel perplexity -f <(…)` and the like. A text may come from a pipe, as with any Unix tool, and so a pipe without a
/// writer is waited for; models and whatever else is mapped may not (G98 and X95 in the table of bad inputs).
#[test]
fn a_text_may_come_from_a_pipe_but_not_without_end() {
    let folder = Folder::new("text-pipe");
    let pipe = folder.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let writer = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::write(pipe, "Once upon a time").unwrap()
    });
    let of_pipe = ok(kestrel(args!["tokenize", tiny(), "-f", pipe]));
    writer.join().unwrap();
    assert_eq!(of_pipe, ok(kestrel(args!["tokenize", tiny(), "-p", "Once upon a time"])));

    let zeros = Path::new("/dev/zero");
    for args in [
        args!["tokenize", tiny(), "-f", zeros],
        args!["run", tiny(), "-f", zeros],
        args!["perplexity", tiny(), "-f", zeros],
        args!["imatrix", tiny(), "-f", zeros, "-o", folder.path("x")],
        args!["calibrate", tiny(), "-f", zeros, "-o", folder.path("x")],
        args!["eval", tiny(), "--requests", zeros],
    ] {
        let shown = format!("{args:?}");
        assert_eq!(error(args)["kind"], "Limit", "{shown}");
    }
    assert_eq!(folder.names(), ["pipe"]);
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error_and_writes_nothing() {
    let folder = Folder::new("vocab");
    let json = error(args!["logits", tiny(), "--tokens", "1,4096", "-o", folder.path("x.npy")]);
    assert_eq!(json["kind"], "OutOfRange", "{json}");
    assert_eq!(folder.names(), [""; 0]);
}
