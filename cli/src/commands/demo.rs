//! `kestrel demo`: the whole path on the tiny trained model of the repository, in seconds.

use crate::failure::Outcome;
use crate::output::{self, Table};
use crate::progress::Bar;
use crate::{files, interrupt, model};
use clap::Args;
use kestrel_convert::{Options, Plan, Source};
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_quant::recipe::{FileType, Recipe};
use kestrel_runtime::LoadOptions;
use kestrel_runtime::Model;
use kestrel_runtime::RunnerOptions;
use kestrel_runtime::sampler::{Sampler, SamplerOptions};
use kestrel_runtime::session::{GenerateOptions, Session};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Convert the bundled tiny model, run it, and show what happened
///
/// The model has 6 million weights and was trained on old novels. Everything is written to a temporary folder, which is
/// removed again.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel demo
  kestrel demo --model falcon-mamba-7b-instruct")]
pub struct DemoArgs {
    /// Hugging Face folder to use instead of the bundled one
    #[arg(long, value_name = "HF_DIR")]
    model: Option<PathBuf>,
}

/// Where the bundled model lies in the repository.
const BUNDLED: &str = "tests/data/tiny-falcon-mamba";
const PROMPT: &str = "It was the best of times,";
const N_TOKENS: usize = 80;

pub fn run(args: &DemoArgs) -> Outcome {
    let folder = match &args.model {
        Some(folder) => folder.clone(),
        None => find_bundled()?,
    };
    let scratch = Scratch::new()?;
    let gguf = scratch.0.join("demo-q4_k_m.gguf");
    convert(&folder, &gguf)?;
    generate(&gguf)
}

/// Looks in the current folder and its parents, then around the executable (`target/release/kestrel`).
fn find_bundled() -> Result<PathBuf> {
    let starts = [std::env::current_dir().ok(), std::env::current_exe().ok()];
    let found = starts.iter().flatten().flat_map(|start| start.ancestors()).find_map(|folder| {
        let candidate = folder.join(BUNDLED);
        candidate.join("config.json").is_file().then_some(candidate)
    });
    found.ok_or_else(|| {
        Error::new(ErrorKind::Missing)
            .what("the bundled model")
            .expected(format!("{BUNDLED} in this folder, in one above it, or beside the executable"))
            .hint("run it in the repository, or give a Hugging Face folder with --model")
    })
}

fn convert(folder: &Path, gguf: &Path) -> Outcome {
    files::check_model_path(folder)?;
    let source = Source::open(folder)?;
    let options = Options::new(Recipe::new(FileType::Q4KM, &[])?);
    let plan = kestrel_convert::plan(&source, &options)?;
    output::text(&format!("1. {} -> q4_k_m\n\n{}\n", folder.display(), short_plan(&plan)))?;
    interrupt::writing(gguf);
    let bar = Bar::new();
    let report = kestrel_convert::run(&plan, &options, gguf, &bar, interrupt::flag())?;
    drop(bar);
    output::text(&format!(
        "   {} in {:.2} s, then checked: {} -> {}, {:.1} times smaller\n\n",
        output::bytes(report.source_bytes),
        report.convert_time.as_secs_f64(),
        output::bytes(report.source_bytes),
        output::bytes(report.file_bytes),
        report.source_bytes as f64 / report.file_bytes.max(1) as f64,
    ))
}

/// One line for all layers' tensors of a kind.
fn short_plan(plan: &Plan) -> Table {
    // Keyed by the first position, so that lines come in file order.
    let mut kinds: BTreeMap<usize, (String, u64, u64)> = BTreeMap::new();
    let mut first: BTreeMap<String, usize> = BTreeMap::new();
    for (i, t) in plan.tensors.iter().enumerate() {
        let name: Vec<_> =
            t.name.split('.').map(|part| if part.parse::<u32>().is_ok() { "*" } else { part }).collect();
        let line = format!("{} {} {} {}", name.join("."), output::shape(&t.shape), t.source_dtype, t.dtype);
        let kind = kinds.entry(*first.entry(line.clone()).or_insert(i)).or_insert((line, 0, 0));
        kind.1 += 1;
        kind.2 += t.n_bytes;
    }
    let mut table = Table::new(&["tensors", ">count", "shape", "from", "to", ">size"]);
    for (i, (_, count, n_bytes)) in kinds {
        let Some(t) = plan.tensors.get(i) else { continue };
        let name =
            t.name.strip_prefix("blk.0.").map_or_else(|| t.name.clone(), |rest| format!("blk.*.{rest}"));
        let cells = [
            name,
            count.to_string(),
            output::shape(&t.shape),
            t.source_dtype.to_string(),
            t.dtype.to_string(),
            output::bytes(n_bytes),
        ];
        table.row(cells);
    }
    table
}

fn generate(gguf: &Path) -> Outcome {
    let started = Instant::now();
    let model = Model::open(gguf, &LoadOptions::default())?;
    let tokenizer = model.tokenizer()?;
    let mut session = Session::new(&model, &RunnerOptions::default())?;
    let open_ms = started.elapsed().as_secs_f64() * 1e3;
    let (isa, threads) = (session.runner().isa().name(), session.runner().n_threads());
    output::text(&format!("2. mapped in {open_ms:.0} ms; {threads} threads, {isa}\n\n3. {PROMPT}"))?;

    let mut sampler =
        Sampler::new(SamplerOptions { temperature: 0.7, top_k: 40, seed: 3, ..Default::default() })?;
    let started = Instant::now();
    session.prefill(&tokenizer.encode(PROMPT, false)?)?;
    let options = GenerateOptions { n_tokens: N_TOKENS, ..Default::default() };
    let n_generated = model::stream(&mut session, &mut sampler, &tokenizer, &options, interrupt::check)?;
    let rate = n_generated as f64 / started.elapsed().as_secs_f64().max(1e-9);
    output::text(&format!("\n\n   {n_generated} tokens at {rate:.0} tok/s\n"))
}

/// A folder of this run's own, removed with everything in it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("kestrel-demo-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|e| Error::io(&path, "making a temporary folder", e))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
