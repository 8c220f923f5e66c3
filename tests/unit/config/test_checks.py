"""check_config and the batch arithmetic: what is refused, what the message says, and what the numbers add up to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args, get_origin

import pytest

from torchtitan.config.checks import (
    accumulation_steps,
    check_config,
    check_ranges,
    dp_degree,
    resolve_shard_degree,
    rows_per_step,
)
from torchtitan.config.data_schema import Point, Source
from torchtitan.config.keys import Key, Range, element_table, keys_of
from torchtitan.config.schema import Gate, JobConfig
from torchtitan.config.toml_file import known_keys
from torchtitan.tools.errors import UserError

SOURCE = Source(name="books", path="books.jsonl")


def make(**changes: Any) -> JobConfig:
    """A configuration that passes, with `table__key=value` changed."""
    changes = {"data__sources": (SOURCE,), "lr_scheduler__warmup_steps": 0, **changes}
    config = JobConfig()
    for name, value in changes.items():
        table, _, key = name.partition("__")
        config = dataclasses.replace(config, **{table: dataclasses.replace(getattr(config, table), **{key: value})})
    return config


def error_of(world_size: int = 1, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_config(make(**changes), world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def degrees(replicate: int = 1, shard: int = -1, tp: int = 1, cp: int = 1) -> dict[str, Any]:
    return {
        "parallelism__data_parallel_replicate_degree": replicate,
        "parallelism__data_parallel_shard_degree": shard,
        "parallelism__tensor_parallel_degree": tp,
        "parallelism__context_parallel_degree": cp,
    }


# --- ranges ----------------------------------------------------------------------------------------------------------


def is_number(hint: Any) -> bool:
    """Whether values of a type, or the items of a tuple of it, are numbers."""
    return bool({int, float} & {hint, *get_args(hint)})


def numeric_keys() -> dict[str, Key]:
    """Of all tables and arrays of tables: data.sources.weight."""
    keys: dict[str, Key] = {}
    for name, key in known_keys().items():
        inner = element_table(key.hint)
        keys |= {f"{name}.{k}": of for k, of in keys_of(inner).items()} if inner else {name: key}
    keys |= {f"data.sources.schedule.{k}": of for k, of in keys_of(Point).items()}
    return {name: key for name, key in keys.items() if is_number(key.hint)}


def with_value(name: str, value: Any) -> tuple[JobConfig, str]:
    """A configuration with this value of the key, or item of its tuple, and what messages call the key."""
    table, key, *inner = name.split(".")
    if inner:
        element = SOURCE if key == "sources" else Gate(metric="loss", at_most=3.0)
        of_tuple = element_type(name) is not None
        value, called = ((value,), f"{inner[-1]}[0]") if of_tuple else (value, inner[-1])
        if len(inner) == 2:
            value, called = (dataclasses.replace(Point(), **{inner[1]: value}),), f"schedule[0]: {called}"
        items = (dataclasses.replace(element, **{inner[0]: value}),)
        which = ' ("books")' if key == "sources" else ""
        return make(**{f"{table}__{key}": items}), f"{table}.{key}[0]{which}: {called}"
    if element_type(name) is not None:
        return make(**{f"{table}__{key}": (value,)}), f"{name}[0]"
    return make(**{f"{table}__{key}": value}), name


def element_type(name: str) -> type | None:
    hint = numeric_keys()[name].hint
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def test_every_number_of_the_schema_has_a_range() -> None:
    assert [name for name, key in numeric_keys().items() if key.range is None] == []
    words = [name for name, key in known_keys().items() if key.range and not is_number(key.hint)]
    assert words == [], "a range for what is no number"


def outside(allowed: Range) -> list[float]:
    """Numbers just outside of a range."""
    low = allowed.min - 1 if allowed.min is not None else allowed.above
    high = allowed.max + 1 if allowed.max is not None else allowed.below
    found = [value for value in (low, high, -(10**9)) if value is not None and value not in allowed]
    return found if low is not None or high is not None else []


def inside(allowed: Range) -> list[float]:
    """The ends of a range that belong to it, else numbers just inside."""
    low = [allowed.min] if allowed.min is not None else [allowed.above + 1e-9] if allowed.above is not None else []
    high = [allowed.max] if allowed.max is not None else [allowed.below - 1e-9] if allowed.below is not None else []
    return [*low, *high, *([] if allowed.also is None else [allowed.also])]


@pytest.mark.parametrize("name", numeric_keys())
def test_a_number_out_of_its_range_is_refused_by_name(name: str) -> None:
    allowed = numeric_keys()[name].range
    assert allowed is not None
    for value in (*outside(allowed), math.nan, math.inf, -math.inf):
        config, called = with_value(name, value)
        with pytest.raises(UserError) as caught:
            check_ranges(config)
        wrong = "is not a finite number." if not math.isfinite(value) else f"must be {allowed}."
        assert str(caught.value) == f"{called} = {value} {wrong}"
    for value in inside(allowed):
        check_ranges(with_value(name, value)[0])


@pytest.mark.parametrize(
    ("allowed", "text", "numbers"),
    [
        (Range(min=1), "at least 1", {0: False, 1: True, 1e30: True}),
        (Range(above=0, below=1), "above 0 and below 1", {0: False, 0.5: True, 1: False}),
        (Range(min=0, max=1), "at least 0 and at most 1", {-1e-9: False, 0: True, 1: True, 1.1: False}),
        (Range(min=1, also=-1), "at least 1, or -1", {-2: False, -1: True, 0: False, 1: True}),
        (Range(), "", {-1e30: True, math.inf: False, math.nan: False}),
    ],
)
def test_a_range_says_what_it_holds(allowed: Range, text: str, numbers: dict[float, bool]) -> None:
    assert str(allowed) == text
    assert {number: number in allowed for number in numbers} == numbers


def test_anchors_need_a_backend_that_has_them() -> None:
    message = error_of(data__anchor_attention=True, data__positions="continue", model__attention_backend="varlen")
    for word in ('model.attention_backend = "varlen"', "data.anchor_attention = true", '"flex"', '"sdpa"'):
        assert word in message
    for backend in ("auto", "flex", "sdpa"):
        check_config(make(data__anchor_attention=True, model__attention_backend=backend), 1)


def test_the_defaults_are_in_range() -> None:
    check_config(make(), 1)


def test_values_at_the_edge_pass() -> None:
    check_config(
        make(
            optimizer__lr=0.0,
            optimizer__beta1=0.0,
            lr_scheduler__decay_ratio=1.0,
            lr_scheduler__min_lr_factor=1.0,
            training__max_norm=0.0,
            training__steps=1,
            checkpoint__keep_latest_k=0,
        ),
        1,
    )


def test_precision() -> None:
    message = error_of(training__dtype="bfloat16", training__mixed_precision_param="float32")
    assert "training.dtype" in message and "mixed_precision_param" in message
    for stored, cast in (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")):
        check_config(make(training__dtype=stored, training__mixed_precision_param=cast), 1)
    for moments in ({"optimizer__state_dtype": "bfloat16"}, {"training__dtype": "bfloat16"}):
        assert "optimizer.beta2 = 0.999" in error_of(optimizer__beta2=0.999, **moments)
    check_config(make(optimizer__beta2=0.999, training__dtype="bfloat16", optimizer__state_dtype="float32"), 1)


# --- degrees ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("replicate", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shard", [-1, 1, 2, 3])
def test_degrees_multiply_to_the_world_or_are_refused(world: int, replicate: int, tp: int, shard: int) -> None:
    config = make(**degrees(replicate, shard, tp))
    possible = [s for s in range(1, world + 1) if s * replicate * tp == world and shard in (-1, s)]
    if possible:
        assert [resolve_shard_degree(config, world)] == possible
        assert dp_degree(config, world) * tp == world
        assert accumulation_steps(config, world) == 1
    else:
        with pytest.raises(UserError, match=r"^\[parallelism\]"):
            check_config(config, world)


def test_the_message_shows_the_product_and_what_works() -> None:
    message = error_of(4, **degrees(replicate=2, shard=3))
    assert "= 6, but there are 4 processes" in message
    assert "Start 6, or set data_parallel_shard_degree = 2" in message
    message = error_of(5, **degrees(tp=2))
    assert "= 2 does not divide 5 processes" in message and "Start 4 or 6 processes" in message


def test_degrees_that_are_not_offered() -> None:
    assert "at least 1, or -1" in error_of(1, **degrees(shard=0))


def test_context_parallel_ranks_hold_blocks_of_128_tokens() -> None:
    message = error_of(3, training__seq_len=65536, **degrees(cp=3))
    assert "= 65536 is not divisible by parallelism.context_parallel_degree * 128 = 3 * 128 = 384" in message
    assert "65536 / 384 = 170.67" in message and "65280 or 65664 works" in message
    check_config(make(training__seq_len=65664, **degrees(cp=3)), 3)
    check_config(make(training__seq_len=128, training__local_batch_size=2, **degrees(cp=2)), 2)
    message = error_of(6, training__seq_len=256, **degrees(cp=2, tp=3))
    assert "256 tokens / context_parallel_degree 2 = 128" in message and "tensor_parallel_degree = 3" in message
    assert "e.g. 768." in message
    assert "16-bit" in error_of(1, model__attention_backend="varlen", training__mixed_precision_param="float32")


@pytest.mark.parametrize(("seq_len", "rows", "tp", "fits"), [(6, 1, 4, False), (6, 2, 4, True), (8, 1, 4, True)])
def test_tensor_parallel_ranks_share_the_tokens_evenly(seq_len: int, rows: int, tp: int, fits: bool) -> None:
    changes = {"training__seq_len": seq_len, "training__local_batch_size": rows, **degrees(tp=tp)}
    if fits:
        check_config(make(**changes), tp)
    else:
        assert f"parallelism.tensor_parallel_degree = {tp}" in error_of(tp, **changes)
        assert "4 or 8" in error_of(tp, **changes)


# --- batch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("local", [1, 2, 3])
@pytest.mark.parametrize("rows", [None, 1, 2, 4, 6, 7, 12])
def test_accumulation_covers_the_step_exactly_or_is_refused(world: int, local: int, rows: int | None) -> None:
    in_rows = make(training__seq_len=128, training__local_batch_size=local, training__global_batch_size=rows)
    tokens = None if rows is None else rows * 128
    in_tokens = make(training__seq_len=128, training__local_batch_size=local, training__global_batch_tokens=tokens)
    for config in (in_rows, in_tokens):
        if rows is None or rows % (local * world) == 0:
            steps = accumulation_steps(config, world)
            assert steps * local * world == rows_per_step(config, world) == (rows or local * world)
            check_config(config, world)
        else:
            with pytest.raises(UserError, match="would do"):
                check_config(config, world)


def test_the_sizes_that_the_message_offers_work() -> None:
    wrong = {"training__seq_len": 128, "training__local_batch_size": 3}
    assert "6 or 12 would do" in error_of(2, **wrong, training__global_batch_size=7)
    assert "global_batch_tokens = 768 or 1536 would do" in error_of(2, **wrong, training__global_batch_tokens=7 * 128)
    assert "896 or 1024 would do" in error_of(2, **wrong, training__global_batch_tokens=7 * 128 + 1)
    assert "6 would do" in error_of(2, **wrong, training__global_batch_size=2)
    for rows in (6, 12):
        check_config(make(**wrong, training__global_batch_size=rows), 2)


@pytest.mark.parametrize(("rows", "local"), [(8, 2), (12, 1), (64, 1), (7, 2)])
def test_a_job_that_comes_back_on_other_ranks_is_told_which_would_do(rows: int, local: int) -> None:
    """Against trying them all, through the check itself."""
    changes = {"training__seq_len": 128, "training__global_batch_tokens": rows * 128}
    fitting = []
    for world in range(1, rows + 1):
        try:
            check_config(make(**changes, training__local_batch_size=local), world)
            fitting.append(str(world))
        except UserError as e:
            refused = str(e)
            assert f"data-parallel degree {world} = {local * world} rows: {rows} / {local * world}" in refused
    offered = f"go over data-parallel degrees {', '.join(fitting)})"
    assert (offered in refused) if fitting else ("data-parallel degrees" not in refused)


def test_rows_and_tokens_are_not_both_given() -> None:
    message = error_of(training__global_batch_size=4, training__global_batch_tokens=4 * 2048)
    assert "give one of the two" in message


def test_replicas_read_different_rows_and_tensor_ranks_the_same() -> None:
    config = make(**degrees(replicate=2, shard=2, tp=2), training__local_batch_size=3)
    assert (dp_degree(config, 8), rows_per_step(config, 8), accumulation_steps(config, 8)) == (4, 12, 1)


# --- schedule --------------------------------------------------------------------------------------------------------


def test_warmup_fits_into_the_steps() -> None:
    check_config(make(training__steps=10, lr_scheduler__warmup_steps=10), 1)
    message = error_of(training__steps=10, lr_scheduler__warmup_steps=11)
    assert "lr_scheduler.warmup_steps = 11 is more than training.steps = 10" in message


def test_warmup_and_decay_fit_into_the_steps() -> None:
    fits = {"training__steps": 10, "lr_scheduler__warmup_steps": 7, "lr_scheduler__decay_ratio": 0.3}
    check_config(make(**fits), 1)
    message = error_of(**{**fits, "lr_scheduler__warmup_steps": 8})
    assert "= 11 steps, more than training.steps = 10" in message
    assert "decay_ratio to at most 0.2, or warmup_steps to at most 7" in message
