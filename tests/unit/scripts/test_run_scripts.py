"""run_train.sh and scripts/setup.sh with a pretended Python: what is installed, when, and what is then started.

A shell script plays Python: it notes how it was called in `calls`, and has every dependency once `whole` is beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
TOOLS = "bash env dirname readlink mkdir rm tail grep awk nproc getconf flock cat cp touch sleep"

PYTHON = r"""#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
note() { echo "$*" >>"$CALLS"; }
case "$*" in
    *check_environment.py*) echo "lacks something"; [[ -e $here/whole ]] ;;
    "-m torchtitan.extensions.cluster.slurm start "*) echo "DUMP_FOLDER=out ARGUMENTS=()" ;;
    "-m torchtitan.extensions.cluster.check_config "*) exit "${CONFIG_CHECK:-0}" ;;
    -V) echo "Python 3.x" ;;
    "-c "*) [[ -z ${OLD_PYTHON:-} ]] ;;
    "-m venv "*) note "venv"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip install"*) [[ $here == */.venv/bin ]] || note "INSTALLED INTO $here"
        note "pip ${*: -1}"; touch "$here/whole"  # whole to every look, before it is
        [[ ${*: -1} != "${PIP_DIES_AT:-never}"* ]] || { kill -9 $PPID; exit 1; } ;;
    *) note "run $* | cwd=$PWD OMP=$OMP_NUM_THREADS ALLOC=${PYTORCH_ALLOC_CONF:-} PATH=$PYTHONPATH" ;;
