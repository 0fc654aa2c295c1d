//! The converter on the bundled tiny model and on models made for one trap each.

use kestrel_convert::{
    Options, Plan, Progress, Report, SOURCE_SHA256, SSM_X_SCALE, Source, plan, run, verify,
};
use kestrel_formats::calibration::{CalibratedMatrix, Calibration, CalibrationSource, CalibrationWriter};
use kestrel_formats::gguf::{Gguf, Value};
use kestrel_formats::imatrix::Imatrix;
use kestrel_formats::{Error, ErrorKind, GgmlType, Result};
use kestrel_quant::codec;
use kestrel_quant::isa::Isa;
use kestrel_quant::recipe::{FileType, Recipe};
use kestrel_tests::load_reference;
use kestrel_tests::random_model::RandomModel;
use kestrel_tests::temp_dir::TempDir;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny-falcon-mamba")
}

fn options(ty: &str) -> Options {
    with_overrides(ty, &[])
}

fn with_overrides(ty: &str, overrides: &[(String, GgmlType)]) -> Options {
    let recipe = Recipe::new(FileType::parse(ty).unwrap(), overrides).unwrap();
    Options { threads: 2, ..Options::new(recipe) }
}

fn convert_with(source: &Path, out: &Path, options: &Options) -> Result<(Plan, Report)> {
    let source = Source::open(source)?;
    let plan = plan(&source, options)?;
    let report = run(&plan, options, out, &(), &AtomicBool::new(false))?;
    Ok((plan, report))
}

fn convert(source: &Path, out: &Path, ty: &str) -> Result<(Plan, Report)> {
    convert_with(source, out, &options(ty))
}

fn verified(file: &Path, source: &Path) -> kestrel_convert::VerifyReport {
    let (file, source) = (Gguf::open(file).unwrap(), Source::open(source).unwrap());
    verify(&file, &source, 2, &(), &AtomicBool::new(false)).unwrap()
}

/// All floats of a tensor.
fn floats(file: &Gguf, name: &str) -> Vec<f32> {
    let t = file.tensor(name).unwrap();
    let mut out = vec![0.0; t.info.shape.iter().product::<u64>() as usize];
    codec(t.info.dtype).dequantize(t.bytes, &mut out);
    out
}

fn names_in(dir: &TempDir) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A random model of one layer with nothing special about it.
fn small_model(dtype: GgmlType) -> RandomModel {
    let config = json!({
        "architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 1, "state_size": 16, "conv_kernel": 4, "time_step_rank": 32,
        "vocab_size": 96, "expand": 16, "hidden_act": "silu", "layer_norm_epsilon": 1e-5, "mixer_rms_eps": 1e-6,
        "use_bias": false, "use_conv_bias": true, "tie_word_embeddings": false
    });
    RandomModel { config, dtype, seed: 5, x_proj_std: 0.1 }
}

/// `small_model` in a folder, some weights of one tensor replaced.
fn broken_model(dir: &TempDir, name: &str, dtype: GgmlType, weights: &[(usize, f32)]) {
    let model = small_model(dtype);
    model.write(dir.path());
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    let start = 8 + header_bytes + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    for &(i, x) in weights {
        let size = dtype.block_bytes();
        codec(dtype).quantize(&[x], None, &mut bytes[start + i * size..start + (i + 1) * size]);
    }
    std::fs::write(path, bytes).unwrap();
}

