"""Kill, damage, reshard: what a checkpoint has to survive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.distributed.harness import flags, run_stage, spawn, write_assets
from torchtitan.components import checkpoint as checkpoint_module
from torchtitan.components.manifest import complete_steps, find_damage
from torchtitan.tools.errors import STOPPED

TWENTY = {"checkpoint__enable": True, "checkpoint__interval": 5, "training__steps": 20, "training__local_batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def assets(folder: Path) -> Path:
    return write_assets(folder, "tied")


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, whole."""
    target = checkpoint.with_name(checkpoint.name + ".pt")
    dcp_to_torch_save(str(checkpoint), str(target))
    parts = torch.load(target)
    target.unlink()
    return {f"{part}.{name}": value for part in ("model", "optimizer") for name, value in parts[part].items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 20
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[:3]}"


def steps_of(out: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), "a step is logged twice"
    return {line["step"]: line for line in lines}


def launch(args: list[str], processes: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "torchtitan.extensions.cluster.launch", "--nproc", str(processes), "--", *args]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    """Until metrics.jsonl has a line of that step."""
    path, deadline = out / "metrics.jsonl", time.time() + 120
    while f'"step": {step},' not in (path.read_text() if path.exists() else ""):
        assert process.poll() is None, process.stdout.read()
        assert time.time() < deadline, "no such step in two minutes"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def unbroken(folder: Path, assets: Path) -> list[dict[str, Any]]:
    """Twenty steps on two ranks in one go."""
    args = flags(folder, assets, **TWENTY, job__dump_folder=folder / "unbroken")
    return spawn(2, run_stage, [args], folder)[0]


