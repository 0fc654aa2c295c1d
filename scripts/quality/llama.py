"""llama.cpp as a library (llama-cpp-python's C API): what llama-quantize and llama-perplexity do, as functions.

The measures are written from llama.cpp's description of them, in numpy, so that they are a second opinion on both sides'
files: windows without overlap, each from an empty state, the second half of each scored, a base file with 16 bits per
log-probability.
"""
import ctypes
import os
import pathlib
import struct

import gguf
import llama_cpp as ll
import numpy as np

THREADS = min(8, os.cpu_count())
# A token is left out of a base file if it is this much less likely than the most likely one, in nats.
LEAST = np.float32(16)


@ll.llama_log_callback
def quiet(level, text, data):
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        print(text.decode(errors="replace"), end="", flush=True)


ll.llama_log_set(quiet, ctypes.c_void_p(0))
ll.llama_backend_init()


def imatrix(path):
    """Mean squares per column by the weight's name, from a file in GGUF."""
    tensors = {t.name: t.data.reshape(-1) for t in gguf.GGUFReader(path).tensors}
    return {name[:-8]: (sums / tensors[name[:-8] + ".counts"][0]).astype(np.float32)
            for name, sums in tensors.items() if name.endswith(".in_sum2")}


def quantize(source, target, kind, importance=None):
    """llama-quantize SOURCE TARGET KIND [--imatrix FILE]."""
    params = ll.llama_model_quantize_default_params()
    kind = kind.upper()
    params.ftype = getattr(ll, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = THREADS
    if importance:
        kept = imatrix(importance)
        rows = (ll.llama_model_imatrix_data * (len(kept) + 1))()  # an entry without a name is the end
        for row, (name, values) in zip(rows, kept.items()):
            row.name, row.size = name.encode(), values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = rows
    failed = ll.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert not failed, f"llama.cpp did not quantize {source} to {kind}"


class Model:
    """A model that reads windows of `n_ctx` tokens."""

    def __init__(self, path, n_ctx=512):
        self.n_ctx = n_ctx
        params = ll.llama_model_default_params()
        params.use_extra_bufts = False  # repacked weights crash in this build where the CPU has AMX
        self.model = ll.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"
        params = ll.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = THREADS
        self.context = ll.llama_init_from_model(self.model, params)
        self.vocabulary = ll.llama_model_get_vocab(self.model)
        self.n_vocab = ll.llama_vocab_n_tokens(self.vocabulary)
        self.batch = ll.llama_batch_init(n_ctx, 0, 1)

    def close(self):
        ll.llama_batch_free(self.batch)
        ll.llama_free(self.context)
        ll.llama_model_free(self.model)

    def tokens(self, text):
        text = text.encode()
        out = (ll.llama_token * (len(text) + 8))()
        n = ll.llama_tokenize(self.vocabulary, text, len(text), out, len(out), True, False)
        assert n >= 0
        return np.array(out[:n], np.int32)

    def windows(self, tokens):
        """Logits (scored positions, vocab) and the tokens that follow, window by window."""
        n_ctx, first = self.n_ctx, self.n_ctx // 2
        for start in range(0, len(tokens) // n_ctx * n_ctx, n_ctx):
            window = tokens[start:start + n_ctx]
            ll.llama_memory_clear(ll.llama_get_memory(self.context), True)
            self.batch.n_tokens = n_ctx
            for i, token in enumerate(window):
                self.batch.token[i], self.batch.pos[i] = int(token), i
                self.batch.n_seq_id[i], self.batch.seq_id[i][0], self.batch.logits[i] = 1, 0, True
            assert ll.llama_decode(self.context, self.batch) == 0
            logits = np.ctypeslib.as_array(ll.llama_get_logits(self.context), (n_ctx, self.n_vocab))
            yield logits[first:n_ctx - 1].copy(), window[first + 1:]


def log_sum_exp(logits):
    top = logits.max(1)
    return top, np.log(np.exp(logits - top[:, None], dtype=np.float32).sum(1, dtype=np.float64)).astype(np.float32)


def save_base(path, model, tokens):
    """llama-perplexity --kl-divergence-base PATH; returns the perplexity."""
    n_windows = len(tokens) // model.n_ctx
    tokens = tokens[:n_windows * model.n_ctx]
    total = n = 0
    with open(path, "wb") as file:
        file.write(b"_logits_" + struct.pack("<3i", model.n_ctx, model.n_vocab, n_windows) + tokens.tobytes())
        for logits, following in model.windows(tokens):
            top, lse = log_sum_exp(logits)
            total += (top + lse - logits[np.arange(len(following)), following]).sum(dtype=np.float64)
            n += len(following)
            low = np.maximum(logits.min(1), top - LEAST)
            scale = ((top - low) / np.float32(65535)).astype(np.float32)
            codes = np.where(logits > low[:, None], np.rint((logits - low[:, None]) / scale[:, None]), 0)
            row = np.zeros((len(logits), 4 + model.n_vocab + model.n_vocab % 2), "<u2")
            row[:, :2] = scale.astype("<f4").view("<u2").reshape(-1, 2)
            row[:, 2:4] = (low - top - lse).astype("<f4").view("<u2").reshape(-1, 2)
            row[:, 4:4 + model.n_vocab] = codes
            file.write(row.tobytes())
    return np.exp(total / n)


def against_base(path, model):
    """llama-perplexity --kl-divergence: perplexity, and the figures of the divergence from the base in this file."""
    data = np.memmap(path, np.uint8)
    assert bytes(data[:8]) == b"_logits_"
    n_ctx, n_vocab, n_windows = struct.unpack("<3i", data[8:20])
    assert (n_ctx, n_vocab) == (model.n_ctx, model.n_vocab)
    rows_at = 20 + 4 * n_ctx * n_windows
    tokens = np.frombuffer(data[20:rows_at], "<i4")
    rows = data[rows_at:].view("<u2").reshape(n_windows, n_ctx - 1 - n_ctx // 2, -1)
    kl, same, change, surprise = [], [], [], []
    for row, (logits, following) in zip(rows, model.windows(tokens)):
        row = np.ascontiguousarray(row)
        scale, least = (row[:, i:i + 2].copy().view("<f4") for i in (0, 2))
        base = scale * row[:, 4:4 + n_vocab].astype(np.float32) + least
        top, lse = log_sum_exp(logits)
        mine = logits - (top + lse)[:, None]
        terms = np.where(base > -LEAST, np.exp(base, dtype=np.float64) * (base - mine), 0)
        kl.append(terms.sum(1))
        same.append(base.argmax(1) == logits.argmax(1))
        at = np.arange(len(following)), following
        change.append(np.exp(mine[at]) - np.exp(base[at]))
        surprise.append(-mine[at])
    kl, same, change, surprise = (np.concatenate(x).astype(np.float64) for x in (kl, same, change, surprise))
    return dict(perplexity=np.exp(surprise.mean()), mean_kl=kl.mean(), median_kl=np.median(kl),
                p99_kl=np.quantile(kl, 0.99), max_kl=kl.max(), same_top1=same.mean(),
                rms_change=np.sqrt((change ** 2).mean()))


def text_of(path, n_bytes=None):
    return pathlib.Path(path).read_bytes()[:n_bytes].decode()
