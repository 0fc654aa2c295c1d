//! One file per command: its arguments, its help, and what it does.

mod convert;
mod inspect;
mod quantize;
mod verify;

use crate::failure::Outcome;
use clap::Subcommand;

#[derive(Subcommand)]
pub enum Command {
    Convert(convert::ConvertArgs),
    Quantize(quantize::QuantizeArgs),
    Inspect(inspect::InspectArgs),
    Verify(verify::VerifyArgs),
}

/// Does what the command line says.
pub fn run(command: Command) -> Outcome {
    match command {
        Command::Convert(args) => convert::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Verify(args) => verify::run(&args),
    }
}
