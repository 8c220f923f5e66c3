"""What a new user can get wrong, tried on the program as a whole.

Each mistake must end in one paragraph that names the key or file and what would work, with exit code 1, before the
model is allocated. The parts have their own tests of the details; here it matters that nothing slips between them.
"""

from __future__ import annotations

import errno
import faulthandler
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import torchtitan.components.changes
import torchtitan.components.setup
import torchtitan.trainer
from tests.distributed.harness import TINY, flags, write_assets, write_text
from torchtitan.config import checks as config_checks
from torchtitan.config import load_config
from torchtitan.datasets import data_checks
from torchtitan.extensions.cluster import check_config
from torchtitan.extensions.evaluation import checks as evaluation_checks
from torchtitan.extensions.wiring import inputs_of
from torchtitan.models import rope_checks
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.weights import hf_name
from torchtitan.models.transformer import Transformer
from torchtitan.tools import device
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import console
from torchtitan.train import main

Overrides = dict[str, Any]
Make = Callable[[Path, Path], Overrides]
"""(a folder to spoil things in, good assets with weights) -> overrides of the tiny stage."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage")
    write_text(path)
    return path


@pytest.fixture(scope="module")
def assets(folder: Path) -> Path:
    """The tiny model's folder with random weights."""
    path = write_assets(folder)
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {hf_name(name): p.shape for name, p in Transformer(read_config(path)).named_parameters()}
    save_file({name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}, path / "model.safetensors")
    return path


