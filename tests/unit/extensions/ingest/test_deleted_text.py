"""Text that is gone, wholly or in part; caches and corpora that cannot be written to."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.jsonl").write_text(f'{{"text": "text of {name}", "score": 1}}\n')
    return Source(name="books", path="text")


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(folder=str(tmp_path), cache_folder=str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("torchtitan"), "propagate", True)
    caplog.set_level(logging.INFO, "torchtitan")


@pytest.mark.parametrize("path", ["text", "text/*.jsonl", "text/**", "text/a.jsonl"])
@pytest.mark.parametrize("leave_folder", [True, False])
def test_a_start_goes_on_with_the_corpus_of_deleted_text(
    source: Source,
    tokenizer: Tokenizer,
    data: Data,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    path: str,
    leave_folder: bool,
) -> None:
    source = replace(source, path=path)
    before = resolve_source(source, tokenizer, data)
    shutil.rmtree(tmp_path / "text")
    if leave_folder:
        (tmp_path / "text").mkdir()
        if "**" not in path:  # which would take it
            (tmp_path / "text" / "README.md").write_text("about")
    after = resolve_source(source, tokenizer, data)
    assert (after.folder, after.fingerprint) == (before.folder, before.fingerprint)
    assert f"going on with {before.folder}" in caplog.text and before.fingerprint in caplog.text
    elsewhere = replace(data, folder=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="No file matches"):
        resolve_source(source, tokenizer, elsewhere)
    with pytest.raises(UserError, match="No file matches|There is no .jsonl"):
        resolve_source(source, tokenizer, replace(data, cache_folder=str(tmp_path / "empty")))


def test_other_options_and_several_corpora_are_named(
    source: Source, tokenizer: Tokenizer, data: Data, tmp_path: Path
) -> None:
    first = tokenize_source(source, tokenizer, data, 1)
    (tmp_path / "text" / "c.jsonl").write_text('{"text": "another"}\n{"text": "cut\n')
    skip = replace(source, on_bad_record="skip", max_bad_share=0.5)
    second = tokenize_source(skip, tokenizer, data, 1)
    shutil.rmtree(tmp_path / "text")
    assert tokenize_source(source, tokenizer, data, 1) == first
    with pytest.raises(UserError, match=f"several corpora.*{first}.*{second}.*Set path to the one|{second}.*{first}"):
        tokenize_source(skip, tokenizer, data, 1)
    for other, policy, difference in (
        (source, replace(data, add_eos=False), "add_eos = True"),
        (replace(source, where="score > 0"), data, "where = None"),
        (replace(source, text_field="body"), data, "text_field = 'text'"),
    ):
        with pytest.raises(UserError, match=f"{first} .*{difference}.*Set these back"):
            tokenize_source(other, tokenizer, policy, 1)
    with pytest.raises(UserError, match="tokenizer = 'f"):
        tokenize_source(source, replace(tokenizer, fingerprint="e" * 64), data, 1)
    shutil.rmtree(first)
    with pytest.raises(UserError, match="on_bad_record = 'skip'"):
        tokenize_source(source, tokenizer, data, 1)
    assert tokenize_source(skip, tokenizer, data, 1) == second


def test_a_grouped_corpus_is_not_that_of_its_records(
    source: Source, tokenizer: Tokenizer, data: Data, tmp_path: Path
) -> None:
    grouped = replace(source, group_by="score", part_order="")
    made = tokenize_source(grouped, tokenizer, data, 1)
    shutil.rmtree(tmp_path / "text")
    with pytest.raises(UserError, match=f"{made} .*group_by = 'score'.*Set these back"):
        tokenize_source(source, tokenizer, data, 1)
    assert tokenize_source(grouped, tokenizer, data, 1) == made


def test_part_of_the_text_is_another_source(source: Source, tokenizer: Tokenizer, data: Data, tmp_path: Path) -> None:
    made = resolve_source(source, tokenizer, data)
    gone = tmp_path / "text" / "b.jsonl"
    gone.unlink()
    with pytest.raises(UserError, match=f"1 of the 3 files.*{made.folder}.*{gone}.*another source"):
        resolve_source(source, tokenizer, data)
    less = tokenize_source(source, tokenizer, data, 1)  # as scripts/tokenize_corpus.py does it
    assert resolve_source(source, tokenizer, data).folder == str(less) != made.folder
    # text that is edited is no text that was lost
    (tmp_path / "text" / "a.jsonl").unlink()
    (tmp_path / "text" / "d.jsonl").write_text('{"text": "new"}\n')
    assert resolve_source(source, tokenizer, data).folder not in (str(less), made.folder)


# ---- what cannot be written to ---------------------------------------------------------------------------------------

PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.tools.errors import UserError

tokenizer = Tokenizer("bytes", 258, 256, 257, "f" * 64, lambda texts: [list(text.encode()) for text in texts], None)
folder, phase = Path(sys.argv[1]), sys.argv[2]
text = Source(name="text", path="text")
ids = Source(name="ids", path="ids.bin")
new = Source(name="new", path="text/a.jsonl")
data = Data(folder=str(folder), cache_folder=str(folder / "cache"))

def plan(*sources, steps=2, seed=0):
    data_ = replace(data, sources=sources)
    corpora = [resolve_source(source, tokenizer, data_) for source in sources]
    made = Plan(data_, corpora, seq_len=16, rows_per_step=1, steps=steps, seed=seed, cache=folder / "cache")
    print(made.fingerprint, [made.tokens(made.row(step, 0)).tolist() for step in range(2)])
    return corpora

def refused(*sources, **options):
    try:
        plan(*sources, **options)
    except UserError as error:
        print("refused:", str(error).replace(chr(10), " "))

if phase == "write":
    plan(text, ids)
else:
    try:
        (folder / "cache" / "x").touch()
        sys.exit("it can be written to")
    except OSError:
        pass
    plan(text, ids)
    named = resolve_source(text, tokenizer, data).folder
    resolve_source(Source(name="named", path=named), tokenizer, data)
    resolve_source(Source(name="other ids", path="other.bin"), tokenizer, data)
    refused(new)
    refused(text, seed=1)
"""


