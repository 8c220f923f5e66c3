"""The schema of a stage: one frozen dataclass a TOML table, one field a key.

Table and key names are torchtitan 0.2's where the meaning is the same. The string under each field is its
documentation: `--help` prints it. A new option is a new field here and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Job:
    """What this run is and where it writes."""

    config_file: str | None = None
    """TOML file of the stage. Not part of the resolved configuration."""

    dump_folder: str = "./outputs"
    """Folder that receives everything the run leaves: config.toml, plan.json, metrics.jsonl, tb/, checkpoint/."""

    description: str = ""
    """Free text, logged at start."""

    hooks: tuple[str, ...] = ()
    """Classes of hooks of your own, each "module:Class" on PYTHONPATH. They are called at the points that
    docs/extending.md lists."""

    print_config: bool = False
    """Print the resolved configuration as TOML and exit."""


@dataclass(frozen=True)
class Profiling:
    """PyTorch profiler traces and CUDA memory snapshots."""

    enable_profiling: bool = False
    """Write a Chrome trace of one step every profile_freq steps."""

    save_traces_folder: str = "profile_traces"
    """Folder under job.dump_folder for the traces, one file a rank."""

    profile_freq: int = 10
    """Steps from one trace to the next; the step before each is run as warm-up."""

    enable_memory_snapshot: bool = False
    """Record CUDA allocations and write a snapshot every profile_freq steps (CUDA only)."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder under job.dump_folder for the memory snapshots."""


@dataclass(frozen=True)
class Metrics:
    """What is logged, how often, and where to."""

    log_freq: int = 10
    """Steps between two log lines. metrics.jsonl gets a line as often; step 1 and the last step always."""

    enable_tensorboard: bool = True
    """Write TensorBoard events to save_tb_folder."""

    save_tb_folder: str = "tb"
    """Folder under job.dump_folder for TensorBoard events."""

    enable_wandb: bool = False
    """Log to Weights & Biases too (needs the extra `wandb`; WANDB_PROJECT and the like are its own)."""

    peak_tflops: float | None = None
    """Peak dense bf16 TFLOP/s of one device, for MFU. Unset: from a table of known GPUs; MFU is left out elsewhere."""

    straggler_factor: float = 1.5
    """A rank that computes so many times slower than the median rank, or makes steps last so many times longer by
    coming late to them, is named in the log (checked with every log line)."""

    heartbeat_seconds: float = 5.0
    """heartbeat.json in job.dump_folder is replaced after a step if it is older than this."""


@dataclass(frozen=True)
class Model:
    """Which architecture, and where its tokenizer, config.json and weights are."""

    flavor: str = "debugmodel"
    """A size from torchtitan/models/registry.py (`llama3.1_8b`, `qwen3_8b`, ...); `auto`: read config.json in
    hf_assets_path; or `module:NAME`, a TransformerArgs of your own on PYTHONPATH (docs/extending.md)."""

    hf_assets_path: str = "./assets/tokenizer"
    """Hugging Face style folder with the tokenizer (tokenizer.json or a Llama-3 tokenizer.model) and, for flavor
    `auto` and checkpoint.initial_load_in_hf, config.json and *.safetensors."""

    attention_backend: Literal["auto", "flex", "varlen", "sdpa", "dense"] = "auto"
    """auto: flex on CUDA, sdpa on the CPU. flex: FlexAttention under a block mask made from offsets. varlen: PyTorch's
    flash attention over ragged segments (CUDA, 16 bits). sdpa: one call a segment. dense: the tests' oracle."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    name: Literal["AdamW"] = "AdamW"
    """The only optimizer offered."""

    lr: float = 8e-4
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay of the first moment."""

    beta2: float = 0.95
    """Decay of the second moment."""

    eps: float = 1e-8
    """Added to the square root of the second moment."""

    weight_decay: float = 0.1
    """Decoupled weight decay of every parameter that no_decay does not name."""

    no_decay: tuple[str, ...] = ()
    """Shell patterns of parameter names without weight decay, e.g. ["*norm*", "*bias", "tok_embeddings.*"]."""

    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Type that the two moments are stored in; given, a step is computed in float32. Unset: training.dtype."""

    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """Which of PyTorch's AdamW kernels."""


