"""What a configuration can be wrong about by itself: ranges, degrees, batch arithmetic, schedule, sources.

Pure arithmetic on the configuration and the number of processes, done by every rank before anything is built. What
needs files, a tokenizer or the model is checked where those are opened.
"""

from __future__ import annotations

import math
from typing import Any

from torchtitan.config.schema import JobConfig, Source
from torchtitan.config.toml_file import known_names
from torchtitan.tools.constants import BLOCK
from torchtitan.tools.errors import UserError

# Every numeric key of the schema is in exactly one of these (a test sees to it); unset keys are not checked.
_AT_LEAST: dict[str, int] = {
    "profiling.profile_freq": 2,  # the step before a traced one is its warm-up
    "metrics.log_freq": 1,
    "metrics.straggler_factor": 1,
    "metrics.heartbeat_seconds": 0,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "lr_scheduler.warmup_steps": 0,
    "training.seq_len": 1,
    "training.local_batch_size": 1,
    "training.global_batch_size": 1,
    "training.global_batch_tokens": 1,
    "training.steps": 1,
    "training.max_norm": 0,
    "training.loss_tile_mib": 1,
    "training.mlp_tile_tokens": 1,
    "training.z_loss": 0,
    "training.seed": 0,
    "training.gc_freq": 1,
    "training.loss_spike_factor": 1,
    "training.loss_spike_window": 1,
    "training.max_skipped_steps": 0,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.data_parallel_shard_degree": -1,
    "parallelism.context_parallel_degree": 1,
    "parallelism.context_parallel_head_chunks": 1,
    "parallelism.tensor_parallel_degree": 1,
    "activation_checkpoint.selective_ac_matmuls": 0,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.save_retries": 0,
    "checkpoint.retry_seconds": 0,
    "checkpoint.save_timeout_seconds": 1,
    "checkpoint.load_step": -1,
    "quantize.smallest_features": 16,
    "comm.init_timeout_seconds": 1,
    "comm.train_timeout_seconds": 1,
    "comm.node_check_factor": 1,
    "comm.trace_buf_size": 0,
    "data.num_workers": 0,
    "data.long_threshold": 0,
    "data.target_seq_len": 1,
    "evaluation.freq": 0,
    "evaluation.length": 2,
    "evaluation.max_documents": 1,
    "evaluation.needles": 1,
    "evaluation.task_items": 1,
    "evaluation.seed": 0,
    "rope.factor": 1,
    "rope.original_max_position_embeddings": 1,
}
# The same for the keys of [[data.sources]].
_SOURCE_AT_LEAST: dict[str, int] = {
    "weight": 0,
    "max_documents": 1,
    "min_length": 0,
    "max_length": 1,
    "chunk_length": 1,
    "upsample": 1,
}
_ABOVE_ZERO = (
    "metrics.peak_tflops",
    "optimizer.eps",
    "rope.theta",
    "rope.beta_fast",
    "rope.beta_slow",
    "rope.mscale",
    "rope.mscale_all_dim",
    "rope.attention_factor",
    "rope.low_freq_factor",
    "rope.high_freq_factor",
    "data.upsampled_weight",
)
# And of [[stage.gates]].
_GATE_AT_LEAST: dict[str, float] = {"over": 1, "above_previous": -1}
_SOURCE_ABOVE_ZERO = ("max_epochs",)
_FROM_0_TO_1 = ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor")
_BETWEEN_0_AND_1 = ("data.long_share",)
_SOURCE_BETWEEN_0_AND_1 = ("upsample_to",)
_FROM_0_BELOW_1 = ("optimizer.beta1", "optimizer.beta2")


def check_config(config: JobConfig, world_size: int) -> None:
    """Raise UserError for the first thing in `config` that cannot work with `world_size` processes."""
    check_ranges(config)
    _check_precision(config)
    _check_kernel(config)
    _check_head_chunks(config)
    _check_memory(config)
    _check_schedule(config)
    _check_sources(config)
    if config.checkpoint.load_step >= 0 and not config.checkpoint.enable:
        raise UserError(
            f"checkpoint.load_step = {config.checkpoint.load_step}, but checkpoint.enable = false: nothing is loaded "
            "then. Set enable = true, or leave load_step out."
        )
    check_stage(config)
    accumulation_steps(config, world_size)
    _check_tokens(config)


