"""On a real GPU: the tiny stage against the CPU, its options, compilation, FP8, checkpoints, pinned memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.harness import flags, write_assets
from torchtitan.components.manifest import complete_steps, find_damage
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.weights import hf_name
from torchtitan.models.transformer import Transformer, init_weights

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


def with_weights(assets: Path) -> Path:
    """Of the CPU: what init_weights draws on a GPU is something else."""
    model = Transformer(read_config(assets))
    init_weights(model, seed=0)
    save_file({hf_name(n): p.detach() for n, p in model.named_parameters()}, assets / "model.safetensors")
    return assets


@pytest.fixture(scope="module")
def assets(folder: Path) -> Path:
    return with_weights(write_assets(folder))


def train(folder: Path, assets: Path, name: str, visible: str = "0", **overrides: Any) -> list[dict[str, Any]]:
    """Trains in a process of its own; the lines of metrics.jsonl."""
    out = folder / name
    args = flags(folder, assets, job__dump_folder=out, checkpoint__initial_load_in_hf=True, **overrides)
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-m", "torchtitan.train", *args], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", ["llama", "olmo3"])
def test_gpu_equals_cpu(model: str, folder: Path, assets: Path):
    """olmo3: two masks a micro-batch, with anchors."""
    options: dict[str, Any] = {"data__num_workers": 1}
    if model == "olmo3":
        assets = with_weights(write_assets(folder, model))
        options |= {"data__anchor_attention": True, "data__positions": "continue"}
    cpu = train(folder, assets, f"cpu-{model}", visible="", **options)
    gpu = train(folder, assets, f"gpu-{model}", **options)
    first = abs(gpu[0]["loss"] / cpu[0]["loss"] - 1)
    assert first < 1e-5, "the same weights and rows; only the order of sums differs"
    for a, b in zip(gpu, cpu, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["memory_gib"] > 0 and "mfu" in a


@pytest.mark.parametrize(
    "options",
    [
        {"training__mixed_precision_param": "bfloat16"},
        {"compile__enable": True},
        {"activation_checkpoint__mode": "full"},
        {"activation_checkpoint__mode": "selective", "activation_checkpoint__offload": True},
        {"compile__enable": True, "activation_checkpoint__mode": "selective", "training__mlp_tile_tokens": 100},
        {"training__enable_cpu_offload": True, "optimizer__state_dtype": "bfloat16"},
        {"training__deterministic": True},
        {"profiling__enable_profiling": True, "profiling__enable_memory_snapshot": True, "profiling__profile_freq": 2},
    ],
    ids="-".join,
)
def test_options(options: dict[str, Any], folder: Path, assets: Path):
    plain = train(folder, assets, "gpu-plain-" + "-".join(options))
    changed = train(folder, assets, "gpu-" + "-".join(options), **options)
    for a, b in zip(changed, plain, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_checkpoint__mode": "full"},
        {"model__attention_backend": "varlen"},
        {"quantize__recipe_name": "rowwise", "quantize__smallest_features": 16},
    ],
    ids=["plain", "recomputed", "varlen", "fp8"],
)
def test_nothing_is_compiled_anew_for_other_documents(options: dict[str, Any], folder: Path, assets: Path):
    """Blocks by inductor, attention by flex or varlen; rows of documents of other lengths in every step."""
    if "quantize__recipe_name" in options and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    name = "compiled-" + "-".join(map(str, options.values()))
    options |= {"training__mixed_precision_param": "bfloat16", "training__seq_len": 512}
    plain = train(folder, assets, f"{name}-not", **options)
    compiled = train(folder, assets, name, **options, compile__enable=True)
    assert [line["recompilations"] for line in compiled] == [0] * 4
    for a, b in zip(compiled, plain, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_fp8_of_the_gpu_is_fp8_as_emulated(recipe: str, folder: Path, assets: Path):
    """Both are within the stated error of no FP8 (docs/training.md), and nearer to each other in the first step."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    options: dict[str, Any] = {"training__mixed_precision_param": "bfloat16"}
    fp8 = options | {"quantize__recipe_name": recipe, "quantize__smallest_features": 16}
    plain = train(folder, assets, "bf16", **options)
    real = train(folder, assets, f"real-{recipe}", **fp8)
    emulated = train(folder, assets, f"emulated-{recipe}", **fp8, quantize__emulate=True)
    for steps in (real, emulated):
        for a, b in zip(steps, plain, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=4e-3)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=4e-2)
    assert real[0]["loss"] == pytest.approx(emulated[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_checkpoints(mode: str, folder: Path, assets: Path):
    options = {"checkpoint__enable": True, "checkpoint__interval": 2, "checkpoint__async_mode": mode}
    whole = train(folder, assets, f"whole-{mode}", **options)
    train(folder, assets, f"parts-{mode}", **options, training__steps=2)
    parts = train(folder, assets, f"parts-{mode}", **options)
    assert complete_steps(folder / f"parts-{mode}" / "checkpoint") == [2, 4]
    assert find_damage(folder / f"parts-{mode}" / "checkpoint" / "step-4") is None
    # the learning rate of steps 1 and 2 depends on training.steps only after the warmup of 2
    assert parts[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-5)
