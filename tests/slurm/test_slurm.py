"""A real Slurm cluster of twelve nodes on this machine (lab.sh), and jobs of multinode/, interrupted in every way.

The scenarios run side by side, as most of their time is waiting for Slurm; a test looks at what became of one. A run
is held in the middle of a step by SIGSTOP to one of its ranks until what should interrupt it has arrived, so that
nothing depends on how fast this machine is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import flags, write_assets
from tests.distributed.test_checkpoint import assert_equal, steps_of, tensors
from tests.slurm.chaos import torment
from tests.slurm.cluster import REPO, STEPS, Cluster, Run, until, why_no_cluster
from torchtitan.components.manifest import complete_steps
from torchtitan.tools.errors import GATE_NOT_HELD

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1800),
]

Facts = dict[str, Any]
SCENARIOS: dict[str, Callable[[Cluster, Path], Facts]] = {}


def scenario(function: Callable[[Cluster, Path], Facts]) -> Callable[[Cluster, Path], Facts]:
    SCENARIOS[function.__name__] = function
    return function


def facts(run: Run, job: str, **more: Any) -> Facts:
    state = run.cluster.ended(job)
    described = run.cluster.job(job)
    return {
        "run": run,
        "state": state,
        "restarts": int(described["Restarts"]),
        "exit": described["ExitCode"],
        "log": run.log.read_text(),
        **more,
    }


@scenario
def unbroken(cluster: Cluster, folder: Path) -> Facts:
    """Without Slurm: two processes on one machine; then the start of a stage that has ended."""
    run = Run(cluster, folder, "unbroken", parallelism__data_parallel_replicate_degree=2)
    command = [sys.executable, "-m", "torchtitan.extensions.cluster.launch", "--nproc", "2", "--", *run.arguments]
    done = cluster.run(*command, PYTHONPATH=str(REPO))
    assert done.returncode == 0, done.stderr
    again = cluster.run(
        *(REPO / "multinode" / "torchrun.sh", "--nnodes", "2", "--node-rank=0", "--master-addr", "localhost", "--"),
        *run.arguments,
    )
    job = run.submit("--nodes=2", "-w", "node1,node2")
    return facts(run, job, torchrun=again)


@scenario
def one_machine(cluster: Cluster, folder: Path) -> Facts:
    """Without Slurm: the two-stage recipe in one process."""
    run = Run(cluster, folder, "one_machine")
    arguments = ["--job.config_file", folder / "two.toml", *run.arguments[2:]]
    done = cluster.run(
        sys.executable, "-m", "torchtitan.extensions.cluster.chain", "1", *arguments, PYTHONPATH=str(REPO)
    )
    assert done.returncode == 0, done.stderr
    return {"run": run}


@scenario
def recipe(cluster: Cluster, folder: Path) -> Facts:
    """The two-stage recipe through submit.sh, from another folder; its first stage is requeued in between."""
    run = Run(cluster, folder, "recipe")
    submit = [REPO / "multinode" / "submit.sh", "--job.config_file", "two.toml", *run.arguments[2:]]
    options = ["--", "--nodes=2", "-w", "node1,node2"]
    dry = cluster.run(submit[0], "--dry-run", *submit[1:], *options, cwd=folder)
    done = cluster.run(*submit, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    jobs = done.stdout.split()
    first = folder / "recipe" / "stage" / "checkpoint"
    until(lambda: complete_steps(first), "the first checkpoint of the recipe", 0.02)
    cluster.ask("scontrol", "requeue", jobs[0])
    states = [cluster.ended(job) for job in jobs]
    return {"run": run, "dry": dry.stdout, "jobs": [cluster.job(job) for job in jobs], "states": states}


@scenario
def evaluated_recipe(cluster: Cluster, folder: Path) -> Facts:
    """The two-stage recipe with an evaluation after each stage; then of the first alone, whose results are lost."""
    run = Run(cluster, folder, "evaluated_recipe", training__steps=2)
    submit = [REPO / "multinode" / "submit.sh", "--evaluate=--time=20", "--job.config_file", folder / "two.toml"]
    submit += [*run.arguments[2:], "--evaluation.texts", folder / "text.jsonl", "--evaluation.length", 100]
    submit += ["--evaluation.max_documents", 3, "--evaluation.needle_lengths", 120, "--evaluation.needles", 1]

    def jobs() -> list[dict[str, str]]:
        done = cluster.run(*submit, "--", "--nodes=2", "-w", "node1,node2")
        assert done.returncode == 0, done.stderr
        numbers = done.stdout.split()
        assert [cluster.ended(job) for job in numbers] == ["COMPLETED"] * len(numbers), done.stderr
        return [cluster.job(job) for job in numbers]

    first = jobs()
    lost = run.out / "stage" / "evaluation" / "step-2.json"
    was = json.loads(lost.read_text())
    lost.unlink()
    return {"run": run, "jobs": first, "again": jobs(), "was": was}


@scenario
def failing_recipe(cluster: Cluster, folder: Path) -> Facts:
    """A first stage whose gate cannot hold."""
    run = Run(cluster, folder, "failing_recipe", training__steps=2)
    submit = [REPO / "multinode" / "submit.sh", "--job.config_file", folder / "gated_two.toml", *run.arguments[2:]]
    done = cluster.run(*submit, "--", "--nodes=2", "-w", "node1,node2")
    assert done.returncode == 0, done.stderr
    jobs = done.stdout.split()
    states = [cluster.ended(job) for job in jobs]
    log = (run.out / "gated" / "slurm" / f"{jobs[0]}.log").read_text()
    again = cluster.run(*submit, "--", "--nodes=2", "-w", "node1,node2").stdout.split()
    cluster.ended(again[0]), cluster.ended(again[1])
    second = (run.out / "gated" / "slurm" / f"{again[0]}.log").read_text()
    jobs_after = [cluster.job(job) for job in jobs]
    return {"run": run, "states": states, "jobs": jobs_after, "log": log, "second": second}


@scenario
def time_limit(cluster: Cluster, folder: Path) -> Facts:
    run = Run(cluster, folder, "time_limit")
    job = run.submit("--nodes=2", "-w", "node1,node2", "--time=60")
    with run.held():  # the time limit is now less than 300 s away: Slurm's warning is due
        cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=4")
        run.until(lambda: run.said("USR1: the trainers are asked"), "the warning of the time limit")
    run.until(lambda: cluster.job(job)["Restarts"] != "0", "the requeue")
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    return facts(run, job)


@scenario
def preempted(cluster: Cluster, folder: Path) -> Facts:
    """By a job of a higher partition: as configured here, then without Slurm's warning to the script; an evaluation."""
    where = ("-w", "node7,node8", "--nodes=2", "--cpus-per-task=16")
    plain = folder / "without_signal.sbatch"
    text = (REPO / "multinode" / "train.sbatch").read_text()
    plain.write_text(text.replace("#SBATCH --signal=B:USR1@300\n", ""))

    def trial(name: str, script: Path) -> Facts:
        run = Run(cluster, folder, name)
        job = run.submit("--partition=low", *where, script=script, TORCHTITAN_REPO=str(REPO))
        with run.held():
            high = cluster.sbatch("--partition=high", *where, "--output=/dev/null", "--wrap", "sleep 1")
            run.until(lambda: cluster.job(job).get("PreemptTime", "None") != "None", "the preemption")
            if name == "preempted":
                run.until(lambda: run.said("USR1: the trainers are asked"), "the warning of the preemption")
        assert cluster.ended(high) == "COMPLETED"
        return facts(run, job)

    def evaluation(out: Path) -> Facts:
        evaluate = REPO / "multinode" / "evaluate.sbatch"
        run = Run(cluster, folder, "preempted_evaluation", job__dump_folder=out, evaluation__needle_lengths=120)
        run.out = out
        job = run.submit("--partition=low", *where, script=evaluate)
        program = str(REPO / "scripts" / "evaluate.py")
        run.until(lambda: run.trainers(1, program), "a process that evaluates")
        for pid in (stopped := run.trainers(1, program)):
            os.kill(pid, signal.SIGSTOP)
        high = cluster.sbatch("--partition=high", *where, "--output=/dev/null", "--wrap", "sleep 1")

        def is_preempted() -> bool:
            now = cluster.job(job)  # a job that is back in the queue no longer says so
            return now["Restarts"] != "0" or now.get("PreemptTime", "None") != "None"

        run.until(is_preempted, "the preemption")
        with contextlib.suppress(ProcessLookupError):  # Slurm may have killed it already
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert cluster.ended(high) == "COMPLETED"
        return facts(run, job)

    trained = trial("preempted", REPO / "multinode" / "train.sbatch")
    return {
        "preempted": trained,
        "plain": trial("plain", plain),
        "evaluation": evaluation(trained["run"].out),
    }


