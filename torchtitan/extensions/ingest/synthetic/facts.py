"""Facts that stand somewhere in a long text, and questions about them: needles, and variables that are set to others.

needle: a name and its value. needle_keys: several names, one is asked for. needle_values: several values of one name,
all are asked for. needle_queries: several names, several are asked for. variables: chains of settings; asked is which
variables hold a value. RULER's tasks of these kinds (arXiv 2404.06654) have other words, names and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchtitan.extensions.ingest.synthetic.hay import Encode, Hay, Piece, size
from torchtitan.extensions.ingest.synthetic.words import distinct, identifier, name, number, variable

FORMS = (  # how a fact is told, and asked for
    ("The catalogue lists {value} as the entry for {key}.", "What does the catalogue list as the entry for {keys}?"),
    ("In the ledger, {key} is filed under {value}.", "Under what is {keys} filed in the ledger?"),
    ("Whoever asks after {key} is shown to box {value}.", "Which box is shown to whoever asks after {keys}?"),
)
MANY_VALUES = " There are several answers: give them in the order of the pages."
MANY_NAMES = " Give an answer for each, one after the other."
INTRO = "Read the following pages with care: some of their sentences matter later.\n\n"


def needles(
    keys: int, values: int, queries: int, rng: np.random.Generator, hay: Hay, encode: Encode, room: int
) -> list[Piece] | None:
    """A document with `keys` names of `values` values each, of which `queries` names are asked for."""
    names = distinct(keys, lambda: name(rng))
    draw = (number, identifier)[rng.integers(2)]
    told = distinct(keys * values, lambda: draw(rng))
    facts = [(names[i // values], told[i]) for i in rng.permutation(keys * values)]
    asked = [names[i] for i in rng.permutation(keys)[:queries]]
    answers = [value for one in asked for key, value in facts if key == one]
    form, ask = FORMS[rng.integers(len(FORMS))]
    more = MANY_VALUES if values > 1 else MANY_NAMES if queries > 1 else ""
    question = f"Question: {ask.format(keys=' and of '.join(asked))}{more}\nAnswer:"
    statements = [form.format(key=key, value=value) for key, value in facts]
    return _document(statements, [*names, *told], question, f" {'; '.join(answers)}", rng, hay, encode, room)


def variables(rng: np.random.Generator, hay: Hay, encode: Encode, room: int) -> list[Piece] | None:
    """A document with one to three chains of variables; asked for are those of one of them."""
    chains, hops = int(rng.integers(1, 4)), int(rng.integers(2, 6))
    names = distinct(chains * hops, lambda: variable(rng))
    values = distinct(chains, lambda: number(rng))
    statements: list[str] = []
    reached = [0] * chains
    for chain in rng.permutation(np.repeat(np.arange(chains), hops)).tolist():  # each in order, among the others
        mine, hop = names[chain * hops : (chain + 1) * hops], reached[chain]
        to = f"what {mine[hop - 1]} holds" if hop else values[chain]
        statements.append(f"Now {mine[hop]} is set to {to}.")
        reached[chain] += 1
    question = f"Question: Which variables hold {values[0]}, in the order in which they were set?\nAnswer:"
    return _document(statements, [*names, *values], question, f" {', '.join(names[:hops])}", rng, hay, encode, room)


def _document(
    facts: Sequence[str],
    unique: Sequence[str],
    question: str,
    answer: str,
    rng: np.random.Generator,
    hay: Hay,
    encode: Encode,
    room: int,
) -> list[Piece] | None:
    """The facts in a haystack, in their order, then the question; None if the haystack holds one of `unique`."""
    intro, asked, answered = encode.begin(INTRO), encode([question]), encode.answer(answer)
    ways = [encode([f" {fact}", f"{fact}\n", f"{fact}\n\n"]) for fact in facts]  # in a line, and on one of its own
    left = room - size([*intro, *asked, *answered]) - sum(max(len(p.ids) for p in way) for way in ways)
    text = hay.take(left)
    if not text or any(part in "".join(piece.text for piece in text) for part in unique):
        return None
    before = ["\n", *(piece.text for piece in text)]
    places = [i for i, piece in enumerate(text) if piece.text[0] == " " or before[i][-1] == "\n"]
    chosen = np.sort(rng.choice([*places, len(text)], len(facts)))
    mixed: list[Piece] = []
    last = 0
    for place, (inside, line, at_end) in zip(chosen.tolist(), ways):
        mixed += text[last:place]
        mixed.append(at_end if place == len(text) else inside if text[place].text[0] == " " else line)
        last = place
    return [*intro, *mixed, *text[last:], *asked, *answered]