def ends_with(args: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line that main, run in this process, explains its failure with."""

    def too_late(*_: Any) -> None:
        raise AssertionError("a Trainer was made: the mistake was not seen before the model is allocated")

    monkeypatch.setattr(torchtitan.trainer, "Trainer", too_late)
    monkeypatch.setattr(faulthandler, "enable", lambda: None)  # pytest has its own
    monkeypatch.setattr(console, "file", written := io.StringIO())
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert main(args) == 1
    lines = written.getvalue().splitlines()
    (message,) = (line for line in lines if " I " not in line and " W " not in line)
    assert message == lines[-1] and " E " in message
    assert len(message) < 800
    return message


# ---- what a stage is made of ----------------------------------------------------------------------------------------


def text(name: str, content: bytes) -> Make:
    """The stage with a text file of this content as its source."""

    def make(spoiled: Path, assets: Path) -> Overrides:
        (spoiled / name).write_bytes(content)
        return {"data__sources__0__path": spoiled / name}

    return make


def labelled(path: Path) -> Overrides:
    """The stage with tokenized rows that have labels, one of them longer than any row."""
    lengths = 9, 9999
    labels = [[-100] * (n - 1) + [5] for n in lengths]
    pq.write_table(pa.table({"input_ids": [[5] * n for n in lengths], "labels": labels}), path)
    return {"data__sources__0__path": path}


def asset(name: str, content: bytes | None, **overrides: Any) -> Make:
    """The stage with a copy of the assets in which one file has this content, or is not there."""

    def make(spoiled: Path, assets: Path) -> Overrides:
        copy = spoiled / "copy"
        shutil.copytree(assets, copy)
        (copy / name).unlink()
        if content is not None:
            (copy / name).write_bytes(content)
        return {"model__hf_assets_path": copy} | overrides

    return make


def config_json(**changes: Any) -> bytes:
    return json.dumps(TINY | changes).encode()


def olmo3_config() -> bytes:
    """Without windows: an Olmo 2 but for its model_type, which the export keeps."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False}
    layers = ["full_attention"] * TINY["num_hidden_layers"]
    return config_json(model_type="olmo3", layer_types=layers, rope_scaling=yarn)


def cut_weights(spoiled: Path, assets: Path) -> Overrides:
    half = (assets / "model.safetensors").read_bytes()[:100_000]
    return asset("model.safetensors", half, checkpoint__initial_load_in_hf=True)(spoiled, assets)


def below_a_file(key: str, **overrides: Any) -> Make:
    """A folder that cannot be made, for root neither."""

    def make(spoiled: Path, assets: Path) -> Overrides:
        (spoiled / "file").write_text("in the way")
        return {key: spoiled / "file" / "folder"} | overrides

    return make


def keys(**overrides: Any) -> Make:
    return lambda spoiled, assets: overrides


CASES: dict[str, tuple[Make, list[str]]] = {
    "no assets": (keys(model__hf_assets_path="nowhere"), ["model.hf_assets_path", "nowhere", "tokenizer.json"]),
    "no tokenizer": (asset("tokenizer.json", None), ["model.hf_assets_path", "tokenizer.model"]),
    "not a tokenizer": (asset("tokenizer.json", b"{}"), ["copy/tokenizer.json"]),
    "no config.json": (asset("config.json", None), ["copy/config.json", "name a flavor"]),
    "another kind of model": (asset("config.json", config_json(model_type="gpt2")), ["model_type", "gpt2", "llama"]),
    "no such flavor": (keys(model__flavor="llama9"), ["model.flavor", "llama9", "llama3_8b"]),
    "a size that is no number": (
        asset("config.json", config_json(hidden_size="x")),
        ["copy/config.json", 'hidden_size = "x"'],
    ),
    "a RoPE without a type": (
        asset("config.json", config_json(rope_scaling={"factor": 4.0})),
        ["copy/config.json", "rope_scaling", "no rope_type"],
    ),
    "an id that is no number": (
        asset("config.json", config_json(eos_token_id="</s>")),
        ["copy/config.json", 'eos_token_id = "</s>"', "id of a token"],
    ),
    "more tokens than the model has": (asset("config.json", config_json(vocab_size=4000)), ["4096", "4000"]),
    "a RoPE that its config.json cannot say": (
        asset("config.json", olmo3_config(), checkpoint__enable=True, checkpoint__last_save_in_hf=True),
        ["truncate = false cannot be exported for Olmo 3", "rope.truncate = true"],
    ),
    "no weights": (
        asset("model.safetensors", None, checkpoint__initial_load_in_hf=True),
        ["checkpoint.initial_load_in_hf", "*.safetensors", "model.hf_assets_path"],
    ),
    "weights that do not fit": (
        asset("config.json", config_json(intermediate_size=128), checkpoint__initial_load_in_hf=True),
        ["model.layers.0.mlp.gate_proj.weight should be [128, 64] and is [96, 64]", "6 of 21 tensors"],
    ),
    "weights of fewer layers": (
        asset("config.json", config_json(num_hidden_layers=3), checkpoint__initial_load_in_hf=True),
        ["model.layers.2.self_attn.q_proj.weight should be [64, 64] and is missing"],
    ),
    "quantized weights": (
        asset(
            "config.json", config_json(quantization_config={"quant_method": "fp8"}), checkpoint__initial_load_in_hf=True
        ),
        ["copy/config.json", "quantization_config", '"fp8"', "dequantize first"],
    ),
    "a tied model with an output matrix of its own": (
        asset("config.json", config_json(tie_word_embeddings=True), checkpoint__initial_load_in_hf=True),
        ["copy/model.safetensors", "lm_head.weight", "tie_word_embeddings = true", "tie_word_embeddings = false"],
    ),
    "cut weights": (cut_weights, ["copy/model.safetensors", "Fetch it again"]),
    "an empty source": (text("a.jsonl", b""), ["'text'", "a.jsonl", "empty or blank"]),
    "blank documents": (text("a.jsonl", b'{"text": " "}\n\n{"text": null}\n'), ["a.jsonl", "empty or blank"]),
    "not UTF-8": (text("a.jsonl", b'{"text": "good"}\n{"text": "caf\xe9"}\n'), ["a.jsonl line 2", "UTF-8", "iconv"]),
    "not UTF-8 either": (text("a.txt", b"caf\xe9"), ["a.txt", "UTF-8", "byte 3", "iconv"]),
    "broken JSON": (text("a.jsonl", b'{"text": "good"}\n{"text": "cut\n'), ["a.jsonl line 2", "broken JSON"]),
    "another field": (text("a.jsonl", b'{"body": "x"}\n'), ["a.jsonl line 1", "'text'", "'body'", "text_field"]),
    "conversations without a template": (
        keys(data__sources__0__messages_field="messages", data__sources__0__long_document="drop"),
        ["chat template", "chat_template.jinja", "tokenizer_config.json", "instruct version"],
    ),
    "conversations in parts": (
        keys(data__sources__0__messages_field="messages"),
        ['messages_field = "messages"', 'long_document = "drop"', '"truncate"'],
    ),
    "conversations cut by rows": (
        keys(
            data__sources__0__messages_field="messages", data__sources__0__long_document="drop", data__packing="concat"
        ),
        ['packing = "concat"', '"best_fit"'],
    ),
    "rows with labels that would be cut": (
        lambda spoiled, assets: labelled(spoiled / "rows.parquet"),
        ["'text' has labels", "1 of its 2 documents are longer than", '"drop"', '"truncate"', '"split"'],
    ),
    "too little text": (
        lambda spoiled, assets: (
            text("a.jsonl", b'{"text": "red"}\n')(spoiled, assets) | {"data__sources__0__max_epochs": 1.0}
        ),
        ["'text'", "cannot fill its share", "the stage reads 4,096", "max_epochs = 1", "Lower training.steps"],
    ),
    "nothing long enough": (keys(data__sources__0__min_length=10**6), ["'text'", "no document left", "of 120"]),
    "lengths the wrong way round": (
        keys(data__sources__0__min_length=9, data__sources__0__max_length=8),
        ["min_length = 9", "max_length = 8"],
    ),
    "an unknown strategy": (keys(data__strategy="cut_4"), ["cut_4", "cut_4k"]),
    "a length to stand for": (keys(data__positions="pose"), ["target_seq_len", "at least 128"]),
    "no such file": (keys(data__sources__0__path="no/*.jsonl"), ["no/*.jsonl", "'text'"]),
    "a folder of nothing": (lambda spoiled, _: {"data__sources__0__path": spoiled}, ["'text'", ".jsonl", "nothing"]),
    "a batch that does not divide": (keys(training__global_batch_size=7), ["7 / 2 = 3.500", "6 or 8"]),
    "degrees": (keys(parallelism__data_parallel_shard_degree=3), ["= 3", "1 process", "NGPU"]),
    "pipeline": (keys(parallelism__pipeline_parallel_degree=2), ["pipeline parallelism is not offered", "FSDP2"]),
    "context": (keys(parallelism__context_parallel_degree=2), ["context_parallel_degree 2", "1 process"]),
    "flex on a CPU": (keys(model__attention_backend="flex"), ['"flex" cannot train on a CPU', '"sdpa"']),
    "varlen on a CPU": (
        keys(model__attention_backend="varlen", training__mixed_precision_param="bfloat16"),
        ['"varlen" needs a CUDA device', '"sdpa"'],
    ),
    "no such layout": (keys(parallelism__context_parallel_layout="zigzag"), ["zigzag", "headtail", "balanced"]),
    "no such exchange": (
        keys(parallelism__context_parallel_exchange="ring"),
        ["ring", "needed", "allgather", "ulysses"],
    ),
    "no such backend": (
        keys(compile__enable=True, compile__backend="induktor"),
        ["compile.backend", "induktor", "inductor"],
    ),
    "a backend that does not work here": (
        keys(compile__enable=True, compile__backend="tvm"),
        ["compile.backend", "tvm", "cannot compile here"],
    ),
    "no such recipe of FP8": (keys(quantize__recipe_name="columnwise"), ["columnwise", "rowwise", "tensorwise"]),
    "FP8 on a CPU": (
        keys(quantize__recipe_name="rowwise", quantize__smallest_features=16),
        ["quantize.recipe_name", "no GPU", "emulate = true"],
    ),
    "head chunks of another exchange": (
        keys(parallelism__context_parallel_head_chunks=2),
        ["context_parallel_head_chunks = 2", '"ulysses"'],
    ),
    "a tile of no tokens": (keys(training__mlp_tile_tokens=0), ["training.mlp_tile_tokens = 0", "at least 1"]),
    "a tile of fewer": (keys(training__mlp_tile_tokens=-5), ["training.mlp_tile_tokens = -5", "at least 1"]),
    "a loss tile of nothing": (keys(training__loss_tile_mib=0), ["training.loss_tile_mib = 0", "at least 1"]),
    "an unknown way of recomputing": (
        keys(activation_checkpoint__mode="selective", activation_checkpoint__selective_ac_option="0"),
        ["selective_ac_option", '"0"', '"op"', '"2"'],
    ),
    "offload of what is not kept": (
        keys(activation_checkpoint__offload=True),
        ["activation_checkpoint.offload = true", 'mode = "none"', '"full"'],
    ),
    "a moment that bfloat16 would hold still": (
        keys(optimizer__state_dtype="bfloat16", optimizer__beta2=0.999),
        ["optimizer.beta2 = 0.999", "state_dtype", "0.996"],
    ),
    "a step without checkpoints": (keys(checkpoint__load_step=3), ["load_step = 3", "enable = true"]),
    "a step that is not there": (keys(checkpoint__enable=True, checkpoint__load_step=3), ["load_step = 3", "-1"]),
    "a dump folder below a file": (below_a_file("job__dump_folder"), ["job.dump_folder", "file is a file"]),
    "a checkpoint folder below a file": (
        below_a_file("checkpoint__folder", checkpoint__enable=True),
        ["checkpoint.folder", "file is a file"],
    ),
    "a cache below a file": (below_a_file("data__cache_folder"), ["data.cache_folder", "file is a file"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_paragraph_that_says_what_would_work(
    case: str, folder: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make, words = CASES[case]
    out = tmp_path / "out"
    message = ends_with(flags(folder, assets, **{"job__dump_folder": out} | make(tmp_path, assets)), monkeypatch)
    for word in words:
        assert word in message
    assert not list(out.rglob("*.*"))


def test_wandb_that_is_not_installed(folder: Path, assets: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = ends_with(flags(folder, assets, metrics__enable_wandb=True), monkeypatch)
    assert "metrics.enable_wandb" in message and "pip install" in message


def test_tensor_parallelism_that_does_not_divide_the_heads(folder: Path, assets: Path):
    """With eight processes: no launcher is needed to find it out."""
    config = load_config(flags(folder, assets, parallelism__tensor_parallel_degree=8))
    with pytest.raises(UserError, match=r"tensor_parallel_degree = 8 does not .* 4 query heads .*; 1, 2 would"):
        inputs_of(config, 8)


def test_every_check_of_the_tables_runs_once(folder: Path, assets: Path, monkeypatch: pytest.MonkeyPatch):
    """At the door, and not again when the files of the stage are read, where this start fails."""
    calls: Counter[str] = Counter()
    modules = (config_checks, data_checks, rope_checks, evaluation_checks, check_config)
    files = {module.__file__ for module in modules}

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename in files:
            calls[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        message = ends_with(flags(folder, assets, model__flavor="nothing"), monkeypatch)
    finally:
        sys.setprofile(None)
    assert "nothing" in message
    of_tables = ("check_tables", "check_config", "check_ranges", "check_data", "check_rope", "check_evaluation")
    assert {name: calls[name] for name in of_tables} == dict.fromkeys(of_tables, 1)
    of_items = {"_check_range", "_check_ranges", "_check_local", "_check_source"}
    assert not [name for name, n in calls.items() if "check_" in name and n > 1 and name not in of_items]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="NGPU=1"):
        device.pick_device(1)


# ---- corpora --------------------------------------------------------------------------------------------------------


def grow_the_text(corpus: Path, text: Path) -> None:
    with text.open("a") as file:
        file.write('{"text": "one more"}\n')


def cut_a_shard(corpus: Path, text: Path) -> None:
    os.truncate(corpus / "data-00000-of-00001.arrow", 1000)


CORPORA: dict[str, tuple[Callable[[Path, Path], None], list[str]]] = {
    "its text has changed": (grow_the_text, ["mine.jsonl", "has changed", "tokenize it again"]),
    "a shard is cut": (cut_a_shard, ["data-00000-of-00001.arrow", "1000 bytes", "tokenize the text again"]),
    "a shard is missing": (
        lambda corpus, _: (corpus / "data-00000-of-00001.arrow").unlink(),
        ["data-00000-of-00001.arrow", "missing", "tokenize the text again"],
    ),
    "no list of shards": (lambda corpus, _: (corpus / "state.json").unlink(), ["state.json", "not a tokenized"]),
    "not JSON": (lambda corpus, _: (corpus / "corpus.json").write_text("{"), ["corpus.json", "is not JSON"]),
}


@pytest.mark.parametrize("case", CORPORA)
def test_a_corpus_that_is_not_what_it_was(
    case: str, folder: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from torchtitan.config.data_schema import Data, Source
    from torchtitan.datasets.tokenizer import load_tokenizer
    from torchtitan.extensions.ingest.tokenize import tokenize_source

    mine = tmp_path / "mine.jsonl"
    shutil.copy(folder / "text.jsonl", mine)
    source = Source(name="mine", path=str(mine))
    corpus = tokenize_source(source, load_tokenizer(assets), Data(cache_folder=str(tmp_path / "cache")), 1)
    spoil, words = CORPORA[case]
    spoil(corpus, mine)
    message = ends_with(flags(folder, assets, data__sources__0__path=corpus), monkeypatch)
    for word in words:
        assert word in message


def test_a_disk_that_fills_up_while_text_is_tokenized(
    folder: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torchtitan.extensions.ingest.units._write_dataset_files", full)
    message = ends_with(flags(folder, assets, data__cache_folder=tmp_path), monkeypatch)
    assert "data.cache_folder" in message and "No space left" in message and "GiB" in message
    assert all(p.name.startswith(".unfinished-") for p in tmp_path.iterdir() if p.is_dir()), "nothing looks finished"


# ---- several processes, and what a run has left ---------------------------------------------------------------------


def launch(args: list[str], nproc: int = 2) -> tuple[int, str]:
    command = [sys.executable, "-m", "torchtitan.extensions.cluster.launch", "--nproc", str(nproc), "--", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    return ended.returncode, ended.stdout


def test_of_two_processes_one_speaks(folder: Path, assets: Path, tmp_path: Path):
    """A folder that only one of them would write to is still refused by both, before they meet."""
    code, output = launch(flags(folder, assets, **below_a_file("job__dump_folder")(tmp_path, assets)))
    assert code == 1
    (line,) = output.splitlines()
    assert "job.dump_folder" in line


def test_a_loss_that_is_not_a_number(folder: Path, assets: Path, tmp_path: Path):
    spoiled = tmp_path / "assets"
    shutil.copytree(assets, spoiled)
    weights = load_file(spoiled / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, spoiled / "model.safetensors")
    options = {"checkpoint__enable": True, "checkpoint__interval": 1, "checkpoint__initial_load_in_hf": True}
    code, output = launch(flags(folder, spoiled, **options, job__dump_folder=tmp_path / "out"))
    assert code == 1 and "Traceback" not in output
    assert output.count("step 1: loss nan") == 1
    assert all(output.count(f"row {row}: documents text ") == 1 for row in range(8))
    assert not list((tmp_path / "out" / "checkpoint").iterdir())


@pytest.fixture(scope="module")
def finished(folder: Path, assets: Path) -> Path:
    """The dump folder of a run with a checkpoint."""
    out = folder / "finished"
    code, output = launch(flags(folder, assets, checkpoint__enable=True, job__dump_folder=out), nproc=1)
    assert code == 0, output
    return out


def another_text(spoiled: Path, assets: Path) -> Overrides:
    path = spoiled / "text.jsonl"
    path.write_text('{"text": "' + "red house " * 500 + '"}\n')
    return {"data__sources__0__path": path}


def another_tokenizer(spoiled: Path, assets: Path) -> Overrides:
    content = json.loads((assets / "tokenizer.json").read_bytes())
    return asset("tokenizer.json", json.dumps(content, indent=1).encode() + b"\n")(spoiled, assets)


RESUMED: dict[str, tuple[Make, list[str]]] = {
    "another architecture": (asset("config.json", config_json(intermediate_size=128)), ["ffn_dim 96 -> 128"]),
    "another flavor": (keys(model__flavor="debugmodel"), ["n_layers 2 -> 6", "dim 64 -> 256"]),
    "another rope": (keys(rope__theta=5e5), ["rope.theta 10000.0 -> 500000.0"]),
    "another tokenizer": (another_tokenizer, ["the tokenizer"]),
    "another text": (another_text, ["source text: its documents"]),
    "another row length": (keys(training__seq_len=64), ["seq_len 128 -> 64"]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_checkpoints_of_another_run_are_refused_and_left_alone(
    case: str, folder: Path, assets: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    before = contents()
    make, words = RESUMED[case]
    options = {"checkpoint__enable": True, "job__dump_folder": finished} | make(tmp_path, assets)
    message = ends_with(flags(folder, assets, **options), monkeypatch)
    for word in [*words, str(finished / "checkpoint"), "job.dump_folder"]:
        assert word in message
    assert contents() == before


def test_a_new_key_that_decides_rows_or_the_model_is_compared_by_its_value(
    folder: Path, assets: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As if model.hf_assets_path were such a key: the same assets at another place."""
    monkeypatch.setattr(torchtitan.components.changes, "BY_CONTENT", ())
    moved = shutil.copytree(assets, tmp_path / "moved")
    message = ends_with(flags(folder, moved, checkpoint__enable=True, job__dump_folder=finished), monkeypatch)
    assert f"model.hf_assets_path {assets} -> {moved}" in message


def test_a_step_that_is_not_there_names_those_that_are(
    folder: Path, assets: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"checkpoint__enable": True, "checkpoint__load_step": 3, "job__dump_folder": finished}
    message = ends_with(flags(folder, assets, **options), monkeypatch)
    assert "checkpoint.load_step = 3" in message and "its steps: 4." in message


def test_the_dumped_configuration_can_be_given_back(finished: Path, folder: Path, assets: Path):
    import dataclasses

    asked = load_config(flags(folder, assets, checkpoint__enable=True, job__dump_folder=finished))
    given_back = load_config(["--job.config_file", str(finished / "config.toml")])
    same_start = {"config_file": None}
    assert dataclasses.replace(given_back, job=dataclasses.replace(given_back.job, **same_start)) == (
        dataclasses.replace(asked, job=dataclasses.replace(asked.job, **same_start))
    )


def test_interrupted_while_starting(folder: Path, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while text is hashed or weights are read: a line and no traceback."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torchtitan.components.setup, "prepare_inputs", interrupted)
    monkeypatch.setattr(faulthandler, "enable", lambda: None)
    monkeypatch.setattr(console, "file", written := io.StringIO())
    assert main(flags(folder, assets)) == 130
    assert "interrupted before the first step" in written.getvalue()