def _check_tokens(config: JobConfig) -> None:
    training, p = config.training, config.parallelism
    cp, tp = p.context_parallel_degree, p.tensor_parallel_degree
    tokens = training.seq_len * training.local_batch_size
    unit = math.lcm(cp * BLOCK, cp * tp) if cp > 1 else tp  # what a seq_len that works is a multiple of
    product = f"training.seq_len * training.local_batch_size = {training.seq_len} * {training.local_batch_size}"
    blocks = cp * BLOCK
    if cp > 1 and tokens % blocks:
        raise UserError(
            f"{product} = {tokens} is not divisible by parallelism.context_parallel_degree * {BLOCK} = {cp} * {BLOCK} "
            f"= {blocks} (ranks hold blocks of {BLOCK} tokens): {tokens} / {blocks} = {tokens / blocks:.2f}. A "
            f"seq_len of {_multiples(training.seq_len, unit)} works."
        )
    if tokens // cp % tp:
        per_rank = f"{tokens} tokens / context_parallel_degree {cp} = {tokens // cp}" if cp > 1 else f"{tokens} tokens"
        raise UserError(
            f"{product} = {per_rank} cannot be divided over parallelism.tensor_parallel_degree = {tp} (sequence "
            f"parallel): {tokens // cp} / {tp} = {tokens / cp / tp:.2f}. A seq_len that is a multiple of {unit} "
            f"works, e.g. {_multiples(training.seq_len, unit)}."
        )


def resolve_shard_degree(config: JobConfig, world_size: int) -> int:
    """data_parallel_shard_degree with -1 replaced by what the other degrees leave of `world_size`.

    Raises UserError when the degrees do not multiply to `world_size`.
    """
    p = config.parallelism
    shard = p.data_parallel_shard_degree
    others = p.data_parallel_replicate_degree * p.context_parallel_degree * p.tensor_parallel_degree
    processes = f"{world_size} process{'' if world_size == 1 else 'es'} (NGPU, times the nodes)"
    factors = (
        f"data_parallel_replicate_degree {p.data_parallel_replicate_degree} * context_parallel_degree "
        f"{p.context_parallel_degree} * tensor_parallel_degree {p.tensor_parallel_degree}"
    )
    left, remainder = divmod(world_size, others)
    if shard == -1:
        if left == 0 or remainder:
            raise UserError(
                f"[parallelism] {factors} = {others} does not divide {processes}, so that there is no "
                f"data_parallel_shard_degree for the rest. Start {_multiples(world_size, others)} processes, or lower "
                "a degree."
            )
        return left
    product = shard * others
    if product != world_size:
        fits = left > 0 and not remainder
        other = f"set data_parallel_shard_degree = {left} (or -1: all that are left)" if fits else "lower a degree"
        raise UserError(
            f"[parallelism] data_parallel_shard_degree {shard} * {factors} = {product}, but there are {processes}. "
            f"Start {product}, or {other}."
        )
    return shard


def dp_degree(config: JobConfig, world_size: int) -> int:
    """Ranks that read different rows: data_parallel_replicate_degree times the resolved shard degree."""
    return config.parallelism.data_parallel_replicate_degree * resolve_shard_degree(config, world_size)


def rows_per_step(config: JobConfig, world_size: int) -> int:
    """Rows of one optimizer step over all ranks and accumulation. Raises UserError when tokens are not whole rows."""
    t = config.training
    if t.global_batch_size is not None and t.global_batch_tokens is not None:
        raise UserError(
            f"training.global_batch_size = {t.global_batch_size} (rows) and training.global_batch_tokens = "
            f"{t.global_batch_tokens} are both given (one perhaps by a file named in `extends`); give one of the two. "
            f"On the command line, --training.global_batch_size None unsets the first."
        )
    if t.global_batch_tokens is not None:
        if t.global_batch_tokens % t.seq_len:
            raise UserError(
                f"training.global_batch_tokens = {t.global_batch_tokens} is not a whole number of rows of "
                f"training.seq_len = {t.seq_len}: {t.global_batch_tokens} / {t.seq_len} = "
                f"{t.global_batch_tokens / t.seq_len:.3f}. {_multiples(t.global_batch_tokens, t.seq_len)} would do."
            )
        return t.global_batch_tokens // t.seq_len
    if t.global_batch_size is not None:
        return t.global_batch_size
    return t.local_batch_size * dp_degree(config, world_size)


