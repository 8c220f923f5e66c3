"""How much of each source a stage may read, and how often it does, for the data report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from torchtitan.datasets.eligible import copies
from torchtitan.datasets.plan import Plan

REPEATED = 4.0
"""Epochs up to which repeated text is almost as good as new (Muennighoff et al., arXiv 2305.16264)."""


def epoch_numbers(plan: Plan, source: int) -> dict[str, Any]:
    """What the stage may read of a source, after filters, copies and decontamination, with separators; tokens of rows
    that are left out; and epochs: tokens read, also in such rows, over those that may be read, of the source and of
    each of its streams."""
    streams = [(number, s) for number, s in enumerate(plan.streams) if s.source == source]
    out = plan.table.unlabelled
    used = sum(s.tokens for _, s in streams)
    return {
        "documents_used": len(np.unique(np.concatenate([s.documents for _, s in streams]))) if streams else 0,
        "tokens_used": used,
        "tokens_without_labels": int(out[np.isin(out[:, 2], [number for number, _ in streams]), 6].sum()),
        "epochs_used": sum(plan.tokens_of(s) for _, s in streams) / max(1, used),
        "epochs": [
            {"documents": s.name, "tokens": s.tokens, "share_asked": s.share, "epochs": plan.tokens_of(s) / s.tokens}
            for _, s in streams
        ],
    }


def copies_kept(plan: Plan) -> list[tuple[int, int]]:
    """Per source, the documents that the stage may read though they are copies of others before them, and their
    tokens; 0 of corpora whose hashes are not known."""
    if plan.data.drop_duplicates:
        return [(0, 0)] * len(plan.corpora)
    hashes: list[np.ndarray | None] = []
    lengths = []
    for source, corpus in enumerate(plan.corpora):
        read = [s.documents for s in plan.streams if s.source == source]
        documents = np.unique(np.concatenate(read)) if read and corpus.hashes is not None else np.zeros(0, np.int32)
        hashes.append(None if corpus.hashes is None else corpus.hashes[documents])
        lengths.append(corpus.lengths[documents])
    return [(0, 0) if c is None else (int(c.sum()), int(n[c].sum())) for c, n in zip(copies(hashes), lengths)]


def in_words(epochs: float) -> str:
    """Such as 0.88, or 1,207."""
    return f"{epochs:,.2f}" if epochs < 100 else f"{epochs:,.0f}"


def epoch_notes(s: dict[str, Any]) -> Iterator[str]:
    """Of the entry of a source: the epochs of each of its streams, if it is read by length, and a warning if one is
    read often."""
    if any(entry["documents"] != "all" for entry in s["epochs"]):
        of_each = "; ".join(f"{entry['documents']} {in_words(entry['epochs'])}" for entry in s["epochs"])
        yield f"{s['name']}: epochs by length of the documents: {of_each}"
    most = max(s["epochs"], key=lambda entry: entry["epochs"], default=None)
    if most and most["epochs"] > REPEATED:
        which = "" if most["documents"] == "all" else f" ({most['documents']})"
        yield (
            f"warning: source {s['name']} is read {most['epochs']:.1f} times: its {most['tokens']:,} tokens{which} "
            f"must make up {most['share_asked']:.1%} of the stage"
        )
