"""Before a job spends anything: does its very combination of parallelism compute what one process would?

A model of the job's heads and RoPE but few layers and narrow matrices is built by the job's own functions (backend,
layout, exchange, degrees, recomputation, compile) and given small ragged random batches. A job whose results would be
silently wrong does not start, and says which property failed:

- perturbation: a changed token moves its own output, and nothing that must not see it;
- parity: losses and gradients equal those of the oracle, the same model on one process under an explicit mask.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan.attention.backends import choose_backend
from torchtitan.attention.segments import Segments
from torchtitan.config.schema import JobConfig, Quantize
from torchtitan.datasets.batch import PackedBatch
from torchtitan.datasets.positions import reset_positions
from torchtitan.distributed.context_parallel.local_batch import LocalBatch, local_batch
from torchtitan.distributed.fully_shard import reduce_over_replicas
from torchtitan.distributed.options.quantize import MULTIPLE, apply_quantize, fp8_layers
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.parallelize import build_sharded_model
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights
from torchtitan.tools.constants import BLOCK, IGNORED_LABEL
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

BLOCKS_PER_RANK = 2
WINDOW = 100
"""The sliding window of the small model, if the job's own is not shorter: less than a block, less than a document."""
LONGEST_FOR_DENSE = 4096
"""Tokens up to which the oracle writes out its mask; beyond, it goes document by document (sdpa)."""
FP8_TOLERANCE = {"rowwise": 2e-2, "tensorwise": 8e-2}
"""Against FP8 emulated on one process, where a tensor has one scale; here each rank has its own for its part. Measured
on 2 and 4 ranks, token losses then differ by up to 0.12 nats. An error by a factor of 2 is still seen."""

TrainMicroBatch = Callable[[Transformer, LocalBatch, float], torch.Tensor]


def run_self_check(
    args: TransformerArgs,
    config: JobConfig,
    dims: ParallelDims,
    device: torch.device,
    cpu_group: dist.ProcessGroup,
    accumulation: int,
    train_micro_batch: TrainMicroBatch,
) -> None:
    """Collective. UserError on all ranks if a property does not hold on some rank.

    accumulation: micro-batches per step, of which at most two are tried. train_micro_batch: components/loss.py's.
    """
    began = time.perf_counter()
    backend = choose_backend(config.model.attention_backend, device.type)
    # float32 shows more; the varlen kernel does not know it
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if backend == "varlen" else "float32"
    training = replace(config.training, mixed_precision_param=dtype, dtype="float32", z_loss=0.0)
    small = _small(args, dims.size("tp"))
    job = SmallJob(small, replace(config, training=training), dims, device, cpu_group, train_micro_batch, backend)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, _first_failure(job, accumulation), cpu_group)
    torch.compiler.reset()  # else the job's own lengths would be seen as changed ones and be compiled as dynamic
    # A leak into another document is the better explanation of a wrong loss, and perhaps another rank has seen it.
    failed = sorted(
        ((rank, failure) for rank, failure in enumerate(failures) if failure),
        key=lambda entry: not entry[1].startswith("perturbation"),
    )
    combination = _combination(job)
    if failed:
        raise UserError(
            f"The self-check failed, so training would be silently wrong: {failed[0][1]} (on {len(failed)} of "
            f"{len(failures)} ranks, this on rank {failed[0][0]}; {combination}). This is a fault of the software, "
            "not of your data: please report it. parallelism.self_check = false starts anyway."
        )
    logger.info(f"self-check passed in {time.perf_counter() - began:.1f} s: {combination}")


def _combination(job: SmallJob) -> str:
    """What has been tried, for the log and the message."""
    p, sizes = job.config.parallelism, ("dp_replicate", "dp_shard", "cp", "tp")
    parts = [*(f"{name} {job.dims.size(name)}" for name in sizes), f"backend {job.backend}"]
    if job.dims.size("cp") > 1:
        parts += [f"layout {p.context_parallel_layout}", f"exchange {p.context_parallel_exchange}"]
    if job.config.compile.enable:
        parts.append("compiled")
    if job.config.quantize.recipe_name != "none":
        parts.append(f"FP8 {job.config.quantize.recipe_name}")
    return ", ".join(parts)


