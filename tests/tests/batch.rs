//! Sequences that advance together against the same sequences alone.

use kestrel_formats::ErrorKind;
use kestrel_runtime::kernels::Isa;
use kestrel_runtime::{Batch, Model, RunnerOptions, State};
use kestrel_tests::goldens::{self, Golden};
use kestrel_tests::running::{converted, difference, on};
use kestrel_tests::temp_dir::TempDir;

/// The tokens of sequence `i`: another length and another part of the text for each.
fn tokens(golden: &Golden, i: usize) -> &[u32] {
    &golden.tokens[7 * i..][..5 + 3 * i % 11]
}

/// Each sequence alone: a prefill, then its last four tokens one by one. The logits after each of those, and the state.
fn alone(model: &Model, options: &RunnerOptions, tokens: &[u32]) -> (Vec<Vec<f32>>, State) {
    let mut batch = Batch::new(model, options).unwrap();
    batch.add(model.new_state()).unwrap();
    let logits = steps(tokens).map(|t| {
        batch.step(&[t]).unwrap();
        batch.logits(0).to_vec()
    });
    (logits.collect(), batch.remove(0))
}

/// A prompt, then one token at a time.
fn steps(tokens: &[u32]) -> impl Iterator<Item = &[u32]> {
    let prompt = tokens.len() - 4;
    std::iter::once(&tokens[..prompt]).chain(tokens[prompt..].chunks(1))
}

/// All sequences together, prompts of different lengths included.
fn together(model: &Model, options: &RunnerOptions, sequences: &[&[u32]]) -> Vec<(Vec<Vec<f32>>, State)> {
    let mut batch = Batch::new(model, options).unwrap();
    let mut logits = vec![Vec::new(); sequences.len()];
    sequences.iter().for_each(|_| batch.add(model.new_state()).unwrap());
    for step in 0..5 {
        let tokens: Vec<&[u32]> = sequences.iter().map(|s| steps(s).nth(step).unwrap()).collect();
        batch.step(&tokens).unwrap();
        logits.iter_mut().enumerate().for_each(|(i, l)| l.push(batch.logits(i).to_vec()));
    }
    logits.into_iter().map(|l| (l, batch.remove(0))).collect()
}

#[test]
fn a_sequence_is_not_changed_by_its_neighbours() {
    let (golden, dir) = (Golden::load("tiny-falcon-mamba"), TempDir::new());
    for file_type in ["f32", "q4_k_m", "q8_0"] {
        let (model, _) = converted(&dir, &goldens::tiny_dir(), file_type);
        let sequences: Vec<&[u32]> = (0..20).map(|i| tokens(&golden, i)).collect();
        let all = together(&model, &on(Isa::best(), 2), &sequences);
        // Among the first seventeen alone it is the same to the bit, also on other instruction sets of the same truth: the
        // kernels for many tokens compute each by itself. (Q4_K as int8 begins with seventeen.)
        for isa in Isa::all_supported() {
            let of_others;
            let all = if isa.truth() == Isa::best().truth() {
                &all
            } else {
                of_others = together(&model, &on(isa, 2), &sequences);
                &of_others
            };
            for (i, (logits, state)) in together(&model, &on(isa, 2), &sequences[..17]).iter().enumerate() {
                assert!(*logits == all[i].0 && *state == all[i].1, "{file_type} on {}: {i}", isa.name());
            }
        }
        // By itself, few tokens go together, whose sums are in another order; where that moves an activation over the
        // border between two int8 codes, logits differ by up to a few percent.
        for (i, (logits, _)) in all.iter().enumerate() {
            let (truth, _) = alone(&model, &on(Isa::best(), 2), sequences[i]);
            for (step, (got, truth)) in logits.iter().zip(&truth).enumerate() {
                let (tolerance, difference) =
                    (if file_type == "f32" { 1e-5 } else { 5e-2 }, difference(truth, got, truth.len()));
                assert!(difference < tolerance, "{file_type}: sequence {i}, step {step}: {difference}");
            }
        }
    }
}

#[test]
fn few_sequences_are_those_alone_to_the_bit() {
    let (golden, dir) = (Golden::load("tiny-falcon-mamba"), TempDir::new());
    let (model, _) = converted(&dir, &goldens::tiny_dir(), "q4_k_m");
    // Three tokens go together at most: never enough for the panels.
    let sequences: Vec<&[u32]> = (0..3).map(|i| &golden.tokens[9 * i..][..5]).collect();
    for (i, got) in together(&model, &on(Isa::best(), 2), &sequences).iter().enumerate() {
        assert!(*got == alone(&model, &on(Isa::best(), 2), sequences[i]), "sequence {i}");
    }
}

#[test]
fn sequences_come_and_go_and_prompts_may_exceed_a_chunk() {
    let (golden, dir) = (Golden::load("tiny-falcon-mamba"), TempDir::new());
    let (model, _) = converted(&dir, &goldens::tiny_dir(), "f32");
    let options = RunnerOptions { chunk: 16, ..on(Isa::best(), 2) };
    let mut batch = Batch::new(&model, &options).unwrap();
    batch.add(model.new_state()).unwrap();
    batch.step(&[&golden.tokens[..50]]).unwrap(); // more than a chunk
    batch.add(model.new_state()).unwrap();
    batch.step(&[&golden.tokens[50..51], &golden.tokens[..40]]).unwrap(); // decoding beside a prompt
    let first = batch.remove(0);
    assert_eq!((first.n_tokens(), batch.len()), (51, 1));
    batch.step(&[&golden.tokens[40..51]]).unwrap();
    // Both have read the same 51 tokens, in other pieces.
    let mut again = Batch::new(&model, &options).unwrap();
    again.add(first).unwrap();
    again.step(&[&golden.tokens[51..52]]).unwrap();
    batch.step(&[&golden.tokens[51..52]]).unwrap();
    let (truth, got) = (again.logits(0), batch.logits(0));
    let difference = difference(truth, got, truth.len());
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn wrong_steps_are_refused_and_change_nothing() {
    let dir = TempDir::new();
    let (model, _) = converted(&dir, &goldens::tiny_dir(), "q8_0");
    let mut batch = Batch::new(&model, &on(Isa::best(), 1)).unwrap();
    assert!(batch.is_empty() && batch.step(&[]).is_ok());
    batch.add(model.new_state()).unwrap();
    let vocab = model.hparams().vocab_size as u32;
    let wrong: [&[&[u32]]; 4] = [&[], &[&[]], &[&[1], &[2]], &[&[1, vocab]]];
    for wrong in wrong {
        assert_eq!(batch.step(wrong).unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    assert_eq!(batch.state(0).n_tokens(), 0);
    let source = dir.path().join("another");
    std::fs::create_dir(&source).unwrap();
    Golden::load("falcon-1-layer").model().write(&source);
    let (other, _) = converted(&dir, &source, "f32");
    assert_eq!(batch.add(other.new_state()).unwrap_err().kind(), ErrorKind::Inconsistent);
}
