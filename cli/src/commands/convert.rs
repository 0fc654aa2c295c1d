//! `kestrel convert`: a Hugging Face folder becomes a GGUF file in one pass. What it shares with `quantize` is here.

use crate::args::ConversionArgs;
use crate::failure::Outcome;
use crate::output::{self, Table};
use crate::progress::Bar;
use crate::{files, interrupt};
use clap::Args;
use kestrel_convert::{Options, Plan, Source};
use kestrel_formats::atomic_file::check_target;
use kestrel_formats::imatrix::Imatrix;
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_quant::isa::Isa;
use kestrel_quant::recipe::Recipe;
use kestrel_runtime::kernels;
use std::path::PathBuf;

/// Convert a Hugging Face folder to a quantized GGUF file
///
/// Reads the safetensors shards once and writes the output under its final name only when it is complete, on disk and
/// read back. Ctrl-C leaves nothing behind.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel convert falcon-mamba-7b-instruct -o falcon.gguf --type q4_k_m
  kestrel convert falcon-mamba-7b-instruct --type q4_k_m --tensor-type 'ssm_x=q8_0' --dry-run")]
pub struct ConvertArgs {
    /// Folder with config.json, tokenizer.json and safetensors shards
    #[arg(value_name = "HF_DIR")]
    source: PathBuf,

    #[command(flatten)]
    conversion: ConversionArgs,
}

pub fn run(args: &ConvertArgs) -> Outcome {
    match files::open_source(&args.source)? {
        Source::Gguf(_) => Err(Error::new(ErrorKind::Usage)
            .file(&args.source)
            .expected("a Hugging Face folder")
            .found("a GGUF file")
            .hint("kestrel quantize makes another type of it")
            .into()),
        source => convert(&source, &args.conversion),
    }
}

/// Plans, and unless this is a dry run does it.
pub fn convert(source: &Source, args: &ConversionArgs) -> Outcome {
    let options = options(args)?;
    let output = match &args.output {
        Some(output) if !args.dry_run => Some(check_target(output, args.force)?),
        _ => None,
    };
    let plan = kestrel_convert::plan(source, &options)?;
    output::warnings(source.path(), source.warnings());
    output::warnings(source.path(), &plan.warnings);
    let Some(output) = output else { return output::text(&describe(&plan)) };
    interrupt::writing(&output);
    let bar = Bar::new();
    let report = kestrel_convert::run(&plan, &options, &output, &bar, interrupt::flag())?;
    drop(bar);
    let seconds = report.convert_time.as_secs_f64();
    output::note(&format!(
        "{}: {} from {}, {:.1} s ({:.0} MB/s read) and {:.1} s to check it",
        output.display(),
        output::bytes(report.file_bytes),
        output::bytes(report.source_bytes),
        seconds,
        report.source_bytes as f64 / 1e6 / seconds.max(1e-9),
        report.check_time.as_secs_f64(),
    ));
    Ok(())
}

fn options(args: &ConversionArgs) -> Result<Options> {
    Ok(Options {
        recipe: Recipe::new(args.file_type, &args.tensor_type)?,
        imatrix: args.imatrix.as_deref().map(Imatrix::open).transpose()?,
        threads: args.threads.get(),
        force: args.force,
        isa: isa()?,
    })
}

/// What `KESTREL_ISA` allows of the instruction sets that quantize.
fn isa() -> Result<Isa> {
    Ok(match kernels::Isa::from_env()? {
        kernels::Isa::Scalar => Isa::Baseline,
        kernels::Isa::Avx2 => Isa::Avx2,
        _ => Isa::best(),
    })
}

/// The plan as a table, with the totals that people ask for.
fn describe(plan: &Plan) -> String {
    let mut table = Table::new(&["tensor", "source", "shape", "from", "to", ">bytes"]);
    for t in &plan.tensors {
        table.row([
            t.name.clone(),
            t.source_name.clone(),
            output::shape(&t.shape),
            t.source_dtype.to_string(),
            t.dtype.to_string(),
            t.n_bytes.to_string(),
        ]);
    }
    let n_weights: u64 = plan.tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum();
    format!(
        "{table}{} tensors, {n_weights} weights\nread: {} bytes ({})\nwrite: {} bytes ({}, {:.3} bits per weight)\n",
        plan.tensors.len(),
        plan.source_bytes,
        output::bytes(plan.source_bytes),
        plan.file_bytes,
        output::bytes(plan.file_bytes),
        8.0 * plan.file_bytes as f64 / n_weights.max(1) as f64,
    )
}
