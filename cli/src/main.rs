//! The `kestrel` command line: arguments, progress and printing. The only crate that prints.

#![forbid(unsafe_code)]

mod args;
mod chat;
mod commands;
mod failure;
mod files;
mod interrupt;
mod model;
mod npy;
mod output;
mod progress;
mod windows;

use args::Cli;
use clap::Parser;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

fn main() -> ExitCode {
    failure::catch_panics();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return failure::exit_for_clap(&e),
    };
    output::set_verbose(cli.verbose);
    if let Err(e) = interrupt::install().and_then(|()| failure::report_faults(cli.error_format)) {
        return failure::exit_for(e.into(), cli.error_format);
    }
    match catch_unwind(AssertUnwindSafe(|| commands::run(cli.command))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => failure::exit_for(failure, cli.error_format),
        Err(_) => failure::exit_for_panic(cli.error_format),
    }
}
