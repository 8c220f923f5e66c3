"""Stragglers, the heartbeat, stack dumps and the question which ranks answer, in one process."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from torchtitan.config import JobConfig
from torchtitan.config.schema import Metrics, Training
from torchtitan.extensions.cluster.health import Heartbeat, StackDumps, stragglers, who_answers


def test_stragglers():
    hosts = ["a", "a", "b", "b"]
    even = [[0.001, 0.1, 0.0]] * 4
    numbers, sentences = stragglers(even, 1.0, 1.5, hosts)
    assert not sentences and numbers["compute"] == 1 and numbers["late_seconds"] == 0
    slow = [*even[:2], [0.004, 0.1, 0.0], even[3]]
    numbers, sentences = stragglers(slow, 1.0, 1.5, hosts)
    assert numbers["compute"] == pytest.approx(4) and numbers["compute_rank"] == 2
    assert len(sentences) == 1 and "rank 2 on b computes 4.0 times slower" in sentences[0]
    late = [*even[:3], [0.001, 0.6, 0.5]]
    numbers, sentences = stragglers(late, 1.0, 1.5, hosts)
    assert numbers["late_rank"] == numbers["data_wait_rank"] == 3 and numbers["data_wait"] == 0.5
    assert len(sentences) == 1 and "rank 3 on b comes 0.50 s late to every step of 1.00 s" in sentences[0]
    assert stragglers(late, 2.0, 1.5, hosts)[1] == [], "a step of 2 s would have lasted 1.5 s: not half as long again"
    assert stragglers(even[:1], 1.0, 1.5, hosts) == ({}, [])


def a_trainer(folder: Path, **changes: Any) -> SimpleNamespace:
    """The attributes of a Trainer that these hooks read, after its first step."""
    config = JobConfig(metrics=Metrics(heartbeat_seconds=3600), training=Training(steps=4))
    known = {"config": config, "dump_folder": folder, "rank": 0, "hosts": ["a", "a", "b"], "step": 1, "finished": False}
    return SimpleNamespace(**known | changes)


def test_heartbeat(tmp_path: Path):
    path, heartbeat, other = tmp_path / "heartbeat.json", Heartbeat(), Heartbeat()
    second = a_trainer(tmp_path, rank=1)
    other.configured(second)
    other.after_step(second, {})
    other.ended(second)
    assert not path.exists(), "only rank 0 writes"
    trainer = a_trainer(tmp_path)
    heartbeat.configured(trainer)

    def ended(finished: bool) -> None:
        trainer.finished = finished
        heartbeat.ended(trainer)

    for step, call, state, expected in (
        (1, lambda: heartbeat.after_step(trainer, {}), "training", 1),
        (2, lambda: heartbeat.after_step(trainer, {}), "training", 1),  # not that often
        (3, lambda: heartbeat.pausing(trainer, "saving"), "saving", 3),
        (3, lambda: heartbeat.pausing(trainer, "evaluating"), "evaluating", 3),
        (3, lambda: ended(False), "stopped", 3),
        (4, lambda: ended(True), "ended", 4),
    ):
        trainer.step = step
        call()
        content = json.loads(path.read_text())
        assert content["step"] == expected and content["state"] == state and abs(content["time"] - time.time()) < 60
    assert content["hosts"] == ["a", "b"] and content["ranks"] == 3 and content["steps"] == 4
    assert os.listdir(tmp_path) == ["heartbeat.json"]
    nowhere = a_trainer(tmp_path / "missing")
    heartbeat.configured(nowhere)
    heartbeat.ended(nowhere)  # warns, and the run goes on


def test_stacks_are_written_when_a_step_takes_too_long_but_not_the_first_nor_a_pause(tmp_path: Path):
    trainer = a_trainer(tmp_path)
    trainer.config = JobConfig(comm=replace(trainer.config.comm, train_timeout_seconds=1))
    path, hook = tmp_path / "comm_traces" / "stack_rank_0.txt", StackDumps()
    hook.started(trainer)
    try:
        hook.before_step(trainer)  # the first: it compiles
        time.sleep(1.3)
        hook.before_step(trainer)
        hook.pausing(trainer, "saving")
        time.sleep(1.3)
        assert not path.exists()
        hook.before_step(trainer)
        deadline = time.monotonic() + 20
        while not (path.exists() and "test_stacks_are_written" in path.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert path.read_text().splitlines()[0].endswith("a step has taken 0.8 s; every thread's last call first")
    finally:
        hook.closed(trainer)


class Silent(dist.Store):
    """A store whose server is gone: requests do not return."""

    def set(self, *_: object) -> None:
        time.sleep(60)


def test_who_answers():
    store = dist.HashStore()
    store.set("who-answers/0", "1")
    hosts = ["a", "b", "c"]
    assert who_answers(store, 2, hosts, 0.5) == "no answer from rank 1 on b"
    store.set("who-answers/1", "1")
    assert "all ranks answer" in who_answers(store, 2, hosts, 0.5)
    began = time.monotonic()
    assert "no answer from rank 0's machine, a" in who_answers(Silent(), 2, hosts, 0.5)
    assert time.monotonic() - began < 5
