"""Rows of tokens, by columns -> documents and what of them is trained; a row that does not fit together is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import ASSISTANT, ROLES
from torchtitan.extensions.ingest.token_columns import LOSS, REWRITE, Columns
from torchtitan.tools.constants import IGNORED_LABEL


@dataclass(frozen=True)
class Lists:
    """A column of lists: values[offsets[row] : offsets[row + 1]] are those of a row."""

    offsets: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Documents:
    """The documents of some rows. starts, stops: int64[d], where they lie in the values of the ids. trained: bool, of
    the values from offsets[0] on; None if nothing says so. rows: int64[d], the row of each. empty: rows and documents
    without a token. unlabelled: without a token that is trained."""

    starts: np.ndarray
    stops: np.ndarray
    trained: np.ndarray | None
    rows: np.ndarray
    empty: int
    unlabelled: int


class RowError(ValueError):
    """(row, counted from 0 among those that were given; what is wrong with it)."""


def documents_of(columns: Columns, lists: Mapping[str, Lists]) -> Documents:
    """The documents of rows, whose columns are `lists`. RowError for the first row that does not fit together."""
    ids = lists[columns.ids]
    first = int(ids.offsets[0])
    bounds = ids.offsets - first
    values = ids.values[first : int(ids.offsets[-1])]
    beside: dict[str, np.ndarray] = {}
    for name, kind in columns.said:
        if kind in ("lengths", "ends"):
            continue
        column = lists[name]
        if (wrong := np.flatnonzero(np.diff(column.offsets) != np.diff(bounds))).size:
            row = int(wrong[0])
            got, expected = (int(np.diff(o)[row]) for o in (column.offsets, bounds))
            raise RowError(row, f"{name} has {got} values for {expected} ids.")
        beside[name] = column.values[int(column.offsets[0]) : int(column.offsets[-1])]
    starts, stops = bounds[:-1], bounds[1:]
    for name in (name for name, kind in columns.said if kind == "padding"):
        starts, stops = _without_padding(name, beside[name], bounds, starts, stops)
    cuts = [np.empty(0, np.int64)]
    for name, kind in columns.said:
        if kind in ("lengths", "ends"):
            cuts.append(_cuts_of_lengths(name, kind, lists[name], bounds, starts, stops))
        elif kind == "numbers":
            cuts.append(np.flatnonzero(beside[name][1:] != beside[name][:-1]) + 1)
        elif kind == "positions":
            cuts.append(_cuts_of_positions(name, beside[name], bounds, starts, stops))
        elif kind == "types":
            changes = np.flatnonzero(beside[name][1:] != beside[name][:-1]) + 1
            if (inside := _inside(changes, bounds, starts, stops)).size:
                raise RowError(
                    _row(bounds, inside[0]),
                    f"{name} holds {beside[name][inside[0] - 1]} and {beside[name][inside[0]]}: it tells parts of the "
                    f"row apart, and not which are trained. {REWRITE} or set ignore_fields to train on all.",
                )
    if columns.end is not None and columns.end >= 0:
        cuts.append(np.flatnonzero(values == columns.end) + 1)
    if columns.begin is not None:
        cuts.append(np.flatnonzero(values == columns.begin))
    cut = _inside(np.unique(np.concatenate(cuts)), bounds, starts, stops)
    some = stops > starts
    empty = int((~some).sum())
    starts, stops = (np.sort(np.concatenate([ends[some], cut])) for ends in (starts, stops))
    trained = _trained(columns, values, beside, bounds, starts, stops)
    unlabelled = 0
    if trained is not None:
        so_far = np.concatenate([[0], np.cumsum(trained)])
        kept = so_far[stops] > so_far[starts + 1]  # a document's first token is nobody's label
        unlabelled = int((~kept).sum())
        starts, stops = starts[kept], stops[kept]
    else:
        for name in (name for name, kind in columns.said if kind == "special"):
            _check_special(name, beside[name], values, bounds, starts, stops)
        for name, kind in columns.said:
            if kind in ("numbers", "positions"):
                _check_last(name, kind, beside[name], values, bounds, starts, stops)
    rows = np.searchsorted(bounds, starts, side="right") - 1
    return Documents(starts + first, stops + first, trained, rows, empty, unlabelled)


def _row(bounds: np.ndarray, at: Any) -> int:
    """The row of a token."""
    return int(np.searchsorted(bounds, at, side="right")) - 1


def _inside(cuts: np.ndarray, bounds: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The cuts that lie between two tokens of a row."""
    cuts = cuts[(cuts > 0) & (cuts < bounds[-1])]
    rows = np.searchsorted(bounds, cuts, side="right") - 1
    return cuts[(cuts > starts[rows]) & (cuts < stops[rows])]


