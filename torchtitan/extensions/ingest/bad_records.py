"""Records that cannot be read: the run stops at the first, or they are left out and counted, with some examples.

A source says which (on_bad_record). What is bad is a record (a line, a row, a small file), or the rest of a file that
is damaged from some place on, whose records nobody can count: its bytes are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torchtitan.tools.errors import UserError

EXAMPLES = 3
"""Of each reason, in a unit and in the report."""

REFUSED = "refused"  # by what makes text of the record: the chat template
DAMAGED = "damaged from here on"


class RecordError(ValueError):
    """What is wrong with one record, without its place. reason: in two or three words, the same for all of its kind."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


def nested_too_deeply() -> RecordError:
    """For a RecursionError."""
    return RecordError("nested too deeply", "the record is nested too deeply to be read: take it out.")


class BadRecordError(UserError):
    """A record that cannot be read, with its place: the run stops there, and goes on once it is mended."""


class DamagedError(BadRecordError):
    """A file that cannot be read from some place on. rest: about how many bytes of it at most, None: all."""

    rest: int | None = None


class BadRecords:
    """What becomes of bad records; counts them since the last `counts`. skip: leave them out, instead of an error."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self._reset()

    def add(self, path: str, place: Callable[[], str], error: ValueError) -> None:
        """A record of a file is bad. place(): where it stands ("line 3"), "" for all of the file."""
        if not self.skip:
            raise BadRecordError(f"{f'{path} {place()}'.rstrip()}: {error}") from error
        self._count(getattr(error, "reason", REFUSED), path, place, str(error))

    def add_rest(self, path: str, size: int, error: DamagedError) -> None:
        """A file is damaged, of which `size` bytes were to be read."""
        if not self.skip:
            raise error
        self._bytes += size if error.rest is None else min(size, error.rest)
        self._count(DAMAGED, path, lambda: "", str(error).removeprefix(path).lstrip(": "))

    def _count(self, reason: str, path: str, place: Callable[[], str], why: str) -> None:
        self._reasons[reason] += 1
        if self._reasons[reason] <= EXAMPLES:
            self._examples.append([path, place(), reason, why])

    def counts(self) -> dict[str, Any]:
        """For the counts of a unit, since the last call: {} or {"bad": how many by reason, the bytes of damaged rests,
        and examples, each [path, place, reason, what is wrong]}."""
        found = {"reasons": dict(self._reasons), "bytes": self._bytes, "examples": self._examples}
        self._reset()
        return {"bad": found} if found["reasons"] else {}

    def _reset(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._bytes = 0
        self._examples: list[list[str]] = []
