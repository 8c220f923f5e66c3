"""Which documents of a source a stage may read, and how much of each: filters, copies, the long-document policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.same_data import BY_LENGTH
from torchtitan.tools.constants import CUT_AT
from torchtitan.tools.errors import UserError


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

    evaluation: tuple[int, int] = (0, 0)
    """With text of the evaluation, under data.decontaminate."""

    copies: tuple[int, int] = (0, 0)
    """Of documents before them, in this source or an earlier one, under data.drop_duplicates."""


@dataclass(frozen=True)
class Eligible:
    """The documents of a source that may be read, and how much of each."""

    documents: np.ndarray  # int32[n]
    lengths: np.ndarray  # int64[n], whole, without the separator
    used: np.ndarray  # int64[n], what the long-document policy leaves of that
    limit: int | None  # longest piece
    left_out: LeftOut


def apply_filters(
    source: Source, data: Data, tokens: np.ndarray, separator: int, seq_len: int, excluded: np.ndarray | None
) -> Eligible:
    beyond = tokens[source.max_documents :] if source.max_documents is not None else tokens[:0]
    tokens = tokens[: source.max_documents]
    longest = source.max_length if source.max_length is not None else np.iinfo(np.int64).max
    short, long = tokens < max(1, source.min_length), tokens > longest
    fits = ~short & ~long
    held_out = fits & (np.zeros(len(tokens), bool) if excluded is None else excluded[: len(tokens)])
    fits &= ~held_out
    limit = piece_limit(source, data, seq_len)
    dropped = np.zeros(len(tokens), bool)
    used, bound = tokens, limit
    if source.long_document in ("truncate", "drop"):
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
        evaluation=(int(held_out.sum()), int(tokens[held_out].sum())),
    )
    used = np.where(cut, used, used + separator_tokens(used, separator, bound))
    return Eligible(np.flatnonzero(keep).astype(np.int32), tokens[keep], used[keep], limit, left_out)


def separator_tokens(used: np.ndarray, separator: int, bound: int | None) -> np.ndarray:
    """int64[n]: tokens of the separators after so many tokens of documents. One is left out if the last piece, of at
    most `bound` tokens, has no room for it: it separates what shares a row."""
    fits = True if bound is None else (used - 1) % bound + 1 + separator <= bound
    return np.where(fits, separator, np.zeros_like(used))


def cut_documents(used: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """int64[n], into how many pieces of at most `limit` tokens documents are cut; int32[P], the pieces' tokens."""
    if limit is None or int(used.max(initial=0)) <= limit:
        return np.ones(len(used), np.int64), used.astype(np.int32)
    counts = -(-used // limit)
    lengths = np.full(int(counts.sum()), limit, np.int32)
    lengths[np.cumsum(counts) - 1] = used - (counts - 1) * limit
    return counts, lengths


def without_copies(
    eligible: Sequence[Eligible], hashes: Sequence[np.ndarray | None], is_read: np.ndarray
) -> list[Eligible]:
    """Leaves out the documents of the sources that are read which are copies of one before; hashes: of each corpus."""
    known = [h[e.documents] if h is not None and read else None for e, h, read in zip(eligible, hashes, is_read)]
    result = []
    for e, copy in zip(eligible, copies(known)):
        if copy is not None:
            left_out = replace(e.left_out, copies=(int(copy.sum()), int(e.lengths[copy].sum())))
            e = Eligible(e.documents[~copy], e.lengths[~copy], e.used[~copy], e.limit, left_out)
        result.append(e)
    return result


def copies(hashes: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """bool[k] for each uint64[k], the hashes of documents: which are copies of one before, there or in an earlier
    list. None: they are not known."""
    known = [h for h in hashes if h is not None]
    is_copy = np.ones(sum(map(len, known)), bool)
    is_copy[np.unique(np.concatenate([np.zeros(0, np.uint64), *known]), return_index=True)[1]] = False
    parts = iter(np.split(is_copy, np.cumsum([len(h) for h in known])[:-1]))
    return [None if h is None else next(parts) for h in hashes]


def piece_limit(source: Source, data: Data, seq_len: int) -> int | None:
    """Tokens of the longest piece of a document before packing; None: packing alone cuts (concat)."""
    limits = [n for n in (source.chunk_length, CUT_AT.get(data.strategy)) if n is not None]
    if data.packing != "concat":  # concat cuts documents where rows end
        limits.append(seq_len)
    return min(limits) if limits else None


def nothing_left(source: Source, data: Data, tokens: np.ndarray, left: Eligible, seq_len: int) -> str:
    o = left.left_out
    bound = min(piece_limit(source, data, seq_len) or seq_len, seq_len)
    reasons = [
        (o.below_min_length[0], f"{o.below_min_length[0]} shorter than min_length = {source.min_length}"),
        (o.above_max_length[0], f"{o.above_max_length[0]} longer than max_length = {source.max_length}"),
        (o.evaluation[0], f"{o.evaluation[0]} with text of the evaluation (data.decontaminate)"),
        (o.copies[0], f"{o.copies[0]} copies of others (data.drop_duplicates)"),
        (o.dropped[0], f'{o.dropped[0]} longer than {bound} tokens, which long_document = "drop" leaves out'),
    ]
    why = ", ".join(text for count, text in reasons if count)
    lengths = f" Its documents have {int(tokens.min())} to {int(tokens.max())} tokens." if len(tokens) else ""
    return (
        f"Data source {source.name!r} has no document left to read: of {len(tokens)}, {why or 'none has a token'}."
        f"{lengths} Change these options, or take the source out."
    )


def long_threshold(source: Source, data: Data) -> int:
    """Documents of more tokens are long where upsampling tells documents apart, and in the report."""
    return data.long_threshold if source.long_threshold is None else source.long_threshold


def check_upsampled(
    data: Data, eligible: Sequence[Eligible], long_shares: Sequence[float], is_read: np.ndarray
) -> None:
    """UserError if documents are to be upsampled and there are none."""
    if data.strategy in BY_LENGTH:
        if not any(read and long for read, long in zip(is_read, long_shares)):
            raise UserError(
                f'data.strategy = "{data.strategy}" upsamples documents of more than data.long_threshold = '
                f"{data.long_threshold} tokens (or a source's own long_threshold), but no source has one. Lower the "
                "threshold."
            )
        return
    for source, left, long, read in zip(data.sources, eligible, long_shares, is_read):
        key = "upsample_to" if source.upsample_to is not None else "upsample"
        if read and not long and getattr(source, key) is not None:
            threshold = "data.long_threshold" if source.long_threshold is None else "its long_threshold"
            raise UserError(
                f"Data source {source.name!r}: {key} upsamples documents of more than {threshold} = "
                f"{long_threshold(source, data)} tokens, but it has none: its longest has {int(left.lengths.max())}. "
                f"Lower the threshold, or take {key} out."
            )


def empty_bin(source: Source, kind: str, lengths: str, left: Eligible) -> str:
    """What is wrong with a bin (kind and lengths as in mixture.Stream) that no document left fits."""
    edges = [-1, *source.length_bins, np.inf]
    counts = np.histogram(left.lengths, np.array(edges) + 1)[0]
    have = ", ".join(f"{n:,} in bin {number}" for number, n in enumerate(counts) if n)
    return (
        f"Data source {source.name!r}: length_shares asks for documents of {kind} of length_bins = "
        f"{list(source.length_bins)} ({lengths} tokens), but it has none: its documents have "
        f"{int(left.lengths.min()):,} to {int(left.lengths.max()):,} tokens ({have}). Set that share to 0, or change "
        "length_bins."
    )
