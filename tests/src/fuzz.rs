//! The bodies of the fuzz targets in `fuzz/`. Each takes any bytes and may neither panic nor hang; what else it asserts
//! is said beside it. They are here so that the ordinary tests replay the corpora on a stable compiler.

use crate::alloc_count::peak_during;
use crate::bad_input::{self, SMALL, wide_model, with_vocabulary};
use crate::bnb_builder::{self, Kind, MATRIX};
use crate::checkpoint_builder::{CheckpointBuilder, safetensors};
use crate::gguf_builder::{GgufBuilder, Raw, RawTensor};
use crate::load_reference::dequantized;
use crate::safetensors::{Stored, Tensors, to_bytes};
use crate::temp_dir::TempDir;
use arbitrary::Unstructured;
use kestrel_convert::{Options, Source, plan};
use kestrel_formats::calibration::Calibration;
use kestrel_formats::checkpoint::{Checkpoint, safetensors_tensors};
use kestrel_formats::gguf::{Gguf, TensorDecl, layout};
use kestrel_formats::imatrix::Imatrix;
use kestrel_formats::kl_base::{KlBase, Prediction, PredictionBuffer};
use kestrel_formats::map::Map;
use kestrel_formats::tokenizer::TokenizerData;
use kestrel_formats::{GgmlType, Result};
use kestrel_quant::codec;
use kestrel_quant::feedback::Feedback;
use kestrel_quant::recipe::{FileType, Recipe};
use kestrel_runtime::chat::{Conversation, Message, render};
use kestrel_runtime::evaluate::{Divergence, log_softmax};
use kestrel_runtime::kernels::{ActKind, Acts, Compute, Isa, MatrixRef, Then};
use kestrel_runtime::state::StateShape;
use kestrel_runtime::tokenizer::Tokenizer;
use kestrel_runtime::{Model, Runner, RunnerOptions, State};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// The name of a target in `fuzz/fuzz_targets` and in `fuzz/corpus`, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 16] = [
    ("gguf_container", gguf_container),
    ("gguf_struct", gguf_struct),
    ("gguf_model", gguf_model),
    ("safetensors_header", safetensors_header),
    ("checkpoint_folder", checkpoint_folder),
    ("bnb_state", bnb_state),
    ("tokenizer_json", tokenizer_json),
    ("tokenizer_text", tokenizer_text),
    ("chat_template", chat_template),
    ("state_file", state_file),
    ("imatrix", imatrix),
    ("calibration", calibration),
    ("kl_base", kl_base),
    ("dequant", dequant),
    ("activations", activations),
    ("quantize", quantize),
];

/// The file that errors name.
fn name() -> &'static Path {
    Path::new("fuzzed")
}

fn parse(bytes: &[u8]) -> Result<Gguf> {
    Gguf::parse(Map::from_bytes(name(), bytes.to_vec()))
}

/// A GGUF file. The reader allocates in proportion to it, tensors that it vouches for are in bounds and share no byte,
/// and what is written from what was read reads the same.
pub fn gguf_container(bytes: &[u8]) {
    let map = Map::from_bytes(name(), bytes.to_vec());
    let (outcome, peak) = peak_during(|| Gguf::parse(map));
    assert!(peak <= (1 << 20) + 2 * bytes.len(), "{peak} bytes of heap for {}", bytes.len());
    let Ok(file) = outcome else { return };
    let mut places: Vec<(u64, u64)> = file
        .tensors()
        .iter()
        .map(|t| {
            let view = file.tensor(&t.name).expect("a listed tensor is found");
            assert_eq!(view.bytes.len() as u64, t.n_bytes);
            (t.offset, t.offset + t.n_bytes)
        })
        .filter(|(start, end)| start < end)
        .collect();
    places.sort_unstable();
    assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0), "tensors overlap");
    written_reads_the_same(&file);
}

