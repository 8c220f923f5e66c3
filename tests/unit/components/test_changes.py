"""Whether a stage is another one: every key of the schema, by what it says that it decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import torchtitan.components.changes as changes_module
from tests.unit.config.test_manager import other_value
from torchtitan.components.changes import BY_CONTENT, changed_keys, changed_since, differences
from torchtitan.config import JobConfig, as_tables
from torchtitan.config.data_schema import Data, Point, Source
from torchtitan.config.keys import keys_of
from torchtitan.config.manager import from_tables
from torchtitan.config.toml_file import known_keys

SOURCES = (Source("books", "books.jsonl", 0.25), Source("code", "code.jsonl", 0.75))
IDENTITY = {"documents", "rows", "model"}
UNDER: dict[str, dict[str, Any]] = {  # the keys under which a key is read at all
    "data.long_threshold": {"data.strategy": "global_upsampling"},
    "data.long_share": {"data.strategy": "per_source_upsampling"},
    "data.upsampled_sources": {"data.strategy": "domain_upsampling"},
    "data.upsampled_weight": {"data.strategy": "domain_upsampling"},
    "training.global_batch_tokens": {"training.global_batch_size": None, "training.seq_len": 1},
}


def make(**changes: Any) -> JobConfig:
    """A stage of two sources and 6 rows a step with `table.key: value` changed."""
    config = JobConfig(data=Data(sources=SOURCES))
    for name, value in {"training.global_batch_size": 6, **changes}.items():
        table, key = name.split(".")
        config = dataclasses.replace(config, **{table: dataclasses.replace(getattr(config, table), **{key: value})})
    return config


def moved(sources: tuple[Source, ...], prefix: str) -> tuple[Source, ...]:
    return tuple(dataclasses.replace(source, path=prefix + source.path) for source in sources)


def manifest(config: JobConfig, world_size: int = 2) -> dict[str, Any]:
    return {"config": as_tables(config), "world_size": world_size, "architecture": {"rope": {"theta": 1e4}}}


def changed(name: str) -> tuple[JobConfig, JobConfig]:
    """Two stages that differ in one key."""
    table, key = name.split(".")
    was = make(**UNDER.get(name, {}))
    value = getattr(getattr(was, table), key)
    other = (SOURCES[0],) if name == "data.sources" else other_value(known_keys()[name].hint, value)
    now = make(**UNDER.get(name, {}) | {name: other})
    assert was != now or value == other  # a key that can have one value only
    return was, now


KEYS = [name for name in known_keys() if name != "job.config_file"]


def test_every_key_says_what_it_decides_or_its_table_does() -> None:
    assert [name for name, key in known_keys().items() if key.decides is None] == []
    assert [key for key, of in keys_of(Source).items() if of.decides is None] == []


@pytest.mark.parametrize("name", KEYS)
def test_an_ended_stage_is_another_if_documents_rows_or_model_are(name: str) -> None:
    was, now = changed(name)
    decides = known_keys()[name].decides
    if name == "training.local_batch_size":  # the batch is given
        decides = "speed"
    if name == "data.folder":  # a part of the sources' paths
        decides = "documents"
    assert changed_since(manifest(was), was) == []
    assert bool(changed_since(manifest(was), now)) == (decides in IDENTITY), changed_since(manifest(was), now)


@pytest.mark.parametrize("key", keys_of(Source))
def test_so_is_one_of_another_source(key: str) -> None:
    value = other_value(keys_of(Source)[key].hint, getattr(SOURCES[0], key))
    if key == "long_document":  # if unset, the documents of a text are split
        value = "drop"
    other = dataclasses.replace(SOURCES[0], **{key: value})
    found = changed_since(manifest(make()), make(**{"data.sources": (other, SOURCES[1])}))
    assert bool(found) == (keys_of(Source)[key].decides in IDENTITY)
    assert all(line.startswith("data.") for line in found)  # upsampling has data.long_threshold read


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"training.global_batch_size": 12, "training.local_batch_size": 2}, False),
        ({"training.global_batch_size": None, "training.global_batch_tokens": 6 * 2048}, True),
        ({"training.global_batch_size": None, "training.local_batch_size": 3}, True),  # 2 ranks
        ({"training.global_batch_size": None, "training.local_batch_size": 2}, False),
        ({"parallelism.tensor_parallel_degree": 2}, True),
        ({"training.global_batch_size": None, "parallelism.data_parallel_replicate_degree": 3}, False),
        ({"parallelism.context_parallel_degree": 64}, True),  # it could not run on 2 processes
        ({"data.sources": tuple(dataclasses.replace(s, weight=4 * s.weight) for s in SOURCES)}, True),
        ({"data.sources": SOURCES[::-1]}, False),
        ({"data.long_threshold": 7, "data.long_share": 0.1}, True),  # nothing reads them
        ({"model.hf_assets_path": "assets/../assets/tokenizer"}, True),
        ({"data.folder": "./elsewhere"}, False),
        ({"data.folder": "a/.."}, True),
        ({"data.folder": "corpora", "data.sources": moved(SOURCES, "../")}, True),
        ({"data.folder": "a", "data.sources": moved(SOURCES, str(Path.cwd()) + "/")}, True),
        ({"data.sources": moved(SOURCES, "hub:")}, False),
        ({"data.sources": moved(SOURCES, "hub:./")}, False),
    ],
)
def test_it_is_the_meaning_that_counts(changes: dict[str, Any], same: bool) -> None:
    assert (changed_since(manifest(make()), make(**changes)) == []) == same


@pytest.mark.parametrize("name", [name for name in KEYS if not name.startswith(("data.", "rope."))])
def test_a_resumed_stage_compares_what_makes_it_another_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the key itself, unless what it leads to is compared: see test_bad_input and test_plan for these."""
    was, now = changed(name)
    assert changed_keys(manifest(was), was) == [] == changed_keys({}, now)
    assert changed_keys(manifest(was), now) == [] or name not in BY_CONTENT
    monkeypatch.setattr(changes_module, "BY_CONTENT", ())  # as if each were a new key
    found = changed_keys(manifest(was), now)
    assert bool(found) == (known_keys()[name].decides in IDENTITY)
    assert all(line.startswith(f"{name} ") for line in found)


