"""What has changed in a stage since its last checkpoint, or from one stage to the next.

A stage that is resumed asks changed_inputs(), which knows the files, and changed_keys(); a chain, which opens no files,
asks changed_since(); a stage that starts from another prints differences(). What a key decides stands at its field
(config/keys.py). Read without PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan.config.checks import rows_per_step
from torchtitan.config.data_schema import Data, Source
from torchtitan.config.keys import Decision, keys_of
from torchtitan.config.manager import from_tables
from torchtitan.config.schema import JobConfig
from torchtitan.config.toml_file import known_keys, values_of
from torchtitan.datasets.curriculum import weights_at
from torchtitan.datasets.same_data import data_keys, keys_that_decide, normalize, shares, source_options
from torchtitan.tools.errors import UserError
from torchtitan.tools.urls import is_url, join_url

ANOTHER_STAGE: tuple[Decision, ...] = ("documents", "rows", "model")
"""What cannot change in a stage."""

BATCH = ("training.local_batch_size", "training.global_batch_size", "training.global_batch_tokens")
"""Compared by the rows per step that they lead to."""

BY_CONTENT = ("model.flavor", "model.hf_assets_path", "training.seq_len", "training.seed", *BATCH)
"""Beside [data] and [rope], the keys that a resumed stage compares by what they lead to: the architecture, the
tokenizer's fingerprint and Plan.inputs."""

