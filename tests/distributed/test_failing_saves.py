"""A save that fails: tried again, survived or not by policy, and the last good checkpoint stays.

Failures of one of two ranks are put in by hand; a full disk and a read-only one are real: a small tmpfs, mounted in a
mount namespace of its own, which needs root on Linux.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from tests.distributed.harness import flags, spawn, write_assets
from tests.distributed.test_health import Messages
from torchtitan.components import checkpoint as checkpoint_module
from torchtitan.components.checkpoint import load
from torchtitan.components.manifest import complete_steps, find_damage
from torchtitan.config import load_config
from torchtitan.extensions.wiring import build_trainer
from torchtitan.tools.errors import UserError

ROOT = Path(__file__).parents[2]
SAVING = {
    "checkpoint__enable": True,
    "checkpoint__interval": 1,
    "checkpoint__retry_seconds": 0.01,
    "checkpoint__save_retries": 2,
    "training__local_batch_size": 4,
}


def run(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """A stage in which rank 1's writes fail; what became of it, and what there was after every step.

    case: args; fails (step -> how many attempts of its save fail, on rank 1), published (steps whose save fails once
    on rank 0 after the rename), actions (step -> what is done before it), pause (seconds a step lasts longer).
    """
    messages = Messages()
    logging.getLogger("torchtitan").addHandler(messages)
    write, sync = FileSystemWriter.write_data, checkpoint_module.sync
    left = dict(case.get("fails", {}))
    published = list(case.get("published", ()))

    def write_data(self: Any, plan: Any, planner: Any) -> Any:
        done = write(self, plan, planner)  # a disk fails when most has been written
        step = self.manifest["step"]
        if rank == world_size - 1 and left.get(step, 0) > 0:
            left[step] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return done

    def failing_sync(path: Path) -> None:
        steps = complete_steps(path)
        if published and steps and steps[-1] == published[0]:
            raise OSError(errno.EIO, f"Input/output error {published.pop(0)}")
        sync(path)

    FileSystemWriter.write_data, checkpoint_module.sync = write_data, failing_sync
    config = load_config(case["args"])
    folder = Path(config.job.dump_folder) / "checkpoint"
    trainer = build_trainer(config, rank, rank, world_size)
    step, after, error = trainer.train_step, {}, ""

    def recorded() -> Any:
        after[trainer.step] = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        for action in case.get("actions", {}).get(trainer.step + 1, ()):
            subprocess.run(action, check=True)
        time.sleep(case.get("pause", 0.0))
        return step()

    trainer.train_step = recorded  # type: ignore[method-assign]
    try:
        trainer.train()
    except UserError as e:
        error = str(e)
    finally:
        trainer.close()
        FileSystemWriter.write_data, checkpoint_module.sync = write, sync
        logging.getLogger("torchtitan").removeHandler(messages)
    steps = complete_steps(folder)
    damage = [find_damage(folder / f"step-{step}") for step in steps]
    loads = bool(steps) and loads_whole(folder / f"step-{steps[-1]}")
    return {
        "error": error,
        "log": messages.lines,
        "step": trainer.step,
        "after": after,
        "steps": steps,
        "damage": damage,
        "loads": loads,
        "left": sorted(p.name for p in folder.iterdir() if not p.name.startswith("step-") or p.suffix),
    }


def loads_whole(path: Path) -> bool:
    """Whether the tensors of a checkpoint can be read, by this process alone."""
    from torch.distributed.checkpoint import FileSystemReader

    saved = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    name = next(key for key in saved if key.startswith("model."))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    target = {"model": {name.removeprefix("model."): torch.full(saved[name].size, float("nan"))}}
    load(path, target, dist.group.WORLD)
    dist.destroy_process_group()
    return bool(torch.isfinite(next(iter(target["model"].values()))).all())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failing")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    assets = write_assets(folder, "tied")

    def args(name: str, **options: Any) -> list[str]:
        return flags(folder, assets, **SAVING, **options, job__dump_folder=folder / name)

    cases: dict[str, dict[str, Any]] = {}
    for mode in ("disabled", "async"):
        options: dict[str, Any] = {"checkpoint__async_mode": mode}
        go_on = options | {"checkpoint__on_failed_save": "go_on", "checkpoint__keep_latest_k": 1}
        cases |= {
            f"again {mode}": {
                "args": args(f"again-{mode}", **options),
                "fails": {1: 1, 2: 2, 4: 1},
                "published": (3,),
            },
            f"go on {mode}": {"args": args(f"go-on-{mode}", **go_on), "fails": {2: 9, 3: 9}},
            f"last {mode}": {"args": args(f"last-{mode}", **go_on), "fails": {4: 9}},
            f"stop {mode}": {"args": args(f"stop-{mode}", **options), "fails": {2: 9}},
        }
    # nothing is saved for a long time after the one that fails in the background
    early = {"checkpoint__async_mode": "async", "training__steps": 60}
    cases["early"] = {"args": [*args("early", **early), "--checkpoint.interval", "30"], "fails": {30: 9}, "pause": 0.02}
    return dict(zip(cases, spawn(2, run, list(cases.values()), folder), strict=True))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_write_that_fails_is_tried_again(mode: str, runs: dict[str, dict[str, Any]]):
    again = runs[f"again {mode}"]
    assert again["error"] == "" and again["steps"] == [1, 2, 3, 4]
    assert again["damage"] == [None] * 4 and again["left"] == [] and again["loads"]
    # rank 0's: the others' warnings are their own
    assert any("step-3 failed" in line and "attempt 1 of 3" in line for line in again["log"])


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_run_goes_on_and_the_last_good_checkpoint_stays(mode: str, runs: dict[str, dict[str, Any]]):
    """keep_latest_k = 1 deletes the one before only once there is another."""
    go_on = runs[f"go on {mode}"]
    assert go_on["error"] == "" and go_on["step"] == 4 and go_on["steps"] == [4] and go_on["damage"] == [None]
    assert "step-1" in go_on["after"][2] and "step-1" in go_on["after"][3]
    assert sum("Training goes on (checkpoint.on_failed_save)" in line for line in go_on["log"]) == 2
    assert go_on["left"] == [] and go_on["loads"]
    # but a run that could not save its end has not ended well
    last = runs[f"last {mode}"]
    assert "could not be written" in last["error"] and "Input/output error" in last["error"]
    assert last["step"] == 4 and last["steps"] == [3] and last["damage"] == [None]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_run_stops_with_the_last_good_checkpoint(mode: str, runs: dict[str, dict[str, Any]]):
    stop = runs[f"stop {mode}"]
    assert "Input/output error" in stop["error"] and stop["steps"] == [1] and stop["damage"] == [None]
    assert stop["step"] < 4 and stop["left"] == [] and stop["loads"]


def test_a_save_that_fails_in_the_background_stops_the_run_before_the_next_is_due(runs: dict[str, dict[str, Any]]):
    early = runs["early"]
    assert "Input/output error" in early["error"] and 30 <= early["step"] < 60 and early["steps"] == []


# ---- real file systems -----------------------------------------------------------------------------------------------

TMPFS_MIB = 10  # a checkpoint of the tiny model is 4 MiB


def on_tmpfs(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """In a mount namespace of this process's own: each case with a tmpfs at case["mount"]."""
    results = {}
    for name, case in cases.items():
        mount = Path(case["mount"])
        mount.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", str(mount)], check=True)
        checkpoint_module.OVERHEAD = case.get("room", checkpoint_module.OVERHEAD)
        if "ballast" in case:
            (mount / "ballast").write_bytes(bytes(case["ballast"] << 20))
        case["actions"] = {int(step): actions for step, actions in case.get("actions", {}).items()}
        results[name] = run(case, 0, 1)
        checkpoint_module.OVERHEAD = 1.02
        metrics = Path(case["args"][case["args"].index("--job.dump_folder") + 1]) / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        results[name]["logged"] = [line["step"] for line in lines]
    return results


