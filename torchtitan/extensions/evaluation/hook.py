"""The evaluations of a running stage, as its [evaluation] table asks: before the first step, at intervals, at the end.

Each leaves evaluation/step-N.json and pictures in the stage's dump folder, scalars and pictures in TensorBoard, and a
line in the log.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from torchtitan.attention.backends import choose_backend
from torchtitan.components.hooks import Hook
from torchtitan.components.manifest import results_file
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.checks import is_asked_for
from torchtitan.extensions.evaluation.evaluate import evaluate, prepare
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.results import scalars, settings_in, summary, write
from torchtitan.models.transformer import Transformer, TransformerArgs
from torchtitan.tools.folders import put_aside
from torchtitan.tools.logging import logger

SILENCE = 30.0
"""Seconds of an evaluation after which the log says how far it is."""


class EvaluationHook(Hook):
    """Evaluates the stage's model at the steps that [evaluation] names; does nothing if it asks nothing."""

    def __init__(self) -> None:
        self.evaluation: StageEvaluation | None = None

    def configured(self, trainer: Any) -> None:
        """Reads texts and makes questions, so that a mistake in them costs no step. UserError for one."""
        config, p = trainer.config, trainer.config.parallelism
        if not is_asked_for(config):
            return
        backend = choose_backend(config.model.attention_backend, trainer.device.type)
        layout, exchange = p.context_parallel_layout, p.context_parallel_exchange
        ranks = Ranks.of(trainer.dims, trainer.device, backend, layout, exchange, trainer.cpu_group)
        self.evaluation = StageEvaluation(config, trainer.inputs.tokenizer, trainer.inputs.args, ranks, trainer.rank)

    def started(self, trainer: Any) -> None:
        """Moves aside results of an earlier run, which would pass for this one's; then the evaluation before the first
        step, if it is due."""
        if trainer.rank == 0 and (trainer.step == 0 or trainer.config.checkpoint.load_step >= 0):
            folder = results_file(trainer.config, 0).parent
            if aside := put_aside(folder, trainer.step or -1):
                logger.info(f"what an earlier run left in {folder} is in {aside} now")
        if self._evaluate(trainer):
            torch.compiler.reset()  # else the stage's own lengths would be seen as changed ones: see self_check.py

    def after_step(self, trainer: Any, numbers: dict[str, Any]) -> None:
        self._evaluate(trainer)

    def _evaluate(self, trainer: Any) -> bool:
        """Collective. Whether an evaluation was due; its seconds do not count as training."""
        start = time.perf_counter()
        if self.evaluation is None or not self.evaluation.due(trainer.step):
            return False
        trainer.pause("evaluating")
        tensorboard = trainer.metrics.tensorboard if trainer.metrics else None
        self.evaluation.run(trainer.model, trainer.step, trainer.tokens_seen, tensorboard)
        trainer.throughput.start += time.perf_counter() - start
        return True


class StageEvaluation:
    """The questions of a stage, prepared, and the evaluations that put them to its model."""

    def __init__(self, config: JobConfig, tokenizer: Tokenizer, args: TransformerArgs, ranks: Ranks, rank: int):
        self.config, self.tokenizer, self.args, self.ranks, self.rank = config, tokenizer, args, ranks, rank
        self.prepared = prepare(config, tokenizer, args)
        self.last_message = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether an evaluation is due after this step and its results are not on disk yet. Collective."""
        e, steps = self.config.evaluation, self.config.training.steps
        if step == steps and not e.at_end:
            return False
        if step not in (0, steps) and (e.freq == 0 or step % e.freq):
            return False
        missing = False
        if self.rank == 0:
            file = results_file(self.config, step)
            missing = settings_in(file) != self.prepared.settings
            if not missing:
                logger.info(f"evaluation after step {step}: its results are in {file}")
        return bool(self.ranks.largest(int(missing)))

    def run(self, model: Transformer, step: int, tokens_seen: int, tensorboard: Any = None) -> dict[str, Any]:
        """Collective. tensorboard: rank 0's SummaryWriter, if it has one."""
        e, start = self.config.evaluation, time.perf_counter()
        self.last_message = start
        result = {
            "label": f"{self.config.stage.name}, step {step}",
            "model": self.config.job.dump_folder,
            "step": step,
            "tokens_seen": tokens_seen,
            "rope": asdict(self.args.rope),
            "dtype": self.config.training.mixed_precision_param,
            "world_size": torch.distributed.get_world_size(),
            **evaluate(model, self.ranks, self.tokenizer, self.prepared, e.windows, e.generate, self._report),
            "seconds": round(time.perf_counter() - start, 1),
        }
        if self.rank == 0:
            self._keep(result, step, tensorboard)
        logger.info(f"evaluation after step {step} ({result['seconds']} s): {summary(result)}")
        return result

    def _report(self, what: str, done: int, total: int) -> None:
        if time.perf_counter() - self.last_message > SILENCE:
            self.last_message = time.perf_counter()
            logger.info(f"evaluation: {what}, {done} of {total}")

    def _keep(self, result: dict[str, Any], step: int, tensorboard: Any) -> None:
        write(result, results_file(self.config, step))
        if not tensorboard:
            return
        for key, value in scalars(result).items():
            tensorboard.add_scalar(f"evaluation/{key}", value, step)
        from torchtitan.extensions.evaluation.plots import task_figures

        for name, figure in task_figures(result).items():
            tensorboard.add_figure(f"evaluation/{name}", figure, step)
