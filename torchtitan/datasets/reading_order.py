"""The order in which the pieces of a stage's streams are read: epoch after epoch, merged so that the shares hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchtitan.datasets.mixture import Stream

STREAM_SEED = 1


@dataclass(frozen=True)
class Merged:
    """The pieces of a stage in the order in which they are packed; int32[N] each."""

    stream: np.ndarray
    piece: np.ndarray
    """Index into the stream's pieces."""

    epoch: np.ndarray
    """Of the stream, from 0."""

    lengths: np.ndarray
    """Tokens of each piece."""


def merge(streams: Sequence[Stream], tokens: int, seed: int) -> Merged:
    """The streams' pieces, merged so that every stretch of the result has their shares; at least `tokens` in all.

    A piece's time is the middle of its tokens on its stream's line, divided by the stream's share, and pieces are taken
    in the order of time: at any moment each stream is within about half a piece of its exact share. Each epoch is a
    new order of all pieces of the stream. The first pieces do not depend on how many are asked for.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    horizon = np.inf
    for number, stream in enumerate(streams):
        pieces, epochs = take_epochs(stream, stream.share * tokens, seed)
        lengths = stream.lengths[pieces]
        ends = np.cumsum(lengths, dtype=np.int64)
        times = (ends - 0.5 * lengths) / stream.share
        horizon = min(horizon, times[-1])
        parts.append((times, np.full(len(pieces), number, np.int32), pieces, epochs, lengths))
    times, numbers, pieces, epochs, lengths = (np.concatenate(column) for column in zip(*parts))
    del parts
    order = np.argsort(times, kind="stable")
    order = order[: int(np.searchsorted(times[order], horizon, side="right"))]
    return Merged(numbers[order], pieces[order], epochs[order], lengths[order])


def take_epochs(stream: Stream, tokens: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(pieces, epochs) int32 of a stream, epoch after epoch, until the middle of the last piece is beyond `tokens`."""
    tokens += int(stream.lengths.max())
    count = int(tokens // stream.tokens) + 1
    # Seeded by what the stream is, not by its number: another source's options do not reorder this one.
    named = ("all", "long", "short")
    kind = named.index(stream.kind) if stream.kind in named else 3 + int(stream.kind.removeprefix("bin "))
    orders = [
        np.random.default_rng([seed, stream.source, kind, epoch, STREAM_SEED])
        .permutation(len(stream.lengths))
        .astype(np.int32)
        for epoch in range(count)
    ]
    pieces = np.concatenate(orders)
    stop = int(np.searchsorted(np.cumsum(stream.lengths[pieces], dtype=np.int64), tokens)) + 1
    return pieces[:stop], np.repeat(np.arange(count, dtype=np.int32), len(stream.lengths))[:stop]
