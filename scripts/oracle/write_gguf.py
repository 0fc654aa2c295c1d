"""A GGUF file of a random model, written by the gguf package from what llama.cpp requires: independent of our converter."""
import math

import gguf
import numpy as np

# Checkpoint suffix -> GGUF suffix.
LAYER = {
    "norm.weight": "attn_norm.weight", "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight", "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight", "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias", "mixer.A_log": "ssm_a", "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
OUTER = {"backbone.embeddings.weight": "token_embd.weight", "backbone.norm_f.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}


def gguf_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, _, layer, suffix = name.split(".", 3)
    return f"blk.{layer}.{LAYER[suffix]}"


def write(path, config: dict, tensors: dict):
    """F32, no vocabulary. x_proj is scaled for the one eps that a GGUF file has (ARCHITECTURE.md, numerics)."""
    falcon = "mixer_rms_eps" in config
    w = gguf.GGUFWriter(path, "mamba")
    w.add_context_length(1 << 20)
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(0)
    w.add_head_count(0)
    w.add_block_count(config["num_hidden_layers"])
    w.add_ssm_conv_kernel(config["conv_kernel"])
    w.add_ssm_inner_size(config["intermediate_size"])
    w.add_ssm_state_size(config["state_size"])
    w.add_ssm_time_step_rank(config["time_step_rank"])
    w.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    w.add_ssm_dt_b_c_rms(falcon)
    w.add_vocab_size(config["vocab_size"])
    w.add_file_type(gguf.LlamaFileType.ALL_F32)
    w.add_tokenizer_model("no_vocab")
    for name, x in tensors.items():
        if name.endswith("A_log"):
            x = (-np.exp(x.astype(np.float64))).astype(np.float32)
        elif name.endswith("x_proj.weight") and falcon:
            x = x * np.float32(math.sqrt(config["layer_norm_epsilon"] / config["mixer_rms_eps"]))
        elif name.endswith("conv1d.weight"):
            x = x[:, 0, :]
        w.add_tensor(gguf_name(name), np.ascontiguousarray(x, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
