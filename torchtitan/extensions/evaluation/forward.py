"""Forward passes of evaluation on a model in any layout: documents in, numbers that are the same on every rank out.

Documents go through the model as one stream, each seeing itself alone, as in training. With context parallelism every
rank computes its share of the tokens, and the results are summed over the ranks of a row. Logits exist only for the
tokens that need them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from torchtitan.attention.backends import choose_backend
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.batch import PADDING_SOURCE, PackedBatch
from torchtitan.distributed.context_parallel.local_batch import LocalBatch, local_batch
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.rope import RopeArgs, rope_for
from torchtitan.models.transformer import Transformer
from torchtitan.tools.constants import BLOCK, IGNORED_LABEL

DUMMY_PROMPT = torch.zeros(2, dtype=torch.int64)
"""What a rank without work left puts through the model, to take part in the passes of other ranks: they may share
parameters (FSDP). Read as a document it has one loss."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that take part in an evaluation, as one of them sees them. The default: one process on the CPU."""

    device: torch.device = torch.device("cpu")
    backend: str = "sdpa"
    layout: str = "balanced"
    exchange: str = "needed"
    cp: int = 1
    cp_rank: int = 0
    cp_group: Any = None
    tp: int = 1
    tp_group: Any = None
    dp: int = 1
    dp_rank: int = 0
    group: Any = None
    """Process group of all ranks, for small tensors on the CPU (gloo); None: one process."""

    @staticmethod
    def of(dims: ParallelDims, device: torch.device, config: JobConfig, group: Any) -> Ranks:
        """The ranks of a stage's mesh; group: gloo, of all its ranks."""
        cp = dims.size("cp")
        return Ranks(
            device=device,
            backend=choose_backend(config.model.attention_backend, device.type),
            layout=config.parallelism.context_parallel_layout,
            exchange=config.parallelism.context_parallel_exchange,
            cp=cp,
            cp_rank=dims.cp_rank,
            cp_group=dims.mesh.get_group("cp") if cp > 1 else None,
            tp=dims.size("tp"),
            tp_group=dims.mesh.get_group("tp") if dims.size("tp") > 1 else None,
            dp=dims.dp_degree,
            dp_rank=dims.dp_rank,
            group=group,
        )

    def sum_over_row(self, x: torch.Tensor) -> torch.Tensor:
        """Sums x in place over the context-parallel ranks. Collective over these."""
        if self.cp_group is not None:
            dist.all_reduce(x, group=self.cp_group)
        return x

    def of_first_rank(self, numbers: list[int]) -> list[int]:
        """The numbers of a row's first rank, on all its ranks (context and tensor parallel). Collective over these."""
        for group in (self.tp_group, self.cp_group):
            if group is not None:
                x = torch.tensor(numbers, device=self.device)
                dist.broadcast(x, group=group, group_src=0)
                numbers = x.tolist()
        return numbers

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers. Collective."""
        if self.group is None:
            return number
        x = torch.tensor(number)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return int(x)

    def gather(self, value: Any) -> list[Any]:
        """One value per data-parallel rank, in their order. Collective."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, (self.dp_rank, value), group=self.group)
        by_rank = dict(values)
        return [by_rank[r] for r in range(self.dp)]

    def collect(self, answers: dict[int, Any]) -> list[Any]:
        """The answers of all data-parallel ranks, in the order of their numbers. Collective."""
        everything = {n: answer for part in self.gather(answers) for n, answer in part.items()}
        return [everything[n] for n in sorted(everything)]