@scenario
def dead_node(cluster: Cluster, folder: Path) -> Facts:
    run = Run(cluster, folder, "dead_node")
    job = run.submit("--nodes=2", "-w", "node3,node4")
    with run.held():
        cluster.lab("kill-node", "4")
        run.until(lambda: cluster.job(job)["Restarts"] != "0", "the requeue after a node's power loss")
    cluster.lab("start-node", "4")
    return facts(run, job)


@scenario
def dead_daemon(cluster: Cluster, folder: Path) -> Facts:
    run = Run(cluster, folder, "dead_daemon")
    job = run.submit("--nodes=2", "-w", "node5,node6")
    with run.held():
        cluster.lab("kill-slurmd", "6")
        run.until(lambda: cluster.job(job)["Restarts"] != "0", "the requeue after a node's slurmd was lost")
    until(lambda: not run.trainers(1), "the rank without a slurmd to end")
    cluster.lab("start-node", "6")
    return facts(run, job)


@scenario
def ghost(cluster: Cluster, folder: Path) -> Facts:
    """The only node's daemon is lost: the job starts on another node, while its old processes live on."""
    run = Run(cluster, folder, "ghost")
    job = run.submit("--nodes=1", "--exclude=node[1-8],node[11-12]")
    ghosts, node = run.stop(0), cluster.job(job)["BatchHost"]
    cluster.lab("kill-slurmd", node.removeprefix("node"))
    run.until(lambda: run.said("start 2"), "the second start")
    until(lambda: not set(ghosts) & set(run.trainers(0)), "the ghosts to end")
    result = facts(run, job, nodes=(node, cluster.job(job)["BatchHost"]))
    cluster.lab("start-node", node.removeprefix("node"))
    return result


