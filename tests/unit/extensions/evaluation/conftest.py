"""A tiny model with the repository's tokenizer, also as a Hugging Face folder; the scripts as modules; files for
qa_*."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.scripts import load_script
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation import words
from torchtitan.models.hf.weights import hf_name
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights

REPOSITORY = Path(__file__).parents[4]
TOKENIZER = REPOSITORY / "assets/tokenizer"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A file of scripts/ as a module."""
    return load_script


@pytest.fixture(scope="session")
def model() -> Transformer:
    rope = RopeArgs(100.0, max_position_embeddings=64)
    vocabulary = load_tokenizer(TOKENIZER).vocab_size
    model = Transformer(TransformerArgs(32, 2, 4, 2, 8, 64, vocabulary, tied_embeddings=True, rope=rope))
    init_weights(model, seed=0)
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(3)  # logits far from 0, so that every part of the model shows in them
    return model


@pytest.fixture(scope="session")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    save_file({hf_name(n): p.detach().clone() for n, p in model.named_parameters()}, folder / "model.safetensors")
    args = model.args
    config = {
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": True,
        "rope_theta": args.rope.theta,
        "max_position_embeddings": args.rope.max_position_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def qa_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files in the form of HotpotQA and SQuAD, with documents for 16K tokens."""
    folder = tmp_path_factory.mktemp("qa")

    def fact(n: int) -> str:
        return f"The birds of {words.words()[n]} hill nest in {words.words()[n + 1]} trees. The colour of {n} is c{n}q."

    def qa(n: int) -> dict[str, Any]:
        answers = [{"text": f"c{n}q"}, {"text": f"c{n}q"}, {"text": f"a hue called c{n}q"}]
        return {"question": f"The colour of {n}?", "answers": answers, "is_impossible": False}

    impossible = {"question": "Why?", "answers": [], "is_impossible": True}
    articles = []
    for a in range(80):
        paragraphs = [{"context": fact(10 * a + p), "qas": [qa(10 * a + p), impossible]} for p in range(10)]
        articles.append({"title": f"article {a}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    entries = []
    for n in range(80):
        context = [[f"Page {10 * n + p}", [fact(10 * n + p), " It rains there."]] for p in range(10)]
        entries.append({"question": f"The colour of {10 * n + 3}?", "answer": f"c{10 * n + 3}q", "context": context})
    (folder / "hotpot.json").write_text(json.dumps(entries))
    return [folder / "hotpot.json", folder / "squad.json"]
