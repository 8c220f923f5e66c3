"""Loss by position of a model on one device, under any RoPE: what scripts/loss_by_position.py and the studies share.

docs/loss_by_position.md describes a result, which is a dictionary. PyTorch, which takes seconds, is imported only to
measure: a mistake on the command line should be reported at once.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchtitan.config import load_config
from torchtitan.config.checks import check_ranges
from torchtitan.config.schema import Rope
from torchtitan.extensions.evaluation.command_line import begins_with_bos, check_at_least, check_given, text_table
from torchtitan.models.rope_checks import check_rope
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for the model, the text and the device."""
    parser.add_argument("--model", type=Path, help="Hugging Face folder, or a checkpoint's step-N folder")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (the model's; that of the run)")
    parser.add_argument("--text", type=Path, nargs="+", help=".txt, .jsonl, .parquet, folders, tokenized folders")
    parser.add_argument("--text_field", default="text", help="field of a .jsonl or .parquet record (text)")
    parser.add_argument(
        "--add_bos",
        action=argparse.BooleanOptionalAction,
        help="begin every document with the tokenizer's BOS token (as in training)",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is a GPU)")
    parser.add_argument("--attention_backend", default="auto", choices=("auto", "flex", "varlen", "sdpa"))


def add_curve_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that measure() reads."""
    add_model_arguments(parser)
    parser.add_argument("--length", type=int, help="tokens read of each document; shorter documents are left out")
    parser.add_argument("--windows", type=int, nargs="+", default=[], help="also in windows of W tokens")
    parser.add_argument("--reset", type=int, nargs="+", default=[], help="also in pieces of W tokens, each alone")
    parser.add_argument("--edges", type=int, nargs="+", help="where ranges of positions end (512 and its doubles)")
    parser.add_argument("--max_documents", type=int, default=16, help="how many documents are read at most (16)")
    parser.add_argument("--chunk", type=int, default=1024, help="for how many positions logits exist at once (1024)")
    parser.add_argument("--label", help="name of the result in pictures")


def rope_table(flags: list[str]) -> Rope:
    """The [rope] table of the flags --rope.KEY VALUE, checked as a stage's; UserError for any other flag."""
    for flag in flags:
        if flag.startswith("--") and not flag.startswith("--rope."):
            raise UserError(
                f"{flag.split('=')[0]} is not known; see --help. Of a stage's keys, only --rope.KEY is read."
            )
    config = load_config(flags)
    if flags and not flags[0].startswith("--"):
        raise UserError(f"{flags[0]} has no --flag before it; every value follows its --flag.")
    check_ranges(config)
    check_rope(config)
    return config.rope


def measure(options: argparse.Namespace, rope: Rope) -> dict[str, Any]:
    """The result of one model under one RoPE: with full context, in each window and with each reset."""
    check_given(options, "model", "text", "length")
    check_at_least(options, length=1, max_documents=1, chunk=1, windows=1, reset=1)
    from torchtitan.extensions.evaluation.held_out_text import check_vocabulary, long_documents
    from torchtitan.extensions.evaluation.loading import load
    from torchtitan.extensions.evaluation.runner import check_edges, default_edges, position_losses
    from torchtitan.models.rope_config import build_rope
    from torchtitan.tools.device import device_type

    edges = check_edges(options.edges, options.length) if options.edges else default_edges(options.length)
    device = options.device or device_type()
    loaded = load(options.model, options.dtype, device, options.tokenizer, options.attention_backend)
    args = loaded.model.args
    used = build_rope(rope, args.rope, args.head_dim, args.n_kv_heads, options.length)
    bos = wants_bos(options, loaded.tokenizer)
    documents = long_documents(
        options.text, loaded.tokenizer, options.length + 1, options.max_documents, options.text_field, bos
    )
    check_vocabulary(max(int(tokens.max()) for tokens in documents), args.vocab_size, loaded.tokenizer)
    loaded.model.output.tile_bytes = 4 * options.chunk * args.vocab_size
    curves = []
    cuts: list[dict[str, Any]] = [{"window": None, "reset_every": None}]
    cuts += [{"window": window, "reset_every": None} for window in options.windows]
    cuts += [{"window": None, "reset_every": every} for every in options.reset]
    with model_progress(loaded.model, len(documents) * len(cuts)) as describe:
        for cut in cuts:
            describe(curve_name(cut))
            start = time.perf_counter()
            losses = position_losses(loaded.model, loaded.ranks, documents, edges, rope=used, **cut)
            del losses["edges"]
            curves.append({**cut, **losses, "seconds": round(time.perf_counter() - start, 1)})
    return {
        "label": options.label or rope_label(rope),
        "model": str(options.model),
        "text": [str(path) for path in options.text],
        "documents": len(documents),
        "length": options.length,
        "trained_length": args.rope.max_position_embeddings,
        "rope": asdict(used),
        "add_bos": bos,
        "dtype": options.dtype,
        "device": device,
        "edges": list(edges),
        "curves": curves,
    }


def wants_bos(options: argparse.Namespace, tokenizer: Any) -> bool:
    """--add_bos, or if it is not given whether the model was trained so. tokenizer: the model's Tokenizer."""
    if options.add_bos is not None:
        return options.add_bos
    return tokenizer.bos_id is not None and begins_with_bos(options.model, options.tokenizer)


def curve_name(curve: dict[str, Any]) -> str:
    """How much context a curve's tokens have: "full", "window 64" or "reset 64"."""
    if curve["window"] is not None:
        return f"window {curve['window']}"
    return "full" if curve["reset_every"] is None else f"reset {curve['reset_every']}"


@contextmanager
def model_progress(model: Any, passes: int) -> Iterator[Callable[[str], None]]:
    """A progress bar that counts layers; yields a function that sets its text. Without a terminal each text is printed
    as a line."""
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


def rope_label(rope: Rope) -> str:
    """The keys of [rope] that differ from the default: `type yarn, factor 4`."""
    changed = [(k, v) for k, v in vars(rope).items() if v != getattr(Rope(), k)]
    short = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in changed if not isinstance(v, tuple)]
    return ", ".join(short) or "as trained"


