"""From the command line to a JobConfig: the TOML file, what it extends, and the overrides; and back to TOML.

The later of these wins: the defaults of schema.py, the extended files, the file, the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import tomli_w
import tyro

from torchtitan.config.data_schema import Data, Point, Source
from torchtitan.config.keys import element_table, keys_of
from torchtitan.config.schema import Gate, JobConfig, Stage
from torchtitan.config.toml_file import known_keys, load_tables, own_keys, suggest, values_of
from torchtitan.tools.errors import UserError

_NAME_WITHOUT_FILE = "defaults"


def load_config(args: list[str], later: tuple[str, ...] = ()) -> JobConfig:
    """The configuration that `args` (a command line without the program's name) asks for.

    `--job.config_file X` names the TOML file (the schema's defaults without it); any other `--table.key value`
    overrides one key, `--data.sources.0.weight 2` a key of a table in an array. true or false can follow a switch.
    An empty stage.name becomes the file's stem. later: if it is read for the sake of later stages, their files, the
    nearest first.

    Raises:
        UserError: an unknown name, a value of the wrong type, a file that cannot be read.
        SystemExit: with code 0 after printing `--help`.
    """
    path = config_file(args)
    config = from_tables(load_tables(Path(path)) if path is not None else {})
    config = _override(config, args)
    if path is not None:
        config = _keep_batch(config, own_keys(Path(path)), args, (str(Path(path).resolve()), *later))
    if not config.stage.name:
        name = Path(path).stem if path is not None else _NAME_WITHOUT_FILE
        config = dataclasses.replace(config, stage=dataclasses.replace(config.stage, name=name))
    return _expand_home(config)


def _expand_home(config: JobConfig) -> JobConfig:
    """~ expanded in the paths that several readers open."""
    stage, job, model = config.stage, config.job, config.model
    if stage.after_dump_folder:
        stage = dataclasses.replace(stage, after_dump_folder=os.path.expanduser(stage.after_dump_folder))
    job = dataclasses.replace(job, dump_folder=os.path.expanduser(job.dump_folder))
    model = dataclasses.replace(model, hf_assets_path=os.path.expanduser(model.hf_assets_path))
    return dataclasses.replace(config, stage=stage, job=job, model=model)


def check_circle(after: str, files: tuple[str, ...]) -> None:
    """UserError if the stage `after` is one of the stages that come after it. files: theirs, the nearest first."""
    if str(Path(after).resolve()) in files:
        circle = " -> ".join([after, *files[: files.index(str(Path(after).resolve())) + 1]])
        raise UserError(f"stage.after goes round in a circle: {circle}. The first stage of a chain must have none.")


def _keep_batch(config: JobConfig, own: set[str], args: list[str], files: tuple[str, ...]) -> JobConfig:
    """`config` with the tokens per batch of the previous stage, unless its own file or the command line sets the batch.

    own: keys of its own file. A number of rows from an extended file does not count: longer rows would make it a
    larger batch. files: of this stage and of those after it.
    """
    t, after = config.training, config.stage.after
    link, seen = after, files
    while link:
        check_circle(link, seen)
        seen = (str(Path(link).resolve()), *seen)
        link = load_tables(Path(link)).get("stage", {}).get("after") if Path(link).is_file() else None
    given = own | {flag_name(arg) for arg in args}
    if not after or t.global_batch_tokens or given & {"training.global_batch_size", "training.global_batch_tokens"}:
        return config
    if not Path(after).is_file():
        return config  # components/start.py looks for that stage, and refuses
    before = previous_stage(config, files).training
    tokens = before.global_batch_tokens or (before.global_batch_size or 0) * before.seq_len
    if not tokens:
        return config
    t = dataclasses.replace(t, global_batch_size=None, global_batch_tokens=tokens)
    return dataclasses.replace(config, training=t)


def previous_folder(config: JobConfig, later: tuple[str, ...] = ()) -> Path:
    """The dump folder of the previous stage, which config.stage.after must name. later: see load_config."""
    if config.stage.after_dump_folder:
        return Path(config.stage.after_dump_folder)
    return Path(load_config(["--job.config_file", config.stage.after or ""], later).job.dump_folder)


def previous_stage(config: JobConfig, later: tuple[str, ...] = ()) -> JobConfig:
    """The configuration of the previous stage: as it was run (config.toml in its dump folder, which holds the
    overrides), or else as its file says. later: see load_config."""
    as_run = previous_folder(config, later) / "config.toml"
    use = as_run.is_file() and str(as_run.resolve()) not in later  # it is, if two stages have one dump folder
    return load_config(["--job.config_file", str(as_run) if use else config.stage.after or ""], later)


def dump_toml(config: JobConfig) -> str:
    """`config` as a TOML file that load_config turns into the same configuration.

    Keys that are None are left out. So are job.config_file, job.print_config and stage.run_chain, which say how a run
    was started.
    """
    return tomli_w.dumps(as_tables(config))


def as_tables(config: JobConfig) -> dict[str, dict[str, Any]]:
    """`config` as plain dictionaries and lists: what dump_toml writes."""
    tables = {table: _plain(getattr(config, table)) for table in keys_of(JobConfig)}
    for table, key in (("job", "config_file"), ("job", "print_config"), ("stage", "run_chain")):
        tables[table].pop(key, None)
    return tables


def _plain(table: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in vars(table).items():
        if isinstance(value, tuple):
            value = [_plain(item) if dataclasses.is_dataclass(item) else item for item in value]
        if value is not None:
            result[key] = value
    return result


def from_tables(tables: dict[str, dict[str, Any]]) -> JobConfig:
    """The inverse of as_tables, for those of older versions too: missing keys have their default, unknown ones are
    left out."""

    def build(cls: Any, values: dict[str, Any]) -> Any:
        return cls(**{name: plain(key.hint, values[name]) for name, key in keys_of(cls).items() if name in values})

    def plain(hint: Any, value: Any) -> Any:
        element = element_table(hint)
        if isinstance(value, list):
            return tuple(build(element, item) if element else item for item in value)
        return build(hint, value) if isinstance(value, dict) else value

    return cast(JobConfig, build(JobConfig, tables))


def flag_name(arg: str) -> str:
    """`--table.key=value` or `--table.key` -> table.key, with underscores; "" for an argument that is no flag."""
    return arg[2:].partition("=")[0].replace("-", "_") if arg.startswith("--") else ""


def flag_value(args: list[str], name: str) -> str | None:
    """The value of a flag in a command line, the last one if there are several; "" if it has none, None without it."""
    value = None
    for arg, following in zip(args, [*args[1:], ""]):
        if flag_name(arg) == name:
            value = arg.partition("=")[2] if "=" in arg else "" if following.startswith("--") else following
    return value


def config_file(args: list[str]) -> str | None:
    """The value of --job.config_file in a command line, None without it; UserError if no name follows it."""
    path = flag_value(args, "job.config_file")
    if path == "":
        raise UserError("--job.config_file needs the name of a TOML file after it.")
    return path


def _override(config: JobConfig, args: list[str]) -> JobConfig:
    """`config` with the overrides of `args`, read by tyro once their names are known to be right."""
    if "--help" in args or "-h" in args:
        args = ["--help"]
        if not config.data.sources:  # one of each array, so that its keys are explained too
            data = Data(sources=(Source(schedule=(Point(),)),))
            config = dataclasses.replace(config, data=data, stage=Stage(gates=(Gate(),)))
        config = _with_hints(config)
    else:
        args = _check_flags(config, args)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(type(config), prog="run_train.sh", default=config, args=args, use_underscores=True)
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"The command line cannot be read: {_first_paragraph(errors.getvalue())}") from None


def _with_hints(table: Any, decides: str = "nothing") -> Any:
    """A copy of `table` (a JobConfig, or a table of it) for --help, which shows each key's range and what it decides.

    decides: what keys decide that do not say so themselves.
    """
    cls: Any = type(table)
    values, hints = {}, {}
    for name, key in keys_of(cls).items():
        value, hint, decision = getattr(table, name), key.hint, key.decides or decides
        if dataclasses.is_dataclass(value):
            value = _with_hints(value, decision)
            hint = type(value)
        elif element_table(hint) and value:
            value = tuple(_with_hints(item, decision) for item in value)
            hint = tuple[type(value[0]), ...]  # type: ignore[misc]
        else:
            says = [str(key.range or ""), "" if decision == "nothing" else f"decides {decision}"]
            text = "; ".join(["(default: {}", *filter(None, says)]) + ")"
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint=text.format)]
        values[name], hints[name] = value, hint
    namespace = {"__annotations__": hints, "__doc__": cls.__doc__}
    copy: Any = dataclasses.dataclass(frozen=True)(type(cls.__name__, (cls,), namespace))
    return copy(**values)


def _check_flags(config: JobConfig, args: list[str]) -> list[str]:
    """`args` with `--table.switch false` rewritten as `--table.no_switch`; UserError for a flag that is not known."""
    flags = _flags(config)
    result: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            result.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        if name not in flags:
            raise UserError(f"--{name} is not known; {_suggest_flag(name, config, flags)}")
        if flags[name] is bool:
            if not equals and rest and rest[0].lower() in ("true", "false"):
                value = rest.pop(0)
            if value and value.lower() not in ("true", "false"):
                raise UserError(f"--{name} = {value} is not possible: it must be true or false.")
            table, _, key = name.rpartition(".")
            if value.lower() == "false":
                name = f"{table}.{key[3:]}" if key.startswith("no_") else f"{table}.no_{key}"
            result.append(f"--{name}")
        else:
            result.append(f"--{name}={value}" if equals else f"--{name}")
    return result


def _flags(config: JobConfig) -> dict[str, Any]:
    """Every flag that tyro offers for `config`, without the dashes, and its type."""
    flags: dict[str, Any] = {}

    def add(name: str, hint: Any, value: Any) -> None:
        element = element_table(hint)
        if element is None:
            flags[name] = hint
            return
        for i, item in enumerate(value):
            for inner, of in keys_of(element).items():
                add(f"{name}.{i}.{inner}", of.hint, getattr(item, inner))

    values = values_of(config)
    for name, key in known_keys().items():
        add(name, key.hint, values[name])
    switches = [name.rpartition(".") for name, hint in flags.items() if hint is bool]
    return flags | {f"{table}.no_{switch}": bool for table, _, switch in switches}


def _suggest_flag(name: str, config: JobConfig, flags: dict[str, Any]) -> str:
    if name.startswith("data.source"):
        count = len(config.data.sources)
        if count == 0:
            return "there is no [[data.sources]] in the configuration; sources are written in the TOML file"
        near = difflib.get_close_matches(name, [f for f in flags if f.startswith("data.sources.")], n=1)
        numbers = "0" if count == 1 else f"0 to {count - 1}"
        guess = f"did you mean --{near[0]}? " if near else ""
        keys = ", ".join(keys_of(Source))
        return f"{guess}The flags are --data.sources.N.KEY with N = {numbers} and KEY one of {keys}"
    return suggest(name, flags, prefix="--")


def _first_paragraph(box: str) -> str:
    """The message of tyro's error box, without the box and without the advice under its first rule."""
    lines = []
    for line in box.splitlines()[1:]:
        line = line.strip(" │")
        if not line.strip("─╰╯"):
            break
        lines.append(line)
    return " ".join(lines) or box.strip()
