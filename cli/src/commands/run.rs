//! `kestrel run`: continues a text.

use crate::args::TextArgs;
use crate::chat;
use crate::failure::{Failure, Outcome};
use crate::model::{self, ModelArgs};
use crate::{files, interrupt, output};
use clap::Args;
use kestrel_formats::atomic_file::{AtomicFile, check_target};
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::Model;
use kestrel_runtime::State;
use kestrel_runtime::at_once;
use kestrel_runtime::sampler::{Sampler, SamplerOptions};
use kestrel_runtime::session::{GenerateOptions, Session};
use kestrel_runtime::tokenizer::Tokenizer;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Continue a text
///
/// The continuation goes to stdout as it is made, and nothing else does.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel run falcon.gguf -p \"It was the best of times,\" -n 64 --seed 1
  kestrel run falcon-instruct.gguf --chat -p \"Why is the sky blue?\"
  kestrel run falcon-mamba-7b-instruct --load-in-4bit --chat -p \"Why is the sky blue?\"")]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    text: TextArgs,

    /// Generate at most N tokens
    #[arg(short, long = "n-tokens", value_name = "N", default_value_t = 256)]
    n_tokens: u32,

    /// The text is a message of a user; put around it what the model's chat template says, or ChatML
    #[arg(long, conflicts_with = "no_parse_special")]
    chat: bool,

    /// Treat text that looks like a special token (<|im_end|>) as ordinary text
    #[arg(long)]
    no_parse_special: bool,

    /// Print the text before its continuation
    #[arg(long)]
    echo: bool,

    #[command(flatten)]
    sampling: SamplingArgs,

    /// End before this text, which is not printed (repeatable)
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,

    /// Go on after the model's end tokens
    #[arg(long)]
    ignore_eos: bool,

    #[command(flatten)]
    states: StateArgs,
}

/// Defaults are llama.cpp's.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Temperature; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temp: f32,

    /// Draw from the K likeliest tokens; 0 from all
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,

    /// Draw from the likeliest tokens that together have probability P
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,

    /// Drop tokens less likely than P times the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,

    /// Make recent tokens less likely; 1 is off
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repeat_penalty: f32,

    /// How many recent tokens the penalty looks at
    #[arg(long, value_name = "N", default_value_t = 64)]
    repeat_last_n: usize,

    /// Same seed, same text [default: from the clock, printed with --verbose]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
}

/// What a sequence remembers can be kept and gone on from: the text before is then not read again.
#[derive(Args)]
#[command(next_help_heading = "State")]
struct StateArgs {
    /// Continue from a saved state; the text is appended to what it has read
    #[arg(long, value_name = "FILE")]
    load_state: Option<PathBuf>,

    /// Save the state after the last token
    #[arg(long, value_name = "FILE")]
    save_state: Option<PathBuf>,

    /// Replace the file of --save-state if it exists
    #[arg(long, requires = "save_state")]
    force: bool,
}

pub fn run(args: &RunArgs) -> Outcome {
    let sampling = args.sampling.options();
    let mut sampler = Sampler::new(sampling.clone())?;
    let save_state =
        args.states.save_state.as_deref().map(|p| check_target(p, args.states.force)).transpose()?;
    let text = files::text(&args.text)?;
    let model = args.model.open()?;
    // Beside each other: both are a good part of the time to the first token.
    let (tokenizer, session) = at_once(|| model.tokenizer(), || args.model.session(&model));
    let tokenizer = tokenizer?;
    let tokens = args.encode(&model, &tokenizer, &text)?;
    let mut session = session?;
    if let Some(path) = &args.states.load_state {
        session.set_state(read_state(path, &session)?)?;
    }
    output::note(&format!("seed {}, {} tokens of text", sampling.seed, tokens.len()));
    if args.echo {
        output::text(&text)?;
    }
    let started = Instant::now();
    session.prefill(&tokens)?;
    tokens.iter().for_each(|&t| sampler.accept(t));
    let prefill_s = started.elapsed().as_secs_f64();
    let n_read = session.state().n_tokens();
    let n_generated = args.generate(&mut session, &mut sampler, &tokenizer)?;
    model.check_unchanged()?;
    let generate_s = started.elapsed().as_secs_f64() - prefill_s;
    output::note(&format!(
        "read {} tokens at {:.1} tok/s, wrote {n_generated} at {:.1} tok/s",
        tokens.len(),
        tokens.len() as f64 / prefill_s.max(1e-9),
        // The last token is written without a step of its own.
        (session.state().n_tokens() - n_read) as f64 / generate_s.max(1e-9),
    ));
    match save_state {
        Some(path) => Ok(write_state(&path, session.state(), args.states.force)?),
        None => Ok(()),
    }
}

impl RunArgs {
    fn encode(&self, model: &Model, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        let encoded = match self.chat {
            true => chat::user_turn(model, tokenizer, text)?,
            false => tokenizer.encode(text, !self.no_parse_special)?,
        };
        // A state has its beginning behind it, and a chat template may have written the token itself.
        let bos = tokenizer.prompt_bos().filter(|_| self.states.load_state.is_none());
        let bos = bos.filter(|bos| !(self.chat && encoded.first() == Some(bos)));
        let tokens: Vec<u32> = bos.into_iter().chain(encoded).collect();
        if tokens.is_empty() {
            return Err(Error::new(ErrorKind::Usage)
                .what("text")
                .expected("at least one token to continue from")
                .found("an empty text"));
        }
        Ok(tokens)
    }

    /// Streams the continuation; returns how many tokens it has.
    fn generate(
        &self,
        session: &mut Session,
        sampler: &mut Sampler,
        tokenizer: &Tokenizer,
    ) -> std::result::Result<u64, Failure> {
        let options = GenerateOptions {
            n_tokens: self.n_tokens as usize,
            stop_strings: self.stop.clone(),
            ignore_end: self.ignore_eos,
            consume_last: self.states.save_state.is_some(),
        };
        let n_generated = model::stream(session, sampler, tokenizer, &options, || Ok(()))?;
        if std::io::stdout().is_terminal() {
            output::text("\n")?;
        }
        Ok(n_generated)
    }
}

impl SamplingArgs {
    fn options(&self) -> SamplerOptions {
        SamplerOptions {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            seed: self.seed.unwrap_or_else(seed_from_clock),
        }
    }
}

fn seed_from_clock() -> u64 {
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since_1970.map_or(0, |d| u64::from(d.subsec_nanos()) ^ (d.as_secs() << 30)) >> 8
}

fn read_state(path: &Path, session: &Session) -> Result<State> {
    let shape = *session.state().shape();
    let file_bytes = session.state().file_bytes();
    let mut bytes = Vec::new();
    let file = kestrel_formats::map::open_regular(path)?;
    // One byte more than a state of this model shows that the file is not one.
    std::io::Read::read_to_end(&mut std::io::Read::take(file, file_bytes + 1), &mut bytes)
        .map_err(|e| Error::io(path, "reading the state", e))?;
    State::from_bytes(&bytes, shape, path)
}

fn write_state(path: &Path, state: &State, force: bool) -> Result<()> {
    let bytes = state.to_bytes();
    interrupt::writing(path);
    let file = AtomicFile::create(path, bytes.len() as u64, force)?;
    file.write_at(0, &bytes)?;
    file.commit(|_| Ok(()))
}
