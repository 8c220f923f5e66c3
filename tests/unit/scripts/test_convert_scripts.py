"""scripts/convert.py and merge.py from the command line, in this process: main(arguments) -> exit code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.scripts import load_script
from tests.unit.extensions.convert.models import (
    ARCHITECTURES,
    LLAMA,
    SCALINGS,
    TOKENIZER,
    TRAINED,
    random_weights,
    save,
    with_rope,
)
from torchtitan.components.manifest import find_damage, read_manifest
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.convert.weights import Weights, open_checkpoint, open_hugging_face, write_checkpoint
from torchtitan.models.architecture import as_json

REPOSITORY = Path(__file__).parents[3]
ASSETS = REPOSITORY / "assets" / "tokenizer"
ARGS = with_rope(SCALINGS["yarn"])


convert, merge = load_script("convert"), load_script("merge")


def same(a: Weights, b: Weights) -> bool:
    return list(a.shapes) == list(b.shapes) and all(torch.equal(a.read(name), b.read(name)) for name in a.shapes)


def run(module: ModuleType, *arguments: object) -> int:
    return module.main([str(a) for a in arguments])


def test_through_every_format_and_back(tmp_path: Path):
    """Ours -> Hugging Face -> torchtitan -> Meta -> ours, each known by its files alone."""
    args = with_rope(None)
    start, before = save(args, tmp_path / "a"), random_weights(args)
    hf = tmp_path / "hf"
    assert run(convert, start, hf, "--to", "huggingface", "--shard-gb", "0.00005", "--assets", ASSETS) == 0
    assert run(convert, hf, tmp_path / "titan", "--to", "torchtitan") == 0
    assert run(convert, tmp_path / "titan", tmp_path / "meta", "--to", "meta", "--architecture", hf) == 0
    more = ("--max-position-embeddings", 256, "--assets", ASSETS)
    assert run(convert, tmp_path / "meta", tmp_path / "b", "--to", "checkpoint", *more) == 0
    back = open_checkpoint(tmp_path / "b" / "step-0")
    assert same(back, before) and back.args == args
    assert find_damage(tmp_path / "b" / "step-0") is None
    manifest = read_manifest(tmp_path / "b" / "step-0")
    assert (manifest["step"], manifest["seq_len"]) == (0, 256)
    assert manifest["tokenizer"] == load_tokenizer(ASSETS).fingerprint
    assert manifest["architecture"] == as_json(args)
    # as the trainer reads it: nested, straight into parameters
    state = {"model": {name: torch.empty(shape) for name, shape in before.shapes.items()}}
    dcp.load(state, checkpoint_id=tmp_path / "b" / "step-0", no_dist=True)
    assert all(torch.equal(tensor, before.read(name)) for name, tensor in state["model"].items())


def test_an_export_says_how_it_must_be_served_and_another_trained_length(tmp_path: Path, capsys: pytest.CaptureFixture):
    start, hf = save(with_rope(SCALINGS["gene"]), tmp_path / "a"), ("--to", "huggingface")
    assert run(convert, start, tmp_path / "hf", *hf) == 0
    out = capsys.readouterr().out
    assert "note: vLLM takes LongRoPE's original length as its longest context: serve with --max-model-len 256." in out
    assert "replaces" not in out and "note: llama.cpp leaves LongRoPE's lists out" in out
    more = ("--max-position-embeddings", 300, "--assets", ASSETS)
    assert run(convert, start, tmp_path / "hf300", *hf, *more) == 0
    out = capsys.readouterr().out
    assert "--max-position-embeddings replaces 256 tokens" in out and "--max-model-len 300." in out
    assert json.loads((tmp_path / "hf300" / "config.json").read_text())["max_position_embeddings"] == 300
    assert run(convert, start, tmp_path / "b", "--to", "checkpoint", *more) == 0
    assert read_manifest(tmp_path / "b" / "step-0")["seq_len"] == 300
    for length in (0, -5):
        assert run(convert, start, tmp_path / "c", *hf, "--max-position-embeddings", length) == 1
        assert f"--max-position-embeddings = {length} must be at least 1" in capsys.readouterr().err


def test_dtype_and_complaints(tmp_path: Path, capsys: pytest.CaptureFixture):
    start = save(ARGS, tmp_path / "a")
    assert run(convert, start, tmp_path / "hf", "--to", "huggingface", "--dtype", "bfloat16") == 0
    half = open_hugging_face(tmp_path / "hf")
    name = "layers.1.attention.wk.weight"
    assert torch.equal(half.read(name), random_weights(ARGS).read(name).bfloat16())
    (tmp_path / "empty").mkdir()
    dcp.save({"tok_embeddings.weight": torch.zeros(2)}, checkpoint_id=tmp_path / "titan", no_dist=True)
    for source, to, says in (
        (tmp_path / "a", "huggingface", "a/step-0"),
        (start, "meta", "params.json"),
        (tmp_path / "hf", "checkpoint", "Give --assets"),
        (tmp_path / "titan", "meta", "give --architecture"),
        (tmp_path / "empty", "meta", "It holds: nothing"),
        (tmp_path / "absent", "meta", "not a folder"),
        (start, "huggingface --assets typo", "--assets typo is not a folder"),
    ):
        assert run(convert, source, tmp_path / "out", "--to", *to.split()) == 1
        assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert run(convert, start, tmp_path / "hf", "--to", "huggingface") == 1  # is not overwritten
    assert "exists" in capsys.readouterr().err


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """checkpoint/ with steps 10, 20, 30 of different weights."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for i in (1, 2, 3):
        made = save(ARGS, tmp_path / f"made-{i}", seed=i)
        made.rename(folder / f"step-{i}0")
    return folder


