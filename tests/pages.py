"""Runs a page's code as the build of the site does."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTENSIONS = ROOT / "docs" / "_extensions"


def run_blocks(tmp_path, *blocks):
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-W", "error", EXTENSIONS / "run_blocks.py", "page.md", out],
        input=json.dumps(blocks),
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
    )
    return done, json.loads(out.read_text()) if out.exists() else None
