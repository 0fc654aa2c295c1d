"""Kestrel as a model of EleutherAI's lm-evaluation-harness, for tasks that are scored by log-likelihoods.

    import kestrel_lm                                                     # registers the name
    lm_eval.simple_evaluate(model="kestrel", model_args="model=falcon.gguf,binary=target/release/kestrel", tasks=[…])

`run.py` beside this file is the harness's own command line with that import.
"""
import json
import pathlib
import subprocess
import tempfile

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model


@register_model("kestrel")
class Kestrel(LM):
    """Hands all requests of a task to one `kestrel eval`, which tokenizes as the harness's own models do."""

    def __init__(self, model, binary="kestrel", max_length=2048, options="", **ignored):
        """`options` are further arguments of the binary, such as `--precise`; the harness's batch size and device mean
        nothing here."""
        super().__init__()
        self.command = [binary, "eval", model, "--max-length", str(max_length), *str(options).split()]

    def answers(self, requests):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "requests.jsonl"
            file.write_text("".join(json.dumps(r) + "\n" for r in requests))
            done = subprocess.run([*self.command, "--requests", file], stdout=subprocess.PIPE, text=True, check=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(requests)
        return answers

    def loglikelihood(self, requests, disable_tqdm=False):
        asked = [dict(context=context, continuation=text) for context, text in (r.args for r in requests)]
        return [(a["loglikelihood"], a["is_greedy"]) for a in self.answers(asked)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [a["loglikelihood"] for a in self.answers([dict(rolling=r.args[0]) for r in requests])]

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError("kestrel eval scores texts; it does not write them")
