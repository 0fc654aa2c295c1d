#!/usr/bin/env python3
"""Shows lm-evaluation-harness at work with Kestrel on two small tasks that need no download, and checks the result
against the harness's own Hugging Face model in float32 on the same checkpoint.

    scripts/lm_eval/check.py KESTREL            (lm_eval, torch, transformers)

The tasks are made from the text that comes with the tests: which of four passages goes on from a beginning, and the
perplexity of whole paragraphs. check.txt is a run of it.
"""
import json
import pathlib
import random
import re
import sys
import tempfile

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kestrel_lm import Kestrel

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/data/tiny-falcon-mamba"
TEXT = ROOT / "tests/data/texts/a-tale-of-two-cities-200000.txt"
N_QUESTIONS, N_DOCUMENTS = 60, 20

CHOICE = """\
task: kestrel_continuation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{beginning}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: right
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: kestrel_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


def make_tasks(folder):
    """Questions and documents from the text's paragraphs, the same at every run."""
    paragraphs = [re.sub(r"\s+", " ", p).strip() for p in TEXT.read_text().split("\n")]
    paragraphs = [p for p in paragraphs if 40 <= len(p.split()) <= 200]
    dice = random.Random(1)
    dice.shuffle(paragraphs)
    # The beginning of each, its own next ten words, and those of three others.
    halves = [(" ".join(p.split()[:24]), " ".join(p.split()[24:34])) for p in paragraphs]
    questions = []
    for i, (beginning, ending) in enumerate(halves[:N_QUESTIONS]):
        others = [e for j, (_, e) in enumerate(halves) if j != i]
        endings = [ending, *dice.sample(others, 3)]
        dice.shuffle(endings)
        questions.append(dict(beginning=beginning, endings=endings, right=endings.index(ending)))
    for name, template, rows in [("continuation", CHOICE, questions),
                                 ("perplexity", ROLLING, [dict(text=p) for p in paragraphs[:N_DOCUMENTS]])]:
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(template.format(data=data))


def evaluate(model, tasks):
    done = lm_eval.simple_evaluate(model=model, tasks=["kestrel_continuation", "kestrel_perplexity"], task_manager=tasks,
                                   bootstrap_iters=0, log_samples=True)
    answers = {name: [s["resps"] for s in sorted(rows, key=lambda s: s["doc_id"])]
               for name, rows in done["samples"].items()}
    figures = {f"{task} {name.split(',')[0]}": value for task, row in done["results"].items()
               for name, value in row.items() if isinstance(value, float) and "stderr" not in name}
    return figures, answers


def flat(answers):
    """Every (log-likelihood, is greedy) in order; a rolling answer has no second part."""
    for rows in answers.values():
        for row in rows:
            for answer in row:
                answer = answer[0] if isinstance(answer, list) else answer
                yield (answer[0], answer[1]) if isinstance(answer, tuple) else (answer, True)


def main():
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as folder:
        make_tasks(pathlib.Path(folder))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        mine = evaluate(Kestrel(str(TINY), binary), tasks)
        peer = HFLM(str(TINY), dtype=torch.float32, device="cpu", batch_size=1, max_length=2048)
        theirs = evaluate(peer, tasks)
        # Windows shorter than a document.
        short = evaluate(Kestrel(str(TINY), binary, max_length=64), tasks)
        peer_short = evaluate(HFLM(pretrained=peer.model, tokenizer=peer.tokenizer, batch_size=1, max_length=64), tasks)
    print(f"{'':40}  {'kestrel':>12}  {'transformers':>12}")
    failed = False
    for title, (figures, answers), (want, wanted) in [("", mine, theirs), (", at most 64 tokens", short, peer_short)]:
        for name, value in figures.items():
            print(f"{name + title:50}  {value:12.6f}  {want[name]:12.6f}")
            failed |= abs(value / want[name] - 1) > 1e-4
        pairs = list(zip(flat(answers), flat(wanted), strict=True))
        worst = max(abs(a[0] - b[0]) for a, b in pairs)
        same = sum(a[1] == b[1] for a, b in pairs)
        print(f"{len(pairs)} log-likelihoods{title}: off by at most {worst:.2g}, is_greedy is the same for {same}")
        failed |= worst > 2e-3 or same < len(pairs)
    if failed:
        sys.exit("the two do not agree")


if __name__ == "__main__":
    main()
