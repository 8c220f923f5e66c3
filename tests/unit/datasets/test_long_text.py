"""A long text in pieces has the tokens of the whole text: cut at every place, under tokenizers of each kind."""

from __future__ import annotations

import base64
import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from torchtitan.datasets import long_text
from torchtitan.datasets.long_text import Cuts, LongText, chunks_of, find_cuts
from torchtitan.datasets.tokenizer import LLAMA3_PATTERN, load_tokenizer

ROOT = Path(__file__).parents[3]
QWEN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CASED = "|".join((*long_text._CASED, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"))
GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
FRAGMENTS = [
    *("the", "The", " of", "don't", "we'LL", "it's", "naïve", "e\u0301", "cafe\u0301", "ﬁ", "Straße", "x_1"),
    *("12345", "3.14", "1,000", "②", "½", "0x1F", "日本語", "中文，没有空格。", "한국어", "カタカナ", "が", "か\u3099"),
    *("\uff8a\uff9e", "🙂", "👩\u200d🚀", "🇩🇪", "привет", "مرحبا", "\ufdfa", "ไทย", "\u0e33", "def f(x):", "<", ">"),
    *(" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", " \n", "\u00a0", "\u3000", "\u200b", "\u180e", "\x85"),
    *(".", ",", "...", "…", "!?", "'", '"', "(", ")", "//", "/", "\\", "#", "=>", "{", "}", "-", "_", "▁", "▁▁", "|"),
    *("<|endoftext|>", "<|end", "oftext|>", "<tool_call>", "<tool", "_call>", "  <tool_call>  ", "a▁b", "\x1c"),
    *("\u0958", "\u1e9b\u0323", "\u0344", "¨", "ͺ", "½½", "ʼn", "İ", "\ufeff", "\ud7a3", "\u1100\u1161"),
]


def ragged(seed: int, count: int = 40) -> str:
    draw = random.Random(seed)
    if seed % 5 == 0:
        return "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0x20, 0xD7FF)])) for _ in range(count))
    return "".join(draw.choice(FRAGMENTS) * draw.choice([1, 1, 1, 2, 5]) for _ in range(count))


TRAINING = [ragged(seed, 200) for seed in range(1, 200, 3) if seed % 5] + [(ROOT / "docs" / "data.md").read_text()] * 3


def trained(
    splits: Any, normalizer: Any = None, added: list[AddedToken] | None = None, after: Any = "same"
) -> tokenizers.Tokenizer:
    """A BPE of 1,500 tokens; after: the steps that divide text into words, if they are others than in training."""
    made = tokenizers.Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer, made.normalizer, made.decoder = splits, normalizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TRAINING, trainer)
    if after != "same":
        description = json.loads(made.to_str()) | after
        made = tokenizers.Tokenizer.from_str(json.dumps(description))
    made.add_tokens(added or [])
    made.encode_special_tokens = True
    return made


def split(pattern: str, *before: Any, **keys: Any) -> Any:
    steps = [*before, pre_tokenizers.Split(Regex(pattern), keys.get("behavior", "isolated"), keys.get("invert", False))]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def bytes_of(**keys: Any) -> Any:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | keys))


MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
META = pre_tokenizers.Metaspace()
TOOLS = [AddedToken("<tool_call>", special=False), AddedToken("  ", special=False, normalized=False)]


def proved() -> Iterator[tuple[str, tokenizers.Tokenizer]]:
    yield "gpt-2", trained(bytes_of())
    yield "a blank before", trained(bytes_of(add_prefix_space=True))
    yield "smollm", trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_of()]), added=TOOLS)
    yield "llama 3", trained(split(LLAMA3_PATTERN))
    yield "qwen", trained(split(QWEN), normalizers.NFC(), TOOLS)
    yield "gpt-4", trained(split(GPT4, behavior="removed", invert=True), normalizers.NFKC())
    yield "tekken", trained(split(CASED, pre_tokenizers.Digits(False)))
    yield "marks apart", trained(split(LLAMA3_PATTERN), normalizers.Sequence([normalizers.NFD()]))
    marked = {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, MARK]}, "pre_tokenizer": None}
    yield "llama 2", trained(META, after=marked)
    yield "gemma", trained(META, after={"normalizer": MARK, "pre_tokenizer": None}, added=TOOLS[:1])
    for scheme in ("always", "first", "never"):
        for parted in (True, False):
            meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": parted}
            yield f"metaspace {scheme} {parted}", trained(META, after={"pre_tokenizer": meta}, added=TOOLS[:1])


