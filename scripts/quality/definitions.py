"""What is measured. A file is one line: its name in the table, who makes it, how, by what importance is known, and for
files of a given size the type that has this size."""
import collections
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/data/tiny-falcon-mamba"
TEXT = ROOT / "tests/data/texts/a-tale-of-two-cities-200000.txt"
# The importance matrix is measured on text that the model itself wrote, which needs no second corpus.
IMPORTANCE_TEXT = "-p It\\ was -n 8192 --temp 1 --top-k 0 --top-p 1 --min-p 0 --seed 1 --ignore-eos --threads 1"

File = collections.namedtuple("File", "name maker how by size_of", defaults=[None])
KESTREL, LLAMA = "kestrel", "llama-quantize"
# What importance is known by: nothing, an importance matrix, or `kestrel calibrate` on other novels than the measured one.
NOTHING, IMATRIX, CALIBRATION = "", "imatrix", "calibration"

# In this order, so that a run that is cut short has the types that are used most.
TYPES = "q4_k_m q3_k_m q5_k_m iq4_xs q4_0 q6_k q2_k iq4_nl q5_0 q4_1 q5_1".split()
RECIPES = "ssm_s ssm_m ssm_l".split()
SIZES = "q3_k_m q4_k_m q5_k_m".split()


def of_type(kind, by):
    return [File(kind, KESTREL, f"--type {kind}", by), File(kind, LLAMA, kind, by)]


FILES = [
    *(f for kind in TYPES[:5] for by in (NOTHING, IMATRIX) for f in of_type(kind, by)),
    *(File(f"size of {kind}", KESTREL, "--search best", CALIBRATION, kind) for kind in SIZES),
    *(File(kind, KESTREL, f"--type {kind}", NOTHING) for kind in RECIPES),
    *(File(kind, KESTREL, f"--type {kind} --search best", CALIBRATION) for kind in RECIPES),
    *(f for kind in TYPES[5:] for by in (NOTHING, IMATRIX) for f in of_type(kind, by)),
    *(f for kind in ("q8_0", "bf16", "f16") for f in of_type(kind, NOTHING)),
]