def lay_out(
    model: Transformer, ranks: Ranks, documents: Sequence[torch.Tensor], labels: Sequence[torch.Tensor] | None = None
) -> LocalBatch:
    """This rank's tokens of the documents (int64 [T] each, as the labels), followed by padding to the length that the
    layout needs. `source` says which document a token belongs to, -1 for padding; `index` says how many tokens of its
    document come before it."""
    lengths = [len(document) for document in documents]
    step = math.lcm(BLOCK, ranks.tp) * ranks.cp if ranks.cp > 1 else ranks.tp
    padding = -sum(lengths) % step
    ends = np.cumsum([0, *lengths, *([padding] if padding else [])])
    tokens = torch.cat([*(d.cpu() for d in documents), torch.zeros(padding, dtype=torch.int64)])
    targets = torch.full_like(tokens, IGNORED_LABEL)
    if labels is not None:
        targets[: sum(lengths)] = torch.cat([x.cpu() for x in labels])
    cu = torch.tensor(ends, dtype=torch.int32)
    sources = [*range(len(documents)), *([PADDING_SOURCE] if padding else [])]
    batch = PackedBatch(
        tokens=tokens,
        labels=targets,
        positions=torch.cat([torch.arange(n) for n in np.diff(ends).tolist()]),
        cu_seqlens=cu,
        cu_documents=cu,
        source=torch.tensor(sources, dtype=torch.int32),  # a document each: there may be more than int16 counts
    )
    args = model.args
    window = (args.sliding_window, args.sliding_share)
    return local_batch(batch, ranks.backend, ranks.layout, ranks.exchange, ranks.cp, ranks.cp_rank, *window)


@torch.no_grad()
def document_losses(
    model: Transformer,
    ranks: Ranks,
    tokens: torch.Tensor,
    rope: RopeArgs | None = None,
    window: int | None = None,
    reset_every: int | None = None,
) -> torch.Tensor:
    """tokens int64 [T], one document, T >= 2 -> float32 [T - 1] on the CPU: -log p(token p + 1 | tokens 0 to p), nats.

    window: token p sees itself and window / 2 to window - 1 tokens before it, or all if they are fewer: the document is
    read in pieces that overlap by half, and of each but the first the second half counts, so that no token is scored
    without context. reset_every: context begins anew at every multiple of this, so token p sees p modulo it. At most
    one of the two. rope: instead of the model's own; see rope_for for what depends on the length that is read.
    """
    inputs, labels = tokens[:-1], tokens[1:]
    longest = min(window or reset_every or len(inputs), len(inputs))
    pieces = reset_pieces(len(inputs), longest) if reset_every else window_pieces(len(inputs), longest)
    read, expected = ([x[begin:end] for begin, _, end in pieces] for x in (inputs, labels))
    losses = _losses(model, ranks, read, expected, rope_for(rope or model.args.rope, longest))
    return torch.cat([piece[kept - begin :] for piece, (begin, kept, _) in zip(losses, pieces, strict=True)])


def window_pieces(length: int, window: int) -> list[tuple[int, int, int]]:
    """(begin, first that counts, end) of pieces that overlap by half; each of range(length) counts in one of them."""
    pieces = [(0, 0, min(window, length))]
    while (end := pieces[-1][2]) < length:
        begin = end - window // 2
        pieces.append((begin, end, min(begin + window, length)))
    return pieces


def reset_pieces(length: int, every: int) -> list[tuple[int, int, int]]:
    """(begin, first that counts, end) of pieces that do not overlap: all tokens of each count."""
    return [(begin, begin, min(begin + every, length)) for begin in range(0, length, every)]


@torch.no_grad()
def losses_of_documents(
    model: Transformer, ranks: Ranks, documents: Sequence[torch.Tensor], rope: RopeArgs | None = None
) -> list[torch.Tensor]:
    """document_losses of documents that go through the model together, int64 [T >= 2] each -> float32 [T - 1] each.
    rope is used unchanged: the caller picks it for the lengths (rope_for)."""
    return _losses(model, ranks, [d[:-1] for d in documents], [d[1:] for d in documents], rope)


