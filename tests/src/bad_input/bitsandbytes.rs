//! Checkpoints of bitsandbytes whose codes, scales and quant states do not go together.

use super::*;
use crate::bnb_builder::{Kind as Packing, MATRIX, sound};
use crate::checkpoint_builder::CheckpointBuilder;
use crate::safetensors::{Tensors, to_bytes};
use serde_json::{Value, json};

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    sound_cases().chain(four_bit_cases()).chain(nested_cases()).chain(int8_cases()).collect()
}

/// A change to the tensors of a sound checkpoint, or to its config.json.
type Change = Box<dyn Fn(&mut Tensors, &mut Value) + Send + Sync>;
type Row = (&'static str, Change, Expect);

fn rows(packing: Packing, rows: Vec<Row>) -> impl Iterator<Item = Case> {
    rows.into_iter().map(move |(name, change, expect)| {
        folder_case("bitsandbytes", name, expect, move |dir| {
            let (mut tensors, mut config) = sound(packing);
            change(&mut tensors, &mut config);
            dir.file("model.safetensors", &to_bytes(&tensors));
            dir.file("config.json", config.to_string().as_bytes());
            let tokenizer = CheckpointBuilder::new().tokenizer.expect("a tokenizer");
            dir.file("tokenizer.json", tokenizer.to_string().as_bytes());
            dir.path().to_owned()
        })
    })
}

fn tensors(change: impl Fn(&mut Tensors) + Send + Sync + 'static) -> Change {
    Box::new(move |tensors, _| change(tensors))
}

fn nothing() -> Change {
    tensors(|_| {})
}

/// The name of the matrix's quant state.
fn state_name(tensors: &Tensors) -> String {
    let mut names = tensors.keys().filter(|name| name.starts_with(MATRIX) && name.contains("quant_state"));
    names.next().expect("a quant state").clone()
}

/// Changes the JSON of the matrix's quant state.
fn state(change: impl Fn(&mut Value) + Send + Sync + 'static) -> Change {
    tensors(move |tensors| {
        let stored = tensors.get_mut(&state_name(tensors)).expect("a quant state");
        let mut json = serde_json::from_slice(&stored.bytes).expect("JSON");
        change(&mut json);
        stored.bytes = json.to_string().into_bytes();
        stored.shape = vec![stored.bytes.len() as u64];
    })
}

fn set(field: &'static str, value: Value) -> Change {
    state(move |json| json[field] = value.clone())
}

/// Without a part of the matrix.
fn without(part: &'static str) -> Change {
    tensors(move |tensors| drop(tensors.remove(&format!("{MATRIX}{part}")).expect("the part")))
}

/// Without the last bytes of a part, whose shape is right for what is left.
fn cut(part: &'static str, n_bytes: usize) -> Change {
    tensors(move |tensors| {
        let stored = tensors.get_mut(&format!("{MATRIX}{part}")).expect("the part");
        stored.bytes.truncate(stored.bytes.len() - n_bytes);
        let width = if stored.dtype == "F32" { 4 } else { 1 };
        stored.shape = vec![(stored.bytes.len() / width) as u64];
    })
}

/// With another number as the third of a part.
fn third(part: &'static str, x: f32) -> Change {
    tensors(move |tensors| {
        let stored = tensors.get_mut(&format!("{MATRIX}{part}")).expect("the part");
        stored.bytes[8..12].copy_from_slice(&x.to_le_bytes());
    })
}

fn sound_cases() -> impl Iterator<Item = Case> {
    let run = |case: Case| case.by(Action::Logits);
    // Codes as a row instead of a column, and viewed as other types.
    let as_row = tensors(|tensors| tensors.get_mut(MATRIX).expect("the matrix").shape = vec![1, 2048]);
    let stored_as = |dtype: &'static str, width: u64| {
        tensors(move |tensors| {
            let codes = tensors.get_mut(MATRIX).expect("the matrix");
            (codes.dtype, codes.shape) = (dtype.to_owned(), vec![2048 / width, 1]);
        })
    };
    let four = rows(
        Packing::Nf4,
        vec![
            ("valid_nf4", nothing(), Accept),
            ("B13 row_of_codes", as_row, Accept),
            ("B13 stored_as_bf16", stored_as("BF16", 2), Accept),
            ("B13 stored_as_f16", stored_as("F16", 2), Accept),
            ("B13 stored_as_f32", stored_as("F32", 4), Accept),
        ],
    );
    let nested = rows(Packing::Fp4Nested, vec![("valid_fp4_nested", nothing(), Accept)]);
    let int8 = rows(Packing::Int8, vec![("valid_int8", nothing(), Accept)]);
    four.chain(nested).chain(int8).map(run)
}

