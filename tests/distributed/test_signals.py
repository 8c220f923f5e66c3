"""Slurm's warning signal to every process of a trainer, a rank that stops answering, a node that is held up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.distributed.harness import _free_ports, flags, write_assets
from tests.distributed.test_checkpoint import launch, steps_of, wait_for_step
from torchtitan.components.manifest import complete_steps
from torchtitan.tools.errors import LOST_A_RANK, STOPPED

TIMEOUT_SECONDS = 4
SLACK_SECONDS = 20  # for processes that share a busy machine
# extensions/cluster/health.py, train.py and extensions/cluster/launch.py: what follows after the time-out
ANSWER_SECONDS, GRACE_SECONDS, KILL_SECONDS, RANK_0_SECONDS = 6, 2, 10, 10


def trainers(launcher: subprocess.Popen, count: int = 2) -> list[int]:
    """Process ids of the ranks, in order; each leads a session that its loader processes are in too."""
    children = sorted(psutil.Process(launcher.pid).children(), key=lambda child: int(child.environ()["RANK"]))
    assert len(children) == count and all(child.children() for child in children), "each has a loader process"
    return [child.pid for child in children]


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("signals")
    endless = {"checkpoint__interval": 10**6, "lr_scheduler__decay_ratio": 0.0, "training__steps": 10**5}
    options = {"checkpoint__enable": True, "data__num_workers": 1}
    return flags(folder, write_assets(folder), **endless, **options, comm__train_timeout_seconds=TIMEOUT_SECONDS)


def out_of(args: list[str]) -> Path:
    """The last of them counts."""
    return Path(args[len(args) - args[::-1].index("--job.dump_folder")])


def test_usr1_and_term_to_every_process_saves_at_the_next_step_and_exits_cleanly(args: list[str]):
    out, process = out_of(args), launch(args, 2)
    wait_for_step(out, 3, process)
    for stop_signal in (signal.SIGUSR1, signal.SIGTERM):  # the second as Slurm sends it when time is up
        for trainer in trainers(process):
            os.killpg(trainer, stop_signal)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, output
    (saved,) = complete_steps(out / "checkpoint")
    assert saved == max(steps_of(out)) >= 3 and "asked to stop" in output


def train_until_a_rank_stops(args: list[str], stopped: int) -> tuple[int, str, float]:
    """The launcher's exit code and output, and how many seconds after the stop it ended."""
    process = launch(args, 2)
    wait_for_step(out_of(args), 3, process)
    os.kill(trainers(process)[stopped], signal.SIGSTOP)
    began = time.monotonic()
    output, _ = process.communicate(timeout=120)
    return process.returncode, output, time.monotonic() - began


@pytest.fixture(scope="module")
def stalled(args: list[str]) -> dict[int, tuple[Path, int, str, float]]:
    """By the rank that stops: the dump folder, and how the job ended. Side by side, for they wait most of the time."""
    outs = {stopped: Path(f"{out_of(args)}-{stopped}") for stopped in (0, 1)}
    jobs = [[*args, "--job.dump_folder", str(out)] for out in outs.values()]
    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(train_until_a_rank_stops, jobs, outs))
    return {stopped: (out, *how) for (stopped, out), how in zip(outs.items(), ended, strict=True)}


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_rank_that_stops_answering_ends_the_job_in_time_and_is_named(
    stopped: int, stalled: dict[int, tuple[Path, int, str, float]]
):
    """Rank 0 keeps the store in which the others would look who is there."""
    out, code, output, elapsed = stalled[stopped]
    told = ANSWER_SECONDS + GRACE_SECONDS + KILL_SECONDS + (RANK_0_SECONDS if stopped == 0 else 0)
    assert code == LOST_A_RANK, output
    assert TIMEOUT_SECONDS <= elapsed < TIMEOUT_SECONDS + told + SLACK_SECONDS, output
    who = "no answer from rank 1 on " if stopped == 1 else "no answer from rank 0's machine"
    assert who in output and "torchtitan/trainer.py" not in output, output  # a sentence, no traceback
    stack = (out / "comm_traces" / f"stack_rank_{1 - stopped}.txt").read_text()
    assert "torchtitan/trainer.py" in stack and "torch/distributed/" in stack, "where the other one waits"
    print(f"rank {stopped} stopped: ended after {elapsed:.1f} s")


def test_the_node_check_by_itself_finds_a_node_that_is_held_up(tmp_path: Path):
    """Two ranks as two hosts, started as a launcher would; one of them may run a fifth of the time only."""
    folder = tmp_path / "outputs"
    port = str(_free_ports(1)[0])
    command = [
        sys.executable,
        "-m",
        "torchtitan.extensions.cluster.node_check",
        "--folder",
        str(folder),
        "--seconds",
        "2",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        while not folder.exists():  # they have imported PyTorch
            assert ranks[0].poll() is None, ranks[0].stdout.read()
            time.sleep(0.1)
        while ranks[1].poll() is None:
            for stop_or_go, seconds in ((signal.SIGSTOP, 0.08), (signal.SIGCONT, 0.02)):
                ranks[1].send_signal(stop_or_go)
                time.sleep(seconds)
        told = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [3, 0], told
    assert "exclude: node" in told[0] and "node1 is slow: matrix product" in told[0]
    report = json.loads((folder / "node_check.json").read_text())
    assert report["exclude"] == "node1" and not report["broken"]
    assert report["hosts"]["node1"]["matmul"] > 2 * report["hosts"]["node0"]["matmul"]
