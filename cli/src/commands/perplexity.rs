//! `kestrel perplexity`: how well a model predicts a text, and how far its predictions are from another model's.

use crate::failure::Outcome;
use crate::kl_base::{Extent, KlBase, KlBaseWriter};
use crate::model::ModelArgs;
use crate::{files, interrupt, output};
use clap::Args;
use kestrel_formats::atomic_file::check_target;
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::evaluate::{Divergence, Perplexity, log_softmax, scored, windows};
use kestrel_runtime::session::Session;
use serde_json::json;
use std::path::PathBuf;

/// Measure perplexity on a text, and KL divergence from a base model
///
/// Windows and scored positions are those of llama-perplexity: windows of --ctx tokens without overlap, each from an
/// empty state, the second half scored.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel perplexity falcon-bf16.gguf -f text.txt --chunks 20 --save-kl-base base.kl
  kestrel perplexity falcon-q4_k_m.gguf -f text.txt --chunks 20 --kl-base base.kl

The base file holds 4 * vocabulary * (ctx/2 - 1) bytes per window: 66 MB for the 7B at --ctx 512.")]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// The text, UTF-8; - is stdin
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,

    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=1 << 20))]
    ctx: u32,

    /// Read only the first N windows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,

    /// Compare with the base model's logits in this file
    #[arg(long, value_name = "FILE")]
    kl_base: Option<PathBuf>,

    /// Save this model's logits, to be the base of others
    #[arg(long, value_name = "FILE", conflicts_with = "kl_base")]
    save_kl_base: Option<PathBuf>,

    /// Replace the file of --save-kl-base if it exists
    #[arg(long, requires = "save_kl_base")]
    force: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &PerplexityArgs) -> Outcome {
    let target = args.save_kl_base.as_deref().map(|p| check_target(p, args.force)).transpose()?;
    let text = files::read_text(&args.file)?;
    let model = args.model.open()?;
    let tokens = args.windowed(model.tokenizer()?.encode(&text, false)?)?;
    let extent = Extent { vocab: model.hparams().vocab_size, n_ctx: args.ctx as usize, tokens: &tokens };
    let base = match (&args.kl_base, &target) {
        (Some(path), _) => Base::Compare(KlBase::open(path, extent)?, Divergence::default()),
        (None, Some(path)) => {
            interrupt::writing(path);
            Base::Save(KlBaseWriter::create(path, extent, args.force)?)
        }
        (None, None) => Base::None,
    };
    let mut evaluation = Evaluation::new(extent.vocab, base);
    let mut session = args.model.session(&model)?;
    for (i, window) in windows(tokens.len(), extent.n_ctx).enumerate() {
        evaluation.window(&mut session, tokens.get(window).unwrap_or_default())?;
        let so_far = evaluation.perplexity.estimate().value;
        output::note(&format!(
            "window {}/{}: perplexity so far {so_far:.4}",
            i + 1,
            tokens.len() / extent.n_ctx
        ));
    }
    model.check_unchanged()?;
    if let Base::Save(writer) = evaluation.base {
        writer.finish()?;
        evaluation.base = Base::None;
    }
    evaluation.print(args)
}

impl PerplexityArgs {
    /// The tokens of whole windows.
    fn windowed(&self, mut tokens: Vec<u32>) -> Result<Vec<u32>> {
        let n_ctx = self.ctx as usize;
        let available = tokens.len() / n_ctx;
        let n_windows = self.chunks.map_or(available, |n| available.min(n as usize));
        if n_windows == 0 {
            return Err(Error::new(ErrorKind::Usage)
                .file(&self.file)
                .expected(format!("a text of at least one window of {n_ctx} tokens"))
                .found(format!("{} tokens", tokens.len()))
                .hint("--ctx sets a smaller window"));
        }
        tokens.truncate(n_windows * n_ctx);
        Ok(tokens)
    }
}

enum Base {
    None,
    Compare(KlBase, Divergence),
    Save(KlBaseWriter),
}

/// Sums over scored positions.
struct Evaluation {
    perplexity: Perplexity,
    base: Base,
    n_scored: usize,
    log_probs: Vec<f64>,
    base_log_probs: Vec<f64>,
}

impl Evaluation {
    fn new(vocab: usize, base: Base) -> Self {
        let zeros = vec![0.0; vocab];
        let perplexity = Perplexity::default();
        Self { perplexity, base, n_scored: 0, log_probs: zeros.clone(), base_log_probs: zeros }
    }

    fn window(&mut self, session: &mut Session, tokens: &[u32]) -> Result<()> {
        let scored = scored(tokens.len());
        let (Some(unscored), Some(read), Some(next)) =
            (tokens.get(..scored.start), tokens.get(scored.clone()), tokens.get(scored.start + 1..))
        else {
            return Ok(());
        };
        session.reset();
        session.prefill(unscored)?;
        let mut outcome = Ok(());
        session.prefill_with_logits(read, |i, logits| {
            if outcome.is_ok() {
                outcome = next.get(i).map_or(Ok(()), |&next| self.position(logits, next));
            }
        })?;
        outcome
    }

    fn position(&mut self, logits: &[f32], next: u32) -> Result<()> {
        log_softmax(logits, &mut self.log_probs);
        self.perplexity.add(&self.log_probs, next);
        match &mut self.base {
            Base::None => {}
            Base::Save(writer) => writer.push(logits)?,
            Base::Compare(base, divergence) => {
                log_softmax(base.row(self.n_scored), &mut self.base_log_probs);
                divergence.add(&self.base_log_probs, &self.log_probs);
            }
        }
        self.n_scored += 1;
        Ok(())
    }

    fn print(&self, args: &PerplexityArgs) -> Outcome {
        let ppl = self.perplexity.estimate();
        let divergence = match &self.base {
            Base::Compare(_, divergence) => Some(divergence.summary()),
            _ => None,
        };
        if args.json {
            let mut object = json!({
                "perplexity": ppl.value,
                "perplexity_stderr": ppl.standard_error,
                "n_scored": self.n_scored,
                "ctx": args.ctx,
            });
            if let (Some(d), Some(map)) = (divergence, object.as_object_mut()) {
                let figures = [
                    ("mean_kl", d.mean_kl.value),
                    ("mean_kl_stderr", d.mean_kl.standard_error),
                    ("median_kl", d.median_kl),
                    ("p99_kl", d.p99_kl),
                    ("max_kl", d.max_kl),
                    ("same_top1", d.same_top1.value),
                    ("same_top1_stderr", d.same_top1.standard_error),
                ];
                map.extend(figures.map(|(key, value)| (key.to_owned(), json!(value))));
            }
            return output::json(&object);
        }
        let mut text = format!(
            "perplexity {:.4} ± {:.4} over {} tokens\n",
            ppl.value, ppl.standard_error, self.n_scored
        );
        if let Some(d) = divergence {
            text.push_str(&format!(
                "KL divergence: mean {:.6} ± {:.6}, median {:.6}, 99 % {:.6}, max {:.6}\n\
                 same most likely token: {:.2} ± {:.2} %\n",
                d.mean_kl.value,
                d.mean_kl.standard_error,
                d.median_kl,
                d.p99_kl,
                d.max_kl,
                100.0 * d.same_top1.value,
                100.0 * d.same_top1.standard_error,
            ));
        }
        output::text(&text)
    }
}
