//! bitsandbytes: its codes, scales and numbers, its checkpoints read, run, converted and written. Goldens by
//! `scripts/oracle/bitsandbytes_goldens.py`.

use half::{bf16, f16};
use kestrel_convert::{BnbOptions, Options, Source, plan_bnb, run_bnb, verify};
use kestrel_formats::checkpoint::Checkpoint;
use kestrel_formats::gguf::Gguf;
use kestrel_formats::{ErrorKind, GgmlType, WeightType};
use kestrel_quant::codec::scales::{self, Absmax, Scales};
use kestrel_quant::codec::{bnb4, bnb8, dequantize};
use kestrel_quant::recipe::{Bnb, FileType, Recipe};
use kestrel_runtime::kernels::Isa;
use kestrel_runtime::{LoadOptions, Model, Quantize, Runner, RunnerOptions};
use kestrel_tests::bitsandbytes::{SMALL_KINDS, TINY_KINDS, folder, sharded};
use kestrel_tests::goldens::{self, Golden};
use kestrel_tests::load_reference::dequantized;
use kestrel_tests::random_model::normal;
use kestrel_tests::running::{convert, difference, logits, logits_in_pieces, on, open, where_present};
use kestrel_tests::safetensors::{self, Tensors};
use kestrel_tests::temp_dir::TempDir;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Largest allowed |logit - golden| / max |golden logit of that position|.
const TOLERANCE: f64 = 2e-4;

fn all_kinds() -> impl Iterator<Item = &'static str> {
    TINY_KINDS.into_iter().chain(SMALL_KINDS)
}

fn sha256(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One matrix of tensors.safetensors.
struct Case {
    name: String,
    dtype: GgmlType,
    shape: [usize; 2],
    entry: Value,
}

impl Case {
    fn all() -> (Vec<Self>, Tensors) {
        let goldens = goldens::parsed("bitsandbytes");
        let of = |entry: &Value| {
            let text = |key: &str| entry[key].as_str().expect("a text");
            Self {
                name: text("name").to_owned(),
                dtype: GgmlType::from_name(text("dtype")).expect("a dtype"),
                shape: [0, 1].map(|i| entry["shape"][i].as_u64().expect("a size") as usize),
                entry: entry.clone(),
            }
        };
        let cases = goldens["tensors"].as_array().expect("tensors").iter().map(of).collect();
        let stored = goldens::data_dir().join("bitsandbytes/tensors.safetensors");
        (cases, safetensors::read(&stored))
    }

    fn scales<'a>(&self, blocksize: usize, absmax: Absmax<'a>) -> Scales<'a> {
        Scales { blocksize, round_to: self.dtype, absmax }
    }

    /// What went in, as the Python side makes it.
    fn weights(&self) -> Vec<f32> {
        let mut x = normal(&self.name, 1, self.shape[0] * self.shape[1], |_| 0.0, 0.05);
        x[64..128].fill(0.0);
        x[300] = 1.5;
        match self.dtype {
            GgmlType::F16 => x.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
            GgmlType::Bf16 => x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
            _ => {}
        }
        x
    }
}

