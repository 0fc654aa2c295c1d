#!/usr/bin/env python3
"""Kestrel and llama.cpp on one GGUF, taking turns; writes a record. Started by scripts/bench/run.

See definitions.py for what is measured, and the record for everything it depends on.
"""
import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import definitions as d

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def output(*command, **kwargs):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, **kwargs).stdout


class Kestrel:
    name = "kestrel"

    def __init__(self, args):
        self.args = args
        self.env = {**os.environ, **({"KESTREL_ISA": args.isa} if args.isa else {})}

    def run(self, **counts):
        """The flat JSON of `kestrel bench`."""
        options = [x for name, value in counts.items() for x in ("--" + name.replace("_", "-"), value)]
        return json.loads(output(*self.args.prefix, self.args.kestrel, "bench", self.args.model, "--json", "-r", 1,
                                 "--threads", self.args.threads, *options, env=self.env))

    def one_token_s(self):
        """From the start of a process to its end after one token, tokenizer and all."""
        timed = "import subprocess as p, sys, time; s = time.perf_counter(); " \
                "p.run(sys.argv[1:], check=True, capture_output=True); print(time.perf_counter() - s)"
        return float(output(*self.args.prefix, sys.executable, "-c", timed, self.args.kestrel, "run", self.args.model,
                            "-p", "a", "-n", 1, "--threads", self.args.threads, env=self.env))

    def turn(self):
        """Every figure once, and the limits of the machine at that time."""
        one = self.run(n_prompt=d.PREFILL, n_tokens=d.DECODE)
        figures = {key: one[key] for key in ("prefill_tok_s", "decode_tok_s")}
        for n in d.BATCHES if self.args.batch else ():
            figures[f"batch_{n}_tok_s"] = self.run(n_prompt=0, n_tokens=d.BATCH_STEPS, batch=n)["decode_tok_s"]
        return figures, one


class LlamaCpp:
    name = "llama.cpp"

    def __init__(self, args):
        self.args = args
        self.best = {}
        self.tried = []

    def run(self, setting, **what):
        options = []
        for name, value in (setting | what).items():
            options += ["--" + name.replace("_", "-"), *(value if isinstance(value, tuple) else (value,))]
        return json.loads(output(*self.args.prefix, self.args.llama_python, HERE / "llama_worker.py",
                                 self.args.model, "--threads", self.args.threads, *options))

    def figures(self, result):
        found = {key: result[key][0] for key in ("prefill_tok_s", "decode_tok_s") if result[key]}
        return found | {f"batch_{n}_tok_s": rates[0] for n, rates in result["batch_tok_s"].items()}

    def attempt(self, setting, **what):
        """One setting once. llama.cpp may lack kernels of a kind for a type, or crash."""
        try:
            self.tried.append(setting | self.figures(self.run(setting, **what)))
        except subprocess.CalledProcessError as e:
            self.tried.append(setting | {"failed": e.returncode, "at": list(what)})
        say(f"llama.cpp {self.tried[-1]}")
        return "failed" not in self.tried[-1]

    def find_best_settings(self):
        """Tries where the weights go with one physical batch, then the other physical batches, which matter for many
        tokens only, with the best place."""
        for weights in d.WEIGHTS:
            setting = {"weights": weights, "ubatch": d.UBATCH[0]}
            if self.attempt(setting, prefill=d.PREFILL, decode=d.DECODE) and self.args.batch:
                self.attempt(setting, batch=d.BATCHES, batch_steps=d.BATCH_STEPS)
        fastest = max((t for t in self.tried if "prefill_tok_s" in t), key=lambda t: t["prefill_tok_s"])
        for ubatch in d.UBATCH[1:]:
            self.attempt({"weights": fastest["weights"], "ubatch": ubatch}, prefill=d.PREFILL)

    def choose_settings(self):
        """The best of those tried, for each figure."""
        if self.args.settings:
            self.tried = json.loads(self.args.settings.read_text())["settings_tried"]
        else:
            self.find_best_settings()
        for key in d.FIGURES:
            tried = [t for t in self.tried if key in t]
            if tried and (self.args.batch or not key.startswith("batch")):
                best = max(tried, key=lambda t: t[key])
                self.best[key] = {"weights": best["weights"], "ubatch": best["ubatch"]}
        for key, setting in self.best.items():
            # The physical batch does nothing to single tokens: one process for both where it can be.
            if key == "decode_tok_s" and setting["weights"] == self.best["prefill_tok_s"]["weights"]:
                self.best[key] = self.best["prefill_tok_s"]

    def turn(self):
        """Every figure once, those of one setting in one process."""
        figures = {}
        for setting in {tuple(s.items()) for s in self.best.values()}:
            keys = [key for key, s in self.best.items() if tuple(s.items()) == setting]
            what = {"batch": tuple(n for n in d.BATCHES if f"batch_{n}_tok_s" in keys), "batch_steps": d.BATCH_STEPS}
            what["prefill"] = d.PREFILL * ("prefill_tok_s" in keys)
            what["decode"] = d.DECODE * ("decode_tok_s" in keys)
            result = self.run(dict(setting), **what)
            self.about = {key: result[key] for key in ("version", "system_info")}
            figures |= self.figures(result)
        return figures