fn four_bit_cases() -> impl Iterator<Item = Case> {
    use Kind::*;
    let other_map = tensors(|tensors| {
        let map = tensors.get_mut(&format!("{MATRIX}.quant_map")).expect("the map");
        map.bytes[..4].copy_from_slice(&0.5f32.to_le_bytes());
    });
    let orphan = tensors(|tensors| {
        let scales = tensors[&format!("{MATRIX}.absmax")].clone();
        tensors.insert("backbone.layers.0.mixer.nothing.weight.absmax".to_owned(), scales);
    });
    let repacked = tensors(|tensors| {
        let scales = tensors.get_mut(&format!("{MATRIX}.absmax")).expect("the scales");
        (scales.dtype, scales.shape) = ("BF16".to_owned(), vec![1, 128]);
    });
    let two_states = tensors(|tensors| {
        let nf4 = tensors[&state_name(tensors)].clone();
        tensors.insert(format!("{MATRIX}.quant_state.bitsandbytes__fp4"), nf4);
    });
    let not_json = tensors(|tensors| {
        let name = state_name(tensors);
        tensors.get_mut(&name).expect("a quant state").bytes[0] = b'x';
    });
    let odd_storage = tensors(|tensors| {
        tensors.get_mut(MATRIX).expect("the matrix").dtype = "I8".to_owned();
    });
    let config = |change: fn(&mut serde_json::Map<String, Value>)| -> Change {
        Box::new(move |_, config| change(config.as_object_mut().expect("an object")))
    };
    rows(
        Packing::Nf4,
        vec![
            ("B01 no_quant_state", without(".quant_state.bitsandbytes__nf4"), Reject(Missing)),
            ("B02 not_json", not_json, Reject(BadJson)),
            ("B02 long_state", set("dtype", json!("x".repeat(5000))), Reject(BadJson)),
            ("B02 two_states", two_states, Reject(Inconsistent)),
            ("B03 blocksize_0", set("blocksize", json!(0)), Reject(OutOfRange)),
            ("B03 blocksize_63", set("blocksize", json!(63)), Reject(OutOfRange)),
            ("B03 blocksize_2_31", set("blocksize", json!(1u64 << 31)), Reject(OutOfRange)),
            ("B03 blocksize_text", set("blocksize", json!("64")), Reject(OutOfRange)),
            ("B03 blocksize_128", set("blocksize", json!(128)), Reject(Inconsistent)),
            ("B04 absmax_short", cut(".absmax", 4), Reject(Inconsistent)),
            ("B04 no_absmax", without(".absmax"), Reject(Missing)),
            ("B04 absmax_repacked", repacked, Reject(Unsupported)),
            ("B05 nan", third(".absmax", f32::NAN), Reject(NotFinite)),
            ("B05 inf", third(".absmax", f32::INFINITY), Reject(NotFinite)),
            ("B05 negative", third(".absmax", -1.0), Reject(NotFinite)),
            ("B05 beyond_f16", third(".absmax", 65536.0), Reject(NotFinite)),
            ("B06 map_short", cut(".quant_map", 4), Reject(Inconsistent)),
            ("B06 other_map", other_map, Reject(Inconsistent)),
            ("B06 no_map", without(".quant_map"), Reject(Missing)),
            ("B08 codes_short", cut("", 1), Reject(Inconsistent)),
            ("B08 codes_as_i8", odd_storage, Reject(WrongType)),
            ("B09 odd_rows", set("shape", json!([1365, 3])), Reject(Unsupported)),
            ("B10 fp4", set("quant_type", json!("fp4")), Reject(Inconsistent)),
            ("B10 nf5", set("quant_type", json!("nf5")), Reject(Inconsistent)),
            ("B11 dtype", set("dtype", json!("float8")), Reject(UnknownType)),
            ("B14 overflow", set("shape", json!([1u64 << 63, 4])), Reject(BadShape)),
            ("B14 negative", set("shape", json!([-1, 256])), Reject(BadShape)),
            ("B14 one_dimension", set("shape", json!([4096])), Reject(BadShape)),
            ("B14 transposed", set("shape", json!([32, 128])), Reject(BadShape)),
            ("B15 orphan", orphan, Reject(Unexpected)),
            (
                "B16 not_declared",
                config(|config| drop(config.remove("quantization_config"))),
                Warn("no quantization_config"),
            ),
            (
                "B16 declared_as_8_bits",
                config(|config| {
                    config["quantization_config"] =
                        json!({"quant_method": "bitsandbytes", "load_in_8bit": true});
                }),
                Warn("tensors have 4 bits"),
            ),
        ],
    )
}

