"""Exports load in transformers with our logits, whatever the RoPE; a folder is complete or absent."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.extensions.convert.models import (
    ARCHITECTURES,
    LLAMA,
    ORIGINAL,
    SCALINGS,
    TRAINED,
    export,
    our_logits,
    random_weights,
    save,
    some_tokens,
    with_rope,
)
from torchtitan.config.schema import Checkpoint, Job, JobConfig, Model
from torchtitan.extensions.convert import export as export_module
from torchtitan.extensions.convert.export import publish, write_hugging_face
from torchtitan.extensions.convert.torchtitan_and_meta import write_torchtitan
from torchtitan.extensions.convert.weights import open_checkpoint, open_hugging_face, write_checkpoint
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.config_out import config_json
from torchtitan.models.rope_scaling import HarpeScaling, LinearScaling
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError

ASSETS = Path(__file__).parents[4] / "assets" / "tokenizer"
PLAIN = with_rope(None)


def export_and_compare(args: TransformerArgs, folder: Path, assets: Path | None = None) -> float:
    """The largest difference between transformers' logits from an export and ours."""
    export(save(args, folder / "checkpoint"), folder / "hf", None, assets)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager")
    worst = 0.0
    for n in (ORIGINAL, TRAINED, TRAINED + 50):  # transformers changes what "dynamic" and "longrope" do by length
        tokens = some_tokens(n)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        assert logits.std() > 0.1, "the logits are too flat to tell models apart"
        worst = max(worst, (logits - our_logits(random_weights(args), tokens)).abs().max().item())
    return worst


@pytest.mark.parametrize("kind", SCALINGS)
def test_every_rope_gives_our_logits_in_transformers(kind: str, tmp_path: Path):
    args = with_rope(SCALINGS[kind])
    assert export_and_compare(args, tmp_path) < 1e-4
    if args.rope.scaling:
        tokens = some_tokens(TRAINED)
        plain = our_logits(random_weights(with_rope(None)), tokens)
        assert (our_logits(random_weights(args), tokens) - plain).abs().max() > 0.1, "the scaling does nothing here"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_gives_our_logits_in_transformers(kind: str, tmp_path: Path):
    args = with_rope(SCALINGS["yarn"], ARCHITECTURES[kind])
    assert export_and_compare(args, tmp_path) < 1e-4
    again = read_config(tmp_path / "hf")
    assert replace(again, rope=args.rope) == args
    assert again.rope.layers == args.rope.layers, "which layers are scaled"


def test_a_mistral_stays_one_without_its_window(tmp_path: Path):
    """It is a Llama to us; its default window, shorter than the text here, must not come back."""
    original = {"model_type": "mistral", "sliding_window": 32, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(original))
    assert export_and_compare(with_rope(None), tmp_path, tmp_path) < 1e-4
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert "sliding_window" in config, "absent, it is 4,096"


@pytest.mark.parametrize("kind", SCALINGS)
def test_legacy_and_new_rope_keys_say_the_same(kind: str):
    """transformers 4 and older servers read rope_theta and rope_scaling, transformers 5 rope_parameters."""
    config = config_json(with_rope(SCALINGS[kind]), "float32", {})
    form = dict(config["rope_parameters"])
    assert form.pop("rope_theta") == config["rope_theta"]
    legacy = config.get("rope_scaling", {"type": "default", "rope_type": "default"})
    assert legacy == form | {"type": form["rope_type"]}
    # transformers 4 looks here, and nowhere else, for the length beyond which the long list holds
    at_top = form["rope_type"] in ("longrope", "llama3")
    assert config.get("original_max_position_embeddings") == (ORIGINAL if at_top else None)


def test_max_position_embeddings_is_what_vllm_makes_the_trained_length_of():
    """vLLM multiplies it by the factor, but for yarn (original * factor instead), llama3 and longrope."""
    for kind, scaling in (SCALINGS | {"linear below 1": LinearScaling(0.5)}).items():
        config = config_json(with_rope(scaling), "float32", {})
        form, length = config["rope_parameters"], config["max_position_embeddings"]
        if form["rope_type"] == "yarn":
            length = form["original_max_position_embeddings"] * form["factor"]
        elif form["rope_type"] not in ("longrope", "llama3"):
            length *= form.get("factor", 1)
        assert length == TRAINED, kind


