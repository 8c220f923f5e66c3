"""An [evaluation] table: its texts and questions are prepared once, then a model is evaluated on them.

Used by a running stage (hook.py) and by scripts/evaluate.py. The result is a dictionary that is written as JSON
(results.py); docs/evaluation.md explains its keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchtitan.components.metrics import finite
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.checks import evaluation_length, longest_asked
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.held_out_text import check_vocabulary, long_documents
from torchtitan.extensions.evaluation.needle import NeedleTask
from torchtitan.extensions.evaluation.questions import Question, Score, default_text
from torchtitan.extensions.evaluation.runner import (
    default_edges,
    free_gathered_parameters,
    mean_by_length_and_depth,
    position_losses,
    score_questions,
)
from torchtitan.extensions.evaluation.tasks import group_means, tasks_of
from torchtitan.models.rope_config import rope_warnings
from torchtitan.models.transformer import Transformer, TransformerArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

ENOUGH_TEXT = 1 << 20
"""How many tokens of held-out text are used as haystack at most."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a model is asked; the same on every rank."""

    texts: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """By name: documents, int64 [length + 1] each."""

    length: int = 0
    questions: dict[str, list[Question]] = field(default_factory=dict)
    """By task."""

    scores: dict[str, Score] = field(default_factory=dict)
    ends: Sequence[int] = ()
    """Tokens that end an answer, as the model's conversations taught them."""

    settings: dict[str, Any] = field(default_factory=dict)
    """How the questions are asked, "asked" in the results: only results with the same settings can be compared."""


def warn_beyond_trained_length(args: TransformerArgs, longest: int) -> None:
    """Log a warning if the model's RoPE was not made for `longest` tokens."""
    warnings, reach = rope_warnings(args.rope, args.head_dim, longest), args.rope.max_position_embeddings
    if reach is not None and reach < longest:
        warnings.append(f"the model's positions were trained up to {reach:,} (max_position_embeddings).")
    for warning in warnings:
        logger.warning(f"evaluation at {longest:,} tokens: {warning}")


def prepare(config: JobConfig, tokenizer: Tokenizer, args: TransformerArgs, ends: Sequence[int] = ()) -> Prepared:
    """Read texts and make the questions of needles and tasks: the same on every rank. UserError for text that is too
    short or missing, and for a length that a task cannot have."""
    e = config.evaluation
    length, longest = evaluation_length(config), longest_asked(config)
    folder, bos = Path(config.data.folder), config.data.add_bos and tokenizer.bos_id is not None
    texts = {}
    for text in e.texts:
        path = folder / text
        if not path.exists():
            raise UserError(
                f"evaluation.texts names {path}, which does not exist (relative to data.folder = {folder})."
            )
        name = path.stem if path.stem not in texts else text
        texts[name] = long_documents(
            [path], tokenizer, length + 1, e.max_documents, e.text_field, bos, option=f"evaluation.texts ({text})"
        )
    documents = [document for documents in texts.values() for document in documents]
    # a haystack is one text, without the special tokens that begin and end documents
    held_out = without_special(tokenizer, torch.cat(documents))[:ENOUGH_TEXT] if documents else None
    prose = default_text() if held_out is None else tokenizer.decode(held_out.tolist())
    bos_id = tokenizer.bos_id if bos else None
    asked: list[tuple[Any, Any, Sequence[int], int]] = []
    """(task, its haystack, lengths, number of questions)"""
    if e.needle_lengths:
        tokens = torch.tensor(tokenizer.encode(prose)) if held_out is None else held_out
        asked.append((NeedleTask(e.needle_depths), tokens, e.needle_lengths, e.needles))
    for task in tasks_of(e.tasks, [folder / file for file in e.qa_files]):
        asked.append((task, prose, e.task_lengths, e.task_items))
    questions = {
        task.name: [q for n in sorted(set(lengths)) for q in task.make(tokenizer, hay, n, count, e.seed, bos_id)]
        for task, hay, lengths, count in asked
    }
    scores = {task.name: task.score for task, _, _, _ in asked}
    prompts = [question.prompt for of_task in questions.values() for question in of_task]
    check_vocabulary(max(int(tokens.max()) for tokens in [*documents, *prompts]), args.vocab_size, tokenizer)
    warn_beyond_trained_length(args, longest)
    digest = hashlib.sha256()
    for name, of_text in texts.items():
        for document in of_text:
            digest.update(name.encode() + document.numpy().tobytes())
    for task_name, of_task in questions.items():
        for question in of_task:
            digest.update(task_name.encode() + question.prompt.numpy().tobytes() + question.target.numpy().tobytes())
    settings = {
        "texts": list(e.texts),
        "windows": list(e.windows),
        "generate": e.generate,
        "add_bos": bos,
        "seed": e.seed,
        "tokenizer": tokenizer.fingerprint,
        "questions": digest.hexdigest(),
    }
    return Prepared(texts, length, questions, scores, ends, settings)


def without_special(tokenizer: Tokenizer, tokens: torch.Tensor) -> torch.Tensor:
    """int64 [N], without special tokens."""
    special = torch.tensor(sorted(tokenizer.special.values()), dtype=torch.int64)
    return tokens[~torch.isin(tokens, special)]


def evaluate(
    model: Transformer,
    ranks: Ranks,
    tokenizer: Tokenizer,
    prepared: Prepared,
    windows: tuple[int, ...] = (),
    generate: bool = False,
    on_part: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """{"perplexity", "tasks", "groups", "asked"} (docs/evaluation.md), with None instead of NaN and infinity.
    Collective. The model's state does not change.

    on_part: called with (what is under way, done, total), for this rank's work.
    """
    was_training = model.training
    model.eval()
    perplexity: dict[str, Any] = {}
    try:
        edges = default_edges(prepared.length)
        for name, documents in prepared.texts.items():

            def on_text(done: int, total: int, name: str = name) -> None:
                on_part(f"loss by position, {name}", done, total)

            full = position_losses(model, ranks, documents, edges, on_part=on_text)
            gains = []
            for window in windows:
                cut = position_losses(model, ranks, documents, edges, window, on_part=on_text)
                both = {"edges": list(edges), "nll_cut": cut["nll"], "nll_full": full["nll"]}
                gains.append({"window": window, "stride": window - window // 2, **both})
            perplexity[name] = {**full, "gain_of_context": gains[0] if gains else None, "gains_of_context": gains}
        tasks: dict[str, Any] = {}
        for task, questions in prepared.questions.items():

            def on_task(done: int, total: int, task: str = task) -> None:
                on_part(task, done, total)

            score = prepared.scores[task]
            outcomes = score_questions(model, ranks, tokenizer, questions, score, generate, prepared.ends, on_task)
            tasks[task] = mean_by_length_and_depth(questions, outcomes)
    finally:
        free_gathered_parameters(model)
        model.train(was_training)
    numbers = {"perplexity": perplexity, "tasks": tasks, "groups": group_means(tasks), "asked": prepared.settings}
    result: dict[str, Any] = finite(numbers)
    if str(result) != str(numbers):
        logger.warning("some numbers of this evaluation are NaN or infinite; they are null in the results")
    return result
