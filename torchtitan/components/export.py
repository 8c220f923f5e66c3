"""A checkpoint out as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

SHARD_BYTES = 5 * 10**9


def export(
    checkpoint: Path,
    out: Path,
    dtype: str | None,
    assets: Path | None = None,
    *,
    part: int = 0,
    parts: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model of a step-N folder as a Hugging Face folder.

    dtype: "float32", "bfloat16" or "float16"; None: as saved. assets: the folder whose config.json is started from and
    whose tokenizer files are copied. No collectives: each of `parts` processes writes every parts-th shard file into
    out.partial/, part 0 all else; after a barrier, one of them calls publish(out). With parts = 1 that is done here.
    """
    raise NotImplementedError


def publish(out: Path) -> None:
    """Once all parts have been written: check that they are all there, and rename out.partial/ to out/."""
    raise NotImplementedError
