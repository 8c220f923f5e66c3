"""Asks a model questions, has it read documents, and averages the outcomes; the same result on every rank.

Data-parallel ranks take different questions. Because they may share parameters (FSDP), all of them make the same number
of forward passes: a rank without work left takes part in the others' passes with a dummy prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise, takewhile
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from torchtitan.datasets.ends_of_turn import stop_ids
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.forward import DUMMY_PROMPT, Ranks, answer_scores, document_losses
from torchtitan.extensions.evaluation.generate import groups_of, write_and_score
from torchtitan.extensions.evaluation.questions import Question, Score
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

FIRST_EDGE = 512
"""Tokens of the first range of positions."""

OnPart = Callable[[int, int], None]
"""(done, total) of this rank's work."""


@dataclass(frozen=True)
class Outcome:
    """How a model did on a question."""

    exact: bool
    """Under teacher forcing each token of the target is the likeliest: greedy generation would write it."""

    logprob: float
    """Mean log-probability of the target's tokens."""

    score: float | None = None
    """Of the text that the model wrote; None if it was not asked to write."""

    text: str | None = None
    cut: bool = False
    """Whether the text ended because it had max_new_tokens, not by a stop token."""


def score_questions(
    model: Transformer,
    ranks: Ranks,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    score: Score,
    writes: bool,
    ends: Sequence[int] = (),
    on_part: OnPart = lambda done, total: None,
) -> list[Outcome]:
    """Outcomes of all questions, in their order. Collective.

    writes: whether the model also writes, greedily; ends: tokens that end an answer beside those of stop_ids().
    """
    mine = list(range(ranks.dp_rank, len(questions), ranks.dp))
    outcomes: dict[int, Outcome] = {}
    stops = frozenset(stop_ids(tokenizer, ends)) if writes else frozenset()
    spare = [max(questions[i].max_new_tokens, len(questions[i].target)) for i in mine]
    groups = groups_of(ranks, [questions[i].prompt for i in mine], spare, model.args.rope)
    for g, (used, members) in enumerate(groups, 1):
        group = [questions[mine[j]] for j in members]
        prompts, targets = [q.prompt for q in group], [q.target for q in group]
        read = prompts or [DUMMY_PROMPT], targets or [DUMMY_PROMPT]
        if writes:
            limits = [question.max_new_tokens for question in group] or [1]
            written, forced = write_and_score(model, ranks, *read, limits, stops, used, needed=bool(group))
        else:
            written, forced = [], answer_scores(model, ranks, *read, used)
        for k, (question, (logprobs, likeliest)) in enumerate(zip(group, forced)):
            outcome = Outcome(bool(likeliest.all()), float(logprobs.mean()))
            if writes:
                text = tokenizer.decode(written[k])
                points, cut = score(text, question.answers), len(written[k]) == question.max_new_tokens
                outcome = replace(outcome, score=points, text=text, cut=cut)
            outcomes[mine[members[k]]] = outcome
        on_part(g, len(groups))
    return ranks.collect(outcomes)


def mean_by_length_and_depth(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A task's means by length and depth: the grids in which results are kept (docs/evaluation.md)."""
    lengths = sorted({question.length for question in questions})
    depths = sorted({question.depth for question in questions if question.depth is not None})
    cells: dict[tuple[int, float | None], list[Outcome]] = {}
    for question, outcome in zip(questions, outcomes, strict=True):
        cells.setdefault((question.length, question.depth if depths else None), []).append(outcome)

    def grid(number: Callable[[list[Outcome]], Any]) -> list[list[Any]]:
        columns: list[float | None] = [*depths] or [None]
        return [[number(cells[n, d]) if (n, d) in cells else None for d in columns] for n in lengths]

    def written(cell: list[Outcome]) -> float | None:
        scores = [outcome.score for outcome in cell if outcome.score is not None]
        return sum(scores) / len(scores) if scores else None

    return {
        "lengths": lengths,
        "depths": depths or None,
        "score": grid(written),
        "exact": grid(lambda cell: sum(outcome.exact for outcome in cell) / len(cell)),
        "logprob": grid(lambda cell: sum(outcome.logprob for outcome in cell) / len(cell)),
        "count": grid(len),
        "cut": grid(lambda cell: sum(outcome.cut for outcome in cell)),
        "written": grid(lambda cell: cell[0].text),
    }


def default_edges(length: int) -> tuple[int, ...]:
    """Where ranges of positions begin and end: 0, 512 and its doubles, length."""
    doubles = takewhile(lambda edge: edge < length, (FIRST_EDGE << k for k in count()))
    return (0, *doubles, length)


def check_edges(edges: Sequence[int], length: int) -> tuple[int, ...]:
    """The edges, with 0 and length added if they are missing; UserError unless they ascend within these."""
    whole = tuple(dict.fromkeys((0, *edges, length)))
    if any(a >= b for a, b in pairwise(whole)):
        raise UserError(
            f"--edges {' '.join(map(str, edges))} must ascend, above 0 and at most --length {length} (these two ends "
            "are added)."
        )
    return whole


def position_losses(
    model: Transformer,
    ranks: Ranks,
    documents: Sequence[torch.Tensor],
    edges: Sequence[int],
    window: int | None = None,
    reset_every: int | None = None,
    rope: RopeArgs | None = None,
    on_part: OnPart = lambda done, total: None,
) -> dict[str, Any]:
    """Mean negative log-likelihood (nats per token) by position over documents, int64 [T] each: {"edges", "nll",
    "count", "mean_nll"}, None if nothing was counted. Range i is of positions edges[i] to edges[i + 1] - 1; tokens
    beyond the last edge do not count. window, reset_every, rope: see document_losses. Collective."""
    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    bounds = torch.tensor(edges[1:])
    rounds = -(-len(documents) // ranks.dp)
    for n in range(rounds):
        i = n * ranks.dp + ranks.dp_rank
        tokens = documents[i] if i < len(documents) else DUMMY_PROMPT
        losses = document_losses(model, ranks, tokens, rope, window, reset_every)
        if i < len(documents):
            losses = losses[: edges[-1]].double()
            bucket = torch.bucketize(torch.arange(len(losses)), bounds, right=True)
            sums.index_add_(1, bucket, torch.stack((losses, torch.ones_like(losses))))
        on_part(n + 1, rounds)
    nll, counts = torch.stack(ranks.gather(sums)).sum(0)
    return {
        "edges": list(edges),
        "nll": [float(s / n) if n else None for s, n in zip(nll, counts, strict=True)],
        "count": [int(n) for n in counts],
        "mean_nll": float(nll.sum() / counts.sum()) if counts.sum() else None,
    }


def free_gathered_parameters(model: Transformer) -> None:
    """Free the parameters that FSDP keeps gathered after a forward pass without backward: the optimizer's next step
    would leave them out of date."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