def test_average(run_folder: Path, tmp_path: Path):
    assert run(merge, "average", run_folder, "--out", tmp_path / "three") == 0
    three = open_checkpoint(tmp_path / "three" / "step-0")
    models = [random_weights(ARGS, i) for i in (1, 2, 3)]
    for name in three.shapes:
        expected = torch.stack([m.read(name).double() for m in models]).mean(0)
        assert torch.allclose(three.read(name).double(), expected, atol=1e-6)
    assert three.args == ARGS and find_damage(tmp_path / "three" / "step-0") is None
    named = [run_folder / "step-10", run_folder / "step-10", run_folder / "step-10"]
    assert run(merge, "average", *named, "--out", tmp_path / "same") == 0
    assert same(open_checkpoint(tmp_path / "same" / "step-0"), models[0])
    assert run(merge, "average", run_folder, "--last", 4, "--out", tmp_path / "four") == 1


def test_mix_with_a_hugging_face_folder(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    base = replace(ARGS, rope=with_rope(None).rope)
    other = save(base, tmp_path / "other", seed=9)
    assert run(convert, other, tmp_path / "hf", "--to", "huggingface", "--assets", ASSETS) == 0
    arguments = (run_folder / "step-20", tmp_path / "hf", "--weight", 0.3)
    assert run(merge, "mix", *arguments, "--out", tmp_path / "out") == 0
    assert "RoPE differs" in capsys.readouterr().out
    mixed = open_checkpoint(tmp_path / "out" / "step-0")
    assert mixed.args == ARGS and mixed.manifest["ends_of_turn"] == [1], "of the model that says so"
    long, short = random_weights(ARGS, 2), random_weights(base, 9)
    for name in mixed.shapes:
        assert torch.allclose(mixed.read(name), 0.3 * long.read(name) + 0.7 * short.read(name), atol=1e-6)
    assert (
        run(merge, "mix", run_folder / "step-20", tmp_path / "hf", "--dtype", "bfloat16", "--out", tmp_path / "h") == 0
    )
    assert set(open_checkpoint(tmp_path / "h" / "step-0").dtypes.values()) == {torch.bfloat16}


def test_what_ends_an_answer_goes_with_the_weights(tmp_path: Path):
    """From a checkpoint of conversations to a folder, back, and through a folder whose assets are the base model's."""
    checkpoint = save(ARGS, tmp_path / "start")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"ends_of_turn": [7, 9]}))
    assert run(convert, checkpoint, tmp_path / "hf", "--to", "huggingface", "--assets", ASSETS) == 0
    assert run(convert, tmp_path / "hf", tmp_path / "again", "--to", "huggingface", "--assets", ASSETS) == 0
    assert run(convert, tmp_path / "hf", tmp_path / "back", "--to", "checkpoint") == 0
    assert (
        run(merge, "mix", save(ARGS, tmp_path / "base"), checkpoint, "--assets", ASSETS, "--out", tmp_path / "m") == 0
    )
    for folder in ("hf", "again"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == [1, 7, 9]
    assert open_checkpoint(tmp_path / "back/step-0").manifest["ends_of_turn"] == [1, 7, 9]
    assert open_checkpoint(tmp_path / "m/step-0").manifest["ends_of_turn"] == [7, 9]


def test_a_number_that_the_dtype_does_not_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = random_weights(ARGS)
    large = replace(
        weights, read=lambda name: weights.read(name) * (1e6 if name == "layers.1.attention.wk.weight" else 1)
    )
    start = write_checkpoint(large, tmp_path / "a", {"tokenizer": TOKENIZER, "seq_len": TRAINED})
    assert run(convert, start, tmp_path / "out", "--to", "huggingface", "--dtype", "float16") == 1
    said = capsys.readouterr().err
    assert "layers.1.attention.wk.weight" in said and "float16 ends at 65504" in said
    assert run(convert, start, tmp_path / "out", "--to", "huggingface", "--dtype", "bfloat16") == 0


def test_a_folder_of_a_model_is_read_before_the_steps_in_it(tmp_path: Path):
    """As training reads it."""
    start = save(ARGS, tmp_path / "a")
    assert run(convert, start, tmp_path / "hf", "--to", "huggingface") == 0
    (tmp_path / "hf" / "step-5").mkdir()
    (tmp_path / "hf" / "step-5" / "manifest.json").write_text("{}")
    assert run(convert, tmp_path / "hf", tmp_path / "again", "--to", "huggingface") == 0
    assert same(open_hugging_face(tmp_path / "again"), random_weights(ARGS))


def test_models_of_different_tokenizers_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Two Hugging Face folders, which have no manifest that names their tokenizers."""
    start = save(ARGS, tmp_path / "start")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        assert run(convert, start, folder, "--to", "huggingface", "--assets", ASSETS) == 0
    assert run(merge, "mix", *folders, "--out", tmp_path / "alike") == 0
    assert "different tokenizers" not in capsys.readouterr().err
    description = json.loads((folders[1] / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folders[1] / "tokenizer.json").write_text(json.dumps(description))
    assert run(merge, "mix", *folders, "--out", tmp_path / "unlike") == 0
    assert f"{folders[0]} and {folders[1]} have different tokenizers" in capsys.readouterr().err


def test_unlike_architectures_are_named(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    tied = save(with_rope(SCALINGS["yarn"], replace(ARCHITECTURES["tied"], ffn_dim=100)), tmp_path / "tied")
    assert run(merge, "mix", run_folder / "step-20", tied, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "ffn_dim 96 and 100" in said and "tied_embeddings False and True" in said
    assert json.loads((tied / "manifest.json").read_text())["architecture"]["dim"] == LLAMA.dim
    assert not (tmp_path / "out").exists()
