"""Stages: what is carried to the next on other layouts, what is refused, chains that are killed, gates."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.distributed.harness import flags, spawn, write_assets
from torchtitan.components.changes import differences
from torchtitan.components.manifest import complete_steps, has_ended, read_manifest
from torchtitan.components.start import find_start
from torchtitan.config import load_config
from torchtitan.config.schema import Gate, JobConfig, Stage
from torchtitan.extensions.cluster.chain import run_chain
from torchtitan.extensions.cluster.check_config import main as config_main
from torchtitan.extensions.cluster.gates import failed_gate, gate_failure
from torchtitan.extensions.cluster.stages import chain
from torchtitan.extensions.convert.weights import open_checkpoint, open_hugging_face
from torchtitan.extensions.wiring import build_trainer, check, inputs_of
from torchtitan.models.architecture import as_json
from torchtitan.models.hf.config_in import read_config
from torchtitan.tools.errors import UserError
from torchtitan.trainer import Trainer

SECOND = """
extends = "stage.toml"
[stage]
name = "two"
after = "stage.toml"
[rope]
theta = "auto"
[training]
seq_len = 256
steps = 3
[optimizer]
lr = 5e-4
[lr_scheduler]
warmup_steps = 1
"""
THIRD = """
extends = "two.toml"
[stage]
name = "three"
after = "two.toml"
[training]
seq_len = 512
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    write_assets(folder)  # whose length, Llama's 2,048, is not what random weights are trained to
    flags(folder, folder / "assets-llama")  # writes stage.toml
    (folder / "two.toml").write_text(SECOND)
    (folder / "three.toml").write_text(THIRD)
    return folder


def stage(folder: Path, file: str, out: str, after: str | None = None, **overrides: Any) -> list[str]:
    """Command line of a stage that writes to `out` and comes after what is in the folder `after`."""
    args = flags(folder, folder / "assets-llama", job__dump_folder=folder / out, **overrides)
    args[1] = str(folder / file)
    args += ["--checkpoint.enable", "true"]
    return args + (["--stage.after_dump_folder", str(folder / after)] if after else [])


