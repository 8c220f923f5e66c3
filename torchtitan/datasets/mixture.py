"""What a stage reads of each source, and in which shares of the tokens.

Filters, the long-document policy and the length strategies all come down to streams: a stream is the pieces of some of
a source's documents, read again and again in new orders, with a share of the stage's tokens. A source whose long
documents are upsampled is two streams, its long and its short documents, so that the long share holds like any other.
data.strategy acts in three functions: piece_limit (cut_*), _weights (domain_*) and _split_share (*_upsampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.same_data import normalize
from torchtitan.tools.constants import CUT_AT
from torchtitan.tools.errors import UserError

Kind = Literal["all", "long", "short"]


@dataclass(frozen=True)
class Stream:
    """Pieces of documents of one source, with a share of the stage's tokens."""

    source: int
    kind: Kind
    share: float
    """Of the tokens in rows, padding not counted; the streams' shares sum to 1."""

    documents: np.ndarray
    """int32[P], the document of each piece. The pieces of a document follow each other."""

    lengths: np.ndarray
    """int32[P], tokens of each piece, separators included."""

    tokens: int
    """Sum of the lengths: one epoch."""


@dataclass(frozen=True)
class LeftOut:
    """What a source's options leave out of every epoch: (documents, tokens) by reason."""

    below_min_length: tuple[int, int]
    above_max_length: tuple[int, int]
    dropped: tuple[int, int]
    """Longer than a row (or chunk_length) under long_document = "drop"."""

    beyond_max_documents: tuple[int, int]

    truncated: tuple[int, int]
    """Documents cut short by long_document = "truncate", and the tokens cut off."""


@dataclass(frozen=True)
class _Eligible:
    """The documents of a source that may be read, and how much of each."""

    documents: np.ndarray  # int32[n]
    lengths: np.ndarray  # int64[n], whole, without the separator
    used: np.ndarray  # int64[n], what the long-document policy leaves of that
    limit: int | None  # longest piece
    left_out: LeftOut


def build_streams(
    data: Data, lengths: Sequence[np.ndarray], separators: Sequence[int], seq_len: int
) -> tuple[list[Stream], list[LeftOut]]:
    """The streams of data.sources (of those with a weight) and what each source leaves out.

    lengths: int64[n] per source, tokens of its documents. separators: how many tokens follow each document of a source.
    UserError if a source has nothing left, or its long documents cannot be upsampled as asked.
    """
    eligible = [
        _apply_filters(source, data, tokens, separator, seq_len)
        for source, tokens, separator in zip(data.sources, lengths, separators, strict=True)
    ]
    weights = _weights(data)
    for source, weight, tokens, left in zip(data.sources, weights, lengths, eligible):
        if weight > 0 and len(left.documents) == 0:
            raise UserError(_nothing_left(source, data, tokens[: source.max_documents], left, seq_len))
    long_tokens = [int(e.used[_is_long(e, data)].sum()) for e in eligible]
    long_shares = [long / max(1, int(e.used.sum())) for long, e in zip(long_tokens, eligible)]
    if data.strategy in ("per_source_upsampling", "global_upsampling") and not any(
        weight > 0 and long for weight, long in zip(weights, long_tokens)
    ):
        raise UserError(
            f'data.strategy = "{data.strategy}" upsamples documents of more than data.long_threshold = '
            f"{data.long_threshold} tokens, but no source has one. Lower the threshold."
        )
    streams = []
    for index, (source, left) in enumerate(zip(data.sources, eligible)):
        if weights[index] == 0:
            continue
        split = _split_share(index, data, weights, long_shares)
        if split is None:
            streams.append(_stream(index, "all", weights[index], left, np.ones(len(left.documents), bool)))
            continue
        if long_tokens[index] == 0 and data.strategy != "global_upsampling":
            key = "upsample_to" if source.upsample_to is not None else "upsample"
            raise UserError(
                f"Data source {source.name!r}: {key} upsamples documents of more than data.long_threshold = "
                f"{data.long_threshold} tokens, but it has none: its longest has {int(left.lengths.max())}. Lower the "
                f"threshold, or take {key} out."
            )
        long = _is_long(left, data)
        parts: list[tuple[Kind, float, np.ndarray]] = [("long", split[0], long), ("short", split[1], ~long)]
        streams += [_stream(index, kind, share, left, which) for kind, share, which in parts if share > 0]
    return streams, [e.left_out for e in eligible]


