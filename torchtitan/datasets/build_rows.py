"""The rows of a stage, a group at a time: packed, put in order, and cut out of their documents.

Made of document lengths alone (and, of conversations, of who speaks), in about two microseconds per piece; memory does
not grow with the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from torchtitan.config.data_schema import Data
from torchtitan.datasets.curriculum import integral
from torchtitan.datasets.mixture import Stream
from torchtitan.datasets.packing import make_group, order_rows
from torchtitan.datasets.reading_order import Mixture, Pieces, Reader, curve_of
from torchtitan.datasets.row_parts import Group
from torchtitan.datasets.row_table import PADDING_SEGMENT, RowTable
from torchtitan.tools.errors import UserError

GROUP_SEED = 2  # apart from the streams' seeds


@dataclass(frozen=True)
class Stage:
    """All that a table is made of."""

    streams: Sequence[Stream]
    data: Data
    seq_len: int
    rows: int
    """How many rows to make."""

    seed: int
    salt: Sequence[int] = ()
    """Comes to the seed, so that a stage that goes on from other rows has new orders."""

    short_window: int | None = None
    rows_per_step: int = 1
    first_row: int = 0
    """What of the stage was read by other rows before: its curves begin there."""

    first: Sequence[Pieces | None] = ()
    """Per stream, what the first epoch is made of, if it is not a whole one."""

    read: Sequence[np.ndarray | None] = ()
    """Per source int64[n], tokens of each document that are read before the first epoch goes on; None: nothing."""

    has_label: Callable[[int, int, int, int], bool] | None = None
    """(source, document, start, length) -> whether a token of the part, other than its first, is trained on."""

    with_roles: Sequence[int] = ()
    """The sources to ask it for; a part of another has a label if it has two tokens."""


def make_chunks(stage: Stage) -> Iterator[RowTable]:
    """The table, a group of rows at a time; the first rows do not depend on how many are asked for.

    In `twice` and `unlabelled` rows are counted from the table's beginning.
    """
    first = stage.first or [None] * len(stage.streams)
    readers = [Reader(stream, [stage.seed, *stage.salt], pieces) for stream, pieces in zip(stage.streams, first)]
    # By the first step's shares: those of the whole stage depend on its length, and the rows must not.
    step = stage.first_row / stage.rows_per_step
    at_first = [float(np.interp(step, *curve_of(stream).T)) for stream in stage.streams]
    mixture = Mixture(readers, stage.rows_per_step, stage.first_row, _tokens_per_row(stage, at_first))
    starts = _Starts(stage)
    made = number = unlabelled_rows = 0
    read = np.zeros(len(readers), np.int64)
    left_out = 0  # tokens, since the last row that was made
    while made < stage.rows:
        group = make_group(mixture, stage.data.packing, stage.seq_len, stage.short_window)
        group, tokens = _ordered(group, mixture, stage, number)
        number += 1
        start = starts.next(group)
        labelled = _labelled(group, start, stage)
        if labelled.any():
            left_out = 0
            mixture.count(tokens[labelled])
        else:
            left_out += int(tokens.sum())
            mixture.count(tokens, rows=0)  # so that other streams have their turn
        if left_out > _enough(mixture, stage.seq_len):
            raise UserError(_no_labels(stage, made))
        keep = min(int(labelled.sum()), stage.rows - made)
        chunk = _chunk(group, start, labelled, tokens, stage, made, keep, unlabelled_rows)
        read += chunk.tokens
        unlabelled_rows += int((~labelled).sum())
        made += keep
        if not unlabelled_rows:  # or else what is left out counts too, and only the whole table says how much that is
            _check_read(stage, read, made)
        yield chunk


def _needed(stage: Stage, per_row: float) -> np.ndarray:
    """int64[S]: tokens of each stream, if rows hold `per_row`."""
    steps = (stage.first_row + np.array([0, stage.rows])) / stage.rows_per_step
    areas = [np.diff(integral(curve_of(stream), steps))[0] for stream in stage.streams]
    return (np.array(areas) * stage.rows_per_step * per_row).astype(np.int64)


def _too_much(stage: Stage, tokens: np.ndarray) -> bool:
    """Whether max_epochs forbids to read so much of each stream."""
    most = [stage.data.sources[stream.source].max_epochs for stream in stage.streams]
    limits = [np.inf if epochs is None else epochs * s.tokens for epochs, s in zip(most, stage.streams)]
    return bool((tokens > limits).any())


def check_needed(stage: Stage) -> None:
    """UserError, before anything is made, if max_epochs is exceeded however rows are filled."""
    mean = [stream.share for stream in stage.streams]
    least = _tokens_per_row(stage, mean) / (2 if stage.data.packing != "best_fit" else 4)  # rows hold more than that
    if _too_much(stage, _needed(stage, least)):
        check_epochs(stage.data, stage.streams, _needed(stage, _tokens_per_row(stage, mean)).tolist())


def check_epochs(data: Data, streams: Sequence[Stream], read: Sequence[int]) -> None:
    """UserError if a stage that reads `read` tokens of each stream reads a source more often than max_epochs."""
    alone = len({stream.source for stream in streams}) == 1
    for stream, needed in zip(streams, read, strict=True):
        source, epochs = data.sources[stream.source], needed / stream.tokens
        if source.max_epochs is not None and epochs > source.max_epochs:
            which = "its documents" if stream.kind == "all" else f"its documents ({stream.name})"
            of_stage = f"{stream.share:.4g} of the stage's {sum(read):,} are {needed:,}"
            weight = f"its weight ({source.max_epochs / epochs:.3g} times its share would do) or "
            raise UserError(
                f"Data source {source.name!r} cannot fill its share: {which} hold {stream.tokens:,} tokens, and "
                f"{of_stage if len(streams) > 1 else f'the stage reads {needed:,}'}, so that they would be read "
                f"{epochs:.2f} times, more than max_epochs = {source.max_epochs:g}. Lower "
                f"{'' if alone else weight}training.steps, give it more text, or raise max_epochs."
            )


def _tokens_per_row(stage: Stage, shares: Sequence[float]) -> float:
    """As the lengths of the pieces let one expect, if the streams have these shares; at most."""
    if stage.data.packing != "single":
        return stage.seq_len
    return 1 / sum(share * len(s.lengths) / s.tokens for share, s in zip(shares, stage.streams))


def _check_read(stage: Stage, tokens: np.ndarray, rows: int) -> None:
    """UserError if the first `rows` rows read more than max_epochs allows; it says what the whole stage would read."""
    if _too_much(stage, tokens):
        needed = _needed(stage, float(tokens.sum()) / rows)
        check_epochs(stage.data, stage.streams, np.maximum(tokens, needed).tolist())


def _enough(mixture: Mixture, seq_len: int) -> float:
    """Tokens in which each stream that is due has been read twice."""
    shares = mixture.shares(np.array([mixture.row]))[0]
    epochs = [r.stream.tokens / share for r, share in zip(mixture.readers, shares) if share > 0]
    return 2 * max(epochs) + 256 * seq_len


def _no_labels(stage: Stage, made: int) -> str:
    names = ", ".join(repr(stage.data.sources[i].name) for i in sorted({s.source for s in stage.streams}))
    where = f"after step {(stage.first_row + made) // stage.rows_per_step}" if made else "in the stage"
    return (
        f"No row {where} has a token that is trained on: those of {names} hold prompts or documents of one token only. "
        'Take a longer training.seq_len, or long_document = "split", so that answers are reached; or other sources.'
    )


def _ordered(group: Group, mixture: Mixture, stage: Stage, number: int) -> tuple[Group, np.ndarray]:
    """The group with its rows in the order in which they are read; and float64[R, S], tokens of each stream in them."""
    count, streams = int(group.row[-1]) + 1, len(mixture.readers)
    tokens = np.bincount(group.row * streams + group.stream, group.length, count * streams).reshape(count, streams)
    order = np.arange(count)
    if not group.in_order:
        order = np.random.default_rng([stage.seed, number, GROUP_SEED]).permutation(count)
    tail = order[:0]
    if group.last is not None:
        order, tail = order[order != group.last], np.array([group.last])
    if streams > 1 and len(order):
        shares = mixture.shares(mixture.row + np.arange(len(order)))
        order = order[order_rows(tokens[order], shares, mixture.read - mixture.goal, stage.seq_len)]
    order = np.concatenate([order, tail])
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    part = np.argsort(place[group.row], kind="stable")
    columns = {f.name: getattr(group, f.name) for f in fields(Group)}
    columns = {name: c[part] if isinstance(c, np.ndarray) else c for name, c in columns.items()}
    last = None if group.last is None else count - 1
    return Group(**columns | {"row": place[group.row[part]], "last": last}), tokens[order]


class _Starts:
    """Where parts begin in their documents.

    Packing decides how long the parts of a document are, not which part is which: they take its tokens in the order in
    which the parts are read, so that what has been read of a document is its beginning.
    """

    def __init__(self, stage: Stage) -> None:
        sources = [stream.source for stream in stage.streams]
        sizes = {s: max(int(t.documents.max()) + 1 for t in stage.streams if t.source == s) for s in sources}
        self.read = {s: np.zeros(size, np.int32) for s, size in sizes.items()}
        for source, read in enumerate(stage.read):
            if read is not None and source in sizes:
                self.read[source][:] = read[: sizes[source]]
        self.epochs = [0] * len(stage.streams)
        self.streams = stage.streams

    def next(self, group: Group) -> np.ndarray:
        """int32[N], of the parts of the next group, whose rows are in order."""
        start = np.zeros(len(group.row), np.int32)
        for s, stream in enumerate(self.streams):
            read = self.read[stream.source]
            mine = np.flatnonzero((group.stream == s) & group.partial)
            ends = group.epoch[group.stream == s].max(initial=self.epochs[s])
            for epoch in np.unique(group.epoch[mine]).tolist():
                self._begin(s, epoch)
                now = mine[group.epoch[mine] == epoch]
                now = now[np.argsort(group.document[now], kind="stable")]
                document, length = group.document[now], group.length[now]
                before = np.cumsum(length) - length
                is_first = np.concatenate([[True], document[1:] != document[:-1]])
                start[now] = before - np.maximum.accumulate(np.where(is_first, before, 0)) + read[document]
                np.add.at(read, document, length.astype(np.int32))
            self._begin(s, int(ends))
        return start

    def _begin(self, stream: int, epoch: int) -> None:
        if epoch != self.epochs[stream]:
            self.epochs[stream] = epoch
            self.read[self.streams[stream].source][self.streams[stream].documents] = 0


def _labelled(group: Group, start: np.ndarray, stage: Stage) -> np.ndarray:
    """bool[R]: rows in which a token has a label."""
    source = np.array([s.source for s in stage.streams])[group.stream]
    plain = ~np.isin(source, stage.with_roles)
    labelled = np.zeros(int(group.row[-1]) + 1, bool)
    labelled[group.row[plain & (group.length > 1)]] = True
    if stage.has_label is not None:
        ask = np.flatnonzero(~plain & ~labelled[group.row])
        columns = (column[ask].tolist() for column in (group.row, source, group.document, start, group.length))
        for row, *part in zip(*columns):
            labelled[row] = labelled[row] or stage.has_label(*part)
    return labelled


def _chunk(
    group: Group,
    start: np.ndarray,
    labelled: np.ndarray,
    tokens: np.ndarray,
    stage: Stage,
    made: int,
    keep: int,
    unlabelled_rows: int,
) -> RowTable:
    """The first `keep` labelled rows of a group. made, unlabelled_rows: rows that were made and left out before."""
    before = np.cumsum(labelled) - labelled  # of each row, the labelled ones before it
    stays = labelled & (before < keep)
    part = stays[group.row]
    row = before[group.row[part]]
    source = np.array([s.source for s in stage.streams], np.int16)
    stream, document, epoch, length = (c[part] for c in (group.stream, group.document, group.epoch, group.length))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=keep))])
    out = ~labelled[group.row] & (made + before[group.row] < stage.rows)
    numbers = unlabelled_rows + (np.cumsum(~labelled) - 1)[group.row[out]]
    columns = numbers, made + before[group.row[out]], group.stream[out], group.document[out], group.epoch[out]
    d = stage.data
    work = np.zeros(0, np.int64)
    if keep:
        work = _work(offsets, length, stage.seq_len, d.cross_document_attention, stage.short_window)
        work = work + (_anchor_work(offsets, length) if d.anchor_attention else 0)
    return RowTable(
        offsets=offsets,
        source=source[stream],
        document=document.astype(np.int32),
        epoch=epoch.astype(np.int32),
        start=start[part],
        length=length.astype(np.int32),
        work=work,
        tokens=tokens[stays].sum(axis=0).astype(np.int64),
        twice=np.full(int(group.last is not None and stays[-1] and _holds_twice(group)), made + keep - 1),
        unlabelled=np.stack([*columns, start[out], group.length[out]], axis=1).astype(np.int64),
    )


def _holds_twice(group: Group) -> bool:
    """Whether the last row of a group holds a document in two epochs; no other row can."""
    mine = group.row == group.row[-1]
    stream, document, epoch = group.stream[mine], group.document[mine], group.epoch[mine]
    places = np.unique(np.stack([stream, document, epoch]), axis=1)[:2]
    return bool((places[:, 1:] == places[:, :-1]).all(axis=0).any())


def _work(
    offsets: np.ndarray, length: np.ndarray, seq_len: int, cross_document: bool, short_window: int | None
) -> np.ndarray:
    n = length.astype(np.int64)
    tokens = np.add.reduceat(n, offsets[:-1])
    pairs = np.add.reduceat(n * (n + 1) // 2, offsets[:-1])
    if cross_document:
        together = np.maximum.reduceat(n, offsets[:-1]) > (short_window or 0)
        pairs = np.where(together, tokens * (tokens + 1) // 2, pairs)
    whole, rest = np.divmod(seq_len - tokens, PADDING_SEGMENT)
    return pairs + whole * (PADDING_SEGMENT * (PADDING_SEGMENT + 1) // 2) + rest * (rest + 1) // 2


def _anchor_work(offsets: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64[R]: the row's first token, as one more key for all but the first document, which has it anyway."""
    return np.add.reduceat(length, offsets[:-1], dtype=np.int64) - length[offsets[:-1]]