def run(args: list[str], rank: int, world_size: int) -> dict[str, Any]:
    """Train; losses and the optimizer's state before the first step."""
    config = load_config(args)
    trainer = build_trainer(config, rank, rank, world_size)
    before = trainer.state()["optimizer"]
    exp_avg = float(sum(v.full_tensor().double().abs().sum() for k, v in before.items() if k.endswith("exp_avg")))
    adam_step = float(next(v for k, v in before.items() if k.endswith(".step")))
    losses = []
    step = trainer.train_step

    def recorded() -> Any:
        result = step()
        losses.append(result["loss"])
        return result

    trainer.train_step = recorded  # type: ignore[method-assign]
    trainer.train()
    tokens, theta = trainer.tokens_seen, trainer.inputs.args.rope.theta
    trainer.close()
    return {"losses": losses, "exp_avg": exp_avg, "adam_step": adam_step, "tokens": tokens, "theta": theta}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Stage 1 on 2 ranks, 2 on 4, 3 on 1; and all three on 1 rank."""
    (one,) = spawn(2, run, [[*stage(folder, "stage.toml", "one"), "--checkpoint.last_save_in_hf"]], folder)
    cp = {"parallelism__context_parallel_degree": 2, "training__local_batch_size": 1}
    two, bare = spawn(
        4,
        run,
        [
            stage(folder, "two.toml", "two", "one", **cp),
            [*stage(folder, "two.toml", "two-bare", "one", **cp), "--stage.carry", "model"],
        ],
        folder,
    )
    cases = {
        "three": stage(folder, "three.toml", "three", "two"),
        "oracle one": stage(folder, "stage.toml", "o1"),
        "oracle two": stage(folder, "two.toml", "o2", "o1"),
        "oracle bare": [*stage(folder, "two.toml", "o2-bare", "o1"), "--stage.carry", "model"],
        "oracle three": stage(folder, "three.toml", "o3", "o2"),
        "elsewhere": [
            *stage(folder, "stage.toml", "e", checkpoint__initial_load_path=folder / "o1" / "checkpoint"),
            *("--checkpoint.exclude_from_loading", "optimizer", "--training.seq_len", "256", "--training.steps", "3"),
            *("--optimizer.lr", "5e-4", "--lr_scheduler.warmup_steps", "1", "--training.global_batch_size", "4"),
            *("--rope.theta", "auto"),
        ],
    }
    alone = dict(zip(cases, spawn(1, run, list(cases.values()), folder), strict=True))
    return {"one": one, "two": two, "bare": bare} | alone


def test_a_chain_over_2_4_and_1_ranks_is_that_of_one_process(runs: dict[str, dict[str, Any]]):
    for name in ("one", "two", "bare", "three"):
        assert runs[name]["losses"] == pytest.approx(runs[f"oracle {name}"]["losses"], rel=1e-5), name
    assert runs["two"]["losses"][0] == pytest.approx(runs["bare"]["losses"][0], rel=1e-6), "the same weights"
    assert runs["two"]["losses"][-1] != pytest.approx(runs["bare"]["losses"][-1], rel=1e-5), "another optimizer state"


def test_the_optimizer_is_carried_only_where_asked(runs: dict[str, dict[str, Any]]):
    assert runs["one"]["exp_avg"] == 0 and runs["bare"]["exp_avg"] == 0 and runs["bare"]["adam_step"] == 0
    assert runs["two"]["exp_avg"] > 0 and runs["two"]["adam_step"] == 4
    assert runs["three"]["adam_step"] == 4 + 3


def test_a_checkpoint_from_elsewhere_without_its_optimizer_is_the_bare_stage(runs: dict[str, dict[str, Any]]):
    assert runs["elsewhere"]["losses"] == runs["oracle bare"]["losses"]


def test_theta_follows_and_the_batch_keeps_its_tokens(folder: Path, runs: dict[str, dict[str, Any]]):
    """head_dim 16: theta * 2^(16/14) a stage; 8 rows of 128, then 4 of 256, then 2 of 512."""
    assert runs["two"]["theta"] == pytest.approx(1e4 * 2 ** (16 / 14))
    assert runs["three"]["theta"] == pytest.approx(1e4 * 4 ** (16 / 14))
    for name, rows in (("two", 4), ("three", 2)):
        plan = json.loads((folder / name / "plan.json").read_text())
        assert plan["tokens"] + plan["padding_tokens"] == 3 * 1024
        assert read_manifest(folder / name / "checkpoint" / "step-3")["plan"]["rows_per_step"] == rows


def test_the_manifest_holds_the_lineage(folder: Path, runs: dict[str, dict[str, Any]]):
    manifest = read_manifest(folder / "three" / "checkpoint" / "step-3")
    before = manifest["stages_before"]
    assert [s["stage"] for s in before] == ["stage", "two"] and [s["seq_len"] for s in before] == [128, 256]
    assert [s["tokens_seen"] for s in before] == [runs["one"]["tokens"], runs["two"]["tokens"]]
    assert manifest["config"]["training"]["seq_len"] == 512


def test_the_export_at_the_end_of_a_stage_is_its_model(folder: Path, runs: dict[str, dict[str, Any]]):
    """Written by two ranks; in bfloat16, as checkpoint.export_dtype says."""
    args = read_config(folder / "one" / "export" / "step-4")
    exported, checkpoint = (open_hugging_face(folder / "one" / "export" / "step-4"), folder / "one" / "checkpoint")
    saved = open_checkpoint(checkpoint / "step-4").cast("bfloat16")
    assert args.rope == saved.args.rope and args.rope.max_position_embeddings == 128
    assert exported.shapes == saved.shapes
    assert all(torch.equal(exported.read(name), saved.read(name)) for name in saved.shapes)
    assert (folder / "one" / "export" / "step-4" / "tokenizer.json").is_file()
    harpe = ["--rope.type", "harpe", "--rope.bases", "1000", "1000000", "--checkpoint.last_save_in_hf"]
    assert "harpe" in refusal([*stage(folder, "stage.toml", "x"), *harpe])


def test_the_printed_difference(folder: Path, runs: dict[str, dict[str, Any]]):
    args = [*stage(folder, "two.toml", "fresh", "one"), "--parallelism.tensor_parallel_degree", "2"]
    config = load_config([*args, "--data.sources.0.min_length", "5"])
    inputs = inputs_of(config, 2)
    assert inputs.start is not None and inputs.start.manifest is not None
    lines = differences(inputs.start.manifest, config, as_json(inputs.args))
    for expected in (
        "rope.theta 10000 -> 22081.8",
        "training.seq_len 128 -> 256",
        "optimizer.lr 0.001 -> 0.0005",
        "parallelism.tensor_parallel_degree 1 -> 2",
        "data source text: 100.0% -> 100.0%, min_length 5",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)
    assert not any("dump_folder" in line or "log_freq" in line for line in lines)


def refusal(args: list[str]) -> str:
    config = load_config(args)
    with pytest.raises(UserError) as error:
        check(config, 1)
        inputs_of(config, 1)
    return str(error.value)


def edited(folder: Path, out: str, edit: Any) -> str:
    """A copy of stage 1's folder whose manifest is changed."""
    shutil.copytree(folder / "one", folder / out)
    path = folder / out / "checkpoint" / "step-4" / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    return out


