"""Long texts in parts with headings, and questions about their own words: no fact is put into them.

documents: which of many documents has a sentence. quotes: how a sentence that is begun goes on, in one of many
documents. occurrences: how often a word occurs, and in which sections: keywords and positions, as Qwen2.5-1M (arXiv
2501.15383) names them, and a nearer relative of Olmo 3's REX (arXiv 2512.13961: a language model writes tasks from
snippets around frequent words of a PDF; here the question is fixed and the answer counted). chunk_order and
paragraph_order: parts of one text that were shuffled, to be put in order by their numbers, or written in order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from torchtitan.extensions.ingest.synthetic.hay import Encode, Hay, Piece, size
from torchtitan.extensions.ingest.synthetic.words import distinct

LEAST = 48
"""Tokens of a section, at least."""
OCCURRENCES = range(1, 9)
MOST_PARTS = 8


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _sections(
    rng: np.random.Generator, hay: Hay, encode: Encode, room: int, heading: Callable[[int], str]
) -> list[tuple[Piece, list[Piece]]]:
    """Sections (heading, text) that fill `room` tokens, each of about the same size, drawn from 100 to a third."""
    about = int(np.exp(rng.uniform(np.log(100), np.log(max(101, room / 3)))))
    made: list[tuple[Piece, list[Piece]]] = []
    while True:
        (head,) = encode([heading(len(made))])
        left = room - len(head.ids)
        if left < LEAST:
            return made
        inner = left > 2 * about
        body = (hay.take(about, whole=True) if inner else []) or hay.take(min(about, left) if inner else left)
        if not body:
            return made
        made.append((head, body))
        room = left - size(body)


def _filled(hay: Hay, sections: list[tuple[Piece, list[Piece]]], room: int, without: str) -> list[Piece]:
    """The sections one after the other, the last of them with a paragraph more for the room that is left, unless it
    holds the text `without`."""
    pieces = [piece for head, body in sections for piece in (head, *body)]
    for _ in range(8):
        more = hay.take(room - size(pieces))
        if without not in _text(more):
            return pieces + more
    return pieces


def _found_once(
    rng: np.random.Generator, sections: list[tuple[Piece, list[Piece]]], most: int
) -> tuple[int, str, int] | None:
    """(section, sentence, where its second half begins) of a sentence of at most `most` tokens that occurs once, with
    its first half too; None after 50 tries."""
    whole = "\n".join(_text(body) for _, body in sections)
    for _ in range(50):
        index = int(rng.integers(len(sections)))
        piece = sections[index][1][rng.integers(len(sections[index][1]))]
        sentence = piece.text.strip()
        spaces = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", sentence)]
        if len(spaces) < 5 or "\n" in sentence or len(piece.ids) > most:
            continue
        half = spaces[len(spaces) // 2]
        first = whole.find(sentence[:half])
        if whole.find(sentence[:half], first + 1) < 0:
            return index, sentence, half
    return None


def _of_documents(quote: bool, rng: np.random.Generator, hay: Hay, encode: Encode, room: int) -> list[Piece] | None:
    names = distinct(room // LEAST + 1, lambda: f"{chr(65 + rng.integers(26))}-{rng.integers(10**5, 10**6)}")
    intro = encode.begin("Below are documents, each under its number.\n\n")
    most = max(40, min(120, room // 8))
    left = room - size(intro) - 3 * most
    sections = _sections(rng, hay, encode, left, lambda n: f"Document {names[n]}\n")
    found = _found_once(rng, sections, most) if len(sections) > 1 else None
    if found is None:
        return None
    index, sentence, half = found
    if quote:
        question = (
            f"Question: In one of the documents a sentence begins as follows. How does it go on?\n{sentence[:half]}"
        )
        answer = sentence[half:]
    else:
        question = f"Question: In which of the documents does this sentence stand?\n{sentence}\nAnswer: Document"
        answer = f" {names[index]}"
    end = [*encode([question]), *encode.answer(answer)]
    return [*intro, *_filled(hay, sections, room - size([*intro, *end]), sentence[:half]), *end]


def documents(rng: np.random.Generator, hay: Hay, encode: Encode, room: int) -> list[Piece] | None:
    """Many documents; in which of them a sentence stands."""
    return _of_documents(False, rng, hay, encode, room)


def quotes(rng: np.random.Generator, hay: Hay, encode: Encode, room: int) -> list[Piece] | None:
    """Many documents; how a sentence of one of them goes on."""
    return _of_documents(True, rng, hay, encode, room)


def occurrences(rng: np.random.Generator, hay: Hay, encode: Encode, room: int) -> list[Piece] | None:
    """Numbered sections; how often a word occurs in their text, at most eight times, and in which of them."""
    intro = encode.begin("The text below is divided into numbered sections.\n\n")
    spare = size(encode([f" 8 times, in the sections {', '.join(['9999'] * 8)}", "Question: " * 20 + "\nAnswer:"])) + 24
    sections = _sections(rng, hay, encode, room - size(intro) - spare, lambda n: f"Section {n + 1}\n")
    found = [Counter(re.findall(r"\w+", _text(body))) for _, body in sections]
    all_words = sum(found, Counter())
    words = sorted(w for w, n in all_words.items() if n in OCCURRENCES and w.isalpha() and 4 <= len(w) <= 24)
    if not words:
        return None
    by_count: dict[int, list[str]] = {}
    for one in words:
        by_count.setdefault(all_words[one], []).append(one)
    candidates = by_count[sorted(by_count)[rng.integers(len(by_count))]]  # every count as likely: most words are rare
    word = candidates[rng.integers(len(candidates))]
    question = f'Question: How many times does the exact word "{word}" occur, and in which sections?\nAnswer:'
    where = ", ".join(str(i) for i, counted in enumerate(found, 1) if counted[word])
    end = [*encode([question]), *encode.answer(f" {all_words[word]} times, in the sections {where}")]
    return [*intro, *_filled(hay, sections, room - size([*intro, *end]), word), *end]


def chunk_order(rng: np.random.Generator, hay: Hay, encode: Encode, room: int, least: int) -> list[Piece] | None:
    """Two to eight parts of one text, shuffled; the numbers of the parts in the text's order."""
    intro = encode.begin("The numbered parts below are one text, but their order was changed.\n\n")
    asked = encode(["Question: In which order do the parts make the text?\nAnswer:"])
    parts = int(rng.integers(2, MOST_PARTS + 1))
    heads = encode([f"Part {n + 1}\n" for n in range(parts)])
    fixed = size([*intro, *asked, *heads]) + parts * 8
    text = hay.of_one_text(room - fixed, max(1, least - fixed - 16))
    if not text:
        return None
    ends = np.cumsum([len(piece.ids) for piece in text])
    cuts = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, parts) / parts).tolist(), len(text)]
    if len(set(cuts)) <= parts:
        return None
    chunks = [encode.block(text[start:stop]) for start, stop in zip(cuts, cuts[1:])]
    if len({_text(chunk).strip() for chunk in chunks}) < parts:
        return None
    shown = rng.permutation(parts)
    body = [piece for head, chunk in zip(heads, shown) for piece in (head, *chunks[chunk])]
    answer = ", ".join(str(n + 1) for n in np.argsort(shown))
    return [*intro, *body, *asked, *encode.answer(f" {answer}")]


def paragraph_order(rng: np.random.Generator, hay: Hay, encode: Encode, room: int, least: int) -> list[Piece] | None:
    """The paragraphs (or lines) of one text, shuffled; then the text."""
    intro = encode.begin("The paragraphs below are one text, but their order was changed.\n\n")
    asked = encode(["Question: Write the paragraphs in the order of the text.\nAnswer:\n"])
    half = (room - size([*intro, *asked])) // 2
    text = _text(hay.of_one_text(half - half // 50 - 8, max(1, (least - size([*intro, *asked])) * 12 // 25 - 16)))
    for between in ("\n\n", "\n"):
        paragraphs = [part.strip("\n") for part in re.split(rf"{between}\n*", text.rstrip()) if part.strip()]
        if len(paragraphs) > 1:
            break
    else:
        return None
    shuffled = encode([f"{paragraphs[i]}\n\n" for i in rng.permutation(len(paragraphs))])
    ordered = [f"{part}{between}" for part in paragraphs[:-1]] + paragraphs[-1:]
    return [*intro, *shuffled, *asked, *(piece for part in ordered for piece in encode.answer(part))]
