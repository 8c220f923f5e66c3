"""What [data] says about the rows of a stage, as values to compare: the one definition of "the same data".

The keys of the schema say which of them decide rows. Plan.inputs adds what only the files say (fingerprints of the
documents); components/changes.py compares. Read without PyTorch and without the files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

from torchtitan.config.data_schema import Data, Source
from torchtitan.config.keys import Decision, keys_of
from torchtitan.datasets.curriculum import schedule_steps, weights_at


def keys_that_decide(table: Any, *decisions: Decision) -> dict[str, Any]:
    """Key -> value, as in JSON, of the keys of a table of the configuration that decide one of these."""
    values = {name: getattr(table, name) for name, key in keys_of(table.__class__).items() if key.decides in decisions}
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    """Tuples as lists, and tables in them as dictionaries of the keys that are set."""
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _as_json(of) for key, of in vars(value).items() if of not in (None, ())}
    return value


BY_LENGTH = ("per_source_upsampling", "global_upsampling")
"""The strategies that tell long documents from short ones in every source."""


def reads_threshold(source: Source, data: Data) -> bool:
    """Whether the long documents of a source are told from its short ones."""
    return source.upsample is not None or source.upsample_to is not None or data.strategy in BY_LENGTH


def data_keys(data: Data) -> dict[str, Any]:
    """The keys of [data] that decide the rows, except its sources and what nothing reads under the other keys; and,
    with strategy = "domain_upsampling", the sum of the sources' weights."""
    values = keys_that_decide(data, "rows")
    by_length = data.strategy in BY_LENGTH
    by_domain = data.strategy == "domain_upsampling"
    read = {
        "sources": False,
        "long_threshold": any(reads_threshold(s, data) and s.long_threshold is None for s in data.sources),
        "long_share": by_length,
        "upsampled_sources": by_domain,
        "upsampled_weight": by_domain,
        "changed_at_step": data.changed_at_step > 0,
    }
    result = {name: value for name, value in values.items() if read.get(name, True)}
    if by_domain:  # upsampled_weight stands beside the weights as they are, of which shares() are compared
        result["sum_of_weights"] = round(math.fsum(source.weight for source in data.sources), 12)
    return result


def source_options(source: Source, *decisions: Decision) -> dict[str, Any]:
    """The keys of a source that decide one of these and are set, except its name and weights, which shares() has."""
    source = replace(source, schedule=tuple(replace(p, weight=None) for p in source.schedule if p.length_shares))
    if source.long_document == "split":  # as if it were unset
        source = replace(source, long_document=None)
    options, default = (keys_that_decide(table, *decisions) for table in (source, Source()))
    return {k: v for k, v in options.items() if v != default[k] and k not in ("name", "weight")}


def shares(data: Data) -> list[Any]:
    """The shares of the sources in the tokens, as their weights say: a number or, by a schedule, [[step, weight], ...].

    What is scaled to 1 is the sum of the weights at the first point of the schedules.
    """
    weights = weights_at(data, min(schedule_steps(data), default=0))
    total = math.fsum(weights) or 1.0
    moving = [[[p.step, round(p.weight / total, 12)] for p in s.schedule if p.weight is not None] for s in data.sources]
    return [points or share for points, share in zip(moving, normalize(weights))]


def normalize(weights: Sequence[float]) -> list[float]:
    """The weights with a sum of 1; rounded, so that 1 to 2 and 0.3 to 0.6 are the same on every machine."""
    total = math.fsum(weights) or 1.0
    return [round(weight / total, 12) for weight in weights]
