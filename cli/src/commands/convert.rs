//! `kestrel convert`: a Hugging Face folder becomes a GGUF file, or a folder of bitsandbytes, in one pass. What it shares with `quantize` is here.

use crate::args::{ConversionArgs, OutputType, Search};
use crate::failure::Outcome;
use crate::model::BNB_BLOCKSIZE;
use crate::output::{self, Table};
use crate::progress::Bar;
use crate::{files, interrupt};
use clap::{Args, ValueEnum};
use kestrel_convert::{BnbOptions, BnbPlan, Options, Plan, Source};
use kestrel_formats::atomic_file::check_target;
use kestrel_formats::atomic_folder::check_target_folder;
use kestrel_formats::calibration::Calibration;
use kestrel_formats::checkpoint::Checkpoint;
use kestrel_formats::imatrix::Imatrix;
use kestrel_formats::{Error, ErrorKind, GgmlType, Result, WeightType};
use kestrel_quant::feedback::SWEEPS_BEST;
use kestrel_quant::isa::Isa;
use kestrel_quant::recipe::{Bnb, Recipe};
use kestrel_runtime::kernels;
use std::path::PathBuf;
use std::time::Instant;

/// Convert a Hugging Face folder to a quantized GGUF file, or to a folder as bitsandbytes saves it
///
/// Reads the safetensors shards once and writes the output under its final name only when it is complete, on disk and
/// read back. Ctrl-C leaves nothing behind, except with --calibration, where quantizing the 7B takes long: then what is
/// done stays in OUT.part, from which the same command with --resume goes on.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel convert falcon-mamba-7b-instruct -o falcon.gguf --type q4_k_m
  kestrel convert falcon-mamba-7b-instruct --type q4_k_m --tensor-type 'ssm_x=q8_0' --dry-run
  kestrel convert falcon-mamba-7b-instruct -o falcon-nf4 --type bnb-nf4 --double-quant --compute-dtype bfloat16")]
pub struct ConvertArgs {
    /// Folder with config.json, tokenizer.json and safetensors shards
    #[arg(value_name = "HF_DIR")]
    source: PathBuf,

    #[command(flatten)]
    conversion: ConversionArgs,

    #[command(flatten)]
    bnb: BnbArgs,
}

/// For the bnb types. The names are those of BitsAndBytesConfig without their prefix.
#[derive(Args)]
#[command(next_help_heading = "Options of bnb-nf4 and bnb-fp4")]
struct BnbArgs {
    /// Quantize the scales too
    #[arg(long)]
    double_quant: bool,

    /// Weights that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096 [default: 64]
    #[arg(long, value_name = "N")]
    blocksize: Option<usize>,