def say(text):
    print(text, file=sys.stderr, flush=True)


def wait_until_quiet(args):
    """Other work on the machine makes every figure wrong."""
    for _ in range(0 if args.not_quiet else 30):
        if os.getloadavg()[0] <= d.QUIET:
            return
        say(f"load average {os.getloadavg()[0]:.2f}, waiting for {d.QUIET}")
        time.sleep(10)
    if not args.not_quiet:
        sys.exit("the machine is not quiet; --not-quiet measures anyway and says so in the record")


def cpu_name():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines[:30] if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return ", ".join(fields.get(key, "?") for key in ("model name", "cpu family", "model", "stepping"))


def summary(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--kestrel", type=pathlib.Path, default=ROOT / "target/release/kestrel")
    parser.add_argument("--llama-python", type=pathlib.Path, default=sys.executable, help="the Python with llama.cpp")
    parser.add_argument("--isa", help="KESTREL_ISA for our side")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=d.ROUNDS)
    parser.add_argument("--batch", action="store_true", help="measure decoding several sequences together, too")
    parser.add_argument("--settings", type=pathlib.Path, help="a record whose settings of llama.cpp are taken as the best")
    parser.add_argument("--not-quiet", action="store_true", help="measure on a busy machine")
    parser.add_argument("--prefix", default="", help="a command that runs each measurement, such as `taskset -c 0,1`")
    parser.add_argument("--out", type=pathlib.Path, help="the record [default: records/NAME.json]")
    args = parser.parse_args()
    args.prefix = args.prefix.split()
    load = os.getloadavg()[0]
    wait_until_quiet(args)

    ours, theirs = Kestrel(args), LlamaCpp(args)
    theirs.choose_settings()
    turns = {ours.name: [], theirs.name: []}
    limits = []
    for i in range(args.rounds):
        figures, about = ours.turn()
        turns[ours.name].append(figures)
        limits.append({key: about[key] for key in d.LIMITS})
        turns[theirs.name].append(theirs.turn())
        say(f"round {i + 1}: " + ", ".join(f"{name} {rounds[-1]}" for name, rounds in turns.items()))

    figures = {}
    for key, what in d.FIGURES.items():
        sides = {name: summary([r[key] for r in rounds]) for name, rounds in turns.items() if key in rounds[0]}
        if len(sides) == 2:
            sides["ratio"] = sides[ours.name]["median"] / sides[theirs.name]["median"]
            figures[key] = {"what": what, **sides, "llama.cpp setting": theirs.best[key]}
    measured = {key: [x[key] for x in limits if x[key] is not None] for key in limits[0]}
    machine_limits = {key: summary(values) for key, values in measured.items() if values}
    per_token = about["prefill_gmac_s"] / about["prefill_tok_s"]
    record = {
        "model": args.model.name,
        "model_bytes": args.model.stat().st_size,
        "commit": output("git", "describe", "--always", "--dirty", "--abbrev=12", cwd=ROOT).strip(),
        "date": time.strftime("%Y-%m-%d"),
        "compilers": [output("rustc", "--version").strip(), output("cc", "--version").splitlines()[0]],
        "cpu": cpu_name(),
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "load_before": load,
        "threads": args.threads,
        "isa": about["isa"],
        "llama.cpp": {**theirs.about, "cmake_args": os.environ.get("BENCH_CMAKE_ARGS", "unknown")},
        "limits": machine_limits,
        "figures": figures,
        "prefill_share_of_int8_peak":
            per_token * statistics.median(t["prefill_tok_s"] for t in turns[ours.name])
            / machine_limits["int8_peak_gmac_s"]["median"],
        "decode_share_of_reading": machine_limits["decode_read_share"]["median"],
        "first_token_ms": about["first_token_ms"],
        "process_of_one_token_s": ours.one_token_s(),
        "rss_anon_bytes": about["rss_anon_bytes"],
        "settings_tried": theirs.tried,
        "turns": turns,
    }
    out = args.out or HERE / "records" / f"{args.model.stem}-{about['isa']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    say(f"{out}")


if __name__ == "__main__":
    main()
