"""Random Mamba checkpoints that Python and Rust write byte for byte alike, so that no weights need storing.

Every weight is an integer from a counter-based generator, turned into a float by one IEEE multiplication and one
addition in float32; no library's idea of "normal" is involved. The Rust twin is tests/src/random_model.rs.
"""
import json
import math

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Standard deviation of the sum of four independent uniform 16-bit integers.
SUM_STD = math.sqrt(4 * (65536.0**2 - 1) / 12)


def fnv1a(text: str, seed: int) -> int:
    """64-bit FNV-1a of the name, from a seed-dependent start: each tensor has its own stream."""
    h = (0xCBF29CE484222325 ^ seed) & (2**64 - 1)
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & (2**64 - 1)
    return h


def integers(start: int, n: int) -> np.ndarray:
    """n integers in -131070..=131070, roughly normal: splitmix64 of start + i, its four 16-bit words summed."""
    with np.errstate(over="ignore"):
        z = np.uint64(start) + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    words = sum(((z >> np.uint64(s)) & np.uint64(0xFFFF)).astype(np.int64) for s in (0, 16, 32, 48))
    return words - 131070


def normal(name: str, seed: int, shape: list, mean, std: float) -> np.ndarray:
    """f32 weights; mean is a float or one float per column."""
    k = integers(fnv1a(name, seed), math.prod(shape)).astype(np.float32).reshape(shape)
    return np.asarray(mean, dtype=np.float32) + k * np.float32(std / SUM_STD)


def tensors(config: dict, seed: int, x_proj_std: float) -> dict:
    """Checkpoint name -> f32 array. dt, B and C come out small where x_proj_std is small."""
    d_model, d_inner = config["hidden_size"], config["intermediate_size"]
    d_state, dt_rank, vocab = config["state_size"], config["time_step_rank"], config["vocab_size"]
    out = {}

    def add(name, shape, mean, std):
        out[name] = normal(name, seed, shape, mean, std)

    tied = config["tie_word_embeddings"]
    # A tied head would see little but the last token's own embedding if the embeddings were not small.
    add("backbone.embeddings.weight", [vocab, d_model], 0.0, 0.06 if tied else 0.5)
    for i in range(config["num_hidden_layers"]):
        p = f"backbone.layers.{i}."
        add(p + "norm.weight", [d_model], 1.0, 0.1)
        add(p + "mixer.in_proj.weight", [2 * d_inner, d_model], 0.0, 1 / math.sqrt(d_model))
        add(p + "mixer.conv1d.weight", [d_inner, 1, config["conv_kernel"]], 0.0, 0.4)
        add(p + "mixer.conv1d.bias", [d_inner], 0.0, 0.1)
        add(p + "mixer.x_proj.weight", [dt_rank + 2 * d_state, d_inner], 0.0, x_proj_std)
        add(p + "mixer.dt_proj.weight", [d_inner, dt_rank], 0.0, 1 / math.sqrt(dt_rank))
        add(p + "mixer.dt_proj.bias", [d_inner], -4.0, 1.0)
        # -exp(A_log) from about -1.2 to about -16: the spread of the published initialisation.
        add(p + "mixer.A_log", [d_inner, d_state], [np.float32(0.175) * np.float32(j + 1) for j in range(d_state)], 0.05)
        add(p + "mixer.D", [d_inner], 1.0, 0.2)
        add(p + "mixer.out_proj.weight", [d_model, d_inner], 0.0, 1 / math.sqrt(d_inner))
    add("backbone.norm_f.weight", [d_model], 1.0, 0.1)
    if not tied:
        add("lm_head.weight", [vocab, d_model], 0.0, 2 / math.sqrt(d_model))
    return out


def to_bytes(x: np.ndarray, dtype: str) -> bytes:
    """Round to nearest even, little-endian."""
    if dtype == "F32":
        return x.astype("<f4").tobytes()
    if dtype == "F16":
        return x.astype("<f2").tobytes()
    assert dtype == "BF16", dtype
    bits = x.astype("<f4").view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def safetensors(tensors: dict, dtype: str) -> bytes:
    """One shard: names in byte order, the header padded with spaces to a multiple of eight bytes."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name in sorted(tensors):
        raw = to_bytes(tensors[name], dtype)
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def prompt(seed: int, n: int, vocab: int) -> list:
    """n token ids from the same generator."""
    return [int(k) % vocab for k in integers(fnv1a("prompt", seed), n)]