def test_killed_at_step_13_and_restarted(folder: Path, assets: Path, unbroken):
    """SIGKILL to every process, restart: bit-identical on the same layout, the same loss on another one."""
    out = folder / "killed"
    args = flags(folder, assets, **TWENTY, job__dump_folder=out, checkpoint__keep_latest_k=0)
    process = launch(args, 2)
    wait_for_step(out, 13, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert complete_steps(out / "checkpoint") == [5, 10]

    other = folder / "killed-other-layout"
    subprocess.run(["cp", "-r", out, other], check=True)
    resumed = spawn(2, run_stage, [args], folder)[0]
    assert [numbers["step"] for numbers in resumed] == list(range(11, 21)), "it goes on from step 10"
    assert_equal(tensors(out / "checkpoint" / "step-20"), tensors(folder / "unbroken" / "checkpoint" / "step-20"))
    logged = steps_of(out)
    assert list(logged) == list(range(1, 21))
    for numbers in unbroken:
        assert logged[numbers["step"]]["loss"] == numbers["loss"]

    # the same rows on one rank, and on two ranks that share the matrices
    args = flags(folder, assets, **TWENTY, job__dump_folder=other)
    for steps in (
        *spawn(1, run_stage, [args], folder),
        *spawn(
            2, run_stage, [[*args, "--checkpoint.load_step", "10", "--parallelism.tensor_parallel_degree", "2"]], folder
        ),
    ):
        assert [numbers["step"] for numbers in steps] == list(range(11, 21))
        for numbers in steps:
            assert numbers["loss"] == pytest.approx(unbroken[numbers["step"] - 1]["loss"], rel=1e-5)


def test_sigterm_finishes_the_step_saves_and_exits_cleanly(folder: Path, assets: Path):
    out = folder / "terminated"
    # a run that does not end by itself, and whose learning rate does not depend on where it would
    endless = {"checkpoint__enable": True, "checkpoint__interval": 10**6, "lr_scheduler__decay_ratio": 0.0}
    args = flags(folder, assets, **endless, training__steps=10**5, job__dump_folder=out)
    process = launch(args, 2)
    wait_for_step(out, 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, output
    (saved,) = complete_steps(out / "checkpoint")
    assert saved == max(steps_of(out)) >= 3
    args = [*args, "--training.steps", str(saved + 2)]
    resumed, unbroken = spawn(2, run_stage, [args, [*args, "--job.dump_folder", str(folder / "whole")]], folder)
    assert [n["step"] for n in resumed] == [saved + 1, saved + 2]
    assert [n["loss"] for n in resumed] == [n["loss"] for n in unbroken[-2:]]


# ---- a kill during a save -------------------------------------------------------------------------------------------


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_twice_and_die(args: list[str], rank: int, world_size: int, where: str) -> None:
    """A checkpoint at step 1, and a SIGKILL at a moment of the one at step 2."""
    writer = checkpoint_module.WholeWriter
    write_data, finish, rename = writer.write_data, writer.finish, Path.rename

    def dying(original, before: bool):
        def method(self, *rest, **named):
            if self.manifest["step"] == 2 and before:
                _die()
            result = original(self, *rest, **named)
            if self.manifest["step"] == 2:
                _die()
            return result

        return method

    if where == "before the tensors":
        writer.write_data = dying(write_data, before=True)
    elif where == "after the tensors":
        writer.write_data = dying(write_data, before=False)
    elif where == "before the manifest":
        writer.finish = dying(finish, before=True)
    else:
        assert where == "before the rename"
        Path.rename = lambda self, target: _die() if "step-2" in str(target) else rename(self, target)
    run_stage(args, rank, world_size)


MOMENTS = ("before the tensors", "after the tensors", "before the manifest", "before the rename")


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_kill_during_a_save_loses_nothing(mode: str, folder: Path, assets: Path):
    options = {"checkpoint__enable": True, "checkpoint__interval": 1, "checkpoint__async_mode": mode}
    for where in MOMENTS:
        out = folder / f"dies-{mode}-{where}".replace(" ", "-")
        args = flags(folder, assets, **options, job__dump_folder=out)
        with pytest.raises(Exception, match="SIGKILL|signal"):
            spawn(1, partial(save_twice_and_die, where=where), [args], folder)
        assert complete_steps(out / "checkpoint") == [1], where
        assert find_damage(out / "checkpoint" / "step-1") is None, where
    (steps,) = spawn(1, run_stage, [args], folder)
    assert [numbers["step"] for numbers in steps] == [2, 3, 4]
    assert not list((out / "checkpoint").glob("*.partial"))


# ---- damage, deletion, other layouts --------------------------------------------------------------------------------


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a flipped bit": flip_a_byte,
    "a short file": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a missing file": Path.unlink,
}


def test_a_damaged_checkpoint_is_skipped_and_named(folder: Path, assets: Path, capfd):
    """One run, copied; what is damaged in a copy; and the copies' restarts, each of its own log lines."""
    options = {"checkpoint__enable": True, "checkpoint__interval": 1}
    outs = {damage: folder / damage.replace(" ", "-") for damage in DAMAGES}
    args = {damage: flags(folder, assets, **options, job__dump_folder=out) for damage, out in outs.items()}
    first, *others = outs.values()
    whole = spawn(2, run_stage, [next(iter(args.values()))], folder)[0]
    for other in others:
        shutil.copytree(first, other)
    files = {}
    for damage, out in outs.items():
        last = out / "checkpoint" / "step-4"
        files[damage] = max(last.glob("*.distcp"), key=lambda f: f.stat().st_size)
        DAMAGES[damage](files[damage])
        assert files[damage].name in find_damage(last)
    capfd.readouterr()
    restarts = spawn(2, run_stage, list(args.values()), folder)
    warnings = [line for line in capfd.readouterr().err.splitlines() if "Skipping a damaged checkpoint" in line]
    for steps, (damage, out) in zip(restarts, outs.items(), strict=True):
        assert any(str(out) in line and files[damage].name in line for line in warnings), damage
        assert [numbers["step"] for numbers in steps] == [4]
        assert steps[0]["loss"] == whole[3]["loss"]
        assert find_damage(out / "checkpoint" / "step-4") is None, "the damaged one is written anew"
        assert (out / "checkpoint" / "step-4.replaced").is_dir()


def test_async_saves_what_was_and_keeps_the_latest(folder: Path, assets: Path):
    """A save in the background holds the state of its step, though training goes on meanwhile."""
    options = {"checkpoint__enable": True, "checkpoint__interval": 1, "checkpoint__keep_latest_k": 2}
    outs = {mode: folder / f"mode-{mode}" for mode in ("disabled", "async")}
    args = [flags(folder, assets, **options, checkpoint__async_mode=m, job__dump_folder=out) for m, out in outs.items()]
    spawn(2, run_stage, args, folder)
    for out in outs.values():
        assert complete_steps(out / "checkpoint") == [3, 4]
    assert_equal(*(tensors(out / "checkpoint" / "step-3") for out in outs.values()))


def test_going_back_to_an_earlier_step(folder: Path, assets: Path):
    """load_step takes the run back: later checkpoints are set aside, neither resumed from nor counted."""
    out = folder / "back"
    options = {"checkpoint__enable": True, "checkpoint__interval": 1, "checkpoint__keep_latest_k": 3}
    args = flags(folder, assets, **options, job__dump_folder=out)
    earlier = [*args, "--checkpoint.load_step", "2", "--training.steps", "3"]
    forward, back = spawn(1, run_stage, [args, earlier], folder)
    assert [n["step"] for n in back] == [3] and back[0]["grad_norm"] == forward[2]["grad_norm"]
    assert complete_steps(out / "checkpoint") == [2, 3]
    assert sorted(p.name for p in (out / "checkpoint").glob("*.replaced")) == ["step-3.replaced", "step-4.replaced"]
    assert list(steps_of(out)) == [1, 2, 3]


def test_finished_run_has_nothing_to_do(folder: Path, assets: Path, unbroken):
    args = flags(folder, assets, **TWENTY, job__dump_folder=folder / "unbroken")
    assert spawn(2, run_stage, [args], folder) == [[]]
