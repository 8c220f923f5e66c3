"""The numbers of a stage that decide memory and time, out of its configuration: what every formula here reads."""

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
from torchtitan.models.work import Recomputed, checkpointing_of, recomputed_by

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class StageNumbers:
    """A stage on so many ranks. Everything is of one rank unless it says otherwise."""

    args: TransformerArgs
    device: Literal["cuda", "cpu"]
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    stream: int
    """Tokens of a micro-batch, over its context-parallel ranks."""

    rows: int
    """Rows of a micro-batch."""

    accumulation: int
    """Micro-batches of a step."""

    document: int
    """Length of the documents that the rows are made of, all alike."""

    layout: str
    exchange: str

    stored: int
    """Bytes of a stored parameter and of its gradient."""

    state: int
    """Bytes of each of the optimizer's two moments."""

    computed: int
    """Bytes of a parameter as it is gathered, and of an activation."""

    foreach: bool
    """The optimizer's kernel makes a list of temporaries of the parameters' size."""

    reshard: bool
    """A block's gathered parameters are freed after its forward."""

    loss_tile: int
    """Bytes of logits in float32 at a time."""

    recomputed: Recomputed
    """What backward multiplies a second time, over the whole model."""

    recomputed_blocks: float
    """Share of the blocks of which backward computes anew what it needs."""

    keeps_attention: bool
    """But for the output of their attention, and for every n-th of their matrix products:"""

    kept_products: int
    """n; 0: none is kept."""

    mlp_tile: int | None
    """Tokens that the feed-forward takes at a time, recomputed in backward, on this rank's part of the stream."""

    head_chunks: int
    """ulysses: parts in which the heads are exchanged."""

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
        """Ranks that parameters, gradients and optimizer state are cut over."""
        return self.dp_shard * self.cp

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a context-parallel rank holds."""
        return self.stream // self.cp

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.stream * self.accumulation * self.dp_replicate * self.dp_shard

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the documents of a micro-batch end, from 0 on."""
        row = self.stream // self.rows
        ends = [r * row + end for r in range(self.rows) for end in range(self.document, row, self.document)]
        return tuple(sorted({0, *ends, *range(row, self.stream + 1, row)}))

    @property
    def pairs(self) -> float:
        """(query, key) pairs that the mask allows in a micro-batch, over its ranks; a mean over layers."""
        return _pairs(self.ends, self.args.sliding_window, self.args.sliding_share)

    @property
    def keys(self) -> int:
        """Tokens whose keys and values a rank has in a layer at once: its own and those that come; the worst rank."""
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
    inside = np.minimum(lengths, window)  # a document's first tokens see all before them, the others `window`
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
    """The numbers of a stage that check_config has let pass; document: None for one a row, the most work."""
    p, t, kept = config.parallelism, config.training, checkpointing_of(config, args)
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
        # moments of another type than the parameters' are updated parameter by parameter
        foreach=config.optimizer.implementation == "foreach"
        and config.optimizer.state_dtype in (None, config.training.dtype),
        reshard=p.fsdp_reshard_after_forward,
        loss_tile=t.loss_tile_mib << 20,
        recomputed=recomputed_by(config, args),
        recomputed_blocks=kept.blocks,
        keeps_attention=kept.keeps_attention,
        kept_products=kept.kept_products,
        mlp_tile=None if tile is None else max(tile // p.tensor_parallel_degree, 1),
        head_chunks=p.context_parallel_head_chunks,
        offload_checkpoints=config.activation_checkpoint.offload,
        offload_parameters=t.enable_cpu_offload,
        fp8=config.quantize.recipe_name != "none",
    )
