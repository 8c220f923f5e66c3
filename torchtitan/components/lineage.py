"""The stages of a recipe seen from one of them: what the previous one was, whether it is still that, what changes.

Read without PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtitan.components.manifest import complete_steps, digest, read_manifest
from torchtitan.config import load_config
from torchtitan.config.schema import JobConfig
from torchtitan.tools.errors import UserError


def folder_before(config: JobConfig) -> Path:
    """The dump folder of the stage before, which config.stage.after must name."""
    if config.stage.after_dump_folder:
        return Path(config.stage.after_dump_folder)
    return Path(load_config(["--job.config_file", config.stage.after or ""]).job.dump_folder)


def stage_as_run(config: JobConfig) -> JobConfig:
    """The configuration of the stage before: as it was run (config.toml in its dump folder, which holds the overrides),
    else as its file says."""
    as_run = folder_before(config) / "config.toml"
    return load_config(["--job.config_file", str(as_run) if as_run.is_file() else config.stage.after or ""])


def check_before(config: JobConfig, manifest: dict[str, Any] | None) -> None:
    """UserError where a stage and the one before it share a dump folder, or where the stage before is not what this one
    went on from any more: it has been trained anew, or for longer.

    manifest: of this stage's newest checkpoint, None without one.
    """
    if not config.stage.after:
        return
    try:
        before = folder_before(config)
    except UserError:
        return  # a run that starts from there says so; one that is resumed needs nothing of it
    if before.resolve() == Path(config.job.dump_folder).resolve():
        raise UserError(
            f"stage {config.stage.name} and the stage before it ({config.stage.after}) have one job.dump_folder, "
            f"{before}, and would be taken for one another: give this stage another."
        )
    lineage = (manifest or {}).get("stages_before") or [{}]
    step, known = lineage[-1].get("step"), lineage[-1].get("digest")
    if not known:
        return
    try:
        folder = before / stage_as_run(config).checkpoint.folder
        newest = complete_steps(folder)[-1]
        same = newest == step and digest(read_manifest(folder / f"step-{newest}")) == known
    except (IndexError, UserError):
        return  # not there any more, or damaged: nothing of it is needed
    if not same:
        raise UserError(
            f"Stage {config.stage.name} went on from step {step} of {config.stage.after}, which has been trained anew "
            f"or for longer since: {folder}/step-{newest} is another checkpoint. Delete {config.job.dump_folder} to "
            "train this stage from it, choose another job.dump_folder, or name where the old one is "
            "(stage.after_dump_folder)."
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"rope": {"theta": 1}} -> {"rope.theta": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def lineage(manifest: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The stages up to and with that of a manifest, the first one first: what the next one's manifest says of them."""
    if manifest is None:
        return []
    own = {key: manifest.get(key) for key in ("stage", "step", "tokens_seen", "seq_len", "tokenizer")}
    own |= {"rope": manifest["architecture"]["rope"], "digest": digest(manifest)}
    return [*manifest.get("stages_before", []), own]


QUIET = ("job", "stage", "metrics", "profiling", "comm", "checkpoint", "rope")
"""Tables whose differences say nothing about what is trained; rope's are shown as the architecture has them."""


def differences(was: dict[str, Any], config: dict[str, Any], architecture: dict[str, Any]) -> list[str]:
    """What changes from the stage of manifest `was` to this one, a line each: 'rope.theta 8e+06 -> 1.28e+08'."""
    old, new = dict(was.get("config", {})), dict(config)
    before = {"rope": was["architecture"]["rope"]} | {k: v for k, v in old.items() if k not in QUIET}
    after = {"rope": architecture["rope"]} | {k: v for k, v in new.items() if k not in QUIET}
    a, b = flat(before), flat(after)
    mixture_before, mixture_after = (flat_mixture(x.pop("data.sources", ())) for x in (a, b))
    lines = [f"{key} {shown(a.get(key))} -> {shown(b.get(key))}" for key in {**a, **b} if a.get(key) != b.get(key)]
    for name in {**mixture_before, **mixture_after}:
        x, y = mixture_before.get(name, "none"), mixture_after.get(name, "none")
        if x != y:
            lines.append(f"data source {name}: {x} -> {y}")
    return lines


def flat_mixture(sources: Any) -> dict[str, str]:
    """Source -> its share of the tokens and what else it says."""
    total = sum(source["weight"] for source in sources) or 1.0
    quiet = ("name", "weight", "path", "text_field", "hub_split", "hub_revision")
    usual = {"separator": "", "messages_field": "", "hub_subset": "", "long_document": "split", "min_length": 0}
    return {
        source["name"]: f"{source['weight'] / total:.1%}"
        + "".join(f", {k} {v}" for k, v in source.items() if k not in quiet and v != usual.get(k))
        for source in sources
    }


def shown(value: Any) -> str:
    """A value in a line: numbers short, lists shortened, None as unset."""
    if value is None:
        return "unset"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
