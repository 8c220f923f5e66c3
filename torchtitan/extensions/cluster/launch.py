"""Start one trainer process per device of this machine, wait for them, and return their exit code.

    python -m torchtitan.extensions.cluster.launch --nproc N -- <arguments of torchtitan.train>
    # on each of M machines:
    python -m torchtitan.extensions.cluster.launch --nproc N --nnodes M --node-rank R --master HOST:PORT -- ...

torchrun kills the trainers 30 seconds after SIGTERM unless told otherwise, in the middle of their checkpoint. This
launcher passes a signal on once and lets the trainers take as long as they need (docs/architecture.md says why it is
not made of torchrun's LocalElasticAgent). The trainers of several machines find each other as torchrun's do, in a c10d
store that rank 0 opens on HOST:PORT, and read the same environment variables. If a machine dies, Slurm must end the
processes of the others (multinode/).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torchtitan.tools.constants import STOP_SIGNALS
from torchtitan.tools.errors import FAILED, STOPPED

GRACE_SECONDS = 2.0
"""How long the other processes may go on after one has failed; then they get SIGTERM."""

KILL_SECONDS = 10.0
"""How long after SIGTERM they are killed."""

OWNER_SECONDS = 5.0
"""The interval at which the owner file is read."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Nodes:
    """This machine's place among the machines of the run, which all have the same number of processes."""

    nnodes: int = 1
    node_rank: int = 0

    master: tuple[str, int] | None = None
    """Host and port of rank 0's store; None: this machine, and a free port."""


@dataclass(frozen=True)
class Owner:
    """A file whose text names the start of a job that may write to a dump folder; every other start must end.

    When Slurm loses a node's daemon, it starts the job again elsewhere while the node's processes may live on.
    """

    file: Path
    text: str

    def is_another(self) -> bool:
        try:
            return self.file.read_text().strip() != self.text
        except OSError:  # a failing file system does not mean another owner
            return False


def launch(
    command: list[str],
    nproc: int,
    grace_seconds: float = GRACE_SECONDS,
    kill_seconds: float = KILL_SECONDS,
    nodes: Nodes = Nodes(),
    owner: Owner | None = None,
) -> int:
    """Run `command` as this machine's nproc ranks; 0, STOPPED, or the exit code of the first rank to fail.

    A rank that a signal ends has the exit code 128 + signal. The processes inherit this one's standard streams and have
    RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The first SIGTERM, SIGINT or SIGHUP is
    passed on to them, and SIGUSR1 as SIGTERM: Slurm sends SIGUSR1 to every process of a job, so the processes ignore
    it. They die with this process, and are killed if the owner file names another start.
    """
    signals: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)

    # SIGHUP: a closed terminal, a lost ssh; nohup ignores it
    stops = [s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    old_handlers = {signum: signal.signal(signum, note) for signum in stops}
    host, port = nodes.master or ("127.0.0.1", _free_port())
    before_program = _before_program()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for local_rank in range(nproc):
            environment = {
                **os.environ,
                "RANK": str(nodes.node_rank * nproc + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(nodes.nnodes * nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": host,
                "MASTER_PORT": str(port),
            }
            # A session of its own: Ctrl-C in the terminal reaches only this process, which passes it on once, and
            # never reaches a trainer's data loaders.
            processes.append(
                subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=before_program)
            )
        return _wait(processes, nodes.node_rank * nproc, signals, grace_seconds, kill_seconds, owner)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)


def _wait(
    processes: list[subprocess.Popen[bytes]],
    first_rank: int,
    signals: list[int],
    grace_seconds: float,
    kill_seconds: float,
    owner: Owner | None,
) -> int:
    """Wait for all processes, and pass on the first of `signals`; the exit code of the launcher."""
    code, failed_at, passed_on, warned, terminated = 0, 0.0, False, False, False
    owner_read_at = time.monotonic()
    while True:
        if owner and time.monotonic() - owner_read_at > OWNER_SECONDS:
            owner_read_at = time.monotonic()
            if owner.is_another():
                _say(f"{owner.file} says that another start has taken over: ending without saving")
                return FAILED  # the caller kills what is left
        running = [process for process in processes if process.poll() is None]
        if not code:
            for rank, process in enumerate(processes, first_rank):
                if process.returncode and process.returncode != STOPPED:
                    code, failed_at = process.returncode, time.monotonic()
                    if code < 0 and not passed_on:  # it could not say why
                        why = " (killed by the system when memory runs out?)" if code == -signal.SIGKILL else ""
                        _say(f"rank {rank} was ended by {signal.Signals(-code).name}{why}")
                    break
        if not running:
            if not code and any(process.returncode for process in processes):
                return STOPPED
            return 128 - code if code < 0 else code
        if signals and not passed_on:
            passed_on = True
            passed = signal.SIGTERM if signals[0] == signal.SIGUSR1 else signals[0]
            _say(f"{signal.Signals(signals[0]).name}: trainers that have begun finish their step and save")
            for process in running:
                process.send_signal(passed)
        elif len(signals) > 1 and not warned:
            warned = True
            _say(f"still waiting for the trainers; kill -9 {os.getpid()} ends them without saving")
        overdue = time.monotonic() - failed_at - grace_seconds if code else 0.0
        if overdue > 0 and not terminated:
            terminated = True
            for process in running:
                process.terminate()
        if overdue > kill_seconds:
            for process in running:
                process.kill()
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _before_program() -> Callable[[], None]:
    """What a child runs before its program: it ignores SIGUSR1, and (on Linux) dies with this process."""
    # looked up here, because a forked child should do next to nothing
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform.startswith("linux") else None

    def run() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # stays so in the program and in its children
        if prctl:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return run


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m torchtitan.extensions.cluster.launch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--nproc", type=int, required=True, help="number of processes")
    parser.add_argument("--module", default="torchtitan.train", help="what each process runs: a module, or a file.py")
    parser.add_argument("--nnodes", type=int, default=1, help="number of machines")
    parser.add_argument("--node-rank", type=int, default=0, help="which machine this is, from 0")
    parser.add_argument("--master", help="HOST:PORT, the same on all: the name of machine 0, and a free port there")
    parser.add_argument("--owner", nargs=2, metavar=("FILE", "TEXT"), help="end when FILE holds anything but TEXT")
    options = parser.parse_args(argv[:split])
    if options.nproc < 1:
        parser.error(f"--nproc {options.nproc}: at least 1 process is needed")
    if not 0 <= options.node_rank < options.nnodes:
        parser.error(f"--node-rank {options.node_rank}: it must be 0 to {options.nnodes - 1} (--nnodes less 1)")
    if options.nnodes > 1 and not options.master:
        parser.error("--nnodes > 1 needs --master HOST:PORT, the same on all machines")
    nodes = Nodes(options.nnodes, options.node_rank, _host_and_port(parser, options.master))
    owner = Owner(Path(options.owner[0]), options.owner[1]) if options.owner else None
    program = [options.module] if options.module.endswith(".py") else ["-m", options.module]
    command = [sys.executable, *program, *argv[split + 1 :]]
    return launch(command, options.nproc, nodes=nodes, owner=owner)


def _host_and_port(parser: argparse.ArgumentParser, master: str | None) -> tuple[str, int] | None:
    """("HOST", PORT) of --master, checked; None if it is not given."""
    if not master:
        return None
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        parser.error(f"--master {master}: it must be HOST:PORT")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        parser.error(
            f"--master {master}: the name {host} does not resolve on {socket.gethostname()} ({error.strerror}). Use a "
            "name of machine 0 that all machines know, or its address."
        )
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