@scenario
def killed_ranks(cluster: Cluster, folder: Path) -> Facts:
    """One rank is killed, then one hangs. Measures how long it takes until the job's step has ended."""
    timeout = 20
    run = Run(cluster, folder, "killed_ranks", comm__train_timeout_seconds=timeout)
    job = run.submit("--nodes=2", "-w", "node1,node2")
    run.stop()
    run.signal(1, signal.SIGKILL)
    killed_at, at = time.monotonic(), run.steps()[-1]
    run.until(lambda: run.said("killed (exit code"), "the end of a run with a dead rank", 0.05)
    noticed = time.monotonic() - killed_at
    run.stop(after=at + 1)
    stopped_at = time.monotonic()
    run.until(lambda: run.said("killed (exit code", 2), "the end of a run with a hanging rank", 0.05)
    return facts(run, job, killed=noticed, hung=time.monotonic() - stopped_at, timeout=timeout)


@scenario
def hopeless(cluster: Cluster, folder: Path) -> Facts:
    """At every start the first node loses a rank, and Slurm ends the other node. Submitted from within a job."""
    run = Run(cluster, folder, "hopeless")
    python = folder / "python"
    python.write_text(f"""#!{sys.executable}
import os, signal, sys, time
if "torchtitan.extensions.cluster.launch" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.argv[sys.argv.index("--node-rank") + 1] == "0":
        sys.exit(76)
    time.sleep(600)
os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
""")
    python.chmod(0o755)
    return facts(run, run.submit("--nodes=2", "-w", "node1,node2", PYTHON=str(python), SLURM_RESTART_COUNT="7"))


