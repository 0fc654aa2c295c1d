//! Reading many texts for the logits after some of their tokens: what perplexity and log-likelihoods are made of.

use crate::forward::{Runner, RunnerOptions};
use crate::kernels::Segment;
use crate::model::Model;
use crate::session::{all_finite, check_tokens, not_finite};
use crate::state::State;
use kestrel_formats::Result;
use std::ops::Range;

/// Sequences in one forward pass at most: each needs a state, 38 MiB for the 7B.
const TOGETHER_MAX: usize = 8;

/// Is given (sequence, place, logits).
type Each<'a> = &'a mut dyn FnMut(usize, usize, &[f32]) -> Result<()>;

/// One text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its tokens, read from an empty state.
    pub tokens: Vec<u32>,
    /// Places in `tokens` after which the logits are wanted.
    pub wanted: Range<usize>,
}

/// Reads sequences that have nothing to do with each other, several in one forward pass where they are short.
pub struct Reader<'m> {
    model: &'m Model,
    runner: Runner<'m>,
    states: Vec<State>,
}

impl<'m> Reader<'m> {
    /// Errors: an instruction set that this machine lacks.
    pub fn new(model: &'m Model, options: &RunnerOptions) -> Result<Self> {
        Ok(Self { model, runner: Runner::new(model, options)?, states: Vec::new() })
    }

    /// How many of `sequences`, from the first on, one forward pass reads: at least one, unless there are none.
    pub fn together(&self, sequences: &[Sequence]) -> usize {
        let mut room = self.runner.max_tokens();
        let fits = |s: &&Sequence| {
            let left = room.checked_sub(s.tokens.len());
            room = left.unwrap_or(0);
            left.is_some()
        };
        sequences.iter().take(TOGETHER_MAX).take_while(fits).count().max(sequences.len().min(1))
    }

    /// Reads all sequences and calls `each(sequence, place, logits)` with the logits (vocab) at every wanted place, in
    /// order. A sequence that is longer than a forward pass takes several by itself.
    ///
    /// Errors: the first of `each`; those of [`crate::Session::prefill`].
    pub fn read(
        &mut self,
        mut sequences: &[Sequence],
        mut each: impl FnMut(usize, usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        sequences.iter().try_for_each(|s| check_tokens(self.model, &s.tokens))?;
        let mut first = 0;
        while !sequences.is_empty() {
            let (now, later) = sequences.split_at(self.together(sequences));
            let mut each = |i, place, logits: &[f32]| each(first + i, place, logits);
            match now {
                [one] => self.alone(one, &mut |place, logits| each(0, place, logits))?,
                some => self.side_by_side(some, &mut each)?,
            }
            self.model.check_unmodified()?;
            first += now.len();
            sequences = later;
        }
        Ok(())
    }

    /// `n` empty states.
    fn empty_states(&mut self, n: usize) {
        self.states.iter_mut().take(n).for_each(State::reset);
        while self.states.len() < n {
            self.states.push(self.model.new_state());
        }
    }

    fn alone(
        &mut self,
        sequence: &Sequence,
        each: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.empty_states(1);
        let most = self.runner.max_tokens();
        for (i, piece) in sequence.tokens.chunks(most).enumerate() {
            let (start, n_tokens) = (i * most, piece.len());
            let at = |place: usize| place.clamp(start, start + n_tokens) - start;
            let wanted = at(sequence.wanted.start)..at(sequence.wanted.end);
            let mut outcome = Ok(());
            let mut segments = [Segment { state: &mut self.states[0], n_tokens }];
            self.runner.forward_wanted(&mut segments, piece, wanted, &mut |i, logits| {
                if outcome.is_ok() {
                    outcome = finite(self.model, logits).and_then(|()| each(start + i, logits));
                }
            });
            outcome?;
        }
        Ok(())
    }

    /// Sequences that fit one forward pass.
    fn side_by_side(&mut self, sequences: &[Sequence], each: Each<'_>) -> Result<()> {
        self.empty_states(sequences.len());
        let tokens: Vec<u32> = sequences.iter().flat_map(|s| &s.tokens).copied().collect();
        // (sequence, place in it, place in `tokens`)
        let mut wanted = Vec::new();
        let mut start = 0;
        for (i, s) in sequences.iter().enumerate() {
            let n_tokens = s.tokens.len();
            wanted
                .extend((s.wanted.start..s.wanted.end.min(n_tokens)).map(|place| (i, place, start + place)));
            start += n_tokens;
        }
        let lengths = sequences.iter().map(|s| s.tokens.len());
        let mut segments: Vec<Segment<'_>> = self
            .states
            .iter_mut()
            .zip(lengths)
            .filter(|(_, n_tokens)| *n_tokens > 0)
            .map(|(state, n_tokens)| Segment { state, n_tokens })
            .collect();
        let mut outcome = Ok(());
        let mut places = wanted.iter();
        let rows = wanted.iter().map(|&(.., row)| row);
        self.runner.forward_wanted(&mut segments, &tokens, rows, &mut |_, logits| {
            if let (Ok(()), Some(&(i, place, _))) = (&outcome, places.next()) {
                outcome = finite(self.model, logits).and_then(|()| each(i, place, logits));
            }
        });
        outcome
    }
}

fn finite(model: &Model, logits: &[f32]) -> Result<()> {
    if all_finite(logits) { Ok(()) } else { Err(not_finite(model)) }
}