def _losses(
    model: Transformer,
    ranks: Ranks,
    inputs: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    rope: RopeArgs | None,
) -> list[torch.Tensor]:
    """inputs and labels int64 [T] each -> the losses of the labels, float32 [T] each, on the CPU. An input sees only
    itself; logits are not kept. Collective over the ranks of a row."""
    local = lay_out(model, ranks, inputs, labels)
    device = ranks.device
    on = local.to(device)
    _, losses = model(on.tokens, on.positions, on.masks, rope=rope, labels=on.labels)
    lengths = [len(x) for x in inputs]
    result = torch.zeros(sum(lengths), dtype=losses.dtype, device=losses.device)
    not_padding = local.source >= 0
    starts = torch.tensor([0, *lengths]).cumsum(0)
    place = (starts[local.source] + local.index)[not_padding]
    result[place.to(device)] = losses[not_padding.to(device)]
    return list(ranks.sum_over_row(result).cpu().split(lengths))


@torch.no_grad()
def answer_scores(
    model: Transformer,
    ranks: Ranks,
    prompts: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    rope: RopeArgs | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Teacher forcing: prompts int64 [P], targets int64 [A] -> per prompt the log-probabilities of the target's tokens,
    float32 [A], and whether each token is the likeliest, bool [A]; on the CPU. Collective over the ranks of a row."""
    answers = lay_out_answers(model, ranks, prompts, targets)
    return answers.scores(ranks, logits_of(model, ranks, answers.local, answers.predicting, rope))


@dataclass(frozen=True)
class Answers:
    """Prompts followed by their answers, laid out, and which tokens of the stream predict an answer's tokens."""

    local: LocalBatch
    predicting: torch.Tensor
    """int64 [R]: this rank's tokens that are followed by a token of an answer."""
    place: torch.Tensor
    """int64 [R]: index of that token among the tokens of all answers, laid end to end."""
    targets: Sequence[torch.Tensor]

    @property
    def source(self) -> torch.Tensor:
        """int64 [R]: the index of the prompt of each predicting token."""
        return self.local.source[self.predicting]

    @property
    def first(self) -> torch.Tensor:
        """bool [R]: whether a predicting token is the last of its prompt."""
        return self.place == _starts(self.targets)[self.source]

    def scores(self, ranks: Ranks, logits: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """logits [R, vocab_size] of the predicting tokens -> what answer_scores() returns. Collective over the ranks
        of a row."""
        targets = torch.cat([t.cpu() for t in self.targets])[self.place].to(logits.device)
        result = torch.zeros(2, sum(map(len, self.targets)), device=logits.device)
        result[0, self.place] = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        result[1, self.place] = (logits.argmax(-1) == targets).float()
        both = ranks.sum_over_row(result).cpu().split([len(t) for t in self.targets], dim=1)
        return [(scores[0], scores[1] > 0.5) for scores in both]


def lay_out_answers(
    model: Transformer, ranks: Ranks, prompts: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> Answers:
    """prompts int64 [P], targets int64 [A], P and A >= 1; a target's last token is scored but not read."""
    local = lay_out(model, ranks, [torch.cat((p, t[:-1])) for p, t in zip(prompts, targets, strict=True)])
    ends = torch.tensor([len(p) - 1 for p in prompts])
    past_prompt = local.index - ends[local.source]  # meaningless for padding
    predicting = torch.nonzero((local.source != PADDING_SOURCE) & (past_prompt >= 0))[:, 0]
    place = (_starts(targets)[local.source] + past_prompt)[predicting]
    return Answers(local, predicting, place, targets)


def _starts(targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 [targets + 1]: where each target begins if all are laid end to end; the last is their sum."""
    return torch.tensor([0, *(len(t) for t in targets)]).cumsum(0)


def logits_of(
    model: Transformer, ranks: Ranks, local: LocalBatch, only: torch.Tensor, rope: RopeArgs | None = None
) -> torch.Tensor:
    """float32 [R, vocab_size] of this rank's tokens `only`, int64 [R]; R may be 0."""
    on = local.to(ranks.device)
    asked = only if len(only) else torch.zeros(1, dtype=torch.int64)  # all ranks compute something
    logits = model(on.tokens, on.positions, on.masks, rope=rope, only=asked.to(on.tokens.device))
    return logits[: len(only)].float()