@dataclass(frozen=True)
class LRScheduler:
    """Learning rate as a pure function of the step: linear warmup, constant part, decay to min_lr_factor."""

    warmup_steps: int = 200
    """Steps from 0 to the peak; step k < warmup_steps runs at lr * k / warmup_steps."""

    decay_ratio: float | None = None
    """Share of training.steps spent decaying (warmup-stable-decay). Unset: decay starts when warmup ends. 0: never."""

    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the decay; sqrt is 1 - sqrt(progress)."""

    min_lr_factor: float = 0.0
    """The decay ends at lr * min_lr_factor."""


@dataclass(frozen=True)
class Training:
    """Row length, batch, steps, precision."""

    seq_len: int = 2048
    """Tokens in a row."""

    local_batch_size: int = 1
    """Rows in a micro-batch of one data-parallel rank; they are laid end to end as one stream."""

    global_batch_size: int | None = None
    """Rows in a step over all ranks and accumulation. Unset: local_batch_size times the data-parallel degree."""

    global_batch_tokens: int | None = None
    """The same in tokens (global_batch_size * seq_len); give one of the two."""

    steps: int = 10000
    """Optimizer steps of this stage."""

    max_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 never clips."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored parameters and, unless optimizer.state_dtype says otherwise, of the optimizer state."""

    mixed_precision_param: Literal["float32", "bfloat16"] = "bfloat16"
    """Type that parameters are cast to for forward and backward."""

    mixed_precision_reduce: Literal["float32"] = "float32"
    """Type that gradients are reduced in across ranks."""

    loss_tile_mib: int = 1024
    """The loss is computed for as many tokens at a time as have so many MiB of logits in float32 on a rank."""

    mlp_tile_tokens: int | None = None
    """The feed-forward is computed for so many tokens at a time, each tile once more in backward, instead of keeping
    its hidden units. Under tensor parallelism tokens of the ranks together. Unset: all at once."""

    enable_cpu_offload: bool = False
    """Parameters, gradients and the optimizer's state and work are in host memory; a block's parameters are copied to
    the device when they are gathered."""

    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in what is minimised (Olmo 3: 1e-5); not in the loss that
    is logged."""

    seed: int = 0
    """Seeds weight initialisation and the data plan."""

    deterministic: bool = False
    """Ask PyTorch for deterministic kernels (an error where there is none)."""

    gc_freq: int = 50
    """Python's garbage collector runs only every gc_freq steps, on all ranks at once."""

    on_bad_loss: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradient norm is NaN or infinite, or whose loss is a spike. stop: the run
    ends, nothing of the step is kept. skip: its gradients are thrown away, its rows count as used, and training goes
    on; the step is logged and kept in the manifest."""

    loss_spike_factor: float | None = None
    """A loss of more than so many times the median of the last loss_spike_window losses is a spike. Unset: none is."""

    loss_spike_window: int = 50
    """Losses that the median is taken of; before there are so many, nothing is a spike."""

    max_skipped_steps: int = 10
    """The stage stops at the bad step after so many have been skipped."""


@dataclass(frozen=True)
class Parallelism:
    """Degrees of parallelism; their product is the number of processes. There is no pipeline parallelism."""

    data_parallel_replicate_degree: int = 1
    """Copies of the sharded model (HSDP when above 1)."""

    data_parallel_shard_degree: int = -1
    """Ranks that FSDP2 shards parameters, gradients and optimizer state over; -1: all that are left."""

    context_parallel_degree: int = 1
    """Ranks that share the tokens of a micro-batch; parameters are sharded over them too."""

    context_parallel_layout: Literal["balanced", "headtail", "contiguous"] = "balanced"
    """Which rank holds which tokens, in blocks of 128. balanced: the same attention work on every rank whatever the
    documents are, with short documents whole on one; headtail: one block run from either end; contiguous: one run."""

    context_parallel_exchange: Literal["needed", "allgather", "ulysses"] = "needed"
    """How keys and values reach other ranks' queries. needed: only those that some query there sees; allgather: all;
    ulysses: each rank computes all tokens of a share of the heads instead."""

    context_parallel_head_chunks: int = 1
    """ulysses: exchange and compute the heads in so many parts, one after the other, so that a rank's buffers of all
    tokens are of a part's heads only. Above 1 attention is computed once more, in backward."""

    self_check: bool = True
    """Before the first step with more than one process, prove on a small random batch that this combination of layout,
    exchange, backend and degrees gives the results of one process; refuse to start if not."""

    tensor_parallel_degree: int = 1
    """Ranks that share each matrix; norms and residuals are sharded along the tokens (sequence parallel)."""

    fsdp_reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward and gather them again for its backward."""


@dataclass(frozen=True)
class Checkpoint:
    """DCP checkpoints: when, where, how many, and what a run starts from."""

    enable: bool = True
    """Save checkpoints, and resume from the newest complete one in the folder."""

    folder: str = "checkpoint"
    """Folder under job.dump_folder; each checkpoint is step-N/ in it."""

    interval: int = 500
    """Steps between two checkpoints; the last step is always saved."""

    async_mode: Literal["disabled", "async"] = "disabled"
    """async: write in a background thread while training goes on."""

    keep_latest_k: int = 10
    """Older complete checkpoints beyond this many are deleted; 0 keeps all."""

    save_retries: int = 3
    """A rank whose write fails tries again so many times."""

    retry_seconds: float = 10.0
    """Wait before it does; each further wait is twice as long."""

    on_failed_save: Literal["stop", "go_on"] = "stop"
    """What a save that fails for good does: end the run, or only be logged, the next one being tried at its time. The
    save at the end of a run must succeed in any case. The last good checkpoint stays."""

    save_timeout_seconds: int = 7200
    """Longest wait in a save, or in the check of a checkpoint's files, for the rank with the slowest disk."""

    load_step: int = -1
    """Resume from exactly this step; -1: the newest complete one."""

    initial_load_in_hf: bool = False
    """Start a fresh run from the safetensors in model.hf_assets_path."""

    initial_load_path: str | None = None
    """Start a fresh run from a checkpoint elsewhere: a step-N folder, a folder of them (the newest), or a Hugging Face
    folder."""

    exclude_from_loading: tuple[Literal["model", "optimizer"], ...] = ()
    """Parts of initial_load_path that are not loaded, e.g. ["optimizer"]."""

    last_save_in_hf: bool = False
    """At the end of the stage, write the model as a Hugging Face folder too: export/step-N/ under job.dump_folder."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights in that folder."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    """Recomputation in backward."""

    mode: Literal["none", "selective", "full"] = "none"
    """full: keep only each block's input and recompute the block in backward. selective: see
    selective_ac_option."""

    selective_ac_option: str = "op"
    """op: recompute every block but its attention kernels, and but for the matrix products that selective_ac_matmuls
    names. A number n: recompute the first of every n blocks whole, and nothing of the others."""

    selective_ac_matmuls: int = 2
    """With "op": every n-th matrix product of a block is saved, too; 0: none is. Where compile.enable is on, products
    are inside what is compiled and none is."""

    offload: bool = False
    """The inputs of recomputed blocks wait in (pinned) host memory, copied beside the computation."""


@dataclass(frozen=True)
class Compile:
    """torch.compile, block by block."""

    enable: bool = False
    """Compile every transformer block; attention stays outside."""

    backend: str = "inductor"
    """Backend of torch.compile."""


@dataclass(frozen=True)
class Quantize:
    """Matrix products of the blocks' linear layers in FP8, through torchao (the extra `fp8`)."""

    recipe_name: Literal["none", "rowwise", "tensorwise"] = "none"
    """none: no FP8. rowwise: a scale for each token and each output feature, so that a token's rounding depends on no
    other token. tensorwise: one for each tensor; faster, but what one token holds changes the rounding of all."""

    filter_fqns: tuple[str, ...] = ()
    """Layers whose name contains one of these stay as they are, e.g. ["attention.wo", "layers.0."]. Embedding, norms
    and the output head always do."""

    smallest_features: int = 2048
    """So do layers with fewer input or output features (on a tensor-parallel rank), which FP8 makes slower, and those
    where one of the two is no multiple of 16."""

    emulate: bool = False
    """Round to FP8 but multiply in the type of the activations: for tests, on the CPU and on GPUs without FP8."""


