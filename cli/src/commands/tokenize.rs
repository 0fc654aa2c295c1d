//! `kestrel tokenize`: the token ids of a text.

use crate::args::TextArgs;
use crate::failure::Outcome;
use crate::{files, output};
use clap::Args;
use kestrel_convert::Source;
use kestrel_formats::tokenizer::TokenizerData;
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};

/// Print the token ids of a text as one JSON array
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel tokenize falcon.gguf -p \"Hello world\"
  kestrel logits falcon.gguf --tokens \"$(kestrel tokenize falcon.gguf -p Hello)\" -o logits.npy")]
pub struct TokenizeArgs {
    /// GGUF file or Hugging Face folder
    model: PathBuf,

    #[command(flatten)]
    text: TextArgs,

    /// The default and only format; accepted so that scripts can say so
    #[arg(long)]
    json: bool,

    /// Treat text that looks like a special token (<|im_end|>) as ordinary text
    #[arg(long)]
    no_parse_special: bool,
}

pub fn run(args: &TokenizeArgs) -> Outcome {
    let data = tokenizer_data(&args.model)?;
    output::warnings(&args.model, &data.warnings);
    let tokenizer = Tokenizer::new(&data)?;
    let ids = tokenizer.encode(&files::text(&args.text)?, !args.no_parse_special)?;
    output::json(&ids.into())
}

/// The vocabulary alone: no weight is looked at.
fn tokenizer_data(model: &Path) -> Result<TokenizerData> {
    let found = match files::open_source(model)? {
        Source::Gguf(file) => TokenizerData::from_gguf(&file)?,
        Source::Checkpoint(folder) => folder.tokenizer().cloned(),
    };
    found.ok_or_else(|| {
        Error::new(ErrorKind::Missing).file(model).what("tokenizer").expected("a vocabulary in the model")
    })
}
