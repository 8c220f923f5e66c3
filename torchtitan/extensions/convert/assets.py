"""What an export takes from the folder that its model was trained from, beside config.json: the tokenizer, the terms of
use, the defaults of generation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torchtitan.datasets.tokenizer import json_if_present

# By a name's form, so that the next kind of tokenizer is copied too; never weights, data or the model card, which
# describes the original. tokenizer.model.v3 and tekken.json are Mistral's, *.tiktoken is Qwen's.
_TOKENIZER = re.compile(
    r"(tokeniz|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece|tekken|chat_template).*"
    r"\.(json|txt|model|jinja|py|bpe)|.*\.(tiktoken|model(\.v\d\w*)?)"
)
_TERMS = re.compile(r".*(licen[cs]e|notice|terms|use_policy|copying|copyright).*", re.IGNORECASE)
_TERMS_SUFFIXES = ("", ".txt", ".md", ".pdf", ".html")
_TEMPLATES = "additional_chat_templates"
LARGEST = 200 * 2**20
"""Bytes of a file that is copied; Gemma's tokenizer.json has 33 MB."""


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of the folder's tokenizer and its chat templates: {name relative to the folder: path}."""
    names = [path.name for path in _files(folder) if _TOKENIZER.fullmatch(path.name)]
    names += [f"{_TEMPLATES}/{path.name}" for path in _files(folder / _TEMPLATES) if path.suffix == ".jinja"]
    return {name: folder / name for name in names}


def copied_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """All files to copy, and a sentence for each that is not for a reason that its user should know."""
    files = tokenizer_files(folder)
    notes = []
    if not files:
        what = "has none" if folder.is_dir() else "is not a folder (any more)"
        notes.append(
            f"The export has no tokenizer, and no key of an original config.json but what was trained: {folder} {what}."
        )
    for path in _files(folder):
        if _TERMS.fullmatch(path.name) and path.suffix.lower() in _TERMS_SUFFIXES:
            files[path.name] = path
    for name, path in list(files.items()):
        if not path.exists():
            notes.append(f"{path} is not copied: it is a link to a file that does not exist.")
        elif path.stat().st_size > LARGEST:
            notes.append(f"{path} is not copied: it has {path.stat().st_size / 2**20:.0f} MiB.")
        else:
            continue
        del files[name]
    if (cut := json_if_present(folder / "tokenizer.json").get("truncation")) and "tokenizer.json" in files:
        notes.append(
            f"tokenizer.json says that texts are cut after {cut.get('max_length')} tokens (truncation): a server that "
            "uses it as it is cuts prompts there. Set truncation to null in it before you serve the model."
        )
    return files, notes


def tokenizer_config(folder: Path, length: int, add_bos: bool | None) -> dict[str, Any] | None:
    """tokenizer_config.json with its model_max_length raised to the trained length, and with add_bos_token if texts
    must begin with BOS, or must not, other than the tokenizer does by itself; None: it needs no change.

    vLLM's longest context is no longer, and whoever asks the tokenizer would get the old one.
    """
    config = json_if_present(folder / "tokenizer_config.json")
    limit = config.get("model_max_length")
    changes = {"model_max_length": length} if isinstance(limit, int | float) and limit < length else {}
    changes |= {} if add_bos is None or not config else {"add_bos_token": add_bos}
    return config | changes if changes else None


def note_on_bos(trained: bool) -> str:
    """How to ask a model whose tokenizer does not begin texts as in training. trained: whether they began with BOS.

    transformers 5 goes by tokenizer.json alone, which stays as it is: it is what a next stage knows the tokenizer by.
    """
    if trained:
        return (
            "The texts that the model was trained on begin with BOS, which its tokenizer does not add by itself: put "
            "its spelling (bos_token) before prompts of plain text."
        )
    return (
        "The texts that the model was trained on do not begin with BOS, which its tokenizer adds by itself: encode "
        "prompts of plain text with add_special_tokens = False (lm-eval's hf: --model_args add_bos_token=False)."
    )


def generation_config(folder: Path | None, config: dict[str, Any], length: int) -> tuple[dict[str, Any], list[str]]:
    """generation_config.json, and notes on its limits. config: the config.json beside it; length: the trained one.

    A max_length that is shorter would end texts at the old length: it is raised. `_from_model_config` would make
    transformers build the file anew from config.json, without what stands here alone.
    """
    original = json_if_present(folder / "generation_config.json") if folder else {}
    generation = {k: v for k, v in original.items() if not k.startswith("_") and k != "transformers_version"}
    for key in ("bos_token_id", "eos_token_id"):
        if generation.get(key) in (None, []) and config[key] is not None:
            generation[key] = config[key]
    notes = []
    limit, response = generation.get("max_length"), generation.get("max_new_tokens")
    if isinstance(limit, int | float) and limit < length:
        generation["max_length"] = length
        notes.append(f"generation_config.json: max_length, {limit} in {folder}, is {length} now, the trained length.")
    if response is not None:
        notes.append(
            f"generation_config.json keeps max_new_tokens = {response}: transformers and vLLM end a response there "
            "unless the request says another length (some versions of vLLM: even then)."
        )
    return generation, notes


def _files(folder: Path) -> list[Path]:
    """Of a folder that may not exist: what is not a folder, links that lead nowhere too."""
    return sorted(path for path in folder.glob("*") if not path.is_dir())