def accumulation_steps(config: JobConfig, world_size: int) -> int:
    """Micro-batches that each data-parallel rank runs in one optimizer step. Raises UserError when it is no integer."""
    t, dp, rows = config.training, dp_degree(config, world_size), rows_per_step(config, world_size)
    at_once = t.local_batch_size * dp
    if rows % at_once:
        if t.global_batch_tokens is not None:
            given = f"training.global_batch_tokens = {t.global_batch_tokens} makes {rows} rows of {t.seq_len}, which"
            fix = f"global_batch_tokens = {_multiples(rows, at_once, t.seq_len)}"
        else:
            given = f"training.global_batch_size = {rows} rows"
            fix = f"global_batch_size = {_multiples(rows, at_once)}"
        raise UserError(
            f"{given} cannot be divided into micro-batches of training.local_batch_size {t.local_batch_size} * "
            f"data-parallel degree {dp} = {at_once} rows: {rows} / {at_once} = {rows / at_once:.3f}. {fix} would do, "
            f"or another local_batch_size or number of processes{_degrees_for(rows, t.local_batch_size)}."
        )
    return rows // at_once


def _degrees_for(rows: int, local_batch_size: int) -> str:
    """Which data-parallel degrees keep the rows of a step, for a job that comes back on fewer or more nodes."""
    most, rest = divmod(rows, local_batch_size)
    if rest:
        return ""
    degrees = [str(degree) for degree in range(1, most + 1) if most % degree == 0]
    shown = degrees if len(degrees) <= 12 else [*degrees[:10], "...", degrees[-1]]
    return f" ({rows} rows in micro-batches of {local_batch_size} go over data-parallel degrees {', '.join(shown)})"


def check_ranges(config: JobConfig) -> None:
    """UserError for a number that no run could have."""
    for name in known_names():
        value = _value(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} = {value} is not a finite number.")
        if value is None:
            continue
        if name in _AT_LEAST and value < _AT_LEAST[name]:
            raise UserError(f"{name} = {value} is too small: it must be at least {_AT_LEAST[name]}.")
        if name in _ABOVE_ZERO and not isinstance(value, str) and value <= 0:
            raise UserError(f"{name} = {value} is too small: it must be greater than 0.")
        if name in _FROM_0_TO_1 and not 0 <= value <= 1:
            raise UserError(f"{name} = {value} is out of range: it is a share and must be from 0 to 1.")
        if name in _FROM_0_BELOW_1 and not 0 <= value < 1:
            raise UserError(f"{name} = {value} is out of range: it must be at least 0 and less than 1.")
        if name in _BETWEEN_0_AND_1 and not 0 < value < 1:
            raise UserError(f"{name} = {value} is out of range: it is a share and must be above 0 and below 1.")
    if config.parallelism.data_parallel_shard_degree == 0:
        raise UserError(
            "parallelism.data_parallel_shard_degree = 0: it must be at least 1, or -1 for all processes that the other "
            "degrees leave."
        )


def _check_precision(config: JobConfig) -> None:
    t = config.training
    if t.dtype == "bfloat16" and t.mixed_precision_param == "float32":
        raise UserError(
            'training.dtype = "bfloat16" stores parameters in 16 bits, and training.mixed_precision_param = "float32" '
            'would widen what has already been rounded: memory without precision. Set dtype = "float32", or '
            'mixed_precision_param = "bfloat16".'
        )


