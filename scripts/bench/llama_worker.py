#!/usr/bin/env python3
"""llama.cpp on one GGUF with one setting, through ctypes: one JSON object on stdout.

One process per setting, so that no setting sees another's memory or threads. What is timed is `llama_decode` and
`llama_synchronize`; tokens are drawn beforehand. Medians are the caller's business: every repeat is reported.
"""
import argparse
import ctypes
import json
import pathlib
import random
import time

import llama_cpp
import llama_cpp.llama_cpp as ll

PROMPT = 8  # tokens of each sequence before sequences are decoded together


# Where the layers' matrices go.
PLACES = {
    "plain": "as they are in the file",
    "extra": "whatever llama.cpp chooses for this machine: AMX or repacked",
    "repacked": "repacked even where there is AMX; only for types that have such kernels",
}


class Override(ctypes.Structure):
    """llama_model_tensor_buft_override: the tensors whose name the pattern finds, and their buffer type."""
    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def repacked():
    """The layers' matrices into CPU_REPACK, whose function llama.cpp exports under its C++ name only."""
    # The copy of the library that is loaded already: a wheel has a file for each name of it.
    folder = pathlib.Path(llama_cpp.__file__).parent / "lib"
    function = ctypes.CDLL(folder / "libggml-cpu.so.0")._Z35ggml_backend_cpu_repack_buffer_typev
    function.restype = ctypes.c_void_p
    return (Override * 2)(Override(rb"blk\..*\.ssm_(in|x|dt|out)\.weight", function()), Override())


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def quiet(_level, _text, _data):
    pass


class Context:
    """A model and a context; every figure is tokens per second."""

    def __init__(self, args):
        started = time.perf_counter()
        params = ll.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = args.weights == "extra"
        if args.weights == "repacked":
            self.overrides = repacked()
            params.tensor_buft_overrides = ctypes.cast(self.overrides, ctypes.c_void_p)
        self.model = ll.llama_model_load_from_file(args.model.encode(), params)
        assert self.model, f"llama.cpp does not load {args.model}"
        self.n_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.load_s = time.perf_counter() - started
        n_seqs = max([1, *args.batch])
        params = ll.llama_context_default_params()
        # A recurrent model's memory does not depend on n_ctx.
        params.n_ctx = n_seqs * 4096
        params.n_batch = max(args.prefill, args.ubatch, n_seqs * PROMPT)
        params.n_ubatch = args.ubatch
        params.n_seq_max = n_seqs
        params.n_threads = params.n_threads_batch = args.threads
        params.no_perf = True
        self.ctx = ll.llama_init_from_model(self.model, params)
        assert self.ctx, "llama.cpp makes no context"
        self.room = params.n_batch
        self.batch = ll.llama_batch_init(self.room, 0, 1)
        self.random = random.Random(1)

    def decode(self, entries):
        """One call: entries are (sequence, position, wants logits)."""
        assert len(entries) <= self.room
        b = self.batch
        b.n_tokens = len(entries)
        for i, (seq, pos, logits) in enumerate(entries):
            b.token[i] = self.random.randrange(self.n_vocab)
            b.pos[i] = pos
            b.n_seq_id[i] = 1
            b.seq_id[i][0] = seq
            b.logits[i] = logits
        started = time.perf_counter()
        status = ll.llama_decode(self.ctx, b)
        ll.llama_synchronize(self.ctx)
        seconds = time.perf_counter() - started
        assert status == 0, f"llama_decode: {status}"
        return seconds

    def clear(self):
        ll.llama_memory_clear(ll.llama_get_memory(self.ctx), True)

    def prefill(self, n):
        self.clear()
        return n / self.decode([(0, i, i == n - 1) for i in range(n)])

    def together(self, n_seqs, n_steps):
        """Tokens of all sequences per second, one of each at a time, after a prompt each."""
        self.clear()
        self.decode([(s, i, i == PROMPT - 1) for s in range(n_seqs) for i in range(PROMPT)])
        step = lambda i: self.decode([(s, PROMPT + i, True) for s in range(n_seqs)])
        step(0)
        return n_seqs * n_steps / sum(step(1 + i) for i in range(n_steps))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", choices=PLACES, default="extra")
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=0, help="tokens at once; 0 leaves it out")
    parser.add_argument("--decode", type=int, default=0, help="tokens one after the other; 0 leaves it out")
    parser.add_argument("--batch", type=int, nargs="*", default=[], help="numbers of sequences decoded together")
    parser.add_argument("--batch-steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    ll.llama_log_set(quiet, None)
    ll.llama_backend_init()
    context = Context(args)
    context.together(1, 1)  # touches every page of the weights
    result = {
        "load_s": context.load_s,
        "system_info": ll.llama_print_system_info().decode().strip(),
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "prefill_tok_s": [context.prefill(args.prefill) for _ in range(args.repeats) if args.prefill],
        "decode_tok_s": [context.together(1, args.decode) for _ in range(args.repeats) if args.decode],
        "batch_tok_s": {
            str(n): [context.together(n, args.batch_steps) for _ in range(args.repeats)] for n in args.batch
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