/// The figures are the sizes of llama-quantize's files of the same model.
#[test]
fn every_file_type_converts_verifies_and_has_the_size_of_llama_quantizes() {
    let llama_quantize = [
        ("bf16", 12_677_472),
        ("f16", 12_677_472),
        ("q8_0", 6_932_832),
        ("q6_k", 5_448_800),
        ("q5_1", 5_091_680),
        ("q5_k_m", 4_774_240),
        ("q5_0", 4_774_240),
        ("q4_1", 4_456_800),
        ("q4_k_m", 4_139_360),
        ("iq4_nl", 4_139_360),
        ("q4_0", 4_139_360),
        ("iq4_xs", 3_980_640),
        ("q3_k_m", 3_464_800),
        ("q2_k", 2_948_960),
    ];
    let dir = TempDir::new();
    for ty in FileType::all() {
        let out = dir.path().join(format!("{ty}.gguf"));
        let (plan, report) = convert(&tiny(), &out, ty.name()).unwrap();
        assert_eq!(std::fs::metadata(&out).unwrap().len(), plan.file_bytes);
        assert_eq!(report.file_bytes, plan.file_bytes);
        let file = Gguf::open(&out).unwrap();
        assert_eq!(file.tensors().len(), 63);
        assert!(file.warnings().is_empty(), "{:?}", file.warnings());
        assert_eq!(file.metadata().u32("general.file_type").unwrap(), Some(ty.id()));
        let is_quantized = file.metadata().u32("general.quantization_version").unwrap() == Some(2);
        assert_eq!(is_quantized, ty.base().is_quantized());
        let report = verified(&out, &tiny());
        report.verdict().unwrap_or_else(|e| panic!("{ty}: {e}"));
        assert_eq!(report.tensors.len(), 63);
        assert!(report.tensors.iter().all(|t| t.stats.n > 0));
        if let Some((_, bytes)) = llama_quantize.iter().find(|(name, _)| *name == ty.name()) {
            // The headers differ in a few keys, the tensors in nothing.
            let difference = plan.file_bytes as i64 - bytes;
            assert!((-2048..2048).contains(&difference), "{ty}: {} instead of {bytes}", plan.file_bytes);
        }
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads_or_the_instruction_set() {
    let dir = TempDir::new();
    for ty in ["q4_k_m", "iq4_xs", "f32"] {
        let outs = [1, 2, 4].map(|threads| {
            let out = dir.path().join(format!("{ty}-{threads}.gguf"));
            convert_with(&tiny(), &out, &Options { threads, ..options(ty) }).unwrap();
            std::fs::read(out).unwrap()
        });
        assert!(outs[0] == outs[1] && outs[0] == outs[2], "{ty}");
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let out = dir.path().join(format!("{ty}-{isa:?}.gguf"));
            convert_with(&tiny(), &out, &Options { isa, ..options(ty) }).unwrap();
            assert!(outs[0] == std::fs::read(out).unwrap(), "{ty}, {isa:?}");
        }
    }
}

/// `tests/data/conversion/README.md` says where the digests come from.
#[test]
fn the_tensors_of_every_type_have_the_recorded_bytes() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    let recorded = std::fs::read_to_string(data.join("conversion/sha256.txt")).unwrap();
    let (dir, mut found) = (TempDir::new(), String::new());
    for ty in
        ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m"]
            .into_iter()
            .chain(["q6_k", "iq4_nl", "iq4_xs"])
    {
        for (mode, imatrix) in [("none", None), ("imatrix", Some(data.join("imatrix/tiny.gguf")))] {
            let out = dir.path().join(format!("{ty}-{mode}.gguf"));
            let imatrix = imatrix.map(|path| Imatrix::open(&path).unwrap());
            convert_with(&tiny(), &out, &Options { imatrix, ..options(ty) }).unwrap();
            let file = Gguf::open(&out).unwrap();
            let mut hasher = Sha256::new();
            file.tensors().iter().for_each(|t| hasher.update(file.tensor(&t.name).unwrap().bytes));
            let digest: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            found += &format!("{ty} {mode} {digest}\n");
        }
    }
    assert!(found == recorded, "found\n{found}");
}

#[test]
fn an_f32_gguf_in_between_changes_no_tensor() {
    let dir = TempDir::new();
    let [direct, whole, again] = ["direct", "whole", "again"].map(|n| dir.path().join(n));
    convert(&tiny(), &direct, "q4_k_m").unwrap();
    convert(&tiny(), &whole, "f32").unwrap();
    convert(&whole, &again, "q4_k_m").unwrap();
    let (a, b) = (Gguf::open(&direct).unwrap(), Gguf::open(&again).unwrap());
    for t in a.tensors() {
        let other = b.tensor(&t.name).unwrap();
        assert_eq!((t.dtype, &t.shape), (other.info.dtype, &other.info.shape));
        assert!(a.tensor(&t.name).unwrap().bytes == other.bytes, "{}", t.name);
    }
    assert_eq!(b.metadata().u32("general.file_type").unwrap(), Some(15));
    assert_eq!(b.metadata().f32(SSM_X_SCALE).unwrap(), a.metadata().f32(SSM_X_SCALE).unwrap());
    // The checkpoint's digests move to another key; what was read this time is the GGUF.
    let strings = |g: &Gguf, key: &str| -> Vec<Vec<u8>> {
        g.metadata().strings(key).unwrap().unwrap().iter().map(<[u8]>::to_vec).collect()
    };
    assert_eq!(strings(&b, "kestrel.origin.sha256"), strings(&a, SOURCE_SHA256));
    assert!(strings(&b, SOURCE_SHA256)[0].starts_with(b"whole "));
    verified(&again, &whole).verdict().unwrap();
    verified(&again, &tiny()).verdict().unwrap();
}