@scenario
def chaos(cluster: Cluster, folder: Path) -> Facts:
    """A short run of python -m tests.slurm.chaos."""
    torment(cluster, folder / "chaos", ("node11", "node12"), kills=2, seed=3, steps=400, pause=1.0)
    return {}


@scenario
def cancelled(cluster: Cluster, folder: Path) -> Facts:
    """Cancelled, and submitted again: on the same number of nodes, and a copy of its folder on one node."""
    run = Run(cluster, folder, "cancelled")
    job = run.submit("--nodes=2", "-w", "node1,node2")
    with run.held():
        second = Run(cluster, folder, "cancelled")
        other = second.submit("--nodes=2", "-w", "node1,node2")  # while the first is training into its folder
        refused = facts(second, other)
        cluster.ask("scancel", job)
    first = facts(run, job)
    until(lambda: not run.trainers(0) and not run.trainers(1), "the trainers to end")
    time.sleep(12)  # longer than a requeued job waits here
    first["later"] = cluster.job(job)["JobState"]
    fewer = Run(cluster, folder, "fewer")
    shutil.copytree(run.out, fewer.out)
    left = run.steps()
    jobs = run.submit("--nodes=1-2", "--exclude=node[3-12]"), fewer.submit("--nodes=1", "-w", "node2")
    first |= {"refused": refused, "left": left}
    return first | {"again": facts(run, jobs[0]), "fewer": facts(fewer, jobs[1])}


@scenario
def slow_node(cluster: Cluster, folder: Path) -> Facts:
    """Three nodes, one of which is held up 400 ms in every 401 while they are checked."""
    run = Run(cluster, folder, "slow_node")
    options = {"NODE_CHECK": "exclude", "NODE_CHECK_FACTOR": "5", "SPARE_NODES": "1"}
    job = run.submit("--nodes=3", "-w", "node[1-3]", **options)
    found: list[int] = []

    def is_connected() -> bool:
        found[:] = run.trainers(2, "torchtitan.extensions.cluster.node_check")
        with contextlib.suppress(OSError, IndexError):
            files = list(Path(f"/proc/{found[0]}/fd").iterdir())
            return any(os.readlink(file).startswith("socket:") for file in files)
        return False

    run.until(is_connected, "the check of the third node", 0.02)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(found[0], signal.SIGSTOP)
            time.sleep(0.4)
            os.kill(found[0], signal.SIGCONT)
            time.sleep(0.001)
    return facts(run, job)


@scenario
def bad_disk(cluster: Cluster, folder: Path) -> Facts:
    """Checkpoints on a small disk of one node: it fills up, and the run stops; it is read-only, and the run goes on."""
    run = Run(cluster, folder, "bad_disk", checkpoint__keep_latest_k=2, checkpoint__retry_seconds=1)
    checkpoints = run.out / "checkpoint"
    checkpoints.mkdir(parents=True)
    cluster.on_node(5, "mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", checkpoints)
    job = run.submit("--nodes=1", "-w", "node5")
    run.until(lambda: run.trainers_said(f"checkpoint: {checkpoints}/step-3"), "the third checkpoint", 0.02)
    cluster.on_node(5, "sh", "-c", f"cat /dev/zero >{checkpoints}/ballast || true")
    full = facts(run, job)
    listed = """import json, sys; from pathlib import Path
from torchtitan.components.manifest import complete_steps, find_damage
folder = Path(sys.argv[1])
print(json.dumps([[s, find_damage(folder / f"step-{s}")] for s in complete_steps(folder)]))"""

    def whole() -> list[list[Any]]:
        command = ["srun", "-w", "node5", sys.executable, "-c", listed, checkpoints]
        return json.loads(cluster.run(*command, PYTHONPATH=str(REPO)).stdout)

    full["whole"] = whole()
    cluster.on_node(5, "rm", checkpoints / "ballast")
    run.arguments += ["--checkpoint.on_failed_save", "go_on", "--checkpoint.save_retries", "1"]
    job = run.submit("--nodes=1", "-w", "node5")
    newest = full["whole"][-1][0]
    run.until(
        lambda: run.trainers_said(f"checkpoint: {checkpoints}/step-{newest + 1}"),
        "the first checkpoint after the full disk",
        0.02,
    )
    cluster.on_node(5, "sh", "-c", f"until mount -o remount,ro {checkpoints} 2>&-; do :; done")  # busy while written to
    run.until(lambda: run.trainers_said("Training goes on"), "a save on a read-only disk", 0.02)
    cluster.on_node(5, "mount", "-o", "remount,rw,size=64m", checkpoints)
    result = facts(run, job)
    copied = folder / "bad_disk_copy"
    cluster.on_node(5, "cp", "-r", checkpoints, copied)
    return result | {"full": full, "whole": whole(), "copied": copied}


