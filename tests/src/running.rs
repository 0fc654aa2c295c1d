//! Converting and running models in tests.

use crate::temp_dir::TempDir;
use kestrel_convert::{Options, Source, plan, run};
use kestrel_quant::recipe::{FileType, Recipe};
use kestrel_runtime::kernels::Isa;
use kestrel_runtime::{LoadOptions, Model, Runner, RunnerOptions, State};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Converts a folder or a GGUF file to `file_type` (as on the command line).
pub fn convert(source: &Path, file_type: &str, out: &Path) {
    let recipe = Recipe::new(FileType::parse(file_type).expect("a file type"), &[]).expect("a recipe");
    let options = Options { threads: 2, ..Options::new(recipe) };
    let source = Source::open(source).expect("opening the source");
    let plan = plan(&source, &options).expect("planning");
    run(&plan, &options, out, &(), &AtomicBool::new(false)).expect("converting");
}

/// The model in a new GGUF file of `file_type` made from `source`; the file lives as long as `dir`.
pub fn converted(dir: &TempDir, source: &Path, file_type: &str) -> (Model, PathBuf) {
    let path = dir.path().join(format!("{file_type}.gguf"));
    convert(source, file_type, &path);
    (open(&path), path)
}

/// Opens a GGUF file or a folder as it is.
pub fn open(path: &Path) -> Model {
    Model::open(path, &LoadOptions::default()).expect("opening the model")
}

/// Runs on one instruction set with a number of threads.
pub fn on(isa: Isa, threads: usize) -> RunnerOptions {
    RunnerOptions { isa: Some(isa), threads, ..RunnerOptions::default() }
}

/// Every logit [n_tokens, vocab_size] of tokens that are fed in pieces of these lengths, repeated as needed.
pub fn logits_in_pieces(
    runner: &mut Runner<'_>,
    state: &mut State,
    tokens: &[u32],
    lengths: &[usize],
) -> Vec<f32> {
    let (mut logits, mut rest) = (Vec::new(), tokens);
    for &n in lengths.iter().cycle() {
        let (piece, after) = rest.split_at(n.min(rest.len()));
        runner.forward_all(state, piece, &mut |_, row| logits.extend_from_slice(row));
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    logits
}

/// Every logit from an empty state, all tokens at once.
pub fn logits(model: &Model, options: &RunnerOptions, tokens: &[u32]) -> Vec<f32> {
    let mut runner = Runner::new(model, options).expect("a runner");
    logits_in_pieces(&mut runner, &mut model.new_state(), tokens, &[tokens.len()])
}

/// The most likely `n` tokens after a prompt.
pub fn greedy(model: &Model, options: &RunnerOptions, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut runner = Runner::new(model, options).expect("a runner");
    let mut state = model.new_state();
    let mut logits = vec![0.0; model.hparams().vocab_size];
    runner.forward(&mut state, prompt, &mut logits);
    let mut out = Vec::new();
    for _ in 0..n {
        let token = crate::goldens::argmax(&logits);
        out.push(token);
        runner.forward(&mut state, &[token], &mut logits);
    }
    out
}

/// Largest |a - b| / max |a| over rows of `vocab_size`, each with its own maximum.
pub fn difference<A: Copy + Into<f64>, B: Copy + Into<f64>>(a: &[A], b: &[B], vocab_size: usize) -> f64 {
    assert_eq!(a.len(), b.len());
    let mut worst = 0.0;
    for (a, b) in a.chunks_exact(vocab_size).zip(b.chunks_exact(vocab_size)) {
        let max = a.iter().map(|&x| x.into().abs()).fold(0.0, f64::max);
        for (&x, &y) in a.iter().zip(b) {
            let d = (x.into() - y.into()).abs() / max;
            if d > worst || d.is_nan() {
                worst = d; // a NaN comes out as the worst
            }
        }
    }
    worst
}

/// Runs `test` if this machine has the instruction set. `KESTREL_REQUIRE_ISA=a,b` makes its absence a failure.
pub fn where_present(isa: Isa, test: fn(Isa)) {
    if isa.supported() {
        return test(isa);
    }
    let required = std::env::var("KESTREL_REQUIRE_ISA").unwrap_or_default();
    assert!(!required.split(',').any(|name| name == isa.name()), "{} is required and absent", isa.name());
}