ANOTHER_FORMAT = (
    " of the data plan (this version of the code lays out other rows: end the stage with the version that began it, or "
    "make what is left a stage of its own that goes on from its last checkpoint)"
)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"rope": {"theta": 1}} -> {"rope.theta": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def shown(value: Any) -> str:
    """A value in a log line: numbers and lists shortened, None as unset."""
    if value is None:
        return "unset"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def changes(was: dict[str, Any], now: dict[str, Any], show: Callable[[Any], str] = str) -> list[str]:
    """The differences of two flat dictionaries, as 'rope.theta 10000.0 -> 20000.0'."""
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    lines = []
    for key in keys:
        values = was.get(key), now.get(key)
        before, after = map(show, values)
        if before == after:  # shortened, they are no longer two: 22081.79 and 22081.81
            before, after = map(repr, values)
        lines.append(f"{key} {before} -> {after}")
    return lines


def changed_inputs(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences of two Plan.inputs, such as 'training.seq_len 1024 -> 2048', 'source code: share 0.5 -> 0.6'."""
    saved = {"sum_of_weights": now.get("sum_of_weights")} | data_keys(Data()) | saved  # what older versions lacked
    now = {"sum_of_weights": None} | now
    tables = {"seed": "training.", "seq_len": "training."} | dict.fromkeys(keys_of(Data), "data.")
    was, is_now = (
        {tables.get(key, "") + key: value for key, value in inputs.items() if key != "sources"}
        for inputs in (saved, now)
    )
    result = [line + (ANOTHER_FORMAT if line.startswith("format ") else "") for line in changes(was, is_now)]
    if saved.get("rows_per_step") != now.get("rows_per_step"):
        result.append(f"(training.global_batch_size = {saved.get('rows_per_step')} keeps the rows of a step)")
    before, after = saved.get("sources", []), now.get("sources", [])
    names_before, names_after = [s["name"] for s in before], [s["name"] for s in after]
    if names_before != names_after:
        return [*result, f"sources [{', '.join(names_before)}] -> [{', '.join(names_after)}]"]
    for old, new in zip(before, after):
        for change in changes(old, new):
            key, _, values = change.partition(" ")
            what = f"its documents (corpus {values})" if key == "corpus" else change
            result.append(f"source {new['name']}: {what}")
    return result


def changed_keys(manifest: dict[str, Any], config: JobConfig) -> list[str]:
    """The differences since a manifest of the stage in keys that make it another one, and that changed_inputs(), the
    architecture and the tokenizer do not show."""
    if not manifest.get("config"):
        return []
    was, now = (_values(c, "data", "rope", *BY_CONTENT) for c in (from_tables(manifest["config"]), config))
    return changes(was, now)


def changed_since(manifest: dict[str, Any], config: JobConfig) -> list[str]:
    """What is other data or another model now than in a manifest of the stage, as 'rope.theta None -> 20000.0'."""
    if not manifest.get("config"):
        return []
    saved = from_tables(manifest["config"])
    was, now = _identity(saved), _identity(config)
    for key in was:  # a path can be spelt in two ways
        if key.endswith("path") and was[key] and now.get(key) and _place(was[key]) == _place(now[key]):
            now[key] = was[key]
    result = changes(was, now)
    rows = [_rows_per_step(c, manifest.get("world_size", 1)) for c in (saved, config)]
    if rows[0] != rows[1]:
        result.append(f"rows per step {rows[0]} -> {rows[1] or 'unknown: not so many ranks can be divided like this'}")
    return result


def _identity(config: JobConfig) -> dict[str, Any]:
    """Key -> value of all keys that make a stage what it is, except those of the batch: _rows_per_step has them."""
    data = data_keys(config.data) | keys_that_decide(config.data, "documents")
    for i, (source, share) in enumerate(zip(config.data.sources, shares(config.data))):
        options = {"name": source.name, "share": share} | _options(config.data, source, *ANOTHER_STAGE)
        data |= {f"sources.{i}.{key}": value for key, value in options.items()}
    return _values(config, "data", *BATCH) | {f"data.{key}": value for key, value in data.items()}


def _values(config: JobConfig, *without: str) -> dict[str, Any]:
    """Key -> value of the keys that make a stage what it is, without these keys and those of these tables."""
    return {
        name: value
        for name, value in values_of(config).items()
        if known_keys()[name].decides in ANOTHER_STAGE and not {name, name.partition(".")[0]} & {*without}
    }


def _options(data: Data, source: Source, *decisions: Decision) -> dict[str, Any]:
    """source_options(), with the path as it is opened: below data.folder, unless it names a dataset of the hub."""
    options = source_options(source, *decisions)
    name = source.path.removeprefix("hub:")
    path = Path(data.folder).expanduser() / Path(name).expanduser()
    if url := join_url(data.folder, source.path):
        options["path"] = url
    elif "path" in options and name == source.path:
        options["path"] = str(path)
    elif name.startswith((".", "/", "~")):
        options["path"] = f"hub:{path.absolute()}"
    return options


def _place(path: str) -> Path | str:
    return path if is_url(path) else Path(path).expanduser().resolve()


def _rows_per_step(config: JobConfig, world_size: int) -> int | None:
    """On as many processes as the stage was trained on; None if it cannot run on these."""
    try:
        return rows_per_step(config, world_size)
    except UserError:
        return None


def differences(manifest: dict[str, Any], config: JobConfig, architecture: dict[str, Any]) -> list[str]:
    """What changes for training from the stage of a manifest to this one, such as 'rope.theta 8e+06 -> 1.28e+08'.

    architecture: of this stage, as in its manifest, for the RoPE that the keys of [rope] lead to.
    """
    saved = from_tables(manifest.get("config", {}))
    lines = changes(flat({"rope": manifest["architecture"]["rope"]}), flat({"rope": architecture["rope"]}), show=shown)
    shown_apart = [name for name in known_keys() if name.startswith("rope.")] + ["data.sources"]
    printed = [n for n, key in known_keys().items() if key.decides not in ("nothing", "start") and n not in shown_apart]
    was, now = ({name: values_of(c)[name] for name in printed} for c in (saved, config))
    lines += changes(was, now, show=shown)
    old, new = _mixture(saved.data), _mixture(config.data)
    for name in {**old, **new}:
        before, after = _described(old.get(name), new.get(name)), _described(new.get(name), old.get(name))
        if before != after:
            lines.append(f"data source {name}: {before} -> {after}")
    return lines


def _mixture(data: Data) -> dict[str, dict[str, Any]]:
    """Source -> its options that decide its documents or rows, and its share of the tokens at the schedules' points."""
    steps = sorted({p.step for source in data.sources for p in source.schedule if p.weight is not None}) or [0]
    at_steps = [normalize(weights_at(data, step)) for step in steps]
    return {
        source.name: {"share": _share_text(steps, at)} | _options(data, source, "documents", "rows")
        for source, *at in zip(data.sources, *at_steps)
    }


def _share_text(steps: list[int], shares: list[float]) -> str:
    """10.0%, or 10.0% at step 0, 20.0% at step 1000."""
    texts = [f"{share:.1%}" for share in shares]
    return texts[0] if len({*texts}) == 1 else ", ".join(f"{text} at step {step}" for text, step in zip(texts, steps))


def _described(source: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """A source's share, and those of its options that are not the same in the other stage."""
    if source is None:
        return "none"
    options = [f"{k} {shown(v)}" for k, v in source.items() if k != "share" and (other or {}).get(k) != v]
    return ", ".join([source["share"], *options])