@dataclass(frozen=True)
class Comm:
    """Collectives."""

    init_timeout_seconds: int = 300
    """Longest wait in a collective until the first step has ended."""

    train_timeout_seconds: int = 100
    """Longest wait in a collective after the first step."""

    node_check: bool = False
    """Before training, time every rank's matrix product and the all-reduce inside nodes and between neighbouring ones;
    slow hosts are named in the log and in node_check.json, broken ones stop the run. Also
    `python -m torchtitan.extensions.cluster.node_check`."""

    node_check_factor: float = 1.5
    """A host is slow when it takes more than so many times the median host's time."""

    trace_buf_size: int = 20000
    """Collectives that PyTorch's flight recorder remembers (NCCL only; gloo has none). When one times out every rank
    writes them to save_traces_folder. 0: off."""

    save_traces_folder: str = "comm_traces"
    """Folder under job.dump_folder for the flight recorder's files and, on any backend, for the stacks of the ranks
    when a step takes 0.8 times train_timeout_seconds."""


@dataclass(frozen=True)
class Source:
    """One source of documents: text that is tokenized once into the cache, or a tokenized folder."""

    name: str = ""
    """Name in reports and metrics."""

    path: str = ""
    """Folder written by scripts/tokenize_corpus.py or datasets' save_to_disk; a file, folder or glob of .jsonl,
    .parquet or .txt text; a folder of MDS shards; or hub:OWNER/NAME, a dataset of the Hugging Face hub, which is
    streamed into the cache. Relative to data.folder."""

    weight: float = 1.0
    """Share of the training tokens, relative to the other sources' weights."""

    text_field: str = "text"
    """Field of a jsonl, parquet or hub record that holds the text."""

    messages_field: str = ""
    """Or: field that holds a conversation, a list of messages with role and content (usually "messages"). The model's
    chat template makes the text, and the loss is on the assistant's responses only."""

    hub_subset: str = ""
    """Configuration of a hub dataset, e.g. sample-10BT. Empty: its default."""

    hub_split: str = "train"
    """Split of a hub dataset."""

    hub_revision: str = "main"
    """Branch, tag or commit of a hub dataset; a commit is what can be repeated."""

    max_documents: int | None = None
    """Use only the first so many documents; of a hub dataset no more are downloaded."""

    min_length: int = 0
    """Leave out documents of fewer tokens."""

    max_length: int | None = None
    """Leave out documents of more tokens."""

    chunk_length: int | None = None
    """Longest piece of a document, in tokens, where that is to be shorter than a row: pieces do not see each other."""

    long_document: Literal["split", "truncate", "drop"] = "split"
    """What becomes of a document longer than a row (or chunk_length). split: pieces, every token is used; truncate:
    its beginning only; drop: left out."""

    upsample: float | None = None
    """Documents of more than data.long_threshold tokens occur this many times as often as the shorter ones."""

    upsample_to: float | None = None
    """Or: the share of the source's tokens that lies in such documents; never less than it is by nature."""

    separator: str = ""
    """Text put after each document as ordinary tokens (UltraLong's "<s>"), beside or instead of BOS and EOS."""

    max_epochs: float | None = None
    """Refuse a plan that reads the source more often than this. Unset: it is repeated, reshuffled, and reported."""


