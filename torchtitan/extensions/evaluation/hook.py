"""The evaluations of a running stage, as its [evaluation] table asks: before the first step, at intervals, at the end.

Each leaves evaluation/step-N.json and pictures in the stage's dump folder, scalars and pictures in TensorBoard, and a
line in the log.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from torchtitan.components.hooks import Hook
from torchtitan.components.manifest import results_file
from torchtitan.extensions.evaluation.checks import is_asked_for
from torchtitan.extensions.evaluation.evaluate import Prepared, evaluate, prepare
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.results import scalars, settings_in, summary, write_result
from torchtitan.tools.folders import put_aside
from torchtitan.tools.logging import logger

MESSAGE_INTERVAL = 30.0
"""Seconds of an evaluation after which the log says how far it is."""


class EvaluationHook(Hook):
    """Evaluates the stage's model at the steps that [evaluation] names; does nothing if it asks nothing."""

    def __init__(self) -> None:
        self.prepared: Prepared | None = None
        self.ranks = Ranks()
        self.last_message = 0.0

    def configured(self, trainer: Any) -> None:
        """Reads texts and makes questions, so that a mistake in them costs no step. UserError for a mistake."""
        if is_asked_for(trainer.config):
            self.ranks = Ranks.of(trainer.dims, trainer.device, trainer.config, trainer.cpu_group)
            inputs = trainer.inputs
            self.prepared = prepare(trainer.config, inputs.tokenizer, inputs.args, inputs.ends_of_turn)

    def started(self, trainer: Any) -> None:
        """Moves aside results of steps that this run trains anew, which would pass for its own; then the evaluation
        before the first step, if it is due."""
        if trainer.rank == 0:
            put_aside(results_file(trainer.config, 0).parent, trainer.step or -1)
        if self._evaluate(trainer):
            torch.compiler.reset()  # else the stage's own lengths would be seen as changed ones: see self_check.py

    def after_step(self, trainer: Any, numbers: dict[str, Any]) -> None:
        self._evaluate(trainer)

    def _evaluate(self, trainer: Any) -> bool:
        """Collective. Whether an evaluation was due; its seconds do not count as training."""
        start = time.perf_counter()
        if self.prepared is None or not self.is_due(trainer):
            return False
        trainer.pause("evaluating")
        self.run(trainer, self.prepared)
        trainer.throughput.leave_out(time.perf_counter() - start)
        return True

    def is_due(self, trainer: Any) -> bool:
        """Whether an evaluation is due after this step and its results are not on disk yet. Collective."""
        e, step, steps = trainer.config.evaluation, trainer.step, trainer.config.training.steps
        if step == steps and not e.at_end:
            return False
        if step not in (0, steps) and (e.freq == 0 or step % e.freq):
            return False
        missing = False
        if trainer.rank == 0:
            file = results_file(trainer.config, step)
            missing = self.prepared is None or settings_in(file) != self.prepared.settings
            if not missing:
                logger.info(f"evaluation after step {step}: its results are in {file}")
        return bool(self.ranks.largest(int(missing)))

    def run(self, trainer: Any, prepared: Prepared) -> None:
        """Evaluates and, on rank 0, keeps the result. Collective."""
        config, inputs, step = trainer.config, trainer.inputs, trainer.step
        e, start = config.evaluation, time.perf_counter()
        self.last_message = start
        result = {
            "label": f"{config.stage.name}, step {step}",
            "model": config.job.dump_folder,
            "step": step,
            "tokens_seen": trainer.tokens_seen,
            "rope": asdict(inputs.args.rope),
            "dtype": config.training.mixed_precision_param,
            "world_size": torch.distributed.get_world_size(),
            **evaluate(
                trainer.model, self.ranks, inputs.tokenizer, prepared, e.windows, e.generate, self.report_progress
            ),
            "seconds": round(time.perf_counter() - start, 1),
        }
        if trainer.rank == 0:
            write_result(result, results_file(config, step))
            if trainer.metrics.tensorboard:
                _show(result, step, trainer.metrics.tensorboard)
        logger.info(f"evaluation after step {step} ({result['seconds']} s): {summary(result)}")

    def report_progress(self, what: str, done: int, total: int) -> None:
        if time.perf_counter() - self.last_message > MESSAGE_INTERVAL:
            self.last_message = time.perf_counter()
            logger.info(f"evaluation: {what}, {done} of {total}")


def _show(result: dict[str, Any], step: int, tensorboard: Any) -> None:
    """Scalars and figures of a result for a SummaryWriter."""
    from torchtitan.extensions.evaluation.plots import task_figures

    for key, value in scalars(result).items():
        tensorboard.add_scalar(f"evaluation/{key}", value, step)
    for name, figure in task_figures(result).items():
        tensorboard.add_figure(f"evaluation/{name}", figure, step)
