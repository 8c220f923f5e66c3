"""The schema of a stage: one frozen dataclass per TOML table, one field per key.

Table and key names are torchtitan 0.2's where the meaning is the same. The string under a field is its documentation,
which `--help` prints. Range and Decides (keys.py) say what a key can be and what it decides, for the whole program; a
new key is a new field here and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchtitan.config.data_schema import Data
from torchtitan.config.keys import Decides, Range


@dataclass(frozen=True)
class Job:
    """What this run is and where it writes."""

    config_file: str | None = None
    """TOML file of the stage. Not part of the resolved configuration."""

    dump_folder: str = "./outputs"
    """Folder for everything that the run leaves: config.toml, plan.json, metrics.jsonl, tb/, checkpoint/."""

    description: str = ""
    """Free text, logged at the start."""

    hooks: tuple[str, ...] = ()
    """Hooks of your own, each a "module:Class" on PYTHONPATH. docs/extending.md lists the points at which they are
    called."""

    print_config: bool = False
    """Print the resolved configuration as TOML and exit."""


@dataclass(frozen=True)
class Profiling:
    """PyTorch profiler traces and CUDA memory snapshots."""

    enable_profiling: bool = False
    """Write a Chrome trace of one step every profile_freq steps."""

    save_traces_folder: str = "profile_traces"
    """Folder under job.dump_folder for the traces, one file per rank."""

    profile_freq: Annotated[int, Range(min=2)] = 10
    """Steps from one trace to the next. The step before each trace is its warm-up."""

    enable_memory_snapshot: bool = False
    """Record CUDA allocations and write a snapshot every profile_freq steps (CUDA only)."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder under job.dump_folder for the memory snapshots."""


@dataclass(frozen=True)
class Metrics:
    """What is logged, how often, and where."""

    log_freq: Annotated[int, Range(min=1)] = 10
    """Steps from one line of the log and of metrics.jsonl to the next. The first and the last step always have one."""

    enable_tensorboard: bool = True
    """Write TensorBoard events to save_tb_folder."""

    save_tb_folder: str = "tb"
    """Folder under job.dump_folder for TensorBoard events."""

    enable_wandb: bool = False
    """Log to Weights & Biases too. Needs the extra `wandb`; W&B itself reads WANDB_PROJECT and its other variables."""

    peak_tflops: Annotated[float | None, Range(above=0)] = None
    """Peak dense bf16 TFLOP/s of one device, for MFU. Unset: from a table of known GPUs; other devices get no MFU."""

    straggler_factor: Annotated[float, Range(min=1)] = 1.5
    """The log names a rank that computes this many times slower than the median rank, or that makes steps this many
    times longer by arriving late. Checked at every log line."""

    heartbeat_seconds: Annotated[float, Range(min=0)] = 5.0
    """heartbeat.json in job.dump_folder is written again after a step if it is older than this."""


