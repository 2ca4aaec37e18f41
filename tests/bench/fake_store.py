"""A store of another engine that stores nothing and takes two seconds for everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

load = json.loads(sys.stdin.readline())
Path(load["place"], "file").write_bytes(bytes(10_000))
print(json.dumps({"ready": {"version": "fake"}}), flush=True)
for line in sys.stdin:
    assert json.loads(line)["do"] in ("put", "get", "clear")
    print(json.dumps({"seconds": 2.0}), flush=True)
