#!/usr/bin/env python3
"""Write tests/data/imatrix/tiny.gguf: an importance matrix for the tiny model, as llama-imatrix lays it out.

The numbers are made up so that a test can know them: column i of layer l has the sum 64 * (1 + i % 7) * (l + 1),
counted 64 times.

    python scripts/oracle/imatrix.py
"""
import pathlib

import gguf
import numpy as np

LAYERS, COLUMNS, COUNT = 6, {"ssm_in": 256, "ssm_x": 512, "ssm_dt": 256, "ssm_out": 512}, 64


class Writer(gguf.GGUFWriter):
    def add_architecture(self):  # such files name none
        pass


out = pathlib.Path(__file__).parents[2] / "tests/data/imatrix/tiny.gguf"
out.parent.mkdir(exist_ok=True)
w = Writer(out, "")
w.add_type("imatrix")
w.add_array("imatrix.datasets", ["calibration.txt"])
w.add_uint32("imatrix.chunk_count", 12)
w.add_uint32("imatrix.chunk_size", 512)
for layer in range(LAYERS):
    for name, columns in COLUMNS.items():
        sums = (COUNT * (1 + np.arange(columns) % 7) * (layer + 1)).astype(np.float32)
        w.add_tensor(f"blk.{layer}.{name}.weight.in_sum2", sums.reshape(1, columns))
        w.add_tensor(f"blk.{layer}.{name}.weight.counts", np.full((1, 1), COUNT, np.float32))
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
