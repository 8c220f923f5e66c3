"""What a stage reads of each source, and in which shares of the tokens.

Filters, the long-document policy and the length strategies all come down to streams: a stream is the pieces of some of
a source's documents, read again and again in new orders, with a share of the stage's tokens. A source whose long
documents are upsampled is two streams, its long and its short documents, and one with length_bins a stream per bin, so
that these shares hold like any other. A schedule moves the shares: a stream then has a curve (curriculum.py).
data.strategy acts in three functions: piece_limit of eligible.py (cut_*), _weights (domain_*) and _split_share
(*_upsampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchtitan.config.data_schema import Data
from torchtitan.datasets.curriculum import length_shares_at, mean, resolve, schedule_steps, weights_at
from torchtitan.datasets.eligible import (
    Eligible,
    LeftOut,
    apply_filters,
    check_upsampled,
    cut_documents,
    empty_bin,
    long_threshold,
    nothing_left,
    without_copies,
)
from torchtitan.datasets.same_data import normalize
from torchtitan.tools.errors import UserError

ANY_LENGTH = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Stream:
    """Pieces of documents of one source, with a share of the stage's tokens."""

    source: int
    kind: str
    """Which documents of the source: all, long or short by its threshold, or "bin 0" and so on by its length_bins. It
    seeds the order of the pieces, so that another source's options do not reorder this one."""

    share: float
    """Of the tokens in rows, padding not counted; the streams' shares sum to 1. With a curve its mean over the stage,
    and only that depends on how many steps the stage has."""

    documents: np.ndarray
    """int32[P], the document of each piece. The pieces of a document follow each other."""

    lengths: np.ndarray
    """int32[P], tokens of each piece, separators included."""

    tokens: int
    """Sum of the lengths: one epoch."""

    over: int = -1
    """The documents have more tokens than this,"""

    up_to: int = ANY_LENGTH
    """and at most this many."""

    curve: np.ndarray | None = None
    """float64[k, 2], (step, share) at the points of the schedule: linear between them, constant before the first and
    after the last. None: the share is always the same."""

    @property
    def name(self) -> str:
        """all, long, short or, of length_bins, 8,193 to 65,536."""
        if not self.kind.startswith("bin"):
            return self.kind
        if self.up_to == ANY_LENGTH:
            return f"over {self.over:,}"
        return f"up to {self.up_to:,}" if self.over < 0 else f"{self.over + 1:,} to {self.up_to:,}"


def build_streams(
    data: Data,
    lengths: Sequence[np.ndarray],
    separators: Sequence[int],
    seq_len: int,
    steps: range,
    excluded: Sequence[np.ndarray | None] = (),
    hashes: Sequence[np.ndarray | None] = (),
) -> tuple[list[Stream], list[LeftOut]]:
    """The streams of data.sources (of those with a weight) and what each source leaves out.

    lengths: int64[n] per source, tokens of its documents. separators: how many tokens follow each document of a source.
    steps: that are planned; they decide Stream.share where there is a curve, and nothing else. excluded, hashes: of
    each corpus (corpus.Corpus).
    UserError if a source has nothing left, or its documents do not have the lengths that are asked for.
    """
    unknown = [None] * len(data.sources)
    eligible = [
        apply_filters(source, data, tokens, separator, seq_len, out)
        for source, tokens, separator, out in zip(data.sources, lengths, separators, excluded or unknown, strict=True)
    ]
    at = schedule_steps(data) or [0]
    is_read = sources_read(data)
    if data.drop_duplicates:
        eligible = without_copies(eligible, hashes or unknown, is_read)
    long = [e.lengths > long_threshold(source, data) for source, e in zip(data.sources, eligible)]
    long_shares = [int(e.used[which].sum()) / max(1, int(e.used.sum())) for which, e in zip(long, eligible)]
    for source, read, tokens, left in zip(data.sources, is_read, lengths, eligible):
        if read and len(left.documents) == 0:
            raise UserError(nothing_left(source, data, tokens[: source.max_documents], left, seq_len))
    check_upsampled(data, eligible, long_shares, is_read)
    parts = [_parts(i, data, long_shares) for i in range(len(data.sources))]
    table = resolve(lambda step: _shares(data, step, long_shares), at)
    of_parts = np.split(table[:, 1:], np.cumsum([len(p) for p in parts])[:-1], axis=1)
    streams = []
    for index, (left, shares) in enumerate(zip(eligible, of_parts)):
        for (kind, over, up_to), share in zip(parts[index], shares.T):
            if not share.any():
                continue
            which = (left.lengths > over) & (left.lengths <= up_to)
            documents, pieces = _pieces(left, which)
            curve = None if (share == share[0]).all() else np.stack([table[:, 0], share], axis=1)
            of_stage = float(share[0]) if curve is None else mean(curve, steps)
            epoch = int(left.used[which].sum())
            stream = Stream(index, kind, of_stage, documents, pieces, epoch, over, up_to, curve)
            if not which.any():
                raise UserError(empty_bin(data.sources[index], kind, stream.name, left))
            streams.append(stream)
    return streams, [e.left_out for e in eligible]


