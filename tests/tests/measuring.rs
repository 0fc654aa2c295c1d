//! What quality is measured with: inputs of matrices against transformers, many texts read together against each
//! alone, log-likelihoods against logits.

use kestrel_formats::arch::{Role, spec};
use kestrel_formats::imatrix::Imatrix;
use kestrel_formats::{ErrorKind, Result};
use kestrel_runtime::evaluate::log_softmax;
use kestrel_runtime::kernels::Isa;
use kestrel_runtime::likelihood::{Scored, continuation, likelihoods, rolling};
use kestrel_runtime::observe::{ColumnEnergy, Observer};
use kestrel_runtime::reader::{Reader, Sequence};
use kestrel_runtime::session::Session;
use kestrel_runtime::{Model, RunnerOptions};
use kestrel_tests::goldens::{Golden, data_dir, tiny_dir};
use kestrel_tests::running::{converted, difference, logits, on};
use kestrel_tests::temp_dir::TempDir;

/// Windows and tokens of `scripts/oracle/imatrix.py`.
const N_CTX: usize = 128;

fn text() -> String {
    std::fs::read_to_string(data_dir().join("texts/a-tale-of-two-cities-200000.txt")).expect("the text")
}

/// Sums over the windows that the golden file was made from.
fn measured(model: &Model, golden: &Imatrix, options: &RunnerOptions) -> ColumnEnergy {
    let tokens = model.tokenizer().expect("a tokenizer").encode(&text(), false).expect("ids");
    let mut session = Session::new(model, options).expect("a session");
    let mut energy = ColumnEnergy::new(model.is_tied());
    assert_eq!(golden.chunk_size(), Some(N_CTX as u32));
    for window in tokens.chunks(N_CTX).take(golden.chunks().expect("a number of chunks") as usize) {
        session.reset();
        session.observe(window, &mut energy).expect("reading");
    }
    energy
}

/// Largest |got - want| / want over the columns of all matrices.
fn off(golden: &Imatrix, energy: &ColumnEnergy) -> f64 {
    let mut worst: f64 = 0.0;
    let mut n = 0;
    for (name, sums, count) in energy.sums() {
        let want = golden.for_tensor(name).unwrap_or_else(|| panic!("no {name} in the golden file"));
        assert_eq!(sums.len(), want.len(), "{name}");
        for (sum, want) in sums.iter().zip(want) {
            let (got, want) = (f64::from(*sum) / f64::from(count), f64::from(*want));
            worst = worst.max((got - want).abs() / want);
        }
        n += 1;
    }
    assert_eq!(n, golden.len());
    worst
}

#[test]
fn an_importance_matrix_is_that_of_transformers_on_every_instruction_set() {
    let golden = Imatrix::open(&data_dir().join("imatrix/tiny-transformers.gguf")).expect("the golden file");
    assert_eq!(golden.len(), 6 * 4 + 1);
    let dir = TempDir::new();
    let (model, _) = converted(&dir, &tiny_dir(), "f32");
    let mut first: Option<ColumnEnergy> = None;
    for isa in Isa::all_supported() {
        let energy = measured(&model, &golden, &on(isa, 2));
        let worst = off(&golden, &energy);
        assert!(worst < 2e-4, "{}: off by {worst:.1e}", isa.name());
        let first = first.get_or_insert_with(|| energy.clone());
        assert!(first.sums().eq(energy.sums()), "{} differs in a bit", isa.name());
    }
    // A chunk that a window does not fit, and a checkpoint instead of its GGUF: only rounding differs.
    let pieces = measured(&model, &golden, &RunnerOptions { chunk: 50, ..on(Isa::best(), 1) });
    assert!(off(&golden, &pieces) < 2e-4);
    let folder = kestrel_tests::running::open(&tiny_dir());
    assert!(off(&golden, &measured(&folder, &golden, &on(Isa::best(), 2))) < 2e-4);
    // Inputs in int8 are near, and f32 beside quantized weights is what --precise is for.
    let (quantized, _) = converted(&dir, &tiny_dir(), "q8_0");
    let int8 = off(&golden, &measured(&quantized, &golden, &on(Isa::best(), 2)));
    let precise =
        off(&golden, &measured(&quantized, &golden, &RunnerOptions { precise: true, ..on(Isa::best(), 2) }));
    assert!(precise < 0.05 && int8 < 0.2 && precise < int8, "precise {precise}, int8 {int8}");
}

