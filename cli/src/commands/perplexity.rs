//! `kestrel perplexity`: how well a model predicts a text, and how far its predictions are from another model's.

use crate::failure::Outcome;
use crate::model::ModelArgs;
use crate::progress::Count;
use crate::windows::Windows;
use crate::{files, interrupt, output};
use clap::Args;
use kestrel_formats::atomic_file::check_target;
use kestrel_formats::kl_base::{KlBase, KlBaseWriter, Layout, Prediction, PredictionBuffer};
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::evaluate::{Divergence, DivergenceSummary, Estimate, Perplexity, log_softmax, scored};
use kestrel_runtime::reader::{Reader, Sequence};
use kestrel_runtime::tokenizer::Tokenizer;
use serde_json::json;
use std::path::PathBuf;

const N_CTX: u32 = 512;

/// Measure perplexity on a text, and KL divergence from a base model
///
/// Windows and scored positions are those of llama-perplexity: windows of --ctx tokens without overlap, each from an
/// empty state, the second half scored. Base files are llama-perplexity's as well, in both directions.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel perplexity falcon-bf16.gguf -f text.txt --chunks 20 --save-kl-base base.kl
  kestrel perplexity falcon-q4_k_m.gguf --kl-base base.kl

The base file holds 2 * vocabulary * (ctx/2 - 1) bytes per window: 33 MB for the 7B at --ctx 512.")]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// The text, UTF-8; - is stdin. Not needed with --kl-base, which holds the tokens
    #[arg(short, long, value_name = "FILE", required_unless_present = "kl_base")]
    file: Option<PathBuf>,

    /// Tokens of a window [default: 512, or what the base has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(4..=1 << 20))]
    ctx: Option<u32>,

    /// Read only the first N windows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,

    /// Compare with the base model's predictions in this file
    #[arg(long, value_name = "FILE")]
    kl_base: Option<PathBuf>,

    /// Save this model's predictions, to be the base of others
    #[arg(long, value_name = "FILE", conflicts_with = "kl_base")]
    save_kl_base: Option<PathBuf>,

    /// With --save-kl-base: keep f32 logits, which only kestrel reads, instead of 16 bits as llama-perplexity does. For
    /// divergences below 1e-4
    #[arg(long, requires = "save_kl_base")]
    kl_base_f32: bool,

    /// Replace the file of --save-kl-base if it exists
    #[arg(long, requires = "save_kl_base")]
    force: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &PerplexityArgs) -> Outcome {
    let target = args.save_kl_base.as_deref().map(|p| check_target(p, args.force)).transpose()?;
    let text = args.file.as_deref().map(files::read_text).transpose()?;
    let model = args.model.open()?;
    let (vocab, tokenizer) = (model.hparams().vocab_size, model.tokenizer()?);
    let base = args.kl_base.as_deref().map(|path| KlBase::open(path, vocab)).transpose()?;
    let windows = args.windows(text.as_deref(), base.as_ref(), &tokenizer)?;
    let base = match (base, &target) {
        (Some(base), _) => Base::Compare(base, Divergence::default()),
        (None, Some(path)) => {
            interrupt::writing(path);
            let layout = if args.kl_base_f32 { Layout::F32 } else { Layout::LlamaCpp };
            Base::Save(KlBaseWriter::create(
                path,
                layout,
                (vocab, windows.n_ctx),
                &windows.tokens,
                args.force,
            )?)
        }
        (None, None) => Base::None,
    };
    let mut evaluation = Evaluation::new(vocab, base);
    let mut reader = Reader::new(&model, &args.model.runner_options(args.model.threads.get()))?;
    let wanted = scored(windows.n_ctx);
    // The last token of a window is only predicted.
    let sequences: Vec<Sequence> = windows
        .iter()
        .map(|mut tokens| {
            tokens.truncate(wanted.end);
            Sequence { tokens, wanted: wanted.clone() }
        })
        .collect();
    let bar = Count::new("windows", windows.len(), 0);
    let mut first = 0;
    while first < sequences.len() {
        let n = reader.together(&sequences[first..]);
        reader.read(&sequences[first..first + n], |i, place, logits| {
            evaluation.position(logits, windows.tokens[(first + i) * windows.n_ctx + place + 1])
        })?;
        first += n;
        bar.advance(n, &evaluation.so_far());
    }
    drop(bar);
    model.check_unchanged()?;
    if let Base::Save(writer) = evaluation.base {
        writer.finish()?;
        evaluation.base = Base::None;
    }
    evaluation.print(args, windows.n_ctx)
}

