"""The evaluation that a stage's [evaluation] table asks for: prepared once, run at some steps, its results on disk.

evaluation/step-N.json and pictures in the stage's dump folder, scalars and the heatmap in TensorBoard, a line in the
log.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchtitan.components.manifest import results_file
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation import needle
from torchtitan.extensions.evaluation.checks import evaluation_length, longest_asked
from torchtitan.extensions.evaluation.command_line import write_whole
from torchtitan.extensions.evaluation.documents import long_documents
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.items import Item, Score
from torchtitan.extensions.evaluation.loss_by_position import default_edges
from torchtitan.extensions.evaluation.runner import as_grid, ask, let_go, position_losses
from torchtitan.extensions.evaluation.tasks import GROUPS, at_length, group_means, group_name, tasks_of
from torchtitan.models.rope_config import rope_warnings
from torchtitan.models.transformer import Transformer, TransformerArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

SILENCE = 30.0
"""Seconds of an evaluation in training after which the log says how far it is."""

ENOUGH_TEXT = 1 << 20
"""Tokens of haystack beyond which no more are read."""


@dataclass(frozen=True)
class Prepared:
    """What is to be asked, in memory."""

    texts: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """By name: documents, int64 [length + 1] each."""

    length: int = 0
    asked: dict[str, list[Item]] = field(default_factory=dict)
    """By task."""

    scores: dict[str, Score] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """How it is asked, for the results: what makes numbers of two results mean the same."""


def warn_beyond(args: TransformerArgs, longest: int) -> None:
    """Say in the log what a text of `longest` tokens asks of RoPE that it was not made for."""
    warnings, reach = rope_warnings(args.rope, args.head_dim, longest), args.rope.max_position_embeddings
    if reach is not None and reach < longest:
        warnings.append(f"the model's positions were trained up to {reach:,} (max_position_embeddings).")
    for warning in warnings:
        logger.warning(f"evaluation at {longest:,} tokens: {warning}")


def prepare(config: JobConfig, tokenizer: Tokenizer, args: TransformerArgs) -> Prepared:
    """Read texts, make needles and tasks: the same on every rank. UserError for text that is too short or not there,
    and for a length that a task cannot have."""
    e = config.evaluation
    length, longest = evaluation_length(config), longest_asked(config)
    folder, bos = Path(config.data.folder), config.data.add_bos and tokenizer.bos_id is not None
    texts = {}
    for text in e.texts:
        path = folder / text
        if not path.exists():
            raise UserError(f"evaluation.texts names {path}, which is not there.")
        name = path.stem if path.stem not in texts else text
        texts[name] = long_documents(
            [path], tokenizer, length + 1, e.max_documents, e.text_field, bos, called=f"evaluation.texts ({text})"
        )
    asked: dict[str, list[Item]] = {}
    scores: dict[str, Score] = {}
    pieces = [document for found in texts.values() for document in found]
    # a haystack is one text: nothing begins or ends in it
    around = without_special(tokenizer, torch.cat(pieces))[:ENOUGH_TEXT] if pieces else None
    bos_id = tokenizer.bos_id if bos else None
    if e.needle_lengths:
        hay = torch.tensor(tokenizer.encode(needle.default_text())) if around is None else around
        asked[needle.TASK] = needle.needle_items(
            tokenizer, hay, e.needle_lengths, e.needle_depths, e.needles, seed=e.seed, bos_id=bos_id
        )
        scores[needle.TASK] = needle.score
    if e.tasks:
        prose = needle.default_text() if around is None else tokenizer.decode(around.tolist())
        for task in tasks_of(e.tasks, [folder / file for file in e.qa_files]):
            asked[task.name] = [
                item
                for n in sorted(set(e.task_lengths))
                for item in task.make(tokenizer, prose, n, e.task_items, e.seed, bos_id)
            ]
            scores[task.name] = task.score
    largest = max(int(t.max()) for t in [*pieces, *(i.prompt for items in asked.values() for i in items)])
    if largest >= args.vocab_size:
        raise UserError(
            f"The tokenizer in {tokenizer.folder} gives the id {largest}, but the model has {args.vocab_size} ids: "
            "they do not belong together."
        )
    warn_beyond(args, longest)
    questions = hashlib.sha256()
    for name, documents in texts.items():
        for document in documents:
            questions.update(name.encode() + document.numpy().tobytes())
    for kind, items in asked.items():
        for item in items:
            questions.update(kind.encode() + item.prompt.numpy().tobytes() + item.target.numpy().tobytes())
    about = {
        "texts": list(e.texts),
        "windows": list(e.windows),
        "generate": e.generate,
        "add_bos": bos,
        "seed": e.seed,
        "tokenizer": tokenizer.fingerprint,
        "questions": questions.hexdigest(),
    }
    return Prepared(texts, length, asked, scores, about)


def without_special(tokenizer: Tokenizer, tokens: torch.Tensor) -> torch.Tensor:
    """int64 [N] without special tokens, which stand where documents begin and end."""
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
    """{"perplexity", "tasks", "groups", "asked"} (docs/evaluation.md); None for what is no number. Collective; nothing
    of the model's state is changed.

    on_part: told what is under way, and how much of this rank's part is done.
    """
    was_training = model.training
    model.eval()
    perplexity: dict[str, Any] = {}
    try:
        edges = default_edges(prepared.length)
        for name, documents in prepared.texts.items():

            def on(done: int, total: int, name: str = name) -> None:
                on_part(f"loss by position, {name}", done, total)

            full = position_losses(model, ranks, documents, edges, on_part=on)
            gains = []
            for window in windows:
                cut = position_losses(model, ranks, documents, edges, window, on)
                both = {"edges": list(edges), "nll_cut": cut["nll"], "nll_full": full["nll"]}
                gains.append({"window": window, "stride": window - window // 2, **both})
            perplexity[name] = {**full, "gain_of_context": gains[0] if gains else None, "gains_of_context": gains}
        tasks: dict[str, Any] = {}
        for task, items in prepared.asked.items():

            def on_task(done: int, total: int, task: str = task) -> None:
                on_part("needles" if task == needle.TASK else task, done, total)

            outcomes = ask(model, ranks, tokenizer, items, prepared.scores[task], generate, on_task)
            tasks[task] = as_grid(items, outcomes)
    finally:
        let_go(model)
        model.train(was_training)
    found = {"perplexity": perplexity, "tasks": tasks, "groups": group_means(tasks), "asked": prepared.about}
    result: dict[str, Any] = finite(found)
    if str(result) != str(found):
        logger.warning("some numbers of this evaluation are infinite or none (NaN): null in the results")
    return result


class StageEvaluation:
    """The evaluations of a running stage."""

    def __init__(self, config: JobConfig, tokenizer: Tokenizer, args: TransformerArgs, ranks: Ranks, rank: int):
        self.config, self.tokenizer, self.args, self.ranks, self.rank = config, tokenizer, args, ranks, rank
        self.prepared = prepare(config, tokenizer, args)
        self.said = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether there is to be one after this step, and the run has not left it, asked so, before. Collective."""
        e, steps = self.config.evaluation, self.config.training.steps
        if step == steps and not e.at_end:
            return False
        if step not in (0, steps) and (e.freq == 0 or step % e.freq):
            return False
        missing = False
        if self.rank == 0:
            file = results_file(self.config, step)
            missing = asked_in(file) != self.prepared.about
            if not missing:
                logger.info(f"evaluation after step {step}: it is in {file}")
        return bool(self.ranks.largest(int(missing)))

    def run(self, model: Transformer, step: int, tokens_seen: int, tensorboard: Any = None) -> dict[str, Any]:
        """Collective. tensorboard: rank 0's SummaryWriter, if it has one."""
        e, start = self.config.evaluation, time.perf_counter()
        self.said = start
        result = {
            "label": f"{self.config.stage.name}, step {step}",
            "model": self.config.job.dump_folder,
            "step": step,
            "tokens_seen": tokens_seen,
            "rope": asdict(self.args.rope),
            "dtype": self.config.training.mixed_precision_param,
            "world_size": torch.distributed.get_world_size(),
            **evaluate(model, self.ranks, self.tokenizer, self.prepared, e.windows, e.generate, self._say),
            "seconds": round(time.perf_counter() - start, 1),
        }
        if self.rank == 0:
            self._leave(result, step, tensorboard)
        logger.info(f"evaluation after step {step} ({result['seconds']} s): {summary(result)}")
        return result

    def _say(self, what: str, done: int, total: int) -> None:
        if time.perf_counter() - self.said > SILENCE:
            self.said = time.perf_counter()
            logger.info(f"evaluation: {what}, {done} of {total}")

    def _leave(self, result: dict[str, Any], step: int, tensorboard: Any) -> None:
        write(result, results_file(self.config, step))
        if not tensorboard:
            return
        for key, value in scalars(result).items():
            tensorboard.add_scalar(f"evaluation/{key}", value, step)
        from torchtitan.extensions.evaluation.plots import task_figures

        for name, figure in task_figures(result).items():
            tensorboard.add_figure(f"evaluation/{name}", figure, step)