def _is_binary(name: str, values: np.ndarray, bounds: np.ndarray, what: str) -> np.ndarray:
    """bool of 0 and 1; RowError for another value."""
    if (wrong := np.flatnonzero((values != 0) & (values != 1))).size:
        raise RowError(_row(bounds, wrong[0]), f"{name} holds {values[wrong[0]]}; {what}")
    return values != 0


def _without_padding(
    name: str, values: np.ndarray, bounds: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of each row begin and end, behind and before its padding."""
    tokens = _is_binary(
        name, values, bounds, "0 is padding and 1 a token. Set ignore_fields if it says something else."
    )
    where = np.append(np.flatnonzero(tokens), 0)
    so_far = np.concatenate([[0], np.cumsum(tokens)])
    before, counts = so_far[bounds[:-1]], np.diff(so_far[bounds])
    begin = np.where(counts > 0, where[before], starts)
    end = np.where(counts > 0, where[before + counts - 1] + 1, begin)
    if (holes := np.flatnonzero(end - begin != counts)).size:
        row = int(holes[0])
        raise RowError(
            row,
            f"{name} is 0 between tokens for which it is 1, which is no padding at an end. If it says what is trained, "
            f'set mask_field = "{name}".',
        )
    return begin, end


def _cuts_of_lengths(
    name: str, kind: str, column: Lists, bounds: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> np.ndarray:
    cuts = []
    for row, (begin, end) in enumerate(zip(column.offsets[:-1].tolist(), column.offsets[1:].tolist())):
        ends = column.values[begin:end].astype(np.int64)
        if kind == "lengths":
            ends = np.concatenate([[0], np.cumsum(ends)])
        whole, used = int(bounds[row + 1] - bounds[row]), int(stops[row] - starts[row])
        if not len(ends) or ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] not in (whole, used):
            said = np.array2string(column.values[begin:end], threshold=8)
            raise RowError(row, f"{name} is {said}, which does not cut its {used} tokens into documents.")
        cuts.append(ends + (bounds[row] if ends[-1] == whole else starts[row]))
    return np.concatenate(cuts) if cuts else np.empty(0, np.int64)


def _cuts_of_positions(
    name: str, positions: np.ndarray, bounds: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> np.ndarray:
    zero = positions == 0
    some = stops > starts
    begins = starts[some]
    step = np.append(True, positions[1:].astype(np.int64) == positions[:-1].astype(np.int64) + 1)
    good = zero | step
    # The first of a row: 0, or its place among all tokens of the row, padding too.
    good[begins] = (positions[begins] == 0) | (positions[begins] == begins - bounds[:-1][some])
    if (wrong := np.flatnonzero(~good & _covered(starts, stops, len(positions)))).size:
        raise RowError(
            _row(bounds, wrong[0]),
            f"{name} goes on with {positions[wrong[0]]}: positions that count from 0 in a row or in each of its "
            "documents are understood. Others are not kept; set ignore_fields, and data.positions for what is trained.",
        )
    return np.flatnonzero(zero)


def _trained(
    columns: Columns,
    values: np.ndarray,
    beside: Mapping[str, np.ndarray],
    bounds: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
) -> np.ndarray | None:
    """Which tokens are trained; RowError if columns disagree. What padding holds does not matter."""
    inside = _covered(starts, stops, len(values))
    first = np.zeros(len(values), bool)  # of a document; it is nobody's label
    first[starts] = True
    found: list[tuple[str, np.ndarray]] = []
    for name, kind in columns.said:
        if kind not in LOSS:
            continue
        column = beside[name]
        if kind == "labels":
            wrong = np.flatnonzero(inside & (column != IGNORED_LABEL) & (column != values))
            if wrong.size:
                raise RowError(_row(bounds, wrong[0]), _wrong_label(name, column, values, bounds, int(wrong[0])))
            trained = column != IGNORED_LABEL
        elif kind == "roles":
            if (wrong := np.flatnonzero((column < 0) | (column >= len(ROLES)))).size:
                raise RowError(
                    _row(bounds, wrong[0]),
                    f"{name} holds {column[wrong[0]]}; known are 0 to {len(ROLES) - 1} ({', '.join(ROLES)}). Set "
                    "ignore_fields if it says something else.",
                )
            trained = column == ASSISTANT
        else:
            trained = _is_binary(
                name,
                np.where(inside, column, 0),
                bounds,
                "1 for a token that is trained and 0 for one that is not are understood; weights are not.",
            )
        for other, before in found:
            if (wrong := np.flatnonzero(inside & ~first & (trained != before))).size:
                raise RowError(
                    _row(bounds, wrong[0]),
                    f"{other} and {name} disagree about token {wrong[0] - bounds[_row(bounds, wrong[0])]}: set "
                    f'ignore_fields = ["{name}"], or ["{other}"].',
                )
        found.append((name, trained))
    return found[0][1] & inside if found else None


def _covered(starts: np.ndarray, stops: np.ndarray, length: int) -> np.ndarray:
    """Which values lie in [start, stop) of one of the spans: bool[length]."""
    edges = np.zeros(length + 1, np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, stops, -1)
    return np.cumsum(edges)[:-1] > 0


def _wrong_label(name: str, labels: np.ndarray, ids: np.ndarray, bounds: np.ndarray, at: int) -> str:
    row = _row(bounds, at)
    begin, end = int(bounds[row]), int(bounds[row + 1])
    here, next_ids = labels[begin : end - 1], ids[begin + 1 : end]
    text = (
        f"{name} holds {labels[at]} at token {at - begin}, whose id is {ids[at]}; a label is {IGNORED_LABEL} or the "
        "token's own id, not shifted."
    )
    if len(here) and ((here == next_ids) | (here == IGNORED_LABEL)).all():
        return f"{text} They are shifted: they fit the next token. Write them as transformers does, unshifted."
    return f'{text} Mend them, or set ignore_fields = ["{name}"] to train without them.'


def _check_special(
    name: str, special: np.ndarray, ids: np.ndarray, bounds: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> None:
    """RowError if a row begins or ends with the same special token twice: padding that no column names."""
    long = stops - starts > 1
    for one, two in ((starts[long], starts[long] + 1), (stops[long] - 1, stops[long] - 2)):
        if (wrong := np.flatnonzero((special[one] != 0) & (special[two] != 0) & (ids[one] == ids[two]))).size:
            at = one[wrong[0]]
            raise RowError(
                _row(bounds, at),
                f"{name} shows the special token {ids[at]} several times at an end of the row, which looks like "
                f"padding, and no column says which tokens are trained. Write an attention_mask with 0 for padding, or "
                f'labels; or set ignore_fields = ["{name}"] to train on them.',
            )


def _check_last(
    name: str, kind: str, said: np.ndarray, ids: np.ndarray, bounds: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> None:
    """RowError if a row seems to have padding that no other column names: documents of one id over and over that have
    the number -1, or 0 behind another number; or, by positions, that are one token each, at the end of the row."""
    number = said[starts]
    before = np.append(False, np.isin(starts[1:], stops[:-1]) & ~np.isin(starts[1:], bounds))  # in the row
    if kind == "numbers":
        seems = (number == -1) | ((number == 0) & before & (np.append(0, number[:-1]) != 0))
    else:
        one = stops - starts == 1
        seems = one & before & np.append(False, one[:-1]) & np.isin(stops, bounds)
        seems[1:] &= ids[starts[1:]] == ids[starts[:-1]]
    for start, stop in zip(starts[seems].tolist(), stops[seems].tolist()):
        if (ids[start:stop] == ids[start]).all():
            raise RowError(
                _row(bounds, start),
                f"{name} holds {said[start]} for tokens that are all {ids[start]}, which looks like padding, and no "
                "column says so. Write an attention_mask with 0 for padding, or labels of -100 there.",
            )
