//! One file per command: its arguments, its help, and what it does.

mod bench;
mod calibrate;
mod convert;
mod demo;
mod diff;
mod eval;
mod imatrix;
mod inspect;
mod logits;
mod perplexity;
mod quantize;
mod run;
mod tokenize;
mod verify;

use crate::failure::Outcome;
use clap::Subcommand;

#[derive(Subcommand)]
pub enum Command {
    Demo(demo::DemoArgs),
    Convert(convert::ConvertArgs),
    Quantize(quantize::QuantizeArgs),
    Inspect(inspect::InspectArgs),
    Run(run::RunArgs),
    Logits(logits::LogitsArgs),
    Tokenize(tokenize::TokenizeArgs),
    Bench(bench::BenchArgs),
    Perplexity(perplexity::PerplexityArgs),
    Imatrix(imatrix::ImatrixArgs),
    Calibrate(calibrate::CalibrateArgs),
    Eval(eval::EvalArgs),
    Diff(diff::DiffArgs),
    Verify(verify::VerifyArgs),
}

/// Does what the command line says.
pub fn run(command: Command) -> Outcome {
    match command {
        Command::Demo(args) => demo::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        Command::Imatrix(args) => imatrix::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Verify(args) => verify::run(&args),
    }
}
