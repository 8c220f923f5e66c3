"""Puts questions and documents to a model and sums up what comes out; the same result on every rank.

Data-parallel ranks take different items. As they may share parameters (FSDP), all of them make as many forward passes:
one that has nothing left takes part in the others' passes with a token of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.forward import Ranks, answer_scores, document_losses
from torchtitan.extensions.evaluation.generate import groups_of, write
from torchtitan.extensions.evaluation.items import Item, Score
from torchtitan.extensions.evaluation.loss_by_position import rope_for
from torchtitan.models.transformer import Transformer

OnPart = Callable[[int, int], None]
"""(done, of how many), of the work of this rank."""


@dataclass(frozen=True)
class Outcome:
    """What became of an item."""

    exact: bool
    """Under teacher forcing each token of the target is the likeliest: greedy generation would write it."""

    logprob: float
    """Mean log-probability of the target's tokens."""

    score: float | None = None
    """Of what the model wrote; None: it was not asked to."""

    text: str | None = None
    cut: bool = False
    """The text ended with the number of tokens that it may have, and not by a stop token."""


NOTHING = torch.zeros(2, dtype=torch.int64)


def ask(
    model: Transformer,
    ranks: Ranks,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    score: Score,
    writes: bool,
    on_part: OnPart = lambda done, total: None,
) -> list[Outcome]:
    """Outcomes of all items, in their order. Collective. writes: have the model write answers, greedily, too."""
    mine = list(range(ranks.dp_rank, len(items), ranks.dp))
    outcomes: dict[int, Outcome] = {}
    stops = stop_ids(tokenizer)
    spare = [max(items[i].max_new_tokens, len(items[i].target)) for i in mine]
    groups = groups_of([items[i].prompt for i in mine], spare, model.args.rope)
    for g in range(rounds := ranks.largest(len(groups))):
        used, members = groups[g] if g < len(groups) else (model.args.rope, [])
        some = [items[mine[j]] for j in members]
        read = [item.prompt for item in some] or [NOTHING], [item.target for item in some] or [NOTHING]
        if writes:
            limits = [item.max_new_tokens for item in some] or [1]
            written, forced = write(model, ranks, *read, limits, stops, used, needed=bool(some))
        else:
            written, forced = [], answer_scores(model, ranks, *read, used)
        for k, (item, (logprobs, likeliest)) in enumerate(zip(some, forced)):
            outcome = Outcome(bool(likeliest.all()), float(logprobs.mean()))
            if writes:
                text = tokenizer.decode(written[k])
                found, cut = score(text, item.answers), len(written[k]) == item.max_new_tokens
                outcome = replace(outcome, score=found, text=text, cut=cut)
            outcomes[mine[members[k]]] = outcome
        on_part(g + 1, rounds)
    everything = dict(pair for part in ranks.gather(list(outcomes.items())) for pair in part)
    return [everything[i] for i in range(len(items))]


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's EOS, and those that its folder's generation_config.json names."""
    named: Any = []
    file = Path(tokenizer.folder) / "generation_config.json"
    if file.is_file():
        named = json.loads(file.read_text()).get("eos_token_id") or []
    ids = [tokenizer.eos_id, *(named if isinstance(named, list) else [named])]
    return frozenset(i for i in ids if i is not None)


def as_grid(items: Sequence[Item], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means by length and depth of a task's items: the form in which results are kept (docs/evaluation.md)."""
    lengths = sorted({item.length for item in items})
    depths = sorted({item.depth for item in items if item.depth is not None})
    cells: dict[tuple[int, float | None], list[Outcome]] = {}
    for item, outcome in zip(items, outcomes, strict=True):
        cells.setdefault((item.length, item.depth if depths else None), []).append(outcome)

    def grid(number: Callable[[list[Outcome]], Any]) -> list[list[Any]]:
        columns: list[float | None] = [*depths] or [None]
        return [[number(cells[n, d]) if (n, d) in cells else None for d in columns] for n in lengths]

    def written(cell: list[Outcome]) -> float | None:
        scores = [one.score for one in cell if one.score is not None]
        return sum(scores) / len(scores) if scores else None

    return {
        "lengths": lengths,
        "depths": depths or None,
        "score": grid(written),
        "exact": grid(lambda cell: sum(one.exact for one in cell) / len(cell)),
        "logprob": grid(lambda cell: sum(one.logprob for one in cell) / len(cell)),
        "count": grid(len),
        "cut": grid(lambda cell: sum(one.cut for one in cell)),
        "written": grid(lambda cell: cell[0].text),
    }


def position_losses(
    model: Transformer,
    ranks: Ranks,
    documents: Sequence[torch.Tensor],
    edges: Sequence[int],
    window: int | None = None,
    on_part: OnPart = lambda done, total: None,
) -> dict[str, Any]:
    """Mean negative log-likelihood (nats) by position over documents, int64 [T] each: edges, nll, count, mean_nll; None
    where nothing was counted. window: see document_losses. Collective."""
    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    bounds = torch.tensor(edges[1:])
    rounds = -(-len(documents) // ranks.dp)
    for n in range(rounds):
        i = n * ranks.dp + ranks.dp_rank
        tokens = documents[i] if i < len(documents) else NOTHING
        longest = window or len(tokens) - 1
        losses = document_losses(model, ranks, tokens, rope_for(model.args.rope, longest), window)
        if i < len(documents):
            losses = losses[: edges[-1]].double()
            bucket = torch.bucketize(torch.arange(len(losses)), bounds, right=True)
            sums.index_add_(1, bucket, torch.stack((losses, torch.ones_like(losses))))
        on_part(n + 1, rounds)
    nll, count = torch.stack(ranks.gather(sums)).sum(0)
    return {
        "edges": list(edges),
        "nll": [float(s / n) if n else None for s, n in zip(nll, count, strict=True)],
        "count": [int(n) for n in count],
        "mean_nll": float(nll.sum() / count.sum()) if count.sum() else None,
    }


def let_go(model: Transformer) -> None:
    """Free what FSDP has gathered for a forward pass without backward; what it keeps would be out of date after the
    optimizer's next step."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
