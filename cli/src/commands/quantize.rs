//! `kestrel quantize`: a GGUF file becomes a GGUF file of another type.

use super::convert::convert;
use crate::args::ConversionArgs;
use crate::failure::Outcome;
use crate::files;
use clap::Args;
use kestrel_convert::Source;
use kestrel_formats::{Error, ErrorKind};
use std::path::PathBuf;

/// Make a GGUF file of another type
///
/// Metadata is kept. Quantizing what is quantized already works but loses more than starting from the checkpoint or an
/// F32, F16 or BF16 file; it is warned about. Ctrl-C leaves nothing behind, except with --calibration: then what is done
/// stays in OUT.part, from which the same command with --resume goes on.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel quantize falcon-bf16.gguf -o falcon-q5_k_m.gguf --type q5_k_m")]
pub struct QuantizeArgs {
    /// GGUF file, or the first of a split one
    #[arg(value_name = "IN.gguf")]
    source: PathBuf,

    #[command(flatten)]
    conversion: ConversionArgs,
}

pub fn run(args: &QuantizeArgs) -> Outcome {
    match files::open_source(&args.source)? {
        Source::Checkpoint(_) => Err(Error::new(ErrorKind::Usage)
            .file(&args.source)
            .expected("a GGUF file")
            .found("a folder")
            .hint("kestrel convert reads Hugging Face folders")
            .into()),
        source => convert(&source, &args.conversion),
    }
}
