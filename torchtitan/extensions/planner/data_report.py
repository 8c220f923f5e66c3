"""What a stage will read, by its data plan: the numbers of plan.json, and the table that is logged at start."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from torchtitan.components.hooks import Hook
from torchtitan.config.checks import dp_degree
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.corpus import ASSISTANT, CONVERSATIONS_LEFT_OUT, CORPUS_FILE, ROLES, Corpus
from torchtitan.datasets.dealing import deal, imbalance, undealt
from torchtitan.datasets.eligible import long_threshold, piece_limit
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.read_so_far import ReadSoFar, read_until
from torchtitan.datasets.tokenizer import json_if_present
from torchtitan.extensions.planner.epochs_report import copies_kept, epoch_notes, epoch_numbers, in_words
from torchtitan.extensions.planner.overlap import OVERLAPS, chain_note, chain_numbers, from_step
from torchtitan.extensions.planner.schedule_report import WINDOW, schedule_notes, schedule_report, worst_window
from torchtitan.models.transformer import TransformerArgs
from torchtitan.models.work import training_flops, work_of
from torchtitan.tools.folders import write_text
from torchtitan.tools.logging import logger

UNIGRAM_SAMPLE = 4_000_000
"""About how many tokens the unigram model is counted on."""

TOLERANCE = 0.005
"""How far a source's share may be from what was asked for in WINDOW consecutive steps."""

STEPS_DEALT = 1000
"""How many steps, spread over the stage, the imbalance between ranks is averaged over."""


