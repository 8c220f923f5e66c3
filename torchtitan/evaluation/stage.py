"""The evaluation that a stage's [evaluation] table asks for: prepared once, run at some steps, its results on disk.

evaluation/step-N.json and pictures in the stage's dump folder, scalars and the heatmap in TensorBoard, a line in the
log.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.job_config import JobConfig
from torchtitan.evaluation import needle
from torchtitan.evaluation.documents import long_documents
from torchtitan.evaluation.forward import Ranks
from torchtitan.evaluation.items import Item
from torchtitan.evaluation.loss_by_position import default_edges
from torchtitan.evaluation.runner import as_grid, ask, let_go, position_losses
from torchtitan.models.rope_config import rope_warnings
from torchtitan.models.transformer import Transformer, TransformerArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

FOLDER = "evaluation"
ENOUGH_TEXT = 1 << 20
"""Tokens of haystack beyond which no more are read."""


@dataclass(frozen=True)
class Prepared:
    """What is to be asked, in memory."""

    texts: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """By name: documents, int64 [length + 1] each."""

    length: int = 0
    needles: list[Item] = field(default_factory=list)


def is_asked_for(config: JobConfig) -> bool:
    return bool(config.evaluation.texts or config.evaluation.needle_lengths)


def warn_beyond(args: TransformerArgs, longest: int) -> None:
    """Say in the log what a text of `longest` tokens asks of RoPE that it was not made for."""
    warnings, reach = rope_warnings(args.rope, args.head_dim, longest), args.rope.max_position_embeddings
    if reach is not None and reach < longest:
        warnings.append(f"the model's positions were trained up to {reach:,} (max_position_embeddings).")
    for warning in warnings:
        logger.warning(f"evaluation at {longest:,} tokens: {warning}")


def prepare(config: JobConfig, tokenizer: Tokenizer, args: TransformerArgs) -> Prepared:
    """Read texts and make needles: the same on every rank. UserError for text that is too short or not there."""
    e = config.evaluation
    length = e.length or config.data.target_seq_len or config.training.seq_len
    longest = max([length] * bool(e.texts) + list(e.needle_lengths), default=0)
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
    needles: list[Item] = []
    if e.needle_lengths:
        pieces = [document for found in texts.values() for document in found]
        around = torch.cat(pieces)[:ENOUGH_TEXT] if pieces else torch.tensor(tokenizer.encode(needle.default_text()))
        bos_id = tokenizer.bos_id if bos else None
        needles = needle.needle_items(
            tokenizer, around, e.needle_lengths, e.needle_depths, e.needles, seed=e.seed, bos_id=bos_id
        )
    largest = max(int(t.max()) for t in [*(d for found in texts.values() for d in found), *(i.prompt for i in needles)])
    if largest >= args.vocab_size:
        raise UserError(
            f"The tokenizer in {tokenizer.folder} gives the id {largest}, but the model has {args.vocab_size} ids: "
            "they do not belong together."
        )
    warn_beyond(args, longest)
    return Prepared(texts, length, needles)


def evaluate(
    model: Transformer,
    ranks: Ranks,
    tokenizer: Tokenizer,
    prepared: Prepared,
    windows: tuple[int, ...] = (),
    generate: bool = False,
    on_part: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """{"perplexity": ..., "tasks": ...} (docs/evaluation.md). Collective; nothing of the model's state is changed.

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
                gains.append({"window": window, "edges": list(edges), "nll_cut": cut["nll"], "nll_full": full["nll"]})
            perplexity[name] = {**full, "gain_of_context": gains[0] if gains else None, "gains_of_context": gains}
        tasks: dict[str, Any] = {}
        if prepared.needles:

            def on_needle(done: int, total: int) -> None:
                on_part("needles", done, total)

            outcomes = ask(model, ranks, tokenizer, prepared.needles, needle.score, generate, on_needle)
            tasks[needle.TASK] = as_grid(prepared.needles, outcomes)
    finally:
        let_go(model)
        model.train(was_training)
    return {"perplexity": perplexity, "tasks": tasks}


