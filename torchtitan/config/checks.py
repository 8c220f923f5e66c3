"""Mistakes that show in a configuration alone: ranges, degrees, batch arithmetic, precision, schedule, start.

Pure arithmetic on the configuration and the number of processes, done before anything is built. Other tables are
checked beside what reads them (datasets/data_checks.py, models/rope_checks.py, extensions); what needs files, a
tokenizer or the model is checked where these are opened.
"""

from __future__ import annotations

import math
from typing import Any

from torchtitan.config.keys import Key, element_table, keys_of
from torchtitan.config.schema import JobConfig
from torchtitan.config.toml_file import known_keys, values_of
from torchtitan.tools.constants import BLOCK
from torchtitan.tools.errors import UserError
from torchtitan.tools.urls import is_url, join_url, without_secrets


def check_config(config: JobConfig, world_size: int) -> None:
    """UserError for the first number or combination that cannot work with `world_size` processes."""
    check_ranges(config)
    _check_precision(config)
    _check_backend(config)
    _check_head_chunks(config)
    _check_recomputation(config)
    _check_schedule(config)
    accumulation_steps(config, world_size)
    _check_tokens(config)


def _check_tokens(config: JobConfig) -> None:
    training, p = config.training, config.parallelism
    cp, tp = p.context_parallel_degree, p.tensor_parallel_degree
    tokens = training.seq_len * training.local_batch_size
    unit = math.lcm(cp * BLOCK, cp * tp) if cp > 1 else tp  # a seq_len that works is a multiple of it
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
    """data_parallel_shard_degree, with -1 replaced by what the other degrees leave of `world_size`.

    UserError if the product of the degrees is not `world_size`.
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
                f"[parallelism] {factors} = {others} does not divide {processes}, so no "
                f"data_parallel_shard_degree is left over. Start {_multiples(world_size, others)} processes, or lower "
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
    """Rows per optimizer step, over all ranks and gradient accumulation. UserError if a batch in tokens is not a whole
    number of rows, or is given in rows too."""
    t = config.training
    if t.global_batch_size is not None and t.global_batch_tokens is not None:
        raise UserError(
            f"training.global_batch_size = {t.global_batch_size} (rows) and training.global_batch_tokens = "
            f"{t.global_batch_tokens} are both given (one perhaps by a file named in `extends`); give one of the two. "
            "On the command line, --training.global_batch_size None unsets the first."
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
    """Micro-batches per optimizer step and data-parallel rank. UserError if that is not an integer."""
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
    """Which data-parallel degrees divide the rows of a step, for a job that comes back on fewer or more nodes."""
    most, rest = divmod(rows, local_batch_size)
    if rest:
        return ""
    degrees = [str(degree) for degree in range(1, most + 1) if most % degree == 0]
    shown = degrees if len(degrees) <= 12 else [*degrees[:10], "...", degrees[-1]]
    return f" ({rows} rows in micro-batches of {local_batch_size} go over data-parallel degrees {', '.join(shown)})"


def check_ranges(config: JobConfig) -> None:
    """UserError for a number outside the range that the schema gives its key, and for a URL instead of a local path."""
    keys = known_keys()
    for name, value in values_of(config).items():
        _check_ranges(name, value, keys[name])
        _check_local(name, value, config.data.folder)


def _check_ranges(name: str, value: Any, key: Key) -> None:
    if element := element_table(key.hint):
        for i, item in enumerate(value):
            which = f' ("{item.name}")' if hasattr(item, "name") else ""
            for inner, of in keys_of(element).items():
                _check_ranges(f"{name}[{i}]{which}: {inner}", getattr(item, inner), of)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_range(f"{name}[{i}]", item, key)
    else:
        _check_range(name, value, key)


def _check_range(name: str, value: Any, key: Key) -> None:
    if key.range is None or not isinstance(value, (int, float)):
        return
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{name} has {len(str(abs(value)))} digits: it must be less than 2^63.")
    if not math.isfinite(value):
        raise UserError(f"{name} = {value} is not a finite number.")
    if value not in key.range:
        raise UserError(f"{name} = {value} must be {key.range}.")


def _check_local(name: str, value: Any, data_folder: str) -> None:
    """UserError for a URL, unless sources are read from it."""
    for path in value if isinstance(value, tuple) else (value,):
        below = name in ("evaluation.texts", "evaluation.qa_files") and join_url(data_folder, path)
        if name not in ("data.folder", "job.description") and isinstance(path, str) and (is_url(path) or below):
            raise UserError(
                f"{name} is a URL ({without_secrets(below or path)}), but must be on this machine's file systems: only "
                "the sources of data are read from URLs. Download it, and write the path; if data.folder is a URL, an "
                "absolute one."
            )


def _check_precision(config: JobConfig) -> None:
    training, optimizer = config.training, config.optimizer
    if training.dtype == "bfloat16" and training.mixed_precision_param == "float32":
        raise UserError(
            'training.dtype = "bfloat16" stores parameters in 16 bits, and training.mixed_precision_param = "float32" '
            'would widen what has already been rounded: memory without precision. Set dtype = "float32", or '
            'mixed_precision_param = "bfloat16".'
        )
    if (optimizer.state_dtype or training.dtype) == "float32":
        return
    for name, beta in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        if 0 < 1 - beta < 2**-8:
            raise UserError(
                f"optimizer.{name} = {beta} with moments in bfloat16 (optimizer.state_dtype, or else training.dtype): "
                f"a step lowers a moment by at most 1 - {name} = {1 - beta:.4g} of itself, less than bfloat16 can "
                f"represent (2^-8 = 0.0039), so the moment would never fall. Use a {name} of at most 0.996, or float32."
            )


def _check_backend(config: JobConfig) -> None:
    if config.model.attention_backend != "varlen":
        return
    if config.training.mixed_precision_param == "float32":
        raise UserError(
            'model.attention_backend = "varlen" has 16-bit types only, but training.mixed_precision_param = "float32": '
            'set that to "bfloat16", or use "flex".'
        )
    if config.data.anchor_attention:
        raise UserError(
            'model.attention_backend = "varlen" cannot show an anchor to queries (data.anchor_attention = true): '
            'FlashAttention\'s mask has one range of keys per query. Use "flex" on CUDA, "sdpa" anywhere, or "auto".'
        )


def _check_head_chunks(config: JobConfig) -> None:
    p = config.parallelism
    if p.context_parallel_head_chunks > 1 and p.context_parallel_exchange != "ulysses":
        raise UserError(
            f"parallelism.context_parallel_head_chunks = {p.context_parallel_head_chunks} is read by "
            f'context_parallel_exchange = "ulysses" only, but that is "{p.context_parallel_exchange}", which moves '
            "tokens, not heads: leave it out, or change the exchange."
        )


def _check_recomputation(config: JobConfig) -> None:
    ac = config.activation_checkpoint
    option = ac.selective_ac_option
    if option != "op" and not (option.isascii() and option.isdigit() and int(option) > 0):
        raise UserError(
            f'activation_checkpoint.selective_ac_option = "{option}" is neither "op" nor a number n, such as "2": the '
            "first of every n blocks is recomputed."
        )
    if ac.offload and ac.mode == "none":
        raise UserError(
            'activation_checkpoint.offload = true, but activation_checkpoint.mode = "none": no block is recomputed, so '
            'there is no input to keep. Set mode = "full" or "selective", or leave offload out.'
        )


def _check_schedule(config: JobConfig) -> None:
    steps, s = config.training.steps, config.lr_scheduler
    if s.warmup_steps > steps:
        raise UserError(
            f"lr_scheduler.warmup_steps = {s.warmup_steps} is more than training.steps = {steps}: the learning rate "
            f"would never reach optimizer.lr. Set warmup_steps to at most {steps} (for a trial, "
            f"--lr_scheduler.warmup_steps {steps // 10})."
        )
    decay = round(steps * (s.decay_ratio or 0))
    if s.warmup_steps + decay > steps:
        raise UserError(
            f"lr_scheduler.warmup_steps {s.warmup_steps} + decay (lr_scheduler.decay_ratio {s.decay_ratio} * "
            f"training.steps {steps} = {decay}) = {s.warmup_steps + decay} steps, more than training.steps = {steps}. "
            f"Set decay_ratio to at most {(steps - s.warmup_steps) / steps:g}, or warmup_steps to at most "
            f"{steps - decay}."
        )


def check_start_keys(config: JobConfig) -> None:
    """UserError for keys of [stage] and [checkpoint] that name no start of a run, or more than one."""
    stage, checkpoint = config.stage, config.checkpoint
    starts = {
        "stage.after": bool(stage.after),
        "checkpoint.initial_load_path": bool(checkpoint.initial_load_path),
        "checkpoint.initial_load_in_hf": checkpoint.initial_load_in_hf,
    }
    given = [name for name, is_set in starts.items() if is_set]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} are set (one perhaps by a file named in `extends`), but a fresh run starts from "
            'one place. Unset the others (initial_load_in_hf = false, after = "", initial_load_path = "").'
        )
    if stage.after and "model" not in stage.carry:
        raise UserError(
            f"stage.carry = {list(stage.carry)} leaves the model behind, and stage.after would do nothing: add "
            '"model", or leave stage.after out.'
        )
    if checkpoint.exclude_from_loading and not checkpoint.initial_load_path:
        raise UserError(
            "checkpoint.exclude_from_loading is about checkpoint.initial_load_path, which is not set; stage.carry says "
            "what a stage takes from the previous one."
        )
    if not stage.continue_data and not (stage.after or checkpoint.initial_load_path):
        raise UserError(
            "stage.continue_data = false is about the data of the checkpoint from which a stage starts, but neither "
            "stage.after nor checkpoint.initial_load_path is set: leave it out. The first stage of a chain begins its "
            "sources anew."
        )
    if (stage.gates or checkpoint.last_save_in_hf) and not checkpoint.enable:
        key = "stage.gates" if stage.gates else "checkpoint.last_save_in_hf"
        raise UserError(f"{key} needs the last checkpoint, but checkpoint.enable = false.")
    if checkpoint.load_step >= 0 and not checkpoint.enable:
        raise UserError(
            f"checkpoint.load_step = {checkpoint.load_step}, but checkpoint.enable = false, with which nothing is "
            "loaded. Set enable = true, or leave load_step out."
        )


def _multiples(number: int, divisor: int, times: int = 1) -> str:
    """The nearest positive multiples of `divisor` below and above `number`, each `times` as large, as text."""
    below = number // divisor * divisor
    above = below + divisor
    return f"{below * times} or {above * times}" if below > 0 else str(above * times)
