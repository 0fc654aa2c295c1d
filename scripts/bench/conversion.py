#!/usr/bin/env python3
"""Time `kestrel convert` against copying the same bytes and against llama.cpp's two steps.

    scripts/bench/conversion.py HF_DIR WORK_DIR -o record.json [--kestrel target/release/kestrel]
        [--types q4_k_m,q8_0] [--threads 2] [--rounds 3] [--llama-cpp DIR]

A round does, for every type: the source read once into the page cache; then the conversion; then the same reading, and
the copy. The copy reads every shard once and writes as many bytes as the output has, in one thread with a buffer of
1 MiB, and ends with fsync: what `cp` does, with the bytes that the conversion moves.

With --llama-cpp (a folder with convert_hf_to_gguf.py and gguf-py; the source package of llama-cpp-python has it under
vendor/llama.cpp) each round also converts to BF16 with it, and for every type calls llama_model_quantize of the
installed llama_cpp package on that file. Run it with the Python that has torch, transformers and llama_cpp.

The source and two outputs must fit WORK_DIR; for figures that mean something, the page cache holds the source.
The record has every time, the medians, the peak of RssAnon, the commit, the processor and the versions.
"""
import argparse
import ctypes
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

BUFFER_BYTES = 1 << 20
POLL_S = 0.05
FTYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "q2_k": 10, "q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18,
          "iq4_nl": 25, "iq4_xs": 30}


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def warm(files):
    buffer = bytearray(BUFFER_BYTES)
    for path in files:
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def copy(files, out, n_bytes):
    """Seconds to read the files and write n_bytes."""
    buffer = bytearray(BUFFER_BYTES)
    start = time.perf_counter()
    with open(out, "wb", buffering=0) as to:
        left = n_bytes
        for path in files:
            with open(path, "rb", buffering=0) as f:
                while n := f.readinto(buffer):
                    n = min(n, left)
                    to.write(memoryview(buffer)[:n])
                    left -= n
        while left:
            n = min(BUFFER_BYTES, left)
            to.write(memoryview(buffer)[:n])
            left -= n
        os.fsync(to.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return {"seconds": seconds}


def run(command, env=None):
    """Seconds and the peak of RssAnon of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen([str(c) for c in command], env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    peak_kib = 0
    os.set_blocking(process.stderr.fileno(), False)
    said = b""
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            peak_kib = max([peak_kib] + [int(line.split()[1]) for line in status.splitlines()
                                         if line.startswith("RssAnon")])
        except OSError:
            pass
        said = (said + (process.stderr.read() or b""))[-4000:]
        time.sleep(POLL_S)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"{command} failed with {process.returncode}:\n{said.decode(errors='replace')}")
    return {"seconds": seconds, "rss_anon_bytes": peak_kib * 1024}


def quantize(source, out, ftype, threads):
    """llama_model_quantize; this file calls itself for it, so that memory is that of a process of its own."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, ftype
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)))


def processor():
    with open("/proc/cpuinfo") as f:
        return next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "")


def main():
    if sys.argv[1:2] == ["--quantize"]:
        source, out, ftype, threads = sys.argv[2:]
        quantize(source, out, int(ftype), int(threads))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path, metavar="HF_DIR")
    parser.add_argument("work", type=pathlib.Path, metavar="WORK_DIR")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True)
    parser.add_argument("--kestrel", type=pathlib.Path, default=pathlib.Path("target/release/kestrel"))
    parser.add_argument("--types", default="q4_k_m,q8_0,q4_0,f16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-cpp", type=pathlib.Path)
    args = parser.parse_args()

    files = shards(args.source)
    ours, between, theirs = (args.work / name for name in ("ours.gguf", "bf16.gguf", "theirs.gguf"))
    results = {}

    def note(name, result):
        results.setdefault(name, []).append(result)
        print(f"{name}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)

    for _ in range(args.rounds):
        for file_type in args.types.split(","):
            warm(files)
            command = [args.kestrel, "convert", args.source, "-o", ours, "--force", "--type", file_type,
                       "--threads", args.threads]
            note(f"kestrel {file_type}", run(command))
            n_bytes = ours.stat().st_size
            ours.unlink()
            warm(files)
            note(f"copy {file_type}", copy(files, ours, n_bytes))
        if args.llama_cpp is None:
            continue
        warm(files)
        script = args.llama_cpp / "convert_hf_to_gguf.py"
        env = dict(os.environ, PYTHONPATH=str(args.llama_cpp / "gguf-py"))
        note("convert_hf_to_gguf bf16",
             run([sys.executable, script, args.source, "--outfile", between, "--outtype", "bf16"], env))
        for file_type in args.types.split(","):
            warm([between])
            note(f"llama_model_quantize {file_type}",
                 run([sys.executable, __file__, "--quantize", between, theirs, FTYPES[file_type], args.threads]))
            theirs.unlink()
        between.unlink()

    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(),
        "cpu": processor(),
        "kernel": platform.release(),
        "threads": args.threads,
        "source_bytes": sum(path.stat().st_size for path in files),
        "median_s": {name: statistics.median(r["seconds"] for r in runs) for name, runs in results.items()},
        "runs": results,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
