#!/usr/bin/env python3
"""Records as the table of the README: table.py [RECORD ...]; all records by default."""
import json
import pathlib
import sys

import definitions as d

HERE = pathlib.Path(__file__).resolve().parent


def cell(side):
    return f"{side['median']:.1f} ({side['min']:.1f} to {side['max']:.1f})"


def share(record, key):
    of = {"prefill_tok_s": ("prefill_share_of_int8_peak", "int8 peak"),
          "decode_tok_s": ("decode_share_of_reading", "reading")}.get(key)
    return f"{100 * record[of[0]]:.0f} % of {of[1]}" if of else ""


def main():
    paths = [pathlib.Path(a) for a in sys.argv[1:]] or sorted((HERE / "records").glob("*.json"))
    print("| file | instructions | | Kestrel, tok/s | llama.cpp, tok/s | ratio | of the machine's limit |")
    print("|---|---|---|---|---|---|---|")
    for path in paths:
        record = json.loads(path.read_text())
        for key in d.FIGURES:
            if key not in record["figures"]:
                continue
            f = record["figures"][key]
            print(f"| {record['model']} | {record['isa']} | {f['what']} | {cell(f['kestrel'])} | {cell(f['llama.cpp'])} "
                  f"| {f['ratio']:.2f} | {share(record, key)} |")


if __name__ == "__main__":
    main()
