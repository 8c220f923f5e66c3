"""FLOPs and bytes of a step, and the range that its time should lie in: a range, as no GPU has been measured yet."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.extensions.planner.memory import repeated_kv, shard_numel, sizes, stream
from torchtitan.extensions.planner.stage_numbers import StageNumbers
from torchtitan.models.work import forward_flops, training_flops, work_of
from torchtitan.tools.gpus import Gpu

GPUS_PER_NODE = 8

# Shares of the bf16 peak, (slow, fast). Linear layers: 45% is what training runs of dense models report for short rows
# (Llama 3, arXiv 2407.21783: 38 to 43% with everything), 70% what large cuBLAS products reach. Attention under a
# document mask on an H100, forward and backward together: FlexAttention 270 / 178 TFLOP/s, FlashAttention 3 585 / 425
# (chart of MagiAttention, October 2025).
LINEAR = (0.45, 0.70)
ATTENTION = (0.20, 0.46)

FP8_GAIN = 0.6
"""Share of the extra peak that FP8 products gain over bf16 ones after the casts. An assumption."""

HOST_LINK_GB = 25
"""GB/s between a GPU and host memory in one direction: half of PCIe 5 x16."""

HOST_OPTIMIZER_GB = 20
"""GB/s of host memory that a rank's optimizer has if it runs on the CPU."""


@dataclass(frozen=True)
class Step:
    """FLOPs of all ranks; bytes that one rank receives; seconds."""

    model_flops: float
    hardware_flops: float
    fsdp_bytes: float
    context_bytes: float
    tensor_bytes: float
    host_link_bytes: float
    fastest: float
    slowest: float

    @property
    def middle(self) -> float:
        """Seconds: the geometric mean of fastest and slowest, by which settings are compared."""
        return (self.fastest * self.slowest) ** 0.5


def model_flops(stage: StageNumbers) -> float:
    """FLOPs of a step on all ranks, without recomputation."""
    work = work_of(stage.args)
    return training_flops(work.parameters, stage.step_tokens, work.width, step_pairs(stage))


def hardware_flops(stage: StageNumbers) -> float:
    """FLOPs of a step on all ranks, with recomputation."""
    again = stage.recomputed
    return model_flops(stage) + forward_flops(again.parameters, stage.step_tokens, again.width, step_pairs(stage))


def step_pairs(stage: StageNumbers) -> float:
    """(query, key) pairs that the mask allows in a step, on all ranks; a mean over layers."""
    return stage.pairs * stage.accumulation * stage.dp_replicate * stage.dp_shard


def fsdp_bytes(stage: StageNumbers) -> float:
    """What a rank receives per step: for each micro-batch, every parameter gathered once or twice and every gradient
    reduced in float32; and the all-reduce over replicas."""
    numel, share = sizes(stage).total, 1 - 1 / stage.fsdp
    gathers = 2 if stage.reshard else 1
    per_micro_batch = numel * share * (gathers * stage.computed + 4)
    replicas = 2 * (1 - 1 / stage.dp_replicate) * numel / stage.fsdp * 4
    return per_micro_batch * stage.accumulation + replicas


def context_bytes(stage: StageNumbers) -> float:
    """What a rank receives per step: keys and values in forward, again if attention is recomputed, their gradients."""
    if stage.cp == 1:
        return 0
    args = stage.args
    kv = 2 * args.n_kv_heads * args.head_dim / stage.tp * stage.computed
    passes = 2 + stage.recomputed.width / work_of(args).width
    if stage.exchange == "ulysses":  # queries and outputs too, of 1 / cp of the heads
        both = kv * repeated_kv(stage) + 2 * args.n_heads * args.head_dim / stage.tp * stage.computed
        return args.n_layers * stage.tokens * (1 - 1 / stage.cp) * both * passes * stage.accumulation
    return args.n_layers * (stage.keys - stage.tokens) * kv * passes * stage.accumulation


def tensor_bytes(stage: StageNumbers) -> float:
    """What a rank receives per step: tensor parallelism gathers and scatters the stream twice per block and pass."""
    if stage.tp == 1:
        return 0
    passes = 2 + stage.recomputed.parameters / work_of(stage.args).parameters
    return stage.args.n_layers * 4 * stream(stage) * (stage.tp - 1) * passes * stage.accumulation


def host_link_bytes(stage: StageNumbers) -> float:
    """What crosses a rank's link to the host per step: checkpoints out and in, parameters in, gradients out."""
    total = 0.0
    if stage.offload_checkpoints:
        total += 2 * stream(stage, stage.args.n_layers * stage.checkpointing.blocks) * stage.accumulation
    if stage.offload_parameters:
        total += shard_numel(stage) * stage.stored * 3 * stage.accumulation
    return total


def compute_seconds(stage: StageNumbers, gpu: Gpu, linear: float, attention: float) -> float:
    """Seconds of a rank per step, at these shares of the peak. FP8 speeds up only the linear layers of blocks."""
    work, again, peak = work_of(stage.args), stage.recomputed, gpu.bf16_tflops * 1e12
    tokens, pairs = stage.step_tokens, step_pairs(stage)
    head = training_flops(work.output, tokens, 0, 0)
    blocks = training_flops(work.parameters - work.output, tokens, 0, 0) + forward_flops(again.parameters, tokens, 0, 0)
    kernel = training_flops(0, 0, work.width, pairs) + forward_flops(0, 0, again.width, pairs)
    gain = 1 + FP8_GAIN * ((gpu.fp8_tflops or gpu.bf16_tflops) / gpu.bf16_tflops - 1) if stage.fp8 else 1
    return ((head + blocks / gain) / linear + kernel / attention) / (peak * stage.world)


def step_of(stage: StageNumbers, gpu: Gpu) -> Step:
    """Fastest: at the higher efficiency, with all communication hidden behind it; slowest: at the lower, with none
    hidden."""
    fsdp, context, tensor, host = fsdp_bytes(stage), context_bytes(stage), tensor_bytes(stage), host_link_bytes(stage)

    def seconds(size: float, ranks: int) -> float:
        return size / 1e9 / (gpu.link_gb if ranks <= GPUS_PER_NODE else gpu.network_gb)

    moved = (
        seconds(fsdp, stage.fsdp * stage.tp)
        + seconds(context, stage.cp * stage.tp)
        + seconds(tensor, stage.tp)
        + host / 1e9 / HOST_LINK_GB
    )
    on_host = 0.0  # the optimizer's step, which nothing hides
    if stage.offload_parameters:
        on_host = shard_numel(stage) * (2 * stage.stored + 4 * stage.state) / 1e9 / HOST_OPTIMIZER_GB
    slow, fast = (compute_seconds(stage, gpu, linear, kernel) for linear, kernel in zip(LINEAR, ATTENTION, strict=True))
    return Step(
        model_flops(stage),
        hardware_flops(stage),
        fsdp,
        context,
        tensor,
        host,
        max(fast, moved) + on_host,
        slow + moved + on_host,
    )


def seconds_per_token(stage: StageNumbers, gpu: Gpu) -> float:
    """Of a whole step over its tokens on all ranks, in the middle of the range."""
    return step_of(stage, gpu).middle / stage.step_tokens
