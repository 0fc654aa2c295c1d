"""What gguf-rs (scripts/peers/gguf-rs, a package of its own) says about a file that we wrote, against what we say."""
import json
import pathlib
import subprocess

import gguf
import numpy as np

# gguf-rs 0.1.8 takes 256 as the block length of every type from id 10 on. These types have blocks of 1 and 32, so that
# the sizes that it gives come out this many times too small. Everything else that it says is right.
SIZE_TOO_SMALL = {"BF16": 256, "IQ4_NL": 8}


def read(peer, path) -> tuple[dict, list]:
    done = subprocess.run([peer, "read", path], capture_output=True, text=True)
    assert done.returncode == 0, (path.name, done.stderr)
    head, *tensors = map(json.loads, done.stdout.splitlines())
    return head, tensors


def check_metadata(head, path):
    """Every key and value, whole arrays too, against the gguf package."""
    fields = gguf.GGUFReader(path).fields
    theirs = {name: f.contents() for name, f in fields.items() if not name.startswith("GGUF.")}
    assert len(theirs) > 25 and set(theirs) == set(head["metadata"]), set(theirs) ^ set(head["metadata"])
    for name, value in theirs.items():
        found = head["metadata"][name]
        if fields[name].types[-1] == gguf.GGUFValueType.FLOAT32:
            value, found = np.float32(value), np.float32(found)
        assert found == value, f"{path.name}: {name}"


def check(peer, path, inspected, dequantized) -> set:
    """`inspected` is `kestrel inspect --json`, `dequantized` a folder with our values. Returns the types seen."""
    head, theirs = read(peer, path)
    ours = inspected["tensors"]
    assert (head["version"], head["alignment"]) == ("v3", inspected["alignment"]), head
    assert len(ours) == len(theirs) == head["n_tensors"] == 63, (len(ours), len(theirs))
    check_metadata(head, path)
    data = path.read_bytes()
    for our, their in zip(ours, theirs):
        where = f"{path.name}: {our['name']} ({our['type']})"
        start = head["data_offset"] + their["offset"]
        assert their["name"] == our["name"], (where, their)
        assert their["type"] == our["type"], (where, their)
        assert their["shape"] == our["shape"][::-1], (where, their)
        assert start == our["offset"], (where, their)
        size = their["size"] * SIZE_TOO_SMALL.get(our["type"], 1)
        assert size == our["n_bytes"], (where, their)
        raw = np.frombuffer(data, np.uint8, size, start)
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(their["kind"])).astype("<f4")
        mine = np.fromfile(pathlib.Path(dequantized) / f"{our['name']}.f32", "<f4")
        assert values.size == mine.size == np.prod(their["shape"]), where
        assert (values.view(np.uint32) == mine.view(np.uint32)).all(), where
    return {t["type"] for t in theirs}
