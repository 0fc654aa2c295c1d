//! `kestrel eval`: log-likelihoods of texts, for evaluation harnesses.

use crate::failure::Outcome;
use crate::model::ModelArgs;
use crate::progress::Count;
use crate::{files, output};
use clap::Args;
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::likelihood::{Likelihood, Scored, continuation, likelihoods, rolling};
use kestrel_runtime::reader::Reader;
use kestrel_runtime::tokenizer::Tokenizer;
use serde_json::{Value as Json, json};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Log-likelihoods of continuations and of whole texts, as lm-evaluation-harness defines them
///
/// FILE has one JSON object a line: {"context": TEXT, "continuation": TEXT} asks for the log-likelihood of a
/// continuation, {"rolling": TEXT} for that of a whole text. stdout has one object a line in the same order, with
/// loglikelihood, is_greedy (every token is the most likely one) and n_tokens. Token boundaries are those of the
/// harness's Hugging Face models; special tokens written in a text count as such.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel eval falcon.gguf --requests requests.jsonl > results.jsonl

scripts/lm_eval/ has the adapter for EleutherAI's harness.")]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// The requests, JSON lines; - is stdin
    #[arg(long, value_name = "FILE")]
    requests: PathBuf,

    /// Read at most N tokens for a request: of a longer context the end, and a longer text in pieces. The harness takes
    /// 2048 for models without a limit of their own
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_length: u32,
}

pub fn run(args: &EvalArgs) -> Outcome {
    let text = files::read_text(&args.requests)?;
    let model = args.model.open()?;
    let tokenizer = model.tokenizer()?;
    let mut asked = Vec::new();
    let requests: Vec<Range<usize>> = text
        .lines()
        .enumerate()
        .map(|(i, line)| {
            let first = asked.len();
            asked.extend(args.parse(line, &tokenizer).map_err(|e| at_line(e, &args.requests, i))?);
            Ok(first..asked.len())
        })
        .collect::<Result<_>>()?;
    let mut reader = Reader::new(&model, &args.model.runner_options(args.model.threads.get()))?;
    let bar = Count::new("requests", asked.len(), 0);
    let mut shown = 0;
    let n_max = args.max_length as usize;
    let found = likelihoods(&mut reader, &asked, n_max, |done| {
        bar.advance(done - shown, "scored");
        shown = done;
        Ok(())
    });
    let found = found.map_err(|e| e.file(&args.requests))?;
    drop(bar);
    model.check_unchanged()?;
    let lines: String = requests.into_iter().map(|pieces| format!("{}\n", answer(&found[pieces]))).collect();
    output::text(&lines)
}

impl EvalArgs {
    /// What a line asks for, in pieces.
    fn parse(&self, line: &str, tokenizer: &Tokenizer) -> Result<Vec<Scored>> {
        let request: Json = serde_json::from_str(line)
            .map_err(|e| Error::new(ErrorKind::BadJson).expected("a JSON object").found(e))?;
        let text = |key: &str| request.get(key).and_then(Json::as_str);
        let n_keys = request.as_object().map_or(0, serde_json::Map::len);
        match (text("context"), text("continuation"), text("rolling")) {
            (Some(context), Some(text), None) if n_keys == 2 => {
                Ok(vec![continuation(tokenizer, tokenizer.text_start()?, context, text)?])
            }
            (None, None, Some(text)) if n_keys == 1 => {
                let tokens = tokenizer.encode(text, true)?;
                Ok(rolling(&tokens, tokenizer.text_start()?, self.max_length as usize))
            }
            _ => Err(Error::new(ErrorKind::WrongType)
                .expected("the texts \"context\" and \"continuation\", or \"rolling\", and nothing else")
                .found(line.chars().take(80).collect::<String>())),
        }
    }
}

/// An error with the line of the file that it is about.
fn at_line(e: Error, path: &Path, i: usize) -> Error {
    e.file(path).what(format!("line {}", i + 1))
}

/// The answer to a request in pieces.
fn answer(pieces: &[Likelihood]) -> Json {
    json!({
        "loglikelihood": pieces.iter().map(|l| l.log_likelihood).sum::<f64>(),
        "is_greedy": pieces.iter().all(|l| l.is_greedy),
        "n_tokens": pieces.iter().map(|l| l.n_tokens).sum::<usize>(),
    })
}