def test_what_cannot_follow_is_refused(folder: Path, runs: dict[str, dict[str, Any]]):
    two = "two.toml"
    message = refusal(stage(folder, two, "x", "nowhere"))
    assert "no complete checkpoint" in message and f"{folder}/nowhere/checkpoint/step-N" in message
    (folder / "half" / "checkpoint" / "step-2.partial").mkdir(parents=True)
    assert "step-2.partial, which are not complete" in refusal(stage(folder, two, "x", "half"))
    not_ended = edited(folder, "not-ended", lambda m: m["config"]["training"].update(steps=9))
    assert "of step 4 of 9" in refusal(stage(folder, two, "x", not_ended))
    other = edited(folder, "other", lambda m: m["architecture"].update(dim=96))
    assert "dim 96 -> 64" in refusal(stage(folder, two, "x", other))
    other = edited(folder, "tokens", lambda m: m.update(tokenizer="0" * 16))
    assert "another tokenizer" in refusal(stage(folder, two, "x", other))

    def rope(name: str, **changes: Any) -> str:
        return edited(folder, name, lambda m: m["architecture"]["rope"].update(changes))

    yarn = ["--rope.type", "yarn", "--rope.factor", "3", "--rope.original_max_position_embeddings", "64"]
    had = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    scaled, raised = rope("scaled", scaling=had), rope("raised", theta=8e6)
    assert "yarn: factor 8" in refusal([*stage(folder, two, "x", scaled), *yarn])
    lost = refusal([*stage(folder, two, "x", scaled), "--rope.theta", "10001"])
    assert "the slowest pair turned once" in lost and 'rope.type = "model"' in lost
    assert "(theta 8e+06 -> theta 10000)" in refusal([*stage(folder, two, "x", raised), "--rope.theta", "1e4"])
    assert "stage.after" in refusal([*stage(folder, two, "x", "one"), "--stage.after", str(folder / "no.toml")])
    assert "rope.original_max_position_embeddings, which is not set" in refusal(
        [*stage(folder, two, "x", "one"), "--rope.type", "yarn", "--rope.factor", "4"]
    )
    damaged = edited(folder, "damaged", lambda m: None)
    next((folder / damaged / "checkpoint" / "step-4").glob("*.distcp")).unlink()
    assert "is missing" in refusal(stage(folder, two, "x", damaged))


