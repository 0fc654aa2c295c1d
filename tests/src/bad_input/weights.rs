//! Numbers that no sound model has. Loading does not read weights, so it is the commands that compute with them, and
//! `quantize` and `verify`, which look at each, that have to notice.

use super::*;
use crate::gguf_builder::model;
use kestrel_formats::arch::HyperParams;

/// A model wide enough for 32-element blocks.
pub(super) const WIDE: HyperParams = HyperParams { d_model: 32, d_inner: 64, ..SMALL };
/// And for 256-element blocks.
const WIDER: HyperParams = HyperParams { d_model: 256, d_inner: 512, ..SMALL };

/// A model one of whose F32 tensors has `x` at place `at`.
fn with_number(name: &str, at: usize, x: f32) -> GgufBuilder {
    let mut file = model(&SMALL);
    for t in &mut file.tensors {
        if t.name == name.as_bytes() {
            t.data[4 * at..4 * at + 4].copy_from_slice(&x.to_le_bytes());
        }
    }
    file
}

/// A model whose embedding's first blocks are these bytes, repeated to its end.
fn with_blocks(h: &HyperParams, ty: u32, block_len: u64, block: &[u8]) -> GgufBuilder {
    let ne = [h.d_model as u64, h.vocab_size as u64];
    let n_blocks = (ne[0] * ne[1] / block_len) as usize;
    let t = RawTensor::without_data("token_embd.weight", &ne, ty, (n_blocks * block.len()) as u64);
    model(h).replace(RawTensor { data: block.repeat(n_blocks), ..t })
}

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let w =
        |name: &str, file: GgufBuilder, action, expect| case(name, file, expect).group("weights").by(action);
    let nan = || with_number("blk.0.ssm_in.weight", 5, f32::NAN);
    let inf_a = || with_number("blk.1.ssm_a", 3, f32::NEG_INFINITY);
    let positive_a = || with_number("blk.1.ssm_a", 3, 0.25);
    let q4_0 = |d: u16| with_blocks(&WIDE, 2, 32, &[&d.to_le_bytes()[..], &[0x88; 16]].concat());
    let q8_0 = |d: u16| with_blocks(&WIDE, 8, 32, &[&d.to_le_bytes()[..], &[1; 32]].concat());
    let q4_k = |d: u16| with_blocks(&WIDER, 12, 256, &[&d.to_le_bytes()[..], &[0; 2], &[0x21; 140]].concat());
    let lying = || model(&WIDE).kv("general.file_type", Raw::u32(2));
    let (f16_nan, f16_inf, minus_0, denormal) = (0x7e00, 0x7c00, 0x8000, 0x0001);
    use Action::{Convert, Logits, Verify};
    vec![
        w("valid_weights", with_number("", 0, 0.0), Logits, Accept),
        w("valid_weights_verify", with_number("", 0, 0.0), Verify, Accept),
        w("G52 f32_nan_logits", nan(), Logits, Reject(Kind::NotFinite)),
        w("G52 f32_nan_quantize", nan(), Convert, Reject(Kind::NotFinite)),
        w("G52 f32_nan_verify", nan(), Verify, Reject(Kind::NotFinite)),
        w("G53 inf_ssm_a_quantize", inf_a(), Convert, Reject(Kind::NotFinite)),
        w("G53 inf_ssm_a_verify", inf_a(), Verify, Reject(Kind::NotFinite)),
        w("G54 positive_ssm_a_quantize", positive_a(), Convert, Reject(Kind::OutOfRange)),
        w("G54 positive_ssm_a_verify", positive_a(), Verify, Reject(Kind::OutOfRange)),
        w("G93 q4_0_scale_nan_logits", q4_0(f16_nan), Logits, Reject(Kind::NotFinite)),
        w("G93 q4_0_scale_nan_quantize", q4_0(f16_nan), Convert, Reject(Kind::NotFinite)),
        w("G93 q4_0_scale_nan_verify", q4_0(f16_nan), Verify, Reject(Kind::NotFinite)),
        w("G105 file_type_lies", lying(), Logits, Warn("general.file_type")),
        w("G106 q4_k_scale_inf_quantize", q4_k(f16_inf), Convert, Reject(Kind::NotFinite)),
        w("G106 q4_k_scale_inf_verify", q4_k(f16_inf), Verify, Reject(Kind::NotFinite)),
        w("G107 q8_0_scale_minus_0", q8_0(minus_0), Logits, Accept),
        w("G107 q8_0_scale_denormal", q8_0(denormal), Logits, Accept),
        w("G107 q8_0_scale_denormal_quantize", q8_0(denormal), Convert, Warn("quantized already")),
    ]
}
