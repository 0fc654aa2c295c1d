#!/usr/bin/env python3
"""Golden data of ggml's own block codecs, called through ctypes out of llama-cpp-python's libggml-base.

    python scripts/oracle/ggml_codecs.py            (from the repository root; llama-cpp-python, numpy)

Writes tests/data/codecs/: NAME.quantized (what ggml's reference quantizer makes of the seeded inputs), goldens.json
(hashes of dequantized numbers and of 16-bit conversions, ggml's errors) and README.md. Inputs are not stored: both sides
make them with the generator below, whose arithmetic is exact.
"""
import ctypes
import json
import pathlib

import llama_cpp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/data/codecs"
TINY = ROOT / "tests/data/tiny-falcon-mamba"
LIB = ctypes.CDLL(str(pathlib.Path(llama_cpp.__file__).parent / "lib/libggml-base.so"))

# ggml id, weights and bytes of a block
TYPES = {"Q8_0": (8, 32, 34), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
         "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
         "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136)}
EXACT = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
KINDS = ["normal", "heavy", "ties", "positive"]
N_QUANTIZED = 1024
N_ERRORS = 65536
N_RANDOM_BLOCKS = 512
IMPORTANCE_COLS = 256
TENSORS = ["backbone.layers.0.mixer.in_proj.weight", "backbone.layers.1.mixer.x_proj.weight",
           "backbone.layers.2.mixer.dt_proj.weight", "backbone.layers.3.mixer.out_proj.weight",
           "lm_head.weight"]


def splitmix64(seed, n):
    """The first n outputs of splitmix64."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def weights(kind, n):
    """Seeded weights. normal: the sum of four 16-bit numbers, centred, over 2^22. heavy: that times 2^k, k the trailing
    zeros of a further number, at most 7. ties: multiples of 1/4 in -2..=2. positive: normal + 1/16."""
    u = splitmix64(KINDS.index(kind) + 1, n)
    fields = sum(((u >> np.uint64(16 * k)) & np.uint64(0xFFFF)).astype(np.int64) for k in range(4))
    normal = (fields - 131070).astype(np.float32) / np.float32(2**22)
    if kind == "heavy":
        v = splitmix64(100, n) | np.uint64(128)
        zeros = np.log2((v & (~v + np.uint64(1))).astype(np.float64)).astype(np.int32)
        return np.ldexp(normal, zeros).astype(np.float32)
    if kind == "ties":
        return ((u % np.uint64(17)).astype(np.float32) - np.float32(8)) / np.float32(4)
    return normal + np.float32(1 / 16) if kind == "positive" else normal


def importance(n):
    """Seeded column weights: a 16-bit number plus one, over 2^16, and 16 times that in every sixteenth column or so."""
    u = splitmix64(7, n)
    base = ((u & np.uint64(0xFFFF)).astype(np.float32) + np.float32(1)) / np.float32(65536)
    return np.where((u >> np.uint64(60)) == 0, base * np.float32(16), base).astype(np.float32)


def random_bytes(seed, n):
    return splitmix64(seed, -(-n // 8)).view(np.uint8)[:n].copy()


def fnv1a(words):
    """64-bit FNV-1a over words instead of bytes, with every NaN as 0x7fc00000."""
    h = 0xCBF29CE484222325
    for w in words.tolist():
        h = ((h ^ w) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def hash_floats(x):
    return fnv1a(np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32)))


def pointer(x):
    return x.ctypes.data_as(ctypes.c_void_p)


def call(name, src, dst, n):
    getattr(LIB, name)(pointer(src), pointer(dst), ctypes.c_int64(n))
    return dst


def c_name(ty):
    return ty.lower().replace("_k", "_K")


def dequantize(ty, blocks):
    _, block_len, block_bytes = TYPES[ty]
    n = blocks.size // block_bytes * block_len
    return call(f"dequantize_row_{c_name(ty)}", blocks, np.zeros(n, np.float32), n)


def quantize_ref(ty, x):
    _, block_len, block_bytes = TYPES[ty]
    return call(f"quantize_row_{c_name(ty)}_ref", x, np.zeros(x.size // block_len * block_bytes, np.uint8), x.size)


def quantize_chunk(ty, x, cols, imp):
    ident, block_len, block_bytes = TYPES[ty]
    out = np.zeros(x.size // block_len * block_bytes, np.uint8)
    LIB.ggml_quantize_chunk(ctypes.c_int(ident), pointer(x), pointer(out), ctypes.c_int64(0),
                            ctypes.c_int64(x.size // cols), ctypes.c_int64(cols),
                            None if imp is None else pointer(imp))
    return out


def error_weights(ty, x, cols, imp):
    """The weight of each squared error as ggml's search has it. (For Q2_K ggml minimises absolute errors.)"""
    x = x.astype(np.float64)
    mean_square = lambda n: np.repeat((x * x).reshape(-1, n).mean(1), n)
    if imp is None:
        if ty in ("Q4_K", "Q5_K"):
            return np.sqrt(mean_square(32)) + abs(x)
        return abs(x) if ty == "Q2_K" else x * x
    q = np.tile(imp.astype(np.float64), x.size // cols)
    if ty == "Q6_K":
        return q
    sigma2 = mean_square(cols if TYPES[ty][1] == 32 else 256) * (1 if TYPES[ty][1] == 32 or ty == "Q2_K" else 2)
    return q * np.sqrt(sigma2 + x * x)


def errors(ty, x, imp):
    candidates = [quantize_chunk(ty, x, IMPORTANCE_COLS, imp)]
    if imp is None:
        candidates.append(quantize_ref(ty, x))
    w = error_weights(ty, x, IMPORTANCE_COLS, imp)
    squared = [(dequantize(ty, c).astype(np.float64) - x) ** 2 for c in candidates]
    return {"weighted": min(float((w * e).sum()) for e in squared), "plain": min(float(e.sum()) for e in squared)}


def tiny_tensors():
    for name in TENSORS:
        for shard in sorted(TINY.glob("*.safetensors")):
            raw = shard.read_bytes()
            header_len = int.from_bytes(raw[:8], "little")
            entry = json.loads(raw[8:8 + header_len]).get(name)
            if entry:
                start, end = (8 + header_len + o for o in entry["data_offsets"])
                bits = np.frombuffer(raw[start:end], np.uint16).astype(np.uint32) << 16
                yield name, bits.view(np.float32)


def sixteen_bit(name):
    """Hashes of all 65536 numbers of a 16-bit type expanded, and of a million bit patterns rounded to it."""
    every = np.arange(65536, dtype=np.uint16)
    wide = call(f"ggml_{name}_to_fp32_row", every, np.zeros(65536, np.float32), 65536)
    patterns = random_bytes(9, 4 << 20).view(np.float32)
    narrow = call(f"ggml_fp32_to_{name}_row" + ("_ref" if name == "bf16" else ""), patterns,
                  np.zeros(patterns.size, np.uint16), patterns.size)
    return {"expanded": hash_floats(wide), "rounded": fnv1a(narrow)}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    goldens = {"dequantized": {}, "errors": {}, "sixteen_bit": {n: sixteen_bit(n) for n in ("fp16", "bf16")}}
    for i, (ty, (_, _, block_bytes)) in enumerate(TYPES.items()):
        quantized = np.concatenate([quantize_ref(ty, weights(kind, N_QUANTIZED)) for kind in KINDS])
        (OUT / f"{ty.lower()}.quantized").write_bytes(quantized.tobytes())
        random = random_bytes(1000 + i, N_RANDOM_BLOCKS * block_bytes)
        goldens["dequantized"][ty] = {
            "random": hash_floats(dequantize(ty, random)), "quantized": hash_floats(dequantize(ty, quantized)),
            "first": [float(v) for v in dequantize(ty, quantized)[:32]]}
    sources = [(kind, weights(kind, N_ERRORS)) for kind in ("normal", "heavy")] + list(tiny_tensors())
    for ty in TYPES:
        for name, x in sources:
            entry = goldens["errors"].setdefault(name, {}).setdefault(ty, {})
            entry["none"] = errors(ty, x, None)
            entry["importance"] = errors(ty, x, importance(IMPORTANCE_COLS))
    (OUT / "goldens.json").write_text(json.dumps(goldens, indent=1) + "\n")
    (OUT / "README.md").write_text(
        f"Made by `python scripts/oracle/ggml_codecs.py` with llama-cpp-python {llama_cpp.__version__} "
        f"(its libggml-base) and numpy {np.__version__}; the script says what each file holds.\n")


main()
