"""The house rules that a machine can check: imports point one way, private PyTorch names live in one file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "torchtitan"
FLOORS = {  # a room may import its own floor and those below
    "tools": 0,
    "config": 1,
    "datasets": 2,
    "attention": 2,
    "models": 3,
    "distributed": 4,
    "components": 5,
    "trainer.py": 7,
    "extensions": 7,
    "train.py": 8,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported when the file runs; those for type checkers only do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    if path == PACKAGE / "__init__.py":
        return
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "torchtitan":
            continue
        target = parts[1] if parts[1] in FLOORS else f"{parts[1]}.py"
        assert FLOORS[target] <= FLOORS[room(path)], f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_pytorch_names_live_in_torch_compat(path: Path):
    if path.name == "torch_compat.py":
        return
    tree = ast.parse(path.read_text())
    for name in imports(tree):
        if name.split(".")[0] == "torch":
            assert not any(p.startswith("_") and p != "__future__" for p in name.split(".")), f"{path}: {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert not ast.unparse(node).startswith(("torch.", "dist.", "F.")), f"{path}: {ast.unparse(node)}"


def test_configuration_is_read_without_importing_torch():
    """A misspelt key is answered at once, not after the seconds that PyTorch takes."""
    for path in (PACKAGE / "config").glob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports(ast.parse(path.read_text()))), path


def test_links_in_the_docs_lead_somewhere():
    root = PACKAGE.parent
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
