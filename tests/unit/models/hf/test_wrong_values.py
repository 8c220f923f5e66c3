"""Values that no config.json should have: refused in one sentence, or read as transformers reads them.

Each of the 60 random configurations gets wrong values at places that are drawn with a fixed seed. What transformers 5
refuses may be read if its meaning is plain: null or an empty list for a missing key, text for a number, a YaRN without
a factor for one whose factor is null.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.unit.models.hf.random_configs import COUNT, TYPES, Case, random_case
from tests.unit.models.hf.readings import Facts, differences, here, in_transformers
from torchtitan.tools.errors import UserError

KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
)
MISSING = object()
VALUES = (MISSING, None, 0, -1, 1, 3, 1.5, 1e-30, 100_000, True, False, "4", "4.0", "abc", "", [], [4], {})
VALUES += (float("inf"), float("nan"), {"factor": 2.0}, ["full_attention", "sliding_attention"])
PER_CASE = 12


def places(case: Case) -> list[tuple[str, ...]]:
    """Paths of keys, those within the RoPE's tables too; without two where transformers 5 is known to differ from 4."""
    kind = case.config["model_type"]
    # 5 refuses a Llama whose width is no multiple of its heads, whatever its head_dim
    other = {"hidden_size", "num_attention_heads"} if kind == "llama" else set()
    if kind == "olmo3" and "rope_parameters" not in case.config:
        other = {"rope_theta"}  # 5 has it in the full-attention layers alone; the reader says so
    found: list[tuple[str, ...]] = [(key,) for key in KEYS if key not in other]
    for table in ("rope_scaling", "rope_parameters"):
        for key, value in (case.config.get(table) or {}).items():
            found += [(table, key), *((table, key, inner) for inner in (value if isinstance(value, dict) else ()))]
    return found


def with_value(config: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    table = config
    for key in place[:-1]:
        table = table[key]
    table.pop(place[-1], None)
    if value is not MISSING:
        table[place[-1]] = value
    return config


def plain(value: Any, key: str, heads: Any) -> Any:
    """What a value plainly means, in the type that transformers asks for."""
    if value is MISSING:
        return None if key == "factor" else value
    if value is None and key == "num_key_value_heads":
        return heads  # as transformers 4 has it for every type
    if value is None or value in ([], {}):
        return MISSING
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
        value = int(value) if value == int(value) else value
    return float(value) if key == "rms_norm_eps" and not isinstance(value, bool) else value


def facts(read: Any, folder: Path, config: dict[str, Any], case: Case) -> Facts:
    (folder / "config.json").write_text(json.dumps(config))
    return read(folder, (case.original - 3, 3 * case.original))


def problem(case: Case, place: tuple[str, ...], value: Any, folder: Path) -> str | None:
    """What is wrong about our reading, if something is."""
    wrong = with_value(case.config, place, value)
    try:
        ours = facts(here, folder, wrong, case)
    except UserError as e:
        return None if "\n" not in str(e) and "config.json" in str(e) else f"not a sentence that names the file: {e}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    try:
        theirs = facts(in_transformers, folder, wrong, case)
    except Exception as refusal:
        means = plain(value, place[-1], case.config["num_attention_heads"])
        if means is value:
            return f"read, and refused by transformers: {str(refusal)[-150:]}"
        theirs = facts(in_transformers, folder, with_value(case.config, place, means), case)
    return "; ".join(differences(theirs, ours)) or None


@pytest.mark.parametrize("kind", TYPES)
def test_wrong_values_are_refused_or_read_as_transformers_reads_them(kind: str, tmp_path: Path):
    draw, found, tried = random.Random(kind), [], 0
    for case in (random_case(number) for number in range(TYPES.index(kind), COUNT, len(TYPES))):
        for _ in range(PER_CASE):
            place, value = draw.choice(places(case)), draw.choice(VALUES)
            tried += 1
            if what := problem(case, place, value, tmp_path):
                shown = "missing" if value is MISSING else json.dumps(value)
                found.append(f"{case.name}: {'.'.join(place)} = {shown}: {what}")
    assert tried == PER_CASE * COUNT / len(TYPES)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("number", "place", "value", "named"),
    [
        (24, ("rope_scaling", "truncate"), None, "transformers computes as if it were false"),
        (51, ("rope_scaling", "original_max_position_embeddings"), 1, "embeddings = 1 must be .* at least 2"),
        (11, ("rope_parameters", "sliding_attention"), "", 'sliding_attention = "" must be an object'),
        (11, ("rope_parameters", "full_attention"), False, "full_attention = false must be an object"),
    ],
)
def test_what_drawn_values_found(number: int, place: tuple[str, ...], value: Any, named: str, tmp_path: Path):
    """YaRN's null was read as true, LongRoPE divided by 0, and what is no table was read as if it were missing."""
    case = random_case(number)
    with pytest.raises(UserError, match=named):
        facts(here, tmp_path, with_value(case.config, place, value), case)