def make_report(
    plan: Plan,
    dp_degree: int,
    local_batch_size: int,
    flops_per_token: float,
    flops_per_pair: float,
    before: ReadSoFar | None = None,
) -> dict[str, Any]:
    """The report as JSON values. dp_degree: how many ranks read different rows. before: what the chain had read before.

    flops_per_token, flops_per_pair: of the model, forward and backward, linear layers and attention (models/work.py).
    """
    before = before or ReadSoFar()
    after = read_until(before, plan, plan.steps)
    rows = len(plan.table)
    tokens = int(plan.table.length.sum(dtype=np.int64))
    pairs_of_whole_rows = rows * (plan.seq_len * (plan.seq_len + 1) // 2)
    kept = copies_kept(plan)
    sources = [
        _source_report(plan, i, tokens) | {"copies_kept": kept[i]} | chain_numbers(plan, i, before, after)
        for i in range(len(plan.names))
    ]
    return {
        "fingerprint": plan.fingerprint,
        "inputs": plan.inputs,
        "long_threshold": plan.data.long_threshold,
        "first_step": plan.first_step,
        "steps": len(plan.planned),
        "rows": rows,
        "rows_without_labels": plan.rows_without_labels,
        "tokens_without_labels": plan.tokens_without_labels,
        "rows_with_a_document_twice": len(plan.table.twice),
        "tokens": tokens,
        "trained_tokens": sum(source["trained_tokens"] for source in sources),
        "padding_tokens": rows * plan.seq_len - tokens,
        "padding": 1 - tokens / (rows * plan.seq_len),
        "attention_work": float(plan.table.work.sum(dtype=np.float64)) / pairs_of_whole_rows,
        "imbalance": _busiest_over_mean(plan, dp_degree, local_batch_size, flops_per_token, flops_per_pair),
        "unigram_nats": unigram_nats(plan),
        **{key: sum(s[key] * s["tokens_read"] for s in sources) / tokens for key in OVERLAPS},
        "sources": sources,
        "schedule": schedule_report(plan),
    }


def _source_report(plan: Plan, source: int, all_tokens: int) -> dict[str, Any]:
    """A source's entry. Lengths are in tokens; shares are of the tokens of the whole stage, `all_tokens`."""
    corpus, options = plan.corpora[source], plan.data.sources[source]
    mine = plan.table.source == source
    document, length, start, epoch = (getattr(plan.table, c)[mine] for c in ("document", "length", "start", "epoch"))
    tokens = int(length.sum(dtype=np.int64))
    whole = corpus.lengths[document]  # of each part's document, without a separator
    partial = length < whole
    # an epoch reads each document once, so a document's parts are those of the same epoch
    ids = epoch[partial].astype(np.int64) * len(corpus) + document[partial]
    _, first, parts = np.unique(ids, return_index=True, return_counts=True)
    split = whole[partial][first][parts > 1]
    limit = min(plan.seq_len, piece_limit(options, plan.data, plan.seq_len) or plan.seq_len)
    cut_off = np.maximum(whole[start == 0] - limit, 0) if options.long_document == "truncate" else np.zeros(1)
    streams = [s for s in plan.streams if s.source == source]
    metadata = json_if_present(Path(corpus.folder) / CORPUS_FILE)
    threshold = long_threshold(options, plan.data)
    return {
        "name": plan.names[source],
        "folder": corpus.folder,
        "documents": len(corpus),
        "tokens": corpus.tokens,
        "longest_document": int(corpus.lengths.max()),
        "left_out": asdict(plan.left_out[source]),
        "synthetic": metadata.get("synthetic"),
        "conversations_left_out": corpus.left_out,
        "conversations_not_written": _not_written(metadata) if corpus.has_roles else {},
        "bad_records": metadata.get("bad_records", {}),
        "share_asked": sum(s.share for s in streams),
        "share": tokens / all_tokens,
        "tokens_read": tokens,
        **_roles_report(corpus, document, start, length),
        "parts_read": len(length),
        "documents_split": int((split > limit).sum()),
        "documents_split_that_fit": int((split <= limit).sum()),
        "truncated_tokens": int(cut_off.sum()),
        "long_threshold": threshold,
        "long_share": float(length[whole > threshold].sum(dtype=np.int64) / max(1, tokens)),
        "worst_window": worst_window(plan, mine, streams),
        **epoch_numbers(plan, source),
        "documents_by_length_from": _histogram(corpus.lengths),
        "parts_by_length_from": _histogram(length),
    }


def _not_written(metadata: dict[str, Any]) -> dict[str, int] | None:
    """How many conversations have a key of a message that the chat template does not write, by key; None if the corpus
    is of an older version, which did not look."""
    if metadata.get("messages_field") and not metadata.get("message_weights"):
        return None
    return metadata.get("not_written", {})


def _roles_report(corpus: Corpus, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> dict[str, Any]:
    """Tokens that the loss is on, and, if the source has roles, tokens read by role. The first token of a part is not a
    label.

    document, start, length: int32[P], of the parts that are read.
    """
    if not corpus.has_roles:
        return {"trained_tokens": int(length.sum(dtype=np.int64)) - len(length)}
    counts = np.zeros(len(ROLES), np.int64)
    trained = 0
    parts, times = np.unique(np.stack([document, start, length]), axis=1, return_counts=True)
    for (index, first, tokens), read in zip(parts.T.tolist(), times.tolist()):
        roles = corpus.roles(index)[first : first + tokens]
        counts += read * np.bincount(roles, minlength=len(ROLES))
        trained += read * int((roles[1:] == ASSISTANT).sum())
    return {"trained_tokens": trained, "tokens_by_role": dict(zip(ROLES, counts.tolist()))}


def _histogram(lengths: np.ndarray) -> dict[str, dict[str, int]]:
    """Documents and tokens in buckets of powers of two, named by their smallest length."""
    exponents = np.frexp(np.maximum(lengths, 1))[1] - 1
    counts = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=lengths)
    return {
        str(1 << e): {"documents": int(counts[e]), "tokens": int(tokens[e])} for e in range(len(counts)) if counts[e]
    }


def _busiest_over_mean(
    plan: Plan, dp_degree: int, local_batch_size: int, flops_per_token: float, flops_per_pair: float
) -> dict[str, Any]:
    """Work of the busiest rank over the ranks' mean, averaged over steps: before rows are dealt to ranks, and after."""
    planned = plan.planned
    picked = np.unique(np.linspace(planned[0], planned[-1], min(len(planned), STEPS_DEALT)).astype(np.int64))
    sums = np.zeros((2, 2, 2))  # attention's work or all, before or after, in the step or by micro-batch
    for step in picked:
        pairs = plan.work(int(step))
        orders = undealt(len(pairs), dp_degree, local_batch_size), deal(pairs, dp_degree, local_batch_size)
        for i, work in enumerate((pairs, pairs * flops_per_pair + flops_per_token * plan.seq_len)):
            for j, order in enumerate(orders):
                sums[i, j] += imbalance(work, order)
    names = [f"{work}_{when}" for work, when in product(("attention", "all"), ("before", "after"))]
    step_means, micro_batch_means = (sums / len(picked)).reshape(4, 2).T.tolist()
    return {
        "ranks": dp_degree,
        "rows_a_rank": plan.rows_per_step // dp_degree,
        "local_batch_size": local_batch_size,
        "step": dict(zip(names, step_means)),
        "micro_batch": dict(zip(names, micro_batch_means)),
    }


def unigram_nats(plan: Plan) -> float:
    """Cross-entropy, in nats per token, that a model that ignores context reaches on the planned data.

    That is the entropy of the frequencies of the tokens that the loss is on, counted in rows spread over the plan.
    """
    rows, first = len(plan.table), plan.first_step * plan.rows_per_step
    picked = first + np.linspace(0, rows - 1, min(rows, math.ceil(UNIGRAM_SAMPLE / plan.seq_len))).astype(np.int64)
    picked_rows = (plan.row(*divmod(int(index), plan.rows_per_step)) for index in picked)
    tokens = [plan.tokens(row)[plan.trained(row)] for row in picked_rows]
    counts = np.unique(np.concatenate(tokens), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def report_of(
    plan: Plan, config: JobConfig, world_size: int, args: TransformerArgs, before: ReadSoFar | None = None
) -> dict[str, Any]:
    """make_report for a stage's ranks and its model's FLOPs."""
    work = work_of(args)
    return make_report(
        plan,
        dp_degree(config, world_size),
        config.training.local_batch_size,
        flops_per_token=training_flops(work.parameters, 1, work.width, 0),
        flops_per_pair=training_flops(work.parameters, 0, work.width, 1),
        before=before,
    )


class DataReport(Hook):
    """Writes plan.json into the dump folder, and logs its tables."""

    def started(self, trainer: Any) -> None:
        """On rank 0 only."""
        if trainer.rank == 0:
            inputs, ranks = trainer.inputs, dist.get_world_size()
            report = report_of(inputs.plan, trainer.config, ranks, inputs.args, inputs.data_start.read)
            write_text(trainer.dump_folder / "plan.json", json.dumps(report, indent=1) + "\n")
            for line in format_report(report).splitlines():
                logger.info(line)


BAD_SHOWN = 5
"""Examples of bad records in the log; plan.json has more."""

COLUMNS = (
    ("documents", "documents", 11, ","),
    ("tokens", "tokens", 15, ","),
    ("longest", "longest_document", 9, ","),
    ("used", "documents_used", 11, ","),
    ("their tokens", "tokens_used", 15, ","),
    ("asked", "share_asked", 7, ".2%"),
    ("share", "share", 7, ".2%"),
    ("epochs", "epochs_used", 8, ""),
    ("long", "long_share", 6, ".1%"),
    ("split", "documents_split", 8, ","),
    ("cut", "documents_split_that_fit", 7, ","),
)
"""The table of sources: title, key of a source's entry, width, format."""

LEFT_OUT = {
    "below_min_length": "shorter than min_length",
    "above_max_length": "longer than max_length",
    "dropped": 'dropped by long_document = "drop"',
    "beyond_max_documents": "beyond max_documents",
    "truncated": 'cut short by long_document = "truncate"',
    "evaluation": "with text of the evaluation, which data.decontaminate names",
    "copies": "that are copies of others, here or in sources above it",
}
"""Why documents are left out, by the key of `left_out`."""


def format_report(report: dict[str, Any]) -> str:
    """The report as a short table for the log, with a line for everything that a user should not miss."""
    inputs, sources = report["inputs"], report["sources"]
    width = max(12, *(len(s["name"]) for s in sources))
    lines = [
        f"data plan {report['fingerprint']}: {report['steps']} steps of {inputs['rows_per_step']} rows of "
        f"{inputs['seq_len']} tokens{from_step(report)}; {report['tokens']:,} tokens, {report['padding']:.3%} padding; "
        f"unigram cross-entropy {report['unigram_nats']:.3f} nats",
        f"strategy {inputs['strategy']}, packing {inputs['packing']}, positions {inputs['positions']}, "
        f"cross-document attention {'on' if inputs['cross_document_attention'] else 'off'}"
        f"{', rows with an anchor' if inputs['anchor_attention'] else ''}: attention is "
        f"{report['attention_work']:.1%} of the work of rows without document boundaries",
        " ".join(["source".ljust(width), *(title.rjust(w) for title, _, w, _ in COLUMNS)]),
    ]
    for s in sources:
        cells = s | {"epochs_used": in_words(s["epochs_used"])}
        lines.append(" ".join([s["name"].ljust(width), *(f"{cells[key]:>{w}{kind}}" for _, key, w, kind in COLUMNS)]))
    thresholds = " or ".join(f"{tokens:,}" for tokens in sorted({s["long_threshold"] for s in sources}))
    lines.append(
        "(used: documents that the stage may read, after filters, copies and decontamination, and their tokens with "
        "separators; epochs: how often these are read; "
        f"long: share of tokens in documents over {thresholds}; split: documents longer than a piece may be; cut: "
        "other documents that packing cut)"
    )
    notes = (note for s in sources for note in _source_notes(report, s))
    return "\n".join([*lines, *_notes(report), *schedule_notes(report), *notes])


def _notes(report: dict[str, Any]) -> Iterator[str]:
    """What to know of the whole plan."""
    inputs, balance = report["inputs"], report["imbalance"]
    step, micro = balance["step"], balance["micro_batch"]
    if inputs["anchor_attention"] and inputs["positions"] != "continue":
        yield (
            f'warning: data.anchor_attention with positions = "{inputs["positions"]}": in the paper, positions run on '
            'through a row ("continue")'
        )
    if report["rows_without_labels"]:
        yield (
            f"left out: {report['rows_without_labels']:,} rows in which nothing is trained on (prompts that fill a "
            f"row, documents of one token): {report['tokens_without_labels']:,} tokens, which count as read"
        )
    if report["rows_with_a_document_twice"]:
        yield (
            f"warning: {report['rows_with_a_document_twice']:,} rows hold a document twice: a source's share of a row "
            "is more than all its documents"
        )
    if balance["ranks"] > 1:
        yield (
            f"work of the busiest of {balance['ranks']} ranks over the mean, {balance['rows_a_rank']} rows each: "
            f"{step['all_after']:.3f} dealt, {step['all_before']:.3f} as they come; attention alone "
            f"{step['attention_after']:.3f}, {step['attention_before']:.3f}; if ranks meet in every micro-batch "
            f"{micro['all_after']:.3f}, {micro['all_before']:.3f}"
        )


def _of_conversations(name: str, key: str, count: int) -> str:
    """A line for one key of `conversations_not_written`."""
    if key == "to be trained, not the assistant's":
        return (
            f"warning: {count:,} conversations of {name} ask by weight, train or loss to train messages that are not "
            "the assistant's: they are not trained"
        )
    if key.endswith(" beside the messages"):
        field = key.removesuffix(" beside the messages")
        way = ": make it the first message, with the role system, if it should be" if "system" in field else ""
        return f"warning: the field {field!r} beside the messages of {count:,} conversations of {name} is not read{way}"
    return f"warning: the chat template does not write {key!r} of the messages of {count:,} conversations of {name}"


def _source_notes(report: dict[str, Any], s: dict[str, Any]) -> Iterator[str]:
    """What of one source is repeated, uneven, masked or left out."""
    name = s["name"]
    if s["synthetic"]:
        yield (
            f"{name} is synthetic ({', '.join(s['synthetic']['tasks'])}): {s['share']:.2%} of the tokens and "
            f"{s['trained_tokens'] / max(1, report['trained_tokens']):.2%} of the labels; needles, RULER and HELMET's "
            "recall have its form, so judge the model by other tasks too"
        )
    yield from chain_note(s)
    yield from epoch_notes(s)
    if s["worst_window"] > TOLERANCE:
        yield (
            f"warning: source {name} is up to {s['worst_window']:.2%} of the tokens off its share in "
            f"{min(WINDOW, report['steps'])} consecutive steps: its pieces are large for so few rows"
        )
    if report["inputs"]["strategy"] == "per_source_upsampling" and s["tokens_read"] and s["long_share"] == 0:
        yield f"warning: source {name} has no document of more than {s['long_threshold']:,} tokens to raise"
    if "tokens_by_role" in s:
        roles = ", ".join(f"{role} {n:,}" for role, n in s["tokens_by_role"].items() if n)
        share = s["trained_tokens"] / max(1, s["tokens_read"])
        yield f"{name}: the loss is on {s['trained_tokens']:,} tokens ({share:.1%}); by role: {roles}"
    for reason, count in s["conversations_left_out"].items():
        what = "records" if reason == "where" else "conversations"
        if count:
            yield f"left out of {name}: {count:,} {what} {CONVERSATIONS_LEFT_OUT[reason]}"
    if s["bad_records"]:
        yield f"warning: left out of {name}: {s['bad_records']['in_words']}"
        yield from (f"    {place}: {why}" for place, _, why in s["bad_records"]["examples"][:BAD_SHOWN])
    if s["conversations_not_written"] is None:
        yield (
            f"warning: {name}: {s['folder']} was made by an older version, which trained messages with weight 0 or "
            "train = false, did not check that the chat template writes all keys of a conversation and ends its "
            "responses, and could write calls of tools wrong. Delete that folder to have it made again."
        )
    for key, count in (s["conversations_not_written"] or {}).items():
        yield _of_conversations(name, key, count)
    documents, tokens = s["copies_kept"]
    if documents:
        what = f"{documents:,} documents ({tokens:,} tokens) that are copies of others, here or in sources above it"
        yield f"{name} has {what}; data.drop_duplicates = true leaves them out"
    for key, reason in LEFT_OUT.items():
        documents, tokens = s["left_out"][key]
        if documents:
            yield (
                f"left out of {name}: {documents:,} documents {reason}, {tokens:,} tokens "
                f"({tokens / max(1, s['tokens']):.1%})"
            )
