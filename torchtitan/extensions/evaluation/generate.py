"""Text that a model writes: prompts go through the training path once, then one token at a time uses a key-value cache.

With context parallelism each rank caches the keys and values of its own tokens alone, wherever the layout put them: a
new token's query attends to each rank's part, and the parts are merged by their log-sum-exp (FlashAttention, arXiv
2205.14135). The ranks take turns in caching new tokens' keys. Everything else of a new token is computed on all ranks
of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from torchtitan.attention.backends import AttentionCore, Mask
from torchtitan.attention.segments import Segments
from torchtitan.distributed.context_parallel.local_batch import LocalBatch
from torchtitan.extensions.evaluation.forward import DUMMY_PROMPT, Ranks, lay_out_answers, logits_of
from torchtitan.models.rope import RopeArgs, rope_for
from torchtitan.models.transformer import Transformer

BATCH_PROMPTS = 16
BATCH_TOKENS = 65536
"""At most this many prompts, and tokens, are read together; each prompt counts as the longest. A prompt that has more
tokens is read alone."""

DUMMY_TARGET = DUMMY_PROMPT[:1]
"""One token: with it nothing more than the prompt is read."""


class KVCacheSlots:
    """Which tokens' keys this rank caches, in slots of each of B prompts; the same in all layers. Tokens beyond a
    prompt's length (its answer's) are not cached."""

    def __init__(self, local: LocalBatch, lengths: list[int], new_tokens: int, ranks: Ranks):
        self.ranks = ranks
        kept = [(local.source == b) & (local.index < length) for b, length in enumerate(lengths)]
        self.tokens = [torch.nonzero(mask)[:, 0].to(ranks.device) for mask in kept]
        """Of each prompt, int64: which of this rank's tokens fill its first slots."""
        here = [len(tokens) for tokens in self.tokens]
        self.capacity = max(here) + -(-new_tokens // ranks.cp)
        self.batch = torch.arange(len(lengths), device=ranks.device)
        self.filled = torch.tensor(here, device=ranks.device)
        """int64 [B]: slots in use."""
        self.index = torch.zeros(len(lengths), self.capacity, dtype=torch.int64, device=ranks.device)
        """int64 [B, capacity]: how many tokens of the text come before the slot's token."""
        for index, tokens in zip(self.index, self.tokens, strict=True):
            index[: len(tokens)] = local.index.to(ranks.device)[tokens]
        self.position = torch.tensor(lengths, device=ranks.device)
        """int64 [B]: how many tokens there are so far, which is the index of the next token."""
        self.step = 0
        self._unseen: dict[int | None, torch.Tensor] = {}

    @property
    def caches_next(self) -> bool:
        """Whether this rank caches the next token's keys."""
        return self.step % self.ranks.cp == self.ranks.cp_rank

    def begin(self) -> None:
        """Before each new token: gives it a slot, on the rank that caches its keys."""
        if self.caches_next:
            self.index[self.batch, self.filled] = self.position
            self.filled += 1
        self._unseen = {}

    def end(self) -> None:
        """After each new token."""
        self.position = self.position + 1
        self.step += 1

    def unseen(self, window: int | None) -> torch.Tensor:
        """bool [B, capacity]: slots that are empty, or beyond the window of the new token's query."""
        if window not in self._unseen:
            unseen = torch.arange(self.capacity, device=self.filled.device) >= self.filled[:, None]
            if window is not None:
                unseen = unseen | (self.index <= self.position[:, None] - window)
            self._unseen[window] = unseen
        return self._unseen[window]


class CachedAttention:
    """Takes the place of a layer's AttentionCore during generation."""

    def __init__(self, core: AttentionCore, slots: KVCacheSlots):
        self.core, self.slots = core, slots
        self.backend = core.backend
        self.cache: tuple[torch.Tensor, ...] = ()
        """Keys and values [B, Hkv, capacity, D]."""

    @torch.compiler.disable
    def start(self, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> Any:
        """k and v [T, Hkv, D]: first of this rank's tokens of the prompts, then of a new token per prompt."""
        slots = self.slots
        if not self.cache:
            # zeros: an empty slot has weight 0, but 0 times NaN is NaN
            size = (len(slots.batch), k.shape[1], slots.capacity, k.shape[2])
            self.cache = k.new_zeros(size), v.new_zeros(size)
            for cached, x in zip(self.cache, (k, v), strict=True):
                for b, tokens in enumerate(slots.tokens):
                    cached[b, :, : len(tokens)] = x[tokens].transpose(0, 1)
            return self.core.start(k, v, mask)
        if slots.caches_next:
            for cached, x in zip(self.cache, (k, v), strict=True):
                cached[slots.batch, :, slots.filled - 1] = x[: len(slots.batch)]
        return None

    @torch.compiler.disable
    def finish(self, q: torch.Tensor, started: Any, mask: Mask) -> torch.Tensor:
        """q [T, H, D] -> output [T, H, D]; started: what start() returned for the same tokens."""
        if started is not None:
            return self.core.finish(q, started, mask)
        out, lse = self._attend(q[: len(self.slots.batch)], mask.segments.window)
        if self.slots.ranks.cp_group is not None:
            out = merge_over_ranks(out, lse, self.slots.ranks.cp_group)
        padding = q.new_zeros(len(q) - len(out), *q.shape[1:])
        return torch.cat((out.to(q.dtype), padding))

    def _attend(self, q: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, H, D] of the new tokens -> output [B, H, D] over this rank's keys and log-sum-exp [B, H], float32."""
        keys, values = (x.float() for x in self.cache)  # [B, Hkv, capacity, D]
        grouped = q.float().unflatten(1, (keys.shape[1], -1))
        scores = grouped @ keys.transpose(2, 3) / q.shape[-1] ** 0.5  # [B, Hkv, H / Hkv, capacity]
        scores = scores.masked_fill(self.slots.unseen(window)[:, None, None], float("-inf"))
        lse = scores.logsumexp(-1)
        # a rank without a visible key has weight 0, not 0/0
        weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
        return (weights @ values).flatten(1, 2), lse.flatten(1)


def merge_over_ranks(out: torch.Tensor, lse: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Outputs [B, H, D] and log-sum-exps [B, H] over each rank's keys -> the output over all keys, on every rank."""
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    share = (lse - top).exp()[..., None]
    both = torch.cat((out * share, share), dim=-1)
    dist.all_reduce(both, group=group)
    return both[..., :-1] / both[..., -1:]


@contextmanager
def caching(model: Transformer, slots: KVCacheSlots) -> Iterator[None]:
    """Inside, attention caches: first a pass over the prompts, then passes over a new token per prompt."""
    layers: list[Any] = [block.attention for block in model.layers.values()]
    cores = [attention.core for attention in layers]
    for attention in layers:
        attention.core = CachedAttention(attention.core, slots)
    try:
        yield
    finally:
        for attention, core in zip(layers, cores, strict=True):
            attention.core = core


def groups_of(
    ranks: Ranks,
    prompts: Sequence[torch.Tensor],
    new_tokens: Sequence[int],
    rope: RopeArgs,
    together: int = BATCH_PROMPTS,
) -> list[tuple[RopeArgs, list[int]]]:
    """Which prompts are read together: (RoPE, indices of at most `together` prompts) per forward pass. Collective.

    A group has prompts of similar length, the longest first, that with their new tokens are read under the same RoPE
    (which can depend on the length). Every rank gets the same number of groups, the last ones empty if other ranks have
    more, because all ranks must make the same number of passes.
    """
    by_rope: dict[RopeArgs, list[int]] = {}
    sizes = [len(prompt) + new for prompt, new in zip(prompts, new_tokens, strict=True)]
    for i in sorted(range(len(prompts)), key=lambda i: -sizes[i]):
        by_rope.setdefault(rope_for(rope, sizes[i]), []).append(i)
    groups: list[tuple[RopeArgs, list[int]]] = []
    for used, members in by_rope.items():
        group: list[int] = []
        for i in members:
            if not group or len(group) == together or (len(group) + 1) * sizes[group[0]] > BATCH_TOKENS:
                groups.append((used, group := []))
            group.append(i)
    return groups + [(rope, [])] * (ranks.largest(len(groups)) - len(groups))


def choose(
    logits: torch.Tensor,
    n: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    draws: Sequence[tuple[int, ...]] = (),
) -> list[int]:
    """logits [B, vocab_size] -> the n-th new token of each prompt. temperature, top_p: see generate. A draw is a
    function of (the prompt's entry of draws, n)."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    chosen = []
    for row, draw in zip(logits.cpu(), draws, strict=True):
        probabilities, order = (row / temperature).softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        share = probabilities.masked_fill(before >= top_p, 0)
        u = np.random.default_rng((*draw, n)).random()
        total = share.double().cumsum(-1)
        at = int(torch.searchsorted(total, torch.tensor(u * float(total[-1]), dtype=torch.float64), right=True))
        chosen.append(int(order[min(at, int((share > 0).sum()) - 1)]))
    return chosen


@torch.no_grad()
def generate(
    model: Transformer,
    ranks: Ranks,
    prompts: Sequence[torch.Tensor],
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    rope: RopeArgs | None = None,
    numbers: Sequence[int] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt (int64 [P], P >= 1): up to max_new_tokens token ids, without the stop
    token. Collective over all ranks: the ranks of a row must have the same prompts, other rows may have others, or
    none.

    temperature: 0 takes the likeliest token; otherwise tokens are drawn from the fewest that have top_p of the
    probability (nucleus sampling, arXiv 1904.09751). A draw is a function of (seed, number of the prompt, number of the
    token). rope: instead of the model's own; a RoPE that depends on the length gets the prompt's length plus
    max_new_tokens. numbers: the prompts' numbers, if they are not 0, 1, 2, ... stop: called with all tokens written
    after a prompt; True ends the text there, with its last token.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt without a token")
    written: list[list[int]] = [[] for _ in prompts]
    rope = rope or model.args.rope
    numbers = range(len(prompts)) if numbers is None else numbers
    for used, batch in groups_of(ranks, prompts, [max_new_tokens] * len(prompts), rope):
        read = [prompts[i] for i in batch] or [DUMMY_PROMPT]
        draws = [(seed, numbers[i]) for i in batch] or [(seed, 0)]
        pick = partial(choose, temperature=temperature, top_p=top_p, draws=draws)
        limits = [max_new_tokens] * len(read)
        targets = [DUMMY_TARGET] * len(read)
        texts, _ = write_and_score(model, ranks, read, targets, limits, stop_ids, used, bool(batch), pick, stop)
        for i, tokens in zip(batch, texts):
            written[i] = tokens
    return written


@torch.no_grad()
def write_and_score(
    model: Transformer,
    ranks: Ranks,
    prompts: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    limits: Sequence[int],
    stop_ids: frozenset[int],
    rope: RopeArgs,
    needed: bool = True,
    pick: Callable[[torch.Tensor, int], list[int]] = choose,
    stop: Callable[[list[int]], bool] | None = None,
) -> tuple[list[list[int]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """(texts, scores): generate() for prompts that go through the model together, and answer_scores() of their targets;
    each prompt is read once for both. Collective.

    limits: new tokens per prompt. needed: False if this rank only takes part in others' passes. pick: choose(), with
    its last arguments bound.
    """
    answers = lay_out_answers(model, ranks, prompts, targets)
    lengths = [len(prompt) for prompt in prompts]
    longest = ranks.largest(max(limits))  # this rank takes part in what other ranks write
    slots = KVCacheSlots(answers.local, lengths, longest, ranks)
    tokens: list[list[int]] = [[] for _ in prompts]
    unfinished = [needed] * len(prompts)
    with caching(model, slots):
        of_answers = logits_of(model, ranks, answers.local, answers.predicting, rope)
        scores = answers.scores(ranks, of_answers)
        logits = of_answers.new_zeros(len(prompts), model.args.vocab_size)
        first = answers.first.to(logits.device)
        logits[answers.source.to(logits.device)[first]] = of_answers[first]
        ranks.sum_over_row(logits)
        del of_answers
        for n in range(longest):
            # logits may differ in the last bit between ranks, and ranks that choose different tokens never meet again
            chosen = ranks.of_first_rank(pick(logits, n))
            for b, token in enumerate(chosen):
                unfinished[b] = unfinished[b] and token not in stop_ids
                if unfinished[b]:
                    tokens[b].append(token)
                    unfinished[b] = len(tokens[b]) < limits[b] and (stop is None or not stop(tokens[b]))
            if n + 1 == longest or not ranks.largest(int(any(unfinished))):
                break
            slots.begin()
            logits = _next_logits(model, ranks, chosen, [length + n for length in lengths], rope)
            slots.end()
    return tokens, scores


def _next_logits(
    model: Transformer, ranks: Ranks, tokens: list[int], positions: list[int], rope: RopeArgs
) -> torch.Tensor:
    """Logits float32 [B, vocab_size] after one new token per prompt."""
    padding = -len(tokens) % ranks.tp
    args, device = model.args, ranks.device
    segments = Segments.whole(np.arange(len(tokens) + padding + 1))
    windowed = Segments.whole(segments.cu_seqlens, args.sliding_window)
    masks = {"full_attention": Mask(segments, segments), "sliding_attention": Mask(windowed, windowed)}
    new_tokens, new_positions = (torch.tensor([*x, *[0] * padding], device=device) for x in (tokens, positions))
    not_padding = torch.arange(len(tokens), device=device)
    return model(new_tokens, new_positions, masks, rope=rope, only=not_padding).float()
