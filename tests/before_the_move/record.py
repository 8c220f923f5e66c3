"""What the tests of this folder share: the command that trains, the machine of a record, and when numbers are the same.

Bits depend on the version of PyTorch, the processor and the number of threads. On the machine of the record (all runs
have one thread) every bit must be that of the record; elsewhere numbers may differ by 1e-5 of their size.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
MACHINE = FOLDER / "recorded/machine.json"
COMPARED = ("step", "loss", "grad_norm", "loss_by_source", "loss_by_position")
TOLERANCE = 1e-5


def machine() -> dict[str, str]:
    """What bits depend on."""
    import torch

    said = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    about = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in said.splitlines()}
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": " ".join(about.get(k, "?") for k in ("vendor_id", "cpu family", "model", "model name")),
    }


def environment() -> dict[str, str]:
    """For processes that train: one rank, one thread, this checkout."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in ranks}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def run(folder: Path, *command: str | Path) -> str:
    """A command of Python in `folder`; what it said, which an AssertionError shows where it failed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def train(folder: Path, toml: str, *overrides: str) -> None:
    run(folder, "-m", "torchtitan.train", "--job.config_file", toml, *overrides)


def exact(value: Any) -> Any:
    """The same with every float as its hexadecimal digits, which hold all of its bits."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return value.hex() if isinstance(value, float) else value


def metrics(file: Path, keys: tuple[str, ...] = COMPARED) -> list[dict[str, Any]]:
    """Of each line of metrics.jsonl the keys that are compared, exact."""
    return [exact({key: line[key] for key in keys}) for line in map(json.loads, file.read_text().splitlines())]


def differences(recorded: Any, found: Any, bits: bool, where: str = "") -> list[str]:
    """A line for each number that is not the recorded one; bits: to the last bit, else to TOLERANCE."""
    if isinstance(recorded, dict) and isinstance(found, dict) and list(recorded) == list(found):
        return [d for k in recorded for d in differences(recorded[k], found[k], bits, f"{where}.{k}")]
    if isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        return [d for i, (a, b) in enumerate(zip(recorded, found)) for d in differences(a, b, bits, f"{where}[{i}]")]
    if recorded == found:
        return []
    if is_hex(recorded) and is_hex(found):
        a, b = float.fromhex(recorded), float.fromhex(found)
        if not bits and math.isclose(a, b, rel_tol=TOLERANCE):
            return []
        return [f"{where}: {b!r}, recorded {a!r} (by {abs(b - a):.3g})"]
    return [f"{where}: {found!r}, recorded {recorded!r}"]


def is_hex(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip("-").startswith("0x")
