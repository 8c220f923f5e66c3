"""The repository as a whole: commands, links and scripts that the documents name exist, and nothing names a machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from torchtitan.components.hooks import Hook
from torchtitan.models.transformer import TransformerArgs

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("train_configs/*/README.md"))]
SCRIPTS = sorted(ROOT.glob("scripts/**/*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def run_by(text: str) -> set[str]:
    """What the commands of a document start: `scripts/plan.py`, `torchtitan.train`, `run_train.sh`."""
    files = r"(?:^|[\s`(])(?:\./)?((?:scripts|multinode)/[\w/]+\.(?:py|sh|sbatch)|run_\w+\.sh)"
    return {*re.findall(files, text), *re.findall(r"python3? -m ((?:torchtitan|tests)[\w.]*\w)", text)}


def exists(command: str) -> bool:
    if command.startswith(("torchtitan", "tests")):
        path = ROOT / command.replace(".", "/")
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return (ROOT / command).is_file()


def test_commands_are_found_in_a_text():
    text = "`python scripts/a/b.py X` and\n    ./run_train.sh --x\npython -m torchtitan.train. See docs/scripts/no.md."
    assert run_by(text) == {"scripts/a/b.py", "run_train.sh", "torchtitan.train"}
    assert exists("torchtitan.train") and exists("run_train.sh") and not exists("scripts/a/b.py")


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "moved.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_command_of_a_document_exists(document: Path):
    assert [command for command in sorted(run_by(document.read_text())) if not exists(command)] == []


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings: "## Look, `this`" -> look-this."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_relative_link_of_a_document_exists(document: Path):
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)", document.read_text()) if "://" not in link]
    assert [link for link, _, _ in links if not (document.parent / link).exists()] == []
    for link, _, anchor in links:
        page = document.parent / link if link else document
        assert not anchor or anchor in anchors(page), f"{link}#{anchor}"


def test_what_moved_exists_where_the_page_says():
    """docs/moved.md: nothing of the left column exists, everything of the right one does."""
    rows = [
        line.split("|")[1:3] for line in (ROOT / "docs/moved.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert len(rows) > 5
    for before, now in rows:
        old, new = (run_by(cell) | set(re.findall(r"`(torchtitan[\w.]+)`", cell)) for cell in (before, now))
        assert old and not any(map(exists, old)), before
        assert new and all(map(exists, new)), now


def test_the_classes_of_the_page_on_extending_are_what_it_says():
    """docs/extending.md: its Python is executed as it stands there, and its table names all points of a run."""
    page = (ROOT / "docs/extending.md").read_text()
    assert set(re.findall(r"^\| `(\w+)\(trainer", page, re.M)) == {name for name in vars(Hook) if name[0] != "_"}
    hook, model = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict[str, Any] = {}
    exec(hook, names)
    exec(model, names)
    assert issubclass(names["Perplexity"], Hook) and isinstance(names["TINY"], TransformerArgs)
    numbers: dict[str, float] = {"loss": 2.0}
    manifest: dict[str, float] = {}
    perplexity = names["Perplexity"]()
    perplexity.logging(None, numbers)
    perplexity.saving(None, manifest)
    assert numbers["my/perplexity"] == manifest["my/lowest_perplexity"] == pytest.approx(7.389056)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_stands_in_a_document_and_imports_no_script_by_path(script: Path):
    text = script.read_text()
    assert not re.search(r"sys\.path\.(insert|append|extend)", text)
    if '__name__ == "__main__"' in text:
        name = str(script.relative_to(ROOT))
        assert any(name in path.read_text() for path in DOCUMENTS if path.name != "moved.md"), (
            f"no document names {name}"
        )


def committed() -> dict[str, str]:
    """The text files that git knows, but for this one."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    binary = (".png", ".mds", ".st", ".arrow", ".safetensors", ".distcp", ".npy", ".bin", ".gz", ".zip", ".zstd")
    paths = [ROOT / name for name in names if not name.endswith(binary) and (ROOT / name).is_file()]
    return {str(path.relative_to(ROOT)): path.read_text(errors="ignore") for path in paths if path != Path(__file__)}


def test_nothing_committed_names_a_machine():
    """No path of a developer's machine, and no host but public ones: an index or a proxy has no place here."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    homes = re.compile(r"(?:^|[\s\"'`(=:])/(?:work|root|home/\w+)/", re.M)
    hosts = re.compile(r"https?://([\w.-]+)")
    public = re.compile(r"(?:^|\.)(?:arxiv\.org|github\.com|huggingface\.co|pytorch\.org|python\.org|pypi\.org)$")
    for name, text in committed().items():
        if name.startswith("assets/"):
            continue
        assert not (match := homes.search(text)), f"{name}: {match and match[0]}"
        for host in hosts.findall(text):
            assert public.search(host) or host in ("127.0.0.1", "localhost") or "example" in host, f"{name}: {host}"


def test_the_quick_tests_reach_every_room():
    """tests/quick.txt, which ./run_tests.sh --quick reads: its files exist, and each room and extension has one."""
    listed = [line.split("#")[0].strip() for line in (ROOT / "tests/quick.txt").read_text().splitlines()]
    files = [name for name in listed if name]
    assert [name for name in files if not (ROOT / name).is_file()] == [] and len(files) == len(set(files))
    rooms = [path.parent.relative_to(ROOT / "tests/unit") for path in (ROOT / "tests/unit").rglob("test_*.py")]
    for room in {str(room) for room in rooms if str(room) != "."}:
        assert any(name.startswith(f"tests/unit/{room}/") for name in files), f"nothing of tests/unit/{room} is listed"
