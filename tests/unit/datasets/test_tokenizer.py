"""load_tokenizer: both file kinds, the special tokens, text that spells them, long text, bad folders."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest

from torchtitan.datasets.tokenizer import (
    MAX_CHARACTERS,
    MAX_RUN,
    Tokenizer,
    bounded_parts,
    load_tokenizer,
)
from torchtitan.tools.errors import UserError

ASSETS = Path(__file__).parents[3] / "assets" / "tokenizer"
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|eot_id|>", "<|reserved_special_token_0|>"]
TEXTS = ["hello world", " a  b\n\n\tc \r\n", "1234567 + 89", "héllo 日本語 🙂", "\x00\x7f", "don't we'll", "x" * 100]


def write_ranks(folder: Path) -> Path:
    pieces = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w", b"\n\n", b"aa", b"aaaa"]
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(params=["hugging_face", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(ASSETS if request.param == "hugging_face" else write_ranks(tmp_path))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_batch_is_encode_of_each(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("special", SPECIAL)
def test_spelling_of_a_special_token_is_ordinary_text(tokenizer: Tokenizer, special: str) -> None:
    ids = tokenizer.encode(f"a{special}b {special}{special}")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == f"a{special}b {special}{special}"
    assert len(ids) > 3 * 4  # no special id at all: each spelling takes several ordinary tokens


def test_our_tokenizer() -> None:
    ours = load_tokenizer(ASSETS)
    assert ours.vocab_size == 4096
    assert [ours.decode([i]) for i in (0, 1, 2)] == ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    assert len(ours.encode("1234567")) == 7  # digits stand alone


def test_any_bytes_encode() -> None:
    """All 256 bytes are in the alphabet: each valid UTF-8 byte comes back, none is lost as unknown."""
    ours = load_tokenizer(ASSETS)
    text = "".join(map(chr, range(0x250))) + "".join(map(chr, range(0x800, 0x11000, 97)))
    text += "".join(chr(c) for c in range(0x11000, 0x110000, 4099))
    text = "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000)
    assert ours.decode(ours.encode(text)) == text


def test_llama3_ids(tmp_path: Path) -> None:
    llama = load_tokenizer(write_ranks(tmp_path))
    assert llama.vocab_size == 264 + 256
    assert (llama.bos_id, llama.eos_id) == (264, 265)
    assert llama.decode([264, 265, 264 + 9]) == "<|begin_of_text|><|end_of_text|><|eot_id|>"
    assert llama.encode("hello") == [259]
    assert llama.encode("12345") == [ord(c) for c in "12345"]


@pytest.mark.parametrize("kind", ["hugging_face", "tiktoken"])
@pytest.mark.parametrize(
    "files, end",
    [
        ({"tokenizer_config.json": {"eos_token": "<|end_of_text|>"}}, 1),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|begin_of_text|>", "lstrip": False}}}, 0),
        ({"special_tokens_map.json": {"eos_token": "<|begin_of_text|>"}}, 0),
        (
            {
                "tokenizer_config.json": {"eos_token": "<|end_of_text|>"},
                "special_tokens_map.json": {"eos_token": "<|begin_of_text|>"},
            },
            1,
        ),
    ],
)
def test_special_tokens_by_name(tmp_path: Path, kind: str, files: dict[str, object], end: int) -> None:
    first = make_folder(tmp_path, kind)
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert load_tokenizer(tmp_path).eos_id == first + end


@pytest.mark.parametrize("kind", ["hugging_face", "tiktoken"])
def test_special_tokens_by_id(tmp_path: Path, kind: str) -> None:
    first = make_folder(tmp_path, kind)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": first, "eos_token_id": first}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [first + 1, first]}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == (first, first + 1)


@pytest.mark.parametrize("value", ["</s>", "2", 2.5, True, {}, [[1]]])
def test_an_id_that_is_no_number_is_named_with_its_file(tmp_path: Path, value: object) -> None:
    make_folder(tmp_path, "hugging_face")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match="config.json: eos_token_id = .* must be the id of a token"):
        load_tokenizer(tmp_path)


def test_null_means_none_and_unmarked_ends_are_still_ordinary_text(tmp_path: Path) -> None:
    make_folder(tmp_path, "hugging_face")
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<|end_of_text|>"}))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.bos_id is None
    assert loaded.eos_id not in loaded.encode("<|end_of_text|>")


def make_folder(folder: Path, kind: str) -> int:
    """A folder without special tokens files; the id of <|begin_of_text|>."""
    if kind == "tiktoken":
        write_ranks(folder)
        return 264
    (folder / "tokenizer.json").write_bytes((ASSETS / "tokenizer.json").read_bytes())
    return 0


def test_fingerprint_follows_file_and_special_ids(tmp_path: Path) -> None:
    prints = set()
    for end in ("<|end_of_text|>", "<|begin_of_text|>"):
        make_folder(tmp_path, "hugging_face")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        prints.add(load_tokenizer(tmp_path).fingerprint)
        assert load_tokenizer(tmp_path).fingerprint in prints
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text() + "\n")
    prints.add(load_tokenizer(tmp_path).fingerprint)
    assert len(prints) == 3


LONG = {
    "letters": "a" * 1_200_000,
    "spaces": " " * 900_000,
    "lines": "some words, (and signs)\r\n\r\n  def f(x):\n\t" * 30_000,
    "words": "word 12 " * 150_000,
    "a run in words": "word " * 50_000 + "-" * 70_000 + " word" * 50_000,
}


@pytest.mark.parametrize("name", LONG)
def test_bounded_parts(name: str) -> None:
    parts = list(bounded_parts(LONG[name]))
    assert "".join(parts) == LONG[name]
    assert max(map(len, parts)) <= MAX_CHARACTERS
    assert max(len(run) for part in parts for run in part.split() or [""]) <= MAX_RUN
    assert not any(" " * (MAX_RUN + 1) in part for part in parts)


@pytest.mark.parametrize("name", ["lines", "words"])
def test_cuts_leave_the_tokens_as_they_are(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = load_tokenizer(write_ranks(tmp_path))
    text = LONG[name][:300_000]  # below the limit: encoded in one part
    whole = llama.encode(text)
    monkeypatch.setattr("torchtitan.datasets.tokenizer.MAX_CHARACTERS", 1_009)
    monkeypatch.setattr("torchtitan.datasets.tokenizer._SEARCH", 200)
    assert len(list(bounded_parts(text))) > 250
    assert llama.encode(text) == whole


def test_five_megabytes(tokenizer: Tokenizer) -> None:
    """Worst cases for a quadratic tokenizer: 5 MB would take hours, linear ones take seconds."""
    started = time.monotonic()
    for unit in ("a", "def f(x):\n    return x\n"):
        text = (unit * 5_000_000)[:5_000_000]
        assert sum(tokenizer.encode(text)) > 0
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "files, words",
    [
        (None, ["not a folder"]),
        ({}, ["tokenizer.json", "tokenizer.model", "nothing"]),
        ({"tokenizer.json": b"{"}, ["tokenizer.json"]),
        ({"tokenizer.json": b'{"model": 1}'}, ["tokenizer.json"]),
        ({"tokenizer.model": b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00"}, ["SentencePiece", "line"]),
        ({"tokenizer.model": b"YQ== 0\nYg== 1\n"}, ["254", "2 ranks"]),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, bytes] | None, words: list[str]) -> None:
    folder = tmp_path / "assets"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_special_token_that_is_not_there(tmp_path: Path) -> None:
    make_folder(tmp_path, "tiktoken")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(UserError, match="</s>"):
        load_tokenizer(tmp_path)
