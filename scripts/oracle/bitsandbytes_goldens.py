#!/usr/bin/env python3
"""What bitsandbytes makes of weights, and transformers' logits for them.

    python scripts/oracle/bitsandbytes_goldens.py      (from the repository root; torch, transformers, bitsandbytes)

Writes tests/data/bitsandbytes/:
- tensors.safetensors: one matrix per case, quantized, as the library saves it; what went in comes from random_model.py.
- tiny-KIND.safetensors: of a checkpoint of the tiny trained model that the library saved, the tensors that are not in
  tests/data/tiny-falcon-mamba unchanged. tiny-KIND.config.json is its config.json.
- small-KIND.safetensors and .config.json: whole checkpoints of a random model, for what the tiny ones leave out.
- goldens.json: seeds and digests of the library's own dequantization; logits of float32 models with those weights.
- KIND.npy: the logits, as in tests/data/logits.

The library's forward pass on the CPU is no oracle, see scripts/peers/bitsandbytes_peer.py.
"""
import hashlib
import json
import pathlib
import shutil
import sys
import tempfile

import bitsandbytes as bnb
import numpy as np
import safetensors
import safetensors.torch
import torch
import transformers

import random_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/data/bitsandbytes"
TINY = ROOT / "tests/data/tiny-falcon-mamba"
STEP = 32767
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORAGES = {"U8": torch.uint8, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# The tiny model, bf16 as it is, by BitsAndBytesConfig.
TINY_KINDS = {
    "tiny-nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "tiny-fp4-double": dict(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage="bfloat16"),
    "tiny-int8": dict(load_in_8bit=True),
}
# A random model: (dtype of the weights, BitsAndBytesConfig). In "head" lm_head is quantized and in_proj is skipped.
SMALL_KINDS = {
    "small-fp4-f16": ("F16", dict(load_in_4bit=True)),
    "small-nf4-double-f32": (
        "F32", dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                    bnb_4bit_quant_storage="float32")),
    "small-nf4-head": (
        "BF16", dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="float16",
                     llm_int8_skip_modules=["in_proj", "embeddings"])),
    "small-int8-f32": ("F32", dict(load_in_8bit=True)),
}
SMALL_CONFIG = dict(
    architectures=["FalconMambaForCausalLM"], model_type="falcon_mamba", torch_dtype="float32", hidden_size=64,
    intermediate_size=128, num_hidden_layers=2, state_size=8, conv_kernel=4, time_step_rank=8, vocab_size=96, expand=16,
    hidden_act="silu", layer_norm_epsilon=1e-5, mixer_rms_eps=1e-6, residual_in_fp32=True, use_bias=False,
    use_conv_bias=True, tie_word_embeddings=False, bos_token_id=0, eos_token_id=11, pad_token_id=11)


def cases():
    """(name, shape, dtype, blocksize, quant_type, nested, storage)"""
    for quant_type in ("nf4", "fp4"):
        for dtype in DTYPES:
            yield (f"{quant_type}-{dtype}", [32, 128], dtype, 64, quant_type, False, "U8")
            yield (f"{quant_type}-{dtype}-nested", [96, 256], dtype, 64, quant_type, True, "U8")
        for storage in ("F32", "F16", "BF16"):
            yield (f"{quant_type}-in-{storage}", [16, 128], "BF16", 64, quant_type, storage == "F16", storage)
        for blocksize in (32, 128, 256, 512, 1024, 2048, 4096):
            # Every row a multiple of the block, except that blocks of 2048 and 4096 are longer than a row, and that the
            # last block of 512 is cut short.
            shape = [9, 1024] if blocksize <= 1024 else [18, 512]
            yield (f"{quant_type}-block-{blocksize}", shape, "F32", blocksize, quant_type, False, "U8")
        # Rows that are no whole blocks; the last block is cut short.
        yield (f"{quant_type}-ragged", [25, 40], "F32", 64, quant_type, False, "U8")


def weights(name, shape, dtype):
    """Random, with a block of zeros and a large outlier."""
    x = random_model.normal(name, 1, shape, 0.0, 0.05)
    flat = x.reshape(-1)
    flat[64:128] = 0.0
    flat[300] = 1.5
    return torch.from_numpy(x).to(DTYPES[dtype])