#[test]
fn requantizing_to_the_same_type_copies_the_bytes() {
    let dir = TempDir::new();
    let [first, second] = ["first", "second"].map(|n| dir.path().join(n));
    convert(&tiny(), &first, "q3_k_m").unwrap();
    let (plan, _) = convert(&first, &second, "q3_k_l").unwrap();
    assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
    let (a, b) = (Gguf::open(&first).unwrap(), Gguf::open(&second).unwrap());
    assert!(a.tensors().iter().all(|t| a.tensor(&t.name).unwrap().bytes == b.tensor(&t.name).unwrap().bytes));
    let lossy = kestrel_convert::plan(&Source::open(&first).unwrap(), &options("q4_0")).unwrap();
    assert!(lossy.warnings[0].contains("quantized already"), "{:?}", lossy.warnings);
}

#[test]
fn ssm_x_carries_the_eps_scale_and_the_file_says_so() {
    let dir = TempDir::new();
    let model = small_model(GgmlType::F32);
    model.write(dir.path());
    let out = dir.path().join("out.gguf");
    let (_, report) = convert(dir.path(), &out, "f32").unwrap();
    let file = Gguf::open(&out).unwrap();
    let reference = model.reference();
    let scale = 10f64.sqrt() as f32;
    let expected: Vec<f32> = reference.tensors["blk.0.ssm_x.weight"].1.iter().map(|x| x * scale).collect();
    assert_eq!(floats(&file, "blk.0.ssm_x.weight"), expected);
    for unscaled in ["blk.0.ssm_in.weight", "blk.0.ssm_dt.weight", "blk.0.ssm_a", "output.weight"] {
        assert_eq!(floats(&file, unscaled), reference.tensors[unscaled].1, "{unscaled}");
    }
    let metadata = file.metadata();
    assert_eq!(metadata.f32(SSM_X_SCALE).unwrap(), Some(scale));
    assert_eq!(metadata.f32("kestrel.mixer_rms_eps").unwrap(), Some(1e-6));
    assert_eq!(metadata.str("kestrel.version").unwrap(), Some(env!("CARGO_PKG_VERSION")));
    assert_eq!(metadata.str("kestrel.recipe").unwrap(), Some("f32"));
    assert_eq!(metadata.str("general.architecture").unwrap(), Some("mamba"));
    assert_eq!(metadata.bool("mamba.ssm.dt_b_c_rms").unwrap(), Some(true));
    let digest: String =
        Sha256::digest(model.safetensors()).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(report.source_sha256, [("model.safetensors".to_owned(), digest.clone())]);
    let recorded = metadata.strings(SOURCE_SHA256).unwrap().unwrap();
    assert_eq!(recorded.get(0), Some(format!("model.safetensors {digest}").as_bytes()));
    assert_eq!(recorded.len(), 1);
}

#[test]
fn every_shard_of_the_tiny_model_is_recorded_with_its_hash() {
    let dir = TempDir::new();
    let (_, report) = convert(&tiny(), &dir.path().join("out.gguf"), "q8_0").unwrap();
    assert_eq!(report.source_sha256.len(), 2);
    for (name, digest) in report.source_sha256 {
        let bytes = std::fs::read(tiny().join(&name)).unwrap();
        let expected: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digest, expected, "{name}");
    }
}

#[test]
fn overrides_change_the_tensors_they_name_and_no_other() {
    let dir = TempDir::new();
    let [plain, mixed] = ["plain", "mixed"].map(|n| dir.path().join(n));
    convert(&tiny(), &plain, "q4_k_m").unwrap();
    let overrides = [("ssm_(x|dt)".to_owned(), GgmlType::Q8_0), ("ssm_x".to_owned(), GgmlType::Q4_0)];
    convert_with(&tiny(), &mixed, &with_overrides("q4_k_m", &overrides)).unwrap();
    let (plain, mixed) = (Gguf::open(&plain).unwrap(), Gguf::open(&mixed).unwrap());
    for t in mixed.tensors() {
        let named = t.name.ends_with("ssm_x.weight") || t.name.ends_with("ssm_dt.weight");
        if named {
            assert_eq!(t.dtype, GgmlType::Q8_0, "{}", t.name);
        } else {
            assert!(
                plain.tensor(&t.name).unwrap().bytes == mixed.tensor(&t.name).unwrap().bytes,
                "{}",
                t.name
            );
        }
    }
    let recipe = mixed.metadata().str("kestrel.recipe").unwrap();
    assert_eq!(recipe, Some("q4_k_m --tensor-type ssm_(x|dt)=q8_0 --tensor-type ssm_x=q4_0"));
}

