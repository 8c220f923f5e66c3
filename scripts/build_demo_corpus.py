"""Builds the demo's text from the Python installation itself: no download, no third-party text in the repository.

code.jsonl: one long document per package. The .py files of every installed distribution, and of every top-level module
or package of the standard library, joined in sorted order with a line `# file: path` before each. A package of more
than 1 MB of source is cut at the end of the last file that fits (a single larger file is left out).
docs.jsonl: short documents, namely docstrings of modules of at least 200 characters (read with ast, not imported) and
the descriptions in the distributions' metadata; exact duplicates are dropped.

Each record is {"text", "source"}. The result depends on the installation alone: sorted, no absolute paths, no times.
The distribution of this repository is left out, so that the corpus does not change with our edits. A stamp over names,
versions and this script makes a second run do nothing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from torchtitan.tools.folders import written

LONGEST_DOCUMENT = 1 << 20  # bytes of source in a package's document
SHORTEST_DOCSTRING = 200  # characters
OURS = "torchtitan-longcontext"
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="./data_cache/demo_text", help="folder for code.jsonl and docs.jsonl")
    parser.add_argument("--max-mb", type=float, default=60.0, help="stop adding packages to code.jsonl at this size")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    distributions = installed()
    stamp = make_stamp(distributions, arguments.max_mb)
    stamp_file = out / "stamp.txt"
    if stamp_file.is_file() and stamp_file.read_text() == stamp:
        print(f"{out} is up to date")
        return
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    stamp_file.unlink(missing_ok=True)
    packages = [*standard_library(), *((f"{d.name} {d.version}", files_of(d)) for d in distributions)]
    code, docs = build(packages, distributions, int(arguments.max_mb * 1e6))
    for name, records in (("code", code), ("docs", docs)):
        with written(out / f"{name}.jsonl") as aside, aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "source": source}) + "\n" for source, text in records)
        size = sum(len(text) for _, text in records) / 1e6
        print(f"{out / name}.jsonl: {len(records)} documents, {size:.1f} M characters")
    stamp_file.write_text(stamp)
    print(f"demo text built in {time.monotonic() - started:.1f} s")


def installed() -> list[importlib.metadata.Distribution]:
    """The installed distributions by name, without ours; of two with the same name, the first on the path."""
    by_name: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name.lower().replace("_", "-") != OURS:
            by_name.setdefault(name.lower(), distribution)
    return [by_name[name] for name in sorted(by_name)]


def make_stamp(distributions: list[importlib.metadata.Distribution], max_mb: float) -> str:
    versions = [f"{d.name} {d.version}" for d in distributions]
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return hashlib.sha256("\n".join([sys.version, script, str(max_mb), *versions]).encode()).hexdigest() + "\n"


def files_of(distribution: importlib.metadata.Distribution) -> list[tuple[str, Path]]:
    """(name to show, path) of the .py files that the distribution's RECORD lists."""
    names = sorted({str(f) for f in distribution.files or () if f.suffix == ".py" and ".." not in f.parts})
    return [(name, Path(str(distribution.locate_file(name)))) for name in names]


def standard_library() -> list[tuple[str, list[tuple[str, Path]]]]:
    """Each top-level package of the standard library, and its single modules together."""
    root = Path(sysconfig.get_paths()["stdlib"])
    groups: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in SKIPPED_FOLDERS or part.startswith(("config-", "lib-dynload")) for part in parts):
            group = parts[0] if len(parts) > 1 else f"modules {parts[0][0].lower()}"
            groups.setdefault(group, []).append(("/".join(parts), path))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [(f"python {version} {group}", groups[group]) for group in sorted(groups)]


Records = list[tuple[str, str]]


def build(
    packages: list[tuple[str, list[tuple[str, Path]]]],
    distributions: list[importlib.metadata.Distribution],
    most_bytes: int,
) -> tuple[Records, Records]:
    """The (source, text) records of code.jsonl and docs.jsonl."""
    code: Records = []
    docs: Records = []
    total = 0
    for package, files in packages:
        everything = list(read(files))
        docs.extend((f"{package}: {name}", doc) for name, text in everything if (doc := docstring(text)))
        parts = list(cut(everything))
        size = sum(len(text.encode()) for _, text in parts)
        if parts and total + size <= most_bytes:
            total += size
            code.append((package, "\n".join(f"# file: {name}\n{text}" for name, text in parts)))
    for distribution in distributions:
        metadata = distribution.metadata
        text = str(metadata["Description"]).strip() if "Description" in metadata else ""
        if len(text) >= SHORTEST_DOCSTRING and encodes(text):
            docs.append((f"{distribution.name} {distribution.version}: description", text))
    unique: dict[str, str] = {}
    for source, text in docs:
        unique.setdefault(text, source)
    return code, [(source, text) for text, source in unique.items()]


def read(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    """(name, text) of the files that exist, are UTF-8 and not blank."""
    for name, path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield name, text


def cut(files: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    size = 0
    for name, text in files:
        size += len(text.encode())
        if size > LONGEST_DOCUMENT:
            return
        yield name, text


DOCSTRING = re.compile(r"""(?:\s*#[^\n]*\n|\s*\n)*[rRuU]?(\"{3}|'{3}).*?(?<!\\)\1""", re.DOTALL)


def docstring(text: str) -> str | None:
    """The module's docstring if it is long enough; only the file's beginning is parsed, which is ten times faster."""
    begin = DOCSTRING.match(text)
    if not begin:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            found = ast.get_docstring(ast.parse(begin.group()))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return found if found and len(found) >= SHORTEST_DOCSTRING and encodes(found) else None


def encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


if __name__ == "__main__":
    main()
