"""The questions of multinode/ about a configuration, and its scripts without a cluster."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan import train
from torchtitan.components.manifest import MANIFEST_FORMAT
from torchtitan.extensions.cluster.slurm import ENDED, main, replicas, verdict
from torchtitan.tools.errors import FAILED, GATE_NOT_HELD, LOST_A_RANK, STOPPED, GateError, UserError

REPO = Path(__file__).parents[4]
SOURCES = '[[data.sources]]\nname = "text"\npath = "text.jsonl"\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two stages of 7 steps that write below tmp_path; the file of the last stage."""
    out = f'[job]\ndump_folder = "{tmp_path}/out/'
    (tmp_path / "a.toml").write_text(f'{out}a"\n[training]\nsteps = 7\n[lr_scheduler]\nwarmup_steps = 0\n{SOURCES}')
    (tmp_path / "b.toml").write_text(
        f'extends = "a.toml"\n{out}b"\n[stage]\nafter = "a.toml"\nsbatch = ["--nodes=8"]\n'
    )
    return tmp_path / "b.toml"


def end(folder: Path, loss: float = 2.0) -> None:
    """Write what a finished stage of 7 steps leaves."""
    checkpoint = folder / "checkpoint" / "step-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"format": MANIFEST_FORMAT, "step": 7}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 7, "loss": loss}) + "\n")


def test_pytorch_is_not_imported() -> None:
    program = "import sys, torchtitan.extensions.cluster.slurm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO).returncode == 0


def test_one_copy_of_the_model_per_node_unless_a_degree_is_set(tmp_path: Path) -> None:
    (tmp_path / "plain.toml").write_text(SOURCES)
    (tmp_path / "says.toml").write_text(f"[parallelism]\ndata_parallel_shard_degree = -1\n{SOURCES}")
    (tmp_path / "extends.toml").write_text('extends = "says.toml"\n')
    plain = ["--job.config_file", str(tmp_path / "plain.toml")]
    cp = "--parallelism.context_parallel_degree"
    added = ["--parallelism.data_parallel_replicate_degree", "4"]
    assert replicas(plain, 4, 8) == added
    assert replicas([*plain, cp, "8"], 4, 8) == added  # one row per node, the model sharded over its ranks
    assert replicas([*plain, cp, "16"], 4, 8) == []  # a row on two nodes
    assert replicas(plain, 1, 8) == []
    assert replicas([*plain, "--parallelism.data-parallel-replicate-degree=1"], 4, 8) == []
    for name in ("says", "extends"):
        assert replicas(["--job.config_file", str(tmp_path / f"{name}.toml")], 4, 8) == []


