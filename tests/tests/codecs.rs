//! The codecs against ggml's own, whose results `scripts/oracle/ggml_codecs.py` keeps in `tests/data/codecs`.
//!
//! Inputs are seeded and made again here; their arithmetic is exact, so both sides start from the same bits.

use kestrel_formats::GgmlType;
use kestrel_formats::arch::{TENSORS, TensorSpec};
use kestrel_formats::checkpoint::Checkpoint;
use kestrel_quant::codec;
use kestrel_quant::error_measure::{ErrorStats, relative_rmse_limit};
use kestrel_quant::isa::Isa;
use kestrel_quant::recipe::{FileType, Recipe};
use kestrel_tests::goldens::{data_dir, tiny_dir};
use kestrel_tests::load_reference;
use kestrel_tests::plain_search::quantized_row;
use serde_json::Value;

const EXACT: [GgmlType; 5] = [GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q5_0, GgmlType::Q5_1];
const KINDS: [&str; 4] = ["normal", "heavy", "ties", "positive"];
const N_QUANTIZED: usize = 1024;
const N_ERRORS: usize = 65536;
const N_RANDOM_BLOCKS: usize = 512;
const IMPORTANCE_COLS: usize = 256;

/// The block types in the order of the script, which seeds the random blocks by position.
const BLOCK_TYPES: [GgmlType; 12] = [
    GgmlType::Q8_0,
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q2K,
    GgmlType::Q3K,
    GgmlType::Q4K,
    GgmlType::Q5K,
    GgmlType::Q6K,
    GgmlType::Iq4Nl,
    GgmlType::Iq4Xs,
];

fn splitmix64(seed: u64) -> impl Iterator<Item = u64> {
    (1..).map(move |i: u64| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

/// The script's `weights`.
fn weights(kind: &str, n: usize) -> Vec<f32> {
    let seed = 1 + KINDS.iter().position(|k| *k == kind).expect("a kind") as u64;
    let make = |(u, v): (u64, u64)| {
        let fields: i64 = (0..4).map(|k| (u >> (16 * k) & 0xffff) as i64).sum();
        let normal = (fields - 131_070) as f32 / (1 << 22) as f32;
        match kind {
            "heavy" => normal * (1u32 << (v | 128).trailing_zeros()) as f32,
            "ties" => ((u % 17) as f32 - 8.0) / 4.0,
            "positive" => normal + 1.0 / 16.0,
            _ => normal,
        }
    };
    splitmix64(seed).zip(splitmix64(100)).map(make).take(n).collect()
}

/// The script's `importance`.
fn importance(n: usize) -> Vec<f32> {
    let make = |u: u64| ((u & 0xffff) as f32 + 1.0) / 65536.0 * if u >> 60 == 0 { 16.0 } else { 1.0 };
    splitmix64(7).map(make).take(n).collect()
}

fn random_bytes(seed: u64, n: usize) -> Vec<u8> {
    splitmix64(seed).flat_map(u64::to_le_bytes).take(n).collect()
}

fn fnv1a(words: impl Iterator<Item = u32>) -> String {
    let step = |h: u64, w: u32| (h ^ u64::from(w)).wrapping_mul(0x100_0000_01b3);
    format!("{:016x}", words.fold(0xcbf2_9ce4_8422_2325, step))
}

fn hash_floats(x: &[f32]) -> String {
    fnv1a(x.iter().map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }))
}

fn goldens() -> Value {
    let path = data_dir().join("codecs/goldens.json");
    serde_json::from_slice(&std::fs::read(path).expect("goldens.json")).expect("JSON")
}

fn ggml_quantized(ty: GgmlType) -> Vec<u8> {
    let path = data_dir().join(format!("codecs/{}.quantized", ty.name().to_lowercase()));
    std::fs::read(path).expect("a golden file per type")
}

fn quantize(ty: GgmlType, x: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut out = vec![0; ty.bytes_for(x.len() as u64).expect("whole blocks") as usize];
    let Some(w) = importance else {
        codec(ty).quantize(x, None, &mut out);
        return out;
    };
    let row_bytes = ty.bytes_for(w.len() as u64).expect("whole blocks") as usize;
    for (row, out) in x.chunks_exact(w.len()).zip(out.chunks_exact_mut(row_bytes)) {
        codec(ty).quantize(row, Some(w), out);
    }
    out
}