def check_epochs(data: Data, streams: Sequence[Stream], read: Sequence[int]) -> None:
    """UserError if a stage that reads `read` tokens of each stream reads a source more often than max_epochs."""
    for stream, needed in zip(streams, read, strict=True):
        source, epochs = data.sources[stream.source], needed / stream.tokens
        if source.max_epochs is not None and epochs > source.max_epochs:
            which = "its documents" if stream.kind == "all" else f"its {stream.kind} documents"
            raise UserError(
                f"Data source {source.name!r} cannot fill its share: {which} hold {stream.tokens:,} tokens, and "
                f"{stream.share:.4g} of the stage's {sum(read):,} are {needed:,}, so that they would be read "
                f"{epochs:.2f} times, more than max_epochs = {source.max_epochs:g}. Lower its weight "
                f"({source.max_epochs / epochs:.3g} times its share would do) or training.steps, give it more text, or "
                "raise max_epochs."
            )


def _apply_filters(source: Source, data: Data, tokens: np.ndarray, separator: int, seq_len: int) -> _Eligible:
    beyond = tokens[source.max_documents :] if source.max_documents is not None else tokens[:0]
    tokens = tokens[: source.max_documents]
    longest = source.max_length if source.max_length is not None else np.iinfo(np.int64).max
    short, long = tokens < max(1, source.min_length), tokens > longest
    fits = ~short & ~long
    limit = piece_limit(source, data, seq_len)
    dropped = np.zeros(len(tokens), bool)
    used, bound = tokens, limit
    if source.long_document != "split":
        bound = min(limit or seq_len, seq_len)
        if source.long_document == "drop":
            dropped = fits & (tokens > bound)
        else:
            used = np.minimum(tokens, bound)
    keep = fits & ~dropped
    cut = keep & (used < tokens)
    left_out = LeftOut(
        below_min_length=(int(short.sum()), int(tokens[short].sum())),
        above_max_length=(int(long.sum()), int(tokens[long].sum())),
        dropped=(int(dropped.sum()), int(tokens[dropped].sum())),
        beyond_max_documents=(len(beyond), int(beyond.sum())),
        truncated=(int(cut.sum()), int((tokens - used)[cut].sum())),
    )
    # A separator is left out if the last piece has no room for it: it separates what shares a row.
    room = separator if bound is None else np.where((used - 1) % bound + 1 + separator <= bound, separator, 0)
    used = np.where(cut, used, used + room)
    return _Eligible(np.flatnonzero(keep).astype(np.int32), tokens[keep], used[keep], limit, left_out)


def piece_limit(source: Source, data: Data, seq_len: int) -> int | None:
    """Tokens of the longest piece of a document before packing; None: packing alone cuts (concat)."""
    limits = [n for n in (source.chunk_length, CUT_AT.get(data.strategy)) if n is not None]
    if data.packing != "concat":  # concat cuts documents where rows end
        limits.append(seq_len)
    return min(limits) if limits else None


def _weights(data: Data) -> list[float]:
    """Of the sources, summing to 1, before lengths are looked at."""
    weights = [source.weight for source in data.sources]
    if data.strategy == "domain_upsampling":
        named = data.upsampled_sources
        weights = [data.upsampled_weight if s.name in named else s.weight for s in data.sources]
    return normalize(weights)


def _is_long(eligible: _Eligible, data: Data) -> np.ndarray:
    return eligible.lengths > data.long_threshold


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


def _stream(source: int, kind: Kind, share: float, eligible: _Eligible, which: np.ndarray) -> Stream:
    documents, used, limit = eligible.documents[which], eligible.used[which], eligible.limit
    if limit is None or int(used.max()) <= limit:
        lengths = used.astype(np.int32)
    else:
        counts = -(-used // limit)
        last = np.cumsum(counts) - 1
        lengths = np.full(int(counts.sum()), limit, np.int32)
        lengths[last] = used - (counts - 1) * limit
        documents = np.repeat(documents, counts)
    return Stream(source, kind, share, documents, lengths, int(used.sum()))


def _nothing_left(source: Source, data: Data, tokens: np.ndarray, left: _Eligible, seq_len: int) -> str:
    o = left.left_out
    bound = min(piece_limit(source, data, seq_len) or seq_len, seq_len)
    reasons = [
        (o.below_min_length[0], f"{o.below_min_length[0]} shorter than min_length = {source.min_length}"),
        (o.above_max_length[0], f"{o.above_max_length[0]} longer than max_length = {source.max_length}"),
        (o.dropped[0], f'{o.dropped[0]} longer than {bound} tokens, which long_document = "drop" leaves out'),
    ]
    why = ", ".join(text for count, text in reasons if count)
    lengths = f" Its documents have {int(tokens.min())} to {int(tokens.max())} tokens." if len(tokens) else ""
    return (
        f"Data source {source.name!r} has no document left to read: of {len(tokens)}, {why or 'none has a token'}."
        f"{lengths} Change these options, or take the source out."
    )
