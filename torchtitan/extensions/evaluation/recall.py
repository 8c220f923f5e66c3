"""HELMET's four synthetic recall tasks (Yen et al., arXiv 2410.02694; github.com/princeton-nlp/HELMET), made anew.

json_kv is the key-value retrieval of Lost in the Middle (arXiv 2307.03172) with two examples from the same object. The
others are RULER's needles with HELMET's budgets and its line break before the answer.
"""

from __future__ import annotations

import numpy as np

from torchtitan.extensions.evaluation.fitting import Render, Task, Wording, generator
from torchtitan.extensions.evaluation.questions import string_match_all
from torchtitan.extensions.evaluation.ruler import NIAH, drawn, niah_task

SHOTS = 2
DEPTHS = tuple(float(d) for d in np.linspace(0, 1, 6))
"""Depths of the pair that is asked for; the questions of a length take them in turn."""


def _json_kv(length: int, text: str, seed: int, n: int) -> tuple[Render, int]:
    rng = generator(seed, "json_kv", length, n)
    depth = DEPTHS[n % len(DEPTHS)]
    shown = rng.random(SHOTS)
    hay = generator(seed, "json_kv", length, n, 1)
    pairs: list[tuple[str, str]] = []  # grows with the sizes that are tried, and does not depend on them

    def render(size: int) -> Wording:
        while len(pairs) < size:
            pairs.append((drawn("uuids", hay), drawn("uuids", hay)))
        (key, value), *others = pairs[:size]
        first = int(shown[0] * len(others))
        second = (first + 1 + int(shown[1] * (len(others) - 1))) % len(others)  # any other
        examples = "".join(f"Key: {k}\nCorresponding value: {v}\n\n" for k, v in (others[first], others[second]))
        place = round(depth * len(others))
        pairs_shown = [*others[:place], (key, value), *others[place:]]
        lines = ",\n ".join(f'"{k}": "{v}"' for k, v in pairs_shown)
        prompt = (
            f"JSON data:\n{{{lines}}}\n\nExtract the value corresponding to the specified key in the JSON object below."
            f"\n\n{examples}Key: {key}\nCorresponding value:"
        )
        return Wording(prompt, f" {value}", (value,), depth)

    return render, 1 + SHOTS


TASKS = {
    "niah_mk_2": niah_task("niah_mk_2", NIAH["niah_multikey_2"], budget=50, join="\n"),
    "niah_mk_3": niah_task("niah_mk_3", NIAH["niah_multikey_3"], budget=100, join="\n"),
    "niah_mv": niah_task("niah_mv", NIAH["niah_multivalue"], budget=50, join="\n"),
    "json_kv": Task("json_kv", _json_kv, string_match_all, 100),
}