fn nested_cases() -> impl Iterator<Item = Case> {
    use Kind::*;
    let beyond = tensors(|tensors| {
        let map = tensors.get_mut(&format!("{MATRIX}.nested_quant_map")).expect("the map");
        map.bytes[..4].copy_from_slice(&(-1.5f32).to_le_bytes());
    });
    rows(
        Packing::Fp4Nested,
        vec![
            ("B07 no_nested_absmax", without(".nested_absmax"), Reject(Inconsistent)),
            ("B07 no_nested_map", without(".nested_quant_map"), Reject(Missing)),
            ("B07 nested_absmax_short", cut(".nested_absmax", 4), Reject(Inconsistent)),
            ("B07 nested_map_short", cut(".nested_quant_map", 4), Reject(Inconsistent)),
            ("B07 nested_map_beyond_1", beyond, Reject(OutOfRange)),
            ("B07 nested_blocksize_0", set("nested_blocksize", json!(0)), Reject(OutOfRange)),
            ("B07 nested_blocksize_32", set("nested_blocksize", json!(32)), Reject(Inconsistent)),
            ("B07 nested_offset", set("nested_offset", json!(null)), Reject(WrongType)),
            ("B07 nested_dtype", set("nested_dtype", json!("float16")), Reject(Unsupported)),
        ],
    )
}

fn int8_cases() -> impl Iterator<Item = Case> {
    use Kind::*;
    let part = |part: &str| format!("{}{part}", MATRIX.trim_end_matches("weight"));
    let (scales, format) = (part("SCB"), part("weight_format"));
    let first_scale = |x: f32| {
        let scales = part("SCB");
        tensors(move |t| t.get_mut(&scales).expect("scales").bytes[..4].copy_from_slice(&x.to_le_bytes()))
    };
    rows(
        Packing::Int8,
        vec![
            ("B12 no_scales", tensors(move |t| drop(t.remove(&scales).expect("scales"))), Reject(Missing)),
            ("B12 scale_nan", first_scale(f32::NAN), Reject(NotFinite)),
            // Times a code it is infinite.
            ("B12 scale_beyond_f32", first_scale(1e37), Reject(NotFinite)),
            (
                "B12 other_format",
                tensors(move |t| t.get_mut(&format).expect("a format").bytes[0] = 1),
                Reject(Unsupported),
            ),
        ],
    )
}
