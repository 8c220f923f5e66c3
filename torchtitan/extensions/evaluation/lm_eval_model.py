"""The model class that lm-evaluation-harness talks to: it answers the harness' requests with a model in any layout.

To the harness each process seems to be the only one: every process builds all requests, and this file shares them among
the data-parallel ranks. The harness' own way, a part of each task's documents per rank, hangs if a task has fewer
documents than there are ranks. Tokenization, the cutting of long requests and the end of generated text are as in its
`hf` model, so that the same weights have the same numbers (tests/unit/extensions/evaluation/test_lm_eval.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from torchtitan.datasets.ends_of_turn import stop_ids
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.forward import DUMMY_PROMPT, Ranks, answer_scores, losses_of_documents
from torchtitan.extensions.evaluation.generate import BATCH_PROMPTS, generate, groups_of
from torchtitan.extensions.evaluation.held_out_text import check_vocabulary
from torchtitan.extensions.ingest.chat_template import ChatTemplate, load_chat_template
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

SCORED_TOGETHER = 64
"""At most this many requests are scored in one forward pass; a pass also has at most generate.BATCH_TOKENS tokens, and
logits for the continuations alone."""

MAX_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks use for the number of tokens to generate; the first that is set counts, as in the harness."""


@dataclass(frozen=True)
class Writing:
    """How a request wants its text to be generated."""

    until: tuple[str, ...]
    new_tokens: int
    temperature: float
    top_p: float

    @staticmethod
    def of(asked: dict[str, Any], new_tokens: int) -> Writing:
        """From a task's generation_kwargs. new_tokens: their default. UserError for a key that is not known here."""
        left = dict(asked)
        until = left.pop("until", None) or []
        counts = [left.pop(name, None) for name in MAX_LENGTH_NAMES]
        heat, top_p = left.pop("temperature", None), left.pop("top_p", None)
        samples = left.pop("do_sample", None)
        temperature = 1.0 if samples and heat is None else float(heat or 0)  # as in transformers
        if samples is False:
            temperature = 0.0
        top_p = 1.0 if top_p is None else float(top_p)
        if temperature < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"generation_kwargs of a task has temperature = {heat} and top_p = {top_p}: temperature must be at "
                "least 0, top_p above 0 and at most 1."
            )
        if temperature == 0:
            left.pop("top_k", None)
        neutral = {"num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1, "top_k": 0}
        if other := [key for key, value in left.items() if value is not None and neutral.get(key) != value]:
            raise UserError(
                f"generation_kwargs of a task has {other[0]} = {left[other[0]]!r}, which is not known here."
            )
        new_tokens = int(next((n for n in counts if n is not None), new_tokens))
        if new_tokens < 1:
            raise UserError(f"generation_kwargs of a task has max_gen_toks = {new_tokens}: it must be at least 1.")
        return Writing(
            until=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            new_tokens=new_tokens,
            temperature=temperature,
            top_p=top_p,
        )


class TorchtitanLM(TemplateLM):
    """A model on its ranks. Methods that take requests are collective; all ranks must get the same requests."""

    has_templates = False
    """Whether the texts of requests were made by apply_chat_template: the harness does so for all of them or none."""

    def __init__(
        self,
        model: Transformer,
        ranks: Ranks,
        tokenizer: Tokenizer,
        max_length: int,
        add_bos: bool = False,
        truncate: bool = False,
        silent: bool = False,
        ends: Sequence[int] = (),
    ) -> None:
        """max_length: how many tokens the model may read; the last token of a scored request is not read.

        add_bos: every text gets BOS unless it begins with BOS; what apply_chat_template made is left as it is.
        truncate: longer requests are cut from the left, not a UserError; `truncated` counts them. silent: no progress
        bars. ends: tokens that end an answer beside those of stop_ids().
        """
        super().__init__()
        self.model, self.ranks, self._tokens = model, ranks, tokenizer
        self.max_length, self.add_bos, self.truncate, self.silent = max_length, add_bos, truncate, silent
        self.truncated, self.ends = 0, ends
        self._device = ranks.device
        self._special = frozenset(tokenizer.special.values())
        if tokenizer.bos_id is None and tokenizer.eos_id is None:
            raise UserError(
                f"The tokenizer in {tokenizer.folder} names neither BOS nor EOS: lm-eval puts one of them before a "
                "text that has nothing before it."
            )

    # what the harness needs of a model besides its answers

    @property
    def eot_token_id(self) -> int | None:
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What is put before a text that has no context: BOS, or EOS if there is no BOS."""
        prefix = self._tokens.bos_id if self._tokens.bos_id is not None else self._tokens.eos_id
        assert prefix is not None
        return prefix

    @property
    def max_gen_toks(self) -> int:
        return 256  # lm-eval's default

    @property
    def tokenizer_name(self) -> str:
        return f"{Path(self._tokens.folder).name}-{self._tokens.fingerprint[:12]}"

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template; UserError if its folder has none."""
        return load_chat_template(self._tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's fingerprint, which the harness only puts into its results."""
        return self.template.fingerprint if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the model's answer begins or, without add_generation_prompt, continues.
        UserError if the template refuses the conversation. From here on no text gets BOS: the template has written it,
        if there is one, as in training."""
        self.has_templates = True
        try:
            text = self.template.render(chat_history, answering=add_generation_prompt)
        except ValueError as error:
            raise UserError(f"{error}") from error
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; the spelling of a special token in it becomes that token, as in lm-eval's `hf` model. BOS is
        added if add_special_tokens says so or, if that is None, by add_bos, to texts that do not begin with it and were
        not made by the chat template."""
        ids = self._tokens.encode_template(string)[0]
        bos = self._tokens.bos_id
        if add_special_tokens is None:
            add_special_tokens = self.add_bos and not self.has_templates and ids[:1] != [bos]
        ids = [bos, *ids] if add_special_tokens and bos is not None else ids
        check_vocabulary(max(ids, default=0), self.model.args.vocab_size, self._tokens)
        return ids

    # answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Per (context, continuation): the continuation's log-likelihood, and whether greedy generation would write
        it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.silent)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self._check_alike([(context, continuation) for _, context, continuation in requests])
        pairs = []
        for _, context, continuation in requests:
            if not continuation:
                raise UserError(f"A request has a continuation without a token after {self._shown(context)}.")
            # the last token is scored and not read
            cut = self._cut(context, self.max_length + 1 - len(continuation), len(continuation), "to score")
            pairs.append((torch.tensor(cut), torch.tensor(continuation)))

        def score(members: list[int], rope: RopeArgs) -> list[tuple[float, bool]]:
            prompts, targets = zip(*([pairs[i] for i in members] or [(DUMMY_PROMPT, DUMMY_PROMPT)]), strict=True)
            scored = answer_scores(self.model, self.ranks, prompts, targets, rope)
            return [(float(logprobs.sum()), bool(likeliest.all())) for logprobs, likeliest in scored]

        # of a continuation all tokens but the last are read
        prompts, more = [prompt for prompt, _ in pairs], [len(target) - 1 for _, target in pairs]
        return self._in_groups(prompts, more, score, "log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Per (text,): its log-likelihood after the prefix token, in windows of max_length that share one token. The
        last window reads max_length tokens too, and scores those that no other window has scored."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        self._check_alike(texts)
        windows: list[tuple[int, torch.Tensor, int]] = []
        for n, text in enumerate(texts):
            for read, scored in get_rolling_token_windows(text, self.prefix_token_id, self.max_length, 1):
                windows.append((n, torch.tensor([*read, scored[-1]]), len(scored)))

        def score(members: list[int], rope: RopeArgs) -> list[float]:
            read = [windows[i][1] for i in members] or [DUMMY_PROMPT]
            losses = losses_of_documents(self.model, self.ranks, read, rope)
            return [-float(x[-windows[i][2] :].double().sum()) for i, x in zip(members, losses)]

        read = [tokens[:-1] for _, tokens, _ in windows]
        scores = self._in_groups(read, [0] * len(read), score, "rolling log-likelihoods")
        sums = [0.0] * len(texts)
        for (n, _, _), one in zip(windows, scores, strict=True):
            sums[n] += one
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Per (context, generation_kwargs): what the model writes after the context, up to the first string of
        `until`."""
        self._check_alike([request.args for request in requests])
        prompts: list[torch.Tensor] = []
        by_writing: dict[Writing, list[int]] = {}
        for i, request in enumerate(requests):
            context, asked = request.args
            writing = Writing.of(asked, self.max_gen_toks)
            read = self.tok_encode(context) or [self.prefix_token_id]
            read = self._cut(read, self.max_length - writing.new_tokens, writing.new_tokens, "to write")
            prompts.append(torch.tensor(read))
            by_writing.setdefault(writing, []).append(i)
        answers: dict[int, str] = {}
        for writing, members in by_writing.items():
            mine = [members[j] for j in self._deal([len(prompts[i]) for i in members])]
            rounds = self.ranks.largest(-(-len(mine) // BATCH_PROMPTS))
            for g in tqdm(range(rounds), desc="texts", disable=self.silent):
                batch = mine[g * BATCH_PROMPTS : (g + 1) * BATCH_PROMPTS]
                written = generate(
                    self.model,
                    self.ranks,
                    [prompts[i] for i in batch],
                    writing.new_tokens,
                    frozenset(stop_ids(self._tokens, self.ends)),
                    writing.temperature,
                    writing.top_p,
                    numbers=batch,
                    stop=partial(self._ends, writing.until),
                )
                answers |= {i: self._text(tokens, writing.until) for i, tokens in zip(batch, written, strict=True)}
        return self.ranks.collect(answers)

    def _ends(self, until: Sequence[str], tokens: list[int]) -> bool:
        """Whether one of `until` has been written. Special tokens are spelled out: `until` can name one."""
        if not until:
            return False
        enough = max(len(text.encode()) for text in until) + 8  # a token has at least one byte
        return all(
            any(text in written for text in until)
            for written in (self._tokens.decode(tokens[-enough:]), self._tokens.decode(tokens))
        )

    def _text(self, tokens: list[int], until: Sequence[str]) -> str:
        """The text without special tokens, up to the first of `until`."""
        written = self._tokens.decode([token for token in tokens if token not in self._special])
        for text in until:
            written = written.split(text)[0]
        return written

    # requests shared among ranks

    def _cut(self, context: list[int], room: int, more: int, why: str) -> list[int]:
        """The last `room` tokens of a context. UserError if it is longer and must not be cut. more: how many tokens
        follow it; why: "to score" or "to write"."""
        if len(context) <= room:
            return context
        if room < 1:
            raise UserError(
                f"A request has {more:,} tokens {why}, but max_length = {self.max_length:,} leaves no room before them."
            )
        if not self.truncate:
            raise UserError(
                f"A request has {len(context):,} tokens to read and {more:,} {why}: {len(context) - room:,} more than "
                f"max_length = {self.max_length:,} has room for. It begins {self._shown(context)}. Give a larger "
                "--max_length, or --truncate to cut such requests from the left."
            )
        self.truncated += 1
        return context[-room:]

    def _shown(self, tokens: list[int]) -> str:
        return repr(self._tokens.decode(tokens[:12]))

    def _check_alike(self, requests: Sequence[Any]) -> None:
        """RuntimeError unless all ranks have the same requests: otherwise results would mix them. Collective."""
        code = zlib.crc32(repr(requests).encode())
        if self.ranks.largest(code) != -self.ranks.largest(-code):
            raise RuntimeError("lm-eval made different requests on different ranks: a task draws without a seed.")

    def _deal(self, sizes: Sequence[int]) -> list[int]:
        """Indices of this data-parallel rank's requests, the longest first."""
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        return order[self.ranks.dp_rank :: self.ranks.dp]

    def _in_groups(
        self,
        read: Sequence[torch.Tensor],
        more: Sequence[int],
        score: Callable[[list[int], RopeArgs], Sequence[Any]],
        what: str,
    ) -> list[Any]:
        """The answers to all texts, in their order. Collective.

        score(indices of texts, RoPE) answers a group that is read together; without indices this rank only takes part.
        read: int64 [T] each; more: how many tokens are read after each; what: for the progress bar.
        """
        mine = self._deal([len(text) + n for text, n in zip(read, more, strict=True)])
        answers: dict[int, Any] = {}
        texts, more_of_mine = [read[i] for i in mine], [more[i] for i in mine]
        groups = groups_of(self.ranks, texts, more_of_mine, self.model.args.rope, SCORED_TOGETHER)
        for rope, members in tqdm(groups, desc=what, disable=self.silent):
            group = [mine[j] for j in members]
            answers |= zip(group, score(group, rope))
        return self.ranks.collect(answers)