@dataclass(frozen=True)
class Data:
    """What the stage reads."""

    sources: tuple[Source, ...] = ()
    """The sources, each a [[data.sources]] table."""

    folder: str = "."
    """Where relative paths of sources start."""

    add_bos: bool = True
    """Begin every document with the tokenizer's BOS token."""

    add_eos: bool = True
    """End every document with the tokenizer's EOS token."""

    strategy: Literal[
        "original",
        "cut_4k",
        "cut_128k",
        "per_source_upsampling",
        "global_upsampling",
        "domain_upsampling",
    ] = "original"
    """How lengths are mixed (Fu et al., arXiv 2402.10171). cut_4k, cut_128k: no piece is longer. per_source_upsampling:
    in every source documents over long_threshold rise to long_share of its tokens. global_upsampling: they rise
    to long_share of all tokens, and sources that have more of them gain weight. domain_upsampling: upsampled_sources
    get upsampled_weight each."""

    long_threshold: int = 4096
    """Documents of more tokens are long, to upsampling."""

    long_share: float = 0.7
    """Share of tokens in long documents that per_source_upsampling and global_upsampling raise to."""

    upsampled_sources: tuple[str, ...] = ()
    """Names of the sources that domain_upsampling raises."""

    upsampled_weight: float = 0.6
    """Their weight, beside the other sources' own; the sum is then made 1."""

    packing: Literal["best_fit", "concat", "single"] = "best_fit"
    """best_fit: pieces whole into rows, longest first, each where the least room is left over. concat: documents laid
    end to end and cut every seq_len tokens. single: one piece a row. What stays empty is padding, masked."""

    cross_document_attention: bool = False
    """Let the documents of a row attend to each other (padding never)."""

    anchor_attention: bool = False
    """Documents see, beside themselves, the first token of their row (AnchorAttention, arXiv 2411.13476); positions
    should run on ("continue")."""

    positions: Literal["reset", "continue", "pose", "longrecipe", "cream", "random"] = "reset"
    """What RoPE is given. reset: from 0 in each document; continue: from 0 in each row. The others train short and
    stand for long: positions within target_seq_len, drawn anew for each row (PoSE, LongRecipe, CREAM, RPES)."""

    target_seq_len: int | None = None
    """The length that pose, longrecipe, cream and random stand for."""

    cache_folder: str = "./data_cache"
    """Where tokenized text and plans are kept, named by content and tokenizer."""

    num_workers: int = 1
    """Loader processes a rank; 0 builds batches in the training process."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base of its frequencies, and how they are rescaled (formulas: docs/rope.md)."""

    theta: float | Literal["auto"] | None = None
    """Base of the rotary frequencies. Unset: the model's own. auto: that of the stage before (without one, the model's
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
    """How the frequencies are rescaled. model: as the model's config.json or flavor says. none: not at all (only theta
    counts). linear: position interpolation. ntk, dynamic: another base, by factor or by factor and length. yarn,
    llama3, ntk_by_parts: short wavelengths kept, long ones interpolated. longrope: a factor for each pair. gene: a
    factor drawn for each micro-batch. harpe: a base for each key-value head."""

    factor: float | None = None
    """How many times the original length: linear, ntk, dynamic, ntk_by_parts, yarn, llama3, gene; of longrope only its
    attention factor is made from it. Always against the original length, also in a second stage."""

    original_max_position_embeddings: int | None = None
    """Length the model was trained for before any rescaling: dynamic, ntk_by_parts, yarn, llama3, longrope, gene."""

    beta_fast: float | None = None
    """yarn, ntk_by_parts: pairs that turn more often than this within the original length are kept. Unset: 32."""

    beta_slow: float | None = None
    """yarn, ntk_by_parts: pairs that turn less often than this are interpolated in full. Unset: 1."""

    truncate: bool = True
    """yarn: round the ends of its ramp to whole pairs, as the paper's code does."""

    mscale: float | None = None
    """yarn: attention factor (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor + 1), where both are set."""

    mscale_all_dim: float | None = None
    """See mscale."""

    attention_factor: float | None = None
    """yarn, longrope: cos and sin are multiplied by this. Unset: 0.1 ln factor + 1 for yarn, and for longrope
    sqrt(1 + ln factor / ln original length), or 1 where no factor is given."""

    low_freq_factor: float | None = None
    """llama3: pairs that turn less often than this within the original length are interpolated in full. Unset: 1."""

    high_freq_factor: float | None = None
    """llama3: pairs that turn more often than this are kept. Unset: 4."""

    long_factor: tuple[float, ...] = ()
    """longrope: what the wavelength of each of the head_dim / 2 pairs is multiplied by."""

    short_factor: tuple[float, ...] = ()
    """longrope: the same for rows up to the original length, where those are told apart (mixed_window, and at
    inference). Unset: ones with mixed_window, else long_factor, with which all rows are trained then."""

    mixed_window: bool = False
    """longrope (LongRoPE2, arXiv 2502.20082): documents up to the original length are packed into rows of their own,
    which use short_factor, and do not see each other; rows with longer documents use long_factor."""

    bases: tuple[float, ...] = ()
    """harpe: the base of each key-value head."""

    layers: Literal["all", "full_attention"] = "all"
    """full_attention: layers with a sliding window keep the frequencies unscaled (Olmo 3)."""


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
    """What the model is asked beside training, in the stage's own layout: before the first step, every freq steps and
    after the last one. Nothing unless texts, needle_lengths or tasks says what. See docs/evaluation.md."""

    freq: int = 0
    """Every so many steps. 0: only before the first step and after the last."""

    at_end: bool = True
    """Also after the last step. multinode/submit.sh --evaluate turns it off, as a job of its own does that then."""

    texts: tuple[str, ...] = ()
    """Held-out text for the loss by position, a name in the results each: .txt, .jsonl and .parquet files, folders of
    such and tokenized folders; relative to data.folder."""

    text_field: str = "text"
    """Field of a JSON object or column of a Parquet file that holds the text."""

    length: int | None = None
    """Tokens that are read of each document; shorter documents are left out. Unset: data.target_seq_len or
    training.seq_len."""

    max_documents: int = 16
    """Documents of each of texts."""

    windows: tuple[int, ...] = ()
    """Also the loss of the same tokens with less context: within windows of so many tokens that overlap by half, where
    each token sees half a window before it or more. What the full context gains over that."""

    needle_lengths: tuple[int, ...] = ()
    """Lengths, in tokens, of texts with a number to find in them. Text is from texts, else Python's own reference."""

    needle_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of the text before the needle."""

    needles: int = 2
    """Questions for each length and depth."""

    tasks: tuple[EvaluationTask, ...] = ()
    """RULER's tasks and HELMET's recall tasks, by their names; ruler: all thirteen, less those that qa_files has no
    file for; recall: niah_mk_2, niah_mk_3, niah_mv and json_kv. Prose for haystacks is from texts, as for needles."""

    task_lengths: tuple[int, ...] = ()
    """Lengths, in tokens, at which tasks are asked: prompt and answer together."""

    task_items: int = 20
    """Questions for each task and length. RULER's own number is 500, HELMET's 100."""

    qa_files: tuple[str, ...] = ()
    """Files for RULER's qa_1 (SQuAD 2.0's dev-v2.0.json) and qa_2 (HotpotQA's hotpot_dev_distractor_v1.json); relative
    to data.folder."""

    generate: bool = False
    """Also have the model write its answers. Otherwise the likelihood of the right answer is measured, in one pass."""

    seed: int = 0
    """Of the needles and tasks."""


@dataclass(frozen=True)
class Gate:
    """A condition on metrics.jsonl without which a stage does not count as ended well, and its chain stops."""

    metric: str = ""
    """A number of metrics.jsonl: loss, or a nested one as loss_by_position.512 or loss_by_source.books."""

    over: int = 5
    """The mean of so many last logged lines is taken."""

    at_most: float | None = None
    """The mean must not be above this."""

    at_least: float | None = None
    """The mean must not be below this."""

    above_previous: float | None = None
    """The mean may be above the same mean of the stage before by this share of it at most, e.g. 0.02."""


@dataclass(frozen=True)
class Stage:
    """This run's place in a recipe."""

    name: str = ""
    """Name in logs and manifests. Unset: the TOML file's name."""

    after: str | None = None
    """TOML file of the stage before, relative to this file: a fresh run starts from the last checkpoint of that stage,
    which must have ended. Empty: none (to try one stage alone)."""

    after_dump_folder: str | None = None
    """Where that stage wrote, if not to the job.dump_folder of its file."""

    carry: tuple[Literal["model", "optimizer"], ...] = ("model", "optimizer")
    """What is carried over from the stage before, or from checkpoint.initial_load_path. The schedule, the step counter
    and the data always begin anew."""

    run_chain: bool = False
    """Run the stages before this one that have not ended, in order, and then this one (run_train.sh). Other overrides
    hold for all of them; job.dump_folder gets a folder for each."""

    sbatch: tuple[str, ...] = ()
    """Options of sbatch for this stage's job (multinode/submit.sh), such as ["--nodes=16", "--time=48:00:00"]: after
    those of multinode/env.sh, before those of the command line. The later one of two holds."""

    gates: tuple[Gate, ...] = ()
    """What must hold at the end of the stage, each a [[stage.gates]] table."""


@dataclass(frozen=True)
class JobConfig:
    """One training stage."""

    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    comm: Comm = field(default_factory=Comm)
    data: Data = field(default_factory=Data)
    rope: Rope = field(default_factory=Rope)
    evaluation: Evaluation = field(default_factory=Evaluation)
    stage: Stage = field(default_factory=Stage)
