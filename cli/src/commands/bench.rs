//! `kestrel bench`: how fast a model reads and writes on this machine, and how close that is to what the machine can do.

use crate::args::ThreadCounts;
use crate::failure::Outcome;
use crate::model::ModelArgs;
use crate::output::{self, Table};
use crate::progress::Steps;
use clap::Args;
use kestrel_formats::Result;
use kestrel_formats::proc::{available_bytes, kib_line};
use kestrel_runtime::kernels::peak::{Limits, READ_BYTES, Reading};
use kestrel_runtime::state::State;
use kestrel_runtime::{Batch, Work};
use serde_json::{Value as Json, json};
use std::time::{Duration, Instant};

/// Measure prefill and decode speed beside the machine's own limits
///
/// The limits are the rate of reading memory and the peak rates of the int8 dot product and of f32 multiply-adds, with
/// the same instruction set and threads. Each figure is the median over the repeats; that of reading between tokens and
/// its share are medians over the readings. Tokens are pseudo-random, the same in every run.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel bench falcon.gguf -p 512 -n 64 -r 3
  kestrel bench falcon.gguf --depth 8192 --threads 1,2
  KESTREL_ISA=avx2 kestrel bench falcon.gguf --threads 1 --json

Figures:
  GB/s     bytes of weights that a decoded token touches, and of the state, read and written; their share is of what
           reading other memory brings right before and after, since that changes while other programs run
  ns       how long a message between two threads takes there and back, between tokens: where a virtual machine is moved
           between cores, this tells cores that share their way to memory from others, which read faster
  GMAC/s   multiply-adds of the matrices; prefill computes the output matrix for its last token only
  RssAnon  the most memory that is not the mapped file, beside the measurement of the limits
  RssFile  the mapped file; whether it lies in large pages, which are read faster on some machines, is up to the system")]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs<ThreadCounts>,

    /// Tokens to read at once
    #[arg(short, long = "n-prompt", value_name = "N", default_value_t = 512, value_parser = count(0))]
    prompt: u32,

    /// Tokens to write, one after the other
    #[arg(short, long = "n-tokens", value_name = "N", default_value_t = 64, value_parser = count(0))]
    n_tokens: u32,

    /// Tokens to consume before anything is timed
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = count(0))]
    depth: u32,

    /// Sequences that are decoded together; the figure is their total
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,

    /// How often
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = count(1))]
    repeats: u32,

    /// Print one flat JSON object for each number of threads, on a line
    #[arg(long)]
    json: bool,
}

/// Decoding goes on for this long between two readings of memory, which leave it nothing in the caches.
const BETWEEN: Duration = Duration::from_millis(100);

fn count(least: i64) -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(least..=1 << 20)
}

pub fn run(args: &BenchArgs) -> Outcome {
    let thread_counts = args.model.threads.get();
    let steps = Steps::new(thread_counts.len() * (3 + 2 * args.repeats as usize));
    let runs: Vec<Measured> =
        thread_counts.into_iter().map(|n| Measured::new(args, n, &steps)).collect::<Result<_>>()?;
    drop(steps);
    match args.json {
        true => runs.iter().try_for_each(|run| output::json(&run.to_json(args))),
        false => output::text(&table(args, &runs)),
    }
}

/// Everything about one number of threads.
struct Measured {
    isa: &'static str,
    threads: usize,
    limits: Limits,
    /// Bytes per second of reading between decoded tokens.
    read_bytes_s: Vec<f64>,
    /// How long two threads took to answer each other at the same times.
    answer_ns: Vec<f64>,
    /// Tokens decoded per byte that reading brought in the same time, each time of the readings right before and after.
    tok_per_read_byte: Vec<f64>,
    work: Work,
    open_ms: f64,
    first_token_ms: f64,
    /// Tokens per second, one of each repeat.
    prefill_tok_s: Vec<f64>,
    decode_tok_s: Vec<f64>,
    rss_anon_bytes: Option<u64>,
    rss_file_bytes: Option<u64>,
    rss_file_large_bytes: Option<u64>,
}

