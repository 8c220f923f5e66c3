"""What the keys of [data] and of its sources decide, as the schema says, against the batches that a plan gives."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from torchtitan.components.changes import changed_inputs
from torchtitan.config.data_schema import Data, Point, Source
from torchtitan.config.keys import keys_of
from torchtitan.datasets.batch import PackedBatch
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.loader import micro_batch
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.same_data import shares

ANOTHER_DATA: dict[str, tuple[dict[str, Any], Any]] = {
    # key -> (keys under which it is read, another value)
    "folder": ({}, "/elsewhere"),
    "add_bos": ({}, False),
    "add_eos": ({}, False),
    "strategy": ({"long_share": 0.99}, "global_upsampling"),
    "long_threshold": ({"strategy": "global_upsampling", "long_threshold": 60}, 90),
    "long_share": ({"strategy": "global_upsampling", "long_threshold": 60}, 0.95),
    "upsampled_sources": ({"strategy": "domain_upsampling", "upsampled_sources": ("long",)}, ("short",)),
    "upsampled_weight": ({"strategy": "domain_upsampling", "upsampled_sources": ("long",)}, 5.0),
    "drop_duplicates": ({}, True),
    "decontaminate": ({}, ("evaluation",)),
    "decontaminate_tokens": ({"decontaminate": ("evaluation",)}, 64),
    "packing": ({}, "concat"),
    "cross_document_attention": ({}, True),
    "anchor_attention": ({}, True),
    "positions": ({}, "continue"),
    "target_seq_len": ({"positions": "random", "target_seq_len": 100}, 200),
    "changed_at_step": ({}, 1),
    "cache_folder": ({}, "/elsewhere"),
    "num_workers": ({}, 7),
}
BINS: dict[str, Any] = {"length_bins": (60,), "length_shares": (0.2, 0.8)}
ANOTHER_SOURCE: dict[str, tuple[dict[str, Any], Any]] = {
    "path": ({}, "elsewhere"),
    "weight": ({}, 3.0),
    "format": ({}, "text"),
    "document_end": ({}, 3),
    "document_start": ({}, 3),
    "ids_field": ({}, "tokens"),
    "mask_field": ({}, "trained"),
    "labels_field": ({}, "targets"),
    "ignore_fields": ({}, ("labels",)),
    "text_field": ({}, "body"),
    "where": ({}, "score > 1"),
    "group_by": ({}, "repo"),
    "part_order": ({"group_by": "repo"}, "name"),
    "part_header": ({"group_by": "repo"}, "# {path}"),
    "messages_format": ({"messages_field": "messages"}, "sharegpt"),
    "messages_field": ({}, "messages"),
    "on_bad_record": ({}, "skip"),
    "max_bad_share": ({"on_bad_record": "skip"}, 0.5),
    "hub_subset": ({}, "part"),
    "hub_split": ({}, "validation"),
    "hub_revision": ({}, "v2"),
    "max_documents": ({}, 5),
    "min_length": ({}, 60),
    "max_length": ({}, 60),
    "chunk_length": ({}, 7),
    "long_document": ({}, "truncate"),
    "upsample": ({}, 9.0),
    "upsample_to": ({}, 0.99),
    "long_threshold": ({"upsample": 3.0}, 100),
    "length_bins": (BINS, (100,)),
    "length_shares": (BINS, (0.5, 0.5)),
    "schedule": ({}, (Point(0, 0.1), Point(5, 3.0))),
    "separator": ({}, "###"),
    "kind": ({}, "synthetic"),
    "tasks": ({}, ("needle",)),
    "task_shares": ({}, (1.0,)),
    "make_tokens": ({}, 1000),
    "lengths": ({}, (64, 128)),
    "seed": ({}, 1),
    "train_on": ({}, "answer"),
    "fim_rate": ({}, 1.0),
    "fim_spm_rate": ({}, 1.0),
    "fim_markers": ({}, ("<P>", "<S>", "<M>")),
    "max_epochs": ({}, 99.0),
}
ANOTHER_POINT: dict[str, Any] = {"step": 4, "weight": 0.2, "length_shares": (0.5, 0.5)}
TOKENS = {"": (), "###": (7, 7)}
"""What a separator is tokenized to."""


def make_plan(data: Data, **options: Any) -> Plan:
    """Of two corpora, whatever the keys say that decide what the documents are."""
    random = np.random.default_rng(0)
    corpora = []
    for name, lengths in (("long", random.integers(20, 200, 30)), ("short", random.integers(1, 12, 90))):
        ends = np.concatenate([[0], np.cumsum(lengths)])
        corpora.append(Corpus(name, [(ends, np.arange(1, 1 + ends[-1], dtype=np.int32))], name, None))
        corpora[-1].hashes = np.arange(len(lengths), dtype=np.uint64) // 2  # as if there were copies
    arguments: dict[str, Any] = {"seq_len": 48, "rows_per_step": 8, "steps": 6, "seed": 5} | options
    arguments["first_step"] = data.changed_at_step  # as components/setup.py calls it
    return Plan(data, corpora, separators=[TOKENS[source.separator] for source in data.sources], **arguments)


def batches(plan: Plan) -> list[list[Any]]:
    """All tensors of all batches."""
    made = [micro_batch(plan, step, list(range(plan.rows_per_step))) for step in range(plan.first_step, plan.steps)]
    values = [[getattr(batch, f.name) for f in fields(PackedBatch)] for batch in made]
    return [[v if v is None else v.tolist() for v in row] for row in values]


def stage(options: dict[str, Any], of_source: dict[str, Any]) -> Data:
    first = Source(**{"name": "long", "path": "l", "weight": 0.6} | of_source)
    return Data(**{"sources": (first, Source("short", "s", 0.4)), "long_threshold": 60} | options)


def check_decision(decides: str | None, was: Data, now: Data) -> None:
    """Keys that decide rows give other batches and other inputs; all others the same of both, from the same corpora."""
    plan, other = make_plan(was), make_plan(now)
    assert (batches(plan) != batches(other)) == (decides == "rows")
    assert (plan.fingerprint != other.fingerprint) == (decides == "rows")


@pytest.mark.parametrize("key", ANOTHER_DATA)
def test_what_a_key_of_data_decides(key: str) -> None:
    options, value = ANOTHER_DATA[key]
    was = stage(options, {})
    check_decision(keys_of(Data)[key].decides, was, replace(was, **{key: value}))


@pytest.mark.parametrize("key", ANOTHER_SOURCE)
def test_what_a_key_of_a_source_decides(key: str) -> None:
    options, value = ANOTHER_SOURCE[key]
    check_decision(keys_of(Source)[key].decides, stage({}, options), stage({}, options | {key: value}))


def test_to_split_is_the_same_said_or_not() -> None:
    check_decision(None, stage({}, {}), stage({}, {"long_document": "split"}))


@pytest.mark.parametrize("key", ANOTHER_POINT)
def test_what_a_key_of_a_point_decides(key: str) -> None:
    first, second = Point(0, 1.0, (0.2, 0.8)), Point(5, 3.0, (0.8, 0.2))
    schedules = [(first, second), (first, replace(second, **{key: ANOTHER_POINT[key]}))]
    was, now = (stage({}, {"weight": 1.0, "length_bins": (60,), "schedule": points}) for points in schedules)
    check_decision(keys_of(Point)[key].decides, was, now)
    assert any(
        line.startswith("source long: ") for line in changed_inputs(make_plan(was).inputs, make_plan(now).inputs)
    )


@pytest.mark.parametrize("changes", [{"seed": 6}, {"seq_len": 64}, {"rows_per_step": 4}])
def test_what_else_decides_the_rows(changes: dict[str, int]) -> None:
    plan, other = make_plan(stage({}, {})), make_plan(stage({}, {}), **changes)
    assert batches(plan) != batches(other) and plan.fingerprint != other.fingerprint


def test_every_key_is_among_them() -> None:
    assert set(ANOTHER_DATA) | {"sources"} == set(keys_of(Data))
    assert set(ANOTHER_POINT) == set(keys_of(Point))
    assert set(ANOTHER_SOURCE) | {"name"} == set(keys_of(Source))  # a name is what the rows are reported by


STRATEGIES: tuple[dict[str, Any], ...] = (
    {},
    {"strategy": "global_upsampling", "long_share": 0.99},
    {"strategy": "per_source_upsampling", "long_share": 0.99},
    {"strategy": "domain_upsampling", "upsampled_sources": ("long",), "upsampled_weight": 0.7},
    {"strategy": "cut_4k"},
)


@pytest.mark.parametrize("options", STRATEGIES, ids=str)
def test_the_same_data_are_the_same_rows_whatever_the_weights_are_in(options: dict[str, Any]) -> None:
    """Weights in percent are the same data, unless a key stands beside them as it is (upsampled_weight)."""
    was = stage(options, {})
    times_10 = tuple(replace(source, weight=10 * source.weight) for source in was.sources)
    plan, other = make_plan(was), make_plan(replace(was, sources=times_10))
    same = batches(plan) == batches(other)
    assert same == (options.get("strategy") != "domain_upsampling")
    assert (plan.fingerprint == other.fingerprint) == same
    assert (changed_inputs(plan.inputs, other.inputs) == []) == same
    older = {key: value for key, value in plan.inputs.items() if key != "sum_of_weights"}
    assert changed_inputs(older, plan.inputs) == []
    if not same:
        raised = make_plan(replace(was, upsampled_weight=0.8))
        assert changed_inputs(older, raised.inputs) == ["data.upsampled_weight 0.7 -> 0.8"]


def test_weights_count_by_their_ratio() -> None:
    assert shares(stage({}, {"weight": 0.6})) == [0.6, 0.4]
    assert shares(stage({}, {"weight": 0.2})) == [round(1 / 3, 12), round(2 / 3, 12)]
