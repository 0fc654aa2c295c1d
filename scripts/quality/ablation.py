"""What each part of the better files brings: mean KL divergence of the tiny model's files by kestrel itself.

    python scripts/quality/ablation.py CALIBRATION_TEXT [--model DIR] [--text FILE] [--work DIR] [--kestrel BINARY]

Calibrates on CALIBRATION_TEXT (of the record: bytes 100000 to 170000 of each of the six novels that scripts/train/texts.py
writes), writes a file for each combination at the sizes of llama-quantize's Q3_K_M, Q4_K_M and Q5_K_M, measures all on the
held-out text and prints a table in Markdown. Standard library only.
"""

import argparse
import json
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
# llama-quantize with an importance matrix, measured by llama-perplexity: file bytes and mean KL divergence.
PEER = {"q4_k_m": (4139360, 0.006937), "q3_k_m": (3464800, 0.027482), "q5_k_m": (4774240, 0.002450)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("calibration_text", type=pathlib.Path)
    p.add_argument("--model", type=pathlib.Path, default=ROOT / "tests/data/tiny-falcon-mamba")
    p.add_argument("--text", type=pathlib.Path, default=ROOT / "tests/data/texts/a-tale-of-two-cities-200000.txt")
    p.add_argument("--work", type=pathlib.Path, default=ROOT / "target/ablation")
    p.add_argument("--kestrel", type=pathlib.Path, default=ROOT / "target/release/kestrel")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base, logits, imatrix, calibration = (args.work / n for n in ("base.gguf", "base.kl", "i.gguf", "c.gguf"))

    def kestrel(*arguments):
        command = [args.kestrel, *arguments]
        return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout

    def once(path, *arguments):
        if not path.exists():
            kestrel(*arguments)

    once(base, "convert", args.model, "-o", base, "--type", "f32")
    once(logits, "perplexity", base, "-f", args.text, "--save-kl-base", logits)
    once(imatrix, "imatrix", base, "-f", args.calibration_text, "-o", imatrix)
    once(calibration, "calibrate", base, "-f", args.calibration_text, "-o", calibration, "--kl-chunks", 16)

    def measured(what, *options):
        out = args.work / "out.gguf"
        kestrel("quantize", base, "-o", out, "--force", *options)
        kl = json.loads(kestrel("perplexity", out, "--kl-base", logits, "--json"))
        print(f"| {what} | {out.stat().st_size} | {kl['perplexity']:.3f} | {kl['mean_kl']:.6f} | "
              f"{100 * kl['same_top1']:.2f} |", end="", flush=True)
        return kl["mean_kl"]

    def types(size):
        """The types chosen for this size, as options."""
        plan = kestrel("quantize", base, "--calibration", calibration, "--target-size", size, "--dry-run")
        rows = re.findall(r"^ *(\S+\.weight) .* (\S+) +\d+ +0\.\d+$", plan, re.M)
        return [o for name, ty in rows for o in ("--tensor-type", f"^{re.escape(name)}$={ty}")]

    print("| file | bytes | PPL | mean KL | same top-1 % | of the peer's |\n|---|---|---|---|---|---|")
    fed, best = ["--calibration", calibration], ["--search", "best"]
    for name, (size, peer) in PEER.items():
        alike, chosen = ["--type", name], ["--type", name, *types(size)]
        cases = [
            (name, alike),
            ("+ importance matrix", [*alike, "--imatrix", imatrix]),
            ("+ error feedback", [*alike, *fed]),
            ("+ `--search best`", [*alike, *fed, *best]),
            (f"types chosen for {size} bytes", chosen),
            ("+ importance matrix", [*chosen, "--imatrix", imatrix]),
            ("+ error feedback (`--target-size`)", [*fed, "--target-size", size]),
            ("+ `--search best`", [*fed, *best, "--target-size", size]),
        ]
        for what, options in cases:
            print(f" {measured(what, *options) / peer:.2f} |", flush=True)
    for name in ("ssm_s", "ssm_m", "ssm_l"):
        measured(name, "--type", name)
        print(" |", flush=True)
        measured("+ error feedback, `--search best`", "--type", name, *fed, *best)
        print(" |", flush=True)


if __name__ == "__main__":
    main()
