"""Start one trainer process for each device of this machine, and end as they end.

    python -m torchtitan.tools.launch --nproc N -- <arguments of torchtitan.train>

torchrun does more than one machine needs, and less: after SIGTERM it gives the trainers 30 seconds and then kills them
in the middle of their checkpoint. Here a signal is passed on once and the trainers take as long as they need. Several
machines are started by torchrun: the trainer reads the same environment variables from either.
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
from types import FrameType

GRACE_SECONDS = 2.0
"""What the others have to end by themselves when one process has failed; then they are asked to, by SIGTERM."""

KILL_SECONDS = 10.0
"""And this long after that they are killed."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch(
    command: list[str], nproc: int, grace_seconds: float = GRACE_SECONDS, kill_seconds: float = KILL_SECONDS
) -> int:
    """Run `command` as ranks 0 to nproc - 1 and return an exit code: 0, or that of the first to fail (128 + signal).

    The processes inherit this one's standard streams and have RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT. SIGTERM, SIGINT and SIGHUP are passed on to them, the first only. They die with this
    process.
    """
    signals: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)

    stops = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # the terminal was closed, or ssh dropped; nohup ignores it
        stops.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, note) for signum in stops}
    port = _free_port()
    die_with_parent = _die_with_parent()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(nproc):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            # A session of its own: Ctrl-C in the terminal reaches this process only, which passes it on once, and
            # never a trainer's data loaders.
            processes.append(
                subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
            )
        return _wait(processes, signals, grace_seconds, kill_seconds)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait(
    processes: list[subprocess.Popen[bytes]], signals: list[int], grace_seconds: float, kill_seconds: float
) -> int:
    """Wait for all processes, passing on the first of `signals`; the exit code for the whole."""
    code, failed_at, passed_on, told, terminated = 0, 0.0, False, False, False
    while True:
        running = [process for process in processes if process.poll() is None]
        if not code:
            for rank, process in enumerate(processes):
                if process.returncode:
                    code, failed_at = process.returncode, time.monotonic()
                    if code < 0 and not passed_on:  # it could not explain itself
                        why = " (killed by the system when memory runs out?)" if code == -signal.SIGKILL else ""
                        _say(f"rank {rank} was ended by {signal.Signals(-code).name}{why}")
                    break
        if not running:
            return 128 - code if code < 0 else code
        if signals and not passed_on:
            passed_on = True
            _say(f"{signal.Signals(signals[0]).name}: a trainer that has begun finishes its step and saves")
            for process in running:
                process.send_signal(signals[0])
        elif len(signals) > 1 and not told:
            told = True
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


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program so that it is killed when this process dies, however it dies (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: a forked child should do next to nothing
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) and None


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m torchtitan.tools.launch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--nproc", type=int, required=True, help="number of processes")
    parser.add_argument("--module", default="torchtitan.train", help="the module that each of them runs")
    options = parser.parse_args(argv[:split])
    if options.nproc < 1:
        parser.error(f"--nproc {options.nproc}: at least 1 process is needed")
    return launch([sys.executable, "-m", options.module, *argv[split + 1 :]], options.nproc)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
