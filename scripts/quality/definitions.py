"""What is measured. A file is one line: its name in the table, who makes it, how, and whether with the importance
matrix."""
import collections
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/data/tiny-falcon-mamba"
TEXT = ROOT / "tests/data/texts/a-tale-of-two-cities-200000.txt"
# The importance matrix is measured on text that the model itself wrote, which needs no second corpus.
CALIBRATION = "-p It\\ was -n 8192 --temp 1 --top-k 0 --top-p 1 --min-p 0 --seed 1 --ignore-eos"

File = collections.namedtuple("File", "name maker how imatrix")
KESTREL, LLAMA = "kestrel", "llama-quantize"

WITHOUT = "bf16 f16 q8_0 q6_k q5_1 q5_k_m q5_0 q4_1 q4_k_m iq4_nl q4_0 iq4_xs q3_k_m q2_k".split()
WITH = "q6_k q5_1 q5_k_m q5_0 q4_1 q4_k_m iq4_nl q4_0 iq4_xs q3_k_m q2_k".split()

FILES = [
    *(File(kind, KESTREL, f"--type {kind}", False) for kind in WITHOUT),
    *(File(kind, KESTREL, f"--type {kind}", True) for kind in WITH),
    *(File(kind, LLAMA, kind, False) for kind in WITHOUT),
    *(File(kind, LLAMA, kind, True) for kind in WITH),
    # Recipes of Kestrel's own go here: File("name", KESTREL, "--type …", True),
]