#[test]
fn the_plan_names_every_tensor_and_its_place() {
    let source = Source::open(&tiny()).unwrap();
    let p = plan(&source, &options("q4_k_m")).unwrap();
    let t = p.tensors.iter().find(|t| t.name == "blk.5.ssm_conv1d.weight").unwrap();
    assert_eq!(t.source_name, "backbone.layers.5.mixer.conv1d.weight");
    assert_eq!(t.source_dtype, GgmlType::Bf16);
    assert_eq!((t.dtype, &t.shape[..]), (GgmlType::F32, &[512, 4][..]));
    assert_eq!(t.n_bytes, 512 * 4 * 4);
    assert!(p.tensors.windows(2).all(|w| w[0].offset + w[0].n_bytes <= w[1].offset));
    let last = p.tensors.last().unwrap();
    assert_eq!((last.name.as_str(), last.dtype), ("output.weight", GgmlType::Q6K));
    assert!(last.offset + last.n_bytes <= p.file_bytes);
    assert!(p.metadata.iter().any(|(k, v)| k == "general.size_label" && *v == Value::from("6.2M")));
}

#[test]
fn an_output_matrix_equal_to_the_embedding_is_left_out() {
    let dir = TempDir::new();
    let model = small_model(GgmlType::Bf16);
    let embedding = model.reference().tensors["token_embd.weight"].1.clone();
    let same: Vec<(usize, f32)> = embedding.into_iter().enumerate().collect();
    broken_model(&dir, "lm_head.weight", GgmlType::Bf16, &same);
    let out = dir.path().join("out.gguf");
    let (p, _) = convert(dir.path(), &out, "q6_k").unwrap();
    assert!(p.tensors.iter().all(|t| t.name != "output.weight"));
    verified(&out, dir.path()).verdict().unwrap();
    // One bit of difference keeps it.
    broken_model(&dir, "lm_head.weight", GgmlType::Bf16, &same[1..]);
    let p = plan(&Source::open(dir.path()).unwrap(), &options("q6_k")).unwrap();
    assert!(p.tensors.iter().any(|t| t.name == "output.weight"));
}

#[test]
fn numbers_that_are_not_finite_are_refused_by_name_and_place() {
    let a_log = "backbone.layers.0.mixer.A_log";
    let cases = [
        (
            "backbone.layers.0.mixer.in_proj.weight",
            f32::NAN,
            GgmlType::Bf16,
            "f32",
            ErrorKind::NotFinite,
            "NaN",
        ),
        (
            "backbone.layers.0.mixer.in_proj.weight",
            f32::INFINITY,
            GgmlType::F32,
            "q4_0",
            ErrorKind::NotFinite,
            "inf",
        ),
        ("backbone.norm_f.weight", f32::NEG_INFINITY, GgmlType::F16, "q8_0", ErrorKind::NotFinite, "-inf"),
        (a_log, 89.5, GgmlType::F32, "q4_0", ErrorKind::NotFinite, "89.5"),
        ("lm_head.weight", 1e6, GgmlType::F32, "f16", ErrorKind::OutOfRange, "1000000"),
        ("lm_head.weight", 1e12, GgmlType::F32, "q8_0", ErrorKind::OutOfRange, "1000000000000"),
    ];
    for (name, x, dtype, ty, kind, found) in cases {
        let dir = TempDir::new();
        broken_model(&dir, name, dtype, &[(7, x)]);
        let before = names_in(&dir);
        let err = convert(dir.path(), &dir.path().join("out.gguf"), ty)
            .err()
            .unwrap_or_else(|| panic!("{name} {x}"));
        assert_eq!(err.kind(), kind, "{err}");
        let text = err.to_string();
        assert!(text.contains(name) && text.contains("model.safetensors") && text.contains(found), "{text}");
        // Element 7 counts in the rows of the GGUF.
        let cols = if name == a_log { 16 } else { 64 };
        let place = format!("row {}, column {}", 7 / cols, 7 % cols);
        assert!(text.contains(&place), "{text}");
        assert_eq!(names_in(&dir), before, "nothing is left");
    }
    // 1e6 is fine where the type can hold it.
    let dir = TempDir::new();
    broken_model(&dir, "lm_head.weight", GgmlType::F32, &[(7, 1e6)]);
    convert(dir.path(), &dir.path().join("out.gguf"), "bf16").unwrap();
}

