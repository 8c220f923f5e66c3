"""FLOPs and bytes of a step, and between which times it should lie: a range, since nothing here has met a GPU yet."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.extensions.planner.memory import repeated_kv, sizes, stream
from torchtitan.extensions.planner.stage_numbers import StageNumbers
from torchtitan.models.work import forward_flops, training_flops, work_of
from torchtitan.tools.gpus import Gpu

GPUS_A_NODE = 8

# Shares of the bf16 peak, (slow, fast). Linear layers: 45% is what whole trainings of dense models report at short rows
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
"""GB/s of host memory that a rank's optimizer has where it runs on the CPU."""


@dataclass(frozen=True)
class Step:
    """FLOPs over all ranks, bytes and seconds of one rank."""

    model_flops: float
    hardware_flops: float
    fsdp_bytes: float
    context_bytes: float
    tensor_bytes: float
    host_bytes: float
    fastest: float
    slowest: float

    @property
    def middle(self) -> float:
        """Their geometric mean: what candidates are compared by."""
        return (self.fastest * self.slowest) ** 0.5


def model_flops(stage: StageNumbers) -> float:
    """FLOPs of a step without recomputation, over all ranks."""
    work = work_of(stage.args)
    return training_flops(work.parameters, stage.step_tokens, work.width, step_pairs(stage))


def hardware_flops(stage: StageNumbers) -> float:
    """The same with recomputation."""
    again = stage.recomputed
    return model_flops(stage) + forward_flops(again.parameters, stage.step_tokens, again.width, step_pairs(stage))


def step_pairs(stage: StageNumbers) -> float:
    """(query, key) pairs of a step, over all ranks; a mean over layers."""
    return stage.pairs * stage.accumulation * stage.dp_replicate * stage.dp_shard


def fsdp_bytes(stage: StageNumbers) -> float:
    """What a rank receives a step: every parameter gathered once or twice, every gradient reduced in float32, for each
    micro-batch; and the all-reduce over replicas."""
    s = sizes(stage)
    numel, share = s.blocks + s.embedding + s.head, 1 - 1 / stage.fsdp
    gathers = 2 if stage.reshard else 1
    per_micro_batch = numel * share * (gathers * stage.computed + 4)
    replicas = 2 * (1 - 1 / stage.dp_replicate) * numel / stage.fsdp * 4
    return per_micro_batch * stage.accumulation + replicas


def context_bytes(stage: StageNumbers) -> float:
    """Keys and values that a rank receives, in forward, again where attention is recomputed, and their gradients."""
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
    """Tensor parallelism gathers and scatters the stream twice a block, in each pass."""
    if stage.tp == 1:
        return 0
    passes = 2 + stage.recomputed.parameters / work_of(stage.args).parameters
    return stage.args.n_layers * 4 * stream(stage) * (stage.tp - 1) * passes * stage.accumulation


def host_link_bytes(stage: StageNumbers) -> float:
    """Over the link to the host: checkpoints out and in, parameters in and gradients out."""
    total = 0.0
    if stage.offload_checkpoints:
        total += 2 * stream(stage, stage.args.n_layers * stage.recomputed_blocks) * stage.accumulation
    if stage.offload_parameters:
        s = sizes(stage)
        total += (s.blocks + s.embedding + s.head) / stage.fsdp * stage.stored * 3 * stage.accumulation
    return total


def compute_seconds(stage: StageNumbers, gpu: Gpu, linear: float, attention: float) -> float:
    """Of one rank, at these shares of the peak. FP8 speeds up the blocks' linear layers only."""
    work, again, peak = work_of(stage.args), stage.recomputed, gpu.bf16_tflops * 1e12
    tokens, pairs = stage.step_tokens, step_pairs(stage)
    head = training_flops(work.output, tokens, 0, 0)
    blocks = training_flops(work.parameters - work.output, tokens, 0, 0) + forward_flops(again.parameters, tokens, 0, 0)
    kernel = training_flops(0, 0, work.width, pairs) + forward_flops(0, 0, again.width, pairs)
    gain = 1 + FP8_GAIN * ((gpu.fp8_tflops or gpu.bf16_tflops) / gpu.bf16_tflops - 1) if stage.fp8 else 1
    return ((head + blocks / gain) / linear + kernel / attention) / (peak * stage.world)


def step_of(stage: StageNumbers, gpu: Gpu) -> Step:
    """Fastest: at the higher efficiency, with all communication hidden behind it; slowest: at the lower, with none."""
    fsdp, context, tensor, host = fsdp_bytes(stage), context_bytes(stage), tensor_bytes(stage), host_link_bytes(stage)

    def seconds(size: float, ranks: int) -> float:
        return size / 1e9 / (gpu.link_gb if ranks <= GPUS_A_NODE else gpu.network_gb)

    moved = (
        seconds(fsdp, stage.fsdp * stage.tp)
        + seconds(context, stage.cp * stage.tp)
        + seconds(tensor, stage.tp)
        + host / 1e9 / HOST_LINK_GB
    )
    s = sizes(stage)
    numel = (s.blocks + s.embedding + s.head) / stage.fsdp
    on_host = numel * (2 * stage.stored + 4 * stage.state) / 1e9 / HOST_OPTIMIZER_GB if stage.offload_parameters else 0
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
