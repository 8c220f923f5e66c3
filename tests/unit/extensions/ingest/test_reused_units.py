"""A source that is mended, edited, killed and edited again: always the folder of a run from scratch, and no unit twice.

The witness is a run of the same files into an empty cache; what is tokenized is noted document by document.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import units
from torchtitan.extensions.ingest.text import Span
from torchtitan.extensions.ingest.tokenize import tokenize_shard, tokenize_source
from torchtitan.tools.errors import UserError

FORK = multiprocessing.get_context("fork")
UNIT = 400


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing waits for the disk: what a process has written stays when it is killed."""
    monkeypatch.setattr(units, "UNIT_BYTES", UNIT)
    monkeypatch.setattr(units, "RECORD_BATCH_TOKENS", 300)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def contents(folder: Path) -> dict[str, Any]:
    """The files of a corpus; of the names and times of the text, which may change later, corpus.json says old ones."""
    files: dict[str, Any] = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    about = json.loads(files["corpus.json"])
    about["files"] = [[file["size"], file["sha256"]] for file in about["files"]]
    return files | {"corpus.json": about}


def from_scratch(source: Source, tokenizer: Tokenizer, data: Data) -> dict[str, Any]:
    cache = Path(data.cache_folder).with_name("scratch")
    shutil.rmtree(cache, ignore_errors=True)
    return contents(tokenize_source(source, tokenizer, replace(data, cache_folder=str(cache)), 1))


class Noting:
    """A tokenizer that counts the documents it is given, in any process, and can end its process at one of them."""

    def __init__(self, base: Tokenizer, notes: Path) -> None:
        self.notes, self.kill_at = notes, -1
        notes.touch()

        def encode_batch(texts: list[str]) -> list[list[int]]:
            if self.notes.stat().st_size == self.kill_at:
                os.kill(os.getpid(), 9)
            with self.notes.open("a") as file:
                file.write("x" * len(texts))
            return base.encode_batch(texts)

        self.tokenizer = replace(base, _encode_batch=encode_batch)

    def take(self) -> int:
        count = self.notes.stat().st_size
        self.notes.write_text("")
        return count


