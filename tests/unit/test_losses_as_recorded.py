"""What short runs of every kind lose is what they lost before the modules moved: loss and grad_norm of each step.

The record, tests/before_the_move/losses.json, and what is compared with it are made by the same driver,
tests/before_the_move/losses.py, which says which runs there are. To record anew, after a change that is meant to change
numbers: `OMP_NUM_THREADS=1 python -m tests.before_the_move.losses --record` in the root of the repository.

Bits depend on the version of PyTorch, the CPU and the number of threads (which is one). Where version, capability and
processor are those of the record every bit must be the recorded one; elsewhere 1e-5 of the number may be off, and of
runs in bfloat16, whose rounding is coarser, 1% of the loss.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.before_the_move.losses import KINDS, RECIPES, RECORD
from tests.before_the_move.record import REPOSITORY, differences, machine, run

RECORDED: dict[str, Any] = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("losses") / "found.json"
    run(REPOSITORY, "-m", "tests.before_the_move.losses", "--out", out)
    return json.loads(out.read_text())["runs"]


@pytest.mark.parametrize("name", RECORDED["runs"])
def test_losses_are_the_recorded_ones(name: str, found: dict[str, Any]) -> None:
    bits = machine() == RECORDED["machine"]
    if bits or not in_bfloat16(name):
        assert differences(RECORDED["runs"][name], found[name], bits) == []
        return
    assert isinstance(found[name], list), found[name]  # the error that it ended with
    for ours, theirs in zip(found[name], RECORDED["runs"][name], strict=True):
        assert math.isclose(float.fromhex(ours["loss"]), float.fromhex(theirs["loss"]), rel_tol=0.01)


def in_bfloat16(name: str) -> bool:
    """All but those with the TOML files of the folder, which say float32; recipes and demo are as they are."""
    return name in RECIPES or name.startswith("demo ") or "bfloat16" in name


def test_every_run_is_recorded_and_the_last_bit_counts(found: dict[str, Any]) -> None:
    assert list(found) == list(RECORDED["runs"]) and set(KINDS) < set(found)
    loss = float.fromhex(RECORDED["runs"]["plain"][0]["loss"])
    a, b = [{"loss": loss.hex()}], [{"loss": (loss * (1 + 2**-52)).hex()}]
    assert differences(a, a, bits=True) == [] and len(differences(a, b, bits=True)) == 1
    assert differences(a, b, bits=False) == []
    assert differences(a, [{"loss": (loss * (1 + 2e-5)).hex()}], bits=False) and differences(
        a, "exit code 1", bits=False
    )