fn dequantize(ty: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_len()];
    codec(ty).dequantize(bytes, &mut out);
    out
}

#[test]
fn the_simple_types_are_quantized_to_ggmls_bytes() {
    for ty in EXACT {
        let golden = ggml_quantized(ty);
        let ours: Vec<u8> =
            KINDS.iter().flat_map(|kind| quantize(ty, &weights(kind, N_QUANTIZED), None)).collect();
        let differs = ours.iter().zip(&golden).position(|(a, b)| a != b);
        assert!(
            ours.len() == golden.len() && differs.is_none(),
            "{ty}: first difference at byte {differs:?}"
        );
    }
}

#[test]
fn all_types_are_dequantized_to_ggmls_bits() {
    let goldens = goldens();
    for (i, ty) in BLOCK_TYPES.into_iter().enumerate() {
        let golden = &goldens["dequantized"][ty.name()];
        let quantized = dequantize(ty, &ggml_quantized(ty));
        let first = golden["first"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32);
        assert_eq!(quantized[..32], first.collect::<Vec<_>>(), "{ty}");
        assert_eq!(hash_floats(&quantized), golden["quantized"], "{ty}, ggml's blocks");
        let random = random_bytes(1000 + i as u64, N_RANDOM_BLOCKS * ty.block_bytes());
        assert_eq!(hash_floats(&dequantize(ty, &random)), golden["random"], "{ty}, random bytes");
    }
}

#[test]
fn sixteen_bit_types_agree_with_ggml_on_every_number() {
    let goldens = goldens();
    let patterns: Vec<f32> =
        random_bytes(9, 4 << 20).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let every: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for (name, ty) in [("fp16", GgmlType::F16), ("bf16", GgmlType::Bf16)] {
        let golden = &goldens["sixteen_bit"][name];
        assert_eq!(hash_floats(&dequantize(ty, &every)), golden["expanded"], "{ty}");
        let rounded = quantize(ty, &patterns, None);
        let words = rounded.as_chunks().0.iter().map(|b| u32::from(u16::from_le_bytes(*b)));
        assert_eq!(fnv1a(words), golden["rounded"], "{ty}");
    }
}

/// The script's `error_weights`: how ggml's search weighs squared errors.
fn error_weights(ty: GgmlType, x: &[f32], importance: Option<&[f32]>) -> Vec<f64> {
    let square = |v: &f32| f64::from(*v) * f64::from(*v);
    let mean_square = |n: usize| -> Vec<f64> {
        x.chunks(n)
            .flat_map(|c| std::iter::repeat_n(c.iter().map(square).sum::<f64>() / n as f64, n))
            .collect()
    };
    let abs = x.iter().map(|v| f64::from(v.abs()));
    let Some(q) = importance else {
        return match ty {
            GgmlType::Q4K | GgmlType::Q5K => abs.zip(mean_square(32)).map(|(a, m)| m.sqrt() + a).collect(),
            GgmlType::Q2K => abs.collect(),
            _ => x.iter().map(square).collect(),
        };
    };
    let q = q.iter().map(|v| f64::from(*v)).cycle();
    if ty == GgmlType::Q6K {
        return q.take(x.len()).collect();
    }
    let single_level = ty.block_len() == 32;
    let factor = if single_level || ty == GgmlType::Q2K { 1.0 } else { 2.0 };
    let sigma2 = mean_square(if single_level { IMPORTANCE_COLS } else { 256 });
    x.iter().zip(q).zip(sigma2).map(|((v, q), s)| q * (factor * s + square(v)).sqrt()).collect()
}

/// A seeded input or a tensor of the tiny trained model.
fn source(name: &str) -> Vec<f32> {
    if KINDS.contains(&name) {
        return weights(name, N_ERRORS);
    }
    let checkpoint = Checkpoint::open(&tiny_dir()).unwrap();
    let t = checkpoint.tensor(name).expect("a tensor of the tiny model");
    load_reference::dequantized(&checkpoint, t)
}