impl Measured {
    fn new(args: &BenchArgs, threads: usize, steps: &Steps) -> Result<Self> {
        let started = Instant::now();
        let since_start_ms = || started.elapsed().as_secs_f64() * 1e3;
        let (model, open_ms) = steps
            .step("opening the model", || -> Result<_> { Ok((args.model.open()?, since_start_ms())) })?;
        let mut session = args.model.session_with(&model, threads)?;
        let mut tokens = Tokens { state: 1, vocab: model.hparams().vocab_size as u64 };
        session.prefill(&[tokens.next()])?;
        let first_token_ms = since_start_ms();

        let (isa, threads) = (session.runner().isa(), session.runner().n_threads());
        let mut reading = Reading::new(threads, read_bytes(model.work().weight_bytes))?;
        let limits = steps.step("the machine's limits", || Limits::measure(isa, &mut reading));
        session.reset();
        steps.step(format!("reading {} tokens before", args.depth), || {
            session.prefill(&tokens.take(args.depth))
        })?;
        let start = session.state().clone();
        let mut run = Self {
            isa: isa.name(),
            threads,
            limits,
            read_bytes_s: Vec::new(),
            answer_ns: Vec::new(),
            tok_per_read_byte: Vec::new(),
            work: model.work(),
            open_ms,
            first_token_ms,
            prefill_tok_s: Vec::new(),
            decode_tok_s: Vec::new(),
            rss_anon_bytes: None,
            rss_file_bytes: None,
            rss_file_large_bytes: None,
        };
        for _ in 0..args.repeats {
            session.set_state(start.clone())?;
            let prompt = tokens.take(args.prompt);
            let prefill =
                steps.step("reading a prompt", || Spent::on(args.prompt, || session.prefill(&prompt)))?;
            run.prefill_tok_s.extend(prefill.rate());

            let mut batch = match args.batch {
                1 => None,
                n => Some(batch_of(n, &start, Batch::new(&model, &args.model.runner_options(threads))?)?),
            };
            let mut decode = Spent::default();
            steps.step("writing", || -> Result<()> {
                let (mut since, mut before) = (Spent::default(), Spent::of_reading(&mut reading, BETWEEN));
                for i in 0..args.n_tokens {
                    let next = tokens.take(args.batch);
                    let step = Spent::on(args.batch, || match &mut batch {
                        Some(batch) => {
                            batch.step(&next.iter().map(std::slice::from_ref).collect::<Vec<_>>()).map(|_| ())
                        }
                        None => session.prefill(&next),
                    })?;
                    decode.add(step);
                    since.add(step);
                    if since.time > BETWEEN || i + 1 == args.n_tokens {
                        let after = Spent::of_reading(&mut reading, since.time);
                        run.read_bytes_s.extend(after.rate());
                        run.answer_ns.extend(reading.answer_time().map(|time| time.as_secs_f64() * 1e9));
                        before.add(after);
                        run.tok_per_read_byte
                            .extend(since.rate().zip(before.rate()).map(|(tokens, bytes)| tokens / bytes));
                        (since, before) = (Spent::default(), after);
                    }
                }
                Ok(())
            })?;
            run.decode_tok_s.extend(decode.rate());
            let rss_anon = kib_line("/proc/self/status", "RssAnon:");
            let rss_anon = rss_anon.map(|n| n.saturating_sub(reading.n_bytes() as u64));
            run.rss_anon_bytes = run.rss_anon_bytes.max(rss_anon);
            run.rss_file_bytes = run.rss_file_bytes.max(kib_line("/proc/self/status", "RssFile:"));
            let large = kib_line("/proc/self/smaps_rollup", "FilePmdMapped:");
            run.rss_file_large_bytes = run.rss_file_large_bytes.max(large);
        }
        model.check_unchanged()?;
        Ok(run)
    }

    /// Multiply-adds per second while reading.
    fn prefill_mac_s(&self, n_prompt: u32) -> Option<f64> {
        let macs = self.work.prefill_macs(n_prompt.into()) as f64 / f64::from(n_prompt);
        median(&self.prefill_tok_s).map(|tok_s| tok_s * macs)
    }

