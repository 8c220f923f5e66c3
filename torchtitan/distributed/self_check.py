"""Before a job spends anything: does its very combination of parallelism compute what one process would?

A model of the job's heads and RoPE but few layers and narrow matrices is built by the job's own functions (backend,
layout, exchange, degrees, recomputation, compile) and given small ragged random batches. Its losses and gradients are
compared with the same model in one process under an explicit mask, and one token is changed to see who moves. A job
whose results would be silently wrong does not start, and says which property failed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan.attention.backends import choose_backend
from torchtitan.attention.segments import Segments
from torchtitan.config.schema import JobConfig, Quantize
from torchtitan.datasets.batch import PackedBatch
from torchtitan.datasets.positions import reset_positions
from torchtitan.distributed.context_parallel import shard as sharding
from torchtitan.distributed.fully_shard import reduce_over_replicas
from torchtitan.distributed.options.quantize import MULTIPLE, apply_quantize, fp8_layers
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.parallelize import build_sharded_model
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights
from torchtitan.tools.constants import BLOCK, IGNORED_LABEL
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

BLOCKS_A_RANK = 2
WINDOW = 100
"""The sliding window of the small model, if the job's own is not shorter: less than a block, less than a document."""
LONGEST_FOR_DENSE = 4096
"""Tokens up to which the oracle writes out its mask; beyond, it goes document by document (sdpa)."""
FP8_TOLERANCE = {"rowwise": 2e-2, "tensorwise": 8e-2}
"""Against FP8 emulated on one process, where a tensor has one scale; each rank has its own for its part. Measured on 2
and 4 ranks, token losses differ by up to 0.12 nats then. What is wrong by a factor of 2 is still seen."""

TrainMicroBatch = Callable[[Transformer, sharding.LocalBatch, float], torch.Tensor]


def run_self_check(
    args: TransformerArgs,
    config: JobConfig,
    dims: ParallelDims,
    device: torch.device,
    cpu_group: dist.ProcessGroup,
    accumulation: int,
    train_micro_batch: TrainMicroBatch,
) -> None:
    """Collective. UserError on all ranks if a property does not hold on some rank."""
    began = time.perf_counter()
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(
        failures, _first_failure(args, config, dims, device, cpu_group, accumulation, train_micro_batch), cpu_group
    )
    torch.compiler.reset()  # else the job's own lengths would be seen as changed ones and be compiled as dynamic
    # A leak into another document is the better explanation of a wrong loss, and perhaps another rank has seen it.
    failed = sorted(
        ((rank, failure) for rank, failure in enumerate(failures) if failure),
        key=lambda found: not found[1].startswith("perturbation"),
    )
    p = config.parallelism
    sizes = ", ".join(f"{name} {dims.size(name)}" for name in ("dp_replicate", "dp_shard", "cp", "tp"))
    combination = f"{sizes}, backend {choose_backend(config.model.attention_backend, device.type)}"
    if dims.size("cp") > 1:
        combination += f", layout {p.context_parallel_layout}, exchange {p.context_parallel_exchange}"
    if config.compile.enable:
        combination += ", compiled"
    if config.quantize.recipe_name != "none":
        combination += f", FP8 {config.quantize.recipe_name}"
    if failed:
        raise UserError(
            f"The self-check failed, so training would be silently wrong: {failed[0][1]} (on {len(failed)} of "
            f"{len(failures)} ranks, this on rank {failed[0][0]}; {combination}). This is a fault of the software, "
            "not of your data: please report it. parallelism.self_check = false starts anyway."
        )
    logger.info(f"self-check passed in {time.perf_counter() - began:.1f} s: {combination}")


