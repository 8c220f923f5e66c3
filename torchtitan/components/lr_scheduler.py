"""The learning rate as a pure function of the step: it has no state to save or restore."""

from __future__ import annotations

import math

from torchtitan.config import JobConfig
from torchtitan.config.schema import LRScheduler


def learning_rate(step: int, config: JobConfig) -> float:
    """The learning rate of step 1..training.steps."""
    return config.optimizer.lr * lr_factor(step, config.training.steps, config.lr_scheduler)


def lr_factor(step: int, steps: int, config: LRScheduler) -> float:
    """The learning rate of step 1..steps as a factor of the peak.

    Linear warmup over warmup_steps, then the peak, then a decay over the last decay_ratio of the steps
    (warmup-stable-decay, arXiv 2404.06395), or over all steps after warmup if decay_ratio is None. The decay would
    reach min_lr_factor one step after the last, so that no step is spent at a rate of 0.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return step / warmup
    decay = steps - warmup if config.decay_ratio is None else round(steps * config.decay_ratio)
    if decay <= 0 or step <= steps - decay:
        return 1.0
    progress = (step - 1 - (steps - decay)) / decay
    shape = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "sqrt": 1 - math.sqrt(progress),
    }[config.decay_type]
    return config.min_lr_factor + (1 - config.min_lr_factor) * shape
