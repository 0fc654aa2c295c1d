#!/usr/bin/env python3
"""How other readers end on the table of bad inputs: each file in a process of its own with limits on memory and time.
Started by scripts/peers/malformed, which writes the files. Prints the cases in which a reader crashed or hung, how many
it rejected and accepted of those that must be rejected and of those that are sound, and the table of tests/README.md.

A container reader (gguf, gguf-rs, candle, the safetensors crate) is not blamed for what only a model's loader can see,
so for these the groups that are about containers count.
"""
import collections
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

FOLDER, KESTREL, GGUF_RS, RUST_READERS = (pathlib.Path(a) for a in sys.argv[1:5])
SCRATCH = FOLDER / "scratch.npy"
MEMORY_BYTES = 2 << 30
CPU_SECONDS = 10
WALL_SECONDS = 20

CONTAINER = ("llama_cpp", "container", "holes", "paths")
MODEL = ("llama_cpp", "container", "split", "model", "GGUF_tokenizer", "weights", "template")
WITH_VOCABULARY = ("GGUF_tokenizer", "template")  # a server, which loads no model without one
SAFETENSORS = ("safetensors",)
BITSANDBYTES = ("bitsandbytes",)
IN_FOLDERS = SAFETENSORS + BITSANDBYTES  # of which model.safetensors is one file

os.environ["GGML_NO_BACKTRACE"] = "1"  # or every abort starts a debugger
os.environ["HF_HUB_OFFLINE"] = "1"


def limit():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))


def ended(status) -> str:
    """What an exit status means; 101 is Rust's for a panic."""
    if os.WIFSIGNALED(status):
        hung = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return "hangs" if hung else f"crashes ({signal.Signals(os.WTERMSIG(status)).name})"
    code = os.WEXITSTATUS(status)
    return {0: "accepts", 101: "crashes (panic)", 134: "crashes (SIGABRT)"}.get(code, "rejects")


def in_child(read):
    """Runs a reader in a forked process; an exception is a rejection."""
    def run(path):
        pid = os.fork()
        if pid == 0:
            limit()
            os.setpgrp()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            try:
                read(str(path))
                os._exit(0)
            except MemoryError:
                os.kill(os.getpid(), signal.SIGXCPU)
            except BaseException:
                os._exit(1)
        return wait(pid)
    return run


def command(*words):
    def run(path):
        known = {"FILE": path, "FOLDER": path.parent, "SCRATCH": SCRATCH}
        child = subprocess.Popen([str(known.get(w, w)) for w in words], preexec_fn=limit,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return wait(child.pid)
    return run


def wait(pid) -> str:
    for _ in range(WALL_SECONDS * 1000):  # not by the clock, which goes on while all of this is stopped
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return ended(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


def gguf_py(path):
    import gguf
    for t in gguf.GGUFReader(path).tensors:
        len(t.data)


def safetensors_py(path):
    import safetensors
    with safetensors.safe_open(path, framework="numpy") as f:
        for name in f.keys():
            f.get_slice(name).get_shape()


def transformers_bitsandbytes(path):
    import torch
    import transformers
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(os.path.dirname(path), dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))


def llama_cpp_python(path):
    import llama_cpp
    model = llama_cpp.Llama(path, n_ctx=64, n_threads=1, verbose=False)
    model.eval([1, 2])


def xllamacpp(path):
    import xllamacpp as x
    params = x.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 64, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    answer = x.Server(params).handle_completions(dict(prompt=[1, 2], n_predict=2))
    if "error" in answer or "choices" not in answer:
        raise ValueError(answer)
    os._exit(0)  # its threads do not always end


def optional(name, read):
    try:
        __import__(name)
    except ImportError:
        print(f"{name} is not installed: left out")
        return []
    return [read]


# Name, groups of the table, how it is run.
READERS = [
    ("kestrel", MODEL, command(KESTREL, "logits", "FILE", "--tokens", "1,2", "-o", "SCRATCH")),
    *[("llama-cpp-python", MODEL, in_child(r)) for r in optional("llama_cpp", llama_cpp_python)],
    *[("xllamacpp", WITH_VOCABULARY, in_child(r)) for r in optional("xllamacpp", xllamacpp)],
    ("kestrel, container", CONTAINER, command(KESTREL, "inspect", "FILE")),
    *[("gguf (Python)", CONTAINER, in_child(r)) for r in optional("gguf", gguf_py)],
    ("gguf-rs", CONTAINER, command(GGUF_RS, "read", "FILE")),
    ("candle-core", CONTAINER, command(RUST_READERS, "read", "FILE")),
    ("kestrel, safetensors", SAFETENSORS, command(KESTREL, "inspect", "FOLDER")),
    *[("safetensors (Python)", SAFETENSORS, in_child(r)) for r in optional("safetensors", safetensors_py)],
    ("safetensors (crate)", SAFETENSORS, command(RUST_READERS, "safetensors", "FILE")),
    ("kestrel, bitsandbytes", BITSANDBYTES, command(KESTREL, "logits", "FOLDER", "--tokens", "1,2", "-o", "SCRATCH")),
    *[("transformers + bitsandbytes", BITSANDBYTES, in_child(r))
      for r in optional("bitsandbytes", transformers_bitsandbytes)],
]


def cases(groups):
    for folder in sorted(FOLDER.iterdir()):
        if not folder.is_dir():
            continue
        expected, group, _ = folder.name.split(".")
        if group not in groups:
            continue
        names = ["model.safetensors"] if group in IN_FOLDERS else ["m-00001-of-00002.gguf", "case.gguf", "sparse.gguf"]
        for name in names:
            if (folder / name).is_file():
                yield expected.split("-")[0], folder / name
                break


HEAD = """
| reader | files | of those to reject: rejects | accepts | crashes | hangs | of the sound ones: accepts | rejects | crashes, hangs |
|---|---|---|---|---|---|---|---|---|"""


def main():
    rows = []
    for name, groups, run in READERS:
        counts, odd = collections.Counter(), []
        for expected, path in cases(groups):
            outcome = run(path)
            SCRATCH.unlink(missing_ok=True)
            word = outcome.split(" ")[0]
            counts[expected, word] += 1
            if word in ("crashes", "hangs"):
                odd.append(f"  {outcome}: {path.parent.name}")
        bad = [counts["reject", w] for w in ("rejects", "accepts", "crashes", "hangs")]
        good = [counts["accept", w] for w in ("accepts", "rejects")]
        good.append(counts["accept", "crashes"] + counts["accept", "hangs"])
        rows.append(f"| {name} | {sum(counts.values())} | " + " | ".join(map(str, bad + good)) + " |")
        print("\n".join([rows[-1], *odd]), flush=True)
    print("\n".join([HEAD, *rows]))


main()
