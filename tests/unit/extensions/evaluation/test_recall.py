"""HELMET's recall tasks: a reader of the prompts scores all, and budgets, depths and examples are the published
ones."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.distributed.harness import ASSETS
from tests.unit.extensions.evaluation.solvers import solve
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation import recall
from torchtitan.tools.errors import UserError

TOKENIZER = load_tokenizer(ASSETS)
TEXT = " ".join(f"The river {i} is near the stone. A bird sees it.\n" for i in range(900))


@pytest.mark.parametrize("name", [*recall.TASKS])
@pytest.mark.parametrize("length", [512, 1024, 2048, 8192, 16384])
def test_a_reader_scores_all_and_lengths_are_kept(name: str, length: int):
    if length == 512 and name in ("json_kv", "niah_mk_3"):
        return  # UUIDs of the tests' tokenizer are too long
    task = recall.TASKS[name]
    for item in task.make(TOKENIZER, TEXT, length, 1 if length > 8000 else 4, 0, TOKENIZER.bos_id):
        assert (item.task, item.length) == (name, length) and item.prompt[0] == TOKENIZER.bos_id
        assert 0.9 * length <= len(item.prompt) + item.max_new_tokens <= length
        prompt = TOKENIZER.decode(item.prompt[1:].tolist())
        assert task.score(", ".join(solve(item, prompt)), item.answers) == 1
        assert task.score(TOKENIZER.decode(item.target.tolist()), item.answers) == 1
        assert task.score("", item.answers) == task.score("00000000-0000-4000-8000", item.answers) == 0
        assert len(item.answers) == (4 if name == "niah_mv" else 1)
        if name != "json_kv":  # the answer begins on a line of its own, as HELMET has it
            assert prompt.splitlines()[-1].startswith("The special magic ")


def test_pairs_are_asked_for_at_six_depths_behind_two_examples():
    items = recall.TASKS["json_kv"].make(TOKENIZER, TEXT, 4096, 12, 3, None)
    assert [item.depth for item in items] == [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0] * 2
    counts = set()
    for item in items:
        prompt = TOKENIZER.decode(item.prompt.tolist())
        assert prompt.startswith('JSON data:\n{"')
        pairs = json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])
        asked = re.findall(r"^Key: (\S+)\nCorresponding value:(?: (\S+))?$", prompt, re.M)
        assert len(asked) == 3 and len({key for key, _ in asked}) == 3 and asked[2][1] == ""
        assert all(pairs[key] == value for key, value in asked[:2])
        place = list(pairs).index(asked[2][0])
        assert item.depth is not None and place == round(item.depth * (len(pairs) - 1))
        counts.add(len(pairs))
    assert max(counts) - min(counts) <= 3  # as many as fit


def test_budgets_are_the_published_ones():
    assert [task.max_new_tokens for task in recall.TASKS.values()] == [50, 100, 50, 100]


@pytest.mark.parametrize("name", [*recall.TASKS])
def test_the_same_seed_gives_the_same_items(name: str):
    def made(seed: int, count: int) -> list[torch.Tensor]:
        return [item.prompt for item in recall.TASKS[name].make(TOKENIZER, TEXT, 1024, count, seed, None)]

    assert torch.equal(made(0, 1)[0], made(0, 3)[0]) and not torch.equal(made(0, 1)[0], made(1, 1)[0])


def test_a_length_that_is_too_short_is_named():
    for name, task in recall.TASKS.items():
        with pytest.raises(UserError, match=rf"^{name} takes at least \d+ tokens .* the length is 150\.$"):
            task.make(TOKENIZER, TEXT, 150, 1, 0, None)
