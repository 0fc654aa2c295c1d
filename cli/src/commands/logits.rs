//! `kestrel logits`: what the model says after each token, as numbers.

use crate::failure::Outcome;
use crate::model::ModelArgs;
use crate::npy::NpyWriter;
use crate::{interrupt, output};
use clap::Args;
use kestrel_formats::atomic_file::check_target;
use std::path::PathBuf;

/// Write the logits after every token as a NumPy file, f32 (n_tokens, vocab)
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel logits falcon.gguf --tokens 1,2,3 -o logits.npy
  python -c 'import numpy; print(numpy.load(\"logits.npy\").argmax(1))'")]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Token ids, separated by commas; the array that kestrel tokenize prints is accepted
    #[arg(long, value_name = "IDS", value_parser = parse_tokens)]
    tokens: Tokens,

    /// File to write
    #[arg(short, long, value_name = "OUT.npy")]
    output: PathBuf,

    /// Replace OUT.npy if it exists
    #[arg(long)]
    force: bool,
}

/// clap would take a bare `Vec` for a repeatable argument.
#[derive(Clone)]
struct Tokens(Vec<u32>);

fn parse_tokens(text: &str) -> Result<Tokens, String> {
    let inner = text.trim();
    let inner = inner.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(inner);
    let ids: Vec<u32> = inner
        .split(',')
        .map(|id| id.trim().parse().map_err(|_| format!("\"{}\" is no token id", id.trim())))
        .collect::<Result<_, _>>()?;
    Ok(Tokens(ids))
}

pub fn run(args: &LogitsArgs) -> Outcome {
    let target = check_target(&args.output, args.force)?;
    let model = args.model.open()?;
    let vocab_size = model.hparams().vocab_size;
    let mut session = args.model.session(&model)?;
    let tokens = &args.tokens.0;
    interrupt::writing(&target);
    let npy = NpyWriter::create(&target, tokens.len(), vocab_size, args.force)?;
    let mut written = Ok(());
    session.prefill_with_logits(tokens, |row, logits| {
        if written.is_ok() {
            written = npy.row(row, logits);
        }
    })?;
    written?;
    model.check_unchanged()?;
    npy.finish()?;
    output::note(&format!("{}: f32 ({}, {vocab_size})", target.display(), tokens.len()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::parse_tokens;

    #[test]
    fn ids_are_read_with_and_without_brackets() {
        for text in ["1,2,3", "[1,2,3]", " [ 1, 2 ,3 ]\n"] {
            assert_eq!(parse_tokens(text).ok().unwrap().0, [1, 2, 3], "{text}");
        }
        for text in ["", "1,", "a", "-1", "4294967296", "[1", "1 2"] {
            assert!(parse_tokens(text).is_err(), "{text}");
        }
    }
}
