"""Two ranks, each pretending to be a host of its own: bad losses, stragglers, the node check, a folder not shared."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import torchtitan.extensions.cluster.node_check as node_check
import torchtitan.trainer as trainer_module
from tests.distributed.harness import flags, spawn, write_assets
from torchtitan.components.bad_loss import BadLossError
from torchtitan.components.manifest import complete_steps, read_manifest
from torchtitan.config import load_config
from torchtitan.extensions.cluster import shared_folder
from torchtitan.extensions.cluster.health import Stragglers
from torchtitan.extensions.wiring import build_trainer
from torchtitan.tools.errors import UserError


class Messages(logging.Handler):
    """What has been logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Train a stage with a fault on this rank; what happened.

    case: args, and of nan (steps whose gradients are NaN on rank 1), spike (steps whose loss is ten times itself),
    slow (seconds that rank 1's probe takes), late (that it sleeps before each step), check (what its matrix product
    takes, in multiples), elsewhere (its dump folder).
    """
    messages = Messages()
    logging.getLogger("torchtitan").addHandler(messages)
    args = list(case["args"])
    if rank == 1 and "elsewhere" in case:
        args += ["--job.dump_folder", case["elsewhere"]]
    originals = trainer_module.train_micro_batch, node_check.matmul_seconds
    measure = originals[1]
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    node_check.blind_hosts = partial(shared_folder.blind_hosts, seconds=2.0)
    if rank == 1 and "check" in case:
        node_check.matmul_seconds = lambda *a: (measure(*a)[0] * case["check"], True)
    trainer: Any = None
    rows: list[int] = []

    def train_micro_batch(model: Any, batch: Any, *rest: Any) -> torch.Tensor:
        losses = originals[0](model, batch, *rest)
        rows.append(int(batch.tokens.sum()))
        if trainer is None:
            return losses  # the self-check
        if trainer.step in case.get("nan", ()) and rank == 1:
            next(model.parameters()).grad.to_local().fill_(math.nan)
            losses = losses * math.nan
        return losses * 10 if trainer.step in case.get("spike", ()) else losses

    trainer_module.train_micro_batch = train_micro_batch
    states: list[torch.Tensor] = []
    numbers: list[dict[str, Any]] = []
    error = ""
    try:
        config = load_config(args)
        trainer = build_trainer(config, rank, rank, world_size)
        rows.clear()
        if rank == 1:
            (hook,) = [hook for hook in trainer.hooks if isinstance(hook, Stragglers)]
            probe, arrive = hook.probe, trainer.timing.arrive

            def slow_probe() -> None:
                probe()
                hook.probes[-1] += case.get("slow", 0.0)

            def late_arrival() -> None:
                time.sleep(case.get("late", 0.0))
                arrive()

            hook.probe, trainer.timing.arrive = slow_probe, late_arrival
        step = trainer.train_step

        def recorded() -> Any:
            result = step()
            numbers.append(result)
            tensors = [t for part in ("model", "optimizer") for t in trainer.state()[part].values()]
            local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
            states.append(torch.cat([t.flatten().double() for t in local]))
            return result

        trainer.train_step = recorded
        trainer.train()
    except (BadLossError, UserError) as e:
        error = f"{type(e).__name__}: {e}"
    finally:
        if trainer is not None:
            trainer.close()
        else:
            dist.destroy_process_group()
        trainer_module.train_micro_batch, node_check.matmul_seconds = originals
        del os.environ["SLURMD_NODENAME"]
        node_check.blind_hosts = shared_folder.blind_hosts
        logging.getLogger("torchtitan").removeHandler(messages)
    moved = [not torch.equal(a, b) for a, b in zip(states, states[1:])]
    return {"numbers": numbers, "moved": moved, "rows": rows, "error": error, "log": messages.lines}


def silent_rank(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """The report of a node check in which rank 1 answers too late."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    measure = node_check.matmul_seconds
    if rank == 1:
        node_check.matmul_seconds = lambda *a: (time.sleep(4), measure(*a))[1]
    group = dist.new_group(backend="gloo")
    began = time.perf_counter()
    report = node_check.node_check(case["folder"], 1.5, torch.device("cpu"), ["node0", "node1"], group, timeout=2.0)
    node_check.matmul_seconds = measure
    seconds = time.perf_counter() - began
    dist.barrier(group)
    dist.destroy_process_group()
    return report | {"seconds": seconds}


