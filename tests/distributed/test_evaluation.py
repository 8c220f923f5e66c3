"""[evaluation] in training: the same results in every layout, and nothing of training changed by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.harness import flags, run_stage, spawn, write_assets, write_text
from torchtitan.extensions.evaluation.forward import Ranks

ASKED = {
    "freq": 2,
    "length": 150,
    "max_documents": 3,
    "windows": 40,
    "needle_depths": [0.0, 0.6],
    "needle_lengths": [130, 200],
    "needles": 1,
    "tasks": ["niah_mk_2"],
    "task_lengths": [330],
    "task_items": 1,
    "generate": True,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "cp": {"context_parallel_degree": 2},
    "cp, headtail, allgather": {
        "context_parallel_degree": 2,
        "context_parallel_layout": "headtail",
        "context_parallel_exchange": "allgather",
    },
    "cp, ulysses": {"context_parallel_degree": 2, "context_parallel_exchange": "ulysses"},
    "tp": {"tensor_parallel_degree": 2},
}


def run_silently(args: list[str], rank: int, world_size: int) -> list[float]:
    """Losses, and the state of PyTorch's random numbers after them."""
    losses = [numbers["loss"] for numbers in run_stage(args, rank, world_size)]
    return [*losses, float(torch.rand(()))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage, and held-out documents, of which some are long enough."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_text(folder)
    held_out = [f"a stone {i} in the river of house number {i * i % 7}, said the bird." for i in range(400)]
    lines = [" ".join(held_out[i : i + n]) for i, n in ((0, 40), (50, 2), (60, 60), (200, 35), (300, 50))]
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def asked(folder: Path) -> list[str]:
    args = ["--evaluation.texts", str(folder / "held_out.jsonl")]
    for key, value in ASKED.items():
        values = value if isinstance(value, list) else [value]
        args += [f"--evaluation.{key}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return args


def close(a: Any, b: Any) -> None:
    """Equal to 1e-5, but for the labels and times."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"label", "model", "world_size", "seconds"}:
            close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            close(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5), (a, b)
    else:
        assert a == b


@pytest.mark.parametrize("model", ["qwen3", "olmo3"])
def test_every_layout_gives_one_process_results(model: str, folder: Path):
    assets = write_assets(folder, model)
    cases = {}
    for name, layout in LAYOUTS.items():
        if model == "olmo3" and name in ("tp", "cp, ulysses", "cp, headtail, allgather"):
            continue  # its QK norm is over all heads; the other two have been shown
        parallelism = {f"parallelism__{key}": value for key, value in layout.items()}
        out = folder / f"{model} {name}"
        common = {"training__steps": 2, "job__dump_folder": out}
        cases[name] = flags(folder, assets, **common, **parallelism) + asked(folder)
    one = folder / f"{model} one"
    alone = flags(folder, assets, training__steps=2, job__dump_folder=one) + asked(folder)
    plain = flags(folder, assets, training__steps=2, job__dump_folder=folder / "plain")
    (losses, without) = spawn(1, run_silently, [alone, plain], folder)
    assert losses == without  # bit for bit, and the random numbers after them too
    spawn(2, run_silently, list(cases.values()), folder)
    for step in (0, 2):
        expected = json.loads((one / f"evaluation/step-{step}.json").read_text())
        for name in LAYOUTS.keys() & cases.keys():
            found = json.loads((folder / f"{model} {name}" / f"evaluation/step-{step}.json").read_text())
            # parameters after some steps are alike to rounding only
            close(expected, found)
    text = expected["perplexity"]["held_out"]
    assert text["count"] == [450] and text["edges"] == [0, 150]  # of three documents
    assert text["gain_of_context"]["nll_cut"] != text["nll"]
    assert expected["tasks"]["needle"]["lengths"] == [130, 200]
    assert expected["tasks"]["niah_mk_2"]["count"] == [[1]]
    pictures = {f"step-2_{what}.png" for what in ("needle", "positions", "tasks")}
    assert {p.name for p in (one / "evaluation").iterdir()} >= pictures


def written_by_each(case: None, rank: int, world_size: int) -> list[Any]:
    """In a row of two by two, each of which would write something else."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    ranks = Ranks(cp=2, cp_group=mesh.get_group("cp"), tp=2, tp_group=mesh.get_group("tp"))
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, ranks.of_first_rank([rank, 7 + rank]))
    dist.destroy_process_group()
    return found


def test_all_ranks_of_a_row_write_what_its_first_does(tmp_path: Path):
    assert spawn(4, written_by_each, [None], tmp_path) == [[[0, 7]] * 4]


def test_an_evaluation_is_not_repeated_and_a_missing_one_is_made_up_for(folder: Path):
    assets = write_assets(folder, "llama")
    out = folder / "resumed"
    args = flags(folder, assets, job__dump_folder=out, checkpoint__enable="true", training__steps=3) + asked(folder)
    spawn(1, run_silently, [args], folder)
    made = {step: out / f"evaluation/step-{step}.json" for step in (0, 2, 3)}
    assert {file.name for file in out.glob("evaluation/*.json")} == {file.name for file in made.values()}
    stamp = made[0].stat().st_mtime_ns
    made[3].unlink()
    spawn(1, run_silently, [args], folder)
    assert made[0].stat().st_mtime_ns == stamp and made[3].exists()