def _check_memory(config: JobConfig) -> None:
    ac, optimizer = config.activation_checkpoint, config.optimizer
    option = ac.selective_ac_option
    if option != "op" and not (option.isascii() and option.isdigit() and int(option) > 0):
        raise UserError(
            f'activation_checkpoint.selective_ac_option = "{option}" is neither "op" nor the number of blocks of which '
            'one is recomputed, such as "2".'
        )
    if ac.offload and ac.mode == "none":
        raise UserError(
            'activation_checkpoint.offload = true, but activation_checkpoint.mode = "none": no block is recomputed, so '
            'no input of one is kept. Set mode = "full" or "selective", or leave offload out.'
        )
    if (optimizer.state_dtype or config.training.dtype) == "bfloat16":
        for name in ("beta1", "beta2"):
            beta = getattr(optimizer, name)
            if 0 < 1 - beta < 2**-8:
                raise UserError(
                    f"optimizer.{name} = {beta} with moments in bfloat16 (optimizer.state_dtype, where it is not set "
                    f"training.dtype): a step moves a moment by at most 1 - {name} = {1 - beta:.4g} of itself "
                    "downwards, less than bfloat16 tells apart (2^-8 = 0.0039), so that it would never fall. Use a "
                    f"{name} of at most 0.996, or float32."
                )


def _check_kernel(config: JobConfig) -> None:
    if config.model.attention_backend == "varlen" and config.training.mixed_precision_param == "float32":
        raise UserError(
            'model.attention_backend = "varlen" knows 16-bit types only, but training.mixed_precision_param = '
            '"float32": set that to "bfloat16", or use "flex".'
        )
    if config.model.attention_backend == "varlen" and config.data.anchor_attention:
        raise UserError(
            'model.attention_backend = "varlen" cannot show queries an anchor (data.anchor_attention = true): '
            'FlashAttention\'s mask is one range of keys a query. Use "flex" on CUDA, "sdpa" anywhere, or "auto".'
        )


def _check_head_chunks(config: JobConfig) -> None:
    p = config.parallelism
    if p.context_parallel_head_chunks > 1 and p.context_parallel_exchange != "ulysses":
        raise UserError(
            f"parallelism.context_parallel_head_chunks = {p.context_parallel_head_chunks} is read by "
            f'context_parallel_exchange = "ulysses" only, but that is "{p.context_parallel_exchange}", which moves '
            "tokens, not heads: leave it out, or change the exchange."
        )


def _check_schedule(config: JobConfig) -> None:
    steps, s = config.training.steps, config.lr_scheduler
    if s.warmup_steps > steps:
        raise UserError(
            f"lr_scheduler.warmup_steps = {s.warmup_steps} is more than training.steps = {steps}: the learning rate "
            f"would never reach optimizer.lr. Set warmup_steps to at most {steps} (for a trial, "
            f"--lr_scheduler.warmup_steps {steps // 10})."
        )
    if s.decay_ratio is None:
        return
    decay = round(steps * s.decay_ratio)
    if s.warmup_steps + decay > steps:
        raise UserError(
            f"lr_scheduler.warmup_steps {s.warmup_steps} + decay (lr_scheduler.decay_ratio {s.decay_ratio} * "
            f"training.steps {steps} = {decay}) = {s.warmup_steps + decay} steps is more than the {steps} there are. "
            f"Set decay_ratio to at most {(steps - s.warmup_steps) / steps:g}, or warmup_steps to at most "
            f"{steps - decay}."
        )