def ids_of(library: tokenizers.Tokenizer, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


def test_a_cut_at_any_place_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [ragged(seed) for seed in range(60)]
    monkeypatch.setattr(long_text, "PIECE", 7)
    for name, library in proved():
        cuts = find_cuts(json.loads(library.to_str()))
        assert cuts is not None, name
        assert len(json.loads(library.to_str())["model"]["merges"]) > 500, name
        tried = 0
        for text in texts:
            whole = ids_of(library, text)
            for match in cuts.places.finditer(text, 1):
                cut = match.start()
                halves = ids_of(library, text[:cut]) + ids_of(library, text[cut + cuts.without_blank :])
                assert halves == whole, (name, text[max(0, cut - 20) : cut], text[cut : cut + 20])
                tried += 1
            pieces = list(cuts.pieces(chunks_of(text)))
            assert [i for piece in pieces for i in ids_of(library, piece)] == whole, name
        assert tried > 60, (name, tried)


def test_other_tokenizers_get_a_text_whole() -> None:
    sloppy = trained(pre_tokenizers.Split("x", "isolated"), after={"pre_tokenizer": None})
    no_words = {"normalizer": MARK, "pre_tokenizer": None}
    over_blanks = trained(pre_tokenizers.Sequence([]), normalizers.Replace(" ", "▁"))
    others = {
        "no words": sloppy,
        "merges over blanks": over_blanks,
        "blanks are no marks": trained(bytes_of(), after={"pre_tokenizer": None}),
        "an unknown pattern": trained(split(QWEN + r"|\w+ \w+")),
        "every second word": trained(split(QWEN, behavior="merged_with_next")),
        "lower case": trained(bytes_of(), normalizers.Lowercase()),
        "takes the blanks behind it": trained(bytes_of(), added=[AddedToken("<a>", special=False, rstrip=True)]),
        "holds a blank": trained(bytes_of(), added=[AddedToken("New York", special=False)]),
        "a token put before it": trained(
            META,
            after={"normalizer": {"type": "Sequence", "normalizers": [PREPEND, MARK]}, "pre_tokenizer": None},
            added=TOOLS,
        ),
        "Unigram": tokenizers.Tokenizer(models.Unigram([("a", 0.0), ("▁", 0.0)], 0)),
        "without mark": trained(bytes_of(), after=no_words),
    }
    for name, library in others.items():
        assert find_cuts(json.loads(library.to_str())) is None, name


def test_no_letter_ends_with_a_blank_in_a_canonical_form() -> None:
    """What find_cuts relies on; kana, Han and Hangul stay one letter in NFC and NFKC."""
    for number in range(0x110000):
        character = chr(number)
        if character.isalnum() or character == "_":
            for form in ("NFC", "NFD", "NFKC", "NFKD"):
                assert not unicodedata.normalize(form, character)[-1].isspace(), hex(number)
    for first, last in ((0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3)):
        for number in range(first, last + 1):
            assert unicodedata.category(chr(number)) == "Lo"
            assert unicodedata.normalize("NFKC", chr(number)) == chr(number)


def test_a_text_stays_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "PIECE", 5)
    for seed in range(50):
        text = ragged(seed)
        content = text.encode()
        assert "".join(LongText(content)) == text
        bad = random.Random(seed).randrange(len(content))
        broken = content[:bad] + b"\xff" + content[bad:]
        with pytest.raises(UnicodeDecodeError) as caught:
            LongText(broken)
        with pytest.raises(UnicodeDecodeError) as expected:
            broken.decode()
        assert caught.value.start == expected.value.start
    assert LongText(b" \n" * 40).isspace() and not LongText(b" \n" * 40 + b"x").isspace()
    assert not list(Cuts(long_text.re.compile("x")).pieces([]))  # type: ignore[attr-defined]


def test_ids_are_those_of_the_whole_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By load_tokenizer, with the ends; and with Llama 3's tokenizer.model."""
    tokenizer = load_tokenizer(ROOT / "assets" / "tokenizer")
    assert tokenizer.pieces is not None
    text = "\n".join(ragged(seed, 100) for seed in range(40)) + (ROOT / "docs" / "data.md").read_text()
    monkeypatch.setattr(long_text, "PIECE", 300)
    assert len(list(tokenizer.pieces(chunks_of(text)))) > 20
    long = tokenizer.encode_long(chunks_of(text), [3], [4, 5])
    assert long.dtype == np.int32 and long.tolist() == [3, *tokenizer.encode(text), 4, 5]
    assert tokenizer.encode_long(LongText(text.encode()), [], []).tolist() == tokenizer.encode(text)
    assert tokenizer.encode_long([""], [1], [2]).size == 0
    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    )
    by_tiktoken = load_tokenizer(tmp_path)
    run = text + "x" * 60_000 + " " * 60_000 + text
    assert by_tiktoken.encode_long(chunks_of(run), [], []).tolist() == by_tiktoken.encode(run)
