"""One TOML file, or a chain of them joined by `extends`, to a checked dictionary of tables.

Every file is checked by itself against the schema, so that an error can name the file and the line of the mistake. The
result has only keys of the schema, with values of their types.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torchtitan.config.keys import Key, element_table, keys_of
from torchtitan.config.schema import JobConfig
from torchtitan.tools.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tables = dict[str, dict[str, Any]]


@cache  # the planner's advice checks some hundred configurations
def known_keys() -> Mapping[str, Key]:
    """`table.key` -> its Key, with the table's decision if it has none of its own."""
    return MappingProxyType(
        {
            f"{table}.{name}": replace(key, decides=key.decides or of_table.decides)
            for table, of_table in keys_of(JobConfig).items()
            for name, key in keys_of(of_table.hint).items()
        }
    )


def values_of(config: JobConfig) -> dict[str, Any]:
    """`table.key` -> its value in a configuration."""
    return {f"{name}.{key}": value for name, table in vars(config).items() for key, value in vars(table).items()}


@cache
def torchtitan_keys() -> dict[str, dict[str, str]]:
    """torchtitan_keys.toml: `renamed`, key -> new name, and `gone`, patterns -> what to write instead."""
    return tomllib.loads(Path(__file__).with_name("torchtitan_keys.toml").read_text(encoding="utf-8"))


def explain(name: str) -> str | None:
    """What became of torchtitan's `table.key` (or `table`), or None if there is nothing to say about it."""
    tables = torchtitan_keys()
    if name in tables["renamed"]:
        return f"it is called {tables['renamed'][name]}"
    for patterns, instead in tables["gone"].items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return " ".join(instead.split())
    return None


def suggest(name: str, among: Iterable[str] | None = None, prefix: str = "") -> str:
    """What to write instead of the unknown `table.key` or `table`: what became of torchtitan's, or the nearest names.

    among: the names to choose from; None: every key and every table. prefix: put before each name.
    """
    explanation = explain(name)
    if explanation is not None:
        return explanation
    known = list(among) if among is not None else [*known_keys(), *keys_of(JobConfig)]
    table, _, key = name.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == table}
    elsewhere = [k for k in known if k.rpartition(".")[2] == key]  # the right key in the wrong table, or in none
    near = [siblings[k] for k in difflib.get_close_matches(key, siblings, n=1)] if table or not elsewhere else []
    near += elsewhere
    if not near and table not in keys_of(JobConfig):
        near = difflib.get_close_matches(name, known, n=1)
    if near:
        return "did you mean " + " or ".join(prefix + k for k in dict.fromkeys(near)) + "?"
    if table in keys_of(JobConfig):
        return f"the keys of [{table}] are " + ", ".join(keys_of(keys_of(JobConfig)[table].hint))
    return "the tables are " + ", ".join(keys_of(JobConfig))


def load_tables(path: Path) -> Tables:
    """Read `path` and what it extends; return the merged tables. Raises UserError."""
    return _load(path, ())


