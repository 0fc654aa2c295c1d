"""A small GGUF file with every metadata value type and every tensor type that Kestrel reads, through gguf-py.

    python scripts/oracle/gguf_roundtrip.py make  [FILE]   writes it with gguf.GGUFWriter, and beside it a file split
                                                           in three
    python scripts/oracle/gguf_roundtrip.py check [FILE]   reads it with gguf.GGUFReader and compares everything

FILE is tests/data/gguf/every-type.gguf by default. The Rust test `gguf_files::our_layout_equals_gguf_pys` lays the
same content out and asks for identical bytes; so `check` shows as well that GGUFReader reads what Kestrel writes.
"""

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader, GGUFValueType as V, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

DEFAULT = Path(__file__).resolve().parents[2] / "tests/data/gguf/every-type.gguf"

# (key, value, type, element type): the extremes of each type.
PAIRS = [
    ("test.u8", 255, V.UINT8, None),
    ("test.i8", -128, V.INT8, None),
    ("test.u16", 65535, V.UINT16, None),
    ("test.i16", -32768, V.INT16, None),
    ("test.u32", 2**32 - 1, V.UINT32, None),
    ("test.i32", -(2**31), V.INT32, None),
    ("test.u64", 2**64 - 1, V.UINT64, None),
    ("test.i64", -(2**63), V.INT64, None),
    ("test.f32", 0.15625, V.FLOAT32, None),
    ("test.f64", -1e300, V.FLOAT64, None),
    ("test.bool", True, V.BOOL, None),
    ("test.string", "Ein Turmfalke, 紅隼, \U0001f985", V.STRING, None),
    ("test.empty", "", V.STRING, None),
    ("test.u8s", [0, 1, 255], V.ARRAY, V.UINT8),
    ("test.i8s", [-128, 0, 127], V.ARRAY, V.INT8),
    ("test.u16s", [0, 65535], V.ARRAY, V.UINT16),
    ("test.i16s", [-32768, 32767], V.ARRAY, V.INT16),
    ("test.u32s", [0, 2**32 - 1], V.ARRAY, V.UINT32),
    ("test.i32s", [-(2**31), 2**31 - 1], V.ARRAY, V.INT32),
    ("test.u64s", [0, 2**64 - 1], V.ARRAY, V.UINT64),
    ("test.i64s", [-(2**63), 2**63 - 1], V.ARRAY, V.INT64),
    ("test.f32s", [-0.5, 0.0, 65504.0], V.ARRAY, V.FLOAT32),
    ("test.f64s", [-0.5, 0.0, 1e-300], V.ARRAY, V.FLOAT64),
    ("test.bools", [True, False, True], V.ARRAY, V.BOOL),
    ("test.strings", ["", "a", "Ġkestrel", "隼"], V.ARRAY, V.STRING),
]
TYPES = [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K,
         Q.IQ4_NL, Q.IQ4_XS]


def tensors():
    """(name, type, byte array in numpy's order, shape): rows of 256 weights; F32 in one to four dimensions."""
    for t in TYPES:
        block, size = GGML_QUANT_SIZES[t]
        row = 256 // block * size
        yield f"{t.name.lower()}.weight", t, np.arange(2 * row).astype(np.uint8).reshape(2, row), (2, 256)
    for shape in [(3,), (2, 3), (2, 1, 3), (1, 2, 1, 3)]:
        n = int(np.prod(shape)) * 4
        yield f"dims{len(shape)}", Q.F32, np.arange(n).astype(np.uint8).reshape(*shape[:-1], 12), shape


def make(path):
    writer = GGUFWriter(path, "mamba")  # adds general.architecture
    for key, value, vtype, sub_type in PAIRS:
        writer.add_key_value(key, value, vtype, sub_type)
    for name, dtype, data, _ in tensors():
        if dtype in (Q.F32, Q.F16, Q.BF16):
            np_type = np.float32 if dtype == Q.F32 else np.float16
            # A view keeps the bytes; BF16 has no numpy type and travels as F16 would.
            writer.add_tensor(name, data.view(np_type), raw_dtype=dtype)
        else:
            writer.add_tensor(name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    make_split(path.with_name("split.gguf"))


def make_split(path):
    """Five tensors, two to a file: split-00001-of-00003.gguf and so on."""
    writer = GGUFWriter(path, "mamba", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(path):
    reader = GGUFReader(path)
    got = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(got) == ["general.architecture"] + [p[0] for p in PAIRS], list(got)
    for key, value, vtype, sub_type in PAIRS:
        field = got[key]
        assert field.types == [vtype] + ([sub_type] * (len(field.types) - 1) if sub_type is not None else []), key
        assert field.contents() == value, (key, field.contents(), value)
    expected = list(tensors())
    assert [t.name for t in reader.tensors] == [e[0] for e in expected]
    for t, (name, dtype, data, shape) in zip(reader.tensors, expected):
        assert t.tensor_type == dtype and tuple(t.shape) == tuple(reversed(shape)), (name, t.shape)
        assert t.data.tobytes() == data.tobytes(), name
    print(f"{path}: {len(PAIRS) + 1} keys and {len(expected)} tensors as expected")


if __name__ == "__main__":
    command, path = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else DEFAULT
    {"make": make, "check": check}[command](path)
