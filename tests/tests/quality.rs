//! What quantization costs: KL divergence to the F32 model's logits on text that the tiny model never saw.
#![allow(clippy::print_stderr)] // the table is for people to read

use kestrel_quant::recipe::FileType;
use kestrel_runtime::evaluate::{Divergence, Perplexity, log_softmax, scored, windows};
use kestrel_runtime::kernels::Isa;
use kestrel_runtime::{Model, Runner};
use kestrel_tests::goldens::{data_dir, tiny_dir};
use kestrel_tests::running::{converted, on};
use kestrel_tests::temp_dir::TempDir;
use serde_json::{Value, json};

const N_CTX: usize = 512;

/// Mean KL divergence of llama-quantize's file of the same type, by llama-perplexity: same model, text, windows and
/// scored half (llama.cpp of 2026-09-30, no importance matrix).
#[rustfmt::skip]
const LLAMA_CPP: [(&str, f64); 14] = [
    ("bf16", 0.000007), ("f16", 0.0000005), ("q8_0", 0.000237), ("q6_k", 0.001376), ("q5_1", 0.002401),
    ("q5_k_m", 0.002626), ("q5_0", 0.002950), ("q4_1", 0.008775), ("q4_k_m", 0.007545), ("iq4_nl", 0.007755),
    ("q4_0", 0.010163), ("iq4_xs", 0.008194), ("q3_k_m", 0.031168), ("q2_k", 0.133494),
];

/// Calls `each(window, position, log-probabilities)` for every scored position of the text.
fn each_scored(model: &Model, tokens: &[u32], mut each: impl FnMut(usize, usize, &[f64])) {
    let mut runner = Runner::new(model, &on(Isa::best(), 2)).expect("a runner");
    let mut log_probs = vec![0.0; model.hparams().vocab_size];
    for (w, window) in windows(tokens.len(), N_CTX).enumerate() {
        runner.forward_all(&mut model.new_state(), &tokens[window], &mut |position, logits| {
            if scored(N_CTX).contains(&position) {
                log_softmax(logits, &mut log_probs);
                each(w, position, &log_probs);
            }
        });
    }
}

/// The types, the F32 base first; `KESTREL_QUALITY_WINDOWS` cuts the text short while working on something.
#[test]
fn every_type_diverges_as_recorded_and_no_more_than_llama_cpp() {
    let dir = TempDir::new();
    let (base, _) = converted(&dir, &tiny_dir(), "f32");
    let text =
        std::fs::read_to_string(data_dir().join("texts/a-tale-of-two-cities-200000.txt")).expect("the text");
    let mut tokens = base.tokenizer().expect("a tokenizer").encode(&text, false).expect("ids");
    let all = tokens.len() / N_CTX;
    let n_windows = std::env::var("KESTREL_QUALITY_WINDOWS").map_or(all, |n| n.parse().expect("a number"));
    tokens.truncate(n_windows * N_CTX);

    let mut base_log_probs: Vec<f32> = Vec::new();
    let mut perplexity = Perplexity::default();
    each_scored(&base, &tokens, |w, position, log_probs| {
        perplexity.add(log_probs, tokens[w * N_CTX + position + 1]);
        base_log_probs.extend(log_probs.iter().map(|&l| l as f32));
    });
    let ppl = perplexity.estimate();
    eprintln!("F32: perplexity {:.3} ± {:.3}, {n_windows} windows", ppl.value, ppl.standard_error);

    let path = data_dir().join("quality/recorded.json");
    let recorded: Value = std::fs::read_to_string(&path)
        .map_or(Value::Null, |t| serde_json::from_str(&t).expect("recorded.json is JSON"));
    let (mut failures, mut measured) = (Vec::new(), serde_json::Map::new());
    eprintln!("type      PPL      mean KL             median    99 %      same top-1   llama.cpp   recorded");
    for file_type in FileType::all().map(FileType::name).filter(|&name| name != "f32") {
        let (model, path) = converted(&dir, &tiny_dir(), file_type);
        let (ppl, s) = against(&model, &tokens, &base_log_probs);
        std::fs::remove_file(path).expect("removing the file");
        let kl = s.mean_kl.value;
        let peer = LLAMA_CPP.iter().find(|(name, _)| *name == file_type).map(|(_, kl)| *kl);
        let ours = recorded["mean_kl"][file_type].as_f64();
        eprintln!(
            "{file_type:8} {:.3}  {kl:.7} ± {:.7}  {:.6}  {:.6}  {:.2} %      {peer:?}  {ours:?}",
            ppl,
            s.mean_kl.standard_error,
            s.median_kl.value,
            s.p99_kl.value,
            100.0 * s.same_top1.value
        );
        measured.insert(file_type.to_owned(), json!((kl * 1e9).round() / 1e9));
        if n_windows == all {
            if peer.is_some_and(|peer| kl > 1.05 * peer) {
                failures.push(format!("{file_type}: mean KL {kl:.6} is above 1.05 × llama.cpp's {peer:?}"));
            }
            // Two-sided: a change for the better is recorded too. Below 1e-6 it is rounding noise.
            if !ours.is_some_and(|r| (kl - r).abs() <= 0.05 * r + 1e-7) {
                failures
                    .push(format!("{file_type}: mean KL {kl:.9} is not within 5 % of the recorded {ours:?}"));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}\nmeasured: {}", Value::Object(measured));
}

/// Perplexity and divergence of a model on the scored positions.
fn against(
    model: &Model,
    tokens: &[u32],
    base: &[f32],
) -> (f64, kestrel_runtime::evaluate::DivergenceSummary) {
    let (mut divergence, mut perplexity) = (Divergence::default(), Perplexity::default());
    let mut rows = base.chunks_exact(model.hparams().vocab_size);
    each_scored(model, tokens, |w, position, log_probs| {
        let base: Vec<f64> =
            rows.next().expect("as many positions as the base").iter().map(|&l| l.into()).collect();
        let next = tokens[w * N_CTX + position + 1];
        divergence.add(&base, log_probs, next);
        perplexity.add(log_probs, next);
    });
    (perplexity.estimate().value, divergence.summary())
}