def dequantized(packed, state, shape):
    """The library's dequantization. Its AVX-512 kernel takes the wrong scales where a block lies in two rows: there,
    its other implementation is called, on which its kernels for other processors agree."""
    if shape[1] % state.blocksize == 0:
        return bnb.functional.dequantize_4bit(packed, state)
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    code = bnb.functional.get_4bit_type(state.quant_type, device="cpu")
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    return _dequantize_4bit_compute(
        packed.view(torch.uint8).reshape(-1), absmax, code, state.blocksize, shape, state.dtype)


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def make_tensors():
    entries, tensors = [], {}
    for name, shape, dtype, blocksize, quant_type, nested, storage in cases():
        packed, state = bnb.functional.quantize_4bit(
            weights(name, shape, dtype), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type,
            quant_storage=STORAGES[storage])
        tensors[f"{name}.weight"] = packed
        tensors |= {f"{name}.weight.{part}": x.clone() for part, x in state.as_dict(packed=True).items()}
        entries.append(dict(name=name, shape=shape, dtype=dtype, blocksize=blocksize, quant_type=quant_type, nested=nested,
                            storage=storage, sha256=digest(dequantized(packed, state, shape))))
    for dtype in DTYPES:
        name, shape = f"int8-{dtype}", [24, 96]
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weights(name, shape, dtype).half())
        tensors |= {f"{name}.weight": codes, f"{name}.SCB": scales,
                    f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}
        plain = bnb.functional.int8_vectorwise_dequant(codes, scales)
        entries.append(dict(name=name, shape=shape, dtype=dtype, quant_type="int8", sha256=digest(plain)))
    safetensors.torch.save_file(tensors, OUT / "tensors.safetensors")
    return entries


def save(source, dtype, config, folder):
    """Loads with transformers + bitsandbytes and saves, before any forward pass."""
    config = transformers.BitsAndBytesConfig(**config)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=DTYPES[dtype], quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)


def float_model(folder):
    """A float32 model whose matrices are the library's dequantization of those in `folder`."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    plain, digests = {}, {}
    for name, module in loaded.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            plain[weight] = dequantized(module.weight.data, state, list(state.shape)).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            plain[weight] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        if weight in plain:
            digests[weight] = digest(plain[weight])
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    model = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**config)).float().eval()
    rest = {k: v.float() for k, v in loaded.state_dict().items()
            if k in model.state_dict() and k not in plain and v.dtype in DTYPES.values()}
    missing = model.load_state_dict(rest | plain, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    return model, digests


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy().astype(np.float64)


def record(kind, folder, ids):
    model, digests = float_model(folder)
    logits = logits_of(model, ids)
    top = np.abs(logits).max(1)
    np.save(OUT / f"{kind}.npy", np.round(logits / top[:, None] * STEP).astype(np.int16))
    shutil.copy(folder / "config.json", OUT / f"{kind}.config.json")
    print(kind, "max |logit|", top.max(), file=sys.stderr)
    return dict(tokens=ids, top1=logits.argmax(1).tolist(), max_abs=np.float32(top).tolist(), sha256=digests)


def tiny(kind, ids):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        save(TINY, "BF16", TINY_KINDS[kind], folder)
        source = {}
        for shard in TINY.glob("*.safetensors"):
            source |= safetensors.torch.load_file(shard)
        saved = safetensors.torch.load_file(folder / "model.safetensors")
        same = [k for k, v in saved.items()
                if k in source and v.dtype == source[k].dtype and torch.equal(v, source[k])]
        assert len(same) == 63 - 24, len(same)
        safetensors.torch.save_file({k: v for k, v in saved.items() if k not in same}, OUT / f"{kind}.safetensors")
        return record(kind, folder, ids)


def small(kind):
    dtype, config = SMALL_KINDS[kind]
    tensors = random_model.tensors(SMALL_CONFIG, 21, 2e-3)
    ids = random_model.prompt(21, 60, SMALL_CONFIG["vocab_size"])
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as folder:
        source, folder = pathlib.Path(source), pathlib.Path(folder)
        (source / "config.json").write_text(json.dumps(SMALL_CONFIG))
        (source / "model.safetensors").write_bytes(random_model.safetensors(tensors, dtype))
        save(source, dtype, config, folder)
        shutil.copy(folder / "model.safetensors", OUT / f"{kind}.safetensors")
        return record(kind, folder, ids)


def main():
    OUT.mkdir(exist_ok=True)
    torch.manual_seed(0)
    ids = json.loads((ROOT / "tests/data/logits/goldens.json").read_text())["models"]["tiny-falcon-mamba"]["tokens"][:48]
    goldens = dict(
        made_by="scripts/oracle/bitsandbytes_goldens.py",
        versions={m.__name__: m.__version__ for m in (bnb, transformers, torch, safetensors, np)},
        step=STEP,
        tensors=make_tensors(),
        models={kind: tiny(kind, ids) for kind in TINY_KINDS} | {kind: small(kind) for kind in SMALL_KINDS},
    )
    (OUT / "goldens.json").write_text(json.dumps(goldens, indent=0, separators=(",", ":")).replace(",\n", ",") + "\n")
    for path in OUT.iterdir():
        path.chmod(0o644)


main()