def test_what_has_no_form_is_refused(tmp_path: Path):
    checkpoint = save(with_rope(HarpeScaling((1e4, 2e4))), tmp_path / "checkpoint")
    with pytest.raises(UserError, match="harpe.*2 bases.*train a last stage with a single base"):
        export(checkpoint, tmp_path / "hf", None)
    with pytest.raises(UserError, match="qkv_bias and qk_norm"):
        config_json(with_rope(None, replace(LLAMA, qkv_bias=True, qk_norm=True)), "float32", {})
    olmo = with_rope(SCALINGS["ntk"], ARCHITECTURES["olmo3"])
    assert olmo.rope.layers == "full_attention" and olmo.sliding_share == 0.5
    with pytest.raises(UserError, match=r"larger base \(20000 -> .* has no form in Olmo 3"):
        config_json(olmo, "float32", {})
    slides = with_rope(SCALINGS["yarn"], ARCHITECTURES["mistral, windows"])
    with pytest.raises(UserError, match='rope.layers = "full_attention" has no form in the config.json of mistral'):
        config_json(replace(slides, rope=replace(slides.rope, layers="full_attention")), "float32", {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_an_original_config_is_kept_but_for_what_training_changed(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen2",
                "architectures": ["Qwen2Model"],
                "hidden_size": 1,
                "max_window_layers": 28,
                "use_sliding_window": False,
                "sliding_window": 131072,
                "bos_token_id": 7,
                "eos_token_id": [8, 9],
                "torch_dtype": "float16",
                "rope_theta": 1.0,
                "rope_scaling": {"type": "dynamic", "factor": 2.0},
                "original_max_position_embeddings": 3,
                "quantization_config": {"bits": 4},
                "a_key_of_its_own": "kept",
            }
        )
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9], "temperature": 0.7}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ASSETS / name).read_bytes())
    about = json.loads((ASSETS / "tokenizer_config.json").read_text()) | {"model_max_length": 100}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    checkpoint = save(with_rope(SCALINGS["ntk"], ARCHITECTURES["qwen2"]), tmp_path / "checkpoint")
    out = tmp_path / "hf"
    export(checkpoint, out, "bfloat16", tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["a_key_of_its_own"] == "kept" and config["max_window_layers"] == 28
    assert config["bos_token_id"] == 7 and config["eos_token_id"] == [8, 9]
    assert config["sliding_window"] == 131072 and config["use_sliding_window"] is False
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["hidden_size"] == LLAMA.dim
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert not {"quantization_config", "original_max_position_embeddings", "rope_scaling"} & set(config)
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.7
    assert (out / "tokenizer.json").read_bytes() == (ASSETS / "tokenizer.json").read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == TRAINED
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_ids_come_from_the_tokenizer_where_no_config_has_them(tmp_path: Path):
    out = tmp_path / "hf"
    export(save(with_rope(None, replace(LLAMA, vocab_size=4096)), tmp_path / "checkpoint"), out, None, ASSETS)
    config = AutoConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
    # another architecture's config.json is not started from: its keys would mean something else
    foreign = config_json(PLAIN, "float32", {"model_type": "gpt2", "n_embd": 5, "eos_token_id": 50256})
    assert "n_embd" not in foreign and foreign["eos_token_id"] == 50256


def test_shards_of_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args, out, limit = with_rope(SCALINGS["llama3"]), tmp_path / "hf", 40_000
    checkpoint = save(args, tmp_path / "checkpoint")
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "model-00001-of-00099.safetensors").touch()  # of a killed export
    export(checkpoint, out, None, part=1, parts=2, shard_bytes=limit)
    assert not out.exists()
    with pytest.raises(FileNotFoundError):  # part 0 has not written the list of files
        publish(out)

    # part 0 is killed in the middle of its second file
    writes, write = [], export_module._write_shard

    def killed(*arguments):
        writes.append(arguments)
        if len(writes) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(export_module, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, out, None, part=0, parts=2, shard_bytes=limit)
    with pytest.raises(RuntimeError, match="lacks model-00003-of"):
        publish(out)
    assert not out.exists()

    monkeypatch.setattr(export_module, "_write_shard", write)
    export(checkpoint, out, None, part=0, parts=2, shard_bytes=limit)
    assert not out.exists()
    publish(out)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["checkpoint", "hf"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and {f.name for f in files} == set(index["weight_map"].values())
    sizes = []
    for file in files:
        with safe_open(file, "pt") as f:
            names = list(f.keys())
            sizes.append(sum(f.get_tensor(name).nbytes for name in names))
            assert all(index["weight_map"][name] == file.name for name in names)
            assert sizes[-1] <= limit or len(names) == 1
    assert sum(sizes) == index["metadata"]["total_size"]
    tokens = some_tokens(TRAINED)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(tokens[None]).logits[0]
    assert (logits - our_logits(random_weights(args), tokens)).abs().max() < 1e-4
    with pytest.raises(UserError, match="exists and is not overwritten"):
        export(checkpoint, out, None)


def test_the_end_of_a_stage_says_how_its_export_must_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    save(with_rope(SCALINGS["longrope"]), tmp_path / "checkpoint")
    monkeypatch.setattr(export_module.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(export_module.dist, "barrier", lambda group: None)
    config = JobConfig(
        job=Job(dump_folder=str(tmp_path)),
        model=Model(hf_assets_path=str(tmp_path / "none")),
        checkpoint=Checkpoint(last_save_in_hf=True, export_dtype="float32"),
    )
    checkpointer = SimpleNamespace(folder=tmp_path / "checkpoint", group=None)
    trainer = SimpleNamespace(config=config, checkpointer=checkpointer, rank=0, finished=True, step=0)
    monkeypatch.setattr(export_module.logger, "propagate", True)
    with caplog.at_level("INFO"):
        export_module.Export().ended(trainer)
    assert (tmp_path / "export" / "step-0" / "config.json").is_file()
    assert (
        f"Export: vLLM takes LongRoPE's original length as its longest context: serve with --max-model-len {TRAINED}."
        in (caplog.messages)
    )
    exported = f"Hugging Face folder: {tmp_path / 'export' / 'step-0'}, weights in"
    assert f"{exported} float32 (checkpoint.export_dtype)" in caplog.messages
    shutil.rmtree(tmp_path / "export")
    trainer.config = replace(config, checkpoint=replace(config.checkpoint, export_dtype="bfloat16"))
    with caplog.at_level("INFO"):
        export_module.Export().ended(trainer)
    assert f"{exported} bfloat16 (checkpoint.export_dtype), rounded from the checkpoint's float32" in caplog.messages


@pytest.mark.parametrize("to", ["hugging_face", "checkpoint", "torchtitan"])
def test_a_tensor_at_a_time(to: str, tmp_path: Path):
    """When a tensor is read, at most the previous one is still held."""
    weights = random_weights(PLAIN)
    given: list[weakref.ref[torch.Tensor]] = []
    held = []

    def read(name: str) -> torch.Tensor:
        held.append(sum(reference() is not None for reference in given))
        tensor = weights.read(name).clone()
        given.append(weakref.ref(tensor))
        return tensor

    streamed = replace(weights, read=read)
    if to == "hugging_face":
        write_hugging_face(streamed, tmp_path / "out")
    elif to == "checkpoint":
        write_checkpoint(streamed, tmp_path / "out", {})
    else:
        write_torchtitan(streamed, tmp_path / "out")
    assert len(held) == len(weights.shapes) and max(held) <= 1


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2"])
def test_checkpoint_to_hugging_face_and_back_is_bit_for_bit(kind: str, tmp_path: Path):
    args = with_rope(SCALINGS["longrope"], ARCHITECTURES[kind])
    export(save(args, tmp_path / "a"), tmp_path / "hf", "float32", shard_bytes=50_000)
    back = open_checkpoint(write_checkpoint(open_hugging_face(tmp_path / "hf"), tmp_path / "b", {}))
    assert back.args == args
    before = random_weights(args)
    assert list(back.shapes) == list(before.shapes)
    assert all(torch.equal(back.read(name), before.read(name)) for name in before.shapes)


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    checkpoint = save(PLAIN, tmp_path)
    with pytest.raises(UserError, match="step-0"):
        open_checkpoint(tmp_path)
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=file.name):
        open_checkpoint(checkpoint)