def why_no_mounts() -> str:
    """Why a tmpfs cannot be mounted in a namespace here; empty if it can."""
    if not sys.platform.startswith("linux") or not shutil.which("unshare"):
        return "needs Linux and util-linux's unshare"
    with_mount = "mkdir -p $1/try && mount -t tmpfs -o size=1m tmpfs $1/try"
    tried = subprocess.run(
        ["unshare", "-m", "sh", "-c", with_mount, "sh", os.environ.get("TMPDIR", "/tmp")], capture_output=True
    )
    return "" if tried.returncode == 0 else f"needs root: {tried.stderr.decode().strip()}"


@pytest.fixture(scope="module")
def on_disk(folder: Path) -> dict[str, Any]:
    if why := why_no_mounts():
        pytest.skip(why)
    top = folder / "tmpfs"
    top.mkdir()
    assets = write_assets(top, "tied")

    def case(name: str, on_whole_dump: bool = True, **options: Any) -> dict[str, Any]:
        out = top / name
        args = flags(top, assets, **SAVING, checkpoint__keep_latest_k=0, **options, job__dump_folder=out)
        return {"args": args, "mount": str(out if on_whole_dump else out / "checkpoint")}

    go_on = {"checkpoint__on_failed_save": "go_on"}
    background = {"checkpoint__async_mode": "async"}
    read_only = case("read-only", on_whole_dump=False, **go_on)
    mount = read_only["mount"]
    cases = {
        "no room": case("no-room"),
        "full": case("full") | {"room": 0},
        "full in the background": case("full-async", **background) | {"room": 0},
        "room again": case("room-again", **go_on)
        | {"room": 0, "ballast": 3, "actions": {4: [["rm", str(top / "room-again" / "ballast")]]}},
        "read only": read_only
        | {
            "actions": {
                2: [["mount", "-o", "remount,ro", mount]],
                4: [["mount", "-o", f"remount,rw,size={TMPFS_MIB}m", mount]],
            }
        },
    }
    (top / "cases.json").write_text(json.dumps(cases))
    code = (
        "import json, sys, torch; from tests.distributed.test_failing_saves import on_tmpfs; torch.set_num_threads(1); "
        "top = sys.argv[1]; results = on_tmpfs(json.load(open(top + '/cases.json'))); "
        "json.dump(results, open(top + '/results.json', 'w'))"
    )
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", code, str(top)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return json.loads((top / "results.json").read_text())


