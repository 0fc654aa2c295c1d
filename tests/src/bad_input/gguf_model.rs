//! Sound containers whose content makes no model.

use super::*;
use crate::gguf_builder::model;
use kestrel_formats::arch::{Arch, HyperParams};

/// A model of 15 kB.
pub const SMALL: HyperParams = HyperParams {
    arch: Arch::FalconMamba,
    d_model: 8,
    d_inner: 16,
    d_state: 2,
    d_conv: 4,
    dt_rank: 2,
    n_layer: 2,
    vocab_size: 16,
    layer_norm_epsilon: 1e-5,
    mixer_rms_eps: 1e-5,
};

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = hyperparameter_cases();
    cases.extend(model_tensor_cases());
    cases
}

fn model_case(name: &str, file: GgufBuilder, expect: Expect) -> Case {
    case(name, file, expect).group("model").by(Action::Logits)
}

/// Metadata that describes no model.
fn hyperparameter_cases() -> Vec<Case> {
    let valid = || model(&SMALL);
    let set = |key: &str, value| valid().set(key, value);
    let eps = |x| set("mamba.attention.layer_norm_rms_epsilon", Raw::f32(x));
    let layers = |x| set("mamba.block_count", Raw::u32(x));
    vec![
        model_case("valid_model", valid(), Accept),
        model_case(
            "G32 align_1_in_a_model",
            GgufBuilder { alignment: 1, ..valid() }.kv("general.alignment", Raw::u32(1)),
            Accept,
        ),
        model_case("G55 arch_missing", valid().unset("general.architecture"), Reject(Kind::Missing)),
        model_case(
            "G56 arch_unknown",
            set("general.architecture", Raw::str(b"llama")),
            Reject(Kind::Unsupported),
        ),
        model_case("G57 arch_wrong_type", set("general.architecture", Raw::u32(1)), Reject(Kind::WrongType)),
        model_case("G58 block_count_0", layers(0), Reject(Kind::OutOfRange)),
        model_case("G59 block_count_513", layers(513), Reject(Kind::Missing)),
        model_case("G59 block_count_513_with_tensors", model(&HyperParams { n_layer: 513, ..SMALL }), Accept),
        model_case("G59 block_count_1025", layers(1025), Reject(Kind::OutOfRange)),
        model_case("G60 block_count_max", layers(u32::MAX), Reject(Kind::OutOfRange)),
        model_case("G60 block_count_missing", valid().unset("mamba.block_count"), Reject(Kind::Missing)),
        model_case(
            "G60 block_count_negative",
            set("mamba.block_count", Raw::i32(-1)),
            Reject(Kind::OutOfRange),
        ),
        model_case("G60 block_count_u16", set("mamba.block_count", Raw::u16(2)), Accept),
        model_case("G61 block_count_str", set("mamba.block_count", Raw::str(b"2")), Reject(Kind::WrongType)),
        model_case("G63 d_state_0", set("mamba.ssm.state_size", Raw::u32(0)), Reject(Kind::OutOfRange)),
        model_case("G63 d_state_1024", model(&HyperParams { d_state: 1024, ..SMALL }), Accept),
        model_case(
            "G63 d_state_1025",
            model(&HyperParams { d_state: 1025, ..SMALL }),
            Reject(Kind::OutOfRange),
        ),
        model_case("G64 d_conv_0", set("mamba.ssm.conv_kernel", Raw::u32(0)), Reject(Kind::OutOfRange)),
        model_case("G64 d_conv_1", model(&HyperParams { d_conv: 1, ..SMALL }), Reject(Kind::OutOfRange)),
        model_case("G65 d_conv_64", model(&HyperParams { d_conv: 64, ..SMALL }), Accept),
        model_case("G65 d_conv_65", model(&HyperParams { d_conv: 65, ..SMALL }), Reject(Kind::OutOfRange)),
        model_case(
            "G65 d_conv_max",
            set("mamba.ssm.conv_kernel", Raw::u32(u32::MAX)),
            Reject(Kind::OutOfRange),
        ),
        model_case(
            "G66 inner_max",
            set("mamba.ssm.inner_size", Raw::u32(u32::MAX)),
            Reject(Kind::OutOfRange),
        ),
        model_case("G67 n_embd_0", set("mamba.embedding_length", Raw::u32(0)), Reject(Kind::OutOfRange)),
        model_case("G68 eps_nan", eps(f32::NAN), Reject(Kind::OutOfRange)),
        model_case("G68 eps_inf", eps(f32::INFINITY), Reject(Kind::OutOfRange)),
        model_case("G68 eps_0", eps(0.0), Reject(Kind::OutOfRange)),
        model_case("G69 eps_neg", eps(-1.0), Reject(Kind::OutOfRange)),
        model_case(
            "G69 eps_missing",
            valid().unset("mamba.attention.layer_norm_rms_epsilon"),
            Reject(Kind::Missing),
        ),
        model_case("G70 ctx_0", set("mamba.context_length", Raw::u32(0)), Warn("mamba.context_length is 0")),
        model_case("G103 dt_rank_0", set("mamba.ssm.time_step_rank", Raw::u32(0)), Reject(Kind::OutOfRange)),
        model_case(
            "vocab_size_differs",
            valid().kv("mamba.vocab_size", Raw::u32(17)),
            Reject(Kind::Inconsistent),
        ),
        model_case("vocab_size_agrees", valid().kv("mamba.vocab_size", Raw::u32(16)), Accept),
        model_case("dt_b_c_rms_u32", set("mamba.ssm.dt_b_c_rms", Raw::u32(1)), Reject(Kind::WrongType)),
        model_case(
            "G104 dt_b_c_rms_missing",
            valid().unset("mamba.ssm.dt_b_c_rms").kv("tokenizer.ggml.pre", Raw::str(b"falcon")),
            Warn("mamba.ssm.dt_b_c_rms"),
        ),
    ]
}

