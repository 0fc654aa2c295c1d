#!/usr/bin/env python3
"""Whether `kestrel perplexity` agrees with llama.cpp on the same GGUF files.

    scripts/quality/agreement.py KESTREL [--calibration FILE] [--only-kestrel] [--windows N]

Files of the tiny model by llama-quantize (its library) and by Kestrel, and a text that the model never saw. For each,
llama.cpp's own logits give one set of figures and Kestrel the other, from the same base file; each side reads the
other's base file as well. With FILE, of `kestrel calibrate` for this model, Kestrel's files of llama-quantize's sizes
too; with --only-kestrel no others, and only from llama.cpp's base. Perplexity must agree within 0.05 %, the mean of the
divergence within 3 %; with few --windows chance alone can exceed the former. agreement.txt is a run of it.
"""
import argparse
import json
import pathlib
import platform
import subprocess
import sys
import tempfile

import llama
import llama_cpp

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/data/tiny-falcon-mamba"
TEXT = ROOT / "tests/data/texts/a-tale-of-two-cities-200000.txt"
TYPES = "q8_0 q6_k q5_k_m q4_k_m q4_0 iq4_xs q3_k_m q2_k".split()
RECIPES = "ssm_s ssm_m ssm_l".split()
SIZES = "q3_k_m q4_k_m q5_k_m".split()
FIGURES = "perplexity mean_kl median_kl p99_kl max_kl same_top1 rms_change".split()


def main():
    args = argparse.ArgumentParser()
    args.add_argument("kestrel", type=pathlib.Path)
    args.add_argument("--calibration", type=pathlib.Path)
    args.add_argument("--only-kestrel", action="store_true")
    args.add_argument("--windows", type=int)
    args = args.parse_args()
    kestrel, n_windows = args.kestrel.resolve(), args.windows

    def run(*args):
        done = subprocess.run([kestrel, *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, (args, done.stderr)
        return done.stdout

    def ours(path, *args):
        return json.loads(run("perplexity", path, "--json", *args))

    print(f"llama.cpp of llama-cpp-python {llama_cpp.__version__}, {run('--version').strip()}, {platform.machine()}")
    worst = dict(perplexity=0.0, mean_kl=0.0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        f32, their_base, our_base = (folder / name for name in ("f32.gguf", "theirs.kl", "ours.kl"))
        run("convert", TINY, "-o", f32, "--type", "f32")
        model = llama.Model(f32)
        tokens = model.tokens(llama.text_of(TEXT))[:n_windows and n_windows * model.n_ctx]
        theirs = llama.save_base(their_base, model, tokens)
        model.close()
        chunks = ["--chunks", n_windows] if n_windows else []
        mine = ours(f32, "-f", TEXT, "--save-kl-base", our_base, *chunks)["perplexity"]
        worst["perplexity"] = abs(mine / theirs - 1)
        print(f"F32: perplexity {theirs:.5f} by llama.cpp, {mine:.5f} by kestrel\n")
        print(f"{'file':14}  {'by':9}  {'base of':9}" + "".join(f"  {name:>10}" for name in FIGURES))

        def compare(name, path):
            model = llama.Model(path)
            rows = [("llama.cpp", "llama.cpp", llama.against_base(their_base, model)),
                    ("kestrel", "llama.cpp", ours(path, "--kl-base", their_base))]
            if not args.only_kestrel:
                rows += [("llama.cpp", "kestrel", llama.against_base(our_base, model)),
                         ("kestrel", "kestrel", ours(path, "--kl-base", our_base))]
            model.close()
            path.unlink()
            for by, base, row in rows:
                print(f"{name:14}  {by:9}  {base:9}" + "".join(f"  {row[figure]:10.6f}" for figure in FIGURES), flush=True)
                for figure in worst:
                    worst[figure] = max(worst[figure], abs(row[figure] / rows[0][2][figure] - 1))

        path, n_bytes = folder / "file.gguf", {}
        for kind in SIZES if args.only_kestrel else TYPES:
            llama.quantize(f32, path, kind)
            n_bytes[kind] = path.stat().st_size
            if args.only_kestrel:
                path.unlink()
            else:
                compare(kind, path)
        for kind in RECIPES:
            run("convert", TINY, "-o", path, "--type", kind)
            compare(kind, path)
        for kind in SIZES if args.calibration else []:
            run("convert", TINY, "-o", path, "--calibration", args.calibration, "--search", "best",
                "--target-size", n_bytes[kind])
            compare(f"size of {kind}", path)
    print(f"\nlargest difference: perplexity {worst['perplexity']:.4%}, mean KL {worst['mean_kl']:.2%}")
    if worst["perplexity"] > 5e-4 or worst["mean_kl"] > 0.03:
        sys.exit("the two do not agree")


if __name__ == "__main__":
    main()
