"""RULER's thirteen tasks (Hsieh et al., arXiv 2404.06654; github.com/NVIDIA/RULER) in its own wording, made anew.

Needles in three kinds of haystack (niah_*), variables that are assigned to each other (vt), words that are common (cwe)
or frequent (fwe) in a list, and questions about documents (qa_1, qa_2: ruler_qa.py). A length counts the prompt and the
tokens that may be written, as RULER's does. docs/evaluation.md says what differs from the original.
"""

from __future__ import annotations

import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import pi

import numpy as np

from torchtitan.extensions.evaluation.fitting import Render, Task, Wording, generator, listed
from torchtitan.extensions.evaluation.questions import string_match_all
from torchtitan.extensions.evaluation.words import pair, singles, words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = 40
"""How many places in an essay a needle may stand at."""
VALUES, KEYS = 4, 4
HOPS = 4
VT_SHOT_LINES = 10
"""Lines of noise in vt's worked example: as many as fit RULER's 500 tokens for it."""
COMMON = 10
"""How many words cwe repeats most often, and asks for."""
SHORT = 4096
"""Tokens; below this length cwe repeats its words less often."""
CODE_LETTERS = 6
TOKENS_PER_CODE = 50
"""fwe's vocabulary has one coded word per 50 tokens of the length."""
LEAST_OF_FWE = 100
"""How many words fwe needs: with fewer the fourth is as frequent as the fifth."""


@dataclass(frozen=True)
class Niah:
    """One kind of needle in one kind of haystack."""

    haystack: str
    """noise, essay, or needles (other needles of the same form)."""

    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    """Per key."""

    queries: int = 1


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value="uuids"),
    "niah_multikey_1": Niah("essay", keys=KEYS),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", key="uuids", value="uuids"),
    "niah_multivalue": Niah("essay", values=VALUES),
    "niah_multiquery": Niah("essay", keys=KEYS, queries=KEYS),
}


def drawn(kind: str, rng: np.random.Generator) -> str:
    """A random key or value: an adjective-noun (words), a seven-digit number (numbers), or a UUID (uuids)."""
    if kind == "words":
        return pair(rng)
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def distinct(count: int, draw: Callable[[], str], but: Sequence[str] = ()) -> list[str]:
    """`count` different draws in the order in which they came, none of them in `but`."""
    draws: dict[str, None] = {}
    while len(draws) < count:
        if (value := draw()) not in but:
            draws[value] = None
    return list(draws)


@lru_cache(2)  # the same prose for all questions
def _prose(text: str) -> list[str]:
    return text.split()


def _scattered(pieces: Sequence[str], hay: Sequence[str], places: Sequence[int]) -> list[str]:
    """The hay with each piece inserted before hay[place]; places ascend."""
    mixed: list[str] = []
    last = 0
    for piece, place in zip(pieces, places, strict=True):
        mixed += [*hay[last:place], piece]
        last = place
    return mixed + list(hay[last:])


