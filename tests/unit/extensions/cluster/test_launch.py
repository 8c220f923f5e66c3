"""The launcher: what it gives its processes, how it ends when they end, and how signals reach them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchtitan.tools.errors import STOPPED

REPOSITORY = Path(__file__).parents[4]


def start(
    folder: Path, program: str, nproc: int, *arguments: str, options: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start the launcher on a module with the code `program`, in `folder`; the header below gives it some names."""
    header = "import os, signal, sys, time\nfrom pathlib import Path\nrank = int(os.environ['RANK'])\n"
    (folder / "child.py").write_text(header + program)
    command = [sys.executable, "-m", "torchtitan.extensions.cluster.launch", "--nproc", str(nproc), "--module", "child"]
    return subprocess.Popen(
        [*command, *options, "--", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{folder}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, "the children did not start"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("nproc", [1, 3])
def test_every_rank_knows_its_place_and_its_arguments(tmp_path: Path, nproc: int) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    program = f"sys.stdout.write(' '.join([*(os.environ[n] for n in '{names}'.split()), *sys.argv[1:]]) + '\\n')"
    code, out, err = finish(start(tmp_path, program, nproc, "--a.b", "1", "--", "-x"))
    lines = sorted(line.split() for line in out.splitlines())
    assert (code, err, len(lines)) == (0, "", nproc)
    for rank, line in enumerate(lines):
        assert line[:5] == [str(rank), str(rank), str(nproc), str(nproc), "127.0.0.1"]
        assert line[6:] == ["--a.b", "1", "--", "-x"]
    assert len({line[5] for line in lines}) == 1 and int(lines[0][5]) > 1023


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_exit_code_is_the_trainers_and_nothing_is_added_to_their_words(tmp_path: Path, code: int) -> None:
    assert finish(start(tmp_path, f"sys.exit({code})", 2)) == (code, "", "")


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    program = "if rank == 1: time.sleep(0.3); sys.exit(3)\nPath('pid').write_text(str(os.getpid())); time.sleep(60)"
    began = time.monotonic()
    code, _, _ = finish(start(tmp_path, program, 2))
    assert code == 3 and time.monotonic() - began < 15
    assert not running(int((tmp_path / "pid").read_text()))


def test_one_that_fails_lets_the_others_have_their_say(tmp_path: Path) -> None:
    program = "if rank == 1: sys.exit(3)\ntime.sleep(1); print('rank 0 says why'); sys.exit(4)"
    assert finish(start(tmp_path, program, 2)) == (3, "rank 0 says why\n", "")


def test_one_that_ignores_everything_is_killed(tmp_path: Path) -> None:
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == 1: sys.exit(3)\ntime.sleep(60)"
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
    code += "from torchtitan.extensions.cluster.launch import launch\n"
    child = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n" + program
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(launch([sys.executable, '-c', {child!r}], 2, 0.3, 0.3))"]
    )
    assert ended.returncode == 3 and time.monotonic() - began < 10


def test_one_that_is_killed_is_named(tmp_path: Path) -> None:
    code, _, err = finish(start(tmp_path, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)", 2))
    assert code == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in err


# The child records each signal, and ends 3 seconds after the first, like a trainer that must save.
SAVES = """
caught = []
for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(s, lambda s, f: caught.append(s))
Path(f'ready{rank}').touch()
while not caught:
    time.sleep(0.01)
time.sleep(3)
Path(f'saved{rank}').write_text(' '.join(str(int(s)) for s in caught))
"""


def test_a_machine_of_several_starts_its_own_ranks(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    line = f"(' '.join(os.environ[n] for n in '{names}'.split()) + chr(10)).encode()"
    program = f"os.write(1, {line})"  # in one write: two processes share the pipe
    options = ("--nnodes", "3", "--node-rank", "1", "--master", "localhost:29123")
    code, out, err = finish(start(tmp_path, program, 2, options=options))
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == ["2 0 6 2 localhost 29123", "3 1 6 2 localhost 29123"]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--nnodes", "2"), "needs --master HOST:PORT"),
        (("--nnodes", "2", "--node-rank", "2", "--master", "a:1"), "--node-rank 2: it must be 0 to 1"),
        (("--nnodes", "2", "--master", "a"), "--master a: it must be HOST:PORT"),
        (("--nnodes", "2", "--master", "no-such-host.invalid:29500"), "the name no-such-host.invalid does not resolve"),
    ],
)
def test_machines_that_cannot_meet_are_told_so(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    code, _, err = finish(start(tmp_path, "", 1, options=options))
    assert code != 0 and words in err and "Traceback" not in err


def test_those_who_were_asked_to_stop_are_waited_for(tmp_path: Path) -> None:
    """Rank 1 stops long before rank 0: that is not a failure, after which rank 0 would be ended."""
    program = f"if rank == 1: sys.exit({STOPPED})\ntime.sleep(4); print('saved'); sys.exit({STOPPED})"
    assert finish(start(tmp_path, program, 2)) == (STOPPED, "saved\n", "")


def test_sigusr1_to_everyone_is_one_request_to_stop(tmp_path: Path) -> None:
    """As Slurm sends it: to the launcher, the trainers and their data loaders, before and after they listen."""
    loader = "import subprocess; loader = subprocess.Popen(['sleep', '60'])\n"
    program = loader + SAVES.replace("time.sleep(3)", "assert loader.poll() is None; loader.kill()")
    process = start(tmp_path, program, 1)
    wait_for(tmp_path / "ready0")
    for stat in Path("/proc").glob("[0-9]*/stat"):  # trainer and loader: a session of their own, below the launcher
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            trainer = int(fields[1]) == process.pid
            loads = Path(f"/proc/{fields[1]}/stat").read_text().rpartition(")")[2].split()[1] == str(process.pid)
            if trainer or loads:
                os.kill(int(stat.parent.name), signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 0
    assert (tmp_path / "saved0").read_text() == str(int(signal.SIGTERM))


def test_another_owner_ends_it(tmp_path: Path) -> None:
    owner = tmp_path / "owner"
    owner.write_text("7.0\n")
    process = start(tmp_path, "Path('ready').touch(); time.sleep(60)", 1, options=("--owner", str(owner), "7.0"))
    wait_for(tmp_path / "ready")
    owner.unlink()  # a file system that fails for a moment is not another owner
    time.sleep(6)
    assert process.poll() is None
    owner.write_text("7.1\n")
    code, _, err = finish(process)
    assert code == 1 and "another start has taken over" in err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_the_trainers_take_their_time(tmp_path: Path, signum: signal.Signals) -> None:
    process = start(tmp_path, SAVES, 2)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    for _ in range(3):  # to the group, as a terminal and `timeout` send it, and more than once
        os.killpg(process.pid, signum)
        time.sleep(0.2)
    code, _, err = finish(process)
    assert code == 0
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [str(int(signum))] * 2
    assert signum.name in err and f"kill -9 {process.pid}" in err and "Traceback" not in err


def test_a_trainer_that_fails_to_save_is_heard(tmp_path: Path) -> None:
    process = start(tmp_path, SAVES.replace("time.sleep(3)", "sys.exit(5)"), 1)
    wait_for(tmp_path / "ready0")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 5


def test_a_signal_before_anyone_listens_ends_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, "Path(f'ready{rank}').touch(); time.sleep(60)", 2)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_the_trainers_die_with_the_launcher(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        "Path(f'pid{rank}.t').write_text(str(os.getpid())); os.rename(f'pid{rank}.t', f'pid{rank}'); time.sleep(60)",
        2,
    )
    wait_for(tmp_path / "pid0", tmp_path / "pid1")
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    assert all(running(pid) for pid in pids)
    process.kill()
    finish(process)
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("nproc", ["0", "-1", "two"])
def test_the_number_of_processes_is_checked(nproc: str) -> None:
    command = [sys.executable, "-m", "torchtitan.extensions.cluster.launch", "--nproc", nproc]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.returncode != 0 and "--nproc" in ended.stderr and "Traceback" not in ended.stderr