def test_too_little_room_is_seen_before_anything_is_written(on_disk: dict[str, Any]):
    found = on_disk["no room"]
    assert "it needs 0.00" in found["error"] and "make room" in found["error"]
    assert found["steps"] == [1, 2] and found["damage"] == [None, None] and found["left"] == [] and found["loads"]
    assert sum("step-3 failed" in line and "it needs" in line for line in found["log"]) == 2, "tried again, and told"


@pytest.mark.parametrize("name", ["full", "full in the background"])
def test_a_disk_that_fills_up_during_a_save(name: str, on_disk: dict[str, Any]):
    found = on_disk[name]
    assert "could not be written" in found["error"]
    assert found["steps"] == [1, 2] and found["damage"] == [None, None] and found["left"] == [] and found["loads"]


def test_a_run_goes_on_over_a_full_disk_until_there_is_room(on_disk: dict[str, Any]):
    found = on_disk["room again"]
    assert found["error"] == "" and found["steps"] == [1, 4] and found["damage"] == [None, None]
    assert found["logged"] == [1, 2, 3, 4] and found["loads"]


def test_a_run_goes_on_over_a_read_only_disk_until_it_can_be_written(on_disk: dict[str, Any]):
    found = on_disk["read only"]
    assert found["error"] == "" and found["steps"] == [1, 4] and found["damage"] == [None, None]
    assert sum("Read-only file system" in line and "Training goes on" in line for line in found["log"]) == 2
