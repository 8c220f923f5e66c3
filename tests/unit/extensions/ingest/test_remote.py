"""Sources at URLs: s3fs and fsspec's http against servers on this machine. The witness is a local folder."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import s3fs

from tests.scripts import load_script
from tests.unit.extensions.ingest import hub_server
from tests.unit.extensions.ingest.object_server import Store, serve
from torchtitan.components.changes import changed_since
from torchtitan.config import JobConfig
from torchtitan.config.checks import check_ranges
from torchtitan.config.data_schema import Data, Source
from torchtitan.config.manager import as_tables
from torchtitan.datasets.data_checks import check_sources
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import download, remote
from torchtitan.extensions.ingest.file_systems import list_files, open_file_system
from torchtitan.extensions.ingest.remote import local_path
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.source_files import source_path
from torchtitan.extensions.ingest.stand_in import folders_of
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError

FIXTURES = Path(__file__).parent / "data"
FORK = multiprocessing.get_context("fork")
SECRET = "wJalrXUtnFEMI"
HTTPS = "https://"
ENDED = [10, 11, 257, *range(200), 257, 5, 6, 7, 8, 257]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No test waits, reads this user's credentials, or depends on what others have done to the log."""
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    settings = {
        "ACCESS_KEY_ID": "user",
        "SECRET_ACCESS_KEY": SECRET,
        "DEFAULT_REGION": "us-east-1",
        "MAX_ATTEMPTS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(logging.getLogger("torchtitan"), "propagate", True)
    caplog.set_level(logging.INFO, "torchtitan")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with serve(Store()) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
        yield store


@pytest.fixture
def cache(data: Data) -> Path:
    return Path(data.cache_folder).absolute()


def upload(store: Store, folder: Path, place: str) -> None:
    store.files |= {f"{place}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_lines(path: Path, texts: list[str]) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def contents(path: str) -> dict[str, bytes]:
    """The files of a local copy by their names in it."""
    return {str(p.relative_to(path)): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def asked(store: Store, method: str = "GET") -> list[str]:
    """The requests of a method since the last call."""
    requests = [request.removeprefix(f"{method} ") for request in store.requests if request.startswith(method)]
    store.requests.clear()
    return requests


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """A folder of each kind of data that can be a source."""
    root = tmp_path / "everything"
    for number in range(4):
        write_lines(
            root / "text" / ("b/c" if number % 2 else "a") / f"part {number}+é.jsonl", [f"text {number}", "more"]
        )
    write_lines(root / "text" / ".hidden" / "x.jsonl", ["hidden"])
    (root / "text" / "README.md").write_text("about")
    write_lines(root / "packed" / "x.jsonl.gz", ["packed"] * 5)
    (root / "plain").mkdir()
    for name in ("b.txt", "a.txt", ".c.txt", "d.md", "e[1].txt"):
        (root / "plain" / name).write_text(f"this is {name}")
    for number in range(2):
        (root / "parquet").mkdir(exist_ok=True)
        pa.parquet.write_table(pa.table({"text": [f"row {number}"] * 3}), root / "parquet" / f"{number}.parquet")
    (root / "ids").mkdir()
    np.array(ENDED, np.uint16).tofile(root / "ids" / "train.bin")
    np.array(ENDED, np.uint16).tofile(root / "ids" / "part-0.npy")
    (root / "ids" / "part-0.csv.gz").write_bytes(gzip.compress(b"0,3,a,b,0\n3,204,a,b,1\n204,209,a,b,2\n", mtime=0))
    np.save(root / "ids" / "saved.npy", np.array(ENDED, np.int64))
    for suffix in ("bin", "idx"):
        shutil.copy(FIXTURES / f"megatron_uint16.{suffix}", root / "ids")
    shutil.copytree(FIXTURES / "mds_packed", root / "mds")
    shutil.copytree(FIXTURES / "mds_zstd", root / "mds_zstd")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"input_ids": [[256, 5, 6, 257], [256, 7, 257]]}).save_to_disk(str(root / "saved"))
    return root


def resolved(source: Source, tokenizer: Tokenizer, data: Data) -> tuple[str, list[list[int]], list[int]]:
    corpus = resolve_source(source, tokenizer, data)
    return corpus.fingerprint, [corpus.document(i).tolist() for i in range(len(corpus))], corpus.lengths.tolist()


PATHS = (
    "text text/ text/a text/**/*.jsonl text/*/part*2* packed packed/x.jsonl.gz plain plain/*.txt plain/a.txt"
    " plain/e[1].txt plain/[ab].txt plain/?.txt plain/.*.txt plain/**/*.md parquet parquet/0.parquet ids/train.bin"
    " ids/part-*.npy ids/part-0.npy ids/saved.npy ids/megatron_uint16 ids/megatron_uint16.idx ids/meg*.bin"
    " mds mds/part-1 mds_zstd saved"
)


def test_what_lies_on_a_server_is_what_lies_in_a_folder(
    everything: Path,
    tmp_path: Path,
    store: Store,
    tokenizer: Tokenizer,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same documents in the same order, under the same fingerprint, for every kind of path."""
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 600.0)
    tokenizer = replace(tokenizer, vocab_size=1000)  # those of the MDS shards
    upload(store, everything, "bucket/deep/down")
    store.files |= {"bucket/deep/down/text/": b"", "bucket/deep/down/text/a/": b""}  # consoles make such folders
    there = replace(data, cache_folder=str(tmp_path / "other"))
    for number, path in enumerate(PATHS.split()):
        name = f"s{number}"
        local = resolved(Source(name=name, path=str(everything / path)), tokenizer, data)
        assert local[1], path
        assert resolved(Source(name=name, path=f"s3://bucket/deep/down/{path}"), tokenizer, there) == local, path
        below = replace(there, folder="s3://bucket/deep")
        assert resolved(Source(name=name, path=f"./down/{path}"), tokenizer, below) == local, path
        made = [sorted(p.parent.name for p in Path(d.cache_folder).glob("s*/corpus.json")) for d in (data, there)]
        assert made[0] == made[1]  # NAME-KEY


def test_every_error_of_a_local_folder_is_one_of_a_url(
    everything: Path, tmp_path: Path, store: Store, tokenizer: Tokenizer, data: Data
) -> None:
    np.array(ENDED, np.uint16).tofile(everything / "ids" / "labels_mask_0.npy")
    write_lines(everything / "splits" / "train.jsonl", ["a"])
    write_lines(everything / "splits" / "test.jsonl", ["b"])
    write_lines(everything / "twice" / "a.jsonl", ["a"])
    write_lines(everything / "twice" / "a.jsonl.gz", ["a"])
    (everything / "gone").mkdir()
    shutil.copy(FIXTURES / "megatron_uint16.idx", everything / "gone" / "m.idx")
    upload(store, everything, "bucket")
    for path in (
        "ids/train.bin",
        "ids/part-*.npy",
        "ids",
        "splits",
        "twice/*",
        "gone",
        "gone/m.idx",
        "text/a/none",
        "plain/*",
    ):
        with pytest.raises(UserError) as local:
            resolve_source(Source(name="s", path=str(everything / path)), tokenizer, data)
        with pytest.raises(UserError) as far:
            resolve_source(Source(name="s", path=f"s3://bucket/{path}"), tokenizer, data)
        if path.startswith("ids/"):
            assert not any("labels_mask" in request for request in asked(store))  # refused by its name
        if "none" not in path:
            beginning = [str(e.value).split(": ")[-1][:30] for e in (local, far)]
            assert beginning[0] == beginning[1], (str(local.value), str(far.value))


def test_more_files_than_a_page_of_the_list(store: Store, cache: Path) -> None:
    files = {f"{'x/' * (n % 3)}{n:04d}.txt": b"%d" % n for n in range(2100)}
    store.files = {f"bucket/all/{name}": content for name, content in files.items()}
    assert {file.name for file in list_files(open_file_system("s3://bucket"), "s3://bucket/all")[0]} == set(files)
    assert len(asked(store, "LIST")) >= 3
    few = local_path("s3://bucket/all/**/*77.txt", cache)
    wanted = {name: content for name, content in files.items() if name.endswith("77.txt")}
    assert contents(few.removesuffix("/**/*77.txt")) == wanted and len(wanted) == 21


def test_a_second_start_fetches_nothing_and_a_changed_file_alone(
    store: Store, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.files = {f"bucket/x/{name}.txt": name.encode() * 9 for name in "abcd"}
    first = local_path("s3://bucket/x", cache)
    assert len(asked(store)) == 4
    assert local_path("s3://bucket/x", cache) == first and not asked(store)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    del store.files["bucket/x/d.txt"]
    store.files |= {"bucket/x/b.txt": b"B" * 9, "bucket/x/e.txt": b"e"}
    second = local_path("s3://bucket/x", cache)
    assert sorted(asked(store)) == ["bucket/x/b.txt bytes=0-8", "bucket/x/e.txt bytes=0-0"]
    assert contents(second) == {"a.txt": b"a" * 9, "b.txt": b"B" * 9, "c.txt": b"c" * 9, "e.txt": b"e"}
    assert contents(first)["b.txt"] == b"b" * 9  # a run that reads the old state goes on with it
    assert "1 changed (such as b.txt), 1 new (such as e.txt), 1 gone (such as d.txt)" in caplog.text


def test_without_the_server_all_files_or_none(store: Store, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.files = {f"bucket/x/{name}.txt": name.encode() for name in "ab"}
    first = local_path("s3://bucket/x", cache)
    for status in (503, 403):
        store.refuse = lambda request, status=status: status
        caplog.clear()
        assert local_path("s3://bucket/x", cache) == first
        assert "going on with the 2 files" in caplog.text
    with pytest.raises(UserError, match="s3://bucket/y cannot be read.*credentials.*AWS_ACCESS_KEY_ID"):
        local_path("s3://bucket/y", cache)
    (Path(first) / "a.txt").resolve().unlink()
    with pytest.raises(UserError, match="s3://bucket/x cannot be read"):
        local_path("s3://bucket/x", cache)
    store.refuse = lambda request: 0
    assert local_path("s3://bucket/x", cache) == first and contents(first) == {"a.txt": b"a", "b.txt": b"b"}
    store.files.clear()
    with pytest.raises(UserError, match="does not exist, or is empty"):  # an answer, unlike silence
        local_path("s3://bucket/x", cache)


def test_a_cache_that_cannot_be_written_to(store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.files = {"bucket/x/a.txt": b"a"}
    first = local_path("s3://bucket/x", cache)
    store.files["bucket/x/b.txt"] = b"b"
    monkeypatch.setattr(remote, "is_writable", lambda folder: False)
    assert local_path("s3://bucket/x", cache) == first

    def refuse(key: str, folder: Path) -> None:
        raise UserError(f"{key} = {folder} cannot be written to")

    monkeypatch.setattr(remote, "make_writable", refuse)
    with pytest.raises(UserError, match="data.cache_folder .* cannot be written to"):
        local_path("s3://bucket/y", cache)


def test_a_server_that_is_down(
    store: Store, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.files = {"bucket/x/a.txt": b"a", "bucket/x/a.jsonl": b"{}"}
    urls = ["s3://bucket/x", f"{store.address}/bucket/x/a.txt"]
    paths = [local_path(url, cache) for url in urls]
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the port "discard", where nobody listens
    assert local_path(urls[0], cache) == paths[0]
    with pytest.raises(UserError, match="Start again when the server can be reached"):
        local_path("s3://bucket/other", cache)
    with pytest.raises(UserError, match="http://127.0.0.1:9/a.txt cannot be read: ConnectionRefused"):
        local_path("http://127.0.0.1:9/a.txt", cache)


def test_an_answer_of_the_server_holds_for_the_ranks_of_a_job(
    store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 60.0)
    store.files = {f"bucket/x/{n}.txt": b"x" * n for n in range(40)}
    jobs = [FORK.Process(target=local_path, args=("s3://bucket/x", cache)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert len([r for r in store.requests if r.startswith("GET")]) == 39  # the empty one needs no request
    assert len([r for r in store.requests if r.startswith("LIST")]) <= 2


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_download_that_was_killed_goes_on_at_its_byte(
    store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    content = np.random.default_rng(0).bytes(1_000_000)
    store.files = {"bucket/x.bin": content}
    monkeypatch.setattr(download, "CHUNK", 100_000)
    url = "s3://bucket/x.bin" if kind == "s3" else f"{store.address}/bucket/x.bin"
    sent, blocks = 0, download._blocks

    def killed(*arguments: Any) -> Iterator[bytes]:
        nonlocal sent
        for block in blocks(*arguments):
            for at in range(0, len(block), 50_000):
                arguments[-1].flush()
                if sent >= 300_000:
                    os.kill(os.getpid(), signal.SIGKILL)
                piece = block[at : at + 50_000]
                sent += len(piece)
                yield piece

    with monkeypatch.context() as patch:
        patch.setattr(download, "_blocks", killed)
        job = FORK.Process(target=local_path, args=(url, cache))
        job.start()
        job.join(60)
    assert job.exitcode == -signal.SIGKILL
    (partial,) = (cache / "remote" / "files").iterdir()
    have = partial.stat().st_size
    assert 300_000 <= have < 350_000 and partial.read_bytes() == content[:have]
    store.requests.clear()
    assert Path(local_path(url, cache)).read_bytes() == content
    starts = [int(request.partition("bytes=")[2].partition("-")[0]) for request in asked(store) if "x.bin" in request]
    assert min(starts) == have
    assert [path.suffix for path in (cache / "remote" / "files").iterdir()] == [""]


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_an_answer_that_is_cut_short_is_continued(
    store: Store, cache: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).bytes(500_000)
    store.files = {"bucket/x.bin": content}
    url = "s3://bucket/x.bin" if kind == "s3" else f"{store.address}/bucket/x.bin"
    cuts = iter([100_000, 7])
    store.cut = lambda request: next(cuts, None)
    assert Path(local_path(url, cache)).read_bytes() == content
    assert caplog.text.count("going on at byte") == 2
    store.files["bucket/x.bin"] = content[::-1]
    store.cut = lambda request: 0
    with pytest.raises(UserError, match="x.bin could not be fetched"):
        local_path(url, cache)
    store.cut = lambda request: None
    assert Path(local_path(url, cache)).read_bytes() == content[::-1]


def test_one_file_that_cannot_be_had_ends_it_and_the_others_are_kept(store: Store, cache: Path) -> None:
    store.files = {f"bucket/x/{n}.txt": b"%d" % n for n in range(20)}
    for status, words in ((404, "Correct the path"), (403, "Give this user the right"), (500, "Start again")):
        store.refuse = lambda request, status=status: status if request.startswith("GET bucket/x/7.txt") else 0
        with pytest.raises(UserError, match=f"bucket/x/7.txt could not be fetched.*{words}"):
            local_path("s3://bucket/x", cache)
    store.refuse = lambda request: 0
    store.requests.clear()
    assert len(contents(local_path("s3://bucket/x", cache))) == 20
    assert len(asked(store)) < 20


def test_checksums(
    store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S3's ETag is the MD5 of a file, unless the store encrypts: then the same bytes come again."""
    store.files = {"bucket/x/a.txt": b"good", "bucket/x/b.txt": b"fine"}
    blocks, damage = download._blocks, [1]

    def damaged(*arguments: Any) -> Iterator[bytes]:
        for block in blocks(*arguments):
            damage[0] += 1
            yield block.replace(b"good", b"%4d" % damage[0]) if damage[0] < 3 else block

    with monkeypatch.context() as patch:
        patch.setattr(download, "_blocks", damaged)
        patch.setattr(download, "AT_ONCE", 1)
        assert contents(local_path("s3://bucket/x", cache)) == {"a.txt": b"good", "b.txt": b"fine"}
        damage[0] = -1000  # other bytes every time
        store.files["bucket/y/a.txt"] = b"good"
        with pytest.raises(UserError, match="arrived damaged twice"):
            local_path("s3://bucket/y", cache)
    store.etag = lambda content: hashlib.md5(b"encrypted" + content).hexdigest()
    store.files = {f"bucket/z/{n}.txt": b"%d" % n for n in range(9)}
    store.requests.clear()
    assert len(contents(local_path("s3://bucket/z", cache))) == 9
    assert "no MD5 sums" in caplog.text
    store.etag = lambda content: hashlib.md5(content).hexdigest() + "-2"  # of a file that was uploaded in parts
    assert contents(local_path("s3://bucket/z", cache))["3.txt"] == b"3"


def test_a_file_that_changes_while_it_is_fetched(store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.files = {"bucket/a.txt": b"old" * 100}
    blocks = download._blocks

    def changed(*arguments: Any) -> Iterator[bytes]:
        for block in blocks(*arguments):
            yield block
            store.files["bucket/a.txt"] = b"new" * 100

    with monkeypatch.context() as patch:
        patch.setattr(download, "_blocks", changed)
        with pytest.raises(UserError, match="was changed on the server while it was fetched"):
            local_path(f"{store.address}/bucket/a.txt", cache)
    assert Path(local_path(f"{store.address}/bucket/a.txt", cache)).read_bytes() == b"new" * 100


def test_a_disk_without_room(store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.files = {"bucket/a.txt": b"a" * 2_000_000}
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        with pytest.raises(UserError, match=r"needs 0.00 GB more in .*/remote/files.*larger disk"):
            local_path("s3://bucket/a.txt", cache)
    assert not asked(store)


@pytest.mark.parametrize("key", ["../up.txt", "a//b.txt", "a/./b.txt", "n" * 300 + ".txt", "a.txt/b.txt"])
def test_keys_that_are_no_paths(store: Store, cache: Path, key: str) -> None:
    store.files = {"bucket/x/a.txt": b"a", f"bucket/x/{key}": b"b"}
    with pytest.raises(UserError, match="cannot be a file of a local folder"):
        local_path("s3://bucket/x", cache)
    assert not (cache / "up.txt").exists()


def test_http_files(store: Store, cache: Path, tokenizer: Tokenizer, data: Data, everything: Path) -> None:
    upload(store, everything, "web")
    for path in (
        "text/a/part 0+é.jsonl",
        "packed/x.jsonl.gz",
        "parquet/0.parquet",
        "ids/part-0.npy",
        "ids/megatron_uint16.bin",
    ):
        address = f"{store.address}/web/{path}".replace(" ", "%20").replace("é", "%C3%A9")
        near = resolved(Source(name="s", path=str(everything / path)), tokenizer, data)
        assert resolved(Source(name="s", path=address), tokenizer, data) == near
        assert resolved(Source(name="s", path=f"{address}?download=true"), tokenizer, data) == near
    store.refuse = lambda request: 403 if "parquet" in request else 0
    with pytest.raises(UserError, match="no credentials|right to read it.*netrc"):
        local_path(f"{store.address}/web/parquet/1.parquet", cache)
    with pytest.raises(UserError, match="404.*Correct the path"):
        local_path(f"{store.address}/web/none.txt", cache)


def test_a_plain_web_server_sends_no_parts(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Python's http.server ignores Range: a file that was begun is fetched from its beginning. No folder is listed."""
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "web" / "x").mkdir(parents=True)
    (tmp_path / "web" / "x" / "a.txt").write_bytes(content)

    class Plain(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send_head(self) -> Any:
            if not self.path.startswith("/to/"):
                return super().send_head()
            self.send_response(302)  # to a signed address
            self.send_header("Location", f"{self.path[3:]}?X-Amz-Signature={SECRET}")
            self.end_headers()
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Plain, directory=str(tmp_path / "web"))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert Path(local_path(f"{address}/x/a.txt", cache)).read_bytes() == content
        (file,) = (cache / "remote" / "files").iterdir()
        file.rename(file.with_name(f"{file.name}.partial"))
        os.truncate(f"{file}.partial", 1_000_000)
        assert Path(local_path(f"{address}/x/a.txt", cache)).read_bytes() == content
        assert Path(local_path(f"{address}/to/x/a.txt", cache)).read_bytes() == content
        with pytest.raises(UserError, match="404") as error:
            local_path(f"{address}/to/x/none.txt", cache)
        with pytest.raises(UserError, match="is a web page"):
            local_path(f"{address}/x", cache)
        server.shutdown()
        thread.join()
    assert SECRET not in caplog.text and SECRET not in str(error.value)
    assert not any(SECRET in path.read_text() for path in (cache / "remote").glob(".*.json"))


def test_a_hub_repository_by_its_files(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, data: Data
) -> None:
    write_lines(tmp_path / "repo" / "data" / "a.jsonl", ["a", "b"])
    write_lines(tmp_path / "repo" / "data" / "b.jsonl.gz", ["c"])
    files = {f"data/{p.name}": p.read_bytes() for p in (tmp_path / "repo" / "data").iterdir()}
    near = resolved(Source(name="s", path=str(tmp_path / "repo" / "data")), tokenizer, data)
    with hub_server.serve("own/name", files, "own/gated") as (address, requests):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for path in ("hf://datasets/own/name/data", "hf://datasets/own/name/data/*.jsonl*"):
            assert resolved(Source(name="s", path=path), tokenizer, data) == near
        with pytest.raises(UserError, match="hf://datasets/own/gated.*HF_TOKEN"):
            local_path("hf://datasets/own/gated/data", cache)
        with pytest.raises(UserError, match="hf://datasets/own/none"):
            local_path("hf://datasets/own/none/data", cache)


# ---- what is refused before anything is asked ------------------------------------------------------------------------


REFUSED = {
    f"{HTTPS}user:{SECRET}@example.org/a.jsonl": "user or password.*netrc",
    f"{HTTPS}{SECRET}@example.org/a.jsonl": "user or password",
    f"{HTTPS}user:{SECRET}/b@example.org/a.jsonl": "user or password",
    f"s3://key:{SECRET}@bucket/a": "user or password.*AWS_ACCESS_KEY_ID",
    f"https://example.org/a.jsonl?X-Amz-Signature={SECRET}": "parameter X-Amz-Signature",
    f"https://example.org/a.jsonl?download=1&sig={SECRET}": "parameter sig",
    f"s3://bucket/a.jsonl?X-Amz-Signature={SECRET}": "parameter X-Amz-Signature",
    f"https://example.org/a.jsonl?download={SECRET * 9}": "parameter download",
    "https://example.org/a/*.jsonl": "single file",
    "https://example.org/a/": "single file",
    "https://example.org": "single file",
    "https://example.org/a.jsonl#part": "single file",
    "zip://a.jsonl::s3://bucket/a.zip": "chain",
    "file:///data/a.jsonl": "write the path, /data/a.jsonl",
    "s3://": "names no folder",
    "s3://bucket/../other": "names no folder",
    "s3:/bucket/a": "write s3://",
    "s3:bucket": "write s3://",
}


@pytest.mark.parametrize("url", REFUSED, ids=lambda url: url.replace(SECRET, "SECRET")[:40])
def test_a_url_that_is_refused_does_not_tell_its_secret(url: str, tokenizer: Tokenizer, data: Data) -> None:
    source = Source(name="books", path=url)
    with pytest.raises(UserError, match=f"(?s){REFUSED[url]}") as error:
        check_sources(replace(data, sources=(source,)))
    assert SECRET not in str(error.value)
    with pytest.raises(UserError) as error:
        resolve_source(source, tokenizer, data)
    assert SECRET not in str(error.value)
    if "://" in url and "single" not in REFUSED[url] and "write" not in REFUSED[url]:
        with pytest.raises(UserError) as error:
            check_sources(replace(data, folder=url, sources=(Source(name="books", path="a.jsonl"),)))
        assert SECRET not in str(error.value)


def test_urls_that_are_taken(data: Data) -> None:
    urls = [
        "s3://b/part-?.jsonl",
        "S3://b/x",
        "hf://datasets/own/name@main/data",
        "gs://b",
        "abfs://box@account.example.org/x",
    ]
    urls += ["https://example.org:8080/a/b.jsonl?download=true&raw=1", "https://[::1]:80/a.jsonl"]
    check_sources(replace(data, sources=tuple(Source(name=url, path=url) for url in urls)))
    for path, words in (("hub:./a", "relative to data.folder"), ("~/a", ""), ("/a", ""), ("hub:own/name", "")):
        with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
            check_sources(replace(data, folder="s3://bucket/x", sources=(Source(name="s", path=path),)))


def test_other_paths_that_are_urls_are_refused(data: Data) -> None:
    config = JobConfig()
    for table, key in (("model", "hf_assets_path"), ("job", "dump_folder"), ("checkpoint", "initial_load_path")):
        changed = replace(config, **{table: replace(getattr(config, table), **{key: f"s3://b/x?sig={SECRET}"})})
        with pytest.raises(UserError, match=f"{table}.{key} is a URL") as error:
            check_ranges(changed)
        assert SECRET not in str(error.value)
    for folder, texts in (("s3://bucket", ("a.txt",)), (".", ("s3://bucket/a.txt",))):
        changed = replace(config, data=Data(folder=folder), evaluation=replace(config.evaluation, texts=texts))
        with pytest.raises(UserError, match="evaluation.texts is a URL .s3://bucket/a.txt"):
            check_ranges(changed)
    with pytest.raises(UserError, match="data.cache_folder is a URL"):
        check_sources(Data(cache_folder="s3://bucket/cache"))
    with pytest.raises(UserError, match="s3://bucket/a.* cannot be read here"):
        source_path(Source(name="s", path="s3://bucket/a"), data)
    with pytest.raises(UserError, match="s3://bucket/a.* names no folder"):
        folders_of(replace(config, data=replace(data, sources=(Source(name="s", path="s3://bucket/a"),))))
    with pytest.raises(UserError, match="names no folder.*--data.sources.0.path"):
        folders_of(replace(config, data=replace(data, folder="s3://b", sources=(Source(name="s", path="a"),))))


def test_a_chain_compares_urls_as_they_are() -> None:
    def of(path: str, folder: str = ".") -> JobConfig:
        return JobConfig(data=Data(folder=folder, sources=(Source(name="s", path=path),)))

    manifest = {"config": as_tables(of("s3://bucket/a"))}
    assert changed_since(manifest, of("./a", "s3://bucket/")) == []
    assert "s3://bucket/a" in changed_since(manifest, of("s3://bucket/b"))[0]
    assert changed_since(manifest, of("s3:/bucket/a"))


def test_a_library_that_is_missing_and_a_protocol_that_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(protocol: str) -> Any:
        raise ImportError("Install it")

    with pytest.raises(UserError, match="zz:// is no protocol"):
        local_path("zz://bucket/a", cache)
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match="pip install gcsfs.*remote"):
        local_path("gs://bucket/a", cache)


def test_credentials_of_the_environment(store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    store.files = {"bucket/a.txt": b"a"}
    seen: list[str] = []
    store.refuse = lambda request: 0 if seen.append(store.authorization) else 0
    local_path("s3://bucket/a.txt", cache)
    assert all("Credential=user/" in value for value in seen)
    seen.clear()
    monkeypatch.setitem(fsspec.config.conf, "https", {"headers": {"Authorization": f"Bearer {SECRET}"}})
    local_path(f"{store.address}/bucket/a.txt", cache)
    assert set(seen) == {f"Bearer {SECRET}"}
    assert not any(SECRET.encode() in p.read_bytes() for p in cache.rglob("*") if p.is_file())


def test_files_may_be_deleted_once_the_corpus_is_made(
    store: Store, tokenizer: Tokenizer, data: Data, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.files = {f"bucket/x/{name}.jsonl": b'{"text": "%s", "body": "b"}' % name.encode() for name in "abc"}
    source = Source(name="s", path="x/*.jsonl")
    there = replace(data, folder="s3://bucket")
    first = resolved(source, tokenizer, there)
    (folder,) = cache.glob("s-*")
    assert json.loads((folder / "corpus.json").read_text())["path"] == "s3://bucket/x/*.jsonl"

    def delete() -> None:
        shutil.rmtree(cache / "remote")
        store.requests.clear()

    delete()
    assert resolved(source, tokenizer, there) == first
    assert tokenize_source(source, tokenizer, there) == folder
    assert not asked(store) and "nothing is fetched" in caplog.text
    store.refuse = lambda request: 503
    assert resolved(source, tokenizer, there) == first  # the list of files was kept
    store.refuse = lambda request: 0
    others: list[tuple[Source, Tokenizer, Data]] = [
        (replace(source, text_field="body"), tokenizer, there),
        (replace(source, where="text == 'a'"), tokenizer, there),
        (source, replace(tokenizer, fingerprint="e" * 64), there),
        (source, tokenizer, replace(there, add_eos=False)),
    ]
    for other in others:  # other documents of the same files
        delete()
        assert resolved(*other)[1] != first[1] or other[1] != tokenizer
        assert len(asked(store)) == 3
    delete()
    store.files["bucket/x/b.jsonl"] = b'{"text": "another"}'
    assert resolved(source, tokenizer, there)[1] == [[256, *text, 257] for text in (b"a", b"another", b"c")]
    assert len(asked(store)) == 3
    assert len(list(cache.glob("s-*"))) == 6


def test_the_script_takes_a_url(
    store: Store, everything: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(store, everything, "bucket")
    script = load_script("tokenize_corpus")

    def run(path: str) -> str:
        words = ["tokenize_corpus.py", "--path", path, "--cache-folder", str(cache), "--no-bos", "--no-eos"]
        monkeypatch.setattr(sys, "argv", words)
        with contextlib.suppress(SystemExit):
            script.main()
        return capsys.readouterr().out

    assert "text: 8 documents" in run("s3://bucket/text")
    shutil.rmtree(cache / "remote")
    assert "s3://bucket/text is tokenized already, in" in run("s3://bucket/text")
    assert "s3://bucket/saved is read in place: 2 documents" in run("s3://bucket/saved")
    assert "s3://bucket/ids/megatron_uint16 is read in place: 4 documents" in run("s3://bucket/ids/megatron_uint16")
