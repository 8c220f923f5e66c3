"""How long a rank works by itself between the collectives of two steps: clock readings, and nothing else."""

from __future__ import annotations

import time


class StepTiming:
    """Seconds that this rank spends by itself, between the last collective of a step and the first of the next.

    Ranks that share parameters wait for each other in every layer, so all take the same time for a step. A rank that is
    slow by itself is late at the first collective.
    """

    def __init__(self) -> None:
        self.alone = 0.0
        """Seconds since the last take()."""
        self._released_at: float | None = None

    def arrive(self) -> None:
        """Call just before the first collective of a step."""
        if self._released_at is not None:
            self.alone += time.perf_counter() - self._released_at

    def release(self) -> None:
        """Call just after the last collective of a step."""
        self._released_at = time.perf_counter()

    def rest(self) -> None:
        """Leave out the time since release(): it was not spent on a step."""
        self._released_at = None

    def take(self) -> float:
        """The seconds since the last take(); counting starts again from 0."""
        alone, self.alone = self.alone, 0.0
        return alone
