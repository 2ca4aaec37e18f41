"""A peer that computes nothing: its tokens are the prompt's own, and it behaves as it is told.

The folder that it is to load names its behaviour; with float16 it fails at the third prompt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def load(model, dtype, threads, max_tokens):
    behaviour = "fails" if dtype == "float16" else Path(model).name
    print(f"loading {behaviour} for {max_tokens} tokens")  # on stdout, as many do
    if behaviour == "refuses":
        raise ValueError("no [weights]\nof that kind")
    if behaviour == "dies":
        sys.stderr.write("first line\nout of luck\n")
        sys.stderr.flush()
        os._exit(7)
    if behaviour == "never loads":
        time.sleep(600)
    if behaviour == "tires":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(model).with_name("child").write_text(str(child.pid))
    prompts = []

    def generate(ids, new_tokens, emit):
        print("generating")
        if behaviour == "tires" and prompts:
            time.sleep(600)
        if behaviour == "fails" and len(prompts) == 2:
            raise RuntimeError("two prompts were enough")
        prompts.append(ids)
        for token_id in ids[: new_tokens - (behaviour == "stops early")]:
            emit(token_id)

    facts = {"version": f"{dtype}, {threads} threads", "prefix_cache": behaviour != "plain"}
    return generate, facts
