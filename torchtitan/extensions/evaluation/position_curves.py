"""Loss by position of a model on one device, under any RoPE: what scripts/loss_by_position.py and the studies share.

A result is a dictionary as docs/loss_by_position.md describes it. Nothing here imports PyTorch before it measures: a
mistake on the command line should not wait for it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchtitan.config import load_config
from torchtitan.config.checks import check_config
from torchtitan.config.schema import Data, Rope, Source
from torchtitan.models.rope_checks import check_rope
from torchtitan.tools.errors import UserError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What to evaluate, on which text, where."""
    parser.add_argument("--model", type=Path, help="Hugging Face folder, or a checkpoint's step-N folder")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (the model's; that of the run)")
    parser.add_argument("--text", type=Path, nargs="+", help=".txt, .jsonl, .parquet, folders, tokenized folders")
    parser.add_argument("--text_field", default="text", help="field of a .jsonl or .parquet record (text)")
    parser.add_argument("--add_bos", action="store_true", help="begin every document with the tokenizer's BOS token")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is a GPU)")
    parser.add_argument("--attention_backend", default="auto", choices=("auto", "flex", "varlen", "sdpa"))


def add_curve_arguments(parser: argparse.ArgumentParser) -> None:
    """What measure() reads."""
    add_model_arguments(parser)
    parser.add_argument("--length", type=int, help="tokens of each document that are read; shorter ones are left out")
    parser.add_argument("--windows", type=int, nargs="+", default=[], help="cut the context to windows of W tokens")
    parser.add_argument("--reset", type=int, nargs="+", default=[], help="begin the context anew every W tokens")
    parser.add_argument("--edges", type=int, nargs="+", help="where ranges of positions end (512 and its doubles)")
    parser.add_argument("--max_documents", type=int, default=16, help="documents at most (16)")
    parser.add_argument("--chunk", type=int, default=1024, help="positions whose logits exist at once (1024)")
    parser.add_argument("--label", help="name of the result in pictures")


def rope_table(flags: list[str]) -> Rope:
    """The [rope] table of the flags --rope.KEY VALUE, checked like a stage's; UserError for any other flag."""
    for flag in flags:
        if flag.startswith("--") and not flag.startswith("--rope."):
            raise UserError(f"{flag.split('=')[0]} is not known; see --help. Of the configuration, --rope.KEY is read.")
    config = load_config(flags)
    if flags and not flags[0].startswith("--"):
        raise UserError(f"{flags[0]} has no --flag before it; every value follows its --flag.")
    # something to train on, which the checks ask for
    check_config(replace(config, data=Data(sources=(Source(name="text", path="text"),))), 1)
    check_rope(config)
    return config.rope


def measure(own: argparse.Namespace, rope: Rope) -> dict[str, Any]:
    """One model under one RoPE, with full context, in each window and with each reset."""
    for key in ("model", "text", "length"):
        if getattr(own, key) is None:
            raise UserError(f"--{key} is not given; see --help.")
    for key, values in (
        ("length", [own.length]),
        ("max_documents", [own.max_documents]),
        ("chunk", [own.chunk]),
        ("windows", own.windows),
        ("reset", own.reset),
    ):
        if min(values, default=1) < 1:
            raise UserError(f"--{key} = {min(values)} must be 1 or more.")
    # PyTorch takes seconds to import: a mistake on the command line should not.
    from torchtitan.extensions.evaluation.held_out_text import long_documents
    from torchtitan.extensions.evaluation.loading import load
    from torchtitan.extensions.evaluation.runner import check_edges, default_edges, position_losses
    from torchtitan.models.rope_config import build_rope
    from torchtitan.tools.device import device_type

    edges = check_edges(own.edges, own.length) if own.edges else default_edges(own.length)
    device = own.device or device_type()
    loaded = load(own.model, own.dtype, device, own.tokenizer, own.attention_backend)
    args = loaded.model.args
    used = build_rope(rope, args.rope, args.head_dim, args.n_kv_heads, own.length)
    documents = long_documents(
        own.text, loaded.tokenizer, own.length + 1, own.max_documents, own.text_field, own.add_bos
    )
    check_vocabulary(documents, args.vocab_size, loaded.tokenizer.folder)
    loaded.model.output.tile_bytes = 4 * own.chunk * args.vocab_size
    curves = []
    cuts: list[dict[str, Any]] = [{"window": None, "reset_every": None}]
    cuts += [{"window": window, "reset_every": None} for window in own.windows]
    cuts += [{"window": None, "reset_every": every} for every in own.reset]
    with model_progress(loaded.model, len(documents) * len(cuts)) as describe:
        for cut in cuts:
            describe(curve_name(cut))
            start = time.perf_counter()
            losses = position_losses(loaded.model, loaded.ranks, documents, edges, rope=used, **cut)
            del losses["edges"]
            curves.append({**cut, **losses, "seconds": round(time.perf_counter() - start, 1)})
    return {
        "label": own.label or summary(rope),
        "model": str(own.model),
        "text": [str(path) for path in own.text],
        "documents": len(documents),
        "length": own.length,
        "trained_length": args.rope.max_position_embeddings,
        "rope": asdict(used),
        "dtype": own.dtype,
        "device": device,
        "edges": list(edges),
        "curves": curves,
    }