fn written_reads_the_same(file: &Gguf) {
    let pairs: Vec<_> =
        file.metadata().to_pairs().into_iter().filter(|(key, _)| key != "general.alignment").collect();
    let decl = |t: &kestrel_formats::gguf::TensorInfo| TensorDecl {
        name: t.name.clone(),
        dtype: t.dtype,
        shape: t.shape.clone(),
    };
    let decls: Vec<_> = file.tensors().iter().map(decl).collect();
    let written = layout(&pairs, &decls).expect("what was read can be written");
    let mut bytes = written.header;
    bytes.resize(written.file_bytes as usize, 0);
    let again = parse(&bytes).expect("what was written can be read");
    assert_eq!(again.metadata().to_pairs().len(), pairs.len());
    let same = again.tensors().iter().map(decl).eq(decls.iter().cloned());
    assert!(same, "another table of tensors");
    // Values with NaN in them are not equal to themselves; their text is.
    assert_eq!(format!("{:?}", again.metadata().to_pairs()), format!("{pairs:?}"));
}

/// Loads what may be a model and runs it over one token.
fn load_and_run(bytes: &[u8]) {
    let Ok(file) = parse(bytes) else { return };
    let Ok(model) = Model::from_gguf(&file) else { return };
    if let Ok(tokenizer) = model.tokenizer() {
        let ids = tokenizer.encode("ab <s>\n", true).expect("ids");
        assert!(ids.iter().all(|&id| (id as usize) < model.hparams().vocab_size));
    }
    let options = RunnerOptions { threads: 1, chunk: 8, ..RunnerOptions::default() };
    let mut runner = Runner::new(&model, &options).expect("a runner");
    let mut logits = vec![0.0; model.hparams().vocab_size];
    runner.forward(&mut model.new_state(), &[0], &mut logits);
}

/// A whole model of at most 256 KiB: loading, tokenizer, one token.
pub fn gguf_model(bytes: &[u8]) {
    if bytes.len() <= 256 << 10 {
        load_and_run(bytes);
    }
}

/// A sound model with some fields changed, so that what lies behind the header is reached.
pub fn gguf_struct(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    if let Ok(file) = mutated(with_vocabulary(), &mut input) {
        let bytes = file.bytes();
        gguf_container(&bytes);
        load_and_run(&bytes);
    }
}

/// At most `most` bytes.
fn some_bytes(input: &mut Unstructured, most: usize) -> arbitrary::Result<Vec<u8>> {
    let n = input.int_in_range(0..=most)?.min(input.len());
    Ok(input.bytes(n)?.to_vec())
}

/// The values of every type that mutations draw from, besides random ones.
fn value(input: &mut Unstructured) -> arbitrary::Result<Raw> {
    const NUMBERS: [u64; 12] = [0, 1, 2, 7, 16, 255, 256, 513, 1 << 20, 1 << 31, u32::MAX as u64, u64::MAX];
    let number = if input.ratio(3, 4)? { *input.choose(&NUMBERS)? } else { input.arbitrary()? };
    let ty = input.int_in_range(0..=13u32)?;
    Ok(match ty {
        8 => Raw::str(&some_bytes(input, 64)?),
        9 => {
            let n = input.int_in_range(0..=20u64)?;
            let claimed = if input.ratio(1, 8)? { number } else { n };
            let element = input.int_in_range(0..=13u32)?;
            let width = [1, 1, 2, 2, 4, 4, 4, 1, 8, 1, 8, 8, 8, 1][element as usize];
            let taken = input.bytes((width * n as usize).min(input.len()))?.to_vec();
            Raw::array(element, claimed, &taken)
        }
        _ => {
            let width = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8, 8][ty as usize];
            Raw::new(ty, &number.to_le_bytes()[..width])
        }
    })
}