#[test]
fn four_bit_codes_scales_and_numbers_are_the_librarys() {
    let (cases, stored) = Case::all();
    let (mut n_nested, mut n_differ, mut n_cases) = (0, 0, 0);
    for case in cases.iter().filter(|c| c.entry["quant_type"] != "int8") {
        n_cases += 1;
        let name = &case.name;
        let part = |part: &str| &stored[&format!("{name}.weight{part}")];
        let ty = if case.entry["quant_type"] == "nf4" { WeightType::Nf4 } else { WeightType::Fp4 };
        let blocksize = case.entry["blocksize"].as_u64().unwrap() as usize;
        let weights = case.weights();
        let mut codes = vec![0; weights.len() / 2];
        let mut absmax = vec![0.0; weights.len().div_ceil(blocksize)];
        bnb4::quantize(ty, blocksize, &weights, &mut codes, &mut absmax).unwrap();
        assert_eq!(codes, part("").bytes, "{name}: codes");

        let mut got = vec![0.0; weights.len()];
        if case.entry["nested"] == false {
            assert_eq!(absmax, part(".absmax").f32s(), "{name}: scales");
            dequantize(ty, &codes, 0, Some(&case.scales(blocksize, Absmax::F32(&absmax))), &mut got);
        } else {
            let ours = scales::quantize_scales(&absmax);
            let state: Value = serde_json::from_slice(
                &part(&format!(".quant_state.bitsandbytes__{}", case.entry["quant_type"].as_str().unwrap()))
                    .bytes,
            )
            .unwrap();
            let offset = state["nested_offset"].as_f64().unwrap() as f32;
            assert!((ours.offset - offset).abs() <= 4.0 * f32::EPSILON * offset, "{name}: {offset}");
            let map: [f32; 256] = part(".nested_quant_map").f32s().try_into().unwrap();
            assert_eq!(map, scales::dynamic_map(), "{name}: map of the scales");
            let theirs = &part(".absmax").bytes;
            let nested = part(".nested_absmax").f32s();
            for (a, b) in ours.absmax.iter().zip(&nested) {
                assert!((a - b).abs() <= 1e-6 * b, "{name}: {a} for {b}");
            }
            n_nested += theirs.len();
            for (a, b) in ours.codes.iter().zip(theirs) {
                n_differ += usize::from(a != b);
                assert!(a.abs_diff(*b) <= 1, "{name}: {a} for {b}");
            }
            let absmax = Absmax::Nested { codes: theirs, absmax: &nested, blocksize: 256, map: &map, offset };
            dequantize(ty, &codes, 0, Some(&case.scales(blocksize, absmax)), &mut got);
        }
        assert_eq!(case.entry["sha256"], sha256(&got), "{name}: dequantized");
        // From the middle of a block on.
        let first = weights.len() / 2 - 2;
        let mut tail = vec![0.0; weights.len() - first];
        if case.entry["nested"] == false {
            dequantize(
                ty,
                &codes[first / 2..],
                first,
                Some(&case.scales(blocksize, Absmax::F32(&absmax))),
                &mut tail,
            );
            assert_eq!(tail, got[first..], "{name}: the second half");
        }
    }
    assert_eq!(n_cases, 34);
    // The offset is summed in another order, see `NestedScales`.
    assert!(n_differ * 1000 <= n_nested, "{n_differ} of {n_nested} codes of scales differ");
}

#[test]
fn int8_codes_scales_and_numbers_are_the_librarys() {
    let (cases, stored) = Case::all();
    let cases: Vec<_> = cases.iter().filter(|c| c.entry["quant_type"] == "int8").collect();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let (name, cols) = (&case.name, case.shape[1]);
        let weights = case.weights();
        let mut codes = vec![0; weights.len()];
        let rows = weights.chunks(cols).zip(codes.chunks_mut(cols));
        let absmax: Vec<f32> = rows.map(|(row, codes)| bnb8::quantize_row(row, codes).unwrap()).collect();
        assert_eq!(codes, stored[&format!("{name}.weight")].bytes, "{name}: codes");
        assert_eq!(absmax, stored[&format!("{name}.SCB")].f32s(), "{name}: scales");
        let mut got = vec![0.0; weights.len()];
        let scales = Scales { blocksize: cols, round_to: GgmlType::F32, absmax: Absmax::F32(&absmax) };
        dequantize(WeightType::Int8, &codes, 0, Some(&scales), &mut got);
        assert_eq!(case.entry["sha256"], sha256(&got), "{name}: dequantized");
    }
}

#[test]
fn what_the_codecs_refuse() {
    let (mut codes, mut absmax) = ([0; 32], [0.0]);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = [0.0; 64];
        x[3] = bad;
        let e = bnb4::quantize(WeightType::Nf4, 64, &x, &mut codes, &mut absmax).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NotFinite);
        let e = bnb8::quantize_row(&x, &mut [0; 64]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::OutOfRange);
    }
    assert!(bnb8::quantize_row(&[70_000.0, 0.0], &mut [0; 2]).is_err(), "beyond f16");
}