#[test]
fn quantization_errors_are_no_larger_than_ggmls() {
    let goldens = goldens();
    let imp = importance(IMPORTANCE_COLS);
    let mut larger = Vec::new();
    for (name, per_type) in goldens["errors"].as_object().unwrap() {
        let x = source(name);
        for ty in BLOCK_TYPES {
            for (mode, imp) in [("none", None), ("importance", Some(imp.as_slice()))] {
                let got = dequantize(ty, &quantize(ty, &x, imp));
                let squared = x.iter().zip(&got).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
                let w = error_weights(ty, &x, imp);
                let weighted: f64 = squared.clone().zip(&w).map(|(e, w)| e * w).sum();
                let plain: f64 = squared.sum();
                let ratio = |found: f64, key: &str| found / per_type[ty.name()][mode][key].as_f64().unwrap();
                // Equal bytes give equal errors but for the order of the sum. With an importance matrix the plain
                // error is not what is minimised.
                let plain_limit = if imp.is_none() { 1.0 + 1e-9 } else { 1.06 };
                for (kind, ratio, limit) in [
                    ("weighted", ratio(weighted, "weighted"), 1.0 + 1e-9),
                    ("plain", ratio(plain, "plain"), plain_limit),
                ] {
                    if ratio > limit {
                        larger.push(format!(
                            "{ty}, importance {mode}, {name}: {kind} error {ratio:.4} of ggml's"
                        ));
                    }
                }
            }
        }
    }
    assert!(larger.is_empty(), "{larger:#?}");
}

#[test]
fn every_type_keeps_seeded_and_trained_weights_within_its_limit_and_no_type_has_slack() {
    let sources = ["normal", "heavy", "backbone.layers.0.mixer.in_proj.weight", "lm_head.weight"].map(source);
    for ty in GgmlType::all() {
        let mut worst = 0f64;
        for x in &sources {
            let mut stats = ErrorStats::default();
            stats.accumulate(x, &dequantize(ty, &quantize(ty, x, None)));
            worst = worst.max(stats.relative_rmse());
        }
        let limit = relative_rmse_limit(ty);
        assert!(worst <= limit && worst >= 0.4 * limit, "{ty}: relative RMSE {worst:.6}, limit {limit}");
    }
}

#[test]
fn blocks_are_independent_of_their_company() {
    let x = weights("heavy", 256 * 11);
    for ty in GgmlType::all() {
        let whole = quantize(ty, &x, None);
        let parts: Vec<u8> = x.chunks(ty.block_len()).flat_map(|part| quantize(ty, part, None)).collect();
        assert!(whole == parts, "{ty}");
    }
}

#[test]
fn requantizing_what_a_type_can_express_changes_little() {
    // A second pass may find another scale, never a worse one: the error against the first result stays far below the
    // error of the first pass.
    let x = weights("normal", 4096);
    for ty in BLOCK_TYPES {
        let once = dequantize(ty, &quantize(ty, &x, None));
        let twice = dequantize(ty, &quantize(ty, &once, None));
        let (mut first, mut second) = (ErrorStats::default(), ErrorStats::default());
        first.accumulate(&x, &once);
        second.accumulate(&once, &twice);
        assert!(second.rmse() <= 0.5 * first.rmse(), "{ty}: {} after {}", second.rmse(), first.rmse());
    }
}

#[test]
fn constants_and_zeros_are_kept() {
    for ty in BLOCK_TYPES {
        assert_eq!(dequantize(ty, &quantize(ty, &[0.0; 512], None)), [0.0; 512], "{ty}");
        for c in [0.25f32, -0.25] {
            let got = dequantize(ty, &quantize(ty, &[c; 512], None));
            assert!(got.iter().all(|g| (g - c).abs() <= 0.002), "{ty}: {c} became {}", got[0]);
        }
    }
}