    /// Bytes per second while writing.
    fn decode_bytes_s(&self, n_sequences: u32) -> Option<f64> {
        median(&self.decode_tok_s).map(|tok_s| tok_s * self.bytes_per_token(n_sequences))
    }

    fn bytes_per_token(&self, n_sequences: u32) -> f64 {
        self.work.step_bytes(n_sequences.into()) as f64 / f64::from(n_sequences)
    }

    /// Bytes per second while writing, of those of reading at the same time.
    fn read_share(&self, n_sequences: u32) -> Option<f64> {
        median(&self.tok_per_read_byte).map(|tokens| tokens * self.bytes_per_token(n_sequences))
    }

    fn to_json(&self, args: &BenchArgs) -> Json {
        let prefill_mac_s = self.prefill_mac_s(args.prompt);
        let decode_bytes_s = self.decode_bytes_s(args.batch);
        let giga = |x: Option<f64>| x.map(|x| x / 1e9);
        json!({
            "prefill_tok_s": median(&self.prefill_tok_s),
            "prefill_tok_s_min": least(&self.prefill_tok_s),
            "prefill_tok_s_max": most(&self.prefill_tok_s),
            "prefill_gmac_s": giga(prefill_mac_s),
            "prefill_int8_share": prefill_mac_s.map(|x| x / self.limits.int8_mac_s),
            "decode_tok_s": median(&self.decode_tok_s),
            "decode_tok_s_min": least(&self.decode_tok_s),
            "decode_tok_s_max": most(&self.decode_tok_s),
            "decode_gb_s": giga(decode_bytes_s),
            "decode_read_share": self.read_share(args.batch),
            "read_between_gb_s": giga(median(&self.read_bytes_s)),
            "answer_ns": median(&self.answer_ns),
            "read_gb_s": self.limits.read_bytes_s / 1e9,
            "int8_peak_gmac_s": self.limits.int8_mac_s / 1e9,
            "f32_peak_gmac_s": self.limits.f32_mac_s / 1e9,
            "open_ms": self.open_ms,
            "first_token_ms": self.first_token_ms,
            "rss_anon_bytes": self.rss_anon_bytes,
            "rss_file_bytes": self.rss_file_bytes,
            "rss_file_large_bytes": self.rss_file_large_bytes,
            "weight_bytes_per_token": self.work.weight_bytes,
            "state_bytes": self.work.state_bytes / 2,
            "isa": self.isa,
            "threads": self.threads,
            "precise": args.model.precise,
            "depth": args.depth,
            "batch": args.batch,
            "n_prompt": args.prompt,
            "n_tokens": args.n_tokens,
            "repeats": args.repeats,
            "model": args.model.path.display().to_string(),
            "version": env!("CARGO_PKG_VERSION"),
        })
    }

    /// The cells of this run's column.
    fn cells(&self, args: &BenchArgs) -> [String; 17] {
        let prefill_mac_s = self.prefill_mac_s(args.prompt);
        let decode_bytes_s = self.decode_bytes_s(args.batch);
        let number = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{x:.1}"));
        let spread = |x: &[f64]| match (median(x), least(x), most(x)) {
            (Some(median), Some(least), Some(most)) => format!("{median:.2} ({least:.2} to {most:.2})"),
            _ => "-".to_owned(),
        };
        let bytes = |n: Option<u64>| n.map_or("-".to_owned(), output::bytes);
        [
            self.isa.to_owned(),
            number(Some(self.limits.read_bytes_s / 1e9)),
            number(Some(self.limits.int8_mac_s / 1e9)),
            number(Some(self.limits.f32_mac_s / 1e9)),
            spread(&self.prefill_tok_s),
            number(prefill_mac_s.map(|x| x / 1e9)),
            number(prefill_mac_s.map(|x| 100.0 * x / self.limits.int8_mac_s)),
            spread(&self.decode_tok_s),
            number(decode_bytes_s.map(|x| x / 1e9)),
            number(median(&self.read_bytes_s).map(|x| x / 1e9)),
            number(self.read_share(args.batch).map(|x| 100.0 * x)),
            number(median(&self.answer_ns)),
            number(Some(self.first_token_ms)),
            bytes(self.rss_anon_bytes),
            bytes(self.rss_file_bytes),
            bytes(self.rss_file_large_bytes),
            bytes(Some(self.work.state_bytes / 2)),
        ]
    }
}

