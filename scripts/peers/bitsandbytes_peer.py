#!/usr/bin/env python3
"""Checkpoints that we wrote in transformers + bitsandbytes, and what the library's own CPU forward makes of a prompt.

    python scripts/peers/bitsandbytes_peer.py target/release/kestrel     (torch, transformers, bitsandbytes, numpy)

1. Every kind of checkpoint that `kestrel convert --type bnb-*` writes is loaded with from_pretrained. A float32 model
   with the library's dequantization of its matrices has the logits that `kestrel logits --precise` prints, within 2e-4
   of max |logit|. For NF4 and FP4 without quantized scales, codes and scales are the library's byte for byte.
2. The library's forward pass on the CPU beside the same model in float32 with the same weights: all tokens at once and
   one by one; and our own figure.

Heavy for CI; the last run is recorded in scripts/peers/bitsandbytes.txt.
"""
import logging
import pathlib
import subprocess
import sys
import tempfile

import bitsandbytes as bnb
import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/data/tiny-falcon-mamba"
KESTREL = pathlib.Path(sys.argv[1]).resolve()
TOKENS = list(range(100, 1060, 20))
KINDS = {
    "bnb-nf4": [], "bnb-nf4 double": ["--double-quant", "--compute-dtype", "bfloat16"], "bnb-nf4 block 256": ["--blocksize", "256"],
    "bnb-fp4": [], "bnb-fp4 double": ["--double-quant"], "bnb-int8": [],
}


def kestrel(*args):
    subprocess.run([KESTREL, *map(str, args)], check=True, stderr=subprocess.DEVNULL)


def ours(folder, *options):
    with tempfile.TemporaryDirectory() as out:
        out = pathlib.Path(out) / "logits.npy"
        kestrel("logits", folder, "--tokens", ",".join(map(str, TOKENS)), "-o", out, *options)
        return np.load(out).astype(np.float64)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()


def float_model(folder):
    """As `folder`, but float32, its matrices dequantized by the library."""
    loaded, plain = load(folder), {}
    for name, module in loaded.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            plain[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            plain[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    assert len(plain) == 24, len(plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    missing = model.load_state_dict(plain, strict=False)
    assert not missing.unexpected_keys, missing
    return model


def whole(model):
    with torch.no_grad():
        return model(torch.tensor([TOKENS]), use_cache=False).logits[0].float().numpy().astype(np.float64)


def one_by_one(model):
    """Logits after every token, each fed alone with the cache of those before."""
    rows, cache = [], None
    with torch.no_grad():
        for token in TOKENS:
            out = model(torch.tensor([[token]]), use_cache=True, cache=cache)
            cache = out.cache
            rows.append(out.logits[0, -1].float().numpy())
    return np.array(rows, np.float64)


def off(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def library_bytes(folder, kind):
    """The library quantizes the same weights to the same codes and scales."""
    quant_type = kind.split()[0].removeprefix("bnb-")
    loaded = load(folder)
    source = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    n = 0
    for name, module in loaded.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            codes, theirs = bnb.functional.quantize_4bit(
                source.get_parameter(f"{name}.weight").data, blocksize=state.blocksize, quant_type=quant_type)
            assert torch.equal(codes, module.weight.data) and torch.equal(theirs.absmax, state.absmax), name
            n += 1
    assert n == 24, n
    return n


def main():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line per product
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"bitsandbytes {bnb.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
          f"{torch.backends.cpu.get_cpu_capability()}")
    for kind, options in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder) / "model"
            kestrel("convert", TINY, "-o", folder, "--type", kind.split()[0], *options)
            reference = whole(float_model(folder))
            ours_off = off(ours(folder, "--precise"), reference)
            assert ours_off < 2e-4, (kind, ours_off)
            same = "" if "double" in kind or "int8" in kind else f", {library_bytes(folder, kind)} matrices byte for byte"
            print(f"{kind:18} loaded{same}; of max |logit|: kestrel --precise {ours_off:.1e}, "
                  f"kestrel {off(ours(folder), reference):.1e}, library {off(whole(load(folder)), reference):.1e} "
                  f"all tokens at once, {off(one_by_one(load(folder)), reference):.1e} one by one", flush=True)


main()