/// An observer sees every matrix once per chunk, in the order of the model, with as many rows as tokens.
#[test]
fn an_observer_sees_every_input_in_order() {
    struct Seen(Vec<(Role, usize, usize, usize)>);
    impl Observer for Seen {
        fn input(&mut self, role: Role, layer: usize, cols: usize, rows: &[f32]) {
            assert_eq!(rows.len() % cols, 0);
            self.0.push((role, layer, cols, rows.len() / cols));
        }
    }
    let model = kestrel_tests::running::open(&tiny_dir());
    let h = *model.hparams();
    let mut session =
        Session::new(&model, &RunnerOptions { chunk: 4, ..on(Isa::best(), 1) }).expect("a session");
    let mut seen = Seen(Vec::new());
    session.observe(&[1, 2, 3, 4, 5, 6], &mut seen).expect("reading");
    let mut wanted = Vec::new();
    for n_tokens in [4, 2] {
        for layer in 0..h.n_layer {
            for role in [Role::SsmIn, Role::SsmX, Role::SsmDt, Role::SsmOut] {
                wanted.push((role, layer, (spec(role).shape)(&h)[1], n_tokens));
            }
        }
        wanted.push((Role::Output, 0, h.d_model, n_tokens));
    }
    assert_eq!(seen.0, wanted);
    let error = session.observe(&[h.vocab_size as u32], &mut seen).expect_err("no such token");
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
}

/// What a reader says about some sequences, each with the logits alone beside it.
fn compare(model: &Model, options: &RunnerOptions, sequences: &[Sequence], tolerance: f64) {
    let vocab = model.hparams().vocab_size;
    let mut reader = Reader::new(model, options).expect("a reader");
    let mut found: Vec<(usize, usize, Vec<f32>)> = Vec::new();
    let read = reader.read(sequences, |i, place, logits| {
        found.push((i, place, logits.to_vec()));
        Ok(())
    });
    read.expect("reading");
    let mut found = found.into_iter();
    for (i, s) in sequences.iter().enumerate() {
        let alone = logits(model, options, &s.tokens);
        for place in s.wanted.clone() {
            let (at, where_, row) = found.next().expect("a position for each that is wanted");
            assert_eq!((at, where_), (i, place));
            let worst = difference(&alone[place * vocab..][..vocab], &row, vocab);
            assert!(worst <= tolerance, "sequence {i}, position {place}: off by {worst:.1e}");
        }
    }
    assert!(found.next().is_none());
}

#[test]
fn texts_read_together_are_those_read_alone() {
    let (golden, dir) = (Golden::load("tiny-falcon-mamba"), TempDir::new());
    let take =
        |from: usize, n: usize, wanted| Sequence { tokens: golden.tokens[from..from + n].to_vec(), wanted };
    let sequences = [
        take(0, 20, 5..20),
        take(3, 20, 0..1),
        take(7, 1, 0..1),
        take(9, 9, 0..0),
        take(4, 11, 10..11),
        take(30, 64, 62..64),
        take(10, 150, 0..150), // more than a chunk by itself
        take(80, 3, 1..3),
        take(0, 0, 0..0),
        take(60, 64, 0..64),
        take(61, 40, 30..40),
    ];
    let options = RunnerOptions { chunk: 64, ..on(Isa::best(), 2) };
    let (model, _) = converted(&dir, &tiny_dir(), "f32");
    compare(&model, &options, &sequences, 1e-4);
    // Many very short ones: more than have a state at once.
    let short: Vec<Sequence> = (0..40).map(|i| take(i, 1 + i % 3, i % 3..1 + i % 3)).collect();
    compare(&model, &options, &short, 1e-4);
    // With int8 activations a rounding that falls to the other side is larger.
    let (model, _) = converted(&dir, &tiny_dir(), "q4_k_m");
    compare(&model, &options, &sequences, 0.06);
}

#[test]
fn a_reader_stops_at_the_first_error() {
    let model = kestrel_tests::running::open(&tiny_dir());
    let mut reader = Reader::new(&model, &on(Isa::best(), 1)).expect("a reader");
    let good = Sequence { tokens: vec![1, 2, 3], wanted: 0..3 };
    let mut n = 0;
    let stopped = reader.read(&[good.clone(), good.clone()], |_, place, _| {
        n += 1;
        if place == 1 { Err(kestrel_formats::Error::new(ErrorKind::Interrupted)) } else { Ok(()) }
    });
    assert_eq!((stopped.expect_err("stopped").kind(), n), (ErrorKind::Interrupted, 2));
    let bad = Sequence { tokens: vec![u32::MAX], wanted: 0..1 };
    let error = reader.read(&[good, bad], |_, _, _| panic!("nothing is read")).expect_err("no such token");
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
}

