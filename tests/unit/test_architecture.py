"""The house rules that a machine can check; docs/architecture.md states them, and this file reads its numbers there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "torchtitan"
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = [path for path in FILES if "extensions" not in path.parts]

FLOORS = {  # a room may import its own floor and those below
    "tools": 0,
    "config": 1,
    "datasets": 2,
    "attention": 2,
    "models": 3,
    "distributed": 4,
    "components": 5,
    "trainer.py": 6,
    "extensions": 7,
    "train.py": 8,
}
SIBLINGS = {("datasets", "attention"), ("attention", "datasets"), ("models", "datasets")}
"""On one floor or above, and still strangers: the model knows no data, and data know no model."""

EXTENSIONS = {  # what an extension may import beside the core
    "ingest": set(),
    "convert": set(),
    "planner": set(),
    "evaluation": {"ingest", "convert"},
    "cluster": {"evaluation"},
}
LONGEST = 400
OVERFULL = {"schema.py": 800}
"""The schema is a list."""
READING_CORE = 6500


def imports(path: Path) -> Iterator[str]:
    """torchtitan.x.y of every import of a file, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> Iterator[list[str]]:
    """["datasets", "plan", "Plan"] for each import of ours."""
    yield from (parts[1:] for name in imports(path) if (parts := name.split("."))[0] == "torchtitan" and parts[1:])


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def section(title: str) -> str:
    """What docs/architecture.md says under a heading."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def lines(path: Path) -> int:
    return path.read_text().count("\n")


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=named)
def test_imports_point_one_way(path: Path):
    for parts in ours(path):
        target = parts[0] if parts[0] in FLOORS else f"{parts[0]}.py"
        assert FLOORS[target] <= FLOORS[room(path)], f"{named(path)} imports {'.'.join(parts)}"
        assert (room(path), target) not in SIBLINGS, f"{named(path)} imports {'.'.join(parts)}"


def test_the_core_imports_no_extension_and_train_alone_the_wiring():
    """In functions and under TYPE_CHECKING too; and no file hides an arrow from its reader."""
    for path in CORE:
        reached = [".".join(parts) for parts in ours(path) if parts[0] == "extensions"]
        if path == PACKAGE / "train.py":
            assert reached and all(name.startswith("extensions.wiring") for name in reached), reached
        else:
            assert not reached, f"{named(path)}: {reached}"
    importers = [path for path in FILES if any(parts[:2] == ["extensions", "wiring"] for parts in ours(path))]
    assert importers == [PACKAGE / "train.py"]
    assert not [named(path) for path in FILES if "TYPE_CHECKING" in path.read_text()]


@pytest.mark.parametrize("extension", sorted(EXTENSIONS))
def test_extensions_hardly_know_each_other(extension: str):
    for path in (PACKAGE / "extensions" / extension).rglob("*.py"):
        others = {parts[1] for parts in ours(path) if parts[0] == "extensions"} - {extension}
        assert others <= EXTENSIONS[extension], f"{named(path)}: {others}"


def test_no_arrow_between_rooms_goes_both_ways():
    """Extensions count as rooms of their own."""

    def where(parts: list[str]) -> str:
        return "/".join(parts[:2]) if parts[0] == "extensions" else parts[0].removesuffix(".py")

    arrows = {(where(list(path.relative_to(PACKAGE).parts)), where(parts)) for path in FILES for parts in ours(path)}
    assert not [(a, b) for a, b in arrows if a < b and (b, a) in arrows]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_private_pytorch_names_live_in_torch_compat(path: Path):
    if path.name == "torch_compat.py":
        return
    for name in imports(path):
        if name.split(".")[0] == "torch":
            assert not any(p.startswith("_") and p != "__future__" for p in name.split(".")), f"{path}: {name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert not ast.unparse(node).startswith(("torch.", "dist.", "F.")), f"{path}: {ast.unparse(node)}"


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(' '.join(sys.modules))"
    return set(subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True).split())


def test_the_model_is_loaded_without_data():
    loaded = loaded_by("torchtitan.models.transformer")
    assert "torchtitan.attention.backends" in loaded  # it did import what it needs
    strangers = ("torchtitan.datasets", "torchtitan.components", "torchtitan.distributed", "torchtitan.extensions")
    for name in ("torchdata", "jinja2", "datasets", "pyarrow", "tokenizers", "transformers", *strangers):
        assert not [m for m in loaded if m == name or m.startswith(name + ".")], name


@pytest.mark.parametrize("module", ["config", "extensions.wiring", "extensions.cluster.chain", "train"])
def test_a_misspelt_key_is_answered_without_pytorch(module: str):
    """Not after the seconds that importing it takes."""
    assert "torch" not in loaded_by(f"torchtitan.{module}")


def environment_readers() -> set[str]:
    pattern = re.compile(r"os\.environ|os\.getenv|environ\[")
    return {named(path) for path in FILES if pattern.search(path.read_text())}


def test_environment_variables_are_read_where_the_page_says():
    """At the door and in the cluster extension; the page lists every other file."""
    elsewhere = {name for name in environment_readers() if not name.startswith("extensions/cluster/")} - {"train.py"}
    listed = set(re.findall(r"`([\w/]+\.py)`", section("Environment variables"))) - {"train.py"}
    assert elsewhere == listed


def test_the_trainer_can_be_read_in_one_sitting():
    tree = ast.parse((PACKAGE / "trainer.py").read_text())
    assert lines(PACKAGE / "trainer.py") <= 300
    assert sum(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree)) <= 25


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_room_is_not_overfull(path: Path):
    assert lines(path) <= OVERFULL.get(path.name, LONGEST), f"{named(path)}: {lines(path)}"


def reading_core() -> list[tuple[str, int]]:
    """(file or folder, its lines as the page says), from the table of the page."""
    rows = re.findall(r"^\| `([\w/.]+)` \| ([\d,]+) \|", section("The reading core"), re.M)
    return [(name, int(count.replace(",", ""))) for name, count in rows]


def test_the_reading_core_is_small_and_its_page_true():
    """Every line of the core that a reader meets counts; the page's numbers are off by a tenth at most."""
    total = 0
    listed: set[Path] = set()
    for name, said in reading_core():
        path = PACKAGE / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        assert files and not listed & set(files), name
        listed |= set(files)
        count = sum(map(lines, files))
        total += count
        assert abs(count - said) <= max(10, 0.1 * count), f"{name} has {count} lines, the page says {said}"
    assert total <= READING_CORE, total
    claim = re.search(r"Some ([\d,]+) of its ([\d,]+) lines", (REPOSITORY / "README.md").read_text())
    everything = sum(map(lines, FILES))
    for said, count in zip(claim.groups() if claim else (), (total, everything), strict=True):
        assert abs(int(said.replace(",", "")) - count) <= 0.05 * count, f"README says {said}: {count} lines"
    beside = section("Beside the reading core")
    for path in set(CORE) - listed:
        if path.name != "__init__.py" and lines(path):
            parents = [named(folder) + "/" for folder in path.parents if folder.is_relative_to(PACKAGE)]
            assert any(f"`{name}`" in beside for name in (named(path), *parents)), (
                f"{named(path)} is nowhere on the page"
            )


def test_files_and_names_of_the_page_exist():
    """Every `file.py`, and every `name` in `file.py`."""
    names = [str(path.relative_to(REPOSITORY)) for path in (*FILES, *REPOSITORY.glob("tests/**/*.py"))]
    for file in set(re.findall(r"`([\w/]+\.py)`", PAGE)):
        assert any(f"/{name}".endswith(f"/{file}") for name in names), file
    pairs = re.findall(r"`([\w.]+)` in\s+`([\w/]+\.py)`", PAGE)
    assert len(pairs) > 3
    for name, file in pairs:
        words = name.split(".")[-1]
        assert re.search(rf"^\s*(def |class )?{words}\b", (PACKAGE / file).read_text(), re.M), f"{name} in {file}"


def test_every_file_says_what_it_is_for():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert not tree.body or ast.get_docstring(tree), named(path)
