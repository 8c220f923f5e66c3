"""The evaluations of a running stage: the hook, without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan.config.schema import Checkpoint, Evaluation, Job, JobConfig
from torchtitan.extensions.evaluation import hook
from torchtitan.extensions.evaluation.hook import EvaluationHook


def trainer_of(folder: Path, step: int = 0, load_step: int = -1, rank: int = 0, **evaluation: Any) -> Any:
    config = JobConfig(
        job=Job(dump_folder=str(folder)),
        evaluation=Evaluation(**evaluation),
        checkpoint=Checkpoint(load_step=load_step),
    )
    paused: list[str] = []
    left_out: list[float] = []
    metrics = SimpleNamespace(tensorboard="writer") if rank == 0 else None
    return SimpleNamespace(
        config=config,
        rank=rank,
        step=step,
        tokens_seen=70,
        model="model",
        metrics=metrics,
        throughput=SimpleNamespace(leave_out=left_out.append, left_out=left_out),
        paused=paused,
        pause=paused.append,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_due_runs_and_is_no_training_time(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock, resets = [0.0], []
    monkeypatch.setattr(hook.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(clock[0]))
    one, trainer = EvaluationHook(), trainer_of(tmp_path, rank=rank)
    ran: list[int] = []

    def run(trainer: Any, prepared: Any) -> None:
        """Takes 5 seconds."""
        clock[0] += 5
        ran.append(trainer.step)
        assert prepared == "prepared"

    monkeypatch.setattr(one, "prepared", "prepared")
    monkeypatch.setattr(one, "is_due", lambda trainer: trainer.step in (0, 2))
    monkeypatch.setattr(one, "run", run)
    one.started(trainer)
    assert resets == [5.0], "the stage's own lengths compile anew"
    for trainer.step in (1, 2, 3):
        one.after_step(trainer, {})
    assert ran == [0, 2]
    assert trainer.paused == ["evaluating"] * 2 and trainer.throughput.left_out == [5.0, 5.0] and len(resets) == 1


def test_answers_end_where_the_stage_trains_them_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, trainer = EvaluationHook(), trainer_of(tmp_path, texts=("x",), freq=1)
    trainer.inputs = SimpleNamespace(tokenizer="tokenizer", args="args", ends_of_turn=[7])
    trainer.dims = trainer.device = trainer.cpu_group = None
    monkeypatch.setattr(hook.Ranks, "of", lambda *_: "ranks")
    monkeypatch.setattr(hook, "prepare", lambda *given: given[1:])
    one.configured(trainer)
    assert one.prepared == ("tokenizer", "args", [7])


def test_nothing_is_prepared_if_nothing_is_asked(tmp_path: Path):
    one, trainer = EvaluationHook(), trainer_of(tmp_path)
    one.configured(trainer)
    one.started(trainer)
    one.after_step(trainer, {})
    assert one.prepared is None and not trainer.paused and not trainer.throughput.left_out


@pytest.mark.parametrize(
    ("step", "load_step", "rank", "kept"),
    [
        (0, -1, 0, set()),  # a new run: all results are of another run
        (0, -1, 1, {0, 4, 8}),  # rank 0 does it for all
        (4, -1, 0, {0, 4}),  # resumed: step 8 is trained anew, perhaps with another learning rate
        (4, 4, 0, {0, 4}),  # sent back to step 4
    ],
)
def test_results_of_steps_to_come_are_moved_aside(step: int, load_step: int, rank: int, kept: set[int], tmp_path: Path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for number in (0, 4, 8):
        (folder / f"step-{number}.json").write_text("{}")
    EvaluationHook().started(trainer_of(tmp_path, step, load_step, rank))
    assert {file.name for file in folder.iterdir()} == {f"step-{number}.json" for number in kept}
    aside = tmp_path / "evaluation-1"
    assert len(list(aside.iterdir()) if aside.exists() else []) == 3 - len(kept)