@dataclass(frozen=True)
class Model:
    """Which architecture, and where its tokenizer, config.json and weights are."""

    flavor: Annotated[str, Decides("model")] = "debugmodel"
    """A size from torchtitan/models/registry.py (`llama3.1_8b`, `qwen3_8b`, ...); `auto`: read config.json in
    hf_assets_path; or `module:NAME`, a TransformerArgs of your own on PYTHONPATH (docs/extending.md)."""

    hf_assets_path: Annotated[str, Decides("model")] = "./assets/tokenizer"
    """Folder as on Hugging Face: the tokenizer (tokenizer.json, or Llama 3's tokenizer.model) and, for flavor `auto`
    and checkpoint.initial_load_in_hf, config.json and *.safetensors."""

    attention_backend: Annotated[Literal["auto", "flex", "varlen", "sdpa", "dense"], Decides("speed")] = "auto"
    """auto: flex on CUDA, sdpa on the CPU. flex: FlexAttention with a block mask. varlen: PyTorch's flash attention
    over ragged segments (CUDA, 16 bits). sdpa: one call per segment. dense: the reference of the tests."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    name: Literal["AdamW"] = "AdamW"
    """The only optimizer offered."""

    lr: Annotated[float, Range(min=0)] = 8e-4
    """Peak learning rate."""

    beta1: Annotated[float, Range(min=0, below=1)] = 0.9
    """Decay of the first moment."""

    beta2: Annotated[float, Range(min=0, below=1)] = 0.95
    """Decay of the second moment."""

    eps: Annotated[float, Range(above=0)] = 1e-8
    """Added to the square root of the second moment."""

    weight_decay: Annotated[float, Range(min=0)] = 0.1
    """Decoupled weight decay of every parameter that no_decay does not name."""

    no_decay: tuple[str, ...] = ()
    """Shell patterns of parameter names without weight decay, such as ["*norm*", "*bias", "tok_embeddings.*"]."""

    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Type in which the two moments are stored. If it is set, a step is computed in float32. Unset: training.dtype."""

    implementation: Annotated[Literal["fused", "foreach", "for-loop"], Decides("speed")] = "fused"
    """Which of PyTorch's AdamW kernels is used."""


@dataclass(frozen=True)
class LRScheduler:
    """The learning rate, a pure function of the step: linear warmup, constant part, decay to min_lr_factor."""

    warmup_steps: Annotated[int, Range(min=0)] = 200
    """Steps from 0 to the peak. Step k < warmup_steps runs at lr * k / warmup_steps."""

    decay_ratio: Annotated[float | None, Range(min=0, max=1)] = None
    """Share of training.steps spent decaying (warmup-stable-decay). Unset: decay starts when warmup ends. 0: no
    decay."""

    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the decay. sqrt is 1 - sqrt(progress)."""

    min_lr_factor: Annotated[float, Range(min=0, max=1)] = 0.0
    """The decay ends at lr * min_lr_factor."""


@dataclass(frozen=True)
class Training:
    """Row length, batch, steps, precision."""

    seq_len: Annotated[int, Range(min=1), Decides("rows")] = 2048
    """Tokens per row."""

    local_batch_size: Annotated[int, Range(min=1), Decides("rows")] = 1
    """Rows per micro-batch of one data-parallel rank, laid end to end as one stream. It decides the rows of a step only
    if neither global_batch_size nor global_batch_tokens does."""

    global_batch_size: Annotated[int | None, Range(min=1), Decides("rows")] = None
    """Rows per step, over all ranks and gradient accumulation. Unset: local_batch_size times the data-parallel
    degree."""

    global_batch_tokens: Annotated[int | None, Range(min=1), Decides("rows")] = None
    """The same in tokens: global_batch_size * seq_len. Set at most one of the two."""

    steps: Annotated[int, Range(min=1), Decides("result")] = 10000
    """Optimizer steps of this stage."""

    max_norm: Annotated[float, Range(min=0), Decides("result")] = 1.0
    """Gradients are clipped to this global norm. 0: no clipping."""

    dtype: Annotated[Literal["float32", "bfloat16"], Decides("result")] = "float32"
    """Type in which parameters are stored and, unless optimizer.state_dtype is set, the optimizer's state too."""

    mixed_precision_param: Annotated[Literal["float32", "bfloat16"], Decides("result")] = "bfloat16"
    """Type to which parameters are cast for forward and backward."""

    mixed_precision_reduce: Annotated[Literal["float32"], Decides("result")] = "float32"
    """Type in which gradients are reduced across ranks."""

    loss_tile_mib: Annotated[int, Range(min=1), Decides("speed")] = 1024
    """The loss is computed in tiles of tokens. The float32 logits of a tile take at most this many MiB on a rank."""

    mlp_tile_tokens: Annotated[int | None, Range(min=1), Decides("speed")] = None
    """The feed-forward is computed in tiles of this many tokens. Each tile is recomputed in backward, so that no hidden
    units are kept. Under tensor parallelism: tokens of all its ranks together. Unset: one tile."""

    enable_cpu_offload: Annotated[bool, Decides("speed")] = False
    """Keep parameters, gradients and the optimizer's state in host memory, and run the optimizer there. The parameters
    of a block are copied to the device when they are gathered."""

    z_loss: Annotated[float, Range(min=0), Decides("result")] = 0.0
    """Weight of the squared logarithm of the softmax's denominator in what is minimised (Olmo 3: 1e-5). The logged loss
    does not include it."""

    seed: Annotated[int, Range(min=0), Decides("rows")] = 0
    """Seed of the data plan and of random weights."""

    deterministic: Annotated[bool, Decides("speed")] = False
    """Ask PyTorch for deterministic kernels. An operation that has none is an error."""

    gc_freq: Annotated[int, Range(min=1), Decides("speed")] = 50
    """Python's garbage collector runs every gc_freq steps only, on all ranks at the same step."""

    on_bad_loss: Annotated[Literal["stop", "skip"], Decides("result")] = "stop"
    """What happens at a bad step: its loss or gradient norm is NaN or infinite, or its loss is a spike. stop: the run
    ends and keeps nothing of the step. skip: the gradients are dropped, the rows count as used, and training goes on;
    the step is logged and kept in the manifest."""

    loss_spike_factor: Annotated[float | None, Range(min=1), Decides("result")] = None
    """A loss is a spike if it is more than this many times the median of the last loss_spike_window losses. Unset: no
    loss is a spike."""

    loss_spike_window: Annotated[int, Range(min=1), Decides("result")] = 50
    """Number of losses in that median. Until there are that many, no loss is a spike."""

    max_skipped_steps: Annotated[int, Range(min=0), Decides("result")] = 10
    """Bad steps that a stage skips; it stops at the next one."""