def run_read_only(folder: Path, *words: str) -> str:
    """PROGRAM while nothing below the folder can be written, on a real read-only mount if this user may make one."""
    command = [sys.executable, "-c", PROGRAM, str(folder), *words]
    if os.geteuid() != 0:
        for below in [folder, *folder.rglob("*")]:
            below.chmod(0o555 if below.is_dir() else 0o444)
    else:
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, str(folder), *command]
        probe = subprocess.run([*command[:6], "true"], capture_output=True)
        if probe.returncode:
            pytest.skip("root without the right to mount: nothing is read-only to it")
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        if os.geteuid() != 0:
            for below in [folder, *folder.rglob("*")]:
                below.chmod(0o755)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("hashes", [True, False])
def test_a_cache_that_cannot_be_written_to(tmp_path: Path, hashes: bool) -> None:
    folder = tmp_path / "work"
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "a.jsonl").write_text('{"text": "some text of it"}\n' * 5)
    for name in ("ids", "other"):
        (folder / f"{name}.bin").write_bytes(bytes([5, 0, 6, 0, 1, 1] * 9))  # uint16, and 257 ends documents
    written = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), "write"], capture_output=True, text=True, check=True
    ).stdout
    if not hashes:
        for kept in (folder / "cache").glob(".*"):
            kept.unlink()
        shutil.rmtree(folder / "cache" / "token_index")
    lines = run_read_only(folder, "read").splitlines()
    assert lines[0] + "\n" == written
    assert "data.cache_folder" in lines[1] and "does not hold new-" in lines[1] and "'new'" in lines[1]
    assert "data.cache_folder" in lines[2] and "does not hold the plan of this stage" in lines[2]
    assert all(line.startswith("refused: ") for line in lines[1:]) and len(lines) == 3
