//! `kestrel verify`: how far every tensor of a GGUF is from what it was made of.

use crate::args::Threads;
use crate::failure::Outcome;
use crate::output::{self, Table};
use crate::progress::Bar;
use crate::{files, interrupt};
use clap::Args;
use kestrel_convert::{Source, TensorReport, VerifyReport};
use kestrel_formats::{Error, ErrorKind};
use serde_json::{Value as Json, json};
use std::path::PathBuf;

/// Compare a GGUF file with its source, tensor by tensor
///
/// Exits with status 2 if a tensor is farther from its source than its type allows, or holds NaN or infinite numbers.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel verify falcon.gguf --source falcon-mamba-7b-instruct
  kestrel verify falcon-q4.gguf --source falcon-bf16.gguf --json")]
pub struct VerifyArgs {
    /// The file to judge
    #[arg(value_name = "OUT.gguf")]
    file: PathBuf,

    /// What it was made from
    #[arg(long, value_name = "HF_DIR | IN.gguf")]
    source: PathBuf,

    #[command(flatten)]
    threads: Threads,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &VerifyArgs) -> Outcome {
    let Source::Gguf(file) = files::open_source(&args.file)? else {
        return Err(Error::new(ErrorKind::Usage)
            .file(&args.file)
            .expected("a GGUF file to judge")
            .found("a folder")
            .hint("kestrel verify OUT.gguf --source HF_DIR")
            .into());
    };
    let source = files::open_source(&args.source)?;
    let bar = Bar::new();
    let report = kestrel_convert::verify(&file, &source, args.threads.get(), &bar, interrupt::flag())?;
    drop(bar);
    output::warnings(&args.file, &report.warnings);
    match args.json {
        true => output::json(&to_json(&report))?,
        false => output::text(&to_text(&report))?,
    }
    Ok(report.verdict().map_err(|e| e.file(&args.file))?)
}

fn to_json(report: &VerifyReport) -> Json {
    let tensor = |t: &TensorReport| {
        json!({
            "name": t.name,
            "source_type": t.source_dtype.name(),
            "type": t.dtype.map(|d| d.name()),
            "n_weights": t.stats.n,
            "rmse": t.stats.rmse(),
            "relative_rmse": t.stats.relative_rmse(),
            "relative_rmse_limit": t.limit,
            "max_abs": t.stats.max_abs,
            "n_nan": t.stats.n_nan,
            "n_inf": t.stats.n_inf,
            "problem": t.problem,
        })
    };
    json!({
        "ok": report.passed(),
        "tensors": report.tensors.iter().map(tensor).collect::<Vec<_>>(),
        "problems": report.problems,
        "warnings": report.warnings,
    })
}

fn to_text(report: &VerifyReport) -> String {
    let headings =
        ["tensor", "from", "to", ">RMSE", ">relative", ">limit", ">max", ">NaN", ">Inf", "verdict"];
    let mut table = Table::new(&headings);
    for t in &report.tensors {
        table.row([
            t.name.clone(),
            t.source_dtype.to_string(),
            t.dtype.map_or("-", |d| d.name()).to_owned(),
            format!("{:.3e}", t.stats.rmse()),
            format!("{:.3e}", t.stats.relative_rmse()),
            format!("{:.1e}", t.limit),
            format!("{:.3e}", t.stats.max_abs),
            t.stats.n_nan.to_string(),
            t.stats.n_inf.to_string(),
            t.problem.clone().unwrap_or_else(|| "ok".to_owned()),
        ]);
    }
    let problems: String =
        report.problems.iter().map(|p| format!("problem: {}\n", output::printable(p))).collect();
    let n_ok = report.tensors.iter().filter(|t| t.problem.is_none()).count();
    format!("{table}{problems}{n_ok} of {} tensors within their limits\n", report.tensors.len())
}