#[test]
fn nothing_is_replaced_without_force_and_a_failure_keeps_the_old_file() {
    let dir = TempDir::new();
    let out = dir.file("out.gguf", b"old");
    assert_eq!(convert(&tiny(), &out, "q8_0").err().unwrap().kind(), ErrorKind::OutputExists);
    let bad = TempDir::new();
    broken_model(&bad, "lm_head.weight", GgmlType::F32, &[(0, f32::NAN)]);
    let force = Options { force: true, ..options("q8_0") };
    assert_eq!(convert_with(bad.path(), &out, &force).err().unwrap().kind(), ErrorKind::NotFinite);
    assert_eq!(std::fs::read(&out).unwrap(), b"old");
    assert_eq!(names_in(&dir), ["out.gguf"]);
    convert_with(&tiny(), &out, &force).unwrap();
    assert!(Gguf::open(&out).is_ok());
}

#[test]
fn the_source_is_never_the_output() {
    let dir = TempDir::new();
    let out = dir.path().join("model.gguf");
    convert(&tiny(), &out, "f16").unwrap();
    let link = dir.path().join("hard-link.gguf");
    std::fs::hard_link(&out, &link).unwrap();
    let before = std::fs::read(&out).unwrap();
    let force = Options { force: true, ..options("q8_0") };
    for target in [&out, &link] {
        assert_eq!(convert_with(&out, target, &force).err().unwrap().kind(), ErrorKind::Usage);
    }
    assert!(std::fs::read(&out).unwrap() == before);
}

/// Sets the flag, or does something else, when the n-th piece is done.
struct AtPiece<F: Fn() + Sync> {
    n: usize,
    seen: AtomicUsize,
    act: F,
}

impl<F: Fn() + Sync> Progress for AtPiece<F> {
    fn bytes(&self, _read: u64, _written: u64) {
        if self.seen.fetch_add(1, Ordering::SeqCst) == self.n {
            (self.act)();
        }
    }
}

fn run_with(
    source: &Path,
    out: &Path,
    n: usize,
    cancel: &AtomicBool,
    act: impl Fn() + Sync,
) -> Result<Report> {
    let source = Source::open(source)?;
    let plan = plan(&source, &options("q8_0"))?;
    run(&plan, &options("q8_0"), out, &AtPiece { n, seen: AtomicUsize::new(0), act }, cancel)
}

#[test]
fn an_interrupted_run_leaves_nothing_wherever_it_stops() {
    // 63 pieces and more are converted, then as many are checked.
    for n in [0, 1, 30, 62, 70, 120] {
        let dir = TempDir::new();
        let cancel = AtomicBool::new(false);
        let done = run_with(&tiny(), &dir.path().join("out.gguf"), n, &cancel, || {
            cancel.store(true, Ordering::SeqCst)
        });
        assert_eq!(done.err().map(|e: Error| e.kind()), Some(ErrorKind::Interrupted), "after {n} pieces");
        assert!(names_in(&dir).is_empty(), "{:?}", names_in(&dir));
    }
}

fn copy_of_tiny() -> TempDir {
    let dir = TempDir::new();
    for entry in std::fs::read_dir(tiny()).unwrap() {
        let entry = entry.unwrap();
        dir.file(entry.file_name().to_str().unwrap(), &std::fs::read(entry.path()).unwrap());
    }
    dir
}

/// A calibration of three matrices of the tiny model, whose columns are independent but for neighbours.
fn calibration(dir: &Path) -> Calibration {
    let path = dir.join("c.gguf");
    let names = ["output.weight", "blk.0.ssm_in.weight", "blk.3.ssm_out.weight"];
    let source = CalibrationSource { model: 1, tokens: 2, ctx: 8, dataset: "text".into(), types: vec![] };
    let matrices = names.map(|name| {
        let cols = if name.contains("out.") { 512 } else { 256 };
        CalibratedMatrix { name: name.into(), cols, group: cols }
    });
    let writer = CalibrationWriter::open(&path, &source, &matrices, (false, false)).unwrap();
    for m in &matrices {
        let product = |i: usize| match (i / m.cols).abs_diff(i % m.cols) {
            0 => 1.0,
            1 => 0.4,
            _ => 0.0,
        };
        writer.products(&m.name, &(0..m.cols * m.cols).map(product).collect::<Vec<_>>(), 9.0).unwrap();
    }
    Calibration::open(&writer.finish().unwrap()).unwrap()
}

