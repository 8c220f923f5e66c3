"""The trainer as a whole: what it leaves behind, how it stops, its options, Hugging Face weights into shards."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.distributed.harness import flags, run_stage, spawn, write_assets
from torchtitan.components.bad_loss import BadLossError
from torchtitan.components.checkpoint import WholeWriter
from torchtitan.components.manifest import complete_steps
from torchtitan.config import load_config
from torchtitan.extensions.wiring import build_trainer, inputs_of
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.weights import FolderReader, hf_name
from torchtitan.models.rope import RopeTables
from torchtitan.models.transformer import Transformer, init_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def assets(folder: Path) -> Path:
    return write_assets(folder)


def hf_folder(folder: Path, model: str, shards: int) -> Path:
    """Assets with random weights in Hugging Face's form: one file, or several and an index."""
    assets = write_assets(folder, model)
    transformer = Transformer(read_config(assets))
    init_weights(transformer, seed=7)
    tensors = {hf_name(n): p.detach() for n, p in transformer.named_parameters()}
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    if shards == 1:
        weight_map = dict.fromkeys(tensors, "model.safetensors")
    else:
        (assets / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, assets / file)
    return assets


def test_what_a_run_leaves_in_its_dump_folder(folder: Path, assets: Path):
    out = folder / "left"
    args = flags(folder, assets, job__dump_folder=out, metrics__enable_tensorboard=True, metrics__peak_tflops=0.1)
    args += ["--checkpoint.enable", "true", "--profiling.enable_profiling", "true", "--profiling.profile_freq", "2"]
    (steps,) = spawn(2, run_stage, [args], folder)
    given_back = load_config(["--job.config_file", str(out / "config.toml")])
    assert given_back.data == load_config(args).data and given_back.training == load_config(args).training
    plan = json.loads((out / "plan.json").read_text())
    assert plan["tokens"] + plan["padding_tokens"] == 4 * 8 * 128 and 2 < plan["unigram_nats"] < 4
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [numbers["loss"] for numbers in steps]
    for line in lines:
        assert line["tokens_per_second"] > 0 and line["memory_gib"] > 0 and 0 < line["mfu"] < 10
        assert line["loss_by_source"]["text"] == pytest.approx(line["loss"])
        assert 0 <= line["data_wait"] < 1
    assert sum(line["padding"] for line in lines) / 4 == pytest.approx(plan["padding"])
    assert lines[-1]["tokens_seen"] == plan["tokens"]
    assert list((out / "tb").iterdir()) and complete_steps(out / "checkpoint") == [4]
    traces = sorted((out / "profile_traces").glob("*.json.gz"))
    assert {"step-2_rank-0.json.gz", "step-2_rank-1.json.gz"} <= {trace.name for trace in traces}
    assert "traceEvents" in json.loads(gzip.decompress(traces[0].read_bytes()))


def test_options_that_must_not_change_the_loss(folder: Path, assets: Path):
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "dense": {"model__attention_backend": "dense"},
        "compiled": {"compile__enable": True, "compile__backend": "aot_eager"},
        "compiled and recomputed": {
            "compile__enable": True,
            "compile__backend": "aot_eager",
            "activation_checkpoint__mode": "full",
        },
        "deterministic": {"training__deterministic": True},
        "kept gathered": {"parallelism__fsdp_reshard_after_forward": False},
        "foreach": {"optimizer__implementation": "foreach"},
    }
    runs = spawn(1, run_stage, [flags(folder, assets, **changed) for changed in options.values()], folder)
    for name, steps in zip(options, runs, strict=True):
        for ours, plain in zip(steps, runs[0], strict=True):
            assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5), name
            assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4), name


def test_bfloat16_is_near_float32_and_seeds_differ(folder: Path, assets: Path):
    changes = ({}, {"training__mixed_precision_param": "bfloat16"}, {"training__seed": 1})
    plain, half, seeded = spawn(1, run_stage, [flags(folder, assets, **c) for c in changes], folder)
    assert half[-1]["loss"] != plain[-1]["loss"]
    assert half[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=2e-3)
    assert seeded[0]["loss"] != plain[0]["loss"]


def types_at_the_rotation(args: list[str], rank: int, world_size: int) -> set[tuple[torch.dtype, ...]]:
    """dtypes of what apply_rope is given and gives, over a training step."""
    import torchtitan.models.attention as attention

    seen = set()
    original = attention.apply_rope

    def spy(x: torch.Tensor, tables: RopeTables) -> torch.Tensor:
        y = original(x, tables)
        seen.add((x.dtype, tables.cos.dtype, tables.sin.dtype, y.dtype))
        return y

    attention.apply_rope = spy
    run_stage(args, rank, world_size)
    return seen


