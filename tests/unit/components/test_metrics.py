"""metrics.jsonl, the TensorBoard events, the line for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchtitan.components.metrics import MetricsLogger, duration
from torchtitan.config.schema import Metrics
from torchtitan.tools.errors import UserError


def log(folder: Path, steps: range, from_step: int = 0) -> None:
    metrics = MetricsLogger(Metrics(), folder, "run", {}, from_step)
    for step in steps:
        metrics.log({"step": step, "loss": 1.0 / step, "mfu": None, "loss_by_source": {"code": 2.0, "docs": 3.0}})
    metrics.close()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_and_events_hold_the_same_numbers(tmp_path: Path):
    log(tmp_path, range(1, 4))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "loss_by_source/code", "loss_by_source/docs"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_a_resumed_run_replaces_the_lines_it_repeats(tmp_path: Path):
    log(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')  # cut off by a kill
    log(tmp_path, range(5, 10), from_step=4)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))
    replaced = (tmp_path / "metrics.replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in replaced] == [5, 6, 7]


def test_wandb_missing_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb"):
        MetricsLogger(Metrics(enable_wandb=True), tmp_path, "run", {}, 0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (90.7, "1:30"), (7205, "2:00:05"), (180000, "2 d 02:00:00")]
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text