def own_keys(path: Path) -> set[str]:
    """`table.key` of all keys in `path` itself, without those that it extends."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    return {f"{table}.{key}" for table, values in raw.items() if isinstance(values, dict) for key in values}


def _load(path: Path, extended_by: tuple[Path, ...]) -> Tables:
    resolved = path.resolve()
    if resolved in [file.resolve() for file in extended_by]:
        chain = " -> ".join(str(file) for file in (*extended_by, path))
        raise UserError(f"`extends` goes round in a circle: {chain}. One of these files must not extend the next.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if extended_by:
            extends = f"{extended_by[-1]} extends {path}, which does not exist"
            raise UserError(f"{extends}; the path is relative to the folder of the file that extends.") from None
        raise UserError(f"The configuration file {path} does not exist (looked up from {Path.cwd()}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration file {path} cannot be read as UTF-8 text: {error}.") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None

    parent = raw.pop("extends", None)
    if parent is None:
        base: Tables = {}
    elif isinstance(parent, str) and parent:
        base = _load(path.parent / parent, (*extended_by, path))
    else:
        raise UserError(f'{path}: extends = {_show(parent)} is not a file name; write extends = "other.toml".')
    for table, values in _check_file(raw, path, text).items():
        base[table] = {**base.get(table, {}), **values}
    return base


def _check_file(raw: dict[str, Any], path: Path, text: str) -> Tables:
    """The tables of one file; UserError for an unknown name or a value of the wrong type."""
    tables = keys_of(JobConfig)
    checked: Tables = {}
    for table, values in raw.items():
        if table not in tables:
            inside = values if isinstance(values, dict) else ()
            explanation = next(filter(None, (explain(f"{table}.{key}") for key in inside)), None)
            what = f"[{table}] is not a table" if isinstance(values, dict) else f"{table} stands outside the tables"
            raise UserError(
                f"{_at(path, text, table, '')}: {what} of the configuration; {explanation or suggest(table)}"
            )
        if not isinstance(values, dict):
            shape = f"[[{table}]]" if isinstance(values, list) else f"{table} = {_show(values)}"
            raise UserError(f"{_at(path, text, '', table)}: {shape} should be a table; write [{table}] and its keys.")
        keys = keys_of(tables[table].hint)
        checked[table] = {}
        for key, value in values.items():
            where = _at(path, text, table, key)
            if key not in keys:
                raise UserError(f"{where}: {table}.{key} is not known; {suggest(f'{table}.{key}')}")
            if (table, key) == ("job", "config_file"):
                raise UserError(f'{where}: job.config_file is for the command line; write extends = "other.toml".')
            checked[table][key] = convert(value, keys[key].hint, f"{table}.{key}", where)
            if (table, key) == ("stage", "after") and value:
                checked[table][key] = str((path.parent / value).resolve())
    return checked


def convert(value: Any, hint: Any, name: str, where: str) -> Any:
    """A value from TOML as the type `hint`. UserError with `where` (file:line) and `name` if it is of another type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # TOML has no None
        kinds = [a for a in arguments if a is not type(None)]
        named = [a for a in kinds if get_origin(a) is Literal]
        if named and (isinstance(value, str) or len(kinds) == 1):
            return convert(value, named[0], name, where)
        return convert(value, next(a for a in kinds if a not in named), name, where)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        choices = " or ".join(_show(a) for a in arguments)
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        guess = f'; did you mean "{near[0]}"?' if near else ""
        raise UserError(f"{where}: {name} = {_show(value)} is not offered: it must be {choices}{guess}")
    if origin is tuple:
        element = element_table(hint)
        if element is not None:
            return _convert_tables(value, element, name, where)
        if isinstance(value, list):
            return tuple(convert(item, arguments[0], f"{name}[{i}]", where) for i, item in enumerate(value))
    elif hint is float and (type(value) is float or (type(value) is int and abs(value) < 2**1000)):
        return float(value)
    elif type(value) is hint:  # not isinstance: True is an int to Python, not to a user
        return value
    raise UserError(f"{where}: {name} = {_show(value)} is {_kind(type(value))}, but {_expected(hint)} is expected.")


def _convert_tables(value: Any, element: type, name: str, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{where}: {name} is an array of tables; write [[{name}]] in double brackets for each.")
    keys = keys_of(element)
    result = []
    for i, item in enumerate(value):
        for key in item:
            if key not in keys:
                near = difflib.get_close_matches(key, keys, n=1)
                guess = f"did you mean {near[0]}?" if near else "its keys are " + ", ".join(keys)
                raise UserError(f"{where}: {key} is not a key of [[{name}]] (number {i} of them, from 0); {guess}")
        result.append(
            element(**{key: convert(v, keys[key].hint, f"{name}[{i}].{key}", where) for key, v in item.items()})
        )
    return tuple(result)


def _at(path: Path, text: str, table: str, key: str) -> str:
    """`file:line` of `key` in `[table]` (of the table itself if key is ""), or `file` if it is not found.

    It looks for the usual spelling only: dotted and inline tables are found by their first line or not at all.
    """
    current = ""
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[{1,2}\s*([^\]]+?)\s*\]", line)
        if header:
            current = header[1]
            found = current == f"{table}.{key}" if key else current == table or current.startswith(f"{table}.")
        elif key:
            found = current == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[.=]", line) is not None
        else:
            found = current == "" and re.match(rf"\s*[\"']?{re.escape(table)}[\"']?\s*[.=]", line) is not None
        if found:
            return f"{path}:{number}"
    return str(path)


def _show(value: Any) -> str:
    """A value as TOML would write it, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


_KINDS = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number with a fraction or exponent",
    list: "an array",
    dict: "a table",
}


def _kind(kind: type) -> str:
    return _KINDS.get(kind, f"a {kind.__name__}")


def _expected(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"an array, each item {_expected(get_args(hint)[0])},"
    return {int: "an integer (no quotes, point or exponent)", float: "a number"}.get(hint, _kind(hint))