def _first_failure(
    args: TransformerArgs,
    config: JobConfig,
    dims: ParallelDims,
    device: torch.device,
    cpu_group: dist.ProcessGroup,
    accumulation: int,
    train_micro_batch: TrainMicroBatch,
) -> str | None:
    cp, tp, p = dims.size("cp"), dims.size("tp"), config.parallelism
    backend = choose_backend(config.model.attention_backend, device.type)
    # float32 shows more; the varlen kernel does not know it
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if backend == "varlen" else "float32"
    tolerance = 5e-2 if backend == "varlen" else 1e-3 if device.type == "cuda" else 1e-4
    small = replace(args, dim=64, n_layers=2, ffn_dim=32 * tp, vocab_size=64 * tp, **_two_layers(args))
    training = replace(config.training, mixed_precision_param=dtype, dtype="float32")
    config = replace(config, training=training)
    model = build_sharded_model(small, replace(config, quantize=Quantize()), dims, device)
    init_weights(model, seed=1)

    def sharded(batch: PackedBatch) -> sharding.LocalBatch:
        return sharding.shard(
            batch,
            backend,
            p.context_parallel_layout,
            p.context_parallel_exchange,
            cp,
            dims.cp_rank,
            small.sliding_window,
            small.sliding_share,
        )

    blocks = BLOCK * BLOCKS_A_RANK
    total = cp * math.lcm(blocks, tp)  # sequence parallelism divides a rank's tokens once more
    rng = np.random.default_rng([dims.dp_rank, 2026])
    anchors = config.data.anchor_attention
    batches = [_random_batch(rng, total, small.vocab_size, anchors) for _ in range(min(accumulation, 2))]
    # which tokens of each stream are this rank's: they are numbered instead of drawn
    mine = [sharded(replace(batch, tokens=torch.arange(total))).tokens for batch in batches]
    oracle = _Oracle(small, device, "dense" if total <= LONGEST_FOR_DENSE else "sdpa")

    def run(batches: list[PackedBatch]) -> tuple[list[torch.Tensor], float]:
        """This rank's token losses of each micro-batch, and the divisor."""
        valid = torch.tensor(sum(sharded(batch).num_valid for batch in batches) * dims.counts_here)
        dist.all_reduce(valid, group=cpu_group)
        model.zero_grad()
        losses = []
        for i, batch in enumerate(batches):
            reduce_over_replicas(model, i == len(batches) - 1)
            losses.append(train_micro_batch(model, sharded(batch).to(device), float(valid)))
        return losses, float(valid)

    first, here = run(batches)[0], mine[0]

    def moved_by(*changed: int) -> torch.Tensor:
        """bool [t]: which of this rank's outputs move when these tokens of the first stream do."""
        tokens = batches[0].tokens.clone()
        tokens[list(changed)] = (tokens[list(changed)] + 1) % small.vocab_size
        return (run([replace(batches[0], tokens=tokens), *batches[1:]])[0][0] != first[0]).cpu()

    start, at, end = _token_to_change(batches[0])
    # and the document's last one, which a mask that is one token too wide would show to the next document
    moved = moved_by(at, end - 1)
    reach = end
    if small.sliding_window is not None and small.sliding_share == 1:  # each layer carries it one window on
        reach = min(end, at + small.n_layers * (small.sliding_window - 1) + 1)
    wrong = moved & ((here < at) | (here >= reach)) & (here != end - 1)
    failure = None
    if wrong.any():
        other = int(here[wrong][0])
        failure = (
            f"perturbation: changing token {at} of the document at {start} to {end} moved token {other}, which must "
            "not see it"
        )
    elif ((here == at) & ~moved).any():
        failure = f"perturbation: changing token {at} did not move its own output"
    if batches[0].anchor is not None:
        moved, row_end = moved_by(0), int(batches[0].cu_seqlens[1:][batches[0].anchor == 0].max())
        if (moved & (here >= row_end)).any():
            other = int(here[moved & (here >= row_end)][0])
            failure = failure or f"perturbation: changing the anchor of a row, token 0, moved token {other} of another"
        elif ((here == start) & ~moved).any():
            failure = failure or f"perturbation: changing the anchor of a row, token 0, did not move its token {start}"
    cases = {"the losses and gradients": batches}
    if dims.dp_degree * cp > 1:  # else there would be no label at all
        masked = [_without_labels(batch, tokens, dims, cpu_group) for batch, tokens in zip(batches, mine, strict=True)]
        cases["with a rank whose labels are all masked, the losses and gradients"] = masked
    for what, case in cases.items():
        found = _compare(what, case, run, oracle, model, mine, dims, cpu_group, tolerance)
        failure = failure or found
    # FP8 last: its roundings would hide what is wrong otherwise
    quantize = replace(config.quantize, smallest_features=MULTIPLE, filter_fqns=())
    if quantize.recipe_name != "none" and any(fp8_layers(small, quantize, tp).values()):
        model = build_sharded_model(small, replace(config, quantize=quantize), dims, device)
        init_weights(model, seed=1)
        oracle.quantize(replace(quantize, emulate=True))
        what, tolerance = "FP8: the losses and gradients", FP8_TOLERANCE[quantize.recipe_name]
        found = _compare(what, batches, run, oracle, model, mine, dims, cpu_group, tolerance)
        failure = failure or found
    return failure


