"""The text that tasks are made in: sentences of the user's files, or of a small grammar, each tokenized by itself.

Texts are cut where a tokenizer cuts them too: after line breaks and before the space that precedes a word. So the
tokens of a document are those of its whole text, for tokenizers that divide a text into words first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.records import Fields, Span, as_text
from torchtitan.extensions.ingest.synthetic.words import ADJECTIVES, NOUNS
from torchtitan.extensions.ingest.text import read_records
from torchtitan.tools.errors import UserError

LONGEST = 400
"""Characters of a sentence; a longer one is cut before a space."""

CUT = re.compile(r"(?<=\n)(?=\S)|(?<=[.!?])(?= \S)|(?<=[。！？])(?=[^\s。！？])")
LONG = re.compile(rf".{{1,{LONGEST}}}(?= \S|$)|.{{1,{LONGEST}}}", re.S)
AT_ONCE = 256
"""Sentences that are tokenized together."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a document. ids: int32[n]. answer: whether it is (part of) the answer."""

    text: str
    ids: np.ndarray
    answer: bool = False


class Encode:
    """Texts -> pieces that continue a document: one that begins with a space a line, any other one a new line. What
    follows a text that ends with a line break is taken to begin a line."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._heads = {mark: tokenizer.encode(mark) for mark in "a\n"}
        self._tail = tokenizer.encode("\nA")[len(self._heads["\n"]) :]  # line breaks are divided by what follows

    def __call__(self, texts: Sequence[str]) -> list[Piece]:
        marked = [("a" if text.startswith(" ") else "\n") + text + "A" * text.endswith("\n") for text in texts]
        pieces = []
        for text, mark, ids in zip(texts, marked, self.tokenizer.encode_batch(marked)):
            head, tail = self._heads[mark[0]], self._tail if text.endswith("\n") else []
            inner = ids[len(head) : len(ids) - len(tail)]
            if head + inner + tail != ids:  # the tokenizer has a token across a joint
                inner = self.tokenizer.encode_continuation(text)
            pieces.append(Piece(text, np.array(inner, np.int32)))
        return pieces

    def begin(self, text: str) -> list[Piece]:
        """A text that begins a document."""
        tail = self._tail if text.endswith("\n") else []
        ids = self.tokenizer.encode(text + "A" * bool(tail))
        return [Piece(text, np.array(ids[: len(ids) - len(tail)], np.int32))]

    def answer(self, text: str) -> list[Piece]:
        """The answer, or a part of it."""
        return [replace(piece, answer=True) for piece in self([text])]

    def block(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Pieces as paragraphs of their own: without the space before the first, and with a blank line at their end."""
        texts = [piece.text for piece in (pieces[0], pieces[-1])]
        if len(pieces) == 1:
            return self([texts[0].lstrip(" ").rstrip() + "\n\n"])
        first, last = self([texts[0].lstrip(" "), texts[1].rstrip() + "\n\n"])
        return [first, *pieces[1:-1], last]


def size(pieces: Iterable[Piece]) -> int:
    """Their tokens."""
    return sum(len(piece.ids) for piece in pieces)


def sentences(text: str) -> Iterator[str]:
    """A text in sentences or lines of at most LONGEST characters; together they are the text."""
    start = 0
    for stop in (*(match.start() for match in CUT.finditer(text)), len(text)):
        if stop - start <= LONGEST:
            yield text[start:stop]
        else:
            yield from (match[0] for match in LONG.finditer(text, start, stop))
        start = stop


def _numbered_sentences(texts: Iterator[str | None]) -> Iterator[tuple[str, int, int]]:
    reading = 0
    for number, text in enumerate(texts):
        if text is None:
            reading += 1
        else:
            yield from ((sentence, number, reading) for sentence in sentences(text.strip() + "\n\n"))