def _first_failure(job: SmallJob, accumulation: int) -> str | None:
    """Collective: all ranks come to the end of it, whatever they find. None: every property holds on this rank."""
    cp, tp = job.dims.size("cp"), job.dims.size("tp")
    total = cp * math.lcm(BLOCK * BLOCKS_PER_RANK, tp)  # sequence parallelism divides a rank's tokens once more
    rng = np.random.default_rng([job.dims.dp_rank, 2026])
    anchors = job.config.data.anchor_attention
    batches = [_random_batch(rng, total, job.args.vocab_size, anchors) for _ in range(min(accumulation, 2))]
    # which tokens of each stream are this rank's: they are numbered instead of drawn
    numbers = [job.local(replace(batch, tokens=torch.arange(total))).tokens for batch in batches]
    model = job.build(Quantize())
    oracle = Transformer(job.args, "dense" if total <= LONGEST_FOR_DENSE else "sdpa").to(job.device)
    init_weights(oracle, seed=1)
    tolerance = 5e-2 if job.backend == "varlen" else 1e-3 if job.device.type == "cuda" else 1e-4

    failures = perturbation(job, model, batches, numbers[0])
    failures.append(parity("the losses and gradients", job, model, oracle, batches, numbers, tolerance))
    if job.dims.dp_degree * cp > 1:  # else there would be no label at all
        what = "with a rank whose labels are all masked, the losses and gradients"
        masked = [_without_labels(job, batch, tokens) for batch, tokens in zip(batches, numbers, strict=True)]
        failures.append(parity(what, job, model, oracle, masked, numbers, tolerance))
    # FP8 last: its roundings would hide what is wrong otherwise
    quantize = replace(job.config.quantize, smallest_features=MULTIPLE, filter_fqns=())
    if quantize.recipe_name != "none" and any(fp8_layers(job.args, quantize, tp).values()):
        model = job.build(quantize)
        apply_quantize(oracle, replace(quantize, emulate=True), tp=1)
        tolerance = FP8_TOLERANCE[quantize.recipe_name]
        failures.append(parity("FP8: the losses and gradients", job, model, oracle, batches, numbers, tolerance))
    return next((failure for failure in failures if failure), None)


@dataclass(frozen=True)
class SmallJob:
    """The job's parallelism around a model of these args; config: the job's, in the precision of the check."""

    args: TransformerArgs
    config: JobConfig
    dims: ParallelDims
    device: torch.device
    cpu_group: dist.ProcessGroup
    train_micro_batch: TrainMicroBatch
    backend: str

    def build(self, quantize: Quantize) -> Transformer:
        """The small model, sharded as the job shards its own."""
        model = build_sharded_model(self.args, replace(self.config, quantize=quantize), self.dims, self.device)
        init_weights(model, seed=1)
        return model

    def local(self, batch: PackedBatch) -> LocalBatch:
        """This context-parallel rank's part of a batch, on the host."""
        p, args = self.config.parallelism, self.args
        return local_batch(
            batch,
            self.backend,
            p.context_parallel_layout,
            p.context_parallel_exchange,
            self.dims.size("cp"),
            self.dims.cp_rank,
            args.sliding_window,
            args.sliding_share,
        )

    def run(self, model: Transformer, batches: list[PackedBatch]) -> tuple[list[torch.Tensor], float]:
        """Collective. One step: this rank's token losses of each micro-batch, and the divisor; gradients are left in
        the model."""
        local = [self.local(batch) for batch in batches]
        valid = torch.tensor(sum(batch.num_valid for batch in local) * self.dims.counts_here)
        dist.all_reduce(valid, group=self.cpu_group)
        model.zero_grad()
        losses = []
        for i, batch in enumerate(local):
            reduce_over_replicas(model, i == len(local) - 1)
            losses.append(self.train_micro_batch(model, batch.to(self.device), float(valid)))
        return losses, float(valid)


