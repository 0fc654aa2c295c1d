#!/usr/bin/env python3
"""The README's table (on stdout) and plot (kl-against-size.svg beside this file) of what measure.py recorded."""
import json
import math
import pathlib

import definitions as d
from measure import RECORD, key

SVG = pathlib.Path(__file__).resolve().parent / "kl-against-size.svg"
# Width and height of the picture, and of what lies around the axes.
W, H, LEFT, TOP, RIGHT, BOTTOM = 760, 480, 64, 16, 16, 48
# (maker, what importance is known by): colour, filled, name
SERIES = {
    (d.KESTREL, d.CALIBRATION): ("#15803d", True, "Kestrel, calibration"),
    (d.KESTREL, d.IMATRIX): ("#c2410c", True, "Kestrel, importance matrix"),
    (d.KESTREL, d.NOTHING): ("#c2410c", False, "Kestrel"),
    (d.LLAMA, d.IMATRIX): ("#1d4ed8", True, "llama-quantize, importance matrix"),
    (d.LLAMA, d.NOTHING): ("#1d4ed8", False, "llama-quantize"),
}


def table(files):
    print("| type | with | bits per weight | 7B file | mean KL | same top token | perplexity "
          "| llama-quantize: mean KL | same top token | perplexity |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    ours = [f for f in d.FILES if f.maker == d.KESTREL and key(f) in files]
    for f in sorted(ours, key=lambda f: (-files[key(f)]["7b"]["file_bytes"], f.name, f.by)):
        mine = files[key(f)]
        theirs = files.get(key(f._replace(maker=d.LLAMA)))
        size = mine["7b"]
        print(f"| {f.name} | {f.by} | {size['bits_per_weight']:.2f} "
              f"| {size['file_bytes'] / 1e9:.2f} GB | {figures(mine)} | {figures(theirs) if theirs else ' | | '} |")


def figures(m):
    kl = f"{m['mean_kl']:.6f} ± {m['mean_kl_stderr']:.6f}" if m["mean_kl"] > 1e-5 else f"{m['mean_kl']:.0e}"
    return f"{kl} | {100 * m['same_top1']:.2f} % | {m['perplexity']:.3f}"


def plot(files):
    known = [f for f in d.FILES if key(f) in files and f.name not in ("bf16", "f16")]
    size = {f.name: files[key(f)]["7b"]["file_bytes"] / 1e9 for f in known if f.maker == d.KESTREL}
    points = [(f, size[f.name], files[key(f)]["mean_kl"]) for f in known]
    x_max = math.ceil(max(x for _, x, _ in points))
    x_min = math.floor(min(x for _, x, _ in points))
    y_min, y_max = (round_to(math.log10(y(kl for *_, kl in points)))
                    for y, round_to in ((min, math.floor), (max, math.ceil)))

    def at(x, kl):
        return (LEFT + (x - x_min) / (x_max - x_min) * (W - LEFT - RIGHT),
                TOP + (y_max - math.log10(kl)) / (y_max - y_min) * (H - TOP - BOTTOM))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="12">',
           f'<rect width="{W}" height="{H}" fill="white"/>']
    for x in range(x_min, x_max + 1):
        px, _ = at(x, 1)
        out.append(f'<line x1="{px:.1f}" y1="{TOP}" x2="{px:.1f}" y2="{H - BOTTOM}" stroke="#ddd"/>'
                   f'<text x="{px:.1f}" y="{H - BOTTOM + 16}" text-anchor="middle">{x}</text>')
    for decade in range(y_min, y_max + 1):
        for digit in (1, 2, 5):
            kl = digit * 10.0 ** decade
            if kl <= 10.0 ** y_max:
                _, py = at(x_min, kl)
                out.append(f'<line x1="{LEFT}" y1="{py:.1f}" x2="{W - RIGHT}" y2="{py:.1f}" stroke="#ddd"/>'
                           f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{kl:g}</text>')
    out.append(f'<text x="{(LEFT + W) / 2}" y="{H - 8}" text-anchor="middle">size of a 7B file, GB</text>')
    out.append(f'<text x="14" y="{H / 2}" text-anchor="middle" transform="rotate(-90 14 {H / 2})">'
               "mean KL divergence from F32, nats (tiny model)</text>")
    labels = {}
    for f, x, kl in points:
        px, py = at(x, kl)
        colour, filled, _ = SERIES[f.maker, f.by]
        out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" stroke="{colour}" stroke-width="1.5" '
                   f'fill="{colour if filled else "none"}"/>')
        if f.maker == d.KESTREL and f.name not in labels:
            # On the left where there is one on the right already.
            taken = any(abs(px - x) < 60 and abs(py - y) < 14 for x, y in labels.values())
            labels[f.name] = px, py
            out.append(f'<text x="{px - 7 if taken else px + 7:.1f}" y="{py - 5:.1f}" '
                       f'text-anchor="{"end" if taken else "start"}" fill="#444">{f.name}</text>')
    for i, (colour, filled, name) in enumerate(SERIES.values()):
        y = TOP + 18 + 18 * i
        out.append(f'<circle cx="{W - 240}" cy="{y}" r="4" stroke="{colour}" stroke-width="1.5" '
                   f'fill="{colour if filled else "white"}"/><text x="{W - 230}" y="{y + 4}">{name}</text>')
    SVG.write_text("\n".join([*out, "</svg>"]) + "\n")


if __name__ == "__main__":
    recorded = json.loads(RECORD.read_text())["files"]
    table(recorded)
    plot(recorded)