@dataclass(frozen=True)
class Parallelism:
    """Degrees of parallelism, whose product is the number of processes. There is no pipeline parallelism."""

    data_parallel_replicate_degree: Annotated[int, Range(min=1)] = 1
    """Copies of the sharded model (HSDP if above 1)."""

    data_parallel_shard_degree: Annotated[int, Range(min=1, also=-1)] = -1
    """Ranks over which FSDP2 shards parameters, gradients and optimizer state. -1: all that the other degrees leave."""

    context_parallel_degree: Annotated[int, Range(min=1)] = 1
    """Ranks that share the tokens of a micro-batch. Parameters are sharded over them too."""

    context_parallel_layout: Literal["balanced", "headtail", "contiguous"] = "balanced"
    """Which rank holds which tokens, in blocks of 128. balanced: equal attention work on every rank for any document
    lengths, each short document whole on one rank. headtail: a run of blocks from each end. contiguous: one run."""

    context_parallel_exchange: Literal["needed", "allgather", "ulysses"] = "needed"
    """How keys and values reach the queries of other ranks. needed: only those that some query of the rank sees.
    allgather: all of them. ulysses: each rank computes all tokens for a share of the heads instead."""

    context_parallel_head_chunks: Annotated[int, Range(min=1)] = 1
    """ulysses: exchange and compute the heads in this many parts, one after the other, so that a rank's buffers of all
    tokens hold the heads of one part. Above 1, attention is recomputed in backward."""

    self_check: Annotated[bool, Decides("nothing")] = True
    """Before the first step of a run on several processes, compare this combination of layout, exchange, backend and
    degrees with one process, on a small random batch. Refuse to start if they differ."""

    tensor_parallel_degree: Annotated[int, Range(min=1)] = 1
    """Ranks that share each matrix. Norms and residuals are sharded along the tokens (sequence parallel)."""

    fsdp_reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward, and gather them again for its backward."""


@dataclass(frozen=True)
class Checkpoint:
    """DCP checkpoints: when, where, how many, and what a run starts from."""

    enable: bool = True
    """Save checkpoints, and resume from the newest complete one in the folder."""

    folder: str = "checkpoint"
    """Folder under job.dump_folder. Each checkpoint is a folder step-N/ in it."""

    interval: Annotated[int, Range(min=1)] = 500
    """Steps from one checkpoint to the next. The last step is always saved."""

    async_mode: Literal["disabled", "async"] = "disabled"
    """async: write in a background thread while training goes on."""

    keep_latest_k: Annotated[int, Range(min=0)] = 10
    """Number of complete checkpoints to keep; older ones are deleted. 0: keep all."""

    save_retries: Annotated[int, Range(min=0)] = 3
    """How many times a rank retries a failed write."""

    retry_seconds: Annotated[float, Range(min=0)] = 10.0
    """Wait before the first retry. Each further wait is twice as long."""

    on_failed_save: Literal["stop", "go_on"] = "stop"
    """What happens if all retries fail. stop: the run ends. go_on: the failure is logged, and the next checkpoint is
    tried at its time; the save at the end of a run must succeed all the same. The last good checkpoint stays."""

    save_timeout_seconds: Annotated[int, Range(min=1)] = 7200
    """How long a save, or the check of a checkpoint's files, waits for the rank with the slowest disk."""

    load_step: Annotated[int, Range(min=0, also=-1)] = -1
    """Resume from exactly this step. -1: from the newest complete checkpoint."""

    initial_load_in_hf: Annotated[bool, Decides("start")] = False
    """Start a fresh run from the safetensors in model.hf_assets_path."""

    initial_load_path: Annotated[str | None, Decides("start")] = None
    """Start a fresh run from a checkpoint elsewhere: a step-N folder, a folder of these (the newest is taken), or a
    Hugging Face folder."""

    exclude_from_loading: Annotated[tuple[Literal["model", "optimizer"], ...], Decides("start")] = ()
    """Parts of initial_load_path that are not loaded, such as ["optimizer"]."""

    last_save_in_hf: bool = False
    """At the end of the stage, also write the model as a Hugging Face folder: export/step-N/ under job.dump_folder."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights in that folder."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    """Recomputation in backward."""

    mode: Literal["none", "selective", "full"] = "none"
    """full: keep only each block's input and recompute the block in backward. selective: see selective_ac_option."""

    selective_ac_option: str = "op"
    """op: recompute every block except its attention kernels and the matrix products of selective_ac_matmuls. A number
    n: recompute the first of every n blocks whole, and nothing of the others."""

    selective_ac_matmuls: Annotated[int, Range(min=0)] = 2
    """With "op": every n-th matrix product of a block is saved too. 0: none. If compile.enable is on, the products are
    inside the compiled code, and none is saved."""

    offload: bool = False
    """Keep the inputs of recomputed blocks in (pinned) host memory. They are copied while the device computes."""


