"""Writes the training text of train.py: English prose in the public domain that Debian packages bring.

    python scripts/train/texts.py OUT_DIR

Needs apt-get (for `apt-get download`; nothing is installed) and dpkg. Writes austen-0.txt ... austen-5.txt (the six
novels of r-cran-janeaustenr), kjv.txt (bible-kjv) and jargon.txt (jargon-text), one paragraph a line, UTF-8. None of it
is the held-out text, `tests/data/texts`, which is by another author.
"""

import gzip
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import zlib

PACKAGES = ["r-cran-janeaustenr", "bible-kjv", "bible-kjv-text", "jargon-text"]


def unpack(into: pathlib.Path) -> None:
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=into, check=True)
    for package in into.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, into], check=True)


def paragraphs(lines: list[str]) -> str:
    """Wrapped lines joined, an empty line ends a paragraph."""
    text = re.sub(r"\n\s*\n", "\x00", "\n".join(lines))
    return "\n".join(" ".join(p.split()) for p in text.split("\x00") if p.strip()) + "\n"


def r_strings(data: bytes) -> list[str]:
    """The character vector that an R object begins with (XDR serialization)."""
    at = data.index(b"\x00\x00\x00\x10") + 4  # STRSXP
    (count,) = struct.unpack_from(">I", data, at)
    at += 4
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">II", data, at)
        strings.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return strings


def novels(database: bytes) -> list[str]:
    """R's lazy-load database: each object is its length and a zlib stream."""
    at, out = 0, []
    while at < len(database):
        stream = zlib.decompressobj()
        data = stream.decompress(database[at + 4 :])
        at = len(database) - len(stream.unused_data)
        out.append(paragraphs(r_strings(data)))
    return out


def bible(root: pathlib.Path) -> str:
    run = [root / "usr/bin/bible", "-p", root / "usr/lib", "ge1:1-re22:21"]
    out = subprocess.run(run, capture_output=True, check=True, text=True).stdout
    return paragraphs(re.sub(r"(?m)^ +\d+ ", "", out).splitlines())


def jargon(root: pathlib.Path) -> str:
    lines = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode().splitlines()
    return paragraphs([line for line in lines if not re.search("[\u2500-\u257f]", line)])  # no tables


def main() -> None:
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        unpack(root)
        database = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
        texts = {f"austen-{i}": text for i, text in enumerate(novels(database))}
        texts |= {"kjv": bible(root), "jargon": jargon(root)}
    for name, text in texts.items():
        (out / f"{name}.txt").write_text(text)
        print(f"{name}.txt: {len(text.encode())} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