    /// What the library will compute in after loading: float32, float16 or bfloat16 [default: float32]
    #[arg(long, value_name = "DTYPE", value_enum)]
    compute_dtype: Option<ComputeDtype>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ComputeDtype {
    Float32,
    Float16,
    Bfloat16,
}

pub fn run(args: &ConvertArgs) -> Outcome {
    match files::open_source(&args.source)? {
        Source::Gguf(_) => Err(Error::new(ErrorKind::Usage)
            .file(&args.source)
            .expected("a Hugging Face folder")
            .found("a GGUF file")
            .hint("kestrel quantize makes another type of it")
            .into()),
        source => match (&source, args.conversion.output_type()) {
            (Source::Checkpoint(folder), OutputType::Bnb(ty)) => to_bnb(folder, ty, args),
            _ if args.bnb.is_used() => Err(Error::new(ErrorKind::Usage)
                .what("--double-quant, --blocksize, --compute-dtype")
                .expected("--type bnb-nf4 or bnb-fp4")
                .into()),
            _ => convert(&source, &args.conversion),
        },
    }
}

impl BnbArgs {
    fn is_used(&self) -> bool {
        self.double_quant || self.blocksize.is_some() || self.compute_dtype.is_some()
    }
}

/// Writes a folder as bitsandbytes saves it.
fn to_bnb(source: &Checkpoint, dtype: WeightType, args: &ConvertArgs) -> Outcome {
    let (conversion, bnb) = (&args.conversion, &args.bnb);
    let usage = |what: &str, expected: &str| Error::new(ErrorKind::Usage).what(what).expected(expected);
    let of_gguf =
        conversion.imatrix.is_some() || conversion.calibration.is_some() || conversion.target().is_some();
    if !conversion.tensor_type.is_empty() || of_gguf {
        let options = "--tensor-type, --imatrix, --calibration, --target-size, --target-bpw, --target-kl";
        return Err(usage(options, "a GGUF type: bitsandbytes has none of them").into());
    }
    if dtype == WeightType::Int8 && bnb.is_used() {
        return Err(usage("--double-quant, --blocksize, --compute-dtype", "--type bnb-nf4 or bnb-fp4").into());
    }
    let options = BnbOptions {
        bnb: Bnb { dtype, blocksize: bnb.blocksize.unwrap_or(BNB_BLOCKSIZE), double_quant: bnb.double_quant },
        compute_dtype: match bnb.compute_dtype {
            None | Some(ComputeDtype::Float32) => GgmlType::F32,
            Some(ComputeDtype::Float16) => GgmlType::F16,
            Some(ComputeDtype::Bfloat16) => GgmlType::Bf16,
        },
        threads: conversion.threads.get(),
        force: conversion.force,
    };
    let output = match &conversion.output {
        Some(output) if !conversion.dry_run => Some(check_target_folder(output, conversion.force)?.0),
        _ => None,
    };
    let plan = kestrel_convert::plan_bnb(source, &options)?;
    output::warnings(source.dir(), source.warnings());
    output::warnings(source.dir(), &plan.warnings);
    let Some(output) = output else { return output::text(&describe_bnb(&plan)) };
    interrupt::writing(&output);
    let bar = Bar::new();
    let started = Instant::now();
    kestrel_convert::run_bnb(&plan, &options, &output, &bar, interrupt::flag())?;
    drop(bar);
    output::note(&format!(
        "{}: {} from {}, {:.1} s, read back",
        output.display(),
        output::bytes(plan.output_bytes),
        output::bytes(plan.source_bytes),
        started.elapsed().as_secs_f64(),
    ));
    Ok(())
}

fn describe_bnb(plan: &BnbPlan) -> String {
    let mut table = Table::new(&["tensor", "shape", "from", "to", ">bytes"]);
    for t in &plan.tensors {
        let (from, to) = (t.source_dtype.to_string(), t.dtype.to_string());
        table.row([t.name.clone(), output::shape(&t.shape), from, to, t.n_bytes.to_string()]);
    }
    format!(
        "{table}{}",
        totals(plan.tensors.iter().map(|t| &t.shape[..]), plan.source_bytes, plan.output_bytes)
    )
}

/// The lines under a plan.
fn totals<'a>(shapes: impl Iterator<Item = &'a [u64]>, read_bytes: u64, written_bytes: u64) -> String {
    let (n, n_weights) = shapes.fold((0, 0), |(n, sum), shape| (n + 1, sum + shape.iter().product::<u64>()));
    format!(
        "{n} tensors, {n_weights} weights\nread: {read_bytes} bytes ({})\nwrite: {written_bytes} bytes ({}, {:.3} bits \
         per weight)\n",
        output::bytes(read_bytes),
        output::bytes(written_bytes),
        8.0 * written_bytes as f64 / n_weights.max(1) as f64,
    )
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
    if args.target().is_some() {
        output::note(&describe(&plan));
    }
    interrupt::writing(&output);
    let bar = Bar::new();
    let report = kestrel_convert::run(&plan, &options, &output, &bar, interrupt::flag())?;
    drop(bar);
    let seconds = report.convert_time.as_secs_f64();
    if report.kept_bytes > 0 {
        output::note(&format!("{} were there from an interrupted run", output::bytes(report.kept_bytes)));
    }
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
    let OutputType::Gguf(file_type) = args.output_type() else {
        return Err(Error::new(ErrorKind::Usage)
            .what("--type")
            .expected("a GGUF type")
            .found("a type of bitsandbytes, which kestrel convert writes from a Hugging Face folder"));
    };
    Ok(Options {
        recipe: Recipe::new(file_type, &args.tensor_type)?,
        imatrix: args.imatrix.as_deref().map(Imatrix::open).transpose()?,
        calibration: args.calibration.as_deref().map(Calibration::open).transpose()?,
        sweeps: sweeps(args)?,
        target: args.target(),
        threads: args.threads.get(),
        force: args.force,
        resume: args.resume,
        isa: isa()?,
    })
}

/// How often codes and scales are gone over.
fn sweeps(args: &ConversionArgs) -> Result<usize> {
    match (args.search, &args.calibration) {
        (Search::Fast, _) => Ok(0),
        (Search::Best, Some(_)) => Ok(SWEEPS_BEST),
        (Search::Best, None) => Err(Error::new(ErrorKind::Usage)
            .what("--search best")
            .expected("--calibration")
            .hint("kestrel calibrate measures what is searched by")),
    }
}

/// What `KESTREL_ISA` allows of the instruction sets that quantize.
fn isa() -> Result<Isa> {
    Ok(match kernels::Isa::from_env()? {
        kernels::Isa::Scalar | kernels::Isa::ScalarInt8 => Isa::Baseline,
        kernels::Isa::Avx2 => Isa::Avx2,
        _ => Isa::best(),
    })
}

/// The plan as a table, with the totals that people ask for.
fn describe(plan: &Plan) -> String {
    let calibrated = plan.tensors.iter().any(|t| t.kl.is_some());
    let columns = ["tensor", "source", "shape", "from", "to", ">bytes", if calibrated { ">KL" } else { "" }];
    let mut table = Table::new(&columns);
    for t in &plan.tensors {
        table.row([
            t.name.clone(),
            t.source_name.clone(),
            output::shape(&t.shape),
            t.source_dtype.to_string(),
            t.dtype.to_string(),
            t.n_bytes.to_string(),
            t.kl.map_or(String::new(), |kl| format!("{kl:.6}")),
        ]);
    }
    let predicted = plan.predicted_kl.map(|kl| format!("predicted mean KL divergence: {kl:.6}\n"));
    format!(
        "{table}{}{}",
        totals(plan.tensors.iter().map(|t| &t.shape[..]), plan.source_bytes, plan.file_bytes),
        predicted.unwrap_or_default()
    )
}