@scenario
def plain_hosts(cluster: Cluster, folder: Path) -> Facts:
    """torchrun.sh on two nodes, started by srun in place of ssh."""
    run = Run(cluster, folder, "plain_hosts")
    script = REPO / "multinode" / "torchrun.sh"

    def host(rank: int) -> subprocess.CompletedProcess[str]:
        place = ("--nnodes", 2, f"--node-rank={rank}", "--master-addr", "node9", "--master-port=29511", "--")
        return cluster.run("srun", "-N1", "-n1", f"--nodelist=node{9 + rank}", script, *place, *run.arguments)

    with ThreadPoolExecutor(2) as hosts:
        done = list(hosts.map(host, (0, 1)))
    return {"run": run, "state": "COMPLETED", "log": done[0].stderr, "codes": [d.returncode for d in done]}


@scenario
def tokenized(cluster: Cluster, folder: Path) -> Facts:
    """The sources of the stage, tokenized by the tasks of a job array."""
    stage = folder / "tokenize.toml"
    own = f'[model]\nhf_assets_path = "{folder}/assets-llama"\n[data]\ncache_folder = "{folder}/own"\n'
    stage.write_text(f'extends = "stage.toml"\n{own}')
    script = REPO / "multinode" / "tokenize.sbatch"
    options = ("--wait", "--array=3-4", f"--output={folder}/tokenize-%a.log", "-w", "node1")
    done = cluster.run("sbatch", *options, script, "--config-file", stage)
    logs = [(folder / f"tokenize-{task}.log").read_text() for task in (3, 4)]
    return {"code": done.returncode, "logs": logs, "folder": folder / "own"}


