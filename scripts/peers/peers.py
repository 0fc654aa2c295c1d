#!/usr/bin/env python3
"""Every type that we write, read by llama.cpp (xllamacpp), the gguf package, gguf-rs and candle-core.
Started by scripts/peers/run.

llama.cpp loads each file and its greedy continuation of three prompts equals ours for F32 and Q8_0 over 32 tokens; the
gguf package dequantizes each tensor to the same values, bit for bit, also where gguf-rs says that it lies;
so does candle-core, but for the types that it does not know.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import xllamacpp

import gguf_rs

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN, PEERS = (pathlib.Path(a).resolve() for a in sys.argv[1:])
TINY = ROOT / "tests/data/tiny-falcon-mamba"
TYPES = ("f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl "
         "iq4_xs").split()
NOT_IN_CANDLE = ("iq4_nl", "iq4_xs")
SAME_TEXT = ("f32", "q8_0")
GREEDY = json.loads((ROOT / "tests/data/logits/goldens.json").read_text())["models"]["tiny-falcon-mamba"]["greedy"]


def kestrel(*args) -> str:
    done = subprocess.run([BIN / "kestrel", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, (args, done.stderr)
    return done.stdout


def ours(path, prompt) -> str:
    return kestrel("run", path, "-p", prompt, "-n", 32, "--temp", 0)


def llama_cpp(path) -> list:
    """32 greedy tokens after each prompt, as text."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.warmup = False
    server = xllamacpp.Server(params)
    texts = []
    for g in GREEDY:
        answer = server.handle_completions(dict(
            prompt=g["prompt_tokens"], max_tokens=32, n_predict=32, temperature=0.0, cache_prompt=False))
        texts.append(answer["choices"][0]["text"])
    del server
    return texts


def check_dequantized(path, folder) -> pathlib.Path:
    """Returns the folder with our values."""
    out = pathlib.Path(folder) / "dequantized"
    out.mkdir(exist_ok=True)
    subprocess.run([BIN / "examples/dequantize", path, out], check=True)
    tensors = gguf.GGUFReader(path).tensors
    assert len(tensors) == 63, len(tensors)
    for t in tensors:
        theirs = gguf.quants.dequantize(t.data, t.tensor_type).astype("<f4").reshape(-1)
        mine = np.fromfile(out / f"{t.name}.f32", "<f4")
        assert theirs.size == mine.size, t.name
        assert (theirs.view(np.uint32) == mine.view(np.uint32)).all(), f"{path.name}: {t.name} ({t.tensor_type.name})"
    return out


def check_candle(path, folder, ours):
    """candle-core's values are ours, of which `ours` is the folder."""
    out = pathlib.Path(folder) / "candle"
    out.mkdir(exist_ok=True)
    subprocess.run([PEERS / "kestrel-peer-candle", "dequantize", path, out], check=True)
    names = sorted(f.name for f in out.iterdir())
    assert names == sorted(f.name for f in ours.iterdir()) and len(names) == 63, names
    for name in names:
        assert (out / name).read_bytes() == (ours / name).read_bytes(), f"{path.name}: {name}"


def main():
    failures, types = [], set()
    with tempfile.TemporaryDirectory() as folder:
        for kind in TYPES:
            path = pathlib.Path(folder) / f"{kind}.gguf"
            kestrel("convert", TINY, "-o", path, "--type", kind)
            dequantized = check_dequantized(path, folder)
            inspected = json.loads(kestrel("inspect", "--json", path))
            types |= gguf_rs.check(PEERS / "kestrel-peer-gguf-rs", path, inspected, dequantized)
            if kind not in NOT_IN_CANDLE:
                check_candle(path, folder, dequantized)
            theirs = llama_cpp(path)
            assert len(theirs) == 3 and all(theirs), (kind, theirs)
            mine = [ours(path, g["prompt"]) for g in GREEDY]
            # Our command line prints the prompt or not; what follows it is what counts.
            mine = [m.removeprefix(g["prompt"]).rstrip("\n") for m, g in zip(mine, GREEDY)]
            same = [m == t.rstrip("\n") for m, t in zip(mine, theirs)]
            print(f"{kind}: loaded, dequantized alike, peers agree, same text for {sum(same)} of 3", flush=True)
            if kind in SAME_TEXT and not all(same):
                failures.append((kind, mine, theirs))
            path.unlink()
    assert not failures, failures
    assert gguf_rs.SIZE_TOO_SMALL.keys() < types, f"known wrong sizes that were not seen: {types}"


main()