esac
"""


class Clone:
    """A copy of the scripts in a folder with a pretended `python3` on an otherwise bare PATH."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        self.bin = folder / "bin"
        self.elsewhere = folder / "elsewhere"
        self.calls = folder / "calls"
        for path in (self.root / "scripts", self.bin, self.elsewhere):
            path.mkdir(parents=True)
        for name in ("run_train.sh", "scripts/setup.sh", "scripts/check_environment.py"):
            shutil.copy(REPOSITORY / name, self.root / name)
        for tool in TOOLS.split():
            found = shutil.which(tool)
            if found:
                (self.bin / tool).symlink_to(found)
        self.script("python3", PYTHON)

    def script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def whole(self) -> Clone:
        (self.bin / "whole").touch()
        return self

    def run(
        self, *arguments: str, script: str = "run_train.sh", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            [str(self.root / script), *arguments],
            cwd=self.elsewhere,
            env={"PATH": str(self.bin), "CALLS": str(self.calls), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def lines(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_a_whole_python_is_used_and_nothing_is_installed(clone: Clone) -> None:
    ended = clone.whole().run("--job.config_file", "my.toml")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(clone.lines()) == 1 and not (clone.root / ".venv").exists()


def test_otherwise_an_environment_is_made_once(clone: Clone) -> None:
    assert clone.run("--job.config_file", "my.toml").returncode == 0
    assert clone.lines()[:3] == ["venv", "pip torch==2.13.0", f"pip {clone.root}"]
    assert len(clone.lines()) == 4
    again = clone.run("--job.config_file", "my.toml")
    assert (again.returncode, again.stderr, len(clone.lines())) == (0, "", 1)


def test_with_a_gpu_torch_is_not_pinned(clone: Clone) -> None:
    clone.script("nvidia-smi", "#!/bin/bash\necho 'GPU 0: a'; echo 'GPU 1: b'; echo 'GPU 2: c'\n")
    clone.run("--job.config_file", "my.toml")
    assert "pip torch>=2.11" in clone.lines()
    assert "--nproc 3 " in clone.lines()[-1] and "ALLOC=expandable_segments:True" in clone.lines()[-1]
    clone.run("--job.config_file", "my.toml", CUDA_VISIBLE_DEVICES="1,2")
    assert "--nproc 2 " in clone.lines()[-1]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_says_about_the_allocator_stays(clone: Clone, name: str) -> None:
    clone.script("nvidia-smi", "#!/bin/bash\necho 'GPU 0: a'\n")
    clone.whole().run("--job.config_file", "my.toml", **{name: "max_split_size_mb:64"})
    said = "max_split_size_mb:64" if name == "PYTORCH_ALLOC_CONF" else ""
    assert f"ALLOC={said} PATH" in clone.lines()[-1]
    (clone.bin / "nvidia-smi").unlink()
    clone.run("--job.config_file", "my.toml")
    assert "ALLOC= PATH" in clone.lines()[-1], "nothing is said where there is no GPU"


def test_the_allocator_on_several_plain_hosts(clone: Clone) -> None:
    """multinode/torchrun.sh, on a host of two."""
    shutil.copytree(REPOSITORY / "multinode", clone.root / "multinode")
    clone.script("nvidia-smi", "#!/bin/bash\necho 'GPU 0: a'; echo 'GPU 1: b'\n")
    host = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "host0", "--", "--job.config_file", "my.toml"]
    clone.whole().run(*host, script="multinode/torchrun.sh")
    assert "launch --nproc 2 --nnodes 2 " in clone.lines()[-1]
    assert "ALLOC=expandable_segments:True " in clone.lines()[-1]


@pytest.mark.parametrize("moment", ["torch", "/"])
def test_an_interrupted_installation_is_begun_anew(clone: Clone, moment: str) -> None:
    assert clone.run("--job.config_file", "my.toml", PIP_DIES_AT=moment).returncode != 0
    assert not any(line.startswith("run") for line in clone.lines())
    ended = clone.run("--job.config_file", "my.toml")
    assert ended.returncode == 0 and "interrupted" in ended.stderr
    assert clone.lines()[0] == "venv" and len(clone.lines()) == 4


def test_an_environment_that_lacks_a_new_dependency_is_added_to(clone: Clone) -> None:
    clone.run("--job.config_file", "my.toml")
    (clone.root / ".venv/bin/whole").unlink()
    ended = clone.run("--job.config_file", "my.toml")
    assert ended.returncode == 0 and "lacks something" in ended.stderr
    assert clone.lines()[0] == "pip torch==2.13.0"


def test_somebody_elses_environment_is_neither_changed_nor_removed(clone: Clone) -> None:
    (clone.root / ".venv/bin").mkdir(parents=True)
    shutil.copy(clone.bin / "python3", clone.root / ".venv/bin/python")
    ended = clone.run("--job.config_file", "my.toml")
    assert ended.returncode == 1 and "was not made by this script" in ended.stderr
    assert clone.lines() == [] and (clone.root / ".venv/bin/python").exists()
    (clone.root / ".venv/bin/whole").touch()
    assert clone.run("--job.config_file", "my.toml").returncode == 0


def test_an_old_python_is_an_error(clone: Clone) -> None:
    ended = clone.run(OLD_PYTHON="1")
    assert ended.returncode == 1 and "Python >= 3.10 is needed" in ended.stderr and "python3" in ended.stderr
    assert clone.lines() == []


def test_without_a_file_the_demo_is_built_and_trained_with_the_overrides(clone: Clone) -> None:
    clone.whole().run("--training.steps", "5")
    build, train = clone.lines()
    assert build.startswith("run scripts/build_demo_corpus.py |") and f"cwd={clone.root} " in build
    arguments = (
        "-m torchtitan.extensions.cluster.chain 2 --job.config_file train_configs/demo/4k.toml "
        "--stage.run_chain --training.steps 5"
    )
    assert arguments in train and f"cwd={clone.root} " in train


def test_the_demo_by_one_process_has_no_two_to_share_a_row(clone: Clone) -> None:
    clone.script("nvidia-smi", "#!/bin/bash\necho 'GPU 0: a'\n")
    clone.whole().run("--training.steps", "5")
    demo = "--job.config_file train_configs/demo/4k.toml --stage.run_chain"
    assert f"chain 1 {demo} --parallelism.context_parallel_degree 1 --training.steps 5" in clone.lines()[-1]


@pytest.mark.parametrize(
    "flag", ["--job.config_file my.toml", "--job.config_file=my.toml", "--job.config-file my.toml"]
)
def test_with_a_file_the_users_folder_is_kept(clone: Clone, flag: str) -> None:
    clone.whole().run(*flag.split(), "--training.steps", "5")
    (train,) = clone.lines()
    assert f"-- {flag} --training.steps 5 |" in train
    assert f"cwd={clone.elsewhere} " in train and train.endswith(f"PATH={clone.root}")


def test_a_chain_is_run_as_one(clone: Clone) -> None:
    clone.whole().run("--job.config_file", "my.toml", "--stage.run_chain")
    (train,) = clone.lines()
    assert "run -m torchtitan.extensions.cluster.chain 2 --job.config_file my.toml --stage.run_chain |" in train


def test_torchtitans_variable_names_the_file_too(clone: Clone) -> None:
    clone.whole().run("--training.steps", "5", CONFIG_FILE="my.toml")
    (train,) = clone.lines()
    assert "-- --job.config_file my.toml --training.steps 5 |" in train and f"cwd={clone.elsewhere} " in train


@pytest.mark.parametrize(
    "arguments", ["--help", "-h", "--job.print_config", "--job.config_file a.toml --job.print_config"]
)
def test_questions_are_answered_by_one_process(clone: Clone, arguments: str) -> None:
    clone.whole().run(*arguments.split())
    (call,) = clone.lines()
    assert call.startswith("run -m torchtitan.train ")
    assert ("demo/4k.toml" in call) == (arguments == "--job.print_config")


def test_a_wrong_configuration_stops_it_before_anything_is_started(clone: Clone) -> None:
    for arguments in ((), ("--job.config_file", "a.toml")):
        assert clone.whole().run(*arguments, CONFIG_CHECK="1").returncode == 1
        assert clone.lines() == []


@pytest.mark.parametrize("nproc", ["1", "3"])
def test_processes_and_threads(clone: Clone, nproc: str) -> None:
    clone.whole().run("--job.config_file", "a", NGPU=nproc)
    cores = len(os.sched_getaffinity(0))
    assert f"--nproc {nproc} " in clone.lines()[0] and f"OMP={max(1, cores // int(nproc))} " in clone.lines()[0]
    clone.run("--job.config_file", "a", NGPU=nproc, OMP_NUM_THREADS="5")
    assert "OMP=5 " in clone.lines()[0]


@pytest.mark.parametrize("nproc", ["0", "-1", "two", "", "2x"])
def test_a_wrong_number_of_processes_is_refused_before_anything_is_done(clone: Clone, nproc: str) -> None:
    ended = clone.run(NGPU=nproc)
    assert ended.returncode == 1 and f"NGPU={nproc} is not a number of processes" in ended.stderr
    assert clone.lines() == [] and not (clone.root / ".venv").exists()
