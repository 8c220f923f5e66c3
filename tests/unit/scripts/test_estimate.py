"""scripts/estimate.py: every recipe, long rows, what does not fit, and what a user can have wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.scripts import load_script
from torchtitan.config import load_config
from torchtitan.extensions.planner.host_memory import host_bytes
from torchtitan.extensions.planner.stage_numbers import numbers_of
from torchtitan.models.registry import FLAVORS

CONFIGS = Path(__file__).parents[3] / "train_configs"
RECIPES = sorted(CONFIGS.rglob("*.toml"))
LLAMA = ["--job.config_file", str(CONFIGS / "llama3_8b" / "128k.toml")]

estimate = load_script("estimate")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict]:
    code = estimate.main([*args, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_recipe_can_be_estimated(path: Path, capsys: pytest.CaptureFixture[str]):
    c = load_config(["--job.config_file", str(path)]).parallelism
    ranks = max(8, c.context_parallel_degree * c.tensor_parallel_degree * c.data_parallel_replicate_degree)
    ranks = 2 if path.parent.name == "demo" else ranks
    code, plan = run(capsys, "--job.config_file", str(path), "--world-size", str(ranks))
    assert code in (0, 2)
    assert 0 < plan["model_flops_per_step"] <= plan["hardware_flops_per_step"]
    assert 0 < plan["seconds_per_step"][0] < plan["seconds_per_step"][1]
    assert plan["peak_gib"] > sum(plan["bytes_at_peak"].values()) / 2**30


@pytest.mark.parametrize(
    "flavor, ranks, length, cp",
    [
        ("llama3_8b", 8, 131072, 1),
        ("llama3_8b", 8, 524288, 1),
        ("llama3_8b", 8, 1048576, 8),
        ("llama3_70b", 256, 131072, 1),
        ("llama3_70b", 256, 1048576, 8),
    ],
)
def test_advice_when_applied_fits_by_its_own_count(
    flavor: str, ranks: int, length: int, cp: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """And comes in less than 10 s; the written stage, read by itself, is the one that was promised."""
    stage = [*LLAMA, "--model.flavor", flavor, "--training.seq_len", str(length)]
    stage += ["--parallelism.context_parallel_degree", str(cp), "--activation_checkpoint.mode", "none"]
    stage += ["--training.global_batch_tokens", str(length * ranks), "--rope.allow", "beyond_trained"]
    fit = tmp_path / "fit.toml"
    start = time.perf_counter()
    code, plan = run(capsys, *stage, "--world-size", str(ranks), "--fit", str(fit))
    assert time.perf_counter() - start < 10
    assert code == 0 and not plan["fits"]
    code, applied = run(capsys, "--job.config_file", str(fit), "--world-size", str(ranks))
    assert code == 0 and applied["fits"]
    assert applied["peak_gib"] == pytest.approx(plan["fit"]["peak_gib"])
    assert applied["tokens_per_step"] == plan["tokens_per_step"]


def test_advice_is_what_the_checks_let_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Moments in bfloat16 want a smaller beta2 than 0.999, which many set."""
    stage = [*LLAMA, "--optimizer.beta2", "0.999", "--gpu", "a100_40g", "--training.seq_len", "344064"]
    stage += ["--training.global_batch_tokens", "2752512", "--host-memory-gib", "1", "--world-size", "8"]
    stage += ["--training.mlp_tile_tokens", "4096", "--training.loss_tile_mib", "64"]
    code, plan = run(capsys, *stage)
    assert code in (0, 2) and plan["changes"]
    assert not any("optimizer.state_dtype" in change["keys"] for change in plan["changes"])
    with pytest.raises(SystemExit) as ended:  # 2 means that nothing fits
        estimate.main([*LLAMA])
    assert ended.value.code == 1 and "--world-size" in capsys.readouterr().err


def test_what_fits_nowhere_is_said(capsys: pytest.CaptureFixture[str]):
    code = estimate.main([*LLAMA, "--model.flavor", "llama3_405b", "--world-size", "8"])
    assert code == 2
    assert "no combination of these fits h100" in capsys.readouterr().out


def test_documents_and_windows_are_counted_by_the_mask(capsys: pytest.CaptureFixture[str]):
    """Halved documents have half the pairs of whole ones, but for the diagonal; nothing else changes."""
    _, whole = run(capsys, *LLAMA, "--world-size", "8")
    _, halves = run(capsys, *LLAMA, "--world-size", "8", "--document-length", "65536")
    args, n, rows = FLAVORS["llama3_8b"], 131072, 32
    saved = 12 * args.n_layers * args.n_heads * args.head_dim * rows * (n // 2) ** 2
    assert whole["model_flops_per_step"] - halves["model_flops_per_step"] == pytest.approx(saved)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (["--gpu", "voodoo2"], '--gpu = "voodoo2" is not known; known are h100'),
        (["--world-size", "0"], "--world-size = 0 must be at least 1"),
        (["--world-size", "12"], "context_parallel_degree 8"),
        (["--training.sequence", "5"], "is not known"),
        (["--fit", str(LLAMA[1])], "exists, and nothing is written over"),
        (["--fit", "nowhere/fit.toml"], "there is no folder nowhere"),
        (["--fit", "fit.toml", "--gpu", "cpu"], "has no size to fit"),
        (["--gpu", "a100", "--quantize.recipe_name", "rowwise"], "a100 has no FP8"),
        (
            ["--parallelism.context_parallel_exchange", "ulysses", "--parallelism.context_parallel_head_chunks", "3"],
            "context_parallel_head_chunks = 3 does not divide",
        ),
    ],
)
def test_mistakes_are_named(wrong: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert estimate.main([*LLAMA, "--world-size", "8", *wrong]) == 1
    assert says in capsys.readouterr().err


def test_host_memory_is_what_the_trainer_warns_of(capsys: pytest.CaptureFixture[str]):
    offload = ["--training.enable_cpu_offload", "true", "--activation_checkpoint.offload", "true"]
    assert estimate.main([*LLAMA, *offload, "--world-size", "8", "--host-memory-gib", "64"]) == 2
    ours = host_bytes(numbers_of(load_config([*LLAMA, *offload]), FLAVORS["llama3_8b"], 8)) * 8 / 2**30
    assert f"{ours:.0f} GiB of host memory are needed, of 64" in capsys.readouterr().out


def test_it_says_where_a_slurm_job_has_another_layout(capsys: pytest.CaptureFixture[str]):
    """Which keeps a copy of the parameters on each node, if nothing is said of the degrees."""
    said = []
    for more in ([], ["--parallelism.data_parallel_replicate_degree", "2"], ["--gpus-per-node", "16"]):
        estimate.main([*LLAMA, "--world-size", "16", *more])
        said.append("NOTE: counted for parameters sharded over all 16 ranks" in capsys.readouterr().out)
    assert said == [True, False, False]
