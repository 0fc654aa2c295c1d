//! Small checkpoints in the layout of bitsandbytes, right or wrong. It shares no code with
//! `kestrel_formats::checkpoint`, and its numbers are such that the model runs.
#![allow(missing_docs)]

use crate::bad_input::SMALL;
use crate::safetensors::{Stored, Tensors};
use kestrel_formats::arch::{self, HyperParams, Role};
use serde_json::{Value, json};

/// Wide enough for blocks of 32 and 64 weights.
pub const HPARAMS: HyperParams = HyperParams { d_model: 32, d_inner: 64, n_layer: 1, ..SMALL };

/// The matrix that cases are about: 128 x 32.
pub const MATRIX: &str = "backbone.layers.0.mixer.in_proj.weight";

/// How the matrices are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Nf4,
    /// FP4 with quantized scales.
    Fp4Nested,
    Int8,
}

/// What the codes of NF4 and FP4 stand for, as the library's `functional.py` lists them.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    -0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

/// A tensor with one dimension.
fn list(dtype: &str, width: u64, bytes: Vec<u8>) -> Stored {
    Stored { dtype: dtype.to_owned(), shape: vec![bytes.len() as u64 / width], bytes }
}

pub fn f32_list(numbers: impl IntoIterator<Item = f32>) -> Stored {
    list("F32", 4, numbers.into_iter().flat_map(f32::to_le_bytes).collect())
}

pub fn u8_list(bytes: Vec<u8>) -> Stored {
    list("U8", 1, bytes)
}

/// Bytes of every value.
fn codes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 37 % 251) as u8).collect()
}

/// A sound checkpoint's tensors and config.json; in_proj and out_proj are packed.
pub fn sound(kind: Kind) -> (Tensors, Value) {
    sound_of(&HPARAMS, kind)
}

/// The same with these hyperparameters.
pub fn sound_of(h: &HyperParams, kind: Kind) -> (Tensors, Value) {
    let mut tensors = Tensors::new();
    for (spec, layer) in arch::tensors(h, false) {
        let name = spec.hf_name(layer);
        let shape: Vec<u64> = (spec.hf_shape)(h).iter().map(|&d| d as u64).collect();
        let n = shape.iter().product::<u64>() as usize;
        if matches!(spec.role, Role::SsmIn | Role::SsmOut) {
            pack(&mut tensors, &name, [shape[0], shape[1]], kind);
        } else {
            let spread = |i: usize| 0.1 * (((i * 7919) % 101) as f32 / 50.0 - 1.0);
            let norm = matches!(spec.role, Role::AttnNorm | Role::OutputNorm);
            let numbers = (0..n).map(|i| if norm { 1.0 } else { spread(i) });
            tensors.insert(name, Stored { shape, ..f32_list(numbers) });
        }
    }
    let mut config = config(h);
    config["quantization_config"] = json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != Kind::Int8, "load_in_8bit": kind == Kind::Int8,
    });
    (tensors, config)
}

fn pack(tensors: &mut Tensors, name: &str, [rows, cols]: [u64; 2], kind: Kind) {
    let n = (rows * cols) as usize;
    let scale = |i: usize| 0.05 + (i % 7) as f32 / 100.0;
    let mut put = |suffix: &str, t: Stored| tensors.insert(format!("{name}{suffix}"), t);
    if kind == Kind::Int8 {
        put("", Stored { dtype: "I8".to_owned(), shape: vec![rows, cols], bytes: codes(n) });
        let module = name.trim_end_matches(".weight");
        tensors.insert(format!("{module}.SCB"), f32_list((0..rows as usize).map(scale)));
        tensors.insert(format!("{module}.weight_format"), Stored { shape: vec![], ..u8_list(vec![0]) });
        return;
    }
    put("", Stored { shape: vec![n as u64 / 2, 1], ..u8_list(codes(n / 2)) });
    let blocks = n / 64;
    let mut state = json!({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [rows, cols]});
    if kind == Kind::Nf4 {
        put(".absmax", f32_list((0..blocks).map(scale)));
        put(".quant_map", f32_list(NF4));
    } else {
        state["quant_type"] = json!("fp4");
        put(".absmax", u8_list(codes(blocks)));
        put(".quant_map", f32_list(FP4));
        put(".nested_absmax", f32_list((0..blocks.div_ceil(256)).map(scale)));
        put(".nested_quant_map", f32_list((0..256).map(|i| i as f32 / 127.5 - 1.0)));
        for (key, value) in [
            ("nested_blocksize", json!(256)),
            ("nested_dtype", json!("float32")),
            ("nested_offset", json!(0.1)),
        ] {
            state[key] = value;
        }
    }
    let suffix = format!(".quant_state.bitsandbytes__{}", state["quant_type"].as_str().expect("a text"));
    put(&suffix, u8_list(state.to_string().into_bytes()));
}

/// config.json of an unquantized model.
pub fn config(h: &HyperParams) -> Value {
    json!({
        "architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "torch_dtype": "float16",
        "hidden_size": h.d_model, "intermediate_size": h.d_inner, "num_hidden_layers": h.n_layer,
        "state_size": h.d_state, "conv_kernel": h.d_conv, "time_step_rank": h.dt_rank,
        "vocab_size": h.vocab_size, "hidden_act": "silu", "layer_norm_epsilon": 1e-5, "mixer_rms_eps": 1e-6,
        "use_bias": false, "use_conv_bias": true, "tie_word_embeddings": false,
        "bos_token_id": 0, "eos_token_id": 11, "pad_token_id": 11,
    })
}
