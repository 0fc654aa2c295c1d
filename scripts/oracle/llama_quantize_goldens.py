#!/usr/bin/env python3
"""Files that llama.cpp's own quantizer writes, with llama.cpp's own logits for them, and the tensor types that it picks.

    python scripts/oracle/llama_quantize_goldens.py        (from the repository root; llama-cpp-python, gguf, numpy)

Writes tests/data/llama_cpp/: mixed-N.gguf (a random one-layer Falcon Mamba; together they hold every type, in every
place where a type can stand), goldens.json (tokens and what made them), mixed-N.logits.npy (f32 [n_tokens, vocab]) and
tensor_types.json (for three shapes and every file type, the type of each quantized tensor).
"""
import ctypes
import json
import pathlib
import tempfile

import gguf
import llama_cpp
import numpy as np

import random_model
import write_gguf

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/data/llama_cpp"
FTYPES = dict(f32=0, f16=1, bf16=32, q8_0=7, q4_0=2, q4_1=3, q5_0=8, q5_1=9, q2_k=10, q3_k_s=11, q3_k_m=12, q3_k_l=13,
              q4_k_s=14, q4_k_m=15, q5_k_s=16, q5_k_m=17, q6_k=18, iq4_nl=25, iq4_xs=30)
PLACES = ["ssm_in", "ssm_out", "ssm_x", "ssm_dt", "token_embd", "output.weight"]
# Rows of ssm_dt are 32 long here, so only types with blocks of 32, or none, can stand there.
MIXED = {
    "mixed-1": ["Q4_0", "Q5_0", "Q4_1", "Q5_1", "Q8_0", "IQ4_NL"],
    "mixed-2": ["Q2_K", "Q4_K", "Q3_K", "IQ4_NL", "Q5_K", "Q6_K"],
    "mixed-3": ["IQ4_XS", "Q6_K", "Q5_K", "Q8_0", "BF16", "F16"],
    "mixed-4": ["Q5_1", "Q8_0", "BF16", "F16", "Q4_1", "Q4_K"],
}


def config(**changes):
    return dict(num_hidden_layers=1, hidden_size=256, intermediate_size=512, state_size=16, conv_kernel=4,
                time_step_rank=32, vocab_size=64, layer_norm_epsilon=1e-5, mixer_rms_eps=1e-6,
                tie_word_embeddings=False) | changes


SHAPES = {
    "rows divisible by 256": config(time_step_rank=256),
    "falcon-mamba-tiny-dev": config(hidden_size=128, intermediate_size=256, state_size=8, time_step_rank=8),
    "tied": config(tie_word_embeddings=True),
}
SEED, X_PROJ_STD, N_TOKENS = 21, 3e-4, 24


def quantize(source, target, ftype, overrides=()):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 2
    table = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
    for row, (pattern, name) in zip(table, overrides):
        row.pattern, row.type = pattern.encode(), int(gguf.GGMLQuantizationType[name])
    params.tt_overrides = table
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert status == 0, (target, status)


def logits(path, tokens):
    """One batch through llama.cpp on the CPU, weights as the file has them (no repacking)."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, path
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch, params.n_outputs_max = 512, 2, 2, 512
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    out = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), n_vocab)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return out


def types_of(path):
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: t.tensor_type.name for t in tensors if t.tensor_type.name != "F32"}


def main():
    @llama_cpp.llama_log_callback
    def quiet(*_):
        pass
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    OUT.mkdir(exist_ok=True)
    tokens = random_model.prompt(SEED, N_TOKENS, 64)
    with tempfile.TemporaryDirectory() as folder:
        f32 = pathlib.Path(folder) / "f32.gguf"
        cfg = config()
        write_gguf.write(f32, cfg, random_model.tensors(cfg, SEED, X_PROJ_STD))
        np.save(OUT / "f32.logits.npy", logits(f32, tokens))
        for name, types in MIXED.items():
            target = OUT / f"{name}.gguf"
            quantize(f32, target, FTYPES["q8_0"], [(f"{p}", t) for p, t in zip(PLACES, types)])
            got = types_of(target)
            wanted = dict(zip(["blk.0.ssm_in.weight", "blk.0.ssm_out.weight", "blk.0.ssm_x.weight",
                               "blk.0.ssm_dt.weight", "token_embd.weight", "output.weight"], types))
            assert got == wanted, (name, got, wanted)
            np.save(OUT / f"{name}.logits.npy", logits(target, tokens))
        picked = {}
        for shape, cfg in SHAPES.items():
            write_gguf.write(f32, cfg, random_model.tensors(cfg, SEED, X_PROJ_STD))
            picked[shape] = dict(config=cfg, types={})
            for ftype, number in FTYPES.items():
                target = pathlib.Path(folder) / "out.gguf"
                quantize(f32, target, number)
                picked[shape]["types"][ftype] = types_of(target)
    made_by = {"made_by": "scripts/oracle/llama_quantize_goldens.py", "llama_cpp_python": llama_cpp.__version__,
               "system": llama_cpp.llama_print_system_info().decode(), "gguf": "0.19.0"}
    (OUT / "tensor_types.json").write_text(json.dumps(made_by | {"shapes": picked}, indent=1) + "\n")
    (OUT / "goldens.json").write_text(json.dumps(
        made_by | dict(config=config(), seed=SEED, x_proj_std=X_PROJ_STD, tokens=tokens, files=MIXED), indent=1) + "\n")


main()
