#!/usr/bin/env python3
"""Importance matrices of the tiny model, as llama-imatrix lays them out, in tests/data/imatrix/.

tiny.gguf has made-up numbers that a test knows: column i of layer l has the sum 64 * (1 + i % 7) * (l + 1), counted 64
times. tiny-transformers.gguf is measured: transformers' FalconMamba in float32 reads windows of a text, and hooks see
what goes into each matrix.

    python scripts/oracle/imatrix.py        (gguf, numpy, torch, transformers, tokenizers)
"""
import pathlib

import gguf
import numpy as np
import tokenizers
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/data/imatrix"
TINY = ROOT / "tests/data/tiny-falcon-mamba"
TEXT = ROOT / "tests/data/texts/a-tale-of-two-cities-200000.txt"
LAYERS, COLUMNS, COUNT = 6, {"ssm_in": 256, "ssm_x": 512, "ssm_dt": 256, "ssm_out": 512}, 64
N_CTX, N_WINDOWS = 128, 4


class Writer(gguf.GGUFWriter):
    def add_architecture(self):  # such files name none
        pass


def write(name, dataset, chunks, chunk_size, sums):
    """sums: weight -> (sums of squares, count)."""
    w = Writer(OUT / name, "")
    w.add_type("imatrix")
    w.add_array("imatrix.datasets", [dataset])
    w.add_uint32("imatrix.chunk_count", chunks)
    w.add_uint32("imatrix.chunk_size", chunk_size)
    for weight, (values, count) in sums.items():
        w.add_tensor(f"{weight}.in_sum2", values.astype(np.float32).reshape(1, -1))
        w.add_tensor(f"{weight}.counts", np.full((1, 1), count, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def made_up():
    return {f"blk.{layer}.{name}.weight": (COUNT * (1 + np.arange(columns) % 7) * (layer + 1), COUNT)
            for layer in range(LAYERS) for name, columns in COLUMNS.items()}


def measured():
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    config = model.config
    sums = {}

    def add(weight, rows):
        values, count = sums.get(weight, (0, 0))
        rows = rows.reshape(-1, rows.shape[-1]).double()
        sums[weight] = (values + rows.square().sum(0).numpy(), count + len(rows))

    def see(module, weight):
        module.register_forward_pre_hook(lambda _, args: add(weight, args[0].detach()))

    for i, layer in enumerate(model.backbone.layers):
        mixer = layer.mixer
        see(mixer.in_proj, f"blk.{i}.ssm_in.weight")
        see(mixer.x_proj, f"blk.{i}.ssm_x.weight")
        see(mixer.out_proj, f"blk.{i}.ssm_out.weight")

        def see_dt(_, __, out, i=i):  # dt_proj's weight is used without calling the module
            dt = out.detach().double()[..., :config.time_step_rank]
            add(f"blk.{i}.ssm_dt.weight", dt * torch.rsqrt(dt.square().mean(-1, keepdim=True) + config.mixer_rms_eps))
        mixer.x_proj.register_forward_hook(see_dt)
    see(model.lm_head, "output.weight")

    ids = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(TEXT.read_text()[:20000]).ids
    with torch.no_grad():
        for window in range(N_WINDOWS):
            model(torch.tensor([ids[window * N_CTX:(window + 1) * N_CTX]]))
    assert all(count == N_CTX * N_WINDOWS for _, count in sums.values()) and len(sums) == 4 * LAYERS + 1
    return sums


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    write("tiny.gguf", "calibration.txt", 12, 512, made_up())
    write("tiny-transformers.gguf", TEXT.name, N_WINDOWS, N_CTX, measured())
