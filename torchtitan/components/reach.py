"""How far a stage's positions reach, and how far those of its weights have. Read without PyTorch."""

from __future__ import annotations

from typing import Any

from torchtitan.config.manager import from_tables
from torchtitan.config.schema import JobConfig
from torchtitan.tools.constants import CUT_AT


def reach(config: JobConfig) -> int:
    """One more than the largest position of the stage: data.target_seq_len; training.seq_len; or less, if positions
    begin anew in each document and every source bounds its documents (max_length, chunk_length)."""
    data, length = config.data, config.training.seq_len
    if data.target_seq_len:
        return data.target_seq_len
    if data.positions != "reset" or not data.sources:
        return length
    bounds = [min(s.max_length or length, s.chunk_length or length) for s in data.sources if not s.separator]
    longest = max(bounds) if len(bounds) == len(data.sources) else length
    return min(length, longest, CUT_AT.get(data.strategy, length))


def trained_length(manifest: dict[str, Any]) -> int | None:
    """The length in tokens that the weights of a checkpoint have been trained to, in this stage or before it; None: not
    known.

    The architecture's max_position_embeddings is not enough: it is that of the published model, also if a stage has
    begun with random weights and shorter rows.
    """
    own: int | None = manifest["architecture"]["rope"].get("max_position_embeddings")
    if not manifest.get("config"):
        return own
    config = from_tables(manifest["config"])
    stages = manifest.get("stages_before")
    before = stages[-1]["rope"] if stages else manifest.get("rope_before")
    random = not (config.stage.after or config.checkpoint.initial_load_path or config.checkpoint.initial_load_in_hf)
    if before is None and not random:
        return own
    return longest_trained(config, (before or {}).get("max_position_embeddings"))


def longest_trained(config: JobConfig, before: int | None) -> int:
    """The length that weights trained to `before` (None: random) are trained to after the stage."""
    return max(reach(config), before or 0)
