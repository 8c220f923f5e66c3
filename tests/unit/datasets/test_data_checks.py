"""check_data: what [data] and [[data.sources]] are refused for, and what the message says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.data_checks import check_data
from torchtitan.tools.errors import UserError

SOURCE = Source(name="books", path="books.jsonl")


def error_of(**data: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_data(JobConfig(data=Data(**{"sources": (SOURCE,), **data})))
    message = str(caught.value)
    assert "\n" not in message
    return message


DATA: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "min over max": ({}, {"min_length": 9, "max_length": 8}, ["min_length = 9", "max_length = 8"]),
    "chunk over row": ({}, {"chunk_length": 10**7}, ["chunk_length = 10000000", "training.seq_len"]),
    "a column of two meanings": (
        {},
        {"mask_field": "m", "ignore_fields": ("m",)},
        ["mask_field and ignore_fields", "'m'"],
    ),
    "columns and a conversation": (
        {},
        {"ids_field": "ids", "messages_field": "messages", "long_document": "drop"},
        ["ids_field speaks of tokenized rows", "messages_field = 'messages'", "leave one of them out"],
    ),
    "columns of files of ids": ({}, {"labels_field": "l", "format": "npy"}, ["labels_field", 'format = "npy"']),
    "columns of the hub": ({}, {"ignore_fields": ("l",), "path": "hub:a/b"}, ["ignore_fields", "hub:a/b", "download"]),
    "raised twice": ({}, {"upsample": 2.0, "upsample_to": 0.5}, ["upsample", "upsample_to", "one of them"]),
    "raised by both": ({"strategy": "per_source_upsampling"}, {"upsample": 2.0}, ["per_source_upsampling"]),
    "anchors and all": (
        {"anchor_attention": True, "cross_document_attention": True},
        {},
        ["data.anchor_attention = true", "data.cross_document_attention = true"],
    ),
    "anchors in drawn positions": (
        {"anchor_attention": True, "positions": "pose", "target_seq_len": 1 << 20},
        {},
        ["data.anchor_attention = true", 'data.positions = "pose"', '"continue"'],
    ),
    "no domain named": ({"strategy": "domain_upsampling"}, {}, ["upsampled_sources", "books"]),
    "unknown domain": (
        {"strategy": "domain_upsampling", "upsampled_sources": ("book",)},
        {},
        ['"book"', "the sources are books"],
    ),
    "domains without the strategy": ({"upsampled_sources": ("books",)}, {}, ["domain_upsampling", '"original"']),
    "no target": ({"positions": "cream"}, {}, ["target_seq_len is not set"]),
    "target below the row": ({"positions": "cream", "target_seq_len": 7}, {}, ["target_seq_len = 7", "at least"]),
    "target for nothing": ({"target_seq_len": 10**6}, {}, ['"reset"', "leave it out"]),
}


@pytest.mark.parametrize("name", DATA)
def test_what_the_data_table_can_be_wrong_about(name: str) -> None:
    data, source, words = DATA[name]
    message = error_of(**data, sources=(dataclasses.replace(SOURCE, **source),))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ((), "no [[data.sources]]"),
        ((dataclasses.replace(SOURCE, path=""),), "data.sources[0] (books) has no path"),
        ((SOURCE, Source(path="x.jsonl")), "data.sources[1] (x.jsonl) has no name"),
        ((SOURCE, Source(name="web", path="w"), dataclasses.replace(SOURCE, path="z")), "data.sources[2] (z)"),
        ((dataclasses.replace(SOURCE, weight=0.0), Source(name="b", path="b", weight=0.0)), "(books, b)"),
    ],
)
def test_sources_that_cannot_be_read(sources: tuple[Source, ...], expected: str) -> None:
    assert expected in error_of(sources=sources)


@pytest.mark.parametrize("path", ["hub:", "hub:a/b/c", "hub:own/name@main", "hub: x", "hub:https://huggingface.co/x"])
def test_a_path_that_names_no_dataset(path: str) -> None:
    message = error_of(sources=(Source(name="web", path=path),))
    assert repr(path) in message and "hub:OWNER/NAME" in message


@pytest.mark.parametrize("path", ["hub:name", "hub:own/na-me.1", "hub:./folder", "hub:../a b", "hub:/x/y", "hub:~/x"])
def test_a_path_that_names_a_dataset(path: str) -> None:
    check_data(JobConfig(data=Data(sources=(Source(name="web", path=path),))))


def test_one_source_may_be_left_out_by_its_weight() -> None:
    check_data(JobConfig(data=Data(sources=(dataclasses.replace(SOURCE, weight=0.0), Source(name="b", path="b")))))