def test_rope_tables_stay_in_float32_under_mixed_precision(folder: Path, assets: Path):
    """FSDP casts the inputs of what it wraps unless told not to: the tables would lose all but 8 bits."""
    half, full = torch.bfloat16, torch.float32
    plain = {"training__mixed_precision_param": "bfloat16", "training__steps": 2}
    cases = [flags(folder, assets, **plain), flags(folder, assets, **plain, activation_checkpoint__mode="full")]
    assert spawn(2, types_at_the_rotation, cases, folder) == [{(half, full, full, half)}] * 2


def compare_with_file(args: list[str], rank: int, world_size: int) -> list[str]:
    """Names of parameters whose shard is not the slice of the file's tensor. Each rank must read its shards alone."""
    read = 0
    original = FolderReader.read_data

    def read_data(self: FolderReader, plan: LoadPlan, planner: LoadPlanner) -> Any:
        nonlocal read
        read += sum(item.lengths.numel() for item in plan.items)
        return original(self, plan, planner)

    FolderReader.read_data = read_data  # type: ignore[method-assign]
    config = load_config(args)
    trainer = build_trainer(config, rank, rank, world_size)
    FolderReader.read_data = original  # type: ignore[method-assign]
    assert read == sum(p.to_local().numel() for p in trainer.model.parameters())
    files = Path(config.model.hf_assets_path).glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    wrong = []
    for name, param in trainer.model.named_parameters():
        assert isinstance(param, DTensor)
        whole = tensors[hf_name(name)]
        expected = distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
        if not torch.equal(param.to_local(), expected.to_local()) or param.shape != whole.shape:
            wrong.append(name)
    assert sum(p.to_local().numel() for p in trainer.model.parameters()) < sum(t.numel() for t in tensors.values())
    trainer.close()
    return wrong


def test_hugging_face_weights_go_into_shards(folder: Path):
    weights = [hf_folder(folder, "qwen3", shards=3), hf_folder(folder, "tied", shards=1)]
    for world_size, layout in ((2, {}), (4, {"parallelism__tensor_parallel_degree": 2})):
        cases = [flags(folder, w, checkpoint__initial_load_in_hf=True, **layout) for w in weights]
        assert spawn(world_size, compare_with_file, cases, folder) == [[], []]


def test_wrong_degrees_for_the_heads_are_refused(folder: Path):
    config = load_config(flags(folder, write_assets(folder, "qwen2"), parallelism__tensor_parallel_degree=4))
    with pytest.raises(Exception, match="2 key-value heads"):
        inputs_of(config, 4)


def run_into_nan(args: list[str], rank: int, world_size: int) -> str:
    write = WholeWriter.write_data

    def slow_write(self: WholeWriter, *rest: Any) -> Any:
        time.sleep(0.5)  # so that a save in the background is still under way when the next step fails
        return write(self, *rest)

    WholeWriter.write_data = slow_write  # type: ignore[method-assign]
    config = load_config(args)
    trainer = build_trainer(config, rank, rank, world_size)
    step = trainer.train_step

    def poisoned() -> Any:
        if trainer.step == 2 and rank == 0:  # one rank's shard is enough
            next(trainer.model.parameters()).detach().to_local().fill_(float("nan"))
        return step()

    trainer.train_step = poisoned  # type: ignore[method-assign]
    try:
        trainer.train()
    except BadLossError as e:
        return str(e)
    finally:
        trainer.close()
        WholeWriter.write_data = write  # type: ignore[method-assign]
    return "no error"


def test_nan_stops_the_run_names_the_rows_and_saves_nothing_of_it(folder: Path, assets: Path):
    """And finishes the save that is under way in the background."""
    modes = ("disabled", "async")
    options = {"checkpoint__enable": True, "checkpoint__interval": 1}
    cases = [
        flags(folder, assets, **options, checkpoint__async_mode=mode, job__dump_folder=folder / f"nan-{mode}")
        for mode in modes
    ]
    for mode, message in zip(modes, spawn(2, run_into_nan, cases, folder), strict=True):
        assert "step 3: loss nan" in message
        assert message.count("documents text ") == 8
        assert complete_steps(folder / f"nan-{mode}" / "checkpoint") == [1, 2]
