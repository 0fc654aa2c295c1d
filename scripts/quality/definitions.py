"""What is measured. A file is one line: its name in the table, who makes it, how, and whether with the importance
matrix."""
import collections
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/data/tiny-falcon-mamba"
TEXT = ROOT / "tests/data/texts/a-tale-of-two-cities-200000.txt"
# The importance matrix is measured on text that the model itself wrote, which needs no second corpus.
CALIBRATION = "-p It\\ was -n 8192 --temp 1 --top-k 0 --top-p 1 --min-p 0 --seed 1 --ignore-eos --threads 1"

File = collections.namedtuple("File", "name maker how imatrix")
KESTREL, LLAMA = "kestrel", "llama-quantize"

# In this order, so that a run that is cut short has the types that are used most.
TYPES = "q4_k_m q3_k_m q5_k_m iq4_xs q4_0 q6_k q2_k iq4_nl q5_0 q4_1 q5_1".split()

FILES = [
    *(File(kind, maker, f"--type {kind}" if maker == KESTREL else kind, imatrix)
      for kind in TYPES for imatrix in (False, True) for maker in (KESTREL, LLAMA)),
    *(File(kind, maker, f"--type {kind}" if maker == KESTREL else kind, False)
      for kind in ("q8_0", "bf16", "f16") for maker in (KESTREL, LLAMA)),
    # Recipes of Kestrel's own go here: File("name", KESTREL, "--type …", True),
]
