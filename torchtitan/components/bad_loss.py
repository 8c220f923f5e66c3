"""What happens to a step whose loss or gradient norm is bad: training.on_bad_loss and the keys beside it."""

from __future__ import annotations

import math
import statistics
from typing import Any

from torchtitan.config.schema import Training


class BadLossError(Exception):
    """Ends the run: a loss or gradient norm is not finite, or the loss is a spike. Nothing of that step is kept."""


class BadLossPolicy:
    """Judges the loss of each step. Given the same numbers, to the bit, all ranks reach the same verdict."""

    def __init__(self, config: Training):
        self.config = config
        self.losses: list[float] = []
        self.skipped: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        """JSON for the manifest, so that a resumed run judges as an unbroken one would."""
        return {"losses": self.losses, "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        """Restore state(). A key that an older manifest lacks counts as empty."""
        self.losses = list(state.get("losses", []))
        self.skipped = list(state.get("skipped", []))

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """Why the step must be skipped; None if it is good (its loss is remembered). BadLossError ends the run."""
        c = self.config
        why = self._what_is_wrong(loss, norm)
        if why is None:
            if c.loss_spike_factor is not None:  # otherwise nothing needs them
                self.losses = [*self.losses, loss][-c.loss_spike_window :]
            return None
        if c.on_bad_loss == "stop":
            raise BadLossError(f"step {step}: {why}")
        if len(self.skipped) >= c.max_skipped_steps:
            steps = ", ".join(str(skipped["step"]) for skipped in self.skipped)
            raise BadLossError(
                f"step {step}: {why}; training.max_skipped_steps = {c.max_skipped_steps} steps have been skipped"
                f"{f' ({steps})' if steps else ''}"
            )
        finite = [value if math.isfinite(value) else str(value) for value in (loss, norm)]
        self.skipped = [*self.skipped, {"step": step, "loss": finite[0], "grad_norm": finite[1], "why": why}]
        return why

    def _what_is_wrong(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}"
        factor, window = self.config.loss_spike_factor, self.config.loss_spike_window
        if factor is None or len(self.losses) < window:
            return None
        median = statistics.median(self.losses[-window:])
        if loss > factor * median:
            return (
                f"loss {loss:.4f} is {loss / median:.2f} times the median {median:.4f} of the last {window}, more than "
                f"training.loss_spike_factor = {factor:g}"
            )
        return None
