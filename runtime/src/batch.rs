//! Several sequences that advance together: the weights are read once per step for all of them.

use crate::forward::{Runner, RunnerOptions};
use crate::kernels::Segment;
use crate::model::Model;
use crate::state::State;
use kestrel_formats::{Error, ErrorKind, Result};

/// Sequences over one model, of any lengths. They come and go between steps.
pub struct Batch<'m> {
    model: &'m Model,
    runner: Runner<'m>,
    states: Vec<State>,
    /// (sequences, vocab), of the last step.
    logits: Vec<f32>,
}

impl<'m> Batch<'m> {
    /// No sequences yet. Errors: an instruction set that this machine lacks.
    pub fn new(model: &'m Model, options: &RunnerOptions) -> Result<Self> {
        Ok(Self { model, runner: Runner::new(model, options)?, states: Vec::new(), logits: Vec::new() })
    }

    /// Sequences now.
    pub fn len(&self) -> usize {
        self.states.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// Adds a sequence, which becomes the last one. Errors: its state belongs to another model.
    pub fn add(&mut self, state: State) -> Result<()> {
        self.model.check_state(&state)?;
        self.states.push(state);
        self.logits.resize(self.states.len() * self.model.hparams().vocab_size, 0.0);
        Ok(())
    }

    /// Takes sequence `i` out; those after it move up by one.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn remove(&mut self, i: usize) -> State {
        let vocab = self.model.hparams().vocab_size;
        self.logits.drain(i * vocab..(i + 1) * vocab);
        self.states.remove(i)
    }

    /// Every sequence consumes some tokens, at least one: `tokens[i]` are those of sequence `i`. One each is a step of
    /// decoding; a new sequence may bring its prompt while the others go on. Errors, before anything is consumed: as
    /// many lists as sequences are needed, none empty, and ids within the vocabulary.
    pub fn step(&mut self, tokens: &[&[u32]]) -> Result<()> {
        self.check(tokens)?;
        let (vocab, most) = (self.model.hparams().vocab_size, self.runner.max_tokens());
        // As many tokens go together as there is room for, some of each sequence that has any left.
        let mut consumed = vec![0; tokens.len()];
        loop {
            let (mut ids, mut who) = (Vec::new(), Vec::new());
            for (i, tokens) in tokens.iter().enumerate() {
                let n = (tokens.len() - consumed[i]).min(most - ids.len());
                if n > 0 {
                    ids.extend(&tokens[consumed[i]..][..n]);
                    who.push((i, n));
                    consumed[i] += n;
                }
            }
            if ids.is_empty() {
                return Ok(());
            }
            let mut of = who.iter().peekable();
            let mut segments: Vec<Segment<'_>> = Vec::with_capacity(who.len());
            for (i, state) in self.states.iter_mut().enumerate() {
                if let Some(&&(_, n_tokens)) = of.peek().filter(|(j, _)| *j == i) {
                    segments.push(Segment { state, n_tokens });
                    of.next();
                }
            }
            let mut logits = vec![0.0; if who.len() == tokens.len() { 0 } else { who.len() * vocab }];
            if logits.is_empty() {
                self.runner.forward_segments(&mut segments, &ids, &mut self.logits);
            } else {
                self.runner.forward_segments(&mut segments, &ids, &mut logits);
                for (row, (i, _)) in logits.chunks_exact(vocab).zip(&who) {
                    self.logits[i * vocab..][..vocab].copy_from_slice(row);
                }
            }
        }
    }

    /// The logits (vocab) after the last token of sequence `i`.
    pub fn logits(&self, i: usize) -> &[f32] {
        let vocab = self.model.hparams().vocab_size;
        &self.logits[i * vocab..][..vocab]
    }

    /// The state of sequence `i`, to be cloned or saved.
    pub fn state(&self, i: usize) -> &State {
        &self.states[i]
    }

    /// The instruction set and the number of threads at work.
    pub fn runner(&self) -> &Runner<'m> {
        &self.runner
    }

    fn check(&self, tokens: &[&[u32]]) -> Result<()> {
        let usage = |what: String| Error::new(ErrorKind::OutOfRange).what(what);
        if tokens.len() != self.states.len() {
            return Err(usage("lists of tokens".into()).expected(self.states.len()).found(tokens.len()));
        }
        let vocab = self.model.hparams().vocab_size;
        for (i, tokens) in tokens.iter().enumerate() {
            if tokens.is_empty() {
                return Err(usage(format!("the tokens of sequence {i}"))
                    .expected("at least one")
                    .found("none"));
            }
            if let Some(t) = tokens.iter().find(|&&t| t as usize >= vocab) {
                return Err(usage(format!("a token of sequence {i}"))
                    .expected(format!("an id below {vocab}"))
                    .found(t));
            }
        }
        Ok(())
    }
}