def sources_read(data: Data) -> np.ndarray:
    """bool per source: whether it has a weight at some step."""
    return np.asarray(np.any([_weights(data, step) for step in schedule_steps(data) or [0]], axis=0))


def _weights(data: Data, step: float) -> list[float]:
    """Of the sources at a step, summing to 1, before lengths are looked at."""
    weights = weights_at(data, step)
    if data.strategy == "domain_upsampling":
        named = data.upsampled_sources
        weights = [data.upsampled_weight if s.name in named else w for s, w in zip(data.sources, weights)]
    return normalize(weights)


def _parts(index: int, data: Data, long_shares: list[float]) -> list[tuple[str, int, int]]:
    """The streams that a source makes: kind, and the lengths of the documents as in Stream."""
    source = data.sources[index]
    if source.length_bins:
        edges = [-1, *source.length_bins, ANY_LENGTH]
        return [(f"bin {i}", over, up_to) for i, (over, up_to) in enumerate(zip(edges, edges[1:]))]
    if _split_share(index, data, _weights(data, 0), long_shares) is None:
        return [("all", -1, ANY_LENGTH)]
    threshold = long_threshold(source, data)
    return [("long", threshold, ANY_LENGTH), ("short", -1, threshold)]


def _shares(data: Data, step: float, long_shares: list[float]) -> list[float]:
    """The shares of the stage's tokens at a step of all _parts of all sources."""
    weights = _weights(data, step)
    shares: list[float] = []
    for index, (source, weight) in enumerate(zip(data.sources, weights)):
        if source.length_bins:
            shares += [weight * share for share in length_shares_at(source, step)]
        else:
            shares += _split_share(index, data, weights, long_shares) or (weight,)
    return shares


def _split_share(index: int, data: Data, weights: list[float], long_shares: list[float]) -> tuple[float, float] | None:
    """Shares of the stage's tokens for a source's long and short documents; None: they are not told apart.

    Equal to keeping short documents with a probability q, as the paper's code does, with q solved for the wanted
    share (p long by nature, t wanted: q = p (1 - t) / (t (1 - p))), but exact in every stretch of the stage.
    """
    source, weight, natural = data.sources[index], weights[index], long_shares[index]
    if data.strategy == "global_upsampling":
        overall = sum(w * p for w, p in zip(weights, long_shares))
        if overall >= data.long_share:
            return None
        long = data.long_share * weight * natural / overall
        return long, (1 - data.long_share) * weight * (1 - natural) / (1 - overall)
    if data.strategy == "per_source_upsampling":
        if natural == 0:  # nothing to upsample: it keeps its share and its lengths, and the report says so
            return None
        wanted = data.long_share
    elif source.upsample_to is not None:
        wanted = source.upsample_to
    elif source.upsample is not None:
        wanted = source.upsample * natural / (source.upsample * natural + 1 - natural)
    else:
        return None
    if natural > 0 and wanted <= natural:
        return None
    return weight * wanted, weight * (1 - wanted)


def _pieces(eligible: Eligible, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents, lengths) int32[P] of the pieces of some eligible documents, bool[n]."""
    counts, lengths = cut_documents(eligible.used[which], eligible.limit)
    return np.repeat(eligible.documents[which], counts), lengths
