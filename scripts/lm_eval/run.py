#!/usr/bin/env python3
"""lm-evaluation-harness's command line, with the model `kestrel`.

    scripts/lm_eval/run.py run --model kestrel --model_args model=falcon.gguf,binary=target/release/kestrel \\
        --include_path scripts/lm_eval/task --tasks kestrel_next_word
"""
import kestrel_lm  # noqa: F401  registers the model
from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