# ---- perturbation ---------------------------------------------------------------------------------------------------


def perturbation(
    job: SmallJob, model: Transformer, batches: list[PackedBatch], numbers: torch.Tensor
) -> list[str | None]:
    """Collective. Changes tokens of the first micro-batch and sees whose outputs move, to the bit.

    numbers: int64 [t], which tokens of its stream are this rank's. What is wrong, if anything.
    """
    batch = batches[0]
    before = job.run(model, batches)[0][0]

    def moved_by(*changed: int) -> torch.Tensor:
        """Collective. bool [t]: which of this rank's outputs move when these tokens do."""
        tokens = batch.tokens.clone()
        tokens[list(changed)] = (tokens[list(changed)] + 1) % job.args.vocab_size
        return (job.run(model, [replace(batch, tokens=tokens), *batches[1:]])[0][0] != before).cpu()

    document = int(batch.cu_documents.diff().argmax())  # the longest
    start, end = batch.cu_documents[document : document + 2].tolist()
    token = start + (end - start) // 3
    # and the document's last one, which a mask that is one token too wide would show to the next document
    moved = moved_by(token, end - 1)
    reach = end
    if job.args.sliding_window is not None and job.args.sliding_share == 1:  # each layer carries it one window on
        reach = min(end, token + job.args.n_layers * (job.args.sliding_window - 1) + 1)
    wrong = numbers[moved & ((numbers < token) | (numbers >= reach)) & (numbers != end - 1)]
    failures: list[str | None] = []
    if len(wrong):
        failures.append(
            f"perturbation: changing token {token} of the document at {start} to {end} moved token {int(wrong[0])}, "
            "which must not see it"
        )
    elif ((numbers == token) & ~moved).any():
        failures.append(f"perturbation: changing token {token} did not move its own output")
    if batch.anchor is None:
        return failures
    moved, row_end = moved_by(0), int(batch.cu_seqlens[1:][batch.anchor == 0].max())
    wrong = numbers[moved & (numbers >= row_end)]
    what = "perturbation: changing the anchor of a row, token 0,"
    if len(wrong):
        failures.append(f"{what} moved token {int(wrong[0])} of another")
    elif ((numbers == start) & ~moved).any():
        failures.append(f"{what} did not move its token {start}")
    return failures


# ---- parity ---------------------------------------------------------------------------------------------------------


def parity(
    what: str,
    job: SmallJob,
    model: Transformer,
    oracle: Transformer,
    batches: list[PackedBatch],
    numbers: list[torch.Tensor],
    tolerance: float,
) -> str | None:
    """Collective: all ranks come to the end of it, whatever they find. What differs from the oracle, if anything.

    numbers: int64 [t] per micro-batch, which tokens of its stream are this rank's.
    """
    losses, valid = job.run(model, batches)
    failure = None
    whole_losses = run_oracle(oracle, batches, valid, job.device)
    for ours, whole, tokens in zip(losses, whole_losses, numbers, strict=True):
        expected = whole.cpu()[tokens]
        error = (ours.cpu() - expected).abs()
        if not float(error.max()) <= tolerance * 5:  # losses are about 4 nats
            worst = int(error.argmax())
            failure = (
                f"parity: {what} differ from one process's: token {int(tokens[worst])} has a loss of "
                f"{float(ours[worst]):.5f} instead of {float(expected[worst]):.5f}"
            )
    for name, parameter in model.named_parameters():
        reference = oracle.get_parameter(name).grad
        error_norm, ratio, is_multiple = _gradient_error(job, parameter.grad, reference, tolerance * 10)
        if failure is None and not error_norm <= tolerance * 10:
            if is_multiple:
                failure = f"loss scale: the gradient of {name} is {ratio:.4f} times that of one process"
            else:
                failure = f"parity: {what} differ from one process's: {name} has a relative error of {error_norm:.1e}"
    return failure