def check_stage(config: JobConfig) -> None:
    """UserError for what is wrong in [stage], whatever the number of processes."""
    for option in config.stage.sbatch:
        if not option.startswith("-") or option == "--":
            raise UserError(
                f'stage.sbatch has "{option}", which sbatch would take for the script: write an option and its value '
                'as one, e.g. "--nodes=8".'
            )
    for i, gate in enumerate(config.stage.gates):
        where = f"stage.gates[{i}]"
        if not gate.metric:
            raise UserError(f'{where} has no metric: name a number of metrics.jsonl, e.g. metric = "loss".')
        bounds = {"at_most": gate.at_most, "at_least": gate.at_least, "above_previous": gate.above_previous}
        if all(value is None for value in bounds.values()):
            raise UserError(f"{where} ({gate.metric}) asks for nothing: give at_most, at_least or above_previous.")
        for key, value in {**bounds, "over": gate.over}.items():
            if value is not None and not math.isfinite(value):
                raise UserError(f"{where}: {key} = {value} is not a finite number.")
            if value is not None and value < _GATE_AT_LEAST.get(key, value):
                raise UserError(f"{where}: {key} = {value} is too small: it must be at least {_GATE_AT_LEAST[key]}.")
        if gate.above_previous is not None and not config.stage.after:
            raise UserError(f"{where}: above_previous compares with the stage before, but stage.after is not set.")
    starts = {
        "stage.after": bool(config.stage.after),
        "checkpoint.initial_load_path": bool(config.checkpoint.initial_load_path),
        "checkpoint.initial_load_in_hf": config.checkpoint.initial_load_in_hf,
    }
    given = [name for name, is_set in starts.items() if is_set]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} are set (one perhaps by a file named in `extends`), but a fresh run starts from "
            'one place. Unset the others (initial_load_in_hf = false, after = "", initial_load_path = "").'
        )
    if config.stage.after and "model" not in config.stage.carry:
        raise UserError(
            f"stage.carry = {list(config.stage.carry)} leaves the model behind, and stage.after would do nothing: add "
            '"model", or leave stage.after out.'
        )
    if config.checkpoint.exclude_from_loading and not config.checkpoint.initial_load_path:
        raise UserError(
            "checkpoint.exclude_from_loading is about checkpoint.initial_load_path, which is not set; what a stage "
            "takes from the one before it is stage.carry."
        )
    if (config.stage.gates or config.checkpoint.last_save_in_hf) and not config.checkpoint.enable:
        key = "stage.gates" if config.stage.gates else "checkpoint.last_save_in_hf"
        raise UserError(f"{key} needs the last checkpoint, but checkpoint.enable = false.")


def _check_sources(config: JobConfig) -> None:
    sources = config.data.sources
    if not sources:
        raise UserError(
            "There is nothing to train on: the configuration has no [[data.sources]]. Write one table for each source "
            'into the TOML file: [[data.sources]], name = "books", path = "books/*.jsonl".'
        )
    for i, source in enumerate(sources):
        for key in ("name", "path"):
            if not getattr(source, key).strip():
                other = source.path if key == "name" else source.name
                which = f" ({other})" if other.strip() else ""
                raise UserError(
                    f'data.sources[{i}]{which} has no {key}: write {key} = "..." into that [[data.sources]].'
                )
        _check_source(source, f'data.sources[{i}] ("{source.name}")', config)
        first = next(j for j, earlier in enumerate(sources) if earlier.name == source.name)
        if first != i:
            raise UserError(
                f"data.sources[{first}] ({sources[first].path}) and data.sources[{i}] ({source.path}) have the same "
                f'name "{source.name}": reports and metrics are kept by name, so give each its own.'
            )
    if all(source.weight == 0 for source in sources):
        names = ", ".join(source.name for source in sources)
        raise UserError(f"Every source has weight = 0 ({names}): at least one must be above 0.")
    _check_strategy(config)
    _check_positions(config)


