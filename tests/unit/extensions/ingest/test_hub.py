"""Hub sources: local copies and a server on this machine, kills, broken networks, wrong names."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from tests.unit.extensions.ingest.hub_server import COMMIT, serve
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import hub, units
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.tokenize import tokenize_shard, tokenize_source
from torchtitan.tools.errors import UserError

FORK = multiprocessing.get_context("fork")
ASK_FOR_COMMIT = hub._ask_for_commit
TEXTS = [f"document {i} " + "long " * (i * 7 % 30) if i % 9 else " \n" for i in range(40)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 500)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.0)  # no test waits for the hub to be asked again
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The log is looked at, whatever a test before has done to it."""
    monkeypatch.setattr(logging.getLogger("torchtitan"), "propagate", True)
    caplog.set_level(logging.INFO, "torchtitan")


def lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "n": i}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A local copy of a dataset: three files of its split train, one of test."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for number, part in enumerate((TEXTS[:7], TEXTS[7:30], TEXTS[30:])):
        (folder / f"train-{number}.jsonl").write_bytes(lines(part))
    (folder / "test-0.jsonl").write_bytes(lines(["to be tested"]))
    return folder


def expected(texts: list[str]) -> list[list[int]]:
    return [[256, *text.encode(), 257] for text in texts if text.strip()]