def curve_name(curve: dict[str, Any]) -> str:
    """How much context the curve's tokens have."""
    if curve["window"] is not None:
        return f"window {curve['window']}"
    return "full" if curve["reset_every"] is None else f"reset {curve['reset_every']}"


def check_vocabulary(documents: list[Any], vocab_size: int, folder: str) -> None:
    """UserError if the tokenizer gives ids that the model does not have, which would be an index error later."""
    largest = max(int(tokens.max()) for tokens in documents)
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer in {folder} gives the id {largest}, but the model has {vocab_size} ids: they do not belong "
            "together. Name the right folder with --tokenizer."
        )


@contextmanager
def model_progress(model: Any, passes: int) -> Iterator[Callable[[str], None]]:
    """A progress line that counts layers; yields what sets its text. If this is no terminal, each text is a line."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=passes * len(model.layers))
        hooks = [layer.register_forward_hook(lambda *_: bar.advance(task)) for layer in model.layers.values()]

        def describe(text: str) -> None:
            bar.update(task, description=text)
            if not console.is_terminal:
                print(text, file=sys.stderr, flush=True)

        try:
            yield describe
        finally:
            for hook in hooks:
                hook.remove()


def summary(rope: Rope) -> str:
    """The keys of [rope] that are not the default: `type yarn, factor 4`."""
    changed = [(k, v) for k, v in vars(rope).items() if v != getattr(Rope(), k)]
    short = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in changed if not isinstance(v, tuple)]
    return ", ".join(short) or "as trained"


def table(result: dict[str, Any]) -> str:
    """Positions, counts, and nats and perplexity of each curve, as plain text."""
    names = [curve_name(curve) for curve in result["curves"]]
    lines = [
        f"{result['label']}: {result['documents']} document{'s' * (result['documents'] != 1)}, {result['dtype']}",
        "positions".rjust(17) + "tokens".rjust(9) + "".join(f"{n + ' nats':>18}{'ppl':>10}" for n in names),
    ]
    for i, (begin, end) in enumerate(pairwise(result["edges"])):
        losses = [curve["nll"][i] for curve in result["curves"]]
        lines.append(f"{begin:>8} -{end:>7}{result['curves'][0]['count'][i]:>9}{cells(losses)}")
    losses = [curve["mean_nll"] for curve in result["curves"]]
    lines.append("all".rjust(17) + f"{sum(result['curves'][0]['count']):>9}{cells(losses)}")
    return "\n".join(lines)


def cells(losses: list[float | None]) -> str:
    """Nats and perplexities in columns; "-" if nothing was counted."""
    return "".join(f"{'-':>18}{'-':>10}" if x is None else f"{x:>18.4f}{math.exp(min(x, 700)):>10.2f}" for x in losses)


def read_result(path: Path) -> dict[str, Any]:
    """What --out wrote. Files that are older than --reset say "window" for it; they have no "reset_every"."""
    try:
        result = json.loads(path.read_text())
        missing_keys = {"label", "edges", "curves", "length", "trained_length"} - set(result)
    except (OSError, ValueError) as error:
        raise UserError(f"--draw {path} cannot be read: {error}.") from None
    if missing_keys:
        raise UserError(f"--draw {path} is not a result of this script: it lacks {', '.join(sorted(missing_keys))}.")
    for curve in result["curves"]:
        if "reset_every" not in curve:
            curve["window"], curve["reset_every"] = None, curve["window"]
    return result
