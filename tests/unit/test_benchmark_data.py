"""The data benchmark runs at a small size and prints every figure; which figures, is the machine's affair."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIZES = {"documents": 20_000, "plan-tokens": 20_000_000, "packed-documents": 1000, "steps": 2, "tokens": 2_000_000}


def test_every_figure_is_printed() -> None:
    flags = [word for key, value in (SIZES | {"plain-tokens": 200_000}).items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "scripts/benchmark_data.py", *flags]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    for line in (
        r"planning on one core: 19,\d{3},\d{3} tokens of 64K rows from 20,000 documents",
        r"\d+\.\d s, \d+\.\d\d GiB peak",
        r"best_fit +\d\.\d{4}% padding, 0 splits",
        r"splits fall by 100\.0%",
        r"attention \+ linear, dealt +1\.0\d\d over a step",
        r"one loader process +[\d,]+",
        r"plain datasets loop +[\d,]+  \(ours, one process: \d+x\)",
    ):
        assert re.search(line, run.stdout), f"{line} is not in\n{run.stdout}"
