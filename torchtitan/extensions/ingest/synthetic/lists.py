"""Long lists and questions about them: records by their identifier, and words by how often they occur.

key_value is the retrieval of Lost in the Middle (arXiv 2307.03172) over lines of JSON. common_words asks for the five
most frequent words of a list and their counts. Olmo 3's CWE (arXiv 2512.13961) asks for counts of frequent words of a
PDF, in questions that a language model wrote; here the list is drawn, so that nothing but counting helps.
"""

from __future__ import annotations

import json
from itertools import accumulate

import numpy as np

from torchtitan.extensions.ingest.synthetic.hay import Encode, Hay, Piece, size
from torchtitan.extensions.ingest.synthetic.words import ADJECTIVES, NOUNS, identifier

COMMON = 5
MOST_ASKED = 3
BATCH = 256
"""Records that are tokenized together."""


def key_value(rng: np.random.Generator, hay: Hay, encode: Encode, room: int) -> list[Piece] | None:
    """Lines of JSON, and the contents of one to three of them."""
    intro = encode.begin("Each line is a record with an id and its content.\n\n")
    ids = [(identifier(rng), identifier(rng)) for _ in range(int(rng.integers(1, MOST_ASKED + 1)))]
    asked = encode(
        [f"Question: What is the content of the record with the id {' and of '.join(key for key, _ in ids)}?\nAnswer:"]
    )
    answer = encode.answer(f" {'; '.join(value for _, value in ids)}")
    lines = encode([json.dumps({"id": key, "content": value}) + "\n" for key, value in ids])
    left = room - size([*intro, *asked, *answer, *lines])
    if left < 0:
        return None
    others: list[Piece] = []
    while True:
        drawn = [{"id": identifier(rng), "content": identifier(rng)} for _ in range(BATCH)]
        for line in encode([json.dumps(record) + "\n" for record in drawn]):
            if len(line.ids) > left:
                places = np.sort(rng.integers(len(others) + 1, size=len(lines)))[::-1]
                for place, mine in zip(places.tolist(), (lines[i] for i in rng.permutation(len(lines)))):
                    others.insert(place, mine)
                return [*intro, *others, *asked, *answer]
            others.append(line)
            left -= len(line.ids)


def common_words(rng: np.random.Generator, hay: Hay, encode: Encode, room: int) -> list[Piece] | None:
    """Words in any order, five of which occur more often than all others, each another number of times."""
    intro = encode.begin("Here is a heap of words; note how often each of them turns up.\n\n")
    asked = encode([f"Question: Which {COMMON} words turn up most often, and how many times each?\nAnswer:"])
    words = [f" {word}" for word in rng.permutation([*ADJECTIVES, *NOUNS])[: int(rng.integers(50, 500))].tolist()]
    pieces = encode(words)
    sizes = np.array([len(piece.ids) for piece in pieces])
    longest = encode([f" {room} times,"])
    left = room - size([*intro, *asked]) - COMMON * len(longest[0].ids) - int(sizes[:COMMON].sum()) - 8
    others = rng.integers(COMMON, len(words), max(left, 0) // int(sizes.min()) + 1)
    gaps = np.array(list(accumulate(rng.integers(1, 5, COMMON).tolist())))[::-1]  # above the most frequent other word
    tokens = np.concatenate([[0], np.cumsum(sizes[others])])

    def counts(most: int) -> np.ndarray:
        """int64[words] of a list with the first `most` of the others."""
        result = np.bincount(others[:most], minlength=len(words))
        result[:COMMON] = result.max() + 1 + gaps
        return result

    low, high = 0, len(others)  # of the others, how many fit: tokens grow with it
    while low < high:
        middle = (low + high + 1) // 2
        fits = tokens[middle] + int(counts(middle)[:COMMON] @ sizes[:COMMON]) <= left
        low, high = (middle, high) if fits else (low, middle - 1)
    if low < len(words):
        return None
    times = counts(low)
    order = rng.permutation(np.repeat(np.arange(len(words)), times)).tolist()
    answer = ", ".join(f"{words[i].strip()} {times[i]} times" for i in range(COMMON))
    body = [
        *encode([words[order[0]].lstrip()]),
        *(pieces[i] for i in order[1:-1]),
        *encode([f"{words[order[-1]]}\n\n"]),
    ]
    return [*intro, *body, *asked, *encode.answer(f" {answer}")]