def test_a_hugging_face_start_is_compared_with_its_config_json(folder: Path, runs: dict[str, dict[str, Any]]):
    """Its RoPE and architecture, which the shapes of the weights do not show."""
    exported = folder / "one" / "export" / "step-4"
    base = stage(folder, "stage.toml", "x", checkpoint__initial_load_path=exported)
    inputs_of(load_config(base), 1)
    config = json.loads((exported / "config.json").read_text())
    raised = folder / "raised-hf"
    shutil.copytree(exported, raised)
    (raised / "config.json").write_text(json.dumps(config | {"rope_theta": 8e6, "rope_parameters": None}))
    assert "theta 8e+06 -> theta 10000" in refusal(
        stage(folder, "stage.toml", "x", checkpoint__initial_load_path=raised)
    )
    (raised / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert "norm_eps 0.001 -> " in refusal(stage(folder, "stage.toml", "x", checkpoint__initial_load_path=raised))


def test_a_run_from_hugging_face_weights_is_resumed_with_their_rope(folder: Path, runs: dict[str, dict[str, Any]]):
    """Longer weights than the model's assets and the rows: on resume that can be read in the run's manifest alone."""
    longer = folder / "longer-hf"
    shutil.copytree(folder / "one" / "export" / "step-4", longer)
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    args = stage(folder, "stage.toml", "from-hf", checkpoint__initial_load_path=longer, training__steps=2)
    args += ["--rope.theta", "auto"]
    fresh = inputs_of(load_config(args), 1).args
    assert fresh.rope.max_position_embeddings == 512
    spawn(1, run, [args], folder)
    shutil.rmtree(longer)
    resumed = inputs_of(load_config([*args, "--training.steps", "4"]), 1)
    assert resumed.args == fresh and resumed.start is None


def test_a_run_of_an_older_version_is_resumed_with_the_length_that_it_said(
    folder: Path, runs: dict[str, dict[str, Any]]
):
    """It counted the length of the published model for random weights too."""
    older = edited(folder, "older", lambda m: m["architecture"]["rope"].update(max_position_embeddings=2048))
    resumed = inputs_of(load_config(stage(folder, "stage.toml", older, training__steps=9)), 1)
    assert resumed.args.rope.max_position_embeddings == 2048 and resumed.start is None


def out_of_step(of_rank: list[list[str]], rank: int, world_size: int) -> str:
    """What a rank is told that has other files than the other; of_rank: the command line of each."""
    config = load_config(of_rank[rank])
    inputs = inputs_of(config, world_size)
    try:
        Trainer(config, inputs, rank, rank, world_size)
    except UserError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


def test_ranks_that_read_other_files_are_not_trained_together(folder: Path, runs: dict[str, dict[str, Any]]):
    """Other data; and two nodes' copies of a model with the same names and shapes."""
    args = stage(folder, "stage.toml", "apart")
    data = [[*args, "--training.seed", str(rank)] for rank in range(2)]
    copies = [folder / "node-0", folder / "node-1"]
    for copy in copies:
        shutil.copytree(folder / "one" / "export" / "step-4", copy)
    tensors = {name: tensor + 1 for name, tensor in load_file(copies[1] / "model.safetensors").items()}
    save_file(tensors, copies[1] / "model.safetensors", {"format": "pt"})
    from_hf = [*args, "--checkpoint.initial_load_in_hf", "true", "--model.hf_assets_path"]
    told, told_of_weights = spawn(2, out_of_step, [data, [[*from_hf, str(copy)] for copy in copies]], folder)
    assert "The ranks do not agree on the plan of the data: rank 0 has" in told and "(1 of 2 differ" in told
    assert "The ranks do not agree on the weights in the Hugging Face folder: rank 0 has" in told_of_weights


def test_a_stage_is_found_where_its_run_wrote(folder: Path, runs: dict[str, dict[str, Any]]):
    """With overrides that the TOML file does not know: config.toml in the dump folder has them."""
    shutil.copytree(folder / "one", folder / "moved")
    (folder / "moved" / "checkpoint").rename(folder / "moved" / "ck")
    path = folder / "moved" / "config.toml"
    path.write_text(path.read_text().replace('folder = "checkpoint"', 'folder = "ck"'))
    inputs = inputs_of(load_config(stage(folder, "two.toml", "x", "moved")), 1)
    assert inputs.start is not None and inputs.start.path == folder / "moved" / "ck" / "step-4"


def test_initial_load_path_says_what_it_found(folder: Path, runs: dict[str, dict[str, Any]]):
    def message(path: Path) -> str:
        return refusal(stage(folder, "stage.toml", "x", checkpoint__initial_load_path=path))

    (folder / "empty").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / ".metadata").touch()
    assert "is not a folder" in message(folder / "nothing")
    assert "neither a checkpoint" in message(folder / "empty")
    assert "scripts/convert.py" in message(folder / "foreign")
    elsewhere = stage(folder, "stage.toml", "x", checkpoint__initial_load_path=folder / "one" / "checkpoint")
    for more, parts in (([], ("model", "optimizer")), (["--stage.carry", "model"], ("model",))):
        start = find_start(load_config([*elsewhere, *more]))
        assert start is not None and start.parts == parts