/// One column per number of threads.
fn table(args: &BenchArgs, runs: &[Measured]) -> String {
    let headings: Vec<String> = std::iter::once(String::new())
        .chain(runs.iter().map(|run| format!(">threads: {}", run.threads)))
        .collect();
    let names = [
        "instruction set".to_owned(),
        "reading memory, GB/s".to_owned(),
        "int8 peak, GMAC/s".to_owned(),
        "f32 peak, GMAC/s".to_owned(),
        format!("prefill of {}, tok/s", args.prompt),
        "  GMAC/s".to_owned(),
        "  % of the int8 peak".to_owned(),
        format!("decode of {} x {}, tok/s", args.batch, args.n_tokens),
        "  GB/s".to_owned(),
        "  reading memory between tokens, GB/s".to_owned(),
        "  % of that".to_owned(),
        "  two threads answer each other, ns".to_owned(),
        "first token, ms".to_owned(),
        "RssAnon at most".to_owned(),
        "RssFile at most".to_owned(),
        "  of it in large pages".to_owned(),
        "state".to_owned(),
    ];
    let columns: Vec<_> = runs.iter().map(|run| run.cells(args)).collect();
    let mut table = Table::new(&headings.iter().map(String::as_str).collect::<Vec<_>>());
    for (i, name) in names.into_iter().enumerate() {
        table.row(std::iter::once(name).chain(columns.iter().map(|c| c[i].clone())));
    }
    table.to_string()
}

/// How much memory the rate of reading is measured on: [`READ_BYTES`], or a quarter of what is left beside a model of so many
/// bytes if that is less.
fn read_bytes(model_bytes: u64) -> usize {
    let available = available_bytes().unwrap_or(u64::MAX);
    (available.saturating_sub(model_bytes) / 4).clamp(1 << 20, READ_BYTES as u64) as usize
}

/// So many sequences in the same state.
fn batch_of<'m>(n: u32, state: &State, mut batch: Batch<'m>) -> Result<Batch<'m>> {
    for _ in 0..n {
        batch.add(state.clone())?;
    }
    Ok(batch)
}

/// What was done, in tokens or bytes, and how long it took.
#[derive(Clone, Copy, Default)]
struct Spent {
    amount: f64,
    time: Duration,
}

impl Spent {
    fn add(&mut self, other: Self) {
        self.amount += other.amount;
        self.time += other.time;
    }

    /// Reads memory for so long.
    fn of_reading(reading: &mut Reading, at_least: Duration) -> Self {
        let (n_bytes, time) = reading.go_on(at_least);
        Self { amount: n_bytes as f64, time }
    }

    /// Times work on so many tokens.
    fn on(n_tokens: u32, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let started = Instant::now();
        work()?;
        Ok(Self { amount: n_tokens.into(), time: started.elapsed() })
    }

    /// Amount per second; nothing done is no figure.
    fn rate(&self) -> Option<f64> {
        (self.amount > 0.0).then(|| self.amount / self.time.as_secs_f64().max(1e-9))
    }
}

/// The middle one, of an even number the mean of the middle two; none if nothing was measured.
fn median(figures: &[f64]) -> Option<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    Some((sorted.get(n / 2)? + sorted.get(n.saturating_sub(1) / 2)?) / 2.0)
}

fn least(figures: &[f64]) -> Option<f64> {
    figures.iter().copied().min_by(f64::total_cmp)
}

fn most(figures: &[f64]) -> Option<f64> {
    figures.iter().copied().max_by(f64::total_cmp)
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

    fn take(&mut self, n: u32) -> Vec<u32> {
        (0..n).map(|_| self.next()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[3.0, 1.0]), Some(2.0));
        assert_eq!(median(&[]), None);
        assert_eq!((least(&[3.0, 1.0, 2.0]), most(&[3.0, 1.0, 2.0])), (Some(1.0), Some(3.0)));
    }
}