def test_a_manifest_of_an_older_version() -> None:
    """Keys that it lacks had their defaults, keys that have gone decide nothing now; some had no configuration."""
    tables = as_tables(make())
    del tables["rope"], tables["training"]["seed"]
    tables["training"]["gone"] = 3
    tables["gone"] = {"key": 1}
    assert from_tables(tables) == make()
    assert changed_since({"config": tables}, make()) == []
    assert changed_since({"config": tables}, make(**{"training.seed": 1})) == ["training.seed 0 -> 1"]
    assert changed_since({}, make(**{"training.seed": 1})) == []


PRINTED = [n for n in KEYS if not n.startswith("rope.") and n not in ("data.sources", "data.folder")]


@pytest.mark.parametrize("name", PRINTED)
def test_the_printed_difference_has_what_matters_to_training(name: str) -> None:
    was, now = changed(name)
    lines = differences(manifest(was), now, {"rope": {"theta": 1e4}})
    printed = known_keys()[name].decides not in ("nothing", "start")
    assert bool(lines) == (printed and was != now)
    assert all(line.startswith(f"{name} ") for line in lines)


def test_numbers_that_differ_are_shown_so_that_they_do() -> None:
    architecture = {"rope": {"theta": 22081.790273}}
    [line] = differences(manifest(make()) | {"architecture": architecture}, make(), {"rope": {"theta": 22081.8}})
    assert line == "rope.theta 22081.790273 -> 22081.8"


def test_the_printed_difference_of_a_mixture() -> None:
    books, code = SOURCES
    now = (dataclasses.replace(books, weight=0.5, path="b", min_length=5), Source("web", "w", 0.5))
    lines = differences(manifest(make()), make(**{"data.sources": now}), {"rope": {"theta": 2e4}})
    assert lines == [
        "rope.theta 10000 -> 20000",
        "data source books: 25.0%, path books.jsonl -> 50.0%, path b, min_length 5",
        f"data source code: 75.0%, path {code.path} -> none",
        "data source web: none -> 50.0%, path w",
    ]


def test_the_printed_difference_of_a_schedule_has_the_shares_at_its_points() -> None:
    books, code = SOURCES
    points = (Point(0, 1.0), Point(100, 3.0))
    now = (dataclasses.replace(books, weight=1.0, schedule=points), dataclasses.replace(code, weight=1.0))
    lines = differences(manifest(make()), make(**{"data.sources": now}), {"rope": {"theta": 1e4}})
    assert lines == [
        "data source books: 25.0% -> 50.0% at step 0, 75.0% at step 100",
        "data source code: 75.0% -> 50.0% at step 0, 25.0% at step 100",
    ]
