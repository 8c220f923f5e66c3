"""What has been read of each source: where a stage goes on in the epoch that other rows have begun.

A state is int64[n] per source: how many tokens of each document were read, from its beginning, in the epoch that is
under way; its length or more: all of it. None: nothing. Parts of a document take its tokens in the order of reading, so
what was read is always its beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.eligible import cut_documents, piece_limit, separator_tokens
from torchtitan.datasets.mixture import Stream
from torchtitan.datasets.reading_order import Pieces
from torchtitan.datasets.row_table import RowTable

_AT_ONCE = 1 << 24  # parts of a table


def digest(read: Sequence[np.ndarray | None]) -> str | None:
    """Hex, of a state; None if nothing was read."""
    if not any(tokens is not None and tokens.any() for tokens in read):
        return None
    result = hashlib.sha256()
    for tokens in read:
        used = b"" if tokens is None or not tokens.any() else np.ascontiguousarray(tokens, "<i8").tobytes()
        result.update(len(used).to_bytes(8, "little") + used)
    return result.hexdigest()[:16]


def piece_bounds(source: Source, data: Data, seq_len: int) -> tuple[int | None, int | None]:
    """(longest piece, tokens up to which a separator has room)."""
    limit = piece_limit(source, data, seq_len)
    return limit, min(limit or seq_len, seq_len) if source.long_document in ("truncate", "drop") else limit


def first_epochs(
    streams: Sequence[Stream],
    read: Sequence[np.ndarray | None],
    lengths: Sequence[np.ndarray],
    separators: Sequence[int],
    bounds: Sequence[tuple[int | None, int | None]],
    with_roles: Sequence[int],
) -> tuple[list[Pieces | None], list[np.ndarray | None]]:
    """What the first epoch of each stream is made of (None: a whole one), and int64[n] per source, what is read of each
    document of these. read: a state. The rest per source; with_roles: sources of conversations."""
    first: list[Pieces | None] = []
    start = [None if tokens is None else tokens.copy() for tokens in read]
    for stream in streams:
        i, so_far = stream.source, start[stream.source]
        if so_far is None:
            first.append(None)
            continue
        first.append(_rest(stream, so_far, lengths[i], separators[i], *bounds[i], whole_only=i in with_roles))
        if first[-1] is None:
            so_far[stream.documents] = 0
    return first, start


def _rest(
    stream: Stream,
    read: np.ndarray,
    lengths: np.ndarray,
    separator: int,
    limit: int | None,
    bound: int | None,
    whole_only: bool,
) -> Pieces | None:
    """What is left of a stream's epoch; None if that is all of it, or nothing, so that a new one begins.

    read, lengths: int64[n], of the source's documents. separator: how many tokens follow each. limit: of pieces.
    bound: up to which the separator has room (mixture.py). whole_only: documents that are begun count as read.
    """
    first = np.flatnonzero(np.concatenate([[True], stream.documents[1:] != stream.documents[:-1]]))
    documents = stream.documents[first]
    used = np.add.reduceat(stream.lengths, first, dtype=np.int64)
    begun, whole = read[documents], lengths[documents]
    if not begun.any():
        return None
    left = np.minimum(used, whole) - begun
    left[(begun > 0) & whole_only] = 0
    keep = left > 0
    if not keep.any():
        return None
    documents, begun, left = documents[keep], begun[keep], left[keep]
    left += np.where((used >= whole)[keep], separator_tokens(left, separator, bound), 0)
    counts, pieces = cut_documents(left, limit)
    return Pieces(np.repeat(documents, counts), pieces, np.repeat((counts > 1) | (begun > 0), counts))


def state_after(
    table: RowTable,
    rows: int,
    streams: Sequence[Stream],
    start: Sequence[np.ndarray | None],
    lengths: Sequence[np.ndarray],
    read: Sequence[np.ndarray | None],
) -> list[np.ndarray]:
    """The state after the first `rows` rows of a table that was made with the state `read` and began at `start`.

    Documents of which these rows read no stream keep theirs: an epoch that is full ends only where the next one begins,
    since the stage after may have other streams, of which it is a part.
    """
    result = [np.zeros(len(n), np.int64) if tokens is None else tokens.copy() for n, tokens in zip(lengths, start)]
    for s, stream in enumerate(streams):
        state = result[stream.source]
        epoch = max(int(epochs.max(initial=-1)) for _, epochs, _ in _parts_of(table, rows, s, stream))
        before = read[stream.source]
        if epoch < 0 and before is not None:
            state[stream.documents] = before[stream.documents]
        if epoch > 0:
            state[stream.documents] = 0
        for documents, epochs, tokens in _parts_of(table, rows, s, stream):
            now = epochs == epoch
            state += np.bincount(documents[now], tokens[now], len(state)).astype(np.int64)
    return [np.minimum(state, n) for state, n in zip(result, lengths)]


def _parts_of(table: RowTable, rows: int, number: int, stream: Stream) -> Iterator[tuple[np.ndarray, ...]]:
    """(document, epoch, length) of the parts of a stream in the first rows, many at a time; of rows left out too."""
    mine = np.zeros(int(stream.documents[-1]) + 1, bool)  # documents come in order
    mine[stream.documents] = True
    end = int(table.offsets[rows])
    for begin in range(0, end, _AT_ONCE):
        run = slice(begin, min(end, begin + _AT_ONCE))
        part = np.flatnonzero(table.source[run] == stream.source)
        document = table.document[run][part]
        part = part[(document < len(mine)) & mine[np.minimum(document, len(mine) - 1)]]
        yield table.document[run][part], table.epoch[run][part], table.length[run][part]
    out = table.unlabelled[(table.unlabelled[:, 1] < rows) & (table.unlabelled[:, 2] == number)]
    yield out[:, 3], out[:, 4], out[:, 6]