def _check_source(source: Source, where: str, config: JobConfig) -> None:
    for key, value in vars(source).items():
        if not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise UserError(f"{where}: {key} = {value} is not a finite number.")
        if value < _SOURCE_AT_LEAST.get(key, value):
            raise UserError(f"{where}: {key} = {value} is too small: it must be at least {_SOURCE_AT_LEAST[key]}.")
        if key in _SOURCE_ABOVE_ZERO and value <= 0:
            raise UserError(f"{where}: {key} = {value} must be above 0.")
        if key in _SOURCE_BETWEEN_0_AND_1 and not 0 < value < 1:
            raise UserError(f"{where}: {key} = {value} is a share and must be above 0 and below 1.")
    if source.max_length is not None and source.min_length > source.max_length:
        raise UserError(
            f"{where}: min_length = {source.min_length} is more than max_length = {source.max_length}, so that no "
            "document would be left. Swap them, or drop one."
        )
    if source.chunk_length is not None and source.chunk_length > config.training.seq_len:
        raise UserError(
            f"{where}: chunk_length = {source.chunk_length} is more than training.seq_len = {config.training.seq_len}: "
            "a piece cannot be longer than a row. Leave chunk_length out to cut at the row's length."
        )
    if source.upsample is not None and source.upsample_to is not None:
        raise UserError(f"{where}: upsample and upsample_to say the same in two ways; give one of them.")
    raised = source.upsample is not None or source.upsample_to is not None
    if raised and config.data.strategy in ("per_source_upsampling", "global_upsampling"):
        raise UserError(
            f'{where}: upsample and upsample_to raise one source, data.strategy = "{config.data.strategy}" raises all; '
            'give one of the two (strategy = "original" leaves it to the sources).'
        )
    if source.messages_field and source.long_document == "split":
        raise UserError(
            f'{where}: a conversation (messages_field = "{source.messages_field}") that is longer than a row cannot be '
            'split, since its second part would answer what it does not see: set long_document = "drop" (left out, '
            'and counted in the report) or "truncate" (its end is cut off).'
        )
    if source.messages_field and config.data.packing == "concat":
        raise UserError(
            f'{where}: data.packing = "concat" cuts conversations (messages_field = "{source.messages_field}") '
            'wherever a row ends: use "best_fit", which leaves them whole.'
        )
    if source.path.startswith("hub:") and not source.path[4:].strip("/ "):
        raise UserError(f'{where}: path = "{source.path}" names no dataset; write hub:OWNER/NAME.')


def _check_strategy(config: JobConfig) -> None:
    data = config.data
    names = [source.name for source in data.sources]
    unknown = [name for name in data.upsampled_sources if name not in names]
    if unknown:
        raise UserError(
            f'data.upsampled_sources names "{unknown[0]}", which is no source; the sources are {", ".join(names)}.'
        )
    if data.strategy == "domain_upsampling" and not data.upsampled_sources:
        raise UserError(
            'data.strategy = "domain_upsampling" needs data.upsampled_sources, the names of the sources to raise, e.g. '
            f'upsampled_sources = ["{names[0]}"].'
        )
    if data.strategy != "domain_upsampling" and data.upsampled_sources:
        raise UserError(
            f'data.upsampled_sources is read by strategy = "domain_upsampling" only, but data.strategy = '
            f'"{data.strategy}": change one of the two.'
        )


def _check_positions(config: JobConfig) -> None:
    data, seq_len = config.data, config.training.seq_len
    if data.anchor_attention and data.cross_document_attention:
        raise UserError(
            "data.anchor_attention = true shows documents the first token of their row, and "
            "data.cross_document_attention = true all of it: leave one of the two out."
        )
    if data.anchor_attention and data.positions not in ("continue", "reset"):
        raise UserError(
            "data.anchor_attention = true puts the first token of a row before all its documents, but data.positions = "
            f'"{data.positions}" draws the positions of each document by itself, and they may lie before that of the '
            'anchor. Use "continue".'
        )
    if data.positions in ("reset", "continue"):
        if data.target_seq_len is not None:
            raise UserError(
                f"data.target_seq_len = {data.target_seq_len} is read by data.positions = pose, longrecipe, cream and "
                f'random, but data.positions = "{data.positions}": leave it out, or choose one of these.'
            )
    elif data.target_seq_len is None or data.target_seq_len < seq_len:
        given = "is not set" if data.target_seq_len is None else f"= {data.target_seq_len}"
        raise UserError(
            f'data.positions = "{data.positions}" trains rows of training.seq_len = {seq_len} for a longer context, '
            f"but data.target_seq_len {given}: it must be at least {seq_len}."
        )


def _value(config: JobConfig, name: str) -> Any:
    table, _, key = name.partition(".")
    return getattr(getattr(config, table), key)


def _multiples(number: int, divisor: int, times: int = 1) -> str:
    """The nearest positive multiples of `divisor` below and above `number`, each `times` as large, as text."""
    below = number // divisor * divisor
    above = below + divisor
    return f"{below * times} or {above * times}" if below > 0 else str(above * times)
