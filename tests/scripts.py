"""The files of scripts/ as modules, for tests: they are no package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load_script(name: str) -> ModuleType:
    """scripts/NAME.py ("plan", "studies/compare_methods"), executed anew. As when Python starts it, its folder comes
    first on sys.path, but only until it is loaded."""
    path = SCRIPTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"scripts_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def run_script(name: str, *args: Any) -> subprocess.CompletedProcess[str]:
    """scripts/NAME.py in a process of its own, on one thread; what it said."""
    command = [sys.executable, SCRIPTS / f"{name}.py", *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True)