impl PerplexityArgs {
    /// What is read: the base's windows where there is a base, and else those of the text.
    fn windows(&self, text: Option<&str>, base: Option<&KlBase>, tokenizer: &Tokenizer) -> Result<Windows> {
        let n_ctx = self.ctx.unwrap_or_else(|| base.map_or(N_CTX, |b| b.n_ctx() as u32));
        let of_text = match (text, &self.file) {
            (Some(text), Some(path)) => Some(Windows::of_text(path, text, tokenizer, n_ctx, self.chunks)?),
            _ => None,
        };
        let Some(base) = base else {
            return of_text.ok_or_else(|| Error::new(ErrorKind::Usage).what("text").expected("--file"));
        };
        let differs = |what: &str, expected: String| {
            let error = Error::new(ErrorKind::Inconsistent).what(what).expected(expected);
            self.kl_base.as_deref().map_or(error.clone(), |path| error.file(path))
        };
        if base.n_ctx() != n_ctx as usize {
            return Err(
                differs("windows of the base", format!("{n_ctx} tokens, as --ctx says")).found(base.n_ctx())
            );
        }
        let mut windows = Windows::new(base.tokens().to_vec(), base.n_ctx(), self.chunks, tokenizer);
        if windows.is_empty() {
            return Err(differs("windows of the base", "at least one".into()).found("none"));
        }
        if let Some(text) = of_text {
            let n = text.tokens.len().min(windows.tokens.len());
            if let Some(i) = (0..n).find(|&i| text.tokens[i] != windows.tokens[i]) {
                return Err(differs(&format!("token {i} of the base"), "the text's".into()).found("another"));
            }
            windows.tokens.truncate(n);
        }
        Ok(windows)
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
    prediction: PredictionBuffer,
}

impl Evaluation {
    fn new(vocab: usize, base: Base) -> Self {
        let zeros = vec![0.0; vocab];
        let perplexity = Perplexity::default();
        let prediction = PredictionBuffer::default();
        Self { perplexity, base, n_scored: 0, log_probs: zeros.clone(), base_log_probs: zeros, prediction }
    }

    fn position(&mut self, logits: &[f32], next: u32) -> Result<()> {
        log_softmax(logits, &mut self.log_probs);
        self.perplexity.add(&self.log_probs, next);
        match &mut self.base {
            Base::None => {}
            Base::Save(writer) => writer.push(logits)?,
            Base::Compare(base, divergence) => {
                let of_base = match base.prediction(self.n_scored, next, &mut self.prediction)? {
                    Prediction::LogProbs(log_probs) => log_probs,
                    Prediction::Logits(logits) => {
                        log_softmax(logits, &mut self.base_log_probs);
                        &self.base_log_probs
                    }
                };
                divergence.add(of_base, &self.log_probs, next);
            }
        }
        self.n_scored += 1;
        Ok(())
    }

    fn so_far(&self) -> String {
        let perplexity = format!("perplexity {:.4}", self.perplexity.estimate().value);
        match &self.base {
            Base::Compare(_, d) => format!("{perplexity}, mean KL {:.6}", d.mean_kl()),
            _ => perplexity,
        }
    }

    fn print(&self, args: &PerplexityArgs, n_ctx: usize) -> Outcome {
        let ppl = self.perplexity.estimate();
        let divergence = match &self.base {
            Base::Compare(_, divergence) => Some(divergence.summary()),
            _ => None,
        };
        if args.json {
            let mut object = json!({"n_scored": self.n_scored, "ctx": n_ctx});
            let mut add = |key: &str, value: f64| object[key] = json!(value);
            let mut estimate = |key: &str, e: Estimate| {
                add(key, e.value);
                add(&format!("{key}_stderr"), e.standard_error);
            };
            estimate("perplexity", ppl);
            if let Some(d) = divergence {
                named(&d).into_iter().for_each(|(key, e)| estimate(key, e));
                add("max_kl", d.max_kl);
            }
            return output::json(&object);
        }
        let mut text = format!(
            "perplexity {:.4} ± {:.4} over {} tokens\n",
            ppl.value, ppl.standard_error, self.n_scored
        );
        if let Some(d) = divergence {
            let percent = |e: Estimate| format!("{:.3} ± {:.3} %", 100.0 * e.value, 100.0 * e.standard_error);
            let nats = |e: Estimate| format!("{:.6} ± {:.6}", e.value, e.standard_error);
            text.push_str(&format!(
                "perplexity over the base's: {}\nKL divergence: mean {}, median {}, 99 % {}, max {:.6}\n\
                 same most likely token: {}\nRMS change of the next token's probability: {}\n",
                nats(d.perplexity_ratio),
                nats(d.mean_kl),
                nats(d.median_kl),
                nats(d.p99_kl),
                d.max_kl,
                percent(d.same_top1),
                percent(d.rms_change),
            ));
        }
        output::text(&text)
    }
}

/// The figures that have an error, by their names in JSON.
fn named(d: &DivergenceSummary) -> [(&'static str, Estimate); 6] {
    [
        ("mean_kl", d.mean_kl),
        ("median_kl", d.median_kl),
        ("p99_kl", d.p99_kl),
        ("same_top1", d.same_top1),
        ("rms_change", d.rms_change),
        ("perplexity_ratio", d.perplexity_ratio),
    ]
}
