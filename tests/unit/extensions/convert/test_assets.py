"""What an export takes over from the folder that its model was trained from, and with which limits."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests.unit.extensions.convert.models import LLAMA, SCALINGS, TRAINED, random_weights, with_rope
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.convert import assets as assets_module
from torchtitan.extensions.convert.export import write_hugging_face
from torchtitan.tools.errors import UserError

TOKENIZER = Path(__file__).parents[4] / "assets" / "tokenizer"
TAKEN = [
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE-MODEL.md",
    "merges.txt",
    "Notice.txt",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "TERMS-OF-USE.txt",
    "tokenization_qwen.py",
    "tokenizer.json",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "USE_POLICY.md",
    "vocab.json",
]
NOT_TAKEN = [
    "README.md",  # describes the original
    "params.json",  # by which vLLM would read the folder in Mistral's format
    "model.safetensors.index.json",
    "consolidated.00.pth",
    "tokenizer.safetensors",
    "vocab.npy",
    "license_plates.parquet",
    "tokens.txt",
    "hf_token",
    "modeling_llama.py",
    "optimizer.bin",
    "preprocessor_config.json",
    "additional_chat_templates/readme.md",
]


def exported(folder: Path, vocabulary: int = 4096) -> tuple[Path, str]:
    """An export of a small model with these assets, and all of its notes."""
    args = with_rope(SCALINGS["ntk"], replace(LLAMA, vocab_size=vocabulary))
    out = folder.with_name(f"{folder.name} export")
    return out, "\n".join(write_hugging_face(random_weights(args), out, folder))


def test_tokenizers_templates_and_terms_are_copied(tmp_path: Path):
    source, blobs = tmp_path / "model", tmp_path / "blobs"
    (source / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for name in TAKEN + NOT_TAKEN:
        real = TOKENIZER / name
        content = real.read_bytes() if real.is_file() else f'{{"name": "{name}"}}'.encode()
        blob = blobs / name.replace("/", "-")  # as the hub's cache has them
        blob.write_bytes(content)
        (source / name).symlink_to(os.path.relpath(blob, (source / name).parent))
    (source / "vocab.txt").symlink_to("nowhere")
    out, notes = exported(source)
    found = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    written = {"config.json", "generation_config.json", "model.safetensors", "expected.json"}
    assert set(found) - written == set(TAKEN)
    assert not any(path.is_symlink() for path in found.values())
    assert all(found[name].read_bytes() == (source / name).read_bytes() for name in TAKEN)
    assert "vocab.txt is not copied: it is a link to a file that does not exist." in notes
    # again from the export, with the same files
    assert set(assets_module.copied_files(out)[0]) == set(TAKEN)


def test_an_export_without_a_tokenizer_says_so(tmp_path: Path):
    """The folder that a stage was started with may be gone when it ends."""
    (tmp_path / "empty").mkdir()
    for name, why in (("empty", "has none"), ("gone", "is not a folder")):
        out = tmp_path / f"{name}-out"
        notes = write_hugging_face(random_weights(with_rope(None)), out, tmp_path / name)
        assert any("has no tokenizer" in note and f"{tmp_path / name} {why}" in note for note in notes)
        assert (out / "model.safetensors").is_file()


def test_a_large_file_is_named_and_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vocab.txt").write_bytes(b"x" * 2**21)
    monkeypatch.setattr(assets_module, "LARGEST", 2**20)
    out, notes = exported(tmp_path / "model")
    assert "vocab.txt is not copied: it has 2 MiB." in notes and not (out / "vocab.txt").exists()


def folder_with(path: Path, **files: dict[str, object]) -> Path:
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((TOKENIZER / name).read_bytes())
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_no_limit_of_the_original_ends_texts_at_its_length(tmp_path: Path):
    """As transformers reads them."""
    about = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    original = {"_from_model_config": True, "max_length": 64, "temperature": 0.7, "do_sample": True, "pad_token_id": 3}
    original |= {"transformers_version": "4.31.0"}
    source = folder_with(tmp_path / "a", generation_config=original, tokenizer_config=about | {"model_max_length": 64})
    out, notes = exported(source)
    read = GenerationConfig.from_pretrained(out)
    assert (read.max_length, read.temperature, read.pad_token_id, read.eos_token_id) == (TRAINED, 0.7, 3, 1)
    assert f"max_length, 64 in {source}, is {TRAINED} now" in notes
    # with it, transformers would build the generation configuration anew from config.json
    assert "_from_model_config" not in json.loads((out / "generation_config.json").read_text())
    assert AutoTokenizer.from_pretrained(out).model_max_length == TRAINED

    # longer limits, and none, stay
    limits = {"max_length": 4 * TRAINED, "max_new_tokens": 50}
    for name, limit in (("b", 4 * TRAINED), ("c", None), ("d", 1e30)):
        config = about | {"model_max_length": limit}
        out, notes = exported(folder_with(tmp_path / name, generation_config=limits, tokenizer_config=config))
        read = GenerationConfig.from_pretrained(out)
        assert (read.max_length, read.max_new_tokens) == (4 * TRAINED, 50)
        assert "keeps max_new_tokens = 50" in notes and "is 256 now" not in notes
        assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == limit


def test_assets_of_another_model_are_refused_by_file_and_key(tmp_path: Path):
    """A named flavor, or --assets: nothing has read their config.json before."""
    about = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    for number, (file, content, named) in enumerate(
        (
            ("generation_config", {"eos_token_id": "1"}, 'eos_token_id = "1"'),
            ("generation_config", {"eos_token_id": [1, [2]]}, "eos_token_id = [1, [2]]"),
            ("generation_config", {"eos_token_id": 4096}, "eos_token_id = 4096"),
            ("config", {"model_type": "llama", "pad_token_id": 99999}, "pad_token_id = 99999"),
            ("tokenizer_config", about | {"eos_token": "</s>"}, "eos_token = '</s>'"),
        )
    ):
        folder = folder_with(tmp_path / str(number), **{file: content})
        with pytest.raises(UserError) as error:
            exported(folder)
        assert f"{folder}/{file}.json" in str(error.value) and named in str(error.value)
    out, _ = exported(folder_with(tmp_path / "empty", generation_config={"eos_token_id": []}))
    assert GenerationConfig.from_pretrained(out).eos_token_id == 1


def test_every_export_says_that_bos_must_be_written(tmp_path: Path):
    """An export of an export too, whose add_bos_token transformers does not go by."""
    weights = replace(
        random_weights(with_rope(None, replace(LLAMA, vocab_size=4096))), manifest={"begins_with_bos": True}
    )
    folder = TOKENIZER
    for generation in ("first", "second"):
        notes = write_hugging_face(weights, tmp_path / generation, folder)
        folder = tmp_path / generation
        begins = AutoTokenizer.from_pretrained(folder)("red").input_ids[0] == load_tokenizer(folder).bos_id
        assert not begins and any("which its tokenizer does not add by itself" in note for note in notes), generation


def test_an_export_of_conversations_says_where_a_generation_stops(tmp_path: Path):
    args = with_rope(None, replace(LLAMA, vocab_size=4096))
    spelled = {t["id"]: t["content"] for t in json.loads((TOKENIZER / "tokenizer.json").read_text())["added_tokens"]}
    for number, (ends, assets, says) in enumerate(
        (
            (
                [0, 7],
                TOKENIZER,
                f"Generation stops at {spelled[1]} (1) and {spelled[0]} (0) and token (7): eos_token_id",
            ),
            ([1], TOKENIZER, f"Generation stops at {spelled[1]} (1): eos_token_id"),
            ([], TOKENIZER, ""),
            ([5], None, "Generation stops at token (5): eos"),
        )
    ):
        weights = replace(random_weights(args), manifest={"ends_of_turn": ends})
        notes = "\n".join(write_hugging_face(weights, tmp_path / str(number), assets))
        assert says in notes and ("stops at" in notes) == bool(says), notes


def test_a_tokenizer_that_cuts_or_has_more_tokens_than_the_model_is_said(tmp_path: Path):
    description = json.loads((TOKENIZER / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    _, notes = exported(folder_with(tmp_path / "cut", tokenizer=description | {"truncation": cut}))
    assert "texts are cut after 512 tokens" in notes and "4096 tokens, the model" not in notes
    _, notes = exported(folder_with(tmp_path / "more"), vocabulary=4000)
    assert "has 4096 tokens, the model only 4000" in notes and "cut after" not in notes