class Hay:
    """Sentences of texts, one after the other.

    texts: endless; None stands between two readings of all of them.
    """

    def __init__(self, texts: Iterator[str | None], encode: Encode) -> None:
        self._encode = encode
        self._texts = _numbered_sentences(texts)
        self._next: list[tuple[Piece, int, int]] = []  # the last is the next; with the numbers of its text and reading

    def _peek(self) -> tuple[Piece, int, int]:
        if not self._next:
            some = list(islice(self._texts, AT_ONCE))
            pieces = self._encode([sentence for sentence, _, _ in some])
            self._next = [(piece, text, reading) for piece, (_, text, reading) in zip(pieces, some)][::-1]
        return self._next[-1]

    def take(self, room: int, whole: bool = False) -> list[Piece]:
        """The next sentences as a block (Encode.block) of at most `room` tokens and nearly as many. The last sentence
        is cut to fit unless `whole`; [] if nothing fits."""
        return self._take(room - 4, None, whole)

    def of_one_text(self, room: int, least: int) -> list[Piece]:
        """The same of a single text, at least `least` tokens of it; texts that do not have so many left are passed
        over. [] if the room is smaller; UserError if no text has them."""
        if room - 4 < least:
            return []
        reading = self._peek()[2]
        while self._peek()[2] < reading + 2:
            number = self._peek()[1]
            pieces = self._take(room - 4, number, False)
            if size(pieces) >= least or self._peek()[1] == number:  # then the room has ended and not the text
                return pieces
        raise UserError(f"no text at its path has {least} tokens: give longer text, or make lengths smaller.")

    def _take(self, room: int, number: int | None, whole: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while number in (None, self._peek()[1]):
            piece = self._peek()[0]
            if len(piece.ids) > room:
                part = [] if whole else self._cut(piece, room)
                pieces += part
                if part:
                    self._next.pop()
                break
            pieces.append(piece)
            room -= len(piece.ids)
            self._next.pop()
        return self._encode.block(pieces) if pieces else []

    def _cut(self, piece: Piece, room: int) -> list[Piece]:
        """The beginning of a sentence, to a space if it has one; [] if that is nothing."""
        length = len(piece.text) * room // len(piece.ids)
        while length > 0:
            text = piece.text[:length]
            (shorter,) = self._encode([text.rpartition(" ")[0] or text])
            if len(shorter.ids) <= room:
                return [shorter] if shorter.text.strip() else []
            length = length * 9 // 10
        return []


def grammar(rng: np.random.Generator) -> Iterator[str]:
    """Texts for want of files: paragraphs of short sentences without meaning."""
    verbs = ("rests on", "drifts past", "waits behind", "leans against", "shelters", "mirrors", "faces", "outshines")
    forms = ("The {} {} the {}.", "Every {} {} its {}.", "By evening the {} {} some {}.", "One {} {} another {}.")

    def thing() -> str:
        adjective = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]} " if rng.random() < 0.7 else ""
        return f"{adjective}{NOUNS[rng.integers(len(NOUNS))]}"

    while True:
        drawn = rng.integers([len(forms), len(verbs)], size=(rng.integers(3, 9), 2)).tolist()
        yield " ".join(forms[form].format(thing(), verbs[verb], thing()) for form, verb in drawn)


def texts_from(spans: Sequence[Span], fields: Fields, share: float) -> Iterator[str | None]:
    """The texts of files again and again, the first time from `share` of their bytes on; None between two readings."""
    total = sum(span.size for span in spans)
    skip, first = int(share * total), 0
    while first < len(spans) - 1 and skip >= spans[first].size:
        skip -= spans[first].size
        first += 1

    def read(record: dict[str, Any]) -> str:
        return as_text(record[fields.name], fields.name)

    anything = False
    while True:
        for span in spans[first:]:
            for text in read_records(span, fields, read):
                passed = min(skip, len(text))
                skip -= passed
                rest = text[passed:]
                if rest and not rest.isspace():
                    anything = True
                    yield rest
            skip = 0
        if not anything and first == 0:
            raise UserError("its path holds no text.")
        first = 0
        yield None
