"""What is measured. The runner is compare.py, the results are in records/.

Prefill is the time until the logits after the last of PREFILL tokens are there, from an empty state. Decode is the mean
over DECODE steps of one token each, after a prompt of a few tokens. Decoding together is the total over all sequences,
one token of each per step. Loading, sampling and tokenization are in no figure. Both programs read the same file, get
the same number of threads, and take turns in processes of their own; a figure is the median over the turns.

llama.cpp gets the best of its settings for each figure: where the weights go (llama_worker.PLACES: its plain, AMX and
repacked kernels) and the physical batch.
"""

PREFILL = 512
DECODE = 32
BATCHES = (8, 32)
BATCH_STEPS = 6

WEIGHTS = ("extra", "plain", "repacked")
UBATCH = (512, 256, 1024)
ROUNDS = 5

# Of the machine, measured by our side in each of its turns. The share of reading is that of reading other memory between
# the tokens: where a machine is shared, its speed changes from second to second.
LIMITS = ("read_gb_s", "int8_peak_gmac_s", "f32_peak_gmac_s", "read_between_gb_s", "decode_read_share", "answer_ns")

# The load average above which a machine is not quiet.
QUIET = 0.6

FIGURES = {
    "prefill_tok_s": f"prefill of {PREFILL}",
    "decode_tok_s": "decode",
    **{f"batch_{n}_tok_s": f"decode of {n} sequences together" for n in BATCHES},
}
