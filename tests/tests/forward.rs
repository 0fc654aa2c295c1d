//! The runtime's forward pass against transformers in float32, and against itself: pieces, states, instruction sets,
//! threads.

use kestrel_runtime::kernels::Isa;
use kestrel_runtime::{Model, Runner, RunnerOptions, State};
use kestrel_tests::goldens::{self, Golden};
use kestrel_tests::load_reference;
use kestrel_tests::running::{
    convert, converted, difference, greedy, logits, logits_in_pieces, on, open, where_present,
};
use kestrel_tests::temp_dir::TempDir;

/// Largest allowed |logit - golden| / max |golden logit of that position|.
pub const TOLERANCE: f64 = 2e-4;

/// One prefill, ragged pieces, token by token; on an instruction set.
fn equals_transformers(isa: Isa) {
    let mut names = goldens::random_names();
    names.push("tiny-falcon-mamba".into());
    for name in names {
        let (golden, dir) = (Golden::load(&name), TempDir::new());
        let source = checkpoint(&golden, &dir);
        let (model, _) = converted(&dir, &source, "f32");
        let all = golden.tokens.len();
        for lengths in [&[all][..], &[1, 2, 3, 5, 7, 64, 31, 33, 16], &[1]] {
            let mut runner = Runner::new(&model, &on(isa, 2)).expect("a runner");
            assert_eq!(runner.isa(), isa);
            let got = logits_in_pieces(&mut runner, &mut model.new_state(), &golden.tokens, lengths);
            let who = format!("{name} on {} in pieces of {lengths:?}", isa.name());
            golden.compare(&got).expect_within(TOLERANCE, &who);
        }
    }
}

/// The folder of a golden's checkpoint: the tiny one in the repository, or a random one written into `dir`.
fn checkpoint(golden: &Golden, dir: &TempDir) -> std::path::PathBuf {
    if golden.name == "tiny-falcon-mamba" {
        return goldens::tiny_dir();
    }
    golden.model().write(dir.path());
    dir.path().to_owned()
}

#[test]
fn scalar_equals_transformers() {
    where_present(Isa::Scalar, equals_transformers);
}

#[test]
fn avx2_equals_transformers() {
    where_present(Isa::Avx2, equals_transformers);
}

#[test]
fn avx512_equals_transformers() {
    where_present(Isa::Avx512, equals_transformers);
}

#[test]
fn amx_equals_transformers() {
    where_present(Isa::Amx, equals_transformers);
}

#[test]
fn neon_equals_transformers() {
    where_present(Isa::Neon, equals_transformers);
}

#[test]
fn a_checkpoint_folder_runs_as_it_is() {
    // Weights in F32, BF16 and F16, and the trained one in BF16: all executed without conversion.
    for name in
        ["falcon-1-layer", "falcon-2-layers", "falcon-4-layers", "falcon3", "mamba", "tiny-falcon-mamba"]
    {
        let (golden, dir) = (Golden::load(name), TempDir::new());
        let model = open(&checkpoint(&golden, &dir));
        golden.compare(&logits(&model, &on(Isa::best(), 2), &golden.tokens)).expect_within(TOLERANCE, name);
    }
}

#[test]
fn another_eps_in_the_file_is_seen_by_the_runtime() {
    // x_proj left unscaled is what a converter without the eps fix would write: the same as an eps of 1e-5.
    let (golden, dir) = (Golden::load("falcon-2-layers"), TempDir::new());
    let mut random = golden.model();
    random.config["mixer_rms_eps"] = 1e-5.into();
    random.write(dir.path());
    let (model, _) = converted(&dir, dir.path(), "f32");
    let got = golden.compare(&logits(&model, &on(Isa::best(), 2), &golden.tokens));
    assert!(got.worst > 10.0 * TOLERANCE, "off by only {:.1e}", got.worst);
}

#[test]
fn a_falcon_published_as_mamba_gets_its_norms() {
    // What gives it away is TII's vocabulary; the first 192 rows are those of the golden's model.
    let (golden, dir) = (Golden::load("falcon-tiny-dev"), TempDir::new());
    let mut random = golden.model();
    random.config["vocab_size"] = 65_024.into();
    let reference = random.reference();
    let expected: Vec<f64> = reference.logits(&golden.tokens[..8]).into_iter().flatten().collect();
    random.write(dir.path());
    let mut legacy = random.config.clone();
    legacy["model_type"] = "mamba".into();
    legacy["architectures"] = serde_json::json!(["MambaForCausalLM"]);
    legacy.as_object_mut().expect("an object").remove("mixer_rms_eps");
    dir.file("config.json", legacy.to_string().as_bytes());
    let (model, _) = converted(&dir, dir.path(), "f32");
    let got = logits(&model, &on(Isa::best(), 2), &golden.tokens[..8]);
    let worst = difference(&expected, &got, 65_024);
    assert!(worst <= TOLERANCE, "off by {worst:.1e}");
}

