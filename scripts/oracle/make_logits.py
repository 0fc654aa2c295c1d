#!/usr/bin/env python3
"""Golden logits from transformers in float32.

    python scripts/oracle/make_logits.py            (from the repository root; torch, transformers, numpy, tokenizers)

Writes tests/data/logits/: goldens.json (prompts, top-1 ids, max |logit| per position, configs, seeds, SHA-256 of the
random checkpoints) and one NAME.npy per model, i16 [n_tokens, vocab]: round(logit / max |logit| of that position * 32767).
"""
import hashlib
import json
import pathlib
import sys
import tempfile

import numpy as np
import tokenizers
import torch
import transformers

import random_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/data/logits"
TINY = ROOT / "tests/data/tiny-falcon-mamba"
TEXT = ROOT / "tests/data/texts/a-tale-of-two-cities-200000.txt"
STEP = 32767
# Of a dozen tried, those where the two best logits are furthest apart over the whole continuation. int8 activations cost
# about 0.03 rms, and every prompt found comes near that somewhere: "He opened the door and" (0.029) parts ways between
# llama.cpp's Q8_0 and ours, these three do not.
PROMPTS = ["The old man", "When I was a boy", "“I do not know,” said"]


def falcon(n_layer, **changes):
    """A config.json of falcon-mamba-7b's proportions, its wrong `expand` included."""
    config = dict(
        architectures=["FalconMambaForCausalLM"], model_type="falcon_mamba", torch_dtype="float32", hidden_size=256,
        intermediate_size=512, num_hidden_layers=n_layer, state_size=16, conv_kernel=4, time_step_rank=16,
        vocab_size=192, expand=16, hidden_act="silu", layer_norm_epsilon=1e-5, mixer_rms_eps=1e-6,
        residual_in_fp32=True, use_bias=False, use_conv_bias=True, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=11, pad_token_id=11)
    return config | changes


def mamba(n_layer, **changes):
    """A config.json as state-spaces publishes its models: tied head, no mixer_rms_eps."""
    config = falcon(n_layer, architectures=["MambaForCausalLM"], model_type="mamba", expand=2,
                    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    del config["mixer_rms_eps"]
    return config | changes


# name: (config, dtype, seed, std of x_proj, tokens). 3e-4 makes the mean squares of dt, B and C about 1e-5.
MODELS = {
    "falcon-1-layer": (falcon(1), "F32", 11, 3e-4, 300),
    "falcon-2-layers": (falcon(2, torch_dtype="bfloat16"), "BF16", 12, 3e-4, 300),
    "falcon-4-layers": (falcon(4, torch_dtype="float16"), "F16", 13, 3e-4, 300),
    "falcon-tiny-dev": (falcon(4, hidden_size=128, intermediate_size=256, state_size=8, time_step_rank=8),
                        "F32", 14, 5e-4, 100),
    "falcon3": (falcon(2, hidden_size=128, intermediate_size=256, mixer_rms_eps=1e-5, expand=2), "F32", 15, 5e-4, 100),
    "mamba": (mamba(2), "F32", 16, 0.05, 300),
}


def load(folder, falcon_norms):
    cls = transformers.FalconMambaForCausalLM if falcon_norms else transformers.MambaForCausalLM
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def mean_squares(model, ids):
    """Largest and smallest mean square that reaches the norms on dt, B and C."""
    seen = []
    hooks = [norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].pow(2).mean(-1)))
             for layer in model.backbone.layers
             for norm in (layer.mixer.dt_layernorm, layer.mixer.b_layernorm, layer.mixer.c_layernorm)]
    logits_of(model, ids)
    for hook in hooks:
        hook.remove()
    return float(torch.cat([s.flatten() for s in seen]).median())


def record(name, logits, ids):
    """The entry in goldens.json; writes the .npy beside it."""
    logits = logits.astype(np.float64)
    top = np.abs(logits).max(1)
    two = np.sort(logits, 1)[:, -2:]
    gap = float(((two[:, 1] - two[:, 0]) / top).min())
    assert gap > 4e-6, f"{name}: two logits nearly tie (gap {gap:.1e}): choose another seed"
    np.save(OUT / f"{name}.npy", np.round(logits / top[:, None] * STEP).astype(np.int16))
    return dict(tokens=ids, top1=logits.argmax(1).tolist(), max_abs=np.float32(top).tolist(), smallest_gap=gap)


def random_golden(name):
    config, dtype, seed, x_proj_std, n = MODELS[name]
    weights = random_model.tensors(config, seed, x_proj_std)
    shard = random_model.safetensors(weights, dtype)
    ids = random_model.prompt(seed, n, config["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        (pathlib.Path(folder) / "model.safetensors").write_bytes(shard)
        model = load(folder, "mixer_rms_eps" in config)
    entry = record(name, logits_of(model, ids), ids)
    if "mixer_rms_eps" in config:
        entry["median_mean_square"] = mean_squares(model, ids)
    print(f"{name}: gap {entry['smallest_gap']:.1e}, mean square {entry.get('median_mean_square')}", file=sys.stderr)
    entry |= dict(config=config, dtype=dtype, seed=seed, x_proj_std=x_proj_std,
                  sha256=hashlib.sha256(shard).hexdigest())
    return entry


def tiny_golden():
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids[:300]
    model = load(TINY, True)
    entry = record("tiny-falcon-mamba", logits_of(model, ids), ids)
    entry["greedy"] = []
    for text in PROMPTS:
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        out, gap = list(prompt), np.inf
        for _ in range(32):
            last = logits_of(model, out)[-1]
            two = np.sort(last)[-2:]
            gap = min(gap, float(two[1] - two[0]))
            out.append(int(last.argmax()))
        assert gap > 2e-2, f"{text}: greedy decoding nearly ties (gap {gap}): choose another prompt"
        entry["greedy"].append(dict(prompt=text, prompt_tokens=prompt, tokens=out[len(prompt):], smallest_gap=gap))
    return entry


def main():
    torch.manual_seed(0)
    goldens = dict(
        made_by="scripts/oracle/make_logits.py",
        versions={m.__name__: m.__version__ for m in (transformers, torch, tokenizers, np)},
        step=STEP,
        models={"tiny-falcon-mamba": tiny_golden()} | {name: random_golden(name) for name in MODELS},
    )
    (OUT / "goldens.json").write_text(json.dumps(goldens, indent=0, separators=(",", ":")).replace(",\n", ",") + "\n")


main()
