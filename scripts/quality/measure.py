#!/usr/bin/env python3
"""Measures every file of definitions.py with `kestrel perplexity` against the F32 model, into record.json.

    scripts/quality/measure.py KESTREL --work DIR [--sizes HF_DIR] [--again NAME ...]

Two files are measured at a time, on one thread each. What the record has is not measured again, so that an interrupted run goes on; --again measures these names anew.
--sizes takes a checkpoint of the 7B's shapes (weights are not read) and adds the size that each file would have.
report.py makes the README's table and plot of the record.
"""
import argparse
import concurrent.futures
import json
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
    args.add_argument("--sizes", type=pathlib.Path)
    args.add_argument("--again", nargs="*", default=[])
    args = args.parse_args()
    binary = args.kestrel.resolve()

    def kestrel(*words):
        done = subprocess.run([binary, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"files": {}}
    files = record["files"]
    todo = [f for f in d.FILES if key(f) not in files or f.name in args.again]
    folder = args.work
    folder.mkdir(parents=True, exist_ok=True)
    f32, text, importance, base = (folder / n for n in ("f32.gguf", "text", "imatrix.gguf", "base.kl"))
    if todo and not base.exists():
        kestrel("convert", d.TINY, "-o", f32, "--type", "f32", "--force")
        text.write_text(kestrel("run", f32, *shlex.split(d.CALIBRATION)))
        kestrel("imatrix", f32, "-f", text, "-o", importance, "--force")
        kestrel("perplexity", f32, "-f", d.TEXT, "--save-kl-base", base, "--kl-base-f32")
    lock = threading.Lock()

    def measure(f):
        path = folder / f"{key(f)}.gguf".replace(" ", "-")
        if f.maker == d.KESTREL:
            with_matrix = ["--imatrix", importance] if f.imatrix else []
            kestrel("convert", d.TINY, "-o", path, "--force", "--threads", 1, *shlex.split(f.how), *with_matrix)
        else:
            import llama  # needs llama-cpp-python
            llama.quantize(f32, path, f.how, importance if f.imatrix else None)
        figures = json.loads(kestrel("perplexity", path, "--kl-base", base, "--json", "--threads", 1))
        figures["file_bytes"] = path.stat().st_size
        if args.sizes and f.maker == d.KESTREL:
            plan = kestrel("convert", args.sizes, "--dry-run", *shlex.split(f.how))
            n_bytes, bits = re.search(r"write: (\d+) bytes .*, ([\d.]+) bits", plan).groups()
            figures["7b"] = dict(file_bytes=int(n_bytes), bits_per_weight=float(bits))
        with lock:
            files[key(f)] = figures
            print(key(f), figures["mean_kl"], flush=True)
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
        path.unlink()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(measure, f) for f in todo]:
            done.result()


def key(f):
    return f"{f.name} {f.maker}{' imatrix' if f.imatrix else ''}"


if __name__ == "__main__":
    main()
