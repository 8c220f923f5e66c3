"""Hugging Face folders as they come: which files are read, the same by every reader, and what is refused by all."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from torchtitan.components.start import find_start
from torchtitan.config import load_config
from torchtitan.extensions.convert.conversion import open_any
from torchtitan.extensions.evaluation.loading import load
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.weights import check_weights, hf_name, load_weights
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

TOKENIZER = Path(__file__).parents[4] / "assets/tokenizer"
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_process")  # load_weights is collective


def tensors(seed: int = 0) -> Tensors:
    """What transformers' own model of CONFIG holds."""
    torch.manual_seed(seed)
    return {name: tensor.clone() for name, tensor in LlamaForCausalLM(LlamaConfig(**CONFIG)).state_dict().items()}


WEIGHTS, STALE = tensors(0), tensors(1)
FIRST = list(WEIGHTS)[:9]


def folder_of(folder: Path, files: dict[str, Tensors], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        save_file(content, folder / name, metadata={"format": "pt"})
    LlamaConfig(**{**CONFIG, "tie_word_embeddings": False, **config}).save_pretrained(folder)
    return folder


def halves(weights: Tensors = WEIGHTS) -> dict[str, Tensors]:
    parts = {True: {}, False: {}}
    for name, tensor in weights.items():
        parts[name in FIRST][name] = tensor
    return {ONE: parts[True], TWO: parts[False]}


def index(folder: Path, files: dict[str, Any]) -> None:
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def sharded(folder: Path, weights: Tensors = WEIGHTS, **config: Any) -> Path:
    index(folder_of(folder, halves(weights), **config), halves(weights))
    return folder


def single(folder: Path, changed: Tensors | None = None, without: str = "", **config: Any) -> Path:
    weights = {name: t for name, t in {**WEIGHTS, **(changed or {})}.items() if name != without}
    return folder_of(folder, {"model.safetensors": weights}, **config)


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def in_training(folder: Path) -> Tensors:
    start = find_start(load_config(["--checkpoint.initial_load_path", str(folder)]))
    assert start and start.manifest is None and start.args
    check_weights(start.path, start.args)
    model = Transformer(start.args)
    load_weights(model, start.path)
    return {hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}


def in_conversion(folder: Path) -> Tensors:
    weights = open_any(folder)
    return {hf_name(name): weights.read(name) for name in weights.shapes}


def in_evaluation(folder: Path) -> Tensors:
    """And in the search, which loads a model by this function."""
    model = load(folder, "float32", tokenizer_folder=TOKENIZER).model
    return {hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}


READERS = (in_training, in_conversion, in_evaluation)


def check_readers(folder: Path, expected: Tensors) -> None:
    for reader in READERS:
        found = reader(folder)
        assert list(found) != [] and set(found) == set(expected), reader.__name__
        for name, tensor in expected.items():
            assert torch.equal(found[name].double(), tensor.double()), (reader.__name__, name)


def of_transformers(folder: Path) -> Tensors:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def linked(folder: Path) -> Path:
    """As the hub's cache has it: snapshots/COMMIT/NAME is a link to blobs/HASH."""
    sharded(folder)
    (folder / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        path.rename(folder / "blobs" / str(number))
        path.symlink_to(Path("blobs") / str(number))
    return folder


def with_meta_names(folder: Path) -> Path:
    """As Mistral publishes it."""
    sharded(folder)
    save_file({"layers.0.attention.wq.weight": torch.ones(16, 16)}, folder / "consolidated.safetensors")
    return folder


def with_original(folder: Path) -> Path:
    """As Meta publishes it, and with other things that are no files of the model."""
    folder_of(single(folder) / "original", {"model.safetensors": STALE})
    (folder / "._model.safetensors").write_bytes(b"left by macOS")
    (folder / "backup.safetensors").mkdir()
    (folder / "model-00001-of-00002.safetensors.incomplete").write_bytes(b"")
    return folder


def with_damage_beside(folder: Path) -> Path:
    (sharded(folder) / "consolidated.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x")
    return folder


def partly_indexed(folder: Path) -> Path:
    """Names that the index lacks and its files hold are read, by transformers and vLLM alike."""
    names = {file: list(content)[1:] for file, content in halves().items()}
    index(sharded(folder), names)
    return folder


INV_FREQ = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
READABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "one file": (single, ""),
    "shards": (sharded, ""),
    "links": (linked, ""),
    "Meta's names beside": (with_meta_names, "vLLM reads it instead"),
    "original/": (with_original, ""),
    "damage beside": (with_damage_beside, "consolidated.safetensors is not read"),
    "an index that lacks names": (partly_indexed, ""),
    "inv_freq": (lambda folder: single(folder, INV_FREQ), ""),
    "tied, twice the same": (lambda f: single(f, {HEAD: WEIGHTS[EMBEDDING].clone()}, tie_word_embeddings=True), ""),
    "tied": (lambda folder: single(folder, without=HEAD, tie_word_embeddings=True), ""),
    "several dtypes": (
        lambda folder: single(folder, {EMBEDDING: WEIGHTS[EMBEDDING].double(), HEAD: WEIGHTS[HEAD].half()}),
        "19 of F32, 1 of F",
    ),
    "no quantization": (lambda folder: edit_config(single(folder), quantization_config=None), ""),
}


@pytest.mark.parametrize("kind", READABLE)
def test_every_reader_takes_the_tensors_that_transformers_takes(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    make, said = READABLE[kind]
    folder = make(tmp_path / "model")
    logger = logging.getLogger("torchtitan")
    logger.addHandler(caplog.handler)
    try:
        check_readers(folder, of_transformers(folder))
    finally:
        logger.removeHandler(caplog.handler)
    warnings = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert [said in message for message in warnings] == [True] * bool(said)


def test_shards_without_an_index_are_read_if_they_are_whole(tmp_path: Path):
    """vLLM reads them too; transformers does not."""
    folder = folder_of(tmp_path, halves())
    with pytest.raises(OSError, match="no file named"):
        of_transformers(folder)
    check_readers(folder, WEIGHTS)


def test_the_witness_reads_a_stale_file_before_the_index(tmp_path: Path):
    """Why that is refused: vLLM reads the files of the index."""
    folder = sharded(tmp_path)
    save_file(STALE, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(of_transformers(folder)[EMBEDDING], STALE[EMBEDDING])


def with_file(make: Callable[..., Path], name: str, content: Tensors | bytes) -> Callable[[Path], Path]:
    """A folder with one file more, or another content of it; an empty one removes it."""

    def changed(folder: Path) -> Path:
        make(folder)
        (folder / name).unlink(missing_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content:
            save_file(content, folder / name)
        return folder

    return changed


def stale_first(folder: Path) -> Path:
    """Case 04: what the folder lists last was taken."""
    folder_of(folder, {"model.safetensors": STALE})
    return sharded(folder)


def dangling(folder: Path) -> Path:
    (linked(folder) / "blobs" / "2").unlink()  # after config.json and generation_config.json, if there is one
    return folder


def as_bin(folder: Path) -> Path:
    folder_of(folder, {})
    torch.save(WEIGHTS, folder / "pytorch_model-00001-of-00001.bin")
    return folder


def header(text: str, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text.encode() + bytes(64)


LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}
STALE_HALVES = {f"model-0000{i}-of-00003.safetensors": {name: STALE[name]} for i, name in enumerate(FIRST[:3], 1)}
LYING = header('{"a":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}')
POINTER = b"version https://git-lfs.github.com/spec/v1\noid"
BAD_INDEX = {
    POINTER: ["git lfs pull"],
    b"": ["is not JSON"],
    b"[1]": ["holds a list"],
    b"\xff": ["is not JSON"],
    b'{"a":' * 5000: ["is not JSON"],
    b"{}": ["has no weight_map"],
    b'{"weight_map": {}}': ["has no weight_map"],
    b'{"weight_map": ["a"]}': ["has no weight_map"],
    b'{"weight_map": {"a": 3}}': ["weight_map.a = 3"],
    b'{"weight_map": {"a": "../other/model.safetensors"}}': ["'../other/model.safetensors'", "beside it"],
    b'{"weight_map": {"a": "/tmp/model.safetensors"}}': ["'/tmp/model.safetensors'"],
    b'{"weight_map": {"a": "pytorch_model.bin"}}': ["'pytorch_model.bin'"],
    b'{"weight_map": {"a": "%b.safetensors"}}' % (b"a" * 300): ["not whole", "aaa.safetensors"],
    b'{"weight_map": {"a": "\\u0000.safetensors"}}': ["not whole"],
}
REFUSED: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    **{f"index {text[:50]!r}": (with_file(sharded, INDEX, text), [INDEX, *says]) for text, says in BAD_INDEX.items()},
    "a stale file": (with_file(sharded, "model.safetensors", STALE), ["model.safetensors and", INDEX, ONE, "Move"]),
    "a stale file, written first": (stale_first, ["model.safetensors and", INDEX, ONE]),
    "other names in model.safetensors": (with_file(sharded, "model.safetensors", INV_FREQ), [INDEX, ONE, "vLLM"]),
    "shards of another count": (
        lambda folder: folder_of(sharded(folder), STALE_HALVES),
        [ONE, "model-00001-of-00003.safetensors", f"both hold {FIRST[0]}"],
    ),
    "shards beside one file": (
        lambda folder: folder_of(single(folder), {TWO: halves(STALE)[TWO]}),
        ["model.safetensors", TWO, "both hold"],
    ),
    "a variant beside one file": (
        with_file(single, "model.fp16.safetensors", STALE),
        ["model.fp16.safetensors", "both hold"],
    ),
    "a name in two shards": (
        with_file(sharded, TWO, halves()[TWO] | {FIRST[0]: STALE[FIRST[0]]}),
        [ONE, TWO, f"both hold {FIRST[0]}"],
    ),
    "a missing shard": (with_file(sharded, TWO, {}), ["not whole", f"Missing: {TWO}.", INDEX]),
    "a missing shard without an index": (lambda f: folder_of(f, {TWO: halves()[TWO]}), [f"Missing: {ONE}.", "more"]),
    "many missing shards": (
        lambda folder: folder_of(folder, {"model-00001-of-99999.safetensors": WEIGHTS}),
        ["model-00002-of-99999.safetensors"],
    ),
    "two sets without an index": (
        lambda folder: folder_of(folder, {**halves(), **STALE_HALVES}),
        [ONE, "model-00001-of-00003.safetensors", "both hold"],
    ),
    "a link to nothing": (dangling, ["not whole", "blobs/", "which is not there"]),
    "an index of other files": (
        lambda folder: [sharded(folder), index(folder, {TWO: FIRST, ONE: []})][0],
        [INDEX, f"says that {FIRST[0]} is in {TWO}", "Fetch"],
    ),
    "an index with more names": (
        lambda folder: [sharded(folder), index(folder, {**halves(), ONE: [*FIRST, "model.x"]})][0],
        [f"says that model.x is in {ONE}", "no file"],
    ),
    "a download that was interrupted": (
        with_file(lambda f: folder_of(f, {}), "model.safetensors.incomplete", b"12"),
        ["model.safetensors.incomplete, the beginning of a file: a download was interrupted"],
    ),
    "a shard that is not all there": (
        lambda folder: with_file(with_file(sharded, TWO, {}), f"{TWO}.incomplete", b"12")(folder),
        ["index.json names files that are not there. Missing: " + TWO, f"{TWO}.incomplete is the beginning of a file"],
    ),
    "another number of layers": (
        lambda folder: edit_config(single(folder), num_hidden_layers=1),
        ["the files have 2 layers, config.json or the flavor says 1; 0 of 12 tensors differ"],
    ),
    "no weights": (lambda folder: folder_of(folder, {}), ["*.safetensors"]),
    "an index alone": (
        with_file(lambda f: folder_of(f, {}), INDEX, b'{"weight_map": {"a": "a.safetensors"}}'),
        ["not whole"],
    ),
    "weights as .bin": (as_bin, ["pytorch_model-00001-of-00001.bin", "save_pretrained"]),
    "an empty file": (with_file(single, "model.safetensors", b""), ["model.safetensors cannot be read", "Fetch"]),
    "a pointer": (
        with_file(single, "model.safetensors", POINTER),
        ["git lfs pull"],
    ),
    "a pointer to config.json": (with_file(single, "config.json", POINTER), ["config.json is not", "git lfs pull"]),
    "a header that is cut": (with_file(single, "model.safetensors", header("{}", 1 << 40)), ["cannot be read"]),
    "a header that is no JSON": (with_file(single, "model.safetensors", header("{]")), ["cannot be read"]),
    "a header that lies": (with_file(single, "model.safetensors", LYING), ["cannot be read"]),
    "no tensors": (with_file(single, "model.safetensors", header("{}")[:-64]), ["21 of 21 tensors", "missing"]),
    "tensors of nothing": (
        lambda folder: single(folder, {EMBEDDING: torch.zeros(0, 16)}),
        [f"{EMBEDDING} should be [4096, 16] and is [0, 16]"],
    ),
    "an adapter beside": (with_file(single, "adapter_config.json", b"{}"), ["adapter_config.json", "Merge it first"]),
    "an adapter of a model": (
        with_file(single, "adapter_config.json", b'{"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M"}'),
        ["Merge it first", "names the model that it is of: HuggingFaceTB/SmolLM2-135M."],
    ),
    "an adapter's weights beside": (
        with_file(single, "adapter_model.safetensors", LORA),
        ["adapter_model.safetensors"],
    ),
    "an adapter of another name": (with_file(sharded, "x.safetensors", LORA), ["x.safetensors", "lora_A", "Merge"]),
    "another file named": (
        lambda folder: edit_config(single(folder), transformers_weights="other.safetensors"),
        ["transformers_weights = 'other.safetensors'"],
    ),
    "config.json cut": (with_file(single, "config.json", b"{"), ["config.json is not"]),
    "a bias": (
        lambda f: single(f, {"model.layers.0.mlp.up_proj.bias": torch.ones(24)}),
        ["up_proj.bias [24]", "place"],
    ),
    "a value head": (lambda f: single(f, {"v_head.summary.weight": torch.ones(1, 16)}), ["v_head.summary.weight"]),
    "no output matrix": (lambda f: single(f, without=HEAD), [f"{HEAD} should be", "missing", "tie_word_embeddings"]),
    "no embedding": (
        lambda f: single(f, without=EMBEDDING, tie_word_embeddings=True),
        [f"{EMBEDDING} should be [4096, 16] and is missing"],
    ),
    "tied, and another output matrix": (
        lambda folder: single(folder, tie_word_embeddings=True),
        [f"holds {HEAD}, another matrix than {EMBEDDING}", "token 0", "tie_word_embeddings = false"],
    ),
    "tied, and a row of the output matrix": (
        lambda f: single(
            f,
            {HEAD: WEIGHTS[EMBEDDING].index_fill(0, torch.tensor(4090), 1.0)},
            tie_word_embeddings=True,
        ),
        [HEAD, "token 4090"],
    ),
    "tied, and a smaller output matrix": (
        lambda folder: single(folder, {HEAD: torch.ones(4000, 16)}, tie_word_embeddings=True),
        ["[4096, 16] and [4000, 16]"],
    ),
}


def refusal(reader: Callable[[Path], Tensors], folder: Path) -> str:
    with pytest.raises(UserError) as error:
        reader(folder)
    return str(error.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_every_reader_refuses_what_could_be_read_in_two_ways(kind: str, tmp_path: Path):
    make, words = REFUSED[kind]
    folder = make(tmp_path / "model")
    for reader in READERS:
        message = refusal(reader, folder)
        assert not [word for word in words if word not in message], (reader.__name__, message)


def test_an_adapter_alone_is_named_as_one(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(LORA, tmp_path / "adapter_model.safetensors")
    for reader in READERS:
        assert "Merge it first" in refusal(reader, tmp_path), reader.__name__


def test_the_root_of_a_model_in_the_hubs_cache_names_the_folder(tmp_path: Path):
    inner = sharded(tmp_path / "models--a--b" / "snapshots" / ("3" * 40))
    for reader in READERS:
        for folder in (inner.parents[1], inner.parent):
            assert f"each version has its own folder: name {inner}." in refusal(reader, folder), reader.__name__
    with pytest.raises(UserError, match=f"does not exist.* name {inner}"):
        read_config(inner.parents[1])


def test_weights_without_a_config_are_not_guessed_at(tmp_path: Path):
    folder = single(tmp_path)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(in_conversion, folder)
    assert "neither config.json nor manifest.json" in refusal(in_evaluation, folder)


QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "config.json": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, '"gptq"'),
    "bitsandbytes": ({"quantization_config": {"load_in_8bit": True}}, '"bitsandbytes"'),
    "inside": ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "text_config.quantization_config"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, '"compressed-tensors"'),
    "MLX": ({"quantization": {"bits": 4, "group_size": 64}}, '"4 bits"'),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_models_are_refused_by_the_name_of_their_method(kind: str, tmp_path: Path):
    changes, named = QUANTIZED[kind]
    folder = edit_config(single(tmp_path), **changes)
    for reader in READERS:
        message = refusal(reader, folder)
        assert named in message and "dequantize first" in message and "delete the key" in message


def test_quantized_models_are_known_by_other_files(tmp_path: Path):
    folder = single(tmp_path)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert 'hf_quant_config.json says that the weights are quantized, by "FP8"' in refusal(in_training, folder)


Q = "model.layers.0.self_attn.q_proj"
STORED = {
    "float8": ({f"{Q}.weight": WEIGHTS[f"{Q}.weight"].to(torch.float8_e4m3fn)}, f"{Q}.weight is F8_E4M3"),
    "float8 of the other kind": ({f"{Q}.weight": WEIGHTS[f"{Q}.weight"].to(torch.float8_e5m2)}, "F8_E5M2"),
    "int8": ({f"{Q}.weight": torch.ones(16, 16, dtype=torch.int8)}, f"{Q}.weight is I8"),
    "uint8": ({HEAD: torch.ones(4096, 16, dtype=torch.uint8)}, f"{HEAD} is U8"),
    "int64": ({HEAD: torch.ones(4096, 16, dtype=torch.int64)}, f"{HEAD} is I64"),
    "scales": ({f"{Q}.weight_scale_inv": torch.ones(1, 1)}, f"{Q}.weight_scale_inv"),
    "GPTQ": ({f"{Q}.qweight": torch.ones(2, 16, dtype=torch.int32)}, f"{Q}.qweight"),
    "compressed": ({f"{Q}.weight_packed": torch.ones(16, 2, dtype=torch.int32)}, f"{Q}.weight_packed"),
}


@pytest.mark.parametrize("kind", STORED)
def test_quantized_weights_are_refused_whatever_config_json_says(kind: str, tmp_path: Path):
    """Case 19: they were taken as plain numbers."""
    changed, named = STORED[kind]
    folder = single(tmp_path, changed)
    for reader in READERS:
        message = refusal(reader, folder)
        assert named in message and "dequantize first" in message and "model.safetensors" in message


def test_a_folder_for_several_programs_is_read_alike(tmp_path: Path):
    """Training took the safetensors of such a folder, and a conversion Meta's file or torchtitan's."""
    folder = single(tmp_path)
    (folder / "consolidated.00.pth").write_bytes(b"")
    (folder / ".metadata").write_bytes(b"")
    check_readers(folder, WEIGHTS)
    assert read_config(folder).dim == 16