def test_chains(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def write(name: str, text: str) -> Path:
        (tmp_path / f"{name}.toml").write_text(text)
        return tmp_path / f"{name}.toml"

    write("a", '[job]\ndump_folder = "out/a"\n')
    write("b", '[job]\ndump_folder = "out/b"\n[stage]\nafter = "a.toml"\n')
    c = write("c", 'extends = "b.toml"\n[job]\ndump_folder = "out/c"\n[stage]\nafter = "b.toml"\n')
    stages = chain(["--job.config_file", str(c), "--training.steps", "7", "--stage.run_chain"])
    assert [s.config.stage.name for s in stages] == ["a", "b", "c"]
    assert [s.config.training.steps for s in stages] == [7, 7, 7]
    assert [s.config.stage.after_dump_folder for s in stages] == [None, "out/a", "out/b"]
    stages = chain(["--job.config_file", str(c), "--job.dump_folder=x"])
    assert [s.config.job.dump_folder for s in stages] == ["x/a", "x/b", "x/c"]
    assert stages[2].config.stage.after_dump_folder == "x/b"
    assert config_main(["1", "--job.config_file", str(c), "--stage.run_chain"]) == 1  # a has nothing to train on
    assert "There is nothing to train on" in capsys.readouterr().err
    for key in ("stage.name", "stage.after_dump_folder"):  # neither dropped without a word nor given to every stage
        with pytest.raises(UserError, match=f"--{key} is .* of one stage, .*c.toml is the last of a chain of 3"):
            chain(["--job.config_file", str(c), f"--{key}", "x"])
    (alone,) = chain(["--job.config_file", str(c), "--stage.after", ""])
    assert not alone.config.stage.after and not alone.config.stage.after_dump_folder
    write("a", '[stage]\nafter = "c.toml"\n')
    with pytest.raises(UserError, match="circle: .*a.toml -> .*b.toml -> .*c.toml"):
        chain(["--job.config_file", str(c)])
    tokens = "[training]\nglobal_batch_tokens = 4096\n"
    x, _ = write("x", tokens + '[stage]\nafter = "y.toml"\n'), write("y", tokens + '[stage]\nafter = "x.toml"\n')
    with pytest.raises(UserError, match="circle"):
        load_config(["--job.config_file", str(x)])
    write("a", '[job]\ndump_folder = "out/b"\n')
    with pytest.raises(UserError, match="both write to out/b"):
        chain(["--job.config_file", str(c)])
    write("a", '[stage]\nafter = "gone.toml"\n')
    with pytest.raises(UserError, match="gone.toml, which does not exist"):
        chain(["--job.config_file", str(c)])


def chain_command(folder: Path, out: Path, *more: str) -> list[str]:
    args = flags(folder, folder / "assets-llama", job__dump_folder=out)
    args[1] = str(folder / "two.toml")
    return [
        *args,
        "--checkpoint.enable",
        "true",
        "--checkpoint.interval",
        "1",
        *more,
    ]


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return [json.loads(line)["loss"] for line in lines]


def test_a_chain_killed_in_either_stage_goes_on_in_the_right_one(folder: Path, runs: dict[str, dict[str, Any]]):
    out = folder / "killed"
    command = [sys.executable, "-m", "torchtitan.extensions.cluster.chain", "1", *chain_command(folder, out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name, step in (("stage", 2), ("two", 1)):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        checkpoints = out / name / "checkpoint"
        deadline = time.monotonic() + 120
        while not [s for s in complete_steps(checkpoints) if s >= step] and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)  # its trainer dies with it
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "chain: stage stage has ended" in ended.stderr and "resumed from" in ended.stderr
    assert len(losses(out / "stage")) == 4 and len(losses(out / "two")) == 3
    assert losses(out / "stage") == pytest.approx(runs["oracle one"]["losses"], rel=1e-6)
    assert losses(out / "two") == pytest.approx(runs["oracle two"]["losses"], rel=1e-6)
    assert has_ended(load_config(chain(chain_command(folder, out))[1].arguments))


def test_gates(tmp_path: Path):
    now, before = tmp_path / "now.jsonl", tmp_path / "before.jsonl"
    lines = [{"step": s, "loss": 3.0 - s, "loss_by_position": {"64": 2.0}} for s in range(3)]
    now.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before.write_text(json.dumps({"step": 9, "loss": 2.0, "loss_by_position": {"64": 1.9}}) + "\n")

    def failure(**gate: Any) -> str | None:
        return failed_gate((Gate(**gate),), now, before)

    assert failure(metric="loss", over=1, at_most=1.0) is None  # the last loss is 1
    assert "2.0000, more than at_most = 1.9" in (failure(metric="loss", over=9, at_most=1.9) or "")
    assert "less than at_least" in (failure(metric="loss", over=2, at_least=1.6) or "")
    assert failure(metric="loss_by_position.64", above_previous=0.06) is None
    assert "+5.26%" in (failure(metric="loss_by_position.64", above_previous=0.05) or "")
    with pytest.raises(UserError, match="no metric los; there are loss, loss_by_position.64, step"):
        failure(metric="los", at_most=1.0)


def test_the_stage_before_is_looked_for_only_where_a_gate_asks(tmp_path: Path):
    """Its file may be gone, or have been on another machine."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')

    def failure(**gate: Any) -> str | None:
        gates = (Gate(metric="loss", **gate),)
        return gate_failure(JobConfig(stage=Stage(after=str(tmp_path / "gone.toml"), gates=gates)), tmp_path)

    assert failure(at_most=3.0) is None and "more than at_most" in (failure(at_most=1.0) or "")
    with pytest.raises(UserError, match="gone.toml does not exist"):
        failure(above_previous=0.1)


def test_a_gate_against_a_previous_stage_without_a_percentage(tmp_path: Path):
    """From 0, and from a line that is no object."""
    previous = tmp_path / "previous"
    previous.mkdir()
    for folder, skipped in ((tmp_path, 1), (previous, 0)):
        (folder / "metrics.jsonl").write_text(f'{{"step": 1, "skipped_steps": {skipped}}}\n')
    (previous / "config.toml").touch()
    gates = (Gate(metric="skipped_steps", above_previous=0.1),)
    config = JobConfig(stage=Stage(after="previous.toml", after_dump_folder=str(previous), gates=gates))
    assert "1.0000, and 0.0000 in the previous stage: more than" in (gate_failure(config, tmp_path) or "")
    (previous / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="lines that are not JSON objects"):
        gate_failure(config, tmp_path)


def test_a_gate_that_does_not_hold_stops_the_chain(folder: Path, runs: dict[str, dict[str, Any]]):
    """Stage 1 of the run above has ended: the chain is stopped by its gate before anything of stage 2 is started."""
    gated = folder / "gated"
    shutil.copytree(folder / "one", gated / "gated")
    as_run = gated / "gated" / "config.toml"
    gate = '[[stage.gates]]\nmetric = "loss"\nover = 1\nat_most = 0.1\n'
    as_run.write_text(as_run.read_text().replace("gates = []\n", "") + gate)
    (folder / "gated.toml").write_text(
        'extends = "stage.toml"\n[[stage.gates]]\nmetric = "loss"\nover = 1\nat_most = 0.1\n'
    )
    (folder / "last.toml").write_text('extends = "two.toml"\n[stage]\nname = "last"\nafter = "gated.toml"\n')
    command = chain_command(folder, gated)
    command[1] = str(folder / "last.toml")
    with pytest.raises(UserError, match="gate of stage gated does not hold: loss is .* more than at_most = 0.1"):
        run_chain(command, 1)
    assert not (gated / "last").exists()
    message = refusal(stage(folder, "last.toml", "x", "gated/gated"))
    assert "a gate of that stage does not hold" in message, "nor does it help to start the next stage by hand"


def test_a_stage_that_ended_as_something_else_is_not_passed_over(folder: Path, runs: dict[str, dict[str, Any]]):
    out = folder / "changed"
    shutil.copytree(folder / "one", out / "stage")
    with pytest.raises(UserError, match="has ended, but with another configuration.*rope.theta None -> 20000"):
        run_chain(chain_command(folder, out, "--rope.theta", "20000"), 1)
    assert not (out / "two").exists()
