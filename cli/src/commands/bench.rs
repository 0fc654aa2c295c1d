//! `kestrel bench`: how fast a model reads and writes on this machine.

use crate::failure::Outcome;
use crate::model::ModelArgs;
use crate::output::{self, Table};
use clap::Args;
use kestrel_formats::Result;
use kestrel_runtime::session::Session;
use serde_json::{Value as Json, json};
use std::time::Instant;

/// Measure prefill and decode speed
///
/// Each figure is the median over the repeats. Tokens are pseudo-random, the same in every run.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel bench falcon.gguf -p 512 -n 64 -r 3
  KESTREL_ISA=avx2 kestrel bench falcon.gguf --threads 1 --json")]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Tokens to read at once
    #[arg(short, long = "n-prompt", value_name = "N", default_value_t = 512, value_parser = count(0))]
    prompt: u32,

    /// Tokens to write, one after the other
    #[arg(short, long = "n-tokens", value_name = "N", default_value_t = 64, value_parser = count(0))]
    n_tokens: u32,

    /// How often
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = count(1))]
    repeats: u32,

    /// Print one flat JSON object
    #[arg(long)]
    json: bool,
}

fn count(least: i64) -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(least..=1 << 20)
}

pub fn run(args: &BenchArgs) -> Outcome {
    let started = Instant::now();
    let model = args.model.open()?;
    let open_ms = started.elapsed().as_secs_f64() * 1e3;
    let mut session = args.model.session(&model)?;
    let mut tokens = Tokens { state: 1, vocab: model.hparams().vocab_size as u64 };
    session.prefill(&[tokens.next()])?;
    let first_token_ms = started.elapsed().as_secs_f64() * 1e3;

    let (mut prefill_tok_s, mut decode_tok_s) = (Vec::new(), Vec::new());
    for repeat in 0..args.repeats {
        output::note(&format!("repeat {} of {}", repeat + 1, args.repeats));
        session.reset();
        let prompt: Vec<u32> = (0..args.prompt).map(|_| tokens.next()).collect();
        prefill_tok_s.push(rate(args.prompt, || session.prefill(&prompt))?);
        decode_tok_s.push(rate(args.n_tokens, || decode(&mut session, &mut tokens, args.n_tokens))?);
    }
    model.check_unchanged()?;
    let runner = session.runner();
    let results = [
        ("prefill_tok_s", median(prefill_tok_s)),
        ("decode_tok_s", median(decode_tok_s)),
        ("open_ms", json!(open_ms)),
        ("first_token_ms", json!(first_token_ms)),
        ("rss_anon_bytes", status_bytes("RssAnon:")),
        ("rss_file_bytes", status_bytes("RssFile:")),
        ("state_bytes", json!(session.state().n_bytes())),
        ("isa", json!(runner.isa().name())),
        ("threads", json!(runner.n_threads())),
        ("precise", json!(args.model.precise)),
        ("n_prompt", json!(args.prompt)),
        ("n_tokens", json!(args.n_tokens)),
        ("repeats", json!(args.repeats)),
        ("model", json!(args.model.path.display().to_string())),
        ("version", json!(env!("CARGO_PKG_VERSION"))),
    ];
    if args.json {
        let object = results.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        return output::json(&Json::Object(object));
    }
    let mut table = Table::new(&["figure", ">value"]);
    for (key, value) in results {
        table.row([key.to_owned(), show(&value)]);
    }
    output::text(&table.to_string())
}

fn decode(session: &mut Session, tokens: &mut Tokens, n: u32) -> Result<()> {
    for _ in 0..n {
        session.prefill(&[tokens.next()])?;
    }
    Ok(())
}

/// Tokens per second of `work`; nothing to measure is no figure.
fn rate(n_tokens: u32, work: impl FnOnce() -> Result<()>) -> Result<Option<f64>> {
    let started = Instant::now();
    work()?;
    let seconds = started.elapsed().as_secs_f64();
    Ok((n_tokens > 0).then(|| f64::from(n_tokens) / seconds.max(1e-9)))
}

/// The middle one, of an even number the mean of the middle two; null if nothing was measured.
fn median(figures: Vec<Option<f64>>) -> Json {
    let mut sorted: Vec<f64> = figures.into_iter().flatten().collect();
    sorted.sort_by(f64::total_cmp);
    let at = |i: usize| sorted.get(i).copied();
    let n = sorted.len();
    match (at(n / 2), at(n.saturating_sub(1) / 2)) {
        (Some(a), Some(b)) => json!((a + b) / 2.0),
        _ => Json::Null,
    }
}

/// A line of /proc/self/status; null where there is none.
fn status_bytes(name: &str) -> Json {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib: Option<u64> = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    json!(kib.map(|k| k * 1024))
}

fn show(value: &Json) -> String {
    match value {
        Json::String(text) => text.clone(),
        Json::Number(n) if n.is_f64() => format!("{:.2}", n.as_f64().unwrap_or(f64::NAN)),
        other => other.to_string(),
    }
}

/// A linear congruential generator (Knuth's MMIX constants): any fixed sequence does.
struct Tokens {
    state: u64,
    vocab: u64,
}

impl Tokens {
    fn next(&mut self) -> u32 {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % self.vocab.max(1)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![Some(3.0), Some(1.0), Some(2.0)]), json!(2.0));
        assert_eq!(median(vec![Some(3.0), Some(1.0)]), json!(2.0));
        assert_eq!(median(vec![None]), Json::Null);
    }

    #[test]
    fn the_process_knows_its_memory() {
        if cfg!(target_os = "linux") {
            assert!(status_bytes("RssAnon:").as_u64().unwrap() > 0);
        }
        assert_eq!(status_bytes("NoSuchLine:"), Json::Null);
    }
}