#[test]
fn no_float_makes_a_codec_panic() {
    let odd = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e38,
        -1e38,
        f32::MIN_POSITIVE,
        1e-42,
        -0.0,
        1.0,
        65504.0,
    ];
    for ty in GgmlType::all() {
        for (i, &a) in odd.iter().enumerate() {
            let mut x = weights("normal", 512);
            for (k, v) in x.iter_mut().enumerate() {
                match i % 3 {
                    0 => *v = a,
                    1 if k % 7 == 0 => *v = a,
                    _ if k % 64 == 1 => *v = odd[k / 64 % odd.len()],
                    _ => {}
                }
            }
            dequantize(ty, &quantize(ty, &x, None));
            for w in [vec![0.0; 512], vec![a.abs(); 512], importance(512)] {
                dequantize(ty, &quantize(ty, &x, Some(&w)));
            }
        }
        let n = ty.block_bytes() * 8;
        for fill in [0u8, 0xff, 0x7c, 0xfe] {
            dequantize(ty, &vec![fill; n]);
        }
    }
}

#[test]
fn zero_importance_everywhere_still_gives_finite_weights() {
    let x = weights("normal", 512);
    for ty in BLOCK_TYPES {
        let got = dequantize(ty, &quantize(ty, &x, Some(&[0.0; 512])));
        assert!(got.iter().all(|v| v.is_finite()), "{ty}");
    }
}

/// The row of the tensor table with this GGUF name.
fn spec_of(name: &str) -> &'static TensorSpec {
    TENSORS.iter().find(|t| t.gguf_name(0) == name).unwrap_or_else(|| panic!("{name} is in the table"))
}

#[test]
fn recipes_pick_the_types_that_llama_quantize_picks() {
    let path = data_dir().join("llama_cpp/tensor_types.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut checked = 0;
    for (shape, entry) in golden["shapes"].as_object().unwrap() {
        let config = &entry["config"];
        let tied = config["tie_word_embeddings"].as_bool().unwrap();
        for (file_type, types) in entry["types"].as_object().unwrap() {
            let recipe = Recipe::new(FileType::parse(file_type).unwrap(), &[]).unwrap();
            for (name, ty) in types.as_object().unwrap() {
                let cols = match name.as_str() {
                    "blk.0.ssm_dt.weight" => &config["time_step_rank"],
                    "blk.0.ssm_x.weight" | "blk.0.ssm_out.weight" => &config["intermediate_size"],
                    _ => &config["hidden_size"],
                };
                let cols = cols.as_u64().unwrap() as usize;
                let picked = recipe.tensor_type(spec_of(name), name, cols, tied);
                assert_eq!(picked.name(), ty, "{shape}, {file_type}, {name}, rows of {cols}");
                checked += 1;
            }
        }
    }
    assert!(checked > 300, "only {checked} tensors in the golden file");
}

/// What `llama_model_quantize` of llama-cpp-python 0.3.36 made of the tiny model with these `tt_overrides`.
#[test]
fn overrides_act_as_in_llama_quantize() {
    let types = |file_type: FileType, overrides: &[(&str, GgmlType)]| {
        let overrides: Vec<_> = overrides.iter().map(|(p, t)| (p.to_string(), *t)).collect();
        let recipe = Recipe::new(file_type, &overrides).unwrap();
        [
            "token_embd.weight",
            "blk.0.ssm_conv1d.weight",
            "blk.0.ssm_x.weight",
            "blk.0.ssm_in.weight",
            "output.weight",
        ]
        .map(|name| recipe.tensor_type(spec_of(name), name, 256, false).name())
    };
    let overrides = [("ssm_x", GgmlType::Q8_0), ("ssm_", GgmlType::Q5K), ("output", GgmlType::Q4_0)];
    assert_eq!(types(FileType::Q4KM, &overrides), ["Q4_K", "F32", "Q8_0", "Q5_K", "Q4_0"]);
    assert_eq!(types(FileType::F16, &overrides), ["F16", "F32", "F16", "F16", "F16"]);
    let overrides = [("ssm_conv1d", GgmlType::Q8_0), ("token_embd", GgmlType::F16)];
    assert_eq!(types(FileType::Q8_0, &overrides), ["F16", "F32", "Q8_0", "Q8_0", "Q8_0"]);
}

/// Rows that a search could stumble over, `IMPORTANCE_COLS` columns each.
fn odd_rows() -> Vec<(&'static str, Vec<f32>)> {
    let n = 6 * IMPORTANCE_COLS; // not a multiple of the lanes
    let scaled = |factor: f32| weights("normal", n).into_iter().map(move |v| v * factor);
    let every = |k: usize, v: f32| (0..n).map(move |i| if i % k == 0 { v } else { 0.0 });
    let mut rows: Vec<(&str, Vec<f32>)> = KINDS.iter().map(|kind| (*kind, weights(kind, n))).collect();
    rows.extend([
        ("zero", vec![0.0; n]),
        ("zeros of both signs", (0..n).map(|i| if i % 3 == 0 { 0.0 } else { -0.0 }).collect()),
        ("constant", vec![0.3; n]),
        ("negative constant", vec![-0.3; n]),
        ("two values", (0..n).map(|i| if i % 5 < 2 { 0.25 } else { -0.25 }).collect()),
        ("mostly zero", every(37, -1.5).collect()),
        ("one per block", every(256, 2.0).collect()),
        // The integer offsets of some sub-blocks miss them by more than all their codes.
        ("far from zero", scaled(1.0).map(|v| v - 1000.0).collect()),
        ("far and near", scaled(0.1).enumerate().map(|(i, v)| v - 0.37 * (i / 32 * 7 % 8) as f32).collect()),
        ("negative", weights("positive", n).into_iter().map(|v| -v - 0.5).collect()),
        ("as large as f16 holds", scaled(5e5).collect()),
        ("larger than f16 holds", scaled(1e7).collect()),
        ("larger than f32 squares", scaled(1e30).collect()),
        ("as large as f32 holds", scaled(2.5e38 / 0.0625 / 2.0).map(|v| v.clamp(-3e38, 3e38)).collect()),
        ("subnormal scales", scaled(1e-5).collect()),
        ("below f16", scaled(1e-12).collect()),
        ("below the threshold", scaled(1e-17).collect()),
        ("subnormal", scaled(1e-40).collect()),
    ]);
    rows
}

/// The instruction sets of this machine; those that `KESTREL_REQUIRE_ISA` names must be among them.
fn instruction_sets() -> Vec<Isa> {
    let sets: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.supported()).collect();
    let required = std::env::var("KESTREL_REQUIRE_ISA").unwrap_or_default();
    for (name, isa) in [("avx2", Isa::Avx2), ("avx512", Isa::Avx512)] {
        assert!(sets.contains(&isa) || !required.split(',').any(|r| r == name), "{name} is required");
    }
    sets
}