def three_at_once(source: Source, tokenizer: Tokenizer, data: Data) -> None:
    """Tokenize the source in three processes, as the ranks of a host do."""
    jobs = [FORK.Process(target=tokenize_source, args=(source, tokenizer, data, 1)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]


def documents(source: Source, tokenizer: Tokenizer, data: Data) -> list[list[int]]:
    corpus = resolve_source(source, tokenizer, data)
    return [corpus.document(i).tolist() for i in range(len(corpus))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def unfinished(data: Data) -> list[Path]:
    return list(Path(data.cache_folder).glob(".unfinished-*"))


def counted(base: Tokenizer, seen: list[str]) -> Tokenizer:
    def encode_batch(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return base.encode_batch(texts)

    return replace(base, _encode_batch=encode_batch)


# ---- local copies ----------------------------------------------------------------------------------------------------


def test_a_local_copy_is_read_in_order(tokenizer: Tokenizer, data: Data, mirror: Path) -> None:
    source = Source(name="web", path=f"hub:{mirror}")
    seen: list[str] = []
    folder = tokenize_source(source, counted(tokenizer, seen), data, 1)
    assert len(list(folder.glob("*.arrow"))) > 3
    metadata = json.loads((folder / "corpus.json").read_text())
    assert metadata["empty_documents"] == sum(not text.strip() for text in TEXTS)
    assert metadata["max_token_id"] == 257
    assert documents(source, counted(tokenizer, seen), data) == expected(TEXTS)
    assert sorted(seen) == sorted(text for text in TEXTS if text.strip())  # once: the second time from the cache
    assert documents(replace(source, hub_split="test"), tokenizer, data) == expected(["to be tested"])
    with_workers = replace(data, cache_folder=data.cache_folder + "-3")
    assert contents(tokenize_source(source, tokenizer, with_workers, 3)) == contents(folder)


def test_it_starts_at_data_folder(tokenizer: Tokenizer, data: Data, mirror: Path) -> None:
    there = replace(data, folder=str(mirror.parent))
    assert documents(Source(name="web", path="hub:./mirror"), tokenizer, there) == expected(TEXTS)


def test_parquet(tokenizer: Tokenizer, data: Data, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"id": range(40), "body": TEXTS}), tmp_path / "p" / "a.parquet", row_group_size=7)
    source = Source(name="p", path=f"hub:{tmp_path / 'p'}", text_field="body")
    assert documents(source, tokenizer, data) == expected(TEXTS)


@pytest.mark.parametrize("count", [1, 20, 1000])
def test_max_documents(tokenizer: Tokenizer, data: Data, mirror: Path, count: int) -> None:
    """Blank documents are none, as everywhere."""
    source = Source(name="web", path=f"hub:{mirror}", max_documents=count)
    assert documents(source, tokenizer, data) == expected(TEXTS)[:count]
    assert documents(replace(source, max_documents=None), tokenizer, data) == expected(TEXTS)


def test_another_input_is_another_folder(tokenizer: Tokenizer, data: Data, mirror: Path) -> None:
    source = Source(name="web", path=f"hub:{mirror}")
    folders = {
        tokenize_source(source, tokenizer, data),
        tokenize_source(source, replace(tokenizer, fingerprint="e" * 64), data),
        tokenize_source(source, tokenizer, replace(data, add_eos=False)),
        tokenize_source(replace(source, hub_split="test"), tokenizer, data),
        tokenize_source(replace(source, max_documents=3), tokenizer, data),
    }
    (mirror / "train-1.jsonl").write_bytes(lines(TEXTS[8:]))
    folders.add(tokenize_source(source, tokenizer, data))
    assert len(folders) == 6


# ---- kills and broken streams ----------------------------------------------------------------------------------------


def killed_at(event: int, folder: str) -> None:
    """SIGKILL this process just before its `event`-th change of the files below folder."""
    seen = 0

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile"):
            seen += folder in str(args[0]) and not str(args[0]).endswith(".lock")
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("most", [None, 33])
def test_a_kill_at_many_moments(
    tokenizer: Tokenizer, data: Data, mirror: Path, tmp_path: Path, most: int | None
) -> None:
    """The next run makes the units that are not whole, no others, and the folder is an unbroken run's."""
    source = Source(name="web", path=f"hub:{mirror}", max_documents=most)
    unbroken = contents(tokenize_source(source, tokenizer, replace(data, cache_folder=str(tmp_path / "unbroken"))))
    wanted = [text for text in TEXTS if text.strip()][:most]
    progress = set()
    for event in range(4, 1000, 5):
        there = replace(data, cache_folder=str(tmp_path / f"cache{event}"))

        def run(event: int = event, there: Data = there) -> None:
            killed_at(event, there.cache_folder)
            tokenize_source(source, tokenizer, there, 1)

        job = FORK.Process(target=run)
        job.start()
        job.join(60)
        done = [json.loads(path.read_bytes()) for aside in unfinished(there) for path in aside.glob("unit-*.json")]
        finished = list(Path(there.cache_folder).glob("web-*"))
        seen: list[str] = []
        folder = tokenize_source(source, counted(tokenizer, seen), there, 1)
        assert contents(folder) == unbroken, f"killed at event {event}"
        assert not unfinished(there)
        made = len(wanted) if finished else sum(unit["documents"] for unit in done)  # units are made in order
        assert seen == wanted[made:], f"killed at event {event}"
        progress.add(made)
        shutil.rmtree(there.cache_folder)
        if job.exitcode == 0:
            break
        assert job.exitcode == -signal.SIGKILL
    assert len(progress) > 3


class Loader:
    """In place of datasets.load_dataset: a hub dataset, whose records are counted as they are streamed."""

    def __init__(self, texts: list[str] = TEXTS) -> None:
        self.texts = texts
        self.read: list[str] = []
        self.breaks_at: str | None = None
        self.commits: list[str | None] = []

    def __call__(self, path: str, name: str | None = None, **options: Any) -> Any:
        assert (path, name, options["split"]) == ("own/name", None, "train")
        self.commits.append(options["revision"])
        if not options["streaming"]:
            return datasets.Dataset.from_dict({"text": self.texts, "n": [1] * len(self.texts)})

        def records() -> Iterator[dict[str, Any]]:
            for text in self.texts:
                if text == self.breaks_at:
                    raise ConnectionError("the line went dead")
                self.read.append(text)
                yield {"text": text, "n": 1}

        features = datasets.Features({"text": datasets.Value("string"), "n": datasets.Value("int64")})
        return datasets.IterableDataset.from_generator(records, features=features)


WEB = Source(name="web", path="hub:own/name")
COMMITS = ["a" * 40, "b" * 40]


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """A hub that can be reached, at the first of COMMITS."""
    made = Loader()
    monkeypatch.setattr(datasets, "load_dataset", made)
    monkeypatch.setattr(hub, "_ask_for_commit", lambda wanted: COMMITS[0])
    return made


def test_no_more_is_streamed_than_max_documents_take(tokenizer: Tokenizer, data: Data, loader: Loader) -> None:
    few = replace(WEB, max_documents=33)
    loader.breaks_at = TEXTS[30]
    with pytest.raises(UserError) as error:
        tokenize_source(few, tokenizer, data)
    for word in ("own/name", "after 30 records", "the line went dead", "Start again"):
        assert word in str(error.value)
    assert not unfinished(data)
    loader.breaks_at = None
    loader.read.clear()
    assert documents(few, tokenizer, data) == expected(TEXTS)[:33]
    assert loader.read == TEXTS[:38]  # 5 of them are blank


def test_what_was_downloaded_is_finished_without_the_stream(
    tokenizer: Tokenizer, data: Data, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(units, "_write_dataset_files", None)
        with pytest.raises(TypeError):
            tokenize_source(replace(WEB, max_documents=20), tokenizer, data)
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert documents(replace(WEB, max_documents=20), tokenizer, data) == expected(TEXTS)[:20]


def test_a_disk_that_is_full(
    tokenizer: Tokenizer, data: Data, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = contents(tokenize_source(WEB, tokenizer, replace(data, cache_folder=str(tmp_path / "unbroken"))))
    calls = [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 6:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device.*GiB"):
            tokenize_source(WEB, tokenizer, data)
    assert len(unfinished(data)) == 1
    assert contents(tokenize_source(WEB, tokenizer, data)) == unbroken


def test_several_ranks_download_once(tokenizer: Tokenizer, data: Data, mirror: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    def encode_batch(texts: list[str]) -> list[list[int]]:
        with notes.open("a") as file:
            file.write("x" * len(texts))
        return tokenizer.encode_batch(texts)

    noting = replace(tokenizer, _encode_batch=encode_batch)
    source = Source(name="web", path=f"hub:{mirror}")
    three_at_once(source, noting, data)
    assert notes.stat().st_size == len(expected(TEXTS))


@pytest.mark.parametrize("most", [None, 33])
def test_shards_in_any_order(tokenizer: Tokenizer, data: Data, loader: Loader, most: int | None) -> None:
    source = replace(WEB, max_documents=most)
    assert tokenize_shard(source, tokenizer, data, 1, 2, 1) is None
    folder = tokenize_shard(source, tokenizer, data, 0, 2, 1)
    assert folder is not None and documents(source, tokenizer, data) == expected(TEXTS)[:most]
    assert not unfinished(data)


# ---- which commit ----------------------------------------------------------------------------------------------------


def test_the_commit_is_kept_and_a_branch_that_moved_is_noticed(
    tokenizer: Tokenizer, data: Data, loader: Loader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = tokenize_source(WEB, tokenizer, data)
    asked = {"name": "own/name", "subset": "", "split": "train", "revision": "main"}
    assert json.loads((first / "corpus.json").read_text())["hub"] == asked | {"commit": COMMITS[0]}
    monkeypatch.setattr(hub, "_ask_for_commit", lambda wanted: COMMITS[1])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    second = tokenize_source(WEB, tokenizer, data)
    assert second != first
    assert str(first) in caplog.text and all(commit in caplog.text for commit in COMMITS)
    assert tokenize_source(replace(WEB, hub_revision=COMMITS[0]), tokenizer, data) == first
    assert loader.commits == COMMITS


@pytest.mark.parametrize("answers", [True, False])
def test_ranks_that_start_together_ask_the_hub_once(
    tokenizer: Tokenizer, data: Data, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """Also if it does not answer: else each would wait for it, one after the other."""
    tokenize_source(WEB, tokenizer, data)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 60.0)
    for file in Path(data.cache_folder).glob(".hub-*.json"):
        file.write_text(json.dumps({"commit": COMMITS[1], "time": time.time() - 61}))  # an old answer is none
    notes = tmp_path / "notes"

    def ask(wanted: Any) -> str:
        with notes.open("a") as file:
            file.write("asked\n")
        if not answers:
            raise hub.UnreachableError("no route")
        return COMMITS[0]

    monkeypatch.setattr(hub, "_ask_for_commit", ask)
    three_at_once(WEB, tokenizer, data)
    assert notes.read_text() == "asked\n"
    assert loader.commits == [COMMITS[0]]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and the hub is at an address where nobody listens."""

    def cut() -> None:
        monkeypatch.setattr(hub, "_ask_for_commit", ASK_FOR_COMMIT)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")

    return cut


def test_without_a_network_what_was_made_is_used(
    tokenizer: Tokenizer,
    data: Data,
    loader: Loader,
    no_network: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = [tokenize_source(WEB, tokenizer, data)]
    monkeypatch.setattr(hub, "_ask_for_commit", lambda wanted: COMMITS[1])
    made.append(tokenize_source(WEB, tokenizer, data))
    os.utime(made[0] / "corpus.json", (1, 1))
    no_network()
    caplog.clear()
    assert tokenize_source(WEB, tokenizer, data) == made[1]  # the newest
    assert "cannot be reached" in caplog.text and str(made[1]) in caplog.text and COMMITS[1] in caplog.text
    assert tokenize_source(replace(WEB, hub_revision=COMMITS[0]), tokenizer, data) == made[0]
    others = (
        (replace(WEB, hub_split="test"), tokenizer, data),
        (replace(WEB, hub_subset="other"), tokenizer, data),
        (replace(WEB, hub_revision="v2"), tokenizer, data),
        (replace(WEB, text_field="body"), tokenizer, data),
        (replace(WEB, max_documents=7), tokenizer, data),
        (replace(WEB, path="hub:own/other"), tokenizer, data),
        (WEB, replace(tokenizer, fingerprint="e" * 64), data),
        (WEB, tokenizer, replace(data, add_bos=False)),
    )
    for other in others:
        with pytest.raises(UserError, match="cannot be reached"):
            tokenize_source(*other)


def test_no_network_and_nothing_made(tokenizer: Tokenizer, data: Data, no_network: Callable[[], None]) -> None:
    no_network()
    with pytest.raises(UserError) as error:
        tokenize_source(WEB, tokenizer, data)
    for word in ("hub:own/name", "'web'", "cannot be reached", "refused", data.cache_folder, "hub:./folder"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# ---- what a user can have wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"path": "hub:./nothing"}, ["hub:./nothing", "is not a folder"]),
        ({"hub_split": "validation"}, ["hub_split = 'validation'", "'train'", "'test'"]),
        ({"hub_subset": "en"}, ["hub_subset = 'en'", "default"]),
        ({"text_field": "body"}, ["'body'", "text_field", "'text', 'n'"]),
        ({"text_field": "n"}, ["record 1", "'n' is a int"]),
    ],
)
def test_what_is_not_there(
    tokenizer: Tokenizer, data: Data, mirror: Path, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        tokenize_source(replace(Source(name="web", path=f"hub:{mirror}"), **change), tokenizer, data)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not unfinished(data)


def test_a_dataset_without_text(tokenizer: Tokenizer, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", Loader([" "] * 40))
    monkeypatch.setattr(hub, "_ask_for_commit", lambda wanted: COMMITS[0])
    with pytest.raises(UserError, match="'web' holds no document.*hub:own/name"):
        tokenize_source(WEB, tokenizer, data)


def test_gated_files(tokenizer: Tokenizer, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may ask what a gated dataset is; the refusal comes with its files, in the words of the library."""

    def refuse(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'own/name' is a gated dataset on the Hub. You must be")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(hub, "_ask_for_commit", lambda wanted: COMMITS[0])
    with pytest.raises(UserError, match="gated: accept its terms.*log in"):
        tokenize_source(WEB, tokenizer, data)


PROGRAM = """
import json, sys
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.config.data_schema import Data, Source
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.tools.errors import UserError

encode = lambda texts: [list(text.encode()) for text in texts]
tokenizer = Tokenizer("bytes", 258, 256, 257, "f" * 64, encode, None)
for change in json.loads(sys.argv[2]):
    try:
        corpus = resolve_source(Source(name="web", **change), tokenizer, Data(cache_folder=sys.argv[1]))
        print(json.dumps([corpus.document(i).tolist() for i in range(len(corpus))]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_a_server_that_speaks_as_the_hub_does(tmp_path: Path) -> None:
    """The real libraries, from the name of a dataset to its tokens; they learn the hub's address when imported."""
    files = {"data/train-0.jsonl": lines(TEXTS[:20]), "data/train-1.jsonl": lines(TEXTS[20:]), "README.md": b"# Name\n"}
    changes: list[dict[str, Any]] = [
        {"path": "hub:own/name"},
        {"path": "hub:own/name", "hub_revision": COMMIT, "max_documents": 3},
        {"path": "hub:own/name", "hub_revision": "v9"},
        {"path": "hub:own/name", "hub_split": "dev"},
        {"path": "hub:own/nothing"},
        {"path": "hub:own/gated"},
    ]
    with serve("own/name", files, "own/gated") as (address, requests):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(__file__).parents[4]),
        }
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), json.dumps(changes)]
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    whole, three, *errors = map(json.loads, output.stdout.splitlines())
    assert whole == expected(TEXTS)
    assert three == expected(TEXTS)[:3]
    for error, words in zip(
        errors, (["'v9'"], ["'dev'", "'train'"], ["no dataset 'own/nothing'"], ["gated", "log in"])
    ):
        assert all(word in error for word in words), error
    content = [request for request in requests if request.startswith("GET") and "train-1.jsonl" in request]
    assert len(content) == 1  # the first source's; three documents need the other file alone


def test_the_librarys_newest_does_not_pass_for_the_commit(
    tokenizer: Tokenizer, data: Data, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network load_dataset takes the newest commit that it has, whatever was asked for."""
    other = datasets.Dataset.from_dict({"text": TEXTS})
    folder = tmp_path / COMMITS[1]
    other.save_to_disk(str(folder))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.load_from_disk(str(folder)))
    with pytest.raises(UserError, match=f"another commit than {COMMITS[0]}"):
        tokenize_source(WEB, tokenizer, data)
