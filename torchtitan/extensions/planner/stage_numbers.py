"""The numbers of a stage that decide memory and time, taken from its configuration: what every formula here reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from torchtitan.attention.segments import Segments
from torchtitan.config.checks import accumulation_steps, resolve_shard_degree
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.context_parallel.exchange import kv_received
from torchtitan.distributed.context_parallel.layout import LAYOUTS
from torchtitan.models.transformer import TransformerArgs
from torchtitan.models.work import Checkpointing, Recomputed, checkpointing_of, recomputed_by

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class StageNumbers:
    """A stage on a number of ranks. Numbers are per rank unless a field says otherwise."""

    args: TransformerArgs
    device: Literal["cuda", "cpu"]
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    stream: int
    """Tokens of a micro-batch on all its context-parallel ranks."""

    rows: int
    """Rows of a micro-batch."""

    accumulation: int
    """Micro-batches per step."""

    document: int
    """Length in tokens of the documents in the rows, the same for all."""

    layout: str
    exchange: str

    stored: int
    """Bytes of a stored parameter and of its gradient."""

    state: int
    """Bytes of each of the optimizer's two moments."""

    computed: int
    """Bytes of a gathered parameter and of an activation."""

    foreach: bool
    """The optimizer's kernel makes temporaries as large as the parameters."""

    reshard: bool
    """A block's gathered parameters are freed after its forward."""

    loss_tile: int
    """Bytes of float32 logits at a time."""

    recomputed: Recomputed
    """What backward multiplies a second time, in the whole model."""

    checkpointing: Checkpointing
    """Which blocks backward recomputes, and what those blocks keep."""

    mlp_tile: int | None
    """Tokens per tile of the feed-forward, of this rank's part of the stream; backward recomputes tiles."""

    head_chunks: int
    """In how many parts ulysses exchanges the heads."""

    offload_checkpoints: bool
    """The inputs of recomputed blocks wait in host memory."""

    offload_parameters: bool
    """Parameters, gradients and optimizer state are in host memory."""

    fp8: bool
    """The blocks' linear layers multiply in FP8."""

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def fsdp(self) -> int:
        """How many ranks parameters, gradients and optimizer state are cut over."""
        return self.dp_shard * self.cp

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a context-parallel rank holds."""
        return self.stream // self.cp

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on all ranks."""
        return self.stream * self.accumulation * self.dp_replicate * self.dp_shard

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the documents of a micro-batch end in its stream; the first is 0."""
        row = self.stream // self.rows
        ends = [r * row + end for r in range(self.rows) for end in range(self.document, row, self.document)]
        return tuple(sorted({0, *ends, *range(row, self.stream + 1, row)}))

    @property
    def pairs(self) -> float:
        """(query, key) pairs that the mask allows in a micro-batch on all its ranks; a mean over layers."""
        return _pairs(self.ends, self.args.sliding_window, self.args.sliding_share)

    @property
    def keys(self) -> int:
        """Tokens whose keys and values a rank holds in a layer: its own and received ones, on the rank with most."""
        if self.cp == 1:
            return self.tokens
        if self.exchange != "needed":
            return self.stream
        window = self.args.sliding_window if self.args.sliding_share == 1 else None
        return self.tokens + _received(self.ends, window, self.layout, self.cp)


@lru_cache(maxsize=64)
def _pairs(ends: tuple[int, ...], window: int | None, sliding_share: float) -> float:
    full = Segments.whole(ends).attended_pairs
    if not sliding_share:
        return full
    assert window is not None
    lengths = np.diff(ends)
    inside = np.minimum(lengths, window)  # a document's first tokens see all previous ones, the others `window`
    sliding = int((inside * (inside + 1) // 2 + (lengths - inside) * window).sum())
    return full * (1 - sliding_share) + sliding * sliding_share


@lru_cache(maxsize=64)
def _received(ends: tuple[int, ...], window: int | None, layout: str, cp: int) -> int:
    segments = Segments.whole(ends, window)
    owner = LAYOUTS[layout](Segments.whole(ends), cp)
    return int(kv_received(segments, owner, cp).max())


def numbers_of(
    config: JobConfig,
    args: TransformerArgs,
    world_size: int,
    device: Literal["cuda", "cpu"] = "cuda",
    document: int | None = None,
) -> StageNumbers:
    """The numbers of a stage whose configuration has passed check_config.

    document: length in tokens of all documents; None: one per row, which is the most work.
    """
    p, t = config.parallelism, config.training
    whole = t.seq_len if document is None or config.data.cross_document_attention else min(document, t.seq_len)
    tile = t.mlp_tile_tokens
    return StageNumbers(
        args=args,
        device=device,
        dp_replicate=p.data_parallel_replicate_degree,
        dp_shard=resolve_shard_degree(config, world_size),
        cp=p.context_parallel_degree,
        tp=p.tensor_parallel_degree,
        stream=t.seq_len * t.local_batch_size,
        rows=t.local_batch_size,
        accumulation=accumulation_steps(config, world_size),
        document=whole,
        layout=p.context_parallel_layout,
        exchange=p.context_parallel_exchange,
        stored=BYTES[t.dtype],
        state=BYTES[config.optimizer.state_dtype or t.dtype],
        computed=BYTES[t.mixed_precision_param],
        # moments of another dtype than the parameters' are updated parameter by parameter
        foreach=config.optimizer.implementation == "foreach"
        and config.optimizer.state_dtype in (None, config.training.dtype),
        reshard=p.fsdp_reshard_after_forward,
        loss_tile=t.loss_tile_mib << 20,
        recomputed=recomputed_by(config, args),
        checkpointing=checkpointing_of(config, args),
        mlp_tile=None if tile is None else max(tile // p.tensor_parallel_degree, 1),
        head_chunks=p.context_parallel_head_chunks,
        offload_checkpoints=config.activation_checkpoint.offload,
        offload_parameters=t.enable_cpu_offload,
        fp8=config.quantize.recipe_name != "none",
    )