def _compare(
    what: str,
    batches: list[PackedBatch],
    run: Callable[[list[PackedBatch]], tuple[list[torch.Tensor], float]],
    oracle: _Oracle,
    model: Transformer,
    mine: list[torch.Tensor],
    dims: ParallelDims,
    cpu_group: dist.ProcessGroup,
    tolerance: float,
) -> str | None:
    """Collective: all ranks come to the end of it, whatever they find."""
    ours, valid = run(batches)
    theirs = oracle.run(batches, valid)
    failure = None
    for a, b, tokens in zip(ours, theirs, mine, strict=True):
        error = (a.cpu() - b.cpu()[tokens]).abs()
        if not float(error.max()) <= tolerance * 5:  # losses are about 4 nats
            worst = int(error.argmax())
            failure = (
                f"parity: {what} differ from one process's: token {int(tokens[worst])} has a loss of "
                f"{float(a[worst]):.5f} instead of {float(b[tokens[worst]]):.5f}"
            )
    copies = dims.size("cp") * dims.size("tp")  # ranks that computed the same batch in their oracle
    for name, param in model.named_parameters():
        gradient = param.grad
        assert gradient is not None
        device = gradient.device
        expected = oracle.gradient(name).double().cpu()
        dist.all_reduce(expected, group=cpu_group)
        expected /= copies
        if isinstance(gradient, DTensor):  # shards are compared with shards
            mesh, placements = gradient.device_mesh, gradient.placements
            expected = distribute_tensor(expected.to(device), mesh, placements, src_data_rank=None).to_local().cpu()
            gradient = gradient.to_local()
        got = gradient.double().cpu()
        sums = torch.stack([(got - expected).square().sum(), expected.square().sum(), (got * expected).sum()])
        dist.all_reduce(sums, group=cpu_group)
        norm = max(float(sums[1].sqrt()), 1e-6)  # the floor is for parameters whose gradient is about zero
        error_norm = float(sums[0].sqrt()) / norm
        if failure is None and not error_norm <= tolerance * 10:
            ratio = float(sums[2]) / norm**2
            # |got - ratio expected|^2 out of the same sums
            rest = float(sums[0]) - (1 - ratio) ** 2 * norm**2
            if rest <= (tolerance * 10 * norm) ** 2:
                failure = f"loss scale: the gradient of {name} is {ratio:.4f} times that of one process"
            else:
                failure = f"parity: {what} differ from one process's: {name} has a relative error of {error_norm:.1e}"
    return failure