class Folder:
    """A folder of .jsonl files that is edited at random."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path, self.rng, self.count = path, rng, 0
        path.mkdir()
        for _ in range(rng.randint(4, 40)):
            self.add()

    def text(self) -> str:
        size = self.rng.choice([1, 3, 8, 30])
        lines = [json.dumps({"text": f"{self.rng.random()} " * self.rng.randint(0, 4)}) for _ in range(size)]
        return "\n".join(lines) + "\n"

    def files(self) -> list[Path]:
        return sorted(self.path.iterdir())

    def add(self) -> None:
        self.count += 1
        (self.path / f"{self.rng.randrange(1000):03d}-{self.count}.jsonl").write_text(self.text())

    def edit(self) -> str:
        """One edit, and what it was."""
        file = self.rng.choice(self.files())
        how = self.rng.choice(["add", "remove", "rename", "touch", "same size", "swap", "append", "copy"])
        if how == "add":
            self.add()
        elif how == "remove" and len(self.files()) > 2:
            file.unlink()
        elif how == "rename":
            file.rename(self.path / f"{self.rng.randrange(1000):03d}-r{self.count}.jsonl")
        elif how == "touch":
            file.touch()
        elif how == "same size":  # and the time is put back
            was = file.stat()
            file.write_text(file.read_text().translate(str.maketrans("123456789", "234567891")))
            os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
        elif how == "swap":  # with the times of the other
            other = self.rng.choice(self.files())
            texts, times = [f.read_text() for f in (file, other)], [f.stat().st_mtime_ns for f in (file, other)]
            for f, text, at in zip((other, file), texts, reversed(times)):
                f.write_text(text)
                os.utime(f, ns=(at, at))
        elif how == "append":
            with file.open("a") as end:
                end.write(self.text())
        elif how == "copy":
            shutil.copy2(file, self.path / f"{self.rng.randrange(1000):03d}-c{self.count}.jsonl")
        return how


@pytest.mark.parametrize("seed", range(4))
def test_random_edits_and_kills(tokenizer: Tokenizer, data: Data, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    folder = Folder(tmp_path / "text", rng)
    source = Source(name="s", path=str(folder.path))
    noting = Noting(tokenizer, tmp_path / "notes")
    edits: list[str] = []
    for _ in range(8):
        edits += [folder.edit() for _ in range(rng.randint(0, 3))]
        shards = rng.choice([1, 1, 2, 3])
        if rng.random() < 0.6:  # a run that is killed somewhere
            noting.take()
            noting.kill_at = rng.randint(0, 60)
            job = FORK.Process(target=tokenize_shard, args=(source, noting.tokenizer, data, 0, shards, 1))
            job.start()
            job.join(60)
            noting.kill_at = -1
            if rng.random() < 0.5:
                edits.append(folder.edit())
        made = None
        for shard in rng.sample(range(shards), shards):
            made = tokenize_shard(source, noting.tokenizer, data, shard, shards, rng.choice([1, 1, 1, 2])) or made
        assert made is not None and contents(made) == from_scratch(source, tokenizer, data), edits
    if rng.random() < 0.5:
        noting.take()
        assert tokenize_source(source, noting.tokenizer, data, 1) == made and noting.take() == 0


@pytest.fixture
def many(tmp_path: Path) -> Source:
    """200 files of 4 lines of 20 to 100 bytes; a unit is 400, and holds one or a few."""
    (tmp_path / "many").mkdir()
    rng = random.Random(0)
    for number in range(200):
        lines = [json.dumps({"text": str(rng.random()) * rng.randint(1, 3)}) for _ in range(4)]
        (tmp_path / "many" / f"{number:03d}.jsonl").write_text("\n".join(lines) + "\n")
    return Source(name="many", path=str(tmp_path / "many"))


MOST = 4 * 3 * 2 * UNIT // 100
"""Documents of the unit of a file and of those beside it, if all its files were small."""


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("how", ["mend", "add", "remove", "rename", "touch"])
def test_an_edit_costs_only_its_neighbourhood(
    tokenizer: Tokenizer, data: Data, many: Source, tmp_path: Path, how: str, finished: bool
) -> None:
    noting = Noting(tokenizer, tmp_path / "notes")
    file = Path(many.path) / "100.jsonl"
    if finished:
        tokenize_source(many, noting.tokenizer, data, 1)
    else:  # the last of 9 shards is missing
        for shard in range(8):
            assert tokenize_shard(many, noting.tokenizer, data, shard, 9, 1) is None
    done = noting.take()
    if how == "mend":
        file.write_text(file.read_text() + '{"text": "one more"}\n')
    elif how == "add":
        file.with_name("100a.jsonl").write_text('{"text": "one more"}\n')
    elif how == "remove":
        file.unlink()
    elif how == "rename":
        file.rename(file.with_name("100z.jsonl"))
    else:
        file.touch()
    made = tokenize_source(many, noting.tokenizer, data, 1)
    least = 0 if finished else 800 - done
    assert noting.take() <= least + (0 if how in ("rename", "touch") else MOST)
    assert contents(made) == from_scratch(many, tokenizer, data)


def test_units_of_a_bad_file_alone_are_made_anew(
    tokenizer: Tokenizer, data: Data, many: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "torchtitan")
    logging.getLogger("torchtitan").propagate = True
    noting = Noting(tokenizer, tmp_path / "notes")
    bad = Path(many.path) / "150.jsonl"
    good = bad.read_text()
    bad.write_text(good + '{"text": "cut\n')
    with pytest.raises(UserError, match="150.jsonl line 5: broken JSON"):
        tokenize_source(many, noting.tokenizer, data, 1)
    assert noting.take() > 400
    bad.write_text(good)
    made = tokenize_source(many, noting.tokenizer, data, 1)
    assert noting.take() < 300
    assert "units are made of the same text as in" in caplog.text and "(rm -r)" in caplog.text
    assert contents(made) == from_scratch(many, tokenizer, data)


def test_other_options_share_no_unit(tokenizer: Tokenizer, data: Data, many: Source, tmp_path: Path) -> None:
    noting = Noting(tokenizer, tmp_path / "notes")
    tokenize_source(many, noting.tokenizer, data, 1)
    noting.take()
    for other, policy in (
        (replace(many, where="text != ''"), data),
        (many, replace(data, add_bos=False)),
        (replace(many, name="another name"), data),
    ):
        made = tokenize_source(other, noting.tokenizer, policy, 1)
        assert noting.take() == 800
        assert contents(made) == from_scratch(other, tokenizer, policy)


def test_without_links_units_are_copied(
    tokenizer: Tokenizer, data: Data, many: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Any) -> None:
        raise PermissionError("no links here")

    first = tokenize_source(many, tokenizer, data, 1)
    Path(many.path, "000.jsonl").unlink()
    monkeypatch.setattr(os, "link", refuse)
    noting = Noting(tokenizer, tmp_path / "notes")
    second = tokenize_source(many, noting.tokenizer, data, 1)
    assert second != first and noting.take() <= MOST
    assert contents(second) == from_scratch(many, tokenizer, data)


@pytest.mark.parametrize("damage", ["cut", "gone", "no units.json", "half of units.json"])
def test_a_finished_corpus_that_is_damaged_is_not_used(
    tokenizer: Tokenizer, data: Data, many: Source, damage: str
) -> None:
    first = tokenize_source(many, tokenizer, data, 1)
    shard = sorted(first.glob("*.arrow"))[3]
    if damage == "cut":
        os.truncate(shard, 100)
    elif damage == "gone":
        shard.unlink()
    elif damage == "no units.json":
        (first / "units.json").unlink()
    else:
        os.truncate(first / "units.json", 999)
    Path(many.path, "000.jsonl").unlink()
    assert contents(tokenize_source(many, tokenizer, data, 1)) == from_scratch(many, tokenizer, data)


def test_there_are_never_more_than_2048_units() -> None:
    """Of many sizes of files, and of files with the same content; all parts are there once, in order."""
    rng = random.Random(1)
    for files, largest in ((50_000, 1), (3000, 5000), (1, 1 << 20), (9000, 399), (2049, 401)):
        for same in (False, True):
            sizes = [rng.randint(0, largest) for _ in range(files)]
            digests = ["ab" * 32 if same else f"{rng.getrandbits(256):064x}" for _ in range(files)]
            cut = units.into_units(partial(parts_of, digests, sizes), sum(sizes))
            assert 1 <= len(cut) <= 2048 and all(cut)
            flat = [(part.path, part.start) for unit in cut for part in unit]
            assert flat == sorted(flat)
            assert sum(part.size for unit in cut for part in unit) == sum(sizes)


def parts_of(digests: list[str], sizes: list[int], target: int) -> list[tuple[str, list[Span]]]:
    """Of files that can be cut anywhere."""
    cuts = [range(0, size, target) for size in sizes]
    return [
        (digest, [Span(f"{i:05d}", start, 0, min(target, size - start)) for start in cut])
        for i, (digest, size, cut) in enumerate(zip(digests, sizes, cuts))
    ]