def niah_wording(task: Niah, text: str, rng: np.random.Generator, hay: np.random.Generator, join: str) -> Render:
    """A needle question of any size of haystack, counted in lines of noise, words of essay, or needles.

    rng: draws the question; hay: draws the haystack. join: stands between the question and the beginning of its answer.
    """
    keys = distinct(task.keys, lambda: drawn(task.key, rng))
    values = distinct(task.keys * task.values, lambda: drawn(task.value, rng))
    facts = [(keys[i // task.values], value) for i, value in enumerate(values)]
    facts = [facts[i] for i in rng.permutation(len(facts))]
    needles = [NEEDLE.format(kind=task.value, key=key, value=value) for key, value in facts]
    asked = [keys[i] for i in rng.permutation(len(keys))[: task.queries]]
    answers = [value for query in asked for key, value in facts if key == query]
    shares = np.sort(rng.random(len(needles)))
    depths = np.sort(rng.permutation(DEPTHS)[: len(needles)]) / (DEPTHS - 1)
    prose = _prose(text) if task.haystack == "essay" else []
    begin = int(hay.integers(len(prose))) if prose else 0
    others: list[str] = []  # grows with the sizes that are tried, and does not depend on them

    def pieces(size: int) -> list[str]:
        if task.haystack == "noise":
            return [NOISE] * size
        if task.haystack == "needles":
            while len(others) < size:
                key = distinct(1, lambda: drawn(task.key, hay), but=keys)[0]
                others.append(NEEDLE.format(kind=task.value, key=key, value=drawn(task.value, hay)))
            return others[:size]
        repeated = (prose[begin:] + prose * (-(-size // len(prose))))[:size]
        return re.split(r"(?<=[.!?]) ", " ".join(repeated))

    single = task.queries * task.values == 1
    kind = task.value[:-1] if single else task.value
    some, are, are_all, hidden = ("A", "is", "is", "is") if single else ("Some", "are", "are all", "are")
    query = listed(asked)

    def render(size: int) -> Wording:
        hay = pieces(size)
        at = depths if task.haystack == "essay" else shares
        context = _scattered(needles, hay, [int(share * len(hay)) for share in at])
        prompt = (
            f"{some} special magic {kind} {hidden} hidden within the following text. Make sure to memorize it. I will "
            f"quiz you about the {kind} afterwards.\n"
            + (" " if task.haystack == "essay" else "\n").join(context)
            + f"\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text?{join}"
            f"The special magic {kind} for {query} mentioned in the provided text {are}"
        )
        return Wording(prompt, " " + listed(answers), tuple(answers))

    return render


def niah_task(name: str, task: Niah, budget: int = 128, join: str = " ") -> Task:
    """budget: how many tokens the model may write; join: see niah_wording."""

    def build(length: int, text: str, seed: int, n: int) -> tuple[Render, int]:
        rng, hay = (generator(seed, name, length, n, part) for part in range(2))
        return niah_wording(task, text, rng, hay, join), 2

    return Task(name, build, string_match_all, budget)


def _vt_text(lines: int, letters: int, rng: np.random.Generator) -> tuple[str, list[str]]:
    """The question with that many lines of noise, up to the beginning of the answer; and the variables, its answer."""
    names = distinct(HOPS + 1, lambda: "".join(string.ascii_uppercase[i] for i in rng.integers(26, size=letters)))
    value = int(rng.integers(10_000, 99_999))
    # RULER has a space after the variable's name too
    statements = [f"VAR {names[0]} = {value}", *(f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(HOPS))]
    places = np.sort(rng.permutation(lines)[: len(statements)]).tolist()
    context = _scattered(statements, [NOISE + "\n"] * lines, places)
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + " ".join(context)
        + f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, {len(names)} variables are assgined the value "  # sic
        f"{value}, they are:"
    )
    return text, names


def _vt(length: int, text: str, seed: int, n: int) -> tuple[Render, int]:
    example, answers = _vt_text(VT_SHOT_LINES, 3, generator(seed, "vt", length, n))

    def render(lines: int) -> Wording:
        question, names = _vt_text(lines, 5, generator(seed, "vt", length, n, 1))
        prompt = f"{example} {' '.join(answers)}\n\n\n\n{question}"
        return Wording(prompt, " " + " ".join(names), tuple(names))

    return render, HOPS + 2


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _cwe_text(count: int, common: int, others: int, rng: np.random.Generator) -> tuple[str, list[str]]:
    """The question with `count` different words, ten of them repeated `common` times and the rest `others` times; and
    these ten."""
    vocabulary = max(count, singles())
    chosen = [words()[i] for i in rng.choice(vocabulary, size=count, replace=False)]
    all_words = chosen[:COMMON] * common + chosen[COMMON:] * others
    all_words = [all_words[i] for i in rng.permutation(len(all_words))]
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{_numbered(all_words)}\nQuestion: What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are:"
    )
    return text, chosen[:COMMON]


def _cwe(length: int, text: str, seed: int, n: int) -> tuple[Render, int]:
    shot, repeats = ((20, 3, 1), (6, 1)) if length < SHORT else ((40, 10, 3), (30, 3))
    example, answers = _cwe_text(*shot, generator(seed, "cwe", length, n))

    def render(count: int) -> Wording:
        question, common = _cwe_text(count, *repeats, generator(seed, "cwe", length, n, 1))
        # no space after the colon in the example, so the answer has none
        return Wording(f"{example}{_numbered(answers)}\n{question}", _numbered(common), tuple(common))

    return render, COMMON + 2


def _fwe(length: int, text: str, seed: int, n: int) -> tuple[Render, int]:
    rng = generator(seed, "fwe", length, n)
    size = max(length // TOKENS_PER_CODE, 6)
    letters = string.ascii_lowercase
    codes = distinct(size, lambda: "".join(letters[i] for i in rng.integers(26, size=CODE_LETTERS)))
    codes[0] = "..."  # the most frequent is noise
    frequent = codes[1:4]
    shares = np.arange(1, size + 1) ** -2.0 / (pi**2 / 6)  # a zeta distribution with alpha 2

    def render(count: int) -> Wording:
        all_codes = np.repeat(np.arange(size), (count * shares).astype(int))
        context = " ".join(codes[i] for i in generator(seed, "fwe", length, n, 1).permutation(all_codes))
        prompt = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots "
            "'....'. What are the three most frequently appeared words in the above coded text? Answer: According to "
            "the coded text above, the three most frequently appeared words are:"
        )
        return Wording(prompt, " " + listed(frequent), tuple(frequent))

    return render, LEAST_OF_FWE


TASKS = {
    **{name: niah_task(name, task) for name, task in NIAH.items()},
    "vt": Task("vt", _vt, string_match_all, 30),
    "cwe": Task("cwe", _cwe, string_match_all, 120, most=len(words()), haystack="words to choose from"),
    "fwe": Task("fwe", _fwe, string_match_all, 50),
}
"""The eleven tasks that need no file."""
