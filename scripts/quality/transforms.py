#!/usr/bin/env python3
"""Whether permutations and rotations that vanish into the weights make a model's files better.

    scripts/quality/transforms.py KESTREL CALIBRATION_TEXT [--windows N] [--measured N] [--types T ...] [--work DIR]

Falcon Mamba stays the same function (to float rounding) when
- the channels of a layer's mixer are permuted,
- the columns of the residual stream are permuted in all layers at once,
- the residual stream is rotated, after the norms' weights went into the matrices that follow them,
- dt is rotated between ssm_x and ssm_dt, whose norm has no weight.
For each of these the tiny model's F32 file is rewritten so, which must not change its predictions, and quantized: plainly,
and with `--calibration --search best` measured on the rewritten file. Printed is the mean KL divergence from the original on
the held-out text. Permutations sort by the energy of the inputs, as an importance matrix has it, so that blocks become
alike. transforms.txt is a run of it.
"""
import argparse
import json
import pathlib
import subprocess
import tempfile

import gguf
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/data/tiny-falcon-mamba"
TEXT = ROOT / "tests/data/texts/a-tale-of-two-cities-200000.txt"


def rewrite(source, target, change):
    """The file with other numbers in the same places."""
    target.write_bytes(source.read_bytes())
    reader = gguf.GGUFReader(target, "r+")
    tensors = {t.name: t.data for t in reader.tensors}
    change(tensors)
    reader.data.flush()


def energies(path):
    """Mean square of each column of the inputs, by the weight's name."""
    tensors = {t.name: np.array(t.data).reshape(-1) for t in gguf.GGUFReader(path).tensors}
    return {name[:-8]: values for name, values in tensors.items() if name.endswith(".in_sum2")}


def layers(t):
    return range(sum(name.endswith("ssm_in.weight") for name in t))


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    assert len(h) == n, f"no Hadamard matrix of {n} rows here"
    # Random signs, so that the first column is not the mean.
    return h * np.random.default_rng(1).choice([-1, 1], n) / np.sqrt(n)


def multiply(w, rotation):
    w[:] = (w.astype(np.float64) @ rotation).astype(np.float32)


def channels(energy):
    def change(t):
        for i in layers(t):
            at = f"blk.{i}."
            order = np.argsort(energy[at + "ssm_out.weight"])
            n = len(order)
            w = t[at + "ssm_in.weight"]
            w[:n], w[n:] = w[:n][order], w[n:][order]
            for name in "ssm_conv1d.weight ssm_conv1d.bias ssm_dt.weight ssm_dt.bias ssm_a ssm_d".split():
                t[at + name][:] = t[at + name][order]
            for name in "ssm_x.weight ssm_out.weight".split():
                t[at + name][:] = t[at + name][:, order]
    return change


def reads_stream(t):
    """Matrices that read the residual stream, and the norm before each."""
    norms = [(f"blk.{i}.ssm_in.weight", f"blk.{i}.attn_norm.weight") for i in layers(t)]
    return norms + [("output.weight", "output_norm.weight")]


def stream_permuted(energy):
    def change(t):
        order = np.argsort(sum(energy[name] / energy[name].mean() for name, _ in reads_stream(t)))
        for name, norm in reads_stream(t):
            t[name][:], t[norm][:] = t[name][:, order], t[norm][order]
        t["token_embd.weight"][:] = t["token_embd.weight"][:, order]
        for i in layers(t):
            t[f"blk.{i}.ssm_out.weight"][:] = t[f"blk.{i}.ssm_out.weight"][order]
    return change


def norms_folded(t):
    for name, norm in reads_stream(t):
        t[name][:] = t[name] * t[norm]
        t[norm][:] = 1


def stream_rotated(t):
    norms_folded(t)
    rotation = hadamard(t["token_embd.weight"].shape[1])
    for name, _ in reads_stream(t):
        multiply(t[name], rotation)
    multiply(t["token_embd.weight"], rotation)
    for i in layers(t):
        multiply(t[f"blk.{i}.ssm_out.weight"].T, rotation)


def dt_rotated(t):
    for i in layers(t):
        dt = t[f"blk.{i}.ssm_dt.weight"]
        rotation = hadamard(dt.shape[1])
        multiply(dt, rotation)
        multiply(t[f"blk.{i}.ssm_x.weight"][:dt.shape[1]].T, rotation)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("kestrel", type=pathlib.Path)
    p.add_argument("text", type=pathlib.Path)
    p.add_argument("--windows", type=int, default=64)
    p.add_argument("--measured", type=int, default=54, help="windows of the held-out text")
    p.add_argument("--types", nargs="+", default=["q3_k_m", "q4_k_m"])
    p.add_argument("--work", type=pathlib.Path)
    args = p.parse_args()
    kestrel = args.kestrel.resolve()

    def run(*words):
        return subprocess.run([kestrel, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True).stdout

    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        plain, base, importance, x, c, q = (pathlib.Path(folder) / n for n in "f32 base i x c q".split())
        chunks = ["--chunks", args.windows]
        run("convert", TINY, "-o", plain, "--type", "f32")
        run("perplexity", plain, "-f", TEXT, "--save-kl-base", base, "--kl-base-f32",
            "--chunks", args.measured)
        run("imatrix", plain, "-f", args.text, "-o", importance, *chunks)
        energy = energies(importance)

        def kl(path):
            return json.loads(run("perplexity", path, "--kl-base", base, "--json"))["mean_kl"]

        print(f"{'':32}{'F32':>10}" + "".join(f"{ty:>10}{'with calibration':>18}" for ty in args.types), flush=True)
        for name, change in {
            "as it is": lambda t: None,
            "channels permuted": channels(energy),
            "residual stream permuted": stream_permuted(energy),
            "norms folded into matrices": norms_folded,
            "residual stream rotated": stream_rotated,
            "dt rotated": dt_rotated,
        }.items():
            rewrite(plain, x, change)
            same = kl(x)
            assert same < 1e-6, f"{name}: another function, KL {same}"
            run("calibrate", x, "-f", args.text, "-o", c, "--force", "--kl-chunks", 0, *chunks)
            print(f"{name:32}{same:10.1e}", end="", flush=True)
            for ty in args.types:
                figures = []
                for how in [], ["--calibration", c, "--search", "best"]:
                    run("quantize", x, "-o", q, "--force", "--type", ty, *how)
                    figures.append(kl(q))
                print(f"{figures[0]:10.6f}{figures[1]:18.6f}", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
