"""Tokenizers that put a space before a text (Llama 2, Mistral): an answer has the tokens that it has after its
prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, trainers

from torchtitan.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtitan.extensions.evaluation.needle import needle_question
from torchtitan.extensions.evaluation.questions import default_text
from torchtitan.extensions.evaluation.tasks import tasks_of

ASSETS = Path(__file__).parents[4] / "assets" / "tokenizer"


@pytest.fixture(scope="module")
def prepending(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of Llama 2's kind, trained on Python's reference."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = default_text()[:200_000]
    lines = [word for line in text.splitlines() for word in line.replace(" ", "\0 ").split("\0") if word]
    made.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=1500, special_tokens=special))
    folder = tmp_path_factory.mktemp("prepending")
    about = json.loads(made.to_str())
    about["added_tokens"] = [token for token in about["added_tokens"] if not token["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(about))
    return load_tokenizer(folder)


def test_it_is_of_that_kind(prepending: Tokenizer) -> None:
    assert prepending.encode(" 12") != prepending.encode("a 12")[1:] == prepending.encode_continuation(" 12")
    assert prepending.decode(prepending.encode("a 12")) == "a 12"


@pytest.mark.parametrize("name", ["ruler", "recall"])
def test_targets_are_what_follows_the_prompt(name: str, prepending: Tokenizer) -> None:
    for task in tasks_of([name]):
        (item,) = task.make(prepending, default_text(), 8192, 1, 5, None)
        prompt, target = item.prompt.tolist(), item.target.tolist()
        said = prepending.decode([*prepending.encode(":"), *target])[1:]
        assert not said.startswith("  "), task.name
        assert prepending.encode(prepending.decode(prompt) + said) == prompt + target, task.name


def test_a_needles_answer_is_what_follows_the_question(prepending: Tokenizer) -> None:
    text = torch.tensor(prepending.encode(default_text()))
    for depth in (0.0, 0.5, 1.0):
        asked = needle_question(prepending, text, 700, np.random.default_rng(3), depth=depth)
        tokens, answer = [*asked.prompt.tolist(), *asked.target.tolist()], len(asked.prompt)
        assert len(tokens) == 700
        whole = prepending.decode(tokens)
        assert whole.endswith(f" is {asked.answers[0]}.") and "\n\n What" not in whole
        assert prepending.encode(whole)[answer - 700 :] == tokens[answer:]