def test_start_says_how_to_train_or_why_not(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--job.config_file", str(recipe)]
    assert main(["start", "2", "4", *args]) == 0
    out = capsys.readouterr().out
    words = shlex.split(out.splitlines()[1].removeprefix("ARGUMENTS=(").removesuffix(")"))
    assert words == [*args, "--parallelism.data_parallel_replicate_degree", "2"]
    assert out.splitlines()[0] == f"DUMP_FOLDER={recipe.parent}/out/b"
    assert main(["start", "2", "3", *args, "--parallelism.tensor_parallel_degree", "4"]) == 1
    assert "= 4 does not divide 6 processes" in capsys.readouterr().err
    assert main(["start", "2", "4", *args, "--checkpoint.enable", "false"]) == 1
    end(recipe.parent / "out" / "b")
    assert main(["start", "2", "4", *args]) == ENDED
    back = [*args, "--checkpoint.load_step", "7"]  # after the start ("judge") the job has gone back already
    assert main(["start", "2", "4", *back]) == 0 and main(["judge", "2", "4", *back]) == ENDED
    recipe.write_text(recipe.read_text() + '[[stage.gates]]\nmetric = "loss"\nat_most = 1.0\n')
    assert main(["start", "2", "4", *args]) == GATE_NOT_HELD


@pytest.mark.parametrize(
    "error, code",
    [
        ("dist.DistBackendError('NCCL error: remote process exited or there was a network error')", LOST_A_RANK),
        ("RuntimeError('[..] Timed out waiting 10000ms for recv operation to complete')", LOST_A_RANK),
        ("GateError('loss is 3')", GATE_NOT_HELD),
        ("UserError('no file')", FAILED),
    ],
)
def test_the_exit_code_says_whose_fault_it_is(monkeypatch: pytest.MonkeyPatch, error: str, code: int) -> None:
    import torch.distributed as dist

    def failing(args: list[str]) -> None:
        raise eval(error, {"dist": dist, "GateError": GateError, "UserError": UserError})

    monkeypatch.setattr(train, "load_config", failing)
    assert train.main([]) == code


@pytest.mark.parametrize(
    ("code", "nodes", "asked", "stage", "expected"),
    [
        (0, [0, 0], False, ENDED, (0, "ended")),
        (0, [0], False, 0, (LOST_A_RANK, "lost")),  # srun returns 0 for a lost node
        (0, [0, 0], True, GATE_NOT_HELD, (GATE_NOT_HELD, "failed")),
        (143, [1, 143], False, 0, (1, "failed")),  # Slurm has then ended the other node
        (143, [LOST_A_RANK, 143], False, 0, (LOST_A_RANK, "lost")),
        (143, [LOST_A_RANK, 143], True, 0, (STOPPED, "asked")),
        (143, [143, 143], False, 0, (STOPPED, "asked")),  # preemption without a warning
        (143, [STOPPED, 143], False, 0, (STOPPED, "saved")),
        (137, [137], False, 0, (137, "lost")),
        (STOPPED, [], True, 0, (STOPPED, "asked")),  # before training began
        (2, [], False, 0, (2, "failed")),  # srun itself
    ],
)
def test_the_verdict_on_a_start(code, nodes, asked, stage, expected) -> None:
    assert verdict(code, nodes, asked, stage) == expected


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(REPO / "multinode" / "submit.sh"), "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_submit_chains_what_has_not_ended(recipe: Path) -> None:
    arguments = ["--job.config_file", str(recipe), "--job.description", "two words", "--", "--nodes=2"]
    both = [shlex.split(line) for line in dry_run(*arguments).stdout.splitlines()]
    assert [command[0] for command in both] == ["sbatch", "sbatch"]
    assert "--dependency=afterok:JOB_OF_a" in both[1] and "--kill-on-invalid-dep=yes" in both[1]
    assert not any(word.startswith("--dependency") for word in both[0])
    for command, name in zip(both, "ab"):
        script = command.index(str(REPO / "multinode" / "train.sbatch"))
        assert "--nodes=2" in command[:script] and "two words" in command[script:]
        assert f"--output={recipe.parent}/out/{name}/slurm/%j.log" in command
    assert "--nodes=8" not in both[0] and both[1].index("--nodes=8") < both[1].index("--nodes=2")
    end(recipe.parent / "out" / "a")
    (last,) = dry_run(*arguments).stdout.splitlines()
    assert "--job-name=b" in last and "--dependency" not in last
    back = [
        *arguments[:4],
        "--checkpoint.load_step",
        "2",
        *arguments[4:],
    ]  # a job goes back, although both stages ended
    assert len(dry_run(*back).stdout.splitlines()) == 2
    first = recipe.parent / "a.toml"  # a gate that does not hold: its job must say so, and stop the next job
    first.write_text(first.read_text() + '[[stage.gates]]\nmetric = "loss"\nat_most = 1.0\n')
    assert len(dry_run(*arguments).stdout.splitlines()) == 2
    end(recipe.parent / "out" / "b")  # it ended before its first stage: its own job must decide about that
    assert len(dry_run(*arguments).stdout.splitlines()) == 2


def test_an_evaluation_follows_each_stage_and_delays_none(recipe: Path) -> None:
    arguments = ["--job.config_file", str(recipe), "--evaluation.needle_lengths", "64", "--", "--nodes=2"]
    commands = [shlex.split(line) for line in dry_run("--evaluate=--nodes=1 --time=9", *arguments).stdout.splitlines()]
    scripts = {f"--job-name={name}": f"{kind}.sbatch" for name, kind in NAMES_AND_KINDS}
    assert [command[2] for command in commands] == list(scripts)
    after = [[word for word in command if word.startswith(("--dependency", "--kill"))] for command in commands]
    killed = "--kill-on-invalid-dep=yes"
    waits_for_a = ["--dependency=afterok:JOB_OF_a", killed]
    assert after == [[], waits_for_a, waits_for_a, ["--dependency=afterok:JOB_OF_b", killed]]
    for command, folder in zip(commands, "aabb"):
        at = command.index(str(REPO / "multinode" / scripts[command[2]]))
        trains = command[2] in ("--job-name=a", "--job-name=b")
        assert f"--output={recipe.parent}/out/{folder}/slurm/%j.log" in command[:at]
        assert ("--time=9" in command[:at]) != trains
        assert command[at:][-2:] == ["--evaluation.at_end", "false"] if trains else "--evaluation.at_end" not in command
        given = [word for word in command[:at] if word.startswith("--nodes")]
        assert given == ["--nodes=8"] * (folder == "b") + ["--nodes=2"] + ["--nodes=1"] * (not trains)


NAMES_AND_KINDS = [("a", "train"), ("a-evaluation", "evaluate"), ("b", "train"), ("b-evaluation", "evaluate")]


def test_only_what_is_missing_is_evaluated(recipe: Path) -> None:
    arguments = ["--evaluate", "--job.config_file", str(recipe), "--evaluation.needle_lengths", "64"]

    def submitted() -> dict[str, str]:
        """Jobs and what they wait for."""
        commands = [shlex.split(line) for line in dry_run(*arguments).stdout.splitlines()]
        after = (next((w for w in c if w.startswith("--dependency")), "").rpartition("_")[2] for c in commands)
        return {c[2].removeprefix("--job-name="): a for c, a in zip(commands, after, strict=True)}

    out = recipe.parent / "out"
    assert submitted() == {"a": "", "a-evaluation": "a", "b": "a", "b-evaluation": "b"}
    end(out / "a")
    (out / "a" / "evaluation").mkdir()
    (out / "a" / "evaluation" / "step-0.json").write_text("{}")  # of another checkpoint
    assert submitted() == {"a-evaluation": "", "b": "", "b-evaluation": "b"}
    (out / "a" / "evaluation" / "step-7.json").write_text("{}")  # of an older version: it does not say what was asked
    assert submitted() == {"a-evaluation": "", "b": "", "b-evaluation": "b"}
    asked = {"texts": [], "windows": [], "generate": False, "seed": 0}
    needles = {"lengths": [64], "depths": [0.0, 0.25, 0.5, 0.75, 1.0], "count": [[2] * 5]}
    result = {"asked": asked, "perplexity": {}, "tasks": {"needle": needles}}
    (out / "a" / "evaluation" / "step-7.json").write_text(json.dumps(result))
    assert submitted() == {"b": "", "b-evaluation": "b"}
    end(out / "b")
    assert submitted() == {"b-evaluation": ""}
    arguments[-1] = "128"
    assert "step-7.json answers other questions than [evaluation] asks now: delete it" in dry_run(*arguments).stderr
    (out / "a" / "evaluation" / "step-7.json").unlink()
    assert submitted() == {"a-evaluation": "", "b-evaluation": ""}


def test_an_evaluation_that_asks_nothing_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = dry_run("--evaluate", "--job.config_file", str(recipe))
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "stage a: Nothing to ask" in done.stderr
    assert "evaluation.texts" in done.stderr and "evaluation.needle_lengths" in done.stderr
    assert main(["evaluation", "2", "4", "--job.config_file", str(recipe)]) == 1
    assert "evaluation.needle_lengths" in capsys.readouterr().err


def test_an_evaluation_is_in_the_layout_of_training(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--step", "7", "--label", "two words"]
    args = ["--evaluation.needle_lengths", "64", *own, "--job.config_file", str(recipe)]
    assert main(["evaluation", "2", "4", *args]) == 0
    folder, words = capsys.readouterr().out.splitlines()
    assert folder == f"DUMP_FOLDER={recipe.parent}/out/b"
    words = shlex.split(words.removeprefix("ARGUMENTS=(").removesuffix(")"))
    assert words == [*args, "--parallelism.data_parallel_replicate_degree", "2"]
    model = ["--model", "m", "--out", "m.json", "--evaluation.needle_lengths", "64"]
    assert main(["evaluation", "1", "3", *model]) == 0
    assert main(["evaluation", "1", "3", *model, "--parallelism.context_parallel_degree", "2"]) == 1
    assert "= 2 does not divide 3 processes" in capsys.readouterr().err


def test_what_cannot_be_submitted(recipe: Path, tmp_path: Path) -> None:
    missing = dry_run("--job.config_file", str(tmp_path / "gone.toml"))
    assert missing.returncode == 1 and "gone.toml does not exist" in missing.stderr
    (tmp_path / "a.toml").unlink()
    missing = dry_run("--job.config_file", str(recipe))
    assert missing.returncode == 1 and "a.toml" in missing.stderr and "Traceback" not in missing.stderr
    for script in ("train.sbatch", "tokenize.sbatch", "evaluate.sbatch"):
        bare = subprocess.run([str(REPO / "multinode" / script)], capture_output=True, text=True, env={"PATH": "/bin"})
        assert bare.returncode == 1 and "sbatch" in bare.stderr
    empty = tmp_path / "bin"  # a machine without Slurm
    empty.mkdir()
    for tool in ("dirname", "readlink", "bash", "sed"):
        (empty / tool).symlink_to(f"/bin/{tool}" if Path(f"/bin/{tool}").exists() else f"/usr/bin/{tool}")
    submit = [str(REPO / "multinode" / "submit.sh"), "--job.config_file", str(recipe)]
    (tmp_path / "a.toml").write_text(f'[stage]\nsbatch = ["--nodes", "8"]\n{SOURCES}')
    loose = dry_run("--job.config_file", str(tmp_path / "a.toml"))
    assert loose.returncode == 1 and 'stage.sbatch has "8"' in loose.stderr
    outside = subprocess.run(submit, capture_output=True, text=True, env={"PATH": str(empty)})
    assert outside.returncode == 1 and "there is no sbatch" in outside.stderr