@scenario
def bad_input(cluster: Cluster, folder: Path) -> Facts:
    run = Run(cluster, folder, "bad")
    result: Facts = {"outside": cluster.run(REPO / "multinode" / "train.sbatch", *run.arguments)}
    submit = REPO / "multinode" / "submit.sh"
    (folder / "lost.toml").write_text('extends = "stage.toml"\n[stage]\nafter = "gone.toml"\n')
    result["missing"] = cluster.run(submit, "--job.config_file", folder / "lost.toml")
    jobs = {
        "head": (Run(cluster, folder, "head"), ("--nodes=2",), {"MASTER_HOST": "no-such-host"}),
        "gpus": (Run(cluster, folder, "gpus"), ("--nodes=2", "--gpus-per-node=2"), {"NGPU": "3"}),
        "degrees": (
            Run(cluster, folder, "degrees", parallelism__context_parallel_degree=3),
            ("--nodes=2", "--gpus-per-node=2"),
            {},
        ),
        "text": (Run(cluster, folder, "text", data__sources__0__path="/nowhere/*.jsonl"), ("--nodes=2",), {}),
    }
    numbers = {name: (r, r.submit(*options, "-w", "node1,node2", **e)) for name, (r, options, e) in jobs.items()}
    for name, (r, number) in numbers.items():
        result[name] = facts(r, number)
        logs = sorted((r.out / "slurm").glob("*-node*.log"))
        result[name]["log"] += "".join(log.read_text() for log in logs)
    return result


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Facts]]]:
    if reason := why_no_cluster():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    write_assets(folder)
    flags(folder, folder / "assets-llama")
    (folder / "two.toml").write_text(
        'extends = "stage.toml"\n[stage]\nafter = "stage.toml"\n[training]\nseq_len = 256\n[rope]\ntheta = "auto"\n'
    )
    gate = '[[stage.gates]]\nmetric = "loss"\nover = 1\nat_most = 0.1\n'
    (folder / "gated.toml").write_text(f'extends = "stage.toml"\n{gate}')
    (folder / "gated_two.toml").write_text('extends = "two.toml"\n[stage]\nname = "last"\nafter = "gated.toml"\n')
    cluster = Cluster(folder / "lab")
    pool = ThreadPoolExecutor(int(os.environ.get("SLURM_TESTS_AT_ONCE", "6")))
    cluster.lab("up")
    try:
        yield {name: pool.submit(function, cluster, folder) for name, function in SCENARIOS.items()}
    finally:
        pool.shutdown(cancel_futures=True)
        cluster.run("scancel", "--user=root")
        cluster.lab("down")


def check_whole(outcomes: dict[str, Future[Facts]], outcome: Facts, reference: str = "unbroken") -> None:
    """It ended well, each start went on from the newest checkpoint, and its end equals that of an unbroken run."""
    run = outcome["run"]
    assert outcome["state"] == "COMPLETED", outcome["log"]
    assert run.steps() == list(range(1, STEPS + 1))
    out = outcomes[reference].result()["run"].out
    out = out / "stage" if reference == "one_machine" else out
    assert_equal(tensors(run.out / "checkpoint" / f"step-{STEPS}"), tensors(out / "checkpoint" / f"step-{STEPS}"))
    assert run.losses() == [numbers["loss"] for numbers in steps_of(out).values()]


def test_a_recipe_runs_in_order_with_the_losses_of_one_machine(outcomes: dict[str, Future[Facts]]) -> None:
    outcome, alone = outcomes["recipe"].result(), outcomes["one_machine"].result()["run"].out
    first, second = outcome["jobs"]
    assert outcome["states"] == ["COMPLETED", "COMPLETED"] and int(first["Restarts"]) >= 1
    assert first["EndTime"] <= second["StartTime"]
    for stage in ("stage", "two"):
        expected = [numbers["loss"] for numbers in steps_of(alone / stage).values()]
        actual = [numbers["loss"] for numbers in steps_of(outcome["run"].out / stage).values()]
        assert len(expected) == STEPS and actual == pytest.approx(expected, rel=1e-5)
    commands = outcome["dry"].splitlines()
    assert len(commands) == 2 and "--dependency" not in commands[0]
    assert "--dependency=afterok:JOB_OF_stage --kill-on-invalid-dep=yes" in commands[1]