/// `file` after up to three changes.
fn mutated(mut file: GgufBuilder, input: &mut Unstructured) -> arbitrary::Result<GgufBuilder> {
    for _ in 0..input.int_in_range(1..=3)? {
        let (n_pairs, n_tensors) = (file.pairs.len(), file.tensors.len());
        if n_pairs == 0 || n_tensors == 0 {
            break;
        }
        let pair = input.choose_index(n_pairs)?;
        let tensor = input.choose_index(n_tensors)?;
        match input.int_in_range(0..=15u8)? {
            0 => drop(file.pairs.remove(pair)),
            1 => {
                let again = file.pairs[pair].clone();
                file.pairs.push(again);
            }
            2..=5 => file.pairs[pair].1 = value(input)?,
            6 => file.pairs[pair].0 = some_bytes(input, 40)?,
            7 => drop(file.tensors.remove(tensor)),
            8 => {
                let again = file.tensors[tensor].clone();
                file.tensors.push(again);
            }
            9 => file.tensors[tensor].name = some_bytes(input, 70)?,
            10 => {
                let t = &mut file.tensors[tensor];
                let (i, n) = (input.int_in_range(0..=3usize)?, input.int_in_range(0..=300u64)?);
                match t.ne.get_mut(i) {
                    Some(ne) => *ne = n,
                    None => t.ne.push(n),
                }
            }
            11 => file.tensors[tensor] = retyped(&file.tensors[tensor], input)?,
            12 => file.tensors[tensor].offset = Some(input.arbitrary()?),
            13 => {
                let t = &mut file.tensors[tensor];
                let n = t.data.len().min(input.len()).min(64);
                let at = input.choose_index(t.data.len().max(1))?.min(t.data.len() - n);
                t.data[at..at + n].copy_from_slice(input.bytes(n)?);
            }
            14 => {
                file.alignment = 1 << input.int_in_range(0..=8u32)?;
                let stated = input.arbitrary::<u32>()?;
                let stated = if input.ratio(3, 4)? { file.alignment as u32 } else { stated };
                file = file.set("general.alignment", Raw::u32(stated));
            }
            _ => {
                file.n_kv = Some(input.arbitrary()?);
                file.version = input.int_in_range(0..=4)?;
            }
        }
    }
    Ok(file)
}

/// The tensor with another type and as much data as that asks for.
fn retyped(t: &RawTensor, input: &mut Unstructured) -> arbitrary::Result<RawTensor> {
    let ty = input.int_in_range(0..=42u32)?;
    let n: u64 = t.ne.iter().product();
    let dtype = GgmlType::all().find(|known| known.id() == ty);
    let n_bytes = dtype.and_then(|d| d.bytes_for(n)).unwrap_or(n).min(1 << 20);
    let data = input.bytes(input.len().min(n_bytes as usize))?;
    let data = data.iter().chain(std::iter::repeat(&0)).copied().take(n_bytes as usize).collect();
    Ok(RawTensor { ty, n_bytes, data, ..t.clone() })
}

/// A safetensors file. What is accepted here the crate `safetensors` accepts as well, with the same tensors.
pub fn safetensors_header(bytes: &[u8]) {
    let Ok(mut ours) = safetensors_tensors(bytes, name()) else { return };
    let (_, theirs) = ::safetensors::SafeTensors::read_metadata(bytes).expect("the crate accepts it too");
    ours.sort_by(|a, b| a.0.cmp(&b.0));
    let theirs: BTreeMap<_, _> = theirs.tensors().into_iter().collect();
    assert_eq!(ours.len(), theirs.len());
    for ((name, ours), (their_name, theirs)) in ours.iter().zip(&theirs) {
        assert_eq!(name, their_name);
        assert_eq!(
            (ours.dtype, &ours.shape, ours.data_offsets),
            (theirs.dtype, &theirs.shape, theirs.data_offsets)
        );
    }
}

