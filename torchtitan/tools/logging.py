"""Log lines: time, level and message. Rank 0 logs everything, the others only warnings and errors, with their rank."""

from __future__ import annotations

import logging
import sys
import warnings

from rich.console import Console

logger = logging.getLogger("torchtitan")
console = Console(file=sys.stderr, soft_wrap=True, highlight=False)


class _ConsoleHandler(logging.Handler):
    """Writes through the console, so that lines appear above a live progress bar and not inside it."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False)


def init_logger(rank: int, world_size: int) -> None:
    """Rank 0 logs from level INFO on, the other ranks from WARNING."""
    who = f" [rank {rank}]" if world_size > 1 and rank > 0 else ""
    handler = _ConsoleHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(levelname).1s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # Known and harmless here: nothing works in place on the output of an FSDP module, and torchdata calls set_vital.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")


_said: set[str] = set()


def warn_once(message: str) -> None:
    """A warning that a process gives once, however often it reads the file that it is about. Ranks beyond 0, which read
    the same file, are silent."""
    if message not in _said and (not logger.handlers or logger.isEnabledFor(logging.INFO)):
        _said.add(message)
        logger.warning(message)