#[test]
fn every_instruction_set_finds_what_the_plain_search_finds() {
    let importance = importance(IMPORTANCE_COLS);
    let no_importance = vec![0.0; IMPORTANCE_COLS];
    let mut compared = 0;
    for (name, x) in odd_rows() {
        for ty in GgmlType::all() {
            for importance in [None, Some(&importance), Some(&no_importance)] {
                let importance = importance.map(Vec::as_slice);
                let mut bytes = vec![0; ty.bytes_for(x.len() as u64).unwrap() as usize];
                codec(ty).quantize_with(Isa::Baseline, &x, importance, &mut bytes);
                for isa in instruction_sets() {
                    let mut other = vec![0xaa; bytes.len()];
                    codec(ty).quantize_with(isa, &x, importance, &mut other);
                    let differs = bytes.iter().zip(&other).position(|(a, b)| a != b);
                    assert!(differs.is_none(), "{ty}, {name}, {isa:?}: byte {differs:?}");
                }
                for (r, (row, got)) in
                    x.chunks(IMPORTANCE_COLS).zip(dequantize(ty, &bytes).chunks(IMPORTANCE_COLS)).enumerate()
                {
                    let Some(expected) = quantized_row(ty, row, importance) else { continue };
                    let same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
                    let differs = got.iter().zip(&expected).position(|pair| !same(pair));
                    assert!(
                        differs.is_none(),
                        "{ty}, {name}, importance {}, row {r}: weight {differs:?} is {} instead of {}",
                        importance.is_some(),
                        got[differs.unwrap_or(0)],
                        expected[differs.unwrap_or(0)],
                    );
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 3000, "{compared} rows compared");
}