class _Oracle:
    """The same model on one process, in float32, without any parallelism."""

    def __init__(self, args: TransformerArgs, device: torch.device, backend: str):
        self.model = Transformer(args, backend).to(device)
        init_weights(self.model, seed=1)
        self.parameters = dict(self.model.named_parameters())
        self.device = device

    def quantize(self, quantize: Quantize) -> None:
        """Compute in FP8 from now on."""
        apply_quantize(self.model, quantize, tp=1)

    def run(self, batches: list[PackedBatch], valid: float) -> list[torch.Tensor]:
        """Token losses of whole micro-batches, float32 [T] each; gradients of their sum over valid."""
        self.model.zero_grad()
        losses = []
        for batch in batches:
            anchor = None if batch.anchor is None else batch.anchor.numpy().astype(np.int64)
            segments = Segments.whole(batch.cu_seqlens, anchor=anchor)  # the model adds that of its sliding layers
            on_device = batch.to(self.device)
            logits = self.model(on_device.tokens, on_device.positions, segments, on_device.long)
            loss = torch.nn.functional.cross_entropy(
                logits, on_device.labels, ignore_index=IGNORED_LABEL, reduction="none"
            )
            (loss.sum() / valid).backward()
            losses.append(loss.detach())
        return losses

    def gradient(self, name: str) -> torch.Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None
        return gradient


def _two_layers(args: TransformerArgs) -> dict[str, Any]:
    """One layer of each kind that the model has, with a window that the small batches exceed."""
    if args.sliding_window is None:
        return {"layer_types": ()}
    other = "full_attention" if args.sliding_share < 1 else "sliding_attention"
    return {"layer_types": ("sliding_attention", other), "sliding_window": min(args.sliding_window, WINDOW)}


def _random_batch(rng: np.random.Generator, total: int, vocab_size: int, anchors: bool) -> PackedBatch:
    """Ragged documents: one of more than half of the tokens, others down to a single token.

    anchors: the documents up to that one are a row, those after it another; the last token is as padding, without one.
    """
    long = total // 2 + int(rng.integers(1, total // 8))
    before = int(rng.integers(2, total - long - 2))
    cuts = rng.integers(1, before, size=3), before + long + rng.integers(1, total - long - before, size=3)
    cu = np.unique(np.concatenate([*cuts, [0, 1, before, before + long, total - 1, total]]))
    tokens = rng.integers(0, vocab_size, total)
    labels = np.append(tokens[1:], IGNORED_LABEL)
    labels[cu[1:] - 1] = IGNORED_LABEL
    cu32 = torch.from_numpy(cu.astype(np.int32))
    anchor = np.where(cu[:-1] < before + long, 0, before + long)
    anchor[-1] = -1
    return PackedBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(reset_positions(np.diff(cu))),
        cu32,
        cu32,
        torch.zeros(len(cu) - 1, dtype=torch.int16),
        long=torch.arange(total) < total // 2,  # read by LongRoPE only
        anchor=torch.from_numpy(anchor.astype(np.int32)) if anchors else None,
    )


def _token_to_change(batch: PackedBatch) -> tuple[int, int, int]:
    """Start of the longest document, a token of it, and its end."""
    lengths = batch.cu_documents.diff()
    document = int(lengths.argmax())
    start, end = int(batch.cu_documents[document]), int(batch.cu_documents[document + 1])
    return start, start + (end - start) // 3, end


def _without_labels(
    batch: PackedBatch, mine: torch.Tensor, dims: ParallelDims, cpu_group: dist.ProcessGroup
) -> PackedBatch:
    """Collective. No label on the tokens of context-parallel rank 0 of data-parallel rank 0."""
    gathered: list[tuple[int, int, torch.Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (dims.dp_rank, dims.cp_rank, mine), cpu_group)
    labels = batch.labels.clone()
    for entry in gathered:
        assert entry is not None
        if entry[:2] == (0, 0) and dims.dp_rank == 0:
            labels[entry[2]] = IGNORED_LABEL
    return replace(batch, labels=labels)
