"""Messages that say whether they are trained, against what stands in the conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.extensions.ingest.test_chat_templates import CHATML, TALK, USER, assets, encoder_of, trained
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.planner.data_report import format_report, make_report
from torchtitan.tools.errors import UserError

TOKENS = ["<|im_start|>", "<|im_end|>"]
ANSWER = {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No."}
PARTS = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content.split()[0] }}{% endgeneration %}{{ ' ' + m.content.split()[1:] | join(' ') }}
{%- generation %}<|im_end|>{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"""
MARKED = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' CONDITION %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}
{{- '\\n' }}{% endfor %}"""
TEMPLATES = {
    "without marks": CHATML,
    "marks": MARKED.replace("CONDITION", ""),
    "marks by the key": MARKED.replace("CONDITION", "and m.weight != 0 and m.train != false and m.loss != false"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_message_is_trained_if_it_says_so(kind: str, tmp_path: Path) -> None:
    folder = assets(tmp_path, TEMPLATES[kind], TOKENS)
    encoder = encoder_of(folder)
    [whole, _] = encoder.encode(encoder.read({"messages": [USER, ANSWER, USER, OTHER]}))
    encoder.closing()
    for no in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"weight": 0, "train": False}):
        for yes in ({"weight": 1}, {"train": True}, {"loss": 1.0}, {}, {"train": None}):
            for first, last, expected in ((no, yes, "No.<|im_end|>"), (yes, no, "Yes.<|im_end|>")):
                record = {"messages": [USER, ANSWER | first, USER | {"weight": 0}, OTHER | last]}
                assert trained(folder, record) == expected, record
                assert encoder.encode(encoder.read(record))[0].tolist() == whole.tolist()
                counts = encoder.closing()  # each was read twice
                assert (counts["changed"], counts["not_written"], counts["left_out"]) == (2, {}, {})
        assert encoder.read({"messages": [USER, ANSWER | no, USER]}) is None
        counts = encoder.closing()
        assert (counts["changed"], counts["left_out"]) == (1, {"not_trained": 1})
    assert trained(folder, {"messages": [USER, ANSWER | {"weight": 1}, USER, OTHER]}) == "Yes.<|im_end|>No.<|im_end|>"
    assert encoder.closing()["changed"] == 0


def test_marks_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    encoder = encoder_of(assets(tmp_path, PARTS, TOKENS))
    talk = [USER, ANSWER | {"content": "Yes it is", "weight": 0}, USER, OTHER | {"content": "No it is not"}]
    with pytest.raises(
        ValueError, match=r"not to be trained \(weight\), but it cannot be told which marks .* are of it"
    ):
        encoder.read({"messages": talk})
    del talk[1]["weight"]
    assert encoder.read({"messages": talk}) is not None


def test_the_end_that_is_shown_is_not_cut_within_a_token(tmp_path: Path) -> None:
    encoder = encoder_of(assets(tmp_path, CHATML, ["<|im_start|>"]))
    with pytest.raises(ValueError, match=r"ends a response with '<\|im_start\|>assistant.nYes.<\|im_end\|>.n', which"):
        encoder.read({"messages": [USER, ANSWER]})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "half": ({"weight": 0.5}, "weight = 0.5, but a message is trained"),
    "more": ({"weight": 2}, "weight = 2, "),
    "text": ({"train": "false"}, 'train = "false", '),
    "a list": ({"loss": [0]}, r"loss = \[0\], "),
    "not a number": ({"weight": float("nan")}, "weight = NaN, "),
    "both": ({"weight": 1, "train": False}, "weight = 1 and train = false do not agree"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_weights_are_refused_by_file_and_line(kind: str, tmp_path: Path) -> None:
    keys, says = WRONG[kind]
    tokenizer = load_tokenizer(assets(tmp_path / "assets", CHATML, TOKENS))
    chat = tmp_path / "chat.jsonl"
    records = [{"messages": TALK}, {"messages": [USER, ANSWER | keys]}]
    chat.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Source(name="chat", path=str(chat), messages_field="messages")
    with pytest.raises(UserError, match=f"chat.jsonl line 2: message 2 of 'messages': {says}"):
        resolve_source(source, tokenizer, Data(cache_folder=str(tmp_path / "cache")))


def test_what_stands_beside_the_messages_is_said(tmp_path: Path) -> None:
    """Also of Parquet, of whose columns only those are read that are asked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokenizer = load_tokenizer(assets(tmp_path / "assets", CHATML, TOKENS))
    records = [
        {"messages": TALK, "system": "Be brief.", "weight": 0},
        {"messages": TALK, "system": "Be brief.", "weight": None},
        {"messages": [USER | {"train": True}, ANSWER], "system": "", "weight": None},
        {"messages": [USER, ANSWER | {"train": False}], "system": None, "weight": None},
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "chat.parquet")
    for name in ("chat.jsonl", "chat.parquet"):
        source = Source(name="chat", path=str(tmp_path / name), messages_field="messages", long_document="drop")
        data = Data(sources=(source,), cache_folder=str(tmp_path / "cache"))
        corpus = resolve_source(source, tokenizer, data)
        assert corpus.fingerprint.endswith("-2"), "messages that were trained are no more"
        plan = Plan(data, [corpus], seq_len=96, rows_per_step=2, steps=2, seed=1)
        lines = format_report(make_report(plan, 1, 1, 1.0, 0.0))
        for line in (
            "warning: the field 'system' beside the messages of 2 conversations of chat is not read: make it the first",
            "warning: the field 'weight' beside the messages of 1 conversations of chat is not read\n",
            "warning: 1 conversations of chat ask by weight, train or loss to train messages that are not the assist",
            "left out of chat: 1 conversations whose messages of the assistant all say that they are not trained",
        ):
            assert line in lines, lines
        assert "older version" not in lines


def test_a_corpus_without_such_keys_is_found_again(tmp_path: Path) -> None:
    """By the fingerprint that checkpoints know it by."""
    tokenizer = load_tokenizer(assets(tmp_path / "assets", CHATML, TOKENS))
    for keys, same in (({}, True), ({"weight": 1}, True), ({"weight": 0}, False)):
        chat = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        chat.write_text(json.dumps({"messages": [USER, ANSWER | keys, *TALK]}) + "\n")
        source = Source(name="chat", path=str(chat), messages_field="messages")
        corpus = resolve_source(source, tokenizer, Data(cache_folder=str(tmp_path / "cache")))
        assert (corpus.fingerprint == corpus.folder.rpartition("-")[2]) == same