def curves_table(result: dict[str, Any]) -> str:
    """Per range of positions and over all: the count, then nats and perplexity of each curve, as plain text."""
    curves, counts = result["curves"], result["curves"][0]["count"]
    rows = [["positions", "tokens", *(head for curve in curves for head in (f"{curve_name(curve)} nats", "ppl"))]]
    for i, (begin, end) in enumerate(pairwise(result["edges"])):
        rows.append([f"{begin} - {end}", str(counts[i]), *_cells([curve["nll"][i] for curve in curves])])
    rows.append(["all", str(sum(counts)), *_cells([curve["mean_nll"] for curve in curves])])
    documents = f"{result['documents']} document{'s' * (result['documents'] != 1)}"
    return "\n".join([f"{result['label']}: {documents}, {result['dtype']}", *text_table(rows)])


def _cells(losses: list[float | None]) -> list[str]:
    """Nats and perplexity of each loss; "-" if nothing was counted."""
    shown = [("-", "-") if x is None else (f"{x:.4f}", f"{math.exp(min(x, 700)):.2f}") for x in losses]
    return [cell for pair in shown for cell in pair]


def read_result(path: Path) -> dict[str, Any]:
    """A result that --out wrote. In files older than --reset, "window" means a reset; they lack "reset_every"."""
    try:
        result = read_json(path)
    except OSError as error:
        raise UserError(f"--draw {path} cannot be read: {error.strerror}.") from None
    if missing_keys := {"label", "edges", "curves", "length", "trained_length"} - result.keys():
        raise UserError(f"--draw {path} is not a result of this script: it lacks {', '.join(sorted(missing_keys))}.")
    for curve in result["curves"]:
        if "reset_every" not in curve:
            curve["window"], curve["reset_every"] = None, curve["window"]
    return result
