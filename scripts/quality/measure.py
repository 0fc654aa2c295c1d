#!/usr/bin/env python3
"""Measures every file of definitions.py with `kestrel perplexity` against the F32 model, into record.json.

    scripts/quality/measure.py KESTREL --work DIR --calibration TEXT [--sizes HF_DIR] [--again NAME ...]
                               [--model HF_DIR --record FILE] [--importance TEXT]

As many files are measured at a time as there are cores, on one thread each. What the record has is not measured again, so that an interrupted
run goes on; --again measures these names anew. TEXT is what `kestrel calibrate` reads, other novels than the measured one
(ARCHITECTURE.md, Quality, makes it). --sizes takes a checkpoint of the 7B's shapes (weights are not read) and adds the
size that each file would have. --model and --record measure another model than the tiny one, --importance takes the
importance matrix from a text instead of from what the model writes.
report.py makes the README's table and plot of the record.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import subprocess
import threading

import definitions as d

RECORD = pathlib.Path(__file__).resolve().parent / "record.json"


def main():
    args = argparse.ArgumentParser()
    args.add_argument("kestrel", type=pathlib.Path)
    args.add_argument("--work", type=pathlib.Path, required=True)
    args.add_argument("--calibration", type=pathlib.Path, required=True)
    args.add_argument("--sizes", type=pathlib.Path)
    args.add_argument("--model", type=pathlib.Path, default=d.TINY)
    args.add_argument("--record", type=pathlib.Path, default=RECORD)
    args.add_argument("--importance", type=pathlib.Path)
    args.add_argument("--again", nargs="*", default=[])
    args = args.parse_args()
    binary = args.kestrel.resolve()

    def kestrel(*words):
        done = subprocess.run([binary, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    record = json.loads(args.record.read_text()) if args.record.exists() else {"files": {}}
    files = record["files"]
    todo = [f for f in d.FILES if key(f) not in files or f.name in args.again]
    folder = args.work
    folder.mkdir(parents=True, exist_ok=True)
    f32, text, importance, calibration, base = (
        folder / n for n in ("f32.gguf", "text", "imatrix.gguf", "calibration.gguf", "base.kl"))
    if todo and not base.exists():
        kestrel("convert", args.model, "-o", f32, "--type", "f32", "--force")
        if not args.importance:
            text.write_text(kestrel("run", f32, *shlex.split(d.IMPORTANCE_TEXT)))
        kestrel("imatrix", f32, "-f", args.importance or text, "-o", importance, "--force")
        kestrel("calibrate", f32, "-f", args.calibration, "-o", calibration, "--kl-chunks", 16, "--force")
        kestrel("perplexity", f32, "-f", d.TEXT, "--save-kl-base", base, "--kl-base-f32")
    lock = threading.Lock()

    def llama_bytes(kind):
        """Of llama-quantize's file of this type, without an importance matrix: one adds a few metadata."""
        import llama  # needs llama-cpp-python
        path = folder / f"size-of-{kind}.gguf"
        llama.quantize(f32, path, kind)
        n_bytes = path.stat().st_size
        path.unlink()
        return n_bytes

    def measure(f):
        path = folder / f"{key(f)}.gguf".replace(" ", "-")
        if f.maker == d.KESTREL:
            known_by = {d.IMATRIX: ["--imatrix", importance], d.CALIBRATION: ["--calibration", calibration]}
            how = [*shlex.split(f.how), *known_by.get(f.by, [])]
            if f.size_of:
                how += ["--target-size", llama_bytes(f.size_of)]
            kestrel("convert", args.model, "-o", path, "--force", "--threads", 1, *how)
        else:
            import llama  # needs llama-cpp-python
            llama.quantize(f32, path, f.how, importance if f.by == d.IMATRIX else None)
        figures = json.loads(kestrel("perplexity", path, "--kl-base", base, "--json", "--threads", 1))
        figures["file_bytes"] = path.stat().st_size
        if args.sizes and f.maker == d.KESTREL:
            plan = kestrel("convert", args.sizes, "--dry-run", "--type", f.size_of or f.name)
            n_bytes, bits = re.search(r"write: (\d+) bytes .*, ([\d.]+) bits", plan).groups()
            figures["7b"] = dict(file_bytes=int(n_bytes), bits_per_weight=float(bits))
        with lock:
            files[key(f)] = figures
            print(key(f), figures["mean_kl"], flush=True)
            args.record.write_text(json.dumps(record, indent=1) + "\n")
        path.unlink()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(measure, f) for f in todo]:
            done.result()


def key(f):
    return f"{f.name} {f.maker} {f.by}".strip()


if __name__ == "__main__":
    main()
