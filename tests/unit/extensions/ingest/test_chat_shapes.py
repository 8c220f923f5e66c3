"""ShareGPT's and Alpaca's records have the tokens and roles of the same conversations as messages."""

from __future__ import annotations

import json
import logging
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.extensions.ingest.test_chat_templates import CHATML, assets
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.ingest.chat_shapes import SPEAKERS
from torchtitan.extensions.ingest.message_weights import is_trained
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.tools.errors import UserError

TOOLS_TOO = CHATML.replace(
    "m.content +", "m.content + (m.tool_calls | map(attribute='function') | list | tojson if m.tool_calls else '') +"
)
FROM = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant"),
    "tool": ("observation", "tool"),
    "system": ("system",),
}


@pytest.fixture
def corpus_of(tmp_path: Path) -> Any:
    tokenizer = load_tokenizer(assets(tmp_path / "assets", TOOLS_TOO, ["<|im_start|>", "<|im_end|>"]))

    def corpus_of(name: str, records: list[dict[str, Any]], field: str, **keys: Any) -> Corpus:
        path = tmp_path / name
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = Source("chat", str(path), messages_field=field, **keys)
        return resolve_source(source, tokenizer, Data(cache_folder=str(tmp_path / "cache")))

    return corpus_of


def same(one: Corpus, other: Corpus) -> bool:
    assert one.has_roles and other.has_roles and len(one) == len(other) > 0
    return all(
        np.array_equal(one.document(i), other.document(i)) and np.array_equal(one.roles(i), other.roles(i))
        for i in range(len(one))
    )


def talk(draw: random.Random) -> list[dict[str, Any]]:
    """A random conversation as messages, with weights and calls of tools."""
    text = lambda: " ".join(draw.choice(["yes", "é", "№ 5", "{}", "\n", "from: me"]) for _ in range(draw.randint(1, 9)))  # noqa: E731
    messages = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.4 else []
    for _ in range(draw.randint(1, 4)):
        messages.append({"role": "user", "content": "? " + text()})
        if draw.random() < 0.3:
            call = {"name": "look", "arguments": {"at": draw.randint(1, 99)}}
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
            )
            messages.append({"role": "tool", "content": "= " + text()})
        messages.append({"role": "assistant", "content": "! " + text()})
        if draw.random() < 0.3:
            messages[-1]["weight"] = draw.choice([0, 1])
    messages[-1].pop("weight", None)
    return messages


def as_sharegpt(messages: list[dict[str, Any]], draw: random.Random, beside: bool) -> dict[str, Any]:
    said = []
    record: dict[str, Any] = {"system": ""}
    for message in messages:
        if beside and message["role"] == "system":
            record["system"] = message["content"]
        elif "tool_calls" in message:
            calls = [call["function"] for call in message["tool_calls"]]
            value = json.dumps(calls if draw.random() < 0.5 else calls[0])
            said.append({"from": "function_call", "value": value})
        else:
            weight = {"weight": message["weight"]} if "weight" in message else {}
            said.append({"from": draw.choice(FROM[message["role"]]), "value": message["content"]} | weight)
    return record | {"conversations": said}


