"""What [data] says about the rows of a stage, as values to compare: the one definition of "the same data".

The keys of the schema say which of them decide rows. Plan.inputs adds what only the files say (fingerprints of the
documents); components/changes.py compares. Read without PyTorch and without the files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torchtitan.config.data_schema import Data, Source
from torchtitan.config.keys import Decision, keys_of


def keys_that_decide(table: Any, *decisions: Decision) -> dict[str, Any]:
    """Key -> value, as in JSON, of the keys of a table of the configuration that decide one of these."""
    values = {name: getattr(table, name) for name, key in keys_of(table.__class__).items() if key.decides in decisions}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def data_keys(data: Data) -> dict[str, Any]:
    """The keys of [data] that decide the rows, except its sources and what nothing reads under the other keys; and,
    with strategy = "domain_upsampling", the sum of the sources' weights."""
    values = keys_that_decide(data, "rows")
    raised = any(source.upsample is not None or source.upsample_to is not None for source in data.sources)
    by_length = data.strategy in ("per_source_upsampling", "global_upsampling")
    by_domain = data.strategy == "domain_upsampling"
    read = {
        "sources": False,
        "long_threshold": raised or by_length,
        "long_share": by_length,
        "upsampled_sources": by_domain,
        "upsampled_weight": by_domain,
    }
    result = {name: value for name, value in values.items() if read.get(name, True)}
    if by_domain:  # upsampled_weight stands beside the weights as they are, of which shares() are compared
        result["sum_of_weights"] = round(math.fsum(source.weight for source in data.sources), 12)
    return result


def source_options(source: Source, *decisions: Decision) -> dict[str, Any]:
    """The keys of a source that decide one of these and are set, except its name and its weight (shares() has that)."""
    default = Source()
    options = keys_that_decide(source, *decisions)
    return {k: v for k, v in options.items() if v != getattr(default, k) and k not in ("name", "weight")}


def shares(data: Data) -> list[float]:
    """The shares of the sources in the tokens, as their weights say."""
    return normalize([source.weight for source in data.sources])


def normalize(weights: Sequence[float]) -> list[float]:
    """The weights with a sum of 1; rounded, so that 1 to 2 and 0.3 to 0.6 are the same on every machine."""
    total = math.fsum(weights) or 1.0
    return [round(weight / total, 12) for weight in weights]