@dataclass(frozen=True)
class Compile:
    """torch.compile, block by block."""

    enable: bool = False
    """Compile every transformer block. Attention is not compiled with it."""

    backend: str = "inductor"
    """Backend of torch.compile."""


@dataclass(frozen=True)
class Quantize:
    """Matrix products of the blocks' linear layers in FP8, through torchao (the extra `fp8`)."""

    recipe_name: Literal["none", "rowwise", "tensorwise"] = "none"
    """none: no FP8. rowwise: a scale per token and per output feature, so that the rounding of a token depends on no
    other token. tensorwise: a scale per tensor; faster, but each token changes the rounding of all others."""

    filter_fqns: tuple[str, ...] = ()
    """Layers whose name contains one of these are left as they are, such as ["attention.wo", "layers.0."]. Embedding,
    norms and the output head are never converted."""

    smallest_features: Annotated[int, Range(min=16)] = 2048
    """Layers with fewer input or output features on a tensor-parallel rank are left as they are, because FP8 would make
    them slower. So are layers with a number of features that is not a multiple of 16."""

    emulate: bool = False
    """Round to FP8 but multiply in the type of the activations: for tests, the CPU and GPUs without FP8."""


@dataclass(frozen=True)
class Comm:
    """Collectives."""

    init_timeout_seconds: Annotated[int, Range(min=1)] = 300
    """Longest wait in a collective until the first step has ended."""

    train_timeout_seconds: Annotated[int, Range(min=1)] = 100
    """Longest wait in a collective after the first step."""

    node_check: bool = False
    """Before training, time every rank's matrix product, and the all-reduce inside nodes and between neighbouring
    nodes. Slow hosts are named in the log and in node_check.json; broken ones stop the run. The same check alone:
    `python -m torchtitan.extensions.cluster.node_check`."""

    node_check_factor: Annotated[float, Range(min=1)] = 1.5
    """A host is slow if it takes more than this many times the median host's time."""

    trace_buf_size: Annotated[int, Range(min=0)] = 20000
    """Number of collectives that PyTorch's flight recorder remembers (NCCL only; gloo has no recorder). When a
    collective times out, every rank writes them to save_traces_folder. 0: off."""

    save_traces_folder: str = "comm_traces"
    """Folder under job.dump_folder for the flight recorder's files. On any backend, also for the stacks of the ranks
    when a step takes longer than 0.8 times train_timeout_seconds."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base of its frequencies, and how they are rescaled (formulas: docs/rope.md)."""

    theta: Annotated[float | Literal["auto"] | None, Range(above=0)] = None
    """Base of the rotary frequencies. Unset: the model's own. auto: the previous stage's (in a first stage the model's
    own), raised by the NTK-aware rule from its length to this stage's; the number is logged."""

    type: Literal[
        "model",
        "none",
        "linear",
        "ntk",
        "dynamic",
        "ntk_by_parts",
        "yarn",
        "llama3",
        "longrope",
        "gene",
        "harpe",
    ] = "model"
    """How the frequencies are rescaled. model: as the model's config.json or flavor says. none: they are not; only
    theta counts. linear: position interpolation. ntk, dynamic: another base, from factor or from factor and length.
    yarn, llama3, ntk_by_parts: short wavelengths are kept, long ones interpolated. longrope: a factor per pair. gene: a
    factor drawn for each micro-batch. harpe: a base per key-value head."""

    factor: Annotated[float | None, Range(min=1)] = None
    """How many times the original length: linear, ntk, dynamic, ntk_by_parts, yarn, llama3, gene. For longrope it gives
    the attention factor only. Always relative to the original length, also in a second stage."""

    original_max_position_embeddings: Annotated[int | None, Range(min=1)] = None
    """Length for which the model was trained before any rescaling: dynamic, ntk_by_parts, yarn, llama3, longrope,
    gene."""

    beta_fast: Annotated[float | None, Range(above=0)] = None
    """yarn, ntk_by_parts: pairs that turn more often than this within the original length are kept. Unset: 32."""

    beta_slow: Annotated[float | None, Range(above=0)] = None
    """yarn, ntk_by_parts: pairs that turn less often than this are fully interpolated. Unset: 1."""

    truncate: bool = True
    """yarn: round the ends of its ramp to whole pairs, as the paper's code does."""

    mscale: Annotated[float | None, Range(above=0)] = None
    """yarn: attention factor (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor + 1), if both are set."""

    mscale_all_dim: Annotated[float | None, Range(above=0)] = None
    """See mscale."""

    attention_factor: Annotated[float | None, Range(above=0)] = None
    """yarn, longrope: factor of cos and sin. Unset: 0.1 ln factor + 1 for yarn; for longrope
    sqrt(1 + ln factor / ln original length), or 1 without a factor."""

    low_freq_factor: Annotated[float | None, Range(above=0)] = None
    """llama3: pairs that turn less often than this within the original length are fully interpolated. Unset: 1."""

    high_freq_factor: Annotated[float | None, Range(above=0)] = None
    """llama3: pairs that turn more often than this are kept. Unset: 4."""

    long_factor: Annotated[tuple[float, ...], Range(above=0)] = ()
    """longrope: the factors of the wavelengths of the head_dim / 2 pairs."""

    short_factor: Annotated[tuple[float, ...], Range(above=0)] = ()
    """longrope: the same for rows up to the original length, where these have their own (mixed_window, and at
    inference). Unset: ones with mixed_window; otherwise long_factor, with which all rows are then trained."""

    mixed_window: bool = False
    """longrope (LongRoPE2, arXiv 2502.20082): documents up to the original length are packed into rows of their own.
    These rows use short_factor, and their documents do not see each other. Rows of longer documents use long_factor."""

    bases: Annotated[tuple[float, ...], Range(above=0)] = ()
    """harpe: the base of each key-value head."""

    layers: Literal["all", "full_attention"] = "all"
    """full_attention: layers with a sliding window keep the frequencies unscaled (Olmo 3)."""

    allow: Annotated[tuple[Literal["beyond_trained", "faster_than_trained"], ...], Decides("nothing")] = ()
    """What is otherwise refused and is meant here. beyond_trained: rows longer than RoPE takes the weights.
    faster_than_trained: pairs that turn faster than the weights were trained with (docs/rope.md)."""