def asked_in(file: Path) -> dict[str, Any] | None:
    """How the results in a file were asked; None if there are none, or they do not say."""
    try:
        found = json.loads(file.read_text()).get("asked")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def write(result: dict[str, Any], file: Path) -> None:
    """The JSON, whole or not at all, and beside it FILE_TASK.png for each task with depths, FILE_tasks.png for the
    others and FILE_positions.png, for what there is; those of an earlier result that this one has not are deleted."""
    from torchtitan.extensions.evaluation import plots

    file.parent.mkdir(parents=True, exist_ok=True)
    figures = plots.task_figures(result)
    if result["perplexity"]:
        figures["positions"] = plots.position_figure(result)
    known = {"positions", "tasks", needle.TASK, *(task for tasks in GROUPS.values() for task in tasks)}
    for name in known - figures.keys():
        file.with_name(f"{file.stem}_{name}.png").unlink(missing_ok=True)
    for name, figure in figures.items():
        plots.save(figure, file.with_name(f"{file.stem}_{name}.png"))
    write_whole(file, json.dumps(result, indent=1, allow_nan=False) + "\n")


def finite(numbers: Any) -> Any:
    """The same with None for what is no number: a model that has come apart has results all the same."""
    if isinstance(numbers, dict):
        return {key: finite(value) for key, value in numbers.items()}
    if isinstance(numbers, list):
        return [finite(value) for value in numbers]
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """One number a text, and a task or group of them and length: the mean loss, the share of exact answers, their
    log-probability, the score."""
    found: dict[str, float | None] = {}
    for name, one in result["perplexity"].items():
        found[f"loss/{name}"] = one["mean_nll"]
        found[f"loss_of_last_bucket/{name}"] = one["nll"][-1]
    for task, grid in result["tasks"].items():
        for length in grid["lengths"]:
            for what in ("exact", "logprob", "score"):
                found[f"{task}_{what}/{length}"] = at_length(grid, what, length)
    for group, means in result["groups"].items():
        for i, length in enumerate(means["lengths"]):
            for what in ("exact", "score"):
                found[f"{group}_{what}/{length}"] = means[what][i]
    return {key: value for key, value in found.items() if value is not None}


def summary(result: dict[str, Any]) -> str:
    """A line for the log."""
    parts = []
    for name, one in result["perplexity"].items():
        if one["mean_nll"] is not None:
            parts.append(f"{name} loss {one['mean_nll']:.3f} (perplexity {math.exp(min(one['mean_nll'], 700)):.2f})")
    numbers = scalars(result)
    grouped = {task for group in result["groups"] for task in GROUPS[group]}
    shown = {task: (task, grid["lengths"]) for task, grid in result["tasks"].items() if task not in grouped}
    shown |= {group: (group_name(group, means), means["lengths"]) for group, means in result["groups"].items()}
    for key, (name, lengths) in shown.items():
        for what, said in (("exact", "answered exactly"), ("score", "written")):
            cells = [f"{numbers[k]:.0%} at {n:,}" for n in lengths if (k := f"{key}_{what}/{n}") in numbers]
            if cells:
                parts.append(f"{name} {said} {', '.join(cells)}")
    return "; ".join(parts) or "nothing"