def _gradient_error(
    job: SmallJob, gradient: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float
) -> tuple[float, float, bool]:
    """Collective. |gradient - expected| / |expected| over all ranks; the multiple of expected nearest to gradient, and
    whether gradient is that multiple within the tolerance."""
    assert gradient is not None and expected is not None
    device, expected = gradient.device, expected.double().cpu()
    dist.all_reduce(expected, group=job.cpu_group)
    expected /= job.dims.size("cp") * job.dims.size("tp")  # ranks that computed the same batch in their oracle
    if isinstance(gradient, DTensor):  # shards are compared with shards
        mesh, placements = gradient.device_mesh, gradient.placements
        expected = distribute_tensor(expected.to(device), mesh, placements, src_data_rank=None).to_local().cpu()
        gradient = gradient.to_local()
    ours = gradient.double().cpu()
    sums = torch.stack([(ours - expected).square().sum(), expected.square().sum(), (ours * expected).sum()])
    dist.all_reduce(sums, group=job.cpu_group)
    norm = max(float(sums[1].sqrt()), 1e-6)  # the floor is for parameters whose gradient is about zero
    ratio = float(sums[2]) / norm**2
    rest = float(sums[0]) - (1 - ratio) ** 2 * norm**2  # |ours - ratio expected|^2 out of the same sums
    return float(sums[0].sqrt()) / norm, ratio, rest <= (tolerance * norm) ** 2


def run_oracle(
    oracle: Transformer, batches: list[PackedBatch], valid: float, device: torch.device
) -> list[torch.Tensor]:
    """Token losses of whole micro-batches, float32 [T] each, on one process in float32, without any parallelism. The
    gradients of their sum over valid are left in the oracle."""
    oracle.zero_grad()
    losses = []
    for batch in batches:
        anchor = None if batch.anchor is None else batch.anchor.numpy().astype(np.int64)
        segments = Segments.whole(batch.cu_seqlens, anchor=anchor)  # the model adds those of its sliding layers
        batch = batch.to(device)
        logits = oracle(batch.tokens, batch.positions, segments, batch.long)
        loss = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED_LABEL, reduction="none")
        (loss.sum() / valid).backward()
        losses.append(loss.detach())
    return losses


# ---- the small model and its batches --------------------------------------------------------------------------------


def _small(args: TransformerArgs, tp: int) -> TransformerArgs:
    """The job's heads and RoPE in one layer of each kind that it has, with a window that the small batches exceed."""
    layers: dict[str, Any] = {"layer_types": ()}
    if args.sliding_window is not None:
        other = "full_attention" if args.sliding_share < 1 else "sliding_attention"
        window = min(args.sliding_window, WINDOW)
        layers = {"layer_types": ("sliding_attention", other), "sliding_window": window}
    return replace(args, dim=64, n_layers=2, ffn_dim=32 * tp, vocab_size=64 * tp, **layers)


def _random_batch(rng: np.random.Generator, total: int, vocab_size: int, anchors: bool) -> PackedBatch:
    """Ragged documents: one of more than half of the tokens, others down to a single token.

    anchors: the documents up to the long one are a row, those after it another; the last token is like padding, without
    an anchor.
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


def _without_labels(job: SmallJob, batch: PackedBatch, numbers: torch.Tensor) -> PackedBatch:
    """Collective. No label on the tokens of context-parallel rank 0 of data-parallel rank 0.

    numbers: int64 [t], which tokens of the stream are this rank's.
    """
    gathered: list[tuple[int, int, torch.Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (job.dims.dp_rank, job.dims.cp_rank, numbers), job.cpu_group)
    labels = batch.labels.clone()
    for entry in gathered:
        assert entry is not None
        if entry[:2] == (0, 0) and job.dims.dp_rank == 0:
            labels[entry[2]] = IGNORED_LABEL
    return replace(batch, labels=labels)