#[test]
fn a_conversion_with_a_calibration_goes_on_where_it_was_interrupted() {
    let calibrations = TempDir::new();
    let calibration = calibration(calibrations.path());
    let mut options = Options { calibration: Some(calibration), threads: 1, ..options("q4_k_m") };
    let source = copy_of_tiny();
    let at_piece = |options: &Options, out: &Path, n: usize, cancel: &AtomicBool| {
        let plan = plan(&Source::open(source.path())?, options)?;
        let act = || cancel.store(true, Ordering::SeqCst);
        run(&plan, options, out, &AtPiece { n, seen: AtomicUsize::new(0), act }, cancel)
    };
    let to_end = |options: &Options, out: &Path| at_piece(options, out, usize::MAX, &AtomicBool::new(false));
    let dir = TempDir::new();
    let out = dir.path().join("out.gguf");
    let p = plan(&Source::open(source.path()).unwrap(), &options).unwrap();
    assert_eq!(p.tensors.iter().filter(|t| t.fed).count(), 3);
    let data_bytes: u64 = p.tensors.iter().map(|t| t.n_bytes).sum();
    assert_eq!(to_end(&options, &out).unwrap().kept_bytes, 0);
    let whole = std::fs::read(&out).unwrap();
    std::fs::remove_file(&out).unwrap();

    // In the conversion's first piece, in its middle, and while the last are checked.
    let mut kept = Vec::new();
    for n in [0, 30, 100] {
        let error = at_piece(&options, &out, n, &AtomicBool::new(false)).expect_err("an interruption");
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        assert!(error.to_string().contains("--resume"), "{error}");
        assert_eq!(names_in(&dir), ["out.gguf.part"]);
        assert_eq!(to_end(&options, &out).unwrap_err().kind(), ErrorKind::OutputExists);
        options.resume = true;
        // Neither the number of threads nor the instruction set matters.
        (options.threads, options.isa) = (2, Isa::Baseline);
        kept.push(to_end(&options, &out).unwrap().kept_bytes);
        (options.resume, options.threads, options.isa) = (false, 1, Isa::best());
        assert_eq!(names_in(&dir), ["out.gguf"]);
        assert!(std::fs::read(&out).unwrap() == whole, "another file than in one run");
        std::fs::remove_file(&out).unwrap();
    }
    assert!(0 < kept[0] && kept[0] < kept[1] && kept[1] < kept[2] && kept[2] == data_bytes, "{kept:?}");

    // Interrupted twice; and what was damaged meanwhile is quantized again.
    let part = dir.path().join("out.gguf.part");
    at_piece(&options, &out, 20, &AtomicBool::new(false)).unwrap_err();
    options.resume = true;
    at_piece(&options, &out, 40, &AtomicBool::new(false)).unwrap_err();
    let sound = std::fs::read(&part).unwrap();
    let damage = |at: usize| {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        std::fs::write(&part, bytes).unwrap();
    };
    let undamaged = to_end(&options, &out).unwrap().kept_bytes;
    std::fs::remove_file(&out).unwrap();
    // What is not written yet is zero.
    let begin = p.tensors[0].offset as usize;
    damage(begin + sound[begin..].iter().position(|&byte| byte != 0).unwrap());
    let damaged = to_end(&options, &out).unwrap().kept_bytes;
    assert!(kept[1] < undamaged && kept[0] < damaged && damaged < undamaged, "{damaged} {undamaged}");
    assert!(std::fs::read(&out).unwrap() == whole, "another file than in one run");
    std::fs::remove_file(&out).unwrap();

    // What another run left is refused and stays.
    damage(whole.len());
    let refused = |options: &Options| {
        let before = std::fs::read(&part).unwrap();
        assert_eq!(to_end(options, &out).unwrap_err().kind(), ErrorKind::Inconsistent);
        assert!(std::fs::read(&part).unwrap() == before && names_in(&dir) == ["out.gguf.part"]);
    };
    refused(&options);
    std::fs::write(&part, &sound).unwrap();
    options.sweeps = 1;
    refused(&options);
    options.sweeps = 0;
    let recipe =
        std::mem::replace(&mut options.recipe, Recipe::new(FileType::parse("q4_0").unwrap(), &[]).unwrap());
    refused(&options);
    options.recipe = recipe;
    let shard = source.path().join("model-00001-of-00002.safetensors");
    let shard = std::fs::File::options().write(true).open(shard).unwrap();
    let modified = shard.metadata().unwrap().modified().unwrap();
    shard.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    refused(&options);
    shard.set_modified(modified).unwrap();
    assert!(to_end(&options, &out).unwrap().kept_bytes > 0);
    assert!(std::fs::read(&out).unwrap() == whole, "another file than in one run");
}