thread_local! {
    /// A folder that all runs of a process share.
    static FOLDER: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

fn in_folder(f: impl FnOnce(&TempDir)) {
    FOLDER.with_borrow_mut(|folder| f(folder.get_or_insert_with(TempDir::new)));
}

/// A checkpoint folder: the bytes are cut at every 0xff 0xfe into config.json, the index, tokenizer.json,
/// tokenizer_config.json and two shards; what is missing or empty is sound.
pub fn checkpoint_folder(bytes: &[u8]) {
    const MARK: [u8; 2] = [0xff, 0xfe];
    let sound = CheckpointBuilder::new();
    let (a, b) = sound.tensors.split_at(6);
    let defaults = [
        ("config.json", sound.config.to_string().into_bytes()),
        ("model.safetensors.index.json", sound.index().to_string().into_bytes()),
        ("tokenizer.json", sound.tokenizer.clone().unwrap_or_default().to_string().into_bytes()),
        ("tokenizer_config.json", b"{}".to_vec()),
        ("a.safetensors", safetensors(a)),
        ("b.safetensors", safetensors(b)),
    ];
    let mut rest = bytes;
    in_folder(|dir| {
        for (name, default) in defaults {
            let end = rest.windows(2).position(|w| w == MARK).unwrap_or(rest.len());
            let (part, after) = rest.split_at(end);
            dir.file(name, if part.is_empty() { &default } else { part });
            rest = after.get(2..).unwrap_or_default();
        }
        let Ok(checkpoint) = Checkpoint::open(dir.path()) else { return };
        for t in checkpoint.tensors() {
            let mut data = vec![0; t.place.n_bytes as usize];
            checkpoint.read(&t.place, 0, &mut data).expect("a tensor that was vouched for");
        }
        let model = Model::from_checkpoint(&checkpoint, &Default::default());
        let Ok(model) = model else { return };
        let options = RunnerOptions { threads: 1, chunk: 8, ..RunnerOptions::default() };
        let mut logits = vec![0.0; model.hparams().vocab_size];
        Runner::new(&model, &options).expect("a runner").forward(&mut model.new_state(), &[0], &mut logits);
    });
}

/// A sound checkpoint of bitsandbytes after up to three changes to what one matrix is made of. No weight of what is
/// accepted is larger than promised, and every instruction set runs the model to the bits of plain Rust's logits.
pub fn bnb_state(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let Ok((tensors, config, isa)) = mutated_bnb(&mut input) else { return };
    in_folder(|dir| {
        for (name, bytes) in
            [("config.json", config.to_string().into_bytes()), ("model.safetensors", to_bytes(&tensors))]
        {
            dir.file(name, &bytes);
        }
        for other in ["model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"] {
            let _ = std::fs::remove_file(dir.path().join(other)); // another target's, or none
        }
        let Ok(checkpoint) = Checkpoint::open(dir.path()) else { return };
        for t in checkpoint.tensors() {
            let Some(state) = &t.state else { continue };
            // Codes of int8 go down to -128/127, and rounding to bf16 may add half a unit of its last place.
            let most = state.largest * (128.0 / 127.0) * (1.0 + 1.0 / 256.0);
            for w in dequantized(&checkpoint, t) {
                assert!(w.is_finite() && w.abs() <= most, "{}: {w} beyond {most}", t.name);
            }
        }
        let Ok(model) = Model::from_checkpoint(&checkpoint, &Default::default()) else { return };
        for precise in [false, true] {
            let run = |isa| {
                let options = RunnerOptions { isa: Some(isa), threads: 1, precise, chunk: 9 };
                let mut runner = Runner::new(&model, &options).expect("a runner");
                let (mut state, mut logits) = (model.new_state(), vec![0.0; model.hparams().vocab_size]);
                runner.forward(&mut state, &[0, 1, 2, 3, 4, 5, 6, 7, 8], &mut logits);
                let mut all = bits(&logits);
                runner.forward(&mut state, &[9], &mut logits);
                all.extend(bits(&logits));
                all
            };
            assert_eq!(run(isa), run(isa.truth()), "{}, precise {precise}", isa.name());
        }
    });
}

/// The tensors, the configuration, and an instruction set that the machine has.
fn mutated_bnb(input: &mut Unstructured) -> arbitrary::Result<(Tensors, Value, Isa)> {
    let (mut tensors, config) =
        bnb_builder::sound(*input.choose(&[Kind::Nf4, Kind::Fp4Nested, Kind::Int8])?);
    let isa = *input.choose(&Isa::all_supported())?;
    let module = MATRIX.trim_end_matches("weight");
    for _ in 0..input.int_in_range(0..=3)? {
        let parts: Vec<String> = tensors.keys().filter(|name| name.starts_with(module)).cloned().collect();
        if parts.is_empty() {
            break;
        }
        let name = input.choose(&parts)?;
        let is_state = name.contains("quant_state");
        let mut part = tensors[name].clone();
        match input.int_in_range(0..=9u8)? {
            0 => {
                tensors.remove(name);
                continue;
            }
            1 => {
                const SUFFIXES: [&str; 9] = [
                    "weight",
                    "weight.absmax",
                    "weight.quant_map",
                    "weight.nested_absmax",
                    "weight.nested_quant_map",
                    "weight.quant_state.bitsandbytes__nf4",
                    "weight.quant_state.bitsandbytes__fp4",
                    "SCB",
                    "weight_format",
                ];
                tensors.insert(format!("{module}{}", input.choose(&SUFFIXES)?), part);
                continue;
            }
            2 => {
                part.dtype = (*input.choose(&["U8", "I8", "F16", "BF16", "F32", "I64", "F64"])?).to_owned();
                reshape(&mut part);
            }
            3 => {
                part.shape = (0..input.int_in_range(0..=3usize)?)
                    .map(|_| input.int_in_range(0..=300u64))
                    .collect::<arbitrary::Result<_>>()?;
                let n = part.shape.iter().product::<u64>() * width(&part.dtype);
                part.bytes.resize(n.min(1 << 16) as usize, 0x35);
            }
            4 => {
                part.bytes.resize(input.int_in_range(0..=part.bytes.len() + 64)?, 0x35);
                reshape(&mut part);
            }
            5 if is_state => {
                part.bytes = some_bytes(input, 200)?;
                reshape(&mut part);
            }
            6..=9 if is_state => {
                let mut state: Value = serde_json::from_slice(&part.bytes).unwrap_or_default();
                if let Some(fields) = state.as_object_mut() {
                    change_state(fields, input)?;
                }
                part.bytes = state.to_string().into_bytes();
                reshape(&mut part);
            }
            _ => {
                let n = part.bytes.len().min(input.len()).min(64);
                let at = input.choose_index(part.bytes.len().max(1))?.min(part.bytes.len() - n);
                part.bytes[at..at + n].copy_from_slice(input.bytes(n)?);
            }
        }
        tensors.insert(name.clone(), part);
    }
    Ok((tensors, config, isa))
}

fn width(dtype: &str) -> u64 {
    match dtype {
        "U8" | "I8" => 1,
        "F16" | "BF16" => 2,
        "F32" => 4,
        _ => 8,
    }
}

/// One dimension, as many numbers as there are whole ones.
fn reshape(part: &mut Stored) {
    let n = part.bytes.len() as u64 / width(&part.dtype);
    part.bytes.truncate((n * width(&part.dtype)) as usize);
    part.shape = vec![n];
}

/// Sets, adds or takes out a field of a quant state; with another block size the scales may or may not be as many.
fn change_state(
    fields: &mut serde_json::Map<String, Value>,
    input: &mut Unstructured,
) -> arbitrary::Result<()> {
    const FIELDS: [&str; 8] = [
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
        "other",
    ];
    let field = (*input.choose(&FIELDS)?).to_owned();
    let value = match input.int_in_range(0..=8u8)? {
        0 => {
            fields.remove(&field);
            return Ok(());
        }
        1 => json!(*input.choose(&[0, 1, 32, 63, 64, 128, 256, 4096, 1 << 31, u64::MAX])?),
        2 => json!(f64::from(input.arbitrary::<f32>()?)),
        3 => json!(*input.choose(&["nf4", "fp4", "float16", "bfloat16", "float32", "int8", ""])?),
        4 => json!([input.int_in_range(0..=300u64)?, input.int_in_range(0..=300u64)?]),
        // Other rows and columns of as many weights.
        5 => json!(*input.choose(&[[32, 128], [64, 64], [4096, 1], [1, 4096], [2, 2048]])?),
        6 => json!([input.arbitrary::<u64>()?, input.arbitrary::<u64>()?]),
        7 => json!(*input.choose(&[1e38, -1e38, 1e-40, -0.5])?),
        _ => Value::Null,
    };
    fields.insert(field, value);
    Ok(())
}

/// A tokenizer.json. What is accepted encodes a text to ids of its vocabulary.
pub fn tokenizer_json(bytes: &[u8]) {
    let Ok(data) = TokenizerData::from_json(bytes, name()) else { return };
    let tokenizer = Tokenizer::new(&data).expect("validated data makes a tokenizer");
    for parse_special in [false, true] {
        let ids = tokenizer.encode("abab, <s>12 345\n<|endoftext|> é", parse_special).expect("ids");
        assert!(ids.iter().all(|&id| (id as usize) < data.tokens.len()));
    }
    let _ = data.to_metadata();
}

/// A text: encoding it with the tiny model's vocabulary and decoding gives the text back.
pub fn tokenizer_text(bytes: &[u8]) {
    thread_local! {
        static TOKENIZER: Tokenizer = {
            let json = include_bytes!("../data/tiny-falcon-mamba/tokenizer.json");
            Tokenizer::new(&TokenizerData::from_json(json, name()).expect("sound")).expect("sound")
        };
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    TOKENIZER.with(|tokenizer| {
        for parse_special in [false, true] {
            let ids = tokenizer.encode(text, parse_special).expect("ids");
            assert!(ids.len() <= text.len(), "more ids than bytes");
            assert_eq!(tokenizer.decode(&ids), text);
        }
    });
}

/// A chat template.
pub fn chat_template(bytes: &[u8]) {
    let template = String::from_utf8_lossy(bytes);
    let messages = [
        Message { role: "system", content: "Be brief." },
        Message { role: "user", content: "Why is the sky blue?" },
        Message { role: "assistant", content: "Because." },
    ];
    let conversation = Conversation { messages: &messages, bos_token: "<s>", eos_token: "</s>" };
    if let Ok(text) = render(&template, &conversation) {
        assert!(text.len() <= 2 << 20, "{} bytes", text.len());
    }
}

/// A saved state. What is accepted saves to the same bytes.
pub fn state_file(bytes: &[u8]) {
    let shape = StateShape::new(&SMALL, 7);
    if let Ok(state) = State::from_bytes(bytes, shape, name()) {
        assert_eq!(state.to_bytes(), bytes);
    }
}

/// An importance matrix. The numbers of what is accepted are finite and not negative.
pub fn imatrix(bytes: &[u8]) {
    in_folder(|dir| {
        let Ok(matrix) = Imatrix::open(&dir.file("imatrix", bytes)) else { return };
        let values = matrix.for_tensor("blk.0.ssm_in.weight").unwrap_or_default();
        assert!(values.iter().all(|x| x.is_finite() && *x >= 0.0));
    });
}

/// A calibration, or changes to a sound one. Divergences of what is accepted are not negative, products come in whole
/// groups, rounding by them gives finite weights, and a plan for a size keeps to it.
pub fn calibration(bytes: &[u8]) {
    let file = match bytes.starts_with(b"GGUF") {
        true => bytes.to_vec(),
        false => match mutated(bad_input::calibration(), &mut Unstructured::new(bytes)) {
            Ok(file) => file.bytes(),
            Err(_) => return,
        },
    };
    let Ok(calibration) = parse(&file).and_then(Calibration::of) else { return };
    for name in calibration.matrices() {
        let all = calibration.divergence(name).expect("a listed matrix has one");
        assert!(all.into_iter().all(|(_, kl)| kl >= 0.0 && kl.is_finite()), "{name}");
    }
    let names = calibration.matrices().chain(["blk.0.ssm_in.weight"]);
    for products in names.filter_map(|name| calibration.products(name)) {
        let (n, group) = (products.means.len(), products.group);
        assert!(n.is_multiple_of(group * group), "{group} of {n}");
        let Ok(feedback) = Feedback::new(&products) else { continue };
        let row: Vec<f32> = (0..feedback.cols()).map(|i| (i % 13) as f32 - 6.0).collect();
        for ty in GgmlType::all().filter(|ty| feedback.takes(*ty) && !row.is_empty()) {
            let mut stored = vec![0; ty.bytes_for(row.len() as u64).expect("whole blocks") as usize];
            feedback.quantize_with(kestrel_quant::isa::Isa::best(), ty, &row, &mut stored);
            let mut back = vec![0.0; row.len()];
            codec(ty).dequantize(&stored, &mut back);
            assert!(back.iter().all(|x| x.is_finite()), "{ty}: {back:?}");
        }
    }
    in_folder(|dir| {
        let model = dir.path().join("wide.gguf");
        if !model.exists() {
            dir.file("wide.gguf", &wide_model().bytes());
        }
        let source = Source::open(&model).expect("a sound model");
        let most = 16_000 + u64::from(file.last().copied().unwrap_or(0)) * 64;
        let options = Options {
            calibration: Some(calibration),
            target: Some(kestrel_convert::Target::Bytes(most)),
            ..Options::new(Recipe::new(FileType::Q4_0, &[]).expect("a file type"))
        };
        if let Ok(plan) = plan(&source, &options) {
            assert!(plan.file_bytes <= most, "{} bytes", plan.file_bytes);
        }
    });
}

/// A base model's predictions. What is accepted are probabilities, and a divergence from them is a number.
pub fn kl_base(bytes: &[u8]) {
    const VOCAB: usize = 16;
    let map = Map::from_bytes(name(), bytes.to_vec());
    let (outcome, peak) = peak_during(|| KlBase::parse(map, VOCAB));
    assert!(peak <= (1 << 20) + 2 * bytes.len(), "{peak} bytes of heap for {}", bytes.len());
    let Ok(base) = outcome else { return };
    assert!(base.tokens().iter().all(|&t| (t as usize) < VOCAB));
    let (mut divergence, mut n) = (Divergence::default(), 0);
    let (mut buffer, mut normalized) = (PredictionBuffer::default(), vec![0.0; VOCAB]);
    for i in 0..base.n_scored() as usize {
        let next = (i % VOCAB) as u32;
        let log_probs = match base.prediction(i, next, &mut buffer) {
            Ok(Prediction::LogProbs(log_probs)) => log_probs,
            Ok(Prediction::Logits(logits)) => {
                log_softmax(logits, &mut normalized);
                &normalized
            }
            Err(_) => continue,
        };
        let sum: f64 = log_probs.iter().map(|p| p.exp()).sum();
        assert!((0.5..1.1).contains(&sum) && log_probs[next as usize].is_finite(), "{log_probs:?}");
        divergence.add(log_probs, &[-(VOCAB as f64).ln(); VOCAB], next);
        n += 1;
    }
    assert!(n == 0 || divergence.mean_kl().is_finite(), "a divergence of {}", divergence.mean_kl());
}

/// Splits off what chooses the type, and pads the rest to whole blocks, at most 8 of the largest.
fn blocks(bytes: &[u8]) -> Option<(GgmlType, &[u8], &[u8])> {
    let (&choice, rest) = bytes.split_first()?;
    let types: Vec<GgmlType> = GgmlType::all().collect();
    let ty = types[choice as usize % types.len()];
    // Columns have to suit blocks of 256, and rows of the plain types some vectors.
    let n = (rest.len() / ty.block_bytes()).min(2048 / ty.block_len());
    let (data, more) = rest.split_at(n * ty.block_bytes());
    (n > 0).then_some((ty, data, more))
}

/// The bits, those of every NaN the same.
fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

/// Activations from bytes, repeated as needed.
fn floats(bytes: &[u8], n: usize) -> Vec<f32> {
    let numbers: Vec<f32> =
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    (0..n)
        .map(|i| if numbers.is_empty() { (i % 7) as f32 - 3.0 } else { numbers[i % numbers.len()] })
        .collect()
}

/// Columns that both a row of the matrix and a block of activations divide into, as the reader of a model demands.
fn columns(ty: GgmlType, data: &[u8]) -> usize {
    data.len() / ty.block_bytes() * ty.block_len()
}

/// Runs something on an instruction set; its buffers, which take longer to make than to use, are kept.
fn on(isa: Isa, f: impl FnOnce(&mut Compute)) {
    thread_local! {
        static COMPUTE: RefCell<Vec<Compute>> = const { RefCell::new(Vec::new()) };
    }
    COMPUTE.with_borrow_mut(|all| {
        let i = all.iter().position(|c| c.isa() == isa).unwrap_or_else(|| {
            all.push(Compute::new(isa, 1, 9));
            all.len() - 1
        });
        f(&mut all[i]);
    });
}

/// A product of one row, or of a panel of equal rows, with some tokens.
fn product(isa: Isa, ty: GgmlType, data: &[u8], x: &[f32], tokens: usize, precise: bool) -> Vec<u32> {
    let cols = columns(ty, data);
    let rows = if tokens > 1 { 17 } else { 1 };
    let kind = ActKind::for_weights(ty, precise);
    let mut acts = Acts::with_capacity(tokens, cols);
    let all: Vec<f32> = x.iter().copied().cycle().take(tokens * cols).collect();
    let mut out = vec![0.5; rows * tokens];
    let weights = data.repeat(rows);
    let matrix = MatrixRef::new(ty, rows, cols, &weights).expect("whole blocks");
    on(isa, |compute| {
        compute.norm(&all, &vec![1.0; cols], 1e-5, kind, &mut acts);
        compute.matmul(&matrix, &acts, &mut out, Then::Add);
    });
    bits(&out)
}

/// Blocks of any bits in every type: the products of every instruction set have the bits of plain Rust's, for one and
/// for many tokens, with quantized and with plain activations.
pub fn dequant(bytes: &[u8]) {
    let Some((ty, data, more)) = blocks(bytes) else { return };
    let cols = columns(ty, data);
    let mut plain = vec![0.0; cols];
    codec(ty).dequantize(data, &mut plain);
    let x = floats(more, cols);
    for isa in Isa::all_supported().into_iter().filter(|isa| *isa != isa.truth()) {
        for (tokens, precise) in [(1, false), (1, true), (9, false), (9, true)] {
            let truth = product(isa.truth(), ty, data, &x, tokens, precise);
            let got = product(isa, ty, data, &x, tokens, precise);
            assert_eq!(truth, got, "{} {ty}, {tokens} tokens, precise {precise}", isa.name());
        }
    }
}

/// Activations of any bits: every instruction set norms and quantizes them to the same numbers, and finite ones come
/// back within half a step.
pub fn activations(bytes: &[u8]) {
    let Some((&choice, rest)) = bytes.split_first() else { return };
    let kind = [ActKind::F32, ActKind::Q8x32, ActKind::Q8x256, ActKind::Q8x32EvenOdd][choice as usize % 4];
    let cols = (rest.len() / 4 / 256 * 256).min(2048);
    if cols == 0 {
        return;
    }
    let x = floats(&rest[..4 * cols], cols);
    let normed = |isa, kind| {
        let mut acts = Acts::with_capacity(1, cols);
        on(isa, |compute| compute.norm(&x, &vec![1.0; cols], 1e-5, kind, &mut acts));
        acts.to_f32(0)
    };
    let (x, truth) = (normed(Isa::Scalar, ActKind::F32), normed(Isa::Scalar, kind));
    for isa in Isa::all_supported() {
        assert_eq!(bits(&normed(isa, kind)), bits(&truth), "{} {kind:?}", isa.name());
    }
    for (x, y) in x.chunks(kind.block_len()).zip(truth.chunks(kind.block_len())) {
        let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
        let moderate = x.iter().all(|x| x.is_finite()) && largest < 1e30 && largest > 1e-30;
        let near = |(x, y): (&f32, &f32)| (x - y).abs() <= largest / 127.0 * 0.5001;
        assert!(!moderate || x.iter().zip(y).all(near), "{x:?} became {y:?}");
    }
}

/// Finite numbers quantize to blocks that hold finite numbers, in every type, up to the size from which on the converter
/// looks at what came out (1/16 of what f16 holds).
pub fn quantize(bytes: &[u8]) {
    let Some((&choice, rest)) = bytes.split_first() else { return };
    let types: Vec<GgmlType> = GgmlType::all().collect();
    let ty = types[choice as usize % types.len()];
    let n = (rest.len() / 4 / ty.block_len()).min(2048 / ty.block_len()) * ty.block_len();
    if n == 0 {
        return;
    }
    let x: Vec<f32> = floats(&rest[..4 * n], n)
        .iter()
        .map(|x| if x.is_finite() { x.clamp(-4e3, 4e3) } else { 0.0 })
        .collect();
    let mut stored = vec![0; ty.bytes_for(n as u64).expect("whole blocks") as usize];
    codec(ty).quantize(&x, None, &mut stored);
    let mut back = vec![0.0; n];
    codec(ty).dequantize(&stored, &mut back);
    assert!(back.iter().all(|x| x.is_finite()), "{ty}: {x:?} became {back:?}");
    let importance: Vec<f32> = x.iter().map(|x| x.abs()).collect();
    codec(ty).quantize(&x, Some(&importance), &mut stored);
    codec(ty).dequantize(&stored, &mut back);
    assert!(back.iter().all(|x| x.is_finite()), "{ty} with importance: {x:?} became {back:?}");
}