#[test]
fn the_reference_agrees_from_gguf_and_from_the_checkpoint() {
    let (golden, dir) = (Golden::load("tiny-falcon-mamba"), TempDir::new());
    let path = dir.path().join("f32.gguf");
    convert(&goldens::tiny_dir(), "f32", &path);
    let tokens = &golden.tokens[..64];
    let checkpoint =
        kestrel_formats::checkpoint::Checkpoint::open(&goldens::tiny_dir()).expect("the checkpoint");
    let a: Vec<f64> =
        load_reference::from_checkpoint(&checkpoint).logits(tokens).into_iter().flatten().collect();
    let file = kestrel_formats::gguf::Gguf::open(&path).expect("the file");
    let b: Vec<f64> = load_reference::from_gguf(&file).logits(tokens).into_iter().flatten().collect();
    let worst = difference(&a, &b, golden.vocab_size);
    assert!(worst < 1e-6, "off by {worst:.1e}");
}

#[test]
fn a_state_saved_and_restored_changes_no_bit() {
    let (golden, dir) = (Golden::load("tiny-falcon-mamba"), TempDir::new());
    for file_type in ["f32", "q4_k_m"] {
        let (model, _) = converted(&dir, &goldens::tiny_dir(), file_type);
        let (first, second) = golden.tokens.split_at(143);
        let run = |between: fn(&Model, State) -> State| {
            let mut runner = Runner::new(&model, &on(Isa::best(), 2)).expect("a runner");
            let mut state = model.new_state();
            logits_in_pieces(&mut runner, &mut state, first, &[50]);
            let mut state = between(&model, state);
            let mut runner = Runner::new(&model, &on(Isa::best(), 2)).expect("a runner");
            logits_in_pieces(&mut runner, &mut state, second, &[9, 1])
        };
        let plain = run(|_, state| state);
        let through_a_file = run(|model, state| {
            let bytes = state.to_bytes();
            State::from_bytes(&bytes, model.state_shape(), "state".as_ref()).expect("a saved state")
        });
        let snapshot = run(|model, state| {
            let kept = state.clone();
            let (mut other, mut runner) = (state, Runner::new(model, &on(Isa::best(), 1)).expect("a runner"));
            logits_in_pieces(&mut runner, &mut other, &[1, 2, 3], &[3]); // a fork that must not disturb the snapshot
            kept
        });
        assert!(plain == through_a_file && plain == snapshot, "{file_type}");
    }
}

#[test]
fn greedy_text_is_that_of_transformers() {
    let dir = TempDir::new();
    let (model, _) = converted(&dir, &goldens::tiny_dir(), "f32");
    for isa in Isa::all_supported() {
        for g in Golden::load("tiny-falcon-mamba").greedy() {
            assert_eq!(
                greedy(&model, &on(isa, 2), &g.prompt_tokens, 32),
                g.tokens,
                "{} on {}",
                g.prompt,
                isa.name()
            );
        }
    }
}

/// Every operation rounds alike everywhere: logits are equal to the bit, and so is greedy text.
#[test]
fn instruction_sets_and_threads_agree_to_the_bit() {
    let (golden, dir) = (Golden::load("tiny-falcon-mamba"), TempDir::new());
    let tokens = &golden.tokens[..48];
    for file_type in ["q4_k_m", "q2_k", "q4_0", "q5_1", "q6_k", "q8_0", "iq4_xs"] {
        let (model, _) = converted(&dir, &goldens::tiny_dir(), file_type);
        let in_pieces = |options: &RunnerOptions, lengths: &[usize]| {
            let mut runner = Runner::new(&model, options).expect("a runner");
            logits_in_pieces(&mut runner, &mut model.new_state(), tokens, lengths)
        };
        let all = |options: RunnerOptions| {
            let texts = golden
                .greedy()
                .iter()
                .map(|g| greedy(&model, &options, &g.prompt_tokens, 32))
                .collect::<Vec<_>>();
            (
                in_pieces(&options, &[tokens.len()]),
                in_pieces(&options, &[1]),
                in_pieces(&options, &[3, 20, 7]),
                texts,
            )
        };
        for &precise in if file_type == "q4_k_m" { &[false, true][..] } else { &[false] } {
            let run = |isa, threads| all(RunnerOptions { precise, ..on(isa, threads) });
            let truths = [Isa::Scalar, Isa::ScalarInt8].map(|isa| (isa, run(isa, 1)));
            for isa in Isa::all_supported() {
                let (_, truth) = truths.iter().find(|(of, _)| *of == isa.truth()).expect("plain Rust");
                let got = run(isa, 2);
                let who = format!("{file_type}, precise {precise}, on {}", isa.name());
                assert!(truth.0 == got.0, "{who}: one prefill");
                assert!(truth.1 == got.1, "{who}: token by token");
                assert!(truth.2 == got.2, "{who}: in pieces");
                assert_eq!(truth.3, got.3, "{who}: greedy text");
            }
        }
        for threads in [2, 3] {
            let [one, more] = [1, threads].map(|n| in_pieces(&on(Isa::best(), n), &[tokens.len()]));
            assert!(one == more, "{file_type}: {threads} threads");
        }
    }
}