EvaluationTask = Literal[
    "ruler",
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
    "recall",
    "niah_mk_2",
    "niah_mk_3",
    "niah_mv",
    "json_kv",
]


@dataclass(frozen=True)
class Evaluation:
    """What the model is asked during training, in the stage's own layout: before the first step, every freq steps and
    after the last step. It is asked nothing unless texts, needle_lengths or tasks is set. See docs/evaluation.md."""

    freq: Annotated[int, Range(min=0)] = 0
    """Steps from one evaluation to the next. 0: only before the first step and after the last."""

    at_end: bool = True
    """Also evaluate after the last step. multinode/submit.sh --evaluate turns this off: a job of its own does it."""

    texts: tuple[str, ...] = ()
    """Held-out texts for the loss by position, each with its own entry in the results: .txt, .jsonl and .parquet files,
    folders of these, and tokenized folders. Relative to data.folder."""

    text_field: str = "text"
    """Field of a JSON object or column of a Parquet file that holds the text."""

    length: Annotated[int | None, Range(min=2)] = None
    """Tokens that are read of each document. Shorter documents are left out. Unset: data.target_seq_len, or else
    training.seq_len."""

    max_documents: Annotated[int, Range(min=1)] = 16
    """Documents that are read of each of texts."""

    windows: Annotated[tuple[int, ...], Range(min=1)] = ()
    """Also measure the loss of the same tokens with less context: in windows of this many tokens that overlap by half,
    so that each token sees at least half a window. The difference is what the full context gains."""

    needle_lengths: Annotated[tuple[int, ...], Range(min=1)] = ()
    """Lengths, in tokens, of texts that hide a number to be found. The text is from texts, or else Python's
    reference."""

    needle_depths: Annotated[tuple[float, ...], Range(min=0, max=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the number stands, as a share of the text: 0 is its beginning, 1 its end."""

    needles: Annotated[int, Range(min=1)] = 2
    """Questions per length and depth."""

    tasks: tuple[EvaluationTask, ...] = ()
    """Tasks of RULER and recall tasks of HELMET, by their names. ruler: all thirteen, except those whose file is not in
    qa_files. recall: niah_mk_2, niah_mk_3, niah_mv and json_kv. Haystacks of prose are from texts, as for needles."""

    task_lengths: Annotated[tuple[int, ...], Range(min=1)] = ()
    """Lengths, in tokens, at which tasks are asked: prompt and answer together."""

    task_items: Annotated[int, Range(min=1)] = 20
    """Questions per task and length. RULER itself asks 500, HELMET 100."""

    qa_files: tuple[str, ...] = ()
    """Files for RULER's qa_1 (SQuAD 2.0's dev-v2.0.json) and qa_2 (HotpotQA's hotpot_dev_distractor_v1.json). Relative
    to data.folder."""

    generate: bool = False
    """Also let the model write its answers. Otherwise only the likelihood of the right answer is measured, in one
    pass."""

    seed: Annotated[int, Range(min=0)] = 0
    """Seed of the needles and tasks."""


@dataclass(frozen=True)
class Gate:
    """A condition on metrics.jsonl. If it does not hold, the stage does not count as ended well, and its chain
    stops."""

    metric: str = ""
    """A number of metrics.jsonl: loss, or a nested one such as loss_by_position.512 or loss_by_source.books."""

    over: Annotated[int, Range(min=1)] = 5
    """The mean is taken over this many logged lines, the last ones."""

    at_most: Annotated[float | None, Range()] = None
    """The largest mean that passes."""

    at_least: Annotated[float | None, Range()] = None
    """The smallest mean that passes."""

    above_previous: Annotated[float | None, Range(min=-1)] = None
    """How far the mean may be above the previous stage's, as a share of that: 0.02 allows 2% more."""


@dataclass(frozen=True)
class Stage:
    """This run's place in a recipe."""

    name: str = ""
    """Name in logs and manifests. Unset: the name of the TOML file."""

    after: Annotated[str | None, Decides("start")] = None
    """TOML file of the previous stage, relative to this file. A fresh run starts from the last checkpoint of that
    stage, which must have ended. Empty: no previous stage (to try one stage alone)."""

    after_dump_folder: str | None = None
    """Where the previous stage wrote, if not to the job.dump_folder of its file."""

    carry: Annotated[tuple[Literal["model", "optimizer"], ...], Decides("start")] = ("model", "optimizer")
    """What is taken from the previous stage or from checkpoint.initial_load_path. The schedule and the step counter
    always begin anew."""

    continue_data: Annotated[bool, Decides("rows")] = True
    """Read each source on from where it stopped in the checkpoint that the stage starts from: nothing is read again
    before all has been read. false: the order of every source begins anew."""

    run_chain: bool = False
    """Run the previous stages that have not ended, in order, and then this one (run_train.sh). Other overrides hold for
    all of them; each stage gets a folder in job.dump_folder."""

    sbatch: tuple[str, ...] = ()
    """Options of sbatch for this stage's job (multinode/submit.sh), such as ["--nodes=16", "--time=48:00:00"]. They
    come after those of multinode/env.sh and before those of the command line; the last of two values holds."""

    gates: tuple[Gate, ...] = ()
    """What must hold at the end of the stage, each a [[stage.gates]] table."""


@dataclass(frozen=True)
class JobConfig:
    """One training stage."""

    job: Annotated[Job, Decides("nothing")] = field(default_factory=Job)
    profiling: Annotated[Profiling, Decides("nothing")] = field(default_factory=Profiling)
    metrics: Annotated[Metrics, Decides("nothing")] = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    optimizer: Annotated[Optimizer, Decides("result")] = field(default_factory=Optimizer)
    lr_scheduler: Annotated[LRScheduler, Decides("result")] = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Annotated[Parallelism, Decides("speed")] = field(default_factory=Parallelism)
    checkpoint: Annotated[Checkpoint, Decides("nothing")] = field(default_factory=Checkpoint)
    activation_checkpoint: Annotated[ActivationCheckpoint, Decides("speed")] = field(
        default_factory=ActivationCheckpoint
    )
    compile: Annotated[Compile, Decides("speed")] = field(default_factory=Compile)
    quantize: Annotated[Quantize, Decides("result")] = field(default_factory=Quantize)
    comm: Annotated[Comm, Decides("nothing")] = field(default_factory=Comm)
    data: Data = field(default_factory=Data)
    rope: Annotated[Rope, Decides("model")] = field(default_factory=Rope)
    evaluation: Annotated[Evaluation, Decides("nothing")] = field(default_factory=Evaluation)
    stage: Annotated[Stage, Decides("nothing")] = field(default_factory=Stage)
