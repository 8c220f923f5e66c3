"""A real Slurm cluster of namespaces on this machine (lab.sh); training jobs on it that tests can stop and watch."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import flags
from tests.distributed.test_checkpoint import steps_of
from torchtitan.components.manifest import complete_steps

REPO = Path(__file__).parents[2]
LAB = Path(__file__).parent / "lab.sh"
STEPS = 16
PATIENCE = 400.0  # seconds until a test gives up waiting for what takes 30 s on an idle machine
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")


def why_no_cluster() -> str | None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a Slurm cluster of namespaces needs root on Linux"
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "flock")) and not shutil.which("apt-get"):
        return "needs unshare, nsenter, ip and flock"
    trial = (
        "ip link add veth7 type veth peer name veth8 && ip link add br7 type bridge" if shutil.which("ip") else "true"
    )
    command = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "sh", "-c", trial]
    if subprocess.run(command, capture_output=True).returncode:
        return "this machine does not let root make namespaces with veth and bridge"
    slurm = ("slurmctld", "slurmd", "sbatch", "munged")
    if not all(shutil.which(tool) for tool in slurm) and not shutil.which("apt-get"):
        return "Slurm is not installed, and there is no apt-get"
    return None


class Cluster:
    """The lab, and what the tests do with it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_LAB_DIR": str(folder),
            "SLURM_LAB_NODES": "12",
            "SLURM_LAB_CPUS": "16",
            "SLURM_LAB_GPUS": "2",
            "SLURM_LAB_GRACE": "300",
            "SLURM_LAB_TIMEOUT": "240",
            "PATH": f"{folder}/bin:{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("NGPU", "PYTHON", "MASTER_HOST", "TORCHTITAN_REPO", "PYTHONPATH"):
            self.environment.pop(name, None)

    def lab(self, *verb: str) -> None:
        done = subprocess.run(
            [str(LAB), *verb], env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode and "apt-get install failed" in done.stderr:
            pytest.skip(f"Slurm cannot be installed here: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr

    def run(self, *command: Any, cwd: Path | str = "/", **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **environment}
        return subprocess.run(
            [str(c) for c in command], env=environment, capture_output=True, text=True, cwd=cwd, timeout=PATIENCE
        )

    def ask(self, *command: Any) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *options: Any, **environment: str) -> str:
        done = self.run("sbatch", "--parsable", *options, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def job(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "-o", "show", "job", job)))

    def on_node(self, number: int, *command: Any) -> None:
        """Run a command as root in a node's mount namespace."""
        pid = (self.folder / f"node{number}" / "init.pid").read_text().split()[0]
        subprocess.run(["nsenter", "-t", pid, "--mount", "--", *map(str, command)], check=True)

    def ended(self, job: str) -> str:
        """Wait until a job has ended; its state."""
        return until(lambda: (s := self.job(job)["JobState"]) in FINAL and s, f"job {job} to end")


def until(condition: Callable[[], Any], what: str, pause: float = 0.3) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(pause)
    return value


class Run:
    """One stage of 16 steps, with a checkpoint after each step, in a dump folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, **overrides: Any):
        self.cluster, self.out, self.name = cluster, folder / name, name
        settings: dict[str, Any] = {
            "checkpoint__enable": "true",
            "checkpoint__interval": 1,
            "checkpoint__keep_latest_k": 0,
            "parallelism__self_check": "false",
            "training__steps": STEPS,
            "data__num_workers": 1,
            "comm__train_timeout_seconds": 1200,
            "job__dump_folder": self.out,
        }
        self.arguments = flags(folder, folder / "assets-llama", **settings | overrides)

    def submit(self, *options: str, script: Path = REPO / "multinode" / "train.sbatch", **environment: str) -> str:
        self.log = self.out.parent / f"{self.name}.log"
        options = ("--output", str(self.log), "--job-name", self.name, *options)
        self.job = self.cluster.sbatch(*options, script, *self.arguments, **environment)
        return self.job

    def said(self, words: str, times: int = 1) -> bool:
        return self.log.exists() and self.log.read_text().count(words) >= times

    def until(self, condition: Callable[[], Any], what: str, pause: float = 0.3) -> None:
        """Wait for something that happens before the job ends; fail as soon as the job has ended without it."""

        began = asked = time.monotonic()
        while not condition():
            time.sleep(pause)
            if time.monotonic() - asked > 3.0:
                over = self.cluster.job(self.job)["JobState"] in FINAL
                assert not over or condition(), f"{self.name} was over before {what}: {self.log.read_text()[-3000:]}"
                asked = time.monotonic()
            assert time.monotonic() - began < PATIENCE, f"waited {PATIENCE:.0f} s for {what} of {self.name}"

    def steps(self) -> list[int]:
        return complete_steps(self.out / "checkpoint")

    def wait_for_step(self, step: int) -> None:
        self.until(lambda: (self.steps() or [0])[-1] >= step, f"step {step}", 0.02)

    def trainers(self, rank: int, module: str = "torchtitan.train") -> list[int]:
        """The process of a rank, as seen from outside its namespaces; its loader processes are left out."""
        found: dict[int, int] = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if module.encode() not in words or str(self.out).encode() not in words:
                    continue
                if f"RANK={rank}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    parent = re.search(r"PPid:\s*(\d+)", (process / "status").read_text())
                    found[int(process.name)] = int(parent[1]) if parent else 0
        return [pid for pid, parent in found.items() if parent not in found]

    def signal(self, rank: int, number: signal.Signals) -> None:
        for pid in self.trainers(rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, rank: int = 1, after: int = 3) -> list[int]:
        """Stop a rank in the middle of a later step, so that the others wait for it; yields its process."""
        self.wait_for_step(after)
        stopped = self.trainers(rank)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert stopped and self.steps()[-1] < STEPS, f"{self.name} was over before it could be held"
        return stopped

    @contextlib.contextmanager
    def held(self, rank: int = 1, after: int = 3) -> Iterator[None]:
        """stop() until the interruption has reached the run."""
        self.stop(rank, after)
        try:
            yield
        finally:
            self.signal(rank, signal.SIGCONT)

    def trainers_said(self, words: str) -> bool:
        return any(words in log.read_text() for log in (self.out / "slurm").glob("*-node*.log"))

    def resumed_from(self) -> list[int]:
        logs = sorted((self.out / "slurm").glob("*-node0.log"), key=lambda p: int(p.name.partition("-")[0]))
        return [int(step) for log in logs for step in re.findall(r"resumed from .*step-(\d+)", log.read_text())]

    def losses(self) -> list[float]:
        logged = steps_of(self.out)
        assert list(logged) == list(range(1, len(logged) + 1))
        return [numbers["loss"] for numbers in logged.values()]