def dispatch(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    return silent_rank(case, rank, world_size) if "folder" in case else run(case, rank, world_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("health")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """All cases, in one spawn."""
    assets = write_assets(folder, "tied")
    saving = {"checkpoint__enable": True, "checkpoint__interval": 1}
    skip = saving | {"training__on_bad_loss": "skip", "training__max_skipped_steps": 1}
    spike = skip | {"training__loss_spike_factor": 2.0, "training__loss_spike_window": 2}
    window = {"metrics__log_freq": 4}

    def args(name: str, options: dict[str, Any]) -> list[str]:
        return flags(folder, assets, **options, job__dump_folder=folder / name)

    cases: dict[str, dict[str, Any]] = {
        "clean": {"args": args("clean", saving)},
        "one": {"args": args("one", skip), "nan": (2,)},
        "two": {"args": args("two", skip), "nan": (2, 3)},
        "two again": {"args": args("two", skip)},
        "spike": {"args": args("spike", spike), "spike": (4,)},
        "slow": {"args": args("slow", window), "slow": 0.1},
        "late": {"args": args("late", window), "late": 0.5},
        "checked": {"args": args("checked", {**window, "comm__node_check": True}), "check": 20},
        "torn": {"args": args("torn", window), "elsewhere": str(folder / "torn-elsewhere")},
        "silent": {"folder": folder},
    }
    return dict(zip(cases, spawn(2, dispatch, list(cases.values()), folder), strict=True))


def test_a_skipped_step_changes_nothing_and_uses_its_rows(runs: dict[str, dict[str, Any]], folder: Path):
    clean, one = runs["clean"], runs["one"]
    assert clean["error"] == one["error"] == ""
    assert clean["moved"] == [True, True, True] and one["moved"] == [False, True, True]
    assert one["rows"] == clean["rows"], "every step has the rows that it would have had"
    assert one["numbers"][-1]["tokens_seen"] == clean["numbers"][-1]["tokens_seen"]
    assert one["numbers"][0]["loss"] == clean["numbers"][0]["loss"]
    assert one["numbers"][2]["loss"] != clean["numbers"][2]["loss"]
    assert [n["skipped_steps"] for n in one["numbers"]] == [0, 1, 1, 1]
    (warning,) = [line for line in one["log"] if line.startswith("step 2 is skipped: loss nan")]
    assert warning.count("documents text ") == 8
    (skipped,) = read_manifest(folder / "one" / "checkpoint" / "step-4")["bad_loss"]["skipped"]
    assert skipped["step"] == 2 and skipped["loss"] == "nan"
    lines = [json.loads(line) for line in (folder / "one" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["loss"] is None and lines[2]["loss"] == one["numbers"][2]["loss"]


def test_no_more_steps_are_skipped_than_allowed_also_over_a_restart(runs: dict[str, dict[str, Any]], folder: Path):
    assert "BadLossError: step 3" in runs["two"]["error"] and "max_skipped_steps = 1" in runs["two"]["error"]
    assert len(runs["two"]["numbers"]) == 2
    again = runs["two again"]
    assert again["error"] == "" and [n["step"] for n in again["numbers"]] == [3, 4]
    assert again["numbers"][-1]["skipped_steps"] == 1
    assert read_manifest(folder / "two" / "checkpoint" / "step-4")["bad_loss"]["skipped"][0]["step"] == 2
    assert again["numbers"][0]["loss"] == runs["one"]["numbers"][2]["loss"], "as the run that did not stop"


def test_a_spike_is_skipped(runs: dict[str, dict[str, Any]], folder: Path):
    spike = runs["spike"]
    assert spike["error"] == "" and spike["moved"] == [True, True, False]
    assert any("step 4 is skipped" in line and "loss_spike_factor = 2" in line for line in spike["log"])
    assert complete_steps(folder / "spike" / "checkpoint") == [1, 2, 3, 4]


def test_the_slowest_rank_is_named_by_what_makes_it_slow(runs: dict[str, dict[str, Any]], folder: Path):
    slow, late = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()][-1]["stragglers"]
        for name in ("slow", "late")
    )
    assert slow["compute_rank"] == 1 and slow["compute"] > 1.5
    assert any("rank 1 on node1 computes" in line for line in runs["slow"]["log"])
    assert late["late_rank"] == 1 and 0.3 < late["late_seconds"] < 5
    assert any("rank 1 on node1 comes" in line for line in runs["late"]["log"])
    heart = json.loads((folder / "late" / "heartbeat.json").read_text())
    assert heart["state"] == "ended" and heart["step"] == 4 and heart["hosts"] == ["node0", "node1"]


def test_the_node_check_names_a_slow_host_and_training_goes_on(runs: dict[str, dict[str, Any]], folder: Path):
    checked = runs["checked"]
    assert checked["error"] == "" and len(checked["numbers"]) == 4
    report = json.loads((folder / "checked" / "node_check.json").read_text())
    assert "matrix product" in report["slow"]["node1"][0] and not report["broken"]
    assert any("node1 is slow" in line for line in checked["log"])
    for host, other in (("node0", "node1"), ("node1", "node0")):
        measured = report["hosts"][host]
        assert 0 < measured["matmul"] < 60 and 0 < measured["pairs"][other] < 60
    assert not list((folder / "checked").glob(".shared*"))


def test_a_dump_folder_that_is_not_shared_names_the_host(runs: dict[str, dict[str, Any]]):
    assert "UserError" in runs["torn"]["error"] and not runs["torn"]["numbers"]
    assert "is not shared between the nodes: node1 does not see what node0 wrote" in runs["torn"]["error"]


def test_a_host_that_gives_no_answer_is_named_in_time(runs: dict[str, dict[str, Any]]):
    silent = runs["silent"]
    assert list(silent["broken"]) == ["node1"] and "no answer from rank 1 in 2 s" in silent["broken"]["node1"][0]
    assert silent["exclude"] == "node1" and silent["seconds"] < 30