/// Sum of ln p of the tokens after `n_context`, from the logits of the whole text.
fn by_hand(model: &Model, options: &RunnerOptions, tokens: &[u32], n_context: usize) -> (f64, bool) {
    let vocab = model.hparams().vocab_size;
    let all = logits(model, options, &tokens[..tokens.len() - 1]);
    let mut log_probs = vec![0.0; vocab];
    let (mut sum, mut greedy) = (0.0, true);
    for i in n_context - 1..tokens.len() - 1 {
        log_softmax(&all[i * vocab..][..vocab], &mut log_probs);
        sum += log_probs[tokens[i + 1] as usize];
        greedy &= kestrel_tests::goldens::argmax(&log_probs) == tokens[i + 1];
    }
    (sum, greedy)
}

#[test]
fn log_likelihoods_are_those_of_the_logits() {
    let (golden, dir) = (Golden::load("tiny-falcon-mamba"), TempDir::new());
    let (model, _) = converted(&dir, &tiny_dir(), "f32");
    let options = on(Isa::best(), 2);
    let mut asked: Vec<Scored> = (0..12)
        .map(|i| Scored {
            context: golden.tokens[3 * i..5 * i + 2].to_vec(),
            continuation: golden.tokens[5 * i + 2..6 * i + 3].to_vec(),
        })
        .collect();
    // What transformers continues greedily with.
    asked.extend(
        golden.greedy().into_iter().map(|g| Scored { context: g.prompt_tokens, continuation: g.tokens }),
    );
    let mut reader = Reader::new(&model, &options).expect("a reader");
    let mut steps = Vec::new();
    let found = likelihoods(&mut reader, &asked, 2048, |done| {
        steps.push(done);
        Ok(())
    });
    let found = found.expect("likelihoods");
    assert_eq!(steps.last(), Some(&asked.len()));
    for (s, l) in asked.iter().zip(&found) {
        let all = [&s.context[..], &s.continuation].concat();
        let (sum, greedy) = by_hand(&model, &options, &all, s.context.len());
        assert!((sum - l.log_likelihood).abs() < 1e-3 * sum.abs(), "{sum} and {l:?}");
        assert_eq!((greedy, s.continuation.len()), (l.is_greedy, l.n_tokens));
    }
    assert!(found[12..].iter().all(|l| l.is_greedy && l.n_tokens == 32));
    // A limit cuts contexts, and a rolling text into pieces; the sum over pieces is that over a text with the same
    // contexts.
    let tokens = &golden.tokens[..30];
    let pieces = rolling(tokens, 0, 8);
    let found = likelihoods(&mut reader, &pieces, 8, |_| Ok(())).expect("likelihoods");
    assert_eq!(found.iter().map(|l| l.n_tokens).sum::<usize>(), 30);
    for (s, l) in pieces.iter().zip(&found) {
        let all = [&s.context[..], &s.continuation].concat();
        assert!((by_hand(&model, &options, &all, s.context.len()).0 - l.log_likelihood).abs() < 1e-2);
    }
    let long = Scored { context: vec![0], continuation: vec![1; 9] };
    let error = likelihoods(&mut reader, &[long], 8, |_| Ok(())).expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::Limit);
}

/// Boundaries as `HFLM._encode_pair` and `loglikelihood` draw them.
#[test]
fn the_boundary_between_context_and_continuation() {
    let tokenizer = kestrel_tests::running::open(&tiny_dir()).tokenizer().expect("a tokenizer");
    let encode = |text: &str| tokenizer.encode(text, true).expect("ids");
    let start = tokenizer.text_start().expect("a token that begins texts");
    let pair = |context: &str, text: &str| -> Result<(Vec<u32>, Vec<u32>)> {
        continuation(&tokenizer, start, context, text).map(|s| (s.context, s.continuation))
    };
    // The whole is encoded once, so that a word that goes on is not cut into other tokens.
    for (context, text) in
        [("It was the", " best of times"), ("It was the bes", "t of times"), ("a\n", "\nb")]
    {
        let whole = encode(&format!("{context}{text}"));
        let n = encode(context.trim_end()).len();
        assert_eq!(pair(context, text).expect("a pair"), (encode(context.trim_end()), whole[n..].to_vec()));
    }
    // White space moves.
    assert_eq!(pair("It was \t", "the").expect("a pair"), pair("It was", " \tthe").expect("a pair"));
    // Nothing before it is the token that begins texts, once.
    assert_eq!(pair("", "Yes").expect("a pair"), (vec![start], encode("Yes")));
    assert_eq!(pair("", "<|endoftext|>Yes").expect("a pair"), (vec![start], encode("Yes")));
    for (context, text) in [("It was", ""), ("", ""), ("", "<|endoftext|>")] {
        assert_eq!(pair(context, text).expect_err("nothing to score").kind(), ErrorKind::Missing);
    }
}