/// Tensors that make no model.
fn model_tensor_cases() -> Vec<Case> {
    let valid = || model(&SMALL);
    let f32 = |name: &str, ne: &[u64]| valid().replace(RawTensor::f32(name, ne));
    let extra = |name: &str| valid().tensor(RawTensor::f32(name, &[8]));
    let q4_0_norm =
        RawTensor { data: vec![0; 18], ..RawTensor::without_data("blk.1.attn_norm.weight", &[32], 2, 18) };
    let f16_norm =
        RawTensor { data: vec![0; 16], ..RawTensor::without_data("blk.1.attn_norm.weight", &[8], 1, 16) };
    let f16_matrix =
        RawTensor { data: vec![0; 256], ..RawTensor::without_data("output.weight", &[8, 16], 1, 256) };
    let wide = HyperParams { d_model: 32, d_inner: 64, ..SMALL };
    vec![
        model_case("G40 ne_zero_in_a_model", f32("blk.0.ssm_d", &[0]), Reject(Kind::BadShape)),
        model_case("G40 empty_vocabulary", f32("token_embd.weight", &[8, 0]), Reject(Kind::BadShape)),
        model_case("G62 no_embedding", valid().without("token_embd.weight"), Reject(Kind::Missing)),
        model_case("G62 missing_tensors", without_a_layer(), RejectWith(Kind::Missing, FIRST_THREE)),
        model_case("G90 missing_ssm_a", valid().without("blk.0.ssm_a"), Reject(Kind::Missing)),
        model_case("G90 tied", valid().without("output.weight"), Accept),
        model_case("G91 wrong_shape", f32("blk.1.ssm_a", &[2, 15]), Reject(Kind::BadShape)),
        model_case("G91 transposed", f32("blk.1.ssm_out.weight", &[8, 16]), Reject(Kind::BadShape)),
        model_case(
            "G91 one_more_dimension",
            f32("blk.1.ssm_conv1d.weight", &[4, 1, 16]),
            Reject(Kind::BadShape),
        ),
        model_case("G92 q4_0_norm", model(&wide).replace(q4_0_norm), Reject(Kind::WrongType)),
        model_case("G92 f16_norm", valid().replace(f16_norm), Reject(Kind::WrongType)),
        model_case("f16_matrix", valid().replace(f16_matrix), Accept),
        model_case(
            "G94 extra_tensor",
            extra("rope_freqs.weight"),
            Warn("1 tensors that this architecture does not have"),
        ),
        model_case("G94 extra_tensor_in_layer", extra("blk.1.ffn_up.weight"), Warn("blk.1.ffn_up.weight")),
        model_case("G95 layer_99999999999", extra("blk.99999999999.ssm_d"), Reject(Kind::OutOfRange)),
        model_case("G95 layer_2p64", extra("blk.18446744073709551616.ssm_d"), Reject(Kind::OutOfRange)),
        model_case("G95 layer_n", extra("blk.2.attn_norm.weight"), Reject(Kind::OutOfRange)),
        model_case("G95 layer_00", extra("blk.00.attn_norm.weight"), Reject(Kind::OutOfRange)),
        model_case("G95 layer_minus_1", extra("blk.-1.attn_norm.weight"), Reject(Kind::OutOfRange)),
        model_case(
            "G103 dt_rank",
            valid().set("mamba.ssm.time_step_rank", Raw::u32(3)),
            Reject(Kind::BadShape),
        ),
    ]
}

/// What the error about [`without_a_layer`] names.
const FIRST_THREE: &str = "blk.1.attn_norm.weight, blk.1.ssm_in.weight, blk.1.ssm_conv1d.weight, ...";

fn without_a_layer() -> GgufBuilder {
    let mut file = model(&SMALL);
    file.tensors.retain(|t| !t.name.starts_with(b"blk.1."));
    file
}
