"""Records that cannot be read: the run stops at the first, or they are left out and counted, with some examples.

A source says which (on_bad_record). What is bad is a record (a line, a row, a small file), or the rest of a file that
is damaged from some place on, whose records nobody can count: its bytes are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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


def by_part(counts: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """The counts of a unit whose parts are of files with these paths, with a part's number in place of each path: the
    same unit may be of files with other names."""
    for example in counts.get("bad", {}).get("examples", ()):
        example[0] = paths.index(example[0])
    return counts


def records_in(counts: Mapping[str, Any]) -> int:
    """Records that a unit has read, good, bad and left out."""
    bad = sum(n for reason, n in counts.get("bad", {}).get("reasons", {}).items() if reason != DAMAGED)
    return int(counts["documents"] + counts["empty"] + counts.get("left_out", {}).get("where", 0) + bad)


def bad_in_all(units: Iterable[tuple[Mapping[str, Any], list[str]]]) -> dict[str, Any]:
    """What corpus.json and the data report say of the bad records of units, each with the paths of its parts: records
    (how many are bad), of (how many there are), reasons, bytes (of damaged rests), the same in_words, and examples,
    each [place, reason, what is wrong]. {} if all are good."""
    records, size, reasons = 0, 0, Counter[str]()
    examples: list[list[str]] = []
    shown: Counter[str] = Counter()
    for counts, paths in units:
        records += records_in(counts)
        bad = counts.get("bad", {"reasons": {}, "bytes": 0, "examples": []})
        reasons.update(bad["reasons"])
        size += bad["bytes"]
        for part, place, reason, why in bad["examples"]:
            shown[reason] += 1
            if shown[reason] <= EXAMPLES:
                examples.append([f"{paths[part]} {place}".rstrip(), reason, why])
    if not reasons:
        return {}
    of_records = sum(n for reason, n in reasons.items() if reason != DAMAGED)
    return {
        "records": of_records,
        "of": records,
        "reasons": dict(reasons),
        "bytes": size,
        "in_words": f"{of_records:,} of {records:,} records ({of_records / max(1, records):.3%}) are bad"
        + (f", and up to {size:,} bytes of damaged files" if size else "")
        + f" ({', '.join(f'{count:,} {reason}' for reason, count in sorted(reasons.items()))})",
        "examples": examples,
    }


def check_share(source: str, bad: Mapping[str, Any], size: int, most: float, still: float = 0.0) -> None:
    """UserError if more than `most` (max_bad_share) of the records are bad, or of `size` bytes damaged, even if `still`
    more good records are to come."""
    if bad and (bad["records"] > most * (bad["of"] + still) or bad["bytes"] > most * size):
        place, _, why = bad["examples"][0]
        raise UserError(
            f"Data source {source!r}: {bad['in_words']}, which is more than max_bad_share = {most:g}. The first: "
            f"{place}: {why} Mend the text or the keys of the source, or raise max_bad_share. What is done is kept."
        )