#[test]
fn damage_between_writing_and_reading_back_is_noticed() {
    let dir = TempDir::new();
    let done = run_with(&tiny(), &dir.path().join("out.gguf"), 62, &AtomicBool::new(false), || {
        let name = names_in(&dir).into_iter().find(|name| name.contains("kestrel-partial")).unwrap();
        let file = std::fs::File::options().write(true).open(dir.path().join(name)).unwrap();
        // Some tensors are written by now; all that lies here is overwritten.
        let zeros = vec![0u8; 3 << 20];
        std::os::unix::fs::FileExt::write_all_at(&file, &zeros, 1 << 20).unwrap();
    });
    let err = done.expect_err("an error");
    assert_eq!(err.kind(), ErrorKind::Io);
    assert!(err.to_string().contains("when read back"), "{err}");
    assert!(names_in(&dir).is_empty(), "{:?}", names_in(&dir));
}

#[test]
fn a_source_that_changes_meanwhile_is_noticed() {
    let shard = "model-00001-of-00002.safetensors";
    let (never, out) = (AtomicBool::new(false), TempDir::new());
    let dir = copy_of_tiny();
    let path = dir.path().join(shard);
    let done = run_with(dir.path(), &out.path().join("a"), 0, &never, || {
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    });
    assert_eq!(done.err().map(|e| e.kind()), Some(ErrorKind::Changed));
    let dir = copy_of_tiny();
    let path = dir.path().join(shard);
    let done = run_with(dir.path(), &out.path().join("b"), 0, &never, || {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(100_000).unwrap();
    });
    assert_eq!(done.err().map(|e| e.kind()), Some(ErrorKind::Changed));
    assert!(names_in(&out).is_empty());
}

#[test]
fn verify_finds_a_damaged_a_missing_and_a_foreign_tensor() {
    let dir = TempDir::new();
    let out = dir.path().join("out.gguf");
    convert(&tiny(), &out, "q4_k_m").unwrap();
    let file = Gguf::open(&out).unwrap();
    let offset = file.tensors().iter().find(|t| t.name == "blk.3.ssm_out.weight").unwrap().offset as usize;
    let good = std::fs::read(&out).unwrap();

    let mut bytes = good.clone();
    bytes[offset..offset + 144 * 300].reverse();
    let report = verified(&dir.file("damaged.gguf", &bytes), &tiny());
    let failed: Vec<_> =
        report.tensors.iter().filter(|t| t.problem.is_some()).map(|t| t.name.as_str()).collect();
    assert_eq!(failed, ["blk.3.ssm_out.weight"]);
    let err = report.verdict().unwrap_err();
    assert_eq!(err.kind(), ErrorKind::VerifyFailed);
    assert!(err.to_string().contains("blk.3.ssm_out.weight"), "{err}");

    let mut bytes = good.clone();
    bytes[offset..offset + 2].copy_from_slice(&0x7c00u16.to_le_bytes()); // an infinite scale
    let report = verified(&dir.file("infinite.gguf", &bytes), &tiny());
    let problem = report.tensors.iter().find_map(|t| t.problem.clone()).unwrap();
    assert!(problem.contains("infinite") || problem.contains("NaN"), "{problem}");

    let mut bytes = good;
    let name = b"blk.3.ssm_out.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap();
    bytes[at..at + name.len()].copy_from_slice(b"blk.3.ssm_put.weight");
    let report = verified(&dir.file("renamed.gguf", &bytes), &tiny());
    assert_eq!(report.problems.len(), 1);
    assert!(report.tensors.iter().any(|t| t.dtype.is_none() && t.problem.as_deref() == Some("absent")));
}

