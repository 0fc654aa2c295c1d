#!/usr/bin/env python3
"""Kestrel and transformers + bitsandbytes on one 4-bit checkpoint on the CPU, taking turns; one JSON object on stdout.

    scripts/bench/compare_transformers.py KESTREL MODEL [--threads N] [--prefill N] [--decode N] [--rounds N]

MODEL is a folder of `kestrel convert --type bnb-nf4`, or one that transformers saved. Needs torch, transformers, accelerate
and bitsandbytes. Prefill is the forward pass over a whole prompt, decode the mean over tokens that follow it, each with
the cache of the one before. Each side's model is loaded once; transformers' forward pass for a whole prompt gives wrong
logits for this model on the CPU (scripts/peers/bitsandbytes.txt), and is timed all the same.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

import bitsandbytes
import torch
import transformers


def summary(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kestrel")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=64)
    parser.add_argument("--decode", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map="cpu").eval()
    load_s = time.perf_counter() - started
    print(f"loaded in {load_s:.0f} s", file=sys.stderr, flush=True)

    @torch.no_grad()
    def theirs():
        tokens = torch.randint(12, model.config.vocab_size, (1, args.prefill))
        started = time.perf_counter()
        out = model(tokens, use_cache=True)
        prefilled = time.perf_counter()
        for i in range(args.decode):
            position = torch.tensor([args.prefill + i])
            out = model(tokens[:, -1:], cache_params=out.cache_params, use_cache=True, cache_position=position)
        ended = time.perf_counter()
        return {"prefill_tok_s": args.prefill / (prefilled - started), "decode_tok_s": args.decode / (ended - prefilled)}

    def ours():
        command = [args.kestrel, "bench", args.model, "--json", "-r", 1, "-p", args.prefill, "-n", 16,
                   "--threads", args.threads]
        done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout)
        return {key: figures[key] for key in ("prefill_tok_s", "decode_tok_s")}

    turns = {"kestrel": [], "transformers": []}
    theirs()  # bitsandbytes repacks weights in its first pass
    for _ in range(args.rounds):
        turns["kestrel"].append(ours())
        turns["transformers"].append(theirs())
        print({name: rounds[-1] for name, rounds in turns.items()}, file=sys.stderr, flush=True)
    figures = {}
    for key in ("prefill_tok_s", "decode_tok_s"):
        sides = {name: summary([r[key] for r in rounds]) for name, rounds in turns.items()}
        figures[key] = sides | {"ratio": sides["kestrel"]["median"] / sides["transformers"]["median"]}
    versions = {m.__name__: m.__version__ for m in (torch, transformers, bitsandbytes)}
    print(json.dumps({"prefill": args.prefill, "threads": args.threads, "load_s": load_s, **versions, **figures}, indent=1))


if __name__ == "__main__":
    main()
