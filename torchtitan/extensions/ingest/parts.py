"""Documents of several parts: the files of one record (text_field = "files[].content"), or the records of one group.

The parts are put in order, each behind its header. A part that does not end its last line is ended by a line break.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan.config.data_schema import Source
from torchtitan.datasets.where import MISSING, look_up
from torchtitan.extensions.ingest.bad_records import RecordError
from torchtitan.extensions.ingest.records import as_text

LIST = "[]."
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Parts:
    """order: the field that the parts are sorted by, "" for the order in which they stand. header: text before each
    part, in which {name} is a field of it. text: of files of a record, their field with the text; else "". group_by:
    the field that records of one document share, or ""."""

    order: str
    header: str
    text: str = ""
    group_by: str = ""

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """(name, key of the source) of the fields of a part that are read beside its text."""
        order = ((self.order, "part_order"),) if self.order else ()
        group = ((self.group_by, "group_by"),) if self.group_by else ()
        return group + order + tuple((name, "part_header") for name in PLACEHOLDER.findall(self.header))

    def group(self, record: Mapping[str, Any]) -> str | int:
        """The group of a record; RecordError if it has none."""
        value = look_up(record, self.group_by)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            what = f"the field {self.group_by!r} (group_by) is {json.dumps(value, default=repr)[:60]}"
            mend = f'Name another, or leave such records out: where = "{self.group_by} != null".'
            raise RecordError("no group", f"{what}, not a text or a whole number. {mend}")
        return value

    def rank(self, part: Mapping[str, Any]) -> str | int | float | None:
        """What the part is sorted by; RecordError if it lacks that."""
        if not self.order:
            return None
        value = look_up(part, self.order)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
            what = (
                f"the field {self.order!r} (part_order) is {json.dumps(value, default=repr)[:60]}, not text or a number"
            )
            raise RecordError("no order", f'{what}. Name another, or set part_order = "" to keep the order as it is.')
        return value

    def head(self, part: Mapping[str, Any]) -> str:
        """The header of a part; RecordError if it lacks a field."""

        def value(found: re.Match[str]) -> str:
            if isinstance(name := look_up(part, found[1]), (str, int, float)):
                return str(name)
            raise RecordError("no header", f"no field {found[1]!r} for the part_header {self.header!r}. Mend it.")

        return PLACEHOLDER.sub(value, self.header)

    def joined(self, value: Any, field: str) -> str:
        """The text of a record's files; RecordError if that is no list of objects with the text."""
        if value is None:
            return ""
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise RecordError("wrong type", f"the field {field!r} is no list of objects, as {field}[] asks for.")
        files: list[Mapping[str, Any]] = in_order(value, [self.rank(part) for part in value], field)
        texts = []
        for part in files:
            if (content := look_up(part, self.text, MISSING)) is MISSING:
                names = ", ".join(map(repr, part)) or "nothing"
                what = (
                    f"a file of {field!r} has no field {self.text!r}; it has {names}. Set text_field to the right one."
                )
                raise RecordError("missing field", what)
            if text := as_text(content, f"{field}[].{self.text}"):
                texts.append(ended(self.head(part) + text))
        return "".join(texts)


def in_order(parts: Sequence[Any], ranks: Sequence[Any], what: str) -> list[Any]:
    """The parts sorted by their ranks, which are equal for parts that keep their order; RecordError if some are texts
    and some numbers."""
    if len({isinstance(rank, str) for rank in ranks}) > 1:
        raise RecordError("no order", f"some parts of {what!r} are ordered by text and some by numbers (part_order).")
    if not ranks or ranks[0] is None:
        return list(parts)
    return [part for _, part in sorted(zip(ranks, parts), key=lambda pair: pair[0])]


def ended(text: str) -> str:
    """The text, with a line break if its last line has none."""
    return text if text.endswith("\n") else text + "\n"


def list_field(text_field: str) -> tuple[str, str]:
    """("files", "content") for "files[].content"; ("", "") for a field that is none of a list."""
    outer, mark, inner = text_field.partition(LIST)
    return (outer, inner) if mark else ("", "")


def parts_of(source: Source) -> Parts | None:
    """How the source's documents are put together, None if each is one text."""
    _, inner = list_field(source.text_field)
    if not inner and not source.group_by:
        return None
    return Parts(source.part_order, source.part_header, inner, source.group_by)
