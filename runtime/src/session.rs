//! One sequence being read and written: a state, the machinery that advances it, and the loop that generates text.

use crate::forward::{Runner, RunnerOptions};
use crate::model::Model;
use crate::observe::Observer;
use crate::sampler::Sampler;
use crate::state::State;
use crate::text_stream::TextStream;
use crate::tokenizer::Tokenizer;
use kestrel_formats::{Error, ErrorKind, Result};
use std::ops::ControlFlow;

/// A sequence over a model.
pub struct Session<'m> {
    model: &'m Model,
    runner: Runner<'m>,
    state: State,
    /// Of the last token consumed (vocab).
    logits: Vec<f32>,
}

/// Why [`Session::generate`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// As many tokens as asked for.
    Length,
    /// One of the model's end tokens.
    EndToken(u32),
    /// A stop string.
    StopString,
    /// The caller's callback said so.
    Caller,
}

/// What to generate and when to stop.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// At most this many tokens.
    pub n_tokens: usize,
    /// Text that ends the generation and is not part of it.
    pub stop_strings: Vec<String>,
    /// Go on after an end token.
    pub ignore_end: bool,
    /// Consume the last token as well, so that state and logits are those after it; nothing else needs that step.
    pub consume_last: bool,
}

/// Whether no number is NaN or infinite: the sum of the products with 0 is 0 only then. Without a branch, so that it
/// costs nothing beside the logits themselves.
pub(crate) fn all_finite(x: &[f32]) -> bool {
    x.chunks(64).all(|x| x.iter().map(|x| x * 0.0).sum::<f32>() == 0.0)
}

impl<'m> Session<'m> {
    /// A session with an empty state. Errors: an instruction set that this machine lacks.
    pub fn new(model: &'m Model, options: &RunnerOptions) -> Result<Self> {
        let runner = Runner::new(model, options)?;
        Ok(Self { model, runner, state: model.new_state(), logits: vec![0.0; model.hparams().vocab_size] })
    }

    /// Consumes `tokens`; afterwards [`Self::logits`] are those of the last one. Errors: a token outside the
    /// vocabulary, before anything is consumed; `NotFinite` if the logits hold a NaN or an infinity, which sound
    /// weights do not lead to; `Changed` if the model's file was written to meanwhile.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<()> {
        check_tokens(self.model, tokens)?;
        self.runner.forward(&mut self.state, tokens, &mut self.logits);
        check_logits(self.model, all_finite(&self.logits))
    }

    /// Consumes `tokens` and calls `each(position, logits)` with the logits (vocab) after every one of them. Errors:
    /// as [`Self::prefill`].
    pub fn prefill_with_logits(&mut self, tokens: &[u32], mut each: impl FnMut(usize, &[f32])) -> Result<()> {
        check_tokens(self.model, tokens)?;
        let mut finite = true;
        self.runner.forward_all(&mut self.state, tokens, &mut |i, logits| {
            finite &= all_finite(logits);
            each(i, logits);
        });
        check_logits(self.model, finite)
    }

    /// Consumes `tokens` and shows `observer` the inputs of every matrix; the logits stay as they were. Errors: a token
    /// outside the vocabulary, `Changed`. Whether the inputs are finite is the observer's to judge.
    pub fn observe(&mut self, tokens: &[u32], observer: &mut dyn Observer) -> Result<()> {
        check_tokens(self.model, tokens)?;
        self.runner.observe(&mut self.state, tokens, observer);
        self.model.check_unmodified()
    }

    /// The logits (vocab) after the last token that was consumed.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The state, to be cloned (a snapshot, a fork) or saved.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Continues from another state. Errors: it belongs to another model.
    pub fn set_state(&mut self, state: State) -> Result<()> {
        self.model.check_state(&state)?;
        self.state = state;
        Ok(())
    }

    /// Back to before the first token.
    pub fn reset(&mut self) {
        self.state.reset();
    }

    /// The instruction set and the number of threads at work.
    pub fn runner(&self) -> &Runner<'m> {
        &self.runner
    }

    /// Draws tokens from the current logits until something stops it, and hands each token with the text that became
    /// certain through it to `each`; a last call without a token brings the rest of the text. A prompt must have been
    /// consumed before.
    pub fn generate(
        &mut self,
        sampler: &mut Sampler,
        tokenizer: &Tokenizer,
        options: &GenerateOptions,
        mut each: impl FnMut(Option<u32>, &str) -> ControlFlow<()>,
    ) -> Result<Stop> {
        let mut text = TextStream::new(&options.stop_strings);
        let mut stop = Stop::Length;
        for n_left in (0..options.n_tokens).rev() {
            let token = sampler.sample(&self.logits);
            if !options.ignore_end && tokenizer.is_end(token) {
                stop = Stop::EndToken(token);
                break;
            }
            sampler.accept(token);
            let piece = text.push(tokenizer.token_bytes(token));
            if each(Some(token), &piece).is_break() {
                return Ok(Stop::Caller);
            }
            if text.stopped() {
                return Ok(Stop::StopString);
            }
            if n_left > 0 || options.consume_last {
                self.prefill(&[token])?;
            }
        }
        let _ = each(None, &text.finish());
        Ok(stop)
    }
}

/// After a forward pass whose logits are `finite` or not. Errors: `Changed`, `NotFinite`.
pub(crate) fn check_logits(model: &Model, finite: bool) -> Result<()> {
    model.check_unmodified()?;
    if finite { Ok(()) } else { Err(not_finite(model)) }
}

pub(crate) fn not_finite(model: &Model) -> Error {
    Error::new(ErrorKind::NotFinite)
        .file(model.path())
        .what("logits")
        .expected("finite numbers")
        .found("NaN or an infinity")
        .hint("the weights are damaged; `kestrel verify` finds where")
}

/// `OutOfRange` if a token is outside the vocabulary.
pub(crate) fn check_tokens(model: &Model, tokens: &[u32]) -> Result<()> {
    let vocab_size = model.hparams().vocab_size;
    match tokens.iter().position(|&t| t as usize >= vocab_size) {
        Some(i) => Err(Error::new(ErrorKind::OutOfRange)
            .what(format!("token {i}"))
            .expected(format!("an id below {vocab_size}"))
            .found(tokens[i])),
        None => Ok(()),
    }
}