def test_each_stage_is_evaluated_behind_it(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["evaluated_recipe"].result()
    assert [job["JobName"] for job in outcome["jobs"]] == ["stage", "stage-evaluation", "two", "two-evaluation"]
    for trained, evaluated in zip(outcome["jobs"][::2], outcome["jobs"][1::2]):
        assert trained["EndTime"] <= evaluated["StartTime"] and evaluated["NumNodes"] == "2"
        folder = outcome["run"].out / trained["JobName"]
        found = json.loads((folder / "evaluation" / "step-2.json").read_text())
        assert found["label"] == f"{trained['JobName']}, step 2" and found["world_size"] == 2
        text, needle = found["perplexity"]["text"], found["tasks"]["needle"]
        assert text["count"] == [300] and 0 < text["mean_nll"] < 20 and needle["lengths"] == [120]
        log = (folder / "slurm" / f"{trained['JobId']}-node0.log").read_text()
        assert "evaluation after step 0" in log and "evaluation after step 2" not in log  # a separate job
    assert [job["JobName"] for job in outcome["again"]] == ["stage-evaluation"]
    again = json.loads((outcome["run"].out / "stage" / "evaluation" / "step-2.json").read_text())
    assert again["perplexity"] == outcome["was"]["perplexity"] and again["tasks"] == outcome["was"]["tasks"]


def test_a_stage_that_fails_stops_the_chain(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["failing_recipe"].result()
    assert outcome["states"] == ["FAILED", "CANCELLED"]
    assert outcome["jobs"][0]["ExitCode"] == f"{GATE_NOT_HELD}:0" and outcome["jobs"][0]["Restarts"] == "0"
    assert outcome["jobs"][1]["Reason"] == "DependencyNeverSatisfied"
    assert "gate of stage gated does not hold" in outcome["log"] and "at_most = 0.1" in outcome["log"]
    assert "gate of stage gated does not hold" in outcome["second"] and "training;" not in outcome["second"]
    assert not (outcome["run"].out / "last" / "checkpoint").exists()


@pytest.mark.parametrize("name", ["time_limit", "dead_node", "dead_daemon"])
def test_it_is_requeued_and_ends_as_if_nothing_had_been(outcomes: dict[str, Future[Facts]], name: str) -> None:
    outcome = outcomes[name].result()
    check_whole(outcomes, outcome)
    assert outcome["restarts"] >= 1 and len(outcome["run"].resumed_from()) >= 1
    assert outcome["run"].resumed_from()[0] >= 3
    if name == "time_limit":
        assert "asked to stop; what was done is saved" in outcome["log"]


@pytest.mark.parametrize("name", ["preempted", "plain"])
def test_preempted_it_saves_and_comes_back(outcomes: dict[str, Future[Facts]], name: str) -> None:
    outcome = outcomes["preempted"].result()[name]
    check_whole(outcomes, outcome)
    assert outcome["restarts"] >= 1 and "asked to stop; what was done is saved" in outcome["log"]
    assert ("USR1: the trainers are asked" in outcome["log"]) == (name == "preempted")


def test_a_preempted_evaluation_comes_back(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["preempted"].result()["evaluation"]
    assert outcome["state"] == "COMPLETED" and outcome["restarts"] >= 1, outcome["log"]
    assert "preempted: back into the queue" in outcome["log"] and "error: exit code" not in outcome["log"]
    found = json.loads((outcome["run"].out / "evaluation" / f"step-{STEPS}.json").read_text())
    assert found["tasks"]["needle"]["lengths"] == [120]


def test_a_start_that_slurm_has_given_up_does_not_go_on(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["ghost"].result()
    check_whole(outcomes, outcome, "one_machine")
    assert outcome["nodes"][0] != outcome["nodes"][1] and outcome["restarts"] >= 1


def test_a_dead_or_hanging_rank_ends_the_run_in_time_and_it_comes_back(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["killed_ranks"].result()
    check_whole(outcomes, outcome)
    print(f"dead rank: {outcome['killed']:.1f} s, hanging rank: {outcome['hung']:.1f} s of {outcome['timeout']} s")
    assert outcome["restarts"] >= 2 and len(outcome["run"].resumed_from()) >= 2
    assert outcome["killed"] < 60 and outcome["hung"] < outcome["timeout"] + 60


def test_what_loses_a_rank_at_every_start_is_given_up(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["hopeless"].result()
    assert outcome["state"] == "FAILED" and outcome["exit"] == "76:0" and outcome["restarts"] == 2, outcome["log"]
    assert outcome["log"].count("killed (exit code 76)") == 3 and "it makes no progress" in outcome["log"]


def test_random_kills_lose_nothing(outcomes: dict[str, Future[Facts]]) -> None:
    outcomes["chaos"].result()  # the scenario checks its run itself


def test_cancelled_it_stays_so_until_it_is_submitted_again(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["cancelled"].result()
    assert outcome["state"] == outcome["later"] == "CANCELLED" and outcome["restarts"] == 0
    assert outcome["again"]["restarts"] == 0
    check_whole(outcomes, outcome["again"])
    assert outcome["again"]["run"].resumed_from() == [outcome["left"][-1]]


def test_two_jobs_do_not_train_into_one_folder(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["cancelled"].result()["refused"]
    assert outcome["state"] == "FAILED" and "is training this stage into" in outcome["log"]


def test_on_one_node_instead_of_two_the_rows_and_losses_are_the_same(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["cancelled"].result()
    fewer = outcome["fewer"]["run"]
    assert outcome["fewer"]["state"] == "COMPLETED" and fewer.resumed_from()[-1] == outcome["left"][-1]
    assert fewer.losses() == pytest.approx(outcomes["unbroken"].result()["run"].losses(), rel=1e-5)
    worlds = [json.loads((fewer.out / "checkpoint" / f"step-{s}" / "manifest.json").read_text()) for s in (1, STEPS)]
    assert [w["world_size"] for w in worlds] == [2, 1]
    assert worlds[0]["plan"] == worlds[1]["plan"]


def test_a_node_that_the_check_finds_slow_is_left_out(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["slow_node"].result()
    assert "slow or broken: node3 (another time: sbatch --exclude=node3)" in outcome["log"]
    report = json.loads(next((outcome["run"].out / "slurm").glob("node_check-*.json")).read_text())
    assert list(report["slow"]) == ["node3"] and any("matrix product" in reason for reason in report["slow"]["node3"])
    assert "2 of the 3 nodes can share this stage's work" in outcome["log"]
    check_whole(outcomes, outcome)


def test_a_full_disk_stops_a_run_and_a_read_only_one_does_not_if_so_wished(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["bad_disk"].result()
    full = outcome["full"]
    assert full["state"] == "FAILED" and full["restarts"] == 0 and "[Errno 28]" in full["log"]
    assert full["whole"] and all(damage is None for _, damage in full["whole"] + outcome["whole"])
    assert outcome["state"] == "COMPLETED" and outcome["whole"][-1][0] == STEPS
    alone = outcomes["one_machine"].result()["run"].out / "stage"
    assert outcome["run"].losses() == [numbers["loss"] for numbers in steps_of(alone).values()]
    assert_equal(*(tensors(path / f"step-{STEPS}") for path in (outcome["copied"], alone / "checkpoint")))


def test_a_stage_that_has_ended_is_not_trained_again(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["unbroken"].result()
    assert outcome["state"] == "COMPLETED" and "nothing to do" in outcome["log"] and "training;" not in outcome["log"]
    assert outcome["torchrun"].returncode == 0 and "nothing to do" in outcome["torchrun"].stderr


def test_plain_hosts_train_the_same(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["plain_hosts"].result()
    assert outcome["codes"] == [0, 0], outcome["log"]
    check_whole(outcomes, outcome)


def test_an_array_tokenizes(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["tokenized"].result()
    assert outcome["code"] == 0, outcome["logs"]
    said = re.findall(r"text: 120 documents, ([\d,]+) tokens in (.*)", "".join(outcome["logs"]))
    assert said and Path(said[-1][1]).is_relative_to(outcome["folder"]), outcome["logs"]


def test_bad_input(outcomes: dict[str, Future[Facts]]) -> None:
    outcome = outcomes["bad_input"].result()
    assert outcome["outside"].returncode == 1 and "this is a Slurm job" in outcome["outside"].stderr
    assert outcome["missing"].returncode == 1 and "gone.toml, which does not exist" in outcome["missing"].stderr
    expected = {
        "head": "the name no-such-host does not resolve on node",
        "gpus": "NGPU=3 processes per node, but the allocation has 2 GPUs per node",
        "degrees": "context_parallel_degree 3",
        "text": "/nowhere/",
    }
    for name, words in expected.items():
        assert outcome[name]["state"] == "FAILED" and outcome[name]["restarts"] == 0, name
        assert words in outcome[name]["log"] and "Traceback" not in outcome[name]["log"], name