#[test]
fn verify_sees_a_wrong_scale_and_accepts_files_without_any() {
    let dir = TempDir::new();
    let out = dir.path().join("out.gguf");
    convert(&tiny(), &out, "f32").unwrap();
    let mut bytes = std::fs::read(&out).unwrap();
    let at = bytes.windows(SSM_X_SCALE.len()).position(|w| w == SSM_X_SCALE.as_bytes()).unwrap();

    let mut wrong = bytes.clone();
    let value = at + SSM_X_SCALE.len() + 4;
    wrong[value..value + 4].copy_from_slice(&2f32.to_le_bytes());
    let report = verified(&dir.file("wrong.gguf", &wrong), &tiny());
    assert!(report.problems[0].contains("instead of"), "{:?}", report.problems);

    // As llama.cpp's converter would make it: no key, no scale.
    bytes[at..at + 7].copy_from_slice(b"another");
    let file = Gguf::open(&out).unwrap();
    for t in file.tensors().iter().filter(|t| t.name.ends_with("ssm_x.weight")) {
        let layer: usize = t.name.split('.').nth(1).unwrap().parse().unwrap();
        let unscaled = unscaled_x_proj(layer);
        let at = t.offset as usize;
        for (i, x) in unscaled.iter().enumerate() {
            bytes[at + 4 * i..at + 4 * i + 4].copy_from_slice(&x.to_le_bytes());
        }
    }
    let foreign = dir.file("foreign.gguf", &bytes);
    let report = verified(&foreign, &tiny());
    report.verdict().unwrap();
    assert!(report.warnings[0].contains("without the eps scale"), "{:?}", report.warnings);
    // And a scaled file against an unscaled GGUF is a mismatch that is named.
    assert!(!verified(&out, &foreign).passed());
}

/// x_proj of the tiny model as its checkpoint has it.
fn unscaled_x_proj(layer: usize) -> Vec<f32> {
    let Source::Checkpoint(c) = Source::open(&tiny()).unwrap() else { panic!("a folder") };
    let t = c.tensor(&format!("backbone.layers.{layer}.mixer.x_proj.weight")).unwrap();
    load_reference::dequantized(&c, t)
}

#[test]
fn an_importance_matrix_from_gguf_py_is_read_used_and_recorded() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/imatrix/tiny.gguf");
    let imatrix = Imatrix::open(&path).unwrap();
    assert_eq!((imatrix.len(), imatrix.chunks()), (24, Some(12)));
    assert_eq!(imatrix.datasets(), ["calibration.txt"]);
    // Column i of layer l has the mean square (1 + i mod 7) * (l + 1), counted 64 times.
    let weights = imatrix.for_tensor("blk.2.ssm_out.weight").unwrap();
    assert_eq!(weights.len(), 512);
    assert!(weights.iter().enumerate().all(|(i, w)| *w == ((1 + i % 7) * 3) as f32));
    assert_eq!(imatrix.for_tensor("output.weight"), None);

    let dir = TempDir::new();
    let [plain, weighted] = ["plain", "weighted"].map(|n| dir.path().join(n));
    convert(&tiny(), &plain, "q4_k_m").unwrap();
    let with = Options { imatrix: Some(imatrix), ..options("q4_k_m") };
    let (p, _) = convert_with(&tiny(), &weighted, &with).unwrap();
    assert_eq!(p.tensors.iter().filter(|t| t.weighted).count(), 24);
    let (a, b) = (Gguf::open(&plain).unwrap(), Gguf::open(&weighted).unwrap());
    let differs = |name: &str| a.tensor(name).unwrap().bytes != b.tensor(name).unwrap().bytes;
    assert!(differs("blk.2.ssm_out.weight"));
    assert!(!differs("token_embd.weight"));
    assert_eq!(b.metadata().str("quantize.imatrix.dataset").unwrap(), Some("calibration.txt"));
    assert_eq!(b.metadata().u32("quantize.imatrix.entries_count").unwrap(), Some(24));
    assert_eq!(b.metadata().u32("quantize.imatrix.chunks_count").unwrap(), Some(12));
    assert!(!a.metadata().contains("quantize.imatrix.file"));
    verified(&weighted, &tiny()).verdict().unwrap();
}

#[test]
fn an_importance_matrix_of_another_model_is_refused() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/imatrix/tiny.gguf");
    let dir = TempDir::new();
    small_model(GgmlType::F32).write(dir.path());
    let options = Options { imatrix: Some(Imatrix::open(&path).unwrap()), ..options("q4_0") };
    let err = plan(&Source::open(dir.path()).unwrap(), &options).err().unwrap();
    assert_eq!(err.kind(), ErrorKind::Inconsistent, "{err}");
    let out = dir.path().join("model.gguf");
    convert(dir.path(), &out, "f16").unwrap();
    assert_eq!(Imatrix::open(&out).unwrap_err().kind(), ErrorKind::Unexpected);
}