#[test]
fn every_matrix_of_a_checkpoint_is_the_librarys_bit_for_bit() {
    for kind in all_kinds() {
        for dir in [folder(kind), sharded(kind, 3)] {
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            let noteworthy: Vec<_> =
                checkpoint.warnings().iter().filter(|w| !w.contains("tokenizer")).collect();
            assert!(noteworthy.is_empty(), "{kind}: {noteworthy:?}");
            let digests = Golden::load_from("bitsandbytes", kind).dequantized_sha256();
            let packed = checkpoint.tensors().iter().filter(|t| t.state.is_some()).count();
            assert_eq!(packed, digests.len(), "{kind}");
            for (name, digest) in digests {
                let values = dequantized(&checkpoint, checkpoint.tensor(&name).expect("the matrix"));
                assert_eq!(sha256(&values), digest, "{kind}: {name}");
            }
        }
    }
}

/// All tokens at once, ragged pieces, one by one; f32 activations.
fn equals_transformers(isa: Isa) {
    for kind in all_kinds() {
        let (golden, dir) = (Golden::load_from("bitsandbytes", kind), folder(kind));
        let model = open(dir.path());
        let options = RunnerOptions { precise: true, ..on(isa, 2) };
        for lengths in [&[golden.tokens.len()][..], &[1, 2, 3, 5, 7], &[1]] {
            let mut runner = Runner::new(&model, &options).unwrap();
            assert_eq!(runner.isa(), isa);
            let got = logits_in_pieces(&mut runner, &mut model.new_state(), &golden.tokens, lengths);
            let who = format!("{kind} on {} in pieces of {lengths:?}", isa.name());
            golden.compare(&got).expect_within(TOLERANCE, &who);
        }
    }
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

/// Scales beside the codes are read with every token, and count: four bytes per block of 64, or one and four per 256.
#[test]
fn the_work_of_a_token_counts_the_scales() {
    let [plain, double] = ["tiny-nf4", "tiny-fp4-double"].map(|kind| open(folder(kind).path()));
    let blocks = plain.matrices().filter(|(_, m)| !matches!(m.dtype, WeightType::Ggml(_)));
    let saved: usize = blocks
        .map(|(_, m)| m.rows * m.cols / 64)
        .map(|scales| 4 * scales - (scales + 4 * scales.div_ceil(scales::NESTED_BLOCKSIZE)))
        .sum();
    assert!(saved > 0);
    assert_eq!(plain.work().weight_bytes - double.work().weight_bytes, saved as u64);
}

/// Every file type, from one shard and from several.
#[test]
fn a_checkpoint_becomes_any_gguf_and_verifies_against_its_dequantized_self() {
    for kind in ["small-fp4-f16", "small-nf4-double-f32", "small-nf4-head", "small-int8-f32"] {
        let source = sharded(kind, 3);
        for ty in FileType::all() {
            check_conversion(&source, ty);
        }
    }
    for kind in TINY_KINDS {
        for ty in [FileType::F32, FileType::Q4KM, FileType::Q8_0] {
            check_conversion(&sharded(kind, 2), ty);
        }
    }
}

fn check_conversion(source: &TempDir, ty: FileType) {
    let out = source.path().join(format!("{ty}.gguf"));
    convert(source.path(), ty.name(), &out);
    let (file, folder) = (Gguf::open(&out).unwrap(), Source::open(source.path()).unwrap());
    let report = verify(&file, &folder, 2, &(), &AtomicBool::new(false)).unwrap();
    report.verdict().unwrap();
    let packed = report.tensors.iter().filter(|t| !matches!(t.source_dtype, WeightType::Ggml(_)));
    for t in packed {
        // Rounding to f16 or bf16 loses nothing that was not lost.
        if ty == FileType::F32 {
            assert_eq!(t.stats.max_abs, 0.0, "{}", t.name);
        }
    }
}

/// An F32 file made of a checkpoint has the logits of transformers with the dequantized weights, too.
#[test]
fn the_converted_file_has_the_same_logits() {
    for kind in TINY_KINDS {
        let (golden, dir) = (Golden::load_from("bitsandbytes", kind), folder(kind));
        let out = dir.path().join("f32.gguf");
        convert(dir.path(), "f32", &out);
        let model = open(&out);
        let mut runner = Runner::new(&model, &on(Isa::best(), 2)).unwrap();
        let got =
            logits_in_pieces(&mut runner, &mut model.new_state(), &golden.tokens, &[golden.tokens.len()]);
        golden.compare(&got).expect_within(TOLERANCE, kind);
    }
}

/// The plan does not depend on which threads come first, and neither do the bytes.
#[test]
fn conversion_of_packed_matrices_is_the_same_for_any_number_of_threads() {
    let source = sharded("tiny-fp4-double", 3);
    let bytes = [1, 5].map(|threads| {
        let options = Options { threads, ..Options::new(Recipe::new(FileType::Q5KM, &[]).unwrap()) };
        let input = Source::open(source.path()).unwrap();
        let plan = kestrel_convert::plan(&input, &options).unwrap();
        let out = source.path().join(format!("{threads}.gguf"));
        kestrel_convert::run(&plan, &options, &out, &(), &AtomicBool::new(false)).unwrap();
        std::fs::read(out).unwrap()
    });
    assert!(bytes[0] == bytes[1]);
}

fn options(dtype: WeightType, double_quant: bool, threads: usize) -> BnbOptions {
    let bnb = Bnb { dtype, blocksize: 64, double_quant };
    BnbOptions { bnb, compute_dtype: GgmlType::F32, threads, force: false }
}

fn write(source: &Path, options: &BnbOptions, out: &Path) -> kestrel_formats::Result<()> {
    let plan = plan_bnb(&Checkpoint::open(source)?, options)?;
    run_bnb(&plan, options, out, &(), &AtomicBool::new(false))
}

/// Every tensor of every shard.
fn all_tensors(dir: &Path) -> Tensors {
    let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    files
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .flat_map(|p| safetensors::read(&p))
        .collect()
}

#[test]
fn a_written_checkpoint_has_the_librarys_bytes() {
    let dir = TempDir::new();
    for (kind, dtype) in [("tiny-nf4", WeightType::Nf4), ("tiny-int8", WeightType::Int8)] {
        let out = dir.path().join(kind);
        write(&goldens::tiny_dir(), &options(dtype, false, 3), &out).unwrap();
        let (ours, theirs) = (all_tensors(&out), kestrel_tests::bitsandbytes::tensors(kind));
        assert!(ours.keys().eq(theirs.keys()), "{kind}: other tensors");
        for (name, tensor) in &theirs {
            assert!(ours[name] == *tensor, "{kind}: {name}");
        }
    }
    // Quantized scales: the library's mean is summed otherwise (see `NestedScales`), the codes are the same.
    let (kind, out) = ("tiny-fp4-double", dir.path().join("fp4"));
    write(&goldens::tiny_dir(), &options(WeightType::Fp4, true, 3), &out).unwrap();
    let (ours, theirs) = (all_tensors(&out), kestrel_tests::bitsandbytes::tensors(kind));
    assert!(ours.keys().eq(theirs.keys()), "{kind}: other tensors");
    let (mut n_scales, mut n_differ) = (0, 0);
    for (name, tensor) in &theirs {
        if name.ends_with(".absmax") {
            n_scales += tensor.bytes.len();
            n_differ += ours[name].bytes.iter().zip(&tensor.bytes).filter(|(a, b)| a != b).count();
        } else if !name.contains("nested_absmax") && !name.contains("quant_state") {
            assert_eq!(ours[name].bytes, tensor.bytes, "{kind}: {name}");
        }
    }
    assert!(n_differ * 1000 <= n_scales, "{n_differ} of {n_scales} codes of scales differ");
}

#[test]
fn a_written_folder_is_whole_the_same_for_any_number_of_threads_and_runs() {
    let dir = TempDir::new();
    let outs = [1, 4].map(|threads| {
        let out = dir.path().join(format!("{threads}"));
        write(&goldens::tiny_dir(), &options(WeightType::Nf4, true, threads), &out).unwrap();
        out
    });
    let names = |dir: &Path| -> Vec<_> {
        let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(dir.path()), ["1", "4"], "left-overs");
    assert_eq!(names(&outs[0]).len(), 8, "{:?}", names(&outs[0]));
    for name in names(&outs[0]) {
        let [a, b] = [0, 1].map(|i| std::fs::read(outs[i].join(&name)).unwrap());
        assert!(a == b, "{name:?} depends on the number of threads");
    }
    let again = write(&goldens::tiny_dir(), &options(WeightType::Nf4, true, 1), &outs[0]).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::OutputExists);
    // Quantizing at load gives the very same matrices.
    let tokens = &Golden::load("tiny-falcon-mamba").tokens[..20];
    let bnb = Bnb { dtype: WeightType::Nf4, blocksize: 64, double_quant: true };
    let at_load = LoadOptions { quantize: Some(Quantize::Bnb(bnb)), progress: None };
    let at_load = Model::open(&goldens::tiny_dir(), &at_load).unwrap();
    let on = on(Isa::best(), 2);
    assert_eq!(logits(&at_load, &on, tokens), logits(&open(&outs[0]), &on, tokens));
}

