"""FLOPs and bytes of a step, and between which times it should lie: a range, since nothing here has met a GPU yet."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.extensions.planner.job import Job
from torchtitan.extensions.planner.memory import repeated_kv, sizes, stream
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


def model_flops(job: Job) -> float:
    """FLOPs of a step without recomputation, over all ranks."""
    work = work_of(job.args)
    return training_flops(work.parameters, job.step_tokens, work.width, step_pairs(job))


def hardware_flops(job: Job) -> float:
    """The same with recomputation."""
    again = job.recomputed
    return model_flops(job) + forward_flops(again.parameters, job.step_tokens, again.width, step_pairs(job))


def step_pairs(job: Job) -> float:
    """(query, key) pairs of a step, over all ranks; a mean over layers."""
    return job.pairs * job.accumulation * job.dp_replicate * job.dp_shard


def fsdp_bytes(job: Job) -> float:
    """What a rank receives a step: every parameter gathered once or twice, every gradient reduced in float32, for each
    micro-batch; and the all-reduce over replicas."""
    s = sizes(job)
    numel, share = s.blocks + s.embedding + s.head, 1 - 1 / job.fsdp
    gathers = 2 if job.reshard else 1
    per_micro_batch = numel * share * (gathers * job.computed + 4)
    replicas = 2 * (1 - 1 / job.dp_replicate) * numel / job.fsdp * 4
    return per_micro_batch * job.accumulation + replicas


def context_bytes(job: Job) -> float:
    """Keys and values that a rank receives, in forward, again where attention is recomputed, and their gradients."""
    if job.cp == 1:
        return 0
    args = job.args
    kv = 2 * args.n_kv_heads * args.head_dim / job.tp * job.computed
    passes = 2 + job.recomputed.width / work_of(args).width
    if job.exchange == "ulysses":  # queries and outputs too, of 1 / cp of the heads
        both = kv * repeated_kv(job) + 2 * args.n_heads * args.head_dim / job.tp * job.computed
        return args.n_layers * job.tokens * (1 - 1 / job.cp) * both * passes * job.accumulation
    return args.n_layers * (job.keys - job.tokens) * kv * passes * job.accumulation


def tensor_bytes(job: Job) -> float:
    """Tensor parallelism gathers and scatters the stream twice a block, in each pass."""
    if job.tp == 1:
        return 0
    passes = 2 + job.recomputed.parameters / work_of(job.args).parameters
    return job.args.n_layers * 4 * stream(job) * (job.tp - 1) * passes * job.accumulation


def host_bytes(job: Job) -> float:
    """Over the link to the host: checkpoints out and in, parameters in and gradients out."""
    total = 0.0
    if job.offload_checkpoints:
        total += 2 * stream(job, job.args.n_layers * job.recomputed_blocks) * job.accumulation
    if job.offload_parameters:
        s = sizes(job)
        total += (s.blocks + s.embedding + s.head) / job.fsdp * job.stored * 3 * job.accumulation
    return total


def compute_seconds(job: Job, gpu: Gpu, linear: float, attention: float) -> float:
    """Of one rank, at these shares of the peak. FP8 speeds up the blocks' linear layers only."""
    work, again, peak = work_of(job.args), job.recomputed, gpu.bf16_tflops * 1e12
    tokens, pairs = job.step_tokens, step_pairs(job)
    head = training_flops(work.output, tokens, 0, 0)
    blocks = training_flops(work.parameters - work.output, tokens, 0, 0) + forward_flops(again.parameters, tokens, 0, 0)
    kernel = training_flops(0, 0, work.width, pairs) + forward_flops(0, 0, again.width, pairs)
    gain = 1 + FP8_GAIN * ((gpu.fp8_tflops or gpu.bf16_tflops) / gpu.bf16_tflops - 1) if job.fp8 else 1
    return ((head + blocks / gain) / linear + kernel / attention) / (peak * job.world)


def step_of(job: Job, gpu: Gpu) -> Step:
    """Fastest: at the higher efficiency, with all communication hidden behind it; slowest: at the lower, with none."""
    fsdp, context, tensor, host = fsdp_bytes(job), context_bytes(job), tensor_bytes(job), host_bytes(job)

    def seconds(size: float, ranks: int) -> float:
        return size / 1e9 / (gpu.link_gb if ranks <= GPUS_A_NODE else gpu.network_gb)

    moved = (
        seconds(fsdp, job.fsdp * job.tp)
        + seconds(context, job.cp * job.tp)
        + seconds(tensor, job.tp)
        + host / 1e9 / HOST_LINK_GB
    )
    s = sizes(job)
    numel = (s.blocks + s.embedding + s.head) / job.fsdp
    on_host = numel * (2 * job.stored + 4 * job.state) / 1e9 / HOST_OPTIMIZER_GB if job.offload_parameters else 0
    slow, fast = (compute_seconds(job, gpu, linear, kernel) for linear, kernel in zip(LINEAR, ATTENTION, strict=True))
    return Step(
        model_flops(job),
        hardware_flops(job),
        fsdp,
        context,
        tensor,
        host,
        max(fast, moved) + on_host,
        slow + moved + on_host,
    )