def test_sharegpt_has_the_tokens_of_messages(corpus_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(3)
    talks = [talk(draw) for _ in range(60)]
    expected = corpus_of("m.jsonl", [{"messages": messages} for messages in talks], "messages")
    caplog.set_level(logging.INFO)
    for beside in (False, True):
        records = [as_sharegpt(messages, draw, beside) for messages in talks]
        for name, keys in (("s.jsonl", {}), ("s.parquet", {}), ("t.jsonl", {"messages_format": "sharegpt"})):
            assert same(corpus_of(name, records, "conversations", **keys), expected), (name, beside)
    assert "conversations were read as {'sharegpt': 60}" in caplog.text
    mixed = [
        {"messages": m} if i % 2 else {"messages": as_sharegpt(m, draw, False)["conversations"]}
        for i, m in enumerate(talks)
    ]
    assert same(corpus_of("mixed.jsonl", mixed, "messages"), expected)


def test_alpaca_has_the_tokens_of_messages(corpus_of: Any) -> None:
    draw = random.Random(4)
    records, talks = [], []
    for number in range(40):
        system, context = draw.choice(["", "Be kind."]), draw.choice(["", "given: 7"])
        history = [[f"earlier {i}", f"answer {i}"] for i in range(draw.randint(0, 2))]
        turns = [*history, ["do " + str(number) + ("\n" + context if context else ""), f"done {number}"]]
        record = {"instruction": f"do {number}", "input": context, "output": f"done {number}"}
        records.append(record | {"system": system, "history": history})
        talks.append([{"role": "system", "content": system}] if system else [])
        talks[-1] += [
            m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
        ]
    expected = corpus_of("m.jsonl", [{"messages": messages} for messages in talks], "messages")
    for name, keys in (("a.jsonl", {}), ("a.parquet", {}), ("b.jsonl", {"messages_format": "alpaca"})):
        assert same(corpus_of(name, records, "instruction", **keys), expected), name
    plain = [{"instruction": "i", "output": "o"}, {"instruction": "i", "input": None, "output": "o"}]
    talks = [[{"role": "user", "content": "i"}, {"role": "assistant", "content": "o"}]] * 2
    assert same(corpus_of("p.jsonl", plain, "instruction"), corpus_of("q.jsonl", [{"m": t} for t in talks], "m"))


ASK, SAY = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
WRONG: list[tuple[dict[str, Any], str, dict[str, Any], str]] = [
    ({"c": [ASK, {"from": "narrator", "value": "b"}]}, "c", {}, "message 2 of 'c' is from 'narrator'; known are human"),
    ({"c": [ASK, {"role": "assistant", "content": "b"}]}, "c", {}, "message 1 of 'c' has from, and message 2 has role"),
    ({"c": [ASK, SAY | {"role": "assistant"}]}, "c", {}, "cannot be told which of the two speaks"),
    ({"c": [ASK, SAY | {"content": "c"}]}, "c", {}, "message 2 of 'c' has value and content"),
    ({"c": [ASK, {"from": "gpt"}]}, "c", {}, "message 2 of 'c': value must be a text"),
    (
        {"c": [ASK, {"from": "function_call", "value": "look"}, SAY]},
        "c",
        {},
        "message 2 of 'c', a function_call, is not",
    ),
    ({"c": [ASK, {"from": "function_call", "value": "{}"}, SAY]}, "c", {}, "must be the JSON of an object with name"),
    ({"c": [{"from": "system", "value": "x"}, ASK, SAY], "system": "y"}, "c", {}, "beside the conversation and in it"),
    ({"c": [ASK, SAY]}, "c", {"messages_format": "openai"}, "'c' looks like sharegpt"),
    ({"instruction": "a", "output": 3}, "instruction", {}, "'output' is a int, not text"),
    ({"instruction": "a", "output": "b", "history": ["c"]}, "instruction", {}, "'history' must be a list of pairs"),
    ({"instruction": "a"}, "instruction", {"messages_format": "alpaca"}, "no field 'output'"),
    ({"instruction": "a", "output": "b"}, "instruction", {"messages_format": "sharegpt"}, "looks like alpaca"),
    ({"conversations": [ASK, SAY]}, "messages", {}, 'Set messages_field = "conversations"'),
    ({"c": [ASK, SAY | {"weight": 1e308}]}, "c", {}, "message 2 of 'c': weight = 1e\\+308, but a message is trained"),
    ({"c": [ASK, SAY | {"weight": float("inf")}]}, "c", {}, "weight = Infinity"),
    ({"c": [ASK, SAY | {"weight": -1}]}, "c", {}, "weight = -1"),
    ({"c": [ASK, SAY | {"weight": "1"}]}, "c", {}, 'weight = "1"'),
]


def test_what_fits_no_shape_or_two_is_refused_by_line(corpus_of: Any) -> None:
    for record, field, keys, says in WRONG:
        good = {"c": [ASK, SAY], "conversations": [ASK, SAY], "messages": [ASK, SAY], "instruction": "a", "output": "b"}
        first = {name: good[name] for name in {field, *({"output"} if field == "instruction" else {})}}
        if keys.get("messages_format") == "openai":
            first = {field: [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        records = [record] if keys.get("messages_format") == "sharegpt" else [first, record]
        with pytest.raises(UserError, match=f"w.jsonl line {len(records)}: .*{says}"):
            corpus_of("w.jsonl", records, field, **keys)


def test_weights_of_columns_are_refused_in_words() -> None:
    """A column can hold what JSON cannot."""
    for value in (b"1", Decimal("0.5"), [b"x"], {"a": Decimal(1)}):
        with pytest.raises(ValueError, match="message 1 of 'm': weight = .* but a message is trained"):
            is_trained({"weight": value}, 1, "m")
    assert set(SPEAKERS.values()) <= {"system", "user", "assistant", "tool"}