class StageEvaluation:
    """The evaluations of a running stage."""

    def __init__(self, config: JobConfig, tokenizer: Tokenizer, args: TransformerArgs, ranks: Ranks, rank: int):
        self.config, self.tokenizer, self.args, self.ranks, self.rank = config, tokenizer, args, ranks, rank
        self.folder = Path(config.job.dump_folder) / FOLDER
        self.prepared = prepare(config, tokenizer, args)

    def due(self, step: int) -> bool:
        """Whether there is to be one after this step, and none has been left by an earlier run. Collective."""
        freq, steps = self.config.evaluation.freq, self.config.training.steps
        if step not in (0, steps) and (freq == 0 or step % freq):
            return False
        here = self.rank == 0 and not self.file(step).exists()
        return bool(self.ranks.largest(int(here)))

    def file(self, step: int) -> Path:
        return self.folder / f"step-{step}.json"

    def run(self, model: Transformer, step: int, tokens_seen: int, tensorboard: Any = None) -> dict[str, Any]:
        """Collective. tensorboard: rank 0's SummaryWriter, if it has one."""
        e, start = self.config.evaluation, time.perf_counter()
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
        logger.debug(f"{what}: {done} of {total}")

    def _leave(self, result: dict[str, Any], step: int, tensorboard: Any) -> None:
        write(result, self.file(step))
        if not tensorboard:
            return
        for key, value in scalars(result).items():
            tensorboard.add_scalar(f"evaluation/{key}", value, step)
        for task, grid in result["tasks"].items():
            from torchtitan.evaluation.plots import needle_figure

            tensorboard.add_figure(f"evaluation/{task}", needle_figure(grid, result["label"]), step)


def write(result: dict[str, Any], file: Path) -> None:
    """The JSON, whole or not at all, and beside it FILE_needle.png and FILE_positions.png for what there is."""
    from torchtitan.evaluation import plots

    file.parent.mkdir(parents=True, exist_ok=True)
    for task, grid in result["tasks"].items():
        plots.save(plots.needle_figure(grid, result["label"]), file.with_name(f"{file.stem}_{task}.png"))
    if result["perplexity"]:
        plots.save(plots.position_figure(result), file.with_name(f"{file.stem}_positions.png"))
    aside = file.with_name(file.name + ".partial")
    aside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    aside.replace(file)


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """One number a text and a task and length: the mean loss, its gain, the share of exact answers, the score."""
    found: dict[str, float | None] = {}
    for name, one in result["perplexity"].items():
        found[f"loss/{name}"] = one["mean_nll"]
        found[f"loss_of_last_bucket/{name}"] = one["nll"][-1]
    for task, grid in result["tasks"].items():
        for i, length in enumerate(grid["lengths"]):
            for what in ("exact", "logprob", "score"):
                cells = [cell for cell in grid[what][i] if cell is not None]
                found[f"{task}_{what}/{length}"] = sum(cells) / len(cells) if cells else None
    return {key: value for key, value in found.items() if value is not None}


def summary(result: dict[str, Any]) -> str:
    """A line for the log."""
    parts = []
    for name, one in result["perplexity"].items():
        if one["mean_nll"] is not None:
            parts.append(f"{name} loss {one['mean_nll']:.3f} (perplexity {math.exp(min(one['mean_nll'], 700)):.2f})")
    numbers = scalars(result)
    for task, grid in result["tasks"].items():
        for what, said in (("exact", "answered exactly"), ("score", "written")):
            cells = [
                f"{numbers[key]:.0%} at {n:,}" for n in grid["lengths"] if (key := f"{task}_{what}/{n}") in numbers
            ]
            if cells:
                parts.append(f"{task} {said} {', '.join(cells)}")
    return "; ".join(parts) or "nothing"
