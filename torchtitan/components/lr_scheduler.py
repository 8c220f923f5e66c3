"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from torchtitan.config import JobConfig
from torchtitan.config.schema import LRScheduler


def learning_rate(step: int, config: JobConfig) -> float:
    """The learning rate of step 1..training.steps."""
    return config.optimizer.lr * lr_factor(step, config.training.steps, config.lr_scheduler)


def lr_factor(step: int, steps: int, config: LRScheduler) -> float:
    """Factor of the peak learning rate for step 1..steps.

    Linear warmup over warmup_steps, then the peak, then a decay over the last decay_ratio of the steps
    (warmup-stable-decay, arXiv 2404.06395), or over all after warmup if unset. min_lr_factor would be reached one
    step after the last, so that no step is spent at a rate of 0.
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
