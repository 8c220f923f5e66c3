"""Kills a Slurm run again and again, at random but seeded moments, and checks its checkpoints and its log.

On the tests' cluster (tests/slurm/lab.sh), which this starts and takes down, as root; minutes to an hour:
    python -m tests.slurm.chaos --folder /tmp/chaos --kills 20 --seed 0
A tiny stage trains on two nodes. Each kill is one of: a node loses power (and comes back), a node's slurmd dies (and
comes back), SIGKILL of a rank, the time limit's warning, `scontrol requeue`, `scancel` and a new submission. Then:
every step was logged once, with the loss that a run without interruption has (so its rows were used once); every
checkpoint that was ever published is undamaged; the last parameters are equal bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import tyro

from tests.distributed.harness import flags, write_assets
from tests.distributed.test_checkpoint import assert_equal, steps_of, tensors
from tests.slurm.cluster import Cluster, Run, until, why_no_cluster
from torchtitan.components.checkpoint import find_damage

WAYS = ("node", "slurmd", "rank", "rank", "warning", "requeue", "cancel")


class Chaos:
    """One run, its current job, and the kills so far."""

    def __init__(self, cluster: Cluster, run: Run, nodes: tuple[str, str], seed: int):
        self.cluster, self.run, self.nodes, self.random = cluster, run, nodes, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.job = self.submit()
        self.checked: set[int] = set()

    def submit(self) -> str:
        return self.run.submit("--nodes=2", "-w", ",".join(self.nodes), MAX_RESTARTS="1000")

    def restarts(self) -> int:
        return int(self.cluster.job(self.job)["Restarts"])

    def check_checkpoints(self) -> None:
        """Check the checkpoints that are new and complete, whatever has just been killed."""
        for step in self.run.steps():
            if step not in self.checked:
                self.checked.add(step)
                damage = find_damage(self.run.out / "checkpoint" / f"step-{step}")
                assert damage is None, damage

    def kill(self) -> str:
        """Kill once, wait until the job has restarted because of it, and return what was killed."""
        way, rank, before = self.random.choice(WAYS), self.random.randrange(2), self.restarts()
        node = self.nodes[rank].removeprefix("node")
        name = f"{way} {node}" if way in ("node", "slurmd") else f"{way} {rank}" if way == "rank" else way
        self.done[way] += 1
        if way == "cancel":
            self.cluster.ask("scancel", self.job)
            assert self.cluster.ended(self.job) == "CANCELLED"
            until(lambda: not self.run.trainers(0) and not self.run.trainers(1), "the trainers to end")
            self.job = self.submit()
            return name
        if way == "node":
            self.cluster.lab("kill-node", node)
        elif way == "slurmd":
            self.cluster.lab("kill-slurmd", node)
        elif way == "rank":
            self.run.signal(rank, signal.SIGKILL)
        elif way == "warning":
            self.cluster.run("scancel", "--batch", "--signal=USR1", self.job)
        else:
            self.cluster.run("scontrol", "requeue", self.job)
        until(lambda: self.restarts() > before or self.over(), f"the restart after {name}")
        if way in ("node", "slurmd"):
            self.cluster.lab("start-node", node)
        return name

    def over(self) -> bool:
        return self.cluster.job(self.job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


def main(folder: Path, kills: int = 20, seed: int = 0, steps: int = 2000, pause: float = 8.0) -> None:
    """Kill a run `kills` times, the next after up to `pause` seconds of training, and check everything.

    Args:
        folder: for the cluster, the run and its checkpoints; must not exist.
        kills: how many.
        seed: of the moments and the ways.
        steps: after which the run is ended if the kills are through.
        pause: longest time from a run's first step to its kill.
    """
    if reason := why_no_cluster():
        sys.exit(f"error: {reason}")
    folder.mkdir(parents=True)
    cluster = Cluster(folder / "lab")
    cluster.environment |= {"SLURM_LAB_NODES": "2"}
    cluster.lab("up")
    try:
        torment(cluster, folder / "run", ("node1", "node2"), kills, seed, steps, pause)
    finally:
        with contextlib.suppress(Exception):
            cluster.run("scancel", "--user=root")
        cluster.lab("down")


def torment(
    cluster: Cluster, folder: Path, nodes: tuple[str, str], kills: int, seed: int, steps: int, pause: float
) -> None:
    """The run, its kills and the checks, on two nodes of a cluster that is up."""
    folder.mkdir(parents=True)
    write_assets(folder)
    flags(folder, folder / "assets-llama")
    overrides = {"training__steps": steps, "checkpoint__interval": 3, "lr_scheduler__decay_ratio": 0.0}
    began = time.monotonic()
    run = Run(cluster, folder, "run", comm__train_timeout_seconds=60, **overrides)
    chaos = Chaos(cluster, run, nodes, seed)
    starts = 0
    for number in range(1, kills + 1):
        until(lambda starts=starts: run.said("training; see", starts + 1), "a start")
        if chaos.random.random() < 0.8:  # otherwise kill it while it starts
            log = run.out / "metrics.jsonl"
            size = log.stat().st_mtime if log.exists() else 0
            until(lambda size=size, log=log: log.exists() and log.stat().st_mtime > size, "a step", 0.05)
        time.sleep(chaos.random.random() * pause)
        step = (run.steps() or [0])[-1]
        starts = run.log.read_text().count("training; see")
        name = chaos.kill()
        chaos.check_checkpoints()
        print(f"{time.monotonic() - began:6.0f} s  kill {number}: {name}, at step {step}", flush=True)
        assert not chaos.over() or number == kills, run.log.read_text()[-2000:]
    # no more kills: submit it with fewer steps, so that it ends soon after the newest checkpoint
    run.until(run.steps, "the first checkpoint")
    cluster.run("scancel", chaos.job)
    cluster.ended(chaos.job)
    until(lambda: not run.trainers(0) and not run.trainers(1), "the trainers to end")
    last = run.steps()[-1] + 5
    overrides["training__steps"] = last
    final = Run(cluster, folder, "run", **overrides)
    job = final.submit("--nodes=2", "-w", ",".join(nodes))
    assert cluster.ended(job) == "COMPLETED", final.log.read_text()[-2000:]
    print(f"{sum(chaos.done.values())} kills ({dict(chaos.done)}) over {last} steps; comparing with a run without any")
    whole = Run(cluster, folder, "whole", **overrides, parallelism__data_parallel_replicate_degree=2)
    command = [sys.executable, "-m", "torchtitan.extensions.cluster.launch", "--nproc", "2", "--", *whole.arguments]
    done = cluster.run(*command, PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    assert done.returncode == 0, done.stderr
    check(final, whole, last)


def check(run: Run, whole: Run, last: int) -> None:
    """AssertionError unless the killed run equals the unbroken run."""
    logged = steps_of(run.out)  # fails if a step is logged twice
    assert list(logged) == list(range(1, last + 1))
    expected = steps_of(whole.out)
    assert [logged[s]["loss"] for s in logged] == [expected[s]["loss"] for s in expected]
    for step in run.steps():
        assert (damage := find_damage(run.out / "checkpoint" / f"step-{step}")) is None, damage
    checkpoints = [r.out / "checkpoint" / f"step-{last}" for r in (run, whole)]
    assert_equal(tensors(checkpoints[0]), tensors(checkpoints[1]))
    # Rows are a function of the step, each step is logged once, and its loss shows which rows it has used.
    manifests = [json.loads((path / "manifest.json").read_text()) for path in checkpoints]
    assert manifests[0]["plan"] == manifests[1]["plan"] and manifests[0]["tokens_seen"] == manifests[1]["tokens_seen"]
    print(
        f"{last} steps, each once and with the loss of the run without kills: {logged[last]['tokens_seen']:,} tokens;"
    )
    print(f"{len(run.steps())} checkpoints undamaged; parameters and optimizer equal bit for bit")


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    tyro.cli(main)