#[test]
fn what_the_writer_refuses() {
    let dir = TempDir::new();
    let out = dir.path().join("out");
    let packed = folder("tiny-nf4");
    let refused = |source: &Path, options: &BnbOptions| write(source, options, &out).unwrap_err().kind();
    assert_eq!(refused(packed.path(), &options(WeightType::Fp4, false, 1)), ErrorKind::Unsupported);
    let mut odd = options(WeightType::Nf4, false, 1);
    odd.bnb.blocksize = 48;
    assert_eq!(refused(&goldens::tiny_dir(), &odd), ErrorKind::Usage);
    let plan =
        plan_bnb(&Checkpoint::open(&goldens::tiny_dir()).unwrap(), &options(WeightType::Nf4, false, 1))
            .unwrap();
    let cancelled = run_bnb(&plan, &options(WeightType::Nf4, false, 1), &out, &(), &AtomicBool::new(true));
    assert_eq!(cancelled.unwrap_err().kind(), ErrorKind::Interrupted);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "left-overs");
}

/// Without f32 activations for many tokens: the same bits on every instruction set and for any number of threads, and
/// near what the weights give exactly.
#[test]
fn int8_activations_are_the_same_everywhere_and_near() {
    for kind in all_kinds() {
        let (golden, dir) = (Golden::load_from("bitsandbytes", kind), folder(kind));
        let model = open(dir.path());
        let run = |options: &RunnerOptions| {
            let mut runner = Runner::new(&model, options).unwrap();
            logits_in_pieces(&mut runner, &mut model.new_state(), &golden.tokens, &[21, 9, 1, 2, 5])
        };
        let scalar = run(&on(Isa::Scalar, 1));
        for isa in Isa::all_supported() {
            for threads in [1, 3] {
                assert!(run(&on(isa, threads)) == scalar, "{kind} on {} with {threads} threads", isa.name());
            }
        }
        let exact = run(&RunnerOptions { precise: true, ..on(Isa::best(), 1) });
        let off = difference(&exact, &scalar, golden.vocab_size);
        assert!(off > 0.0, "{kind}: int8 activations were not used");
        // As for Q8_0, int8 activations cost up to some percent where a row has 64 numbers, as in the small models.
        assert!(off < 0.05, "{kind}: off by {off} of max |logit|");
    }
}

/// `precise` one token at a time, which has a way of its own.
#[test]
fn one_precise_token_at_a_time_equals_transformers() {
    for kind in TINY_KINDS {
        let (golden, dir) = (Golden::load_from("bitsandbytes", kind), folder(kind));
        let model = open(dir.path());
        let mut runner = Runner::new(&model, &RunnerOptions { precise: true, ..on(Isa::best(), 2) }).unwrap();
        let got = logits_in_pieces(&mut runner, &mut model.new_state(), &golden.tokens, &[1]);
        golden.compare(&got).expect_within(TOLERANCE, kind);
    }
}
