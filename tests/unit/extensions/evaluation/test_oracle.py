"""From questions to a table of scores, with models whose answers are known: a model that writes the right answers
scores 100% on every task in both ways, a model that knows nothing scores 0%."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import ASSETS
from torchtitan.config.data_schema import Data
from torchtitan.config.schema import Evaluation, JobConfig, Training
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation.checks import GROUPS, is_answered
from torchtitan.extensions.evaluation.evaluate import evaluate, prepare
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.questions import Question
from torchtitan.extensions.evaluation.runner import Outcome, mean_by_length_and_depth
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import Transformer, TransformerArgs

TOKENIZER = load_tokenizer(ASSETS)
ARGS = TransformerArgs(16, 1, 2, 1, 8, 16, TOKENIZER.vocab_size, rope=RopeArgs(1e4, max_position_embeddings=4096))


class Uniform(Transformer):
    """All logits are equal."""

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: Any, **options: Any) -> Any:
        if options.get("labels") is not None:
            return None, torch.zeros(len(tokens))
        return torch.zeros(len(options["only"]), self.args.vocab_size)


class Oracle(Uniform):
    """Knows the answer to each prompt, then ends. It sees what the evaluation gives it: a stream of documents, prompts
    and answers, and then one new token per prompt."""

    def __init__(self, items: Sequence[Question]):
        super().__init__(ARGS)
        self.items = items
        self.read: list[list[int]] = []

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: Any, **options: Any) -> Any:
        logits = super().forward(tokens, positions, mask, **options)
        if options.get("labels") is not None:
            return logits
        if positions[0] == 0:
            begins = torch.nonzero(positions == 0)[:, 0].tolist()
            documents = [part.tolist() for part in tokens.tensor_split(begins[1:])]
            asked = [
                [d[: at + 1] for at in range(len(d)) if b + at in options["only"]] for d, b in zip(documents, begins)
            ]
            seen = [text for several in asked for text in several]
            self.read = [several[0] for several in asked]  # a prompt, and not the answer behind it
        else:
            assert positions.tolist() == [len(text) for text in self.read]
            self.read = [[*text, token] for text, token in zip(self.read, tokens.tolist(), strict=True)]
            seen = self.read
        for row, text in zip(logits, seen, strict=True):
            row[self.behind(text)] = 9.0
        return logits

    def behind(self, text: list[int]) -> int:
        for item in self.items:
            prompt = item.prompt.tolist()
            if text[: len(prompt)] == prompt:
                answer = [*item.target.tolist(), TOKENIZER.eos_id]
                return answer[min(len(text) - len(prompt), len(answer) - 1)]
        raise AssertionError("a text that begins with no prompt")


@pytest.fixture(scope="module")
def config(qa_files: list[Path]) -> JobConfig:
    names = ("ruler", "recall")
    e = Evaluation(
        needle_lengths=(300, 420),
        needle_depths=(0.0, 0.7),
        tasks=names,  # type: ignore[arg-type]
        task_lengths=(2400,),
        task_items=2,
        qa_files=tuple(str(file) for file in qa_files),
        generate=True,
    )
    return JobConfig(evaluation=e, data=Data(add_bos=True))


@pytest.fixture(scope="module")
def prepared(config: JobConfig) -> Any:
    return prepare(config, TOKENIZER, ARGS)


def test_results_say_what_they_answer(prepared: Any, config: JobConfig, qa_files: list[Path]):
    """Whatever is prepared for a configuration answers it, and no configuration with another key of [evaluation]."""
    tasks = {
        task: mean_by_length_and_depth(questions, [Outcome(True, 0.0)] * len(questions))
        for task, questions in prepared.questions.items()
    }
    result = json.loads(json.dumps({"tasks": tasks, "perplexity": {}, "asked": prepared.settings}))
    assert is_answered(config, result)
    others: list[dict[str, Any]] = [
        {"needle_lengths": (300,)},
        {"needle_lengths": ()},
        {"needle_depths": (0.0, 0.8)},
        {"needles": 3},
        {"tasks": ("ruler",)},
        {"tasks": ("ruler", "niah_mk_2", "niah_mk_3", "niah_mv")},
        {"task_lengths": (2400, 2401)},
        {"task_items": 3},
        {"qa_files": ()},
        {"generate": False},
        {"seed": 1},
        {"texts": ("x.txt",)},
        {"windows": (8,)},
    ]
    for other in others:
        assert not is_answered(replace(config, evaluation=replace(config.evaluation, **other)), result), other
    without = {**result, "tasks": {name: grid for name, grid in tasks.items() if name not in ("qa_1", "qa_2")}}
    assert not is_answered(config, without)
    assert is_answered(replace(config, evaluation=replace(config.evaluation, qa_files=())), without)
    texts = {**result, "perplexity": {"x": {"edges": [0, 512, 4096]}}}
    assert [is_answered(replace(config, training=Training(seq_len=n)), texts) for n in (4096, 2048)] == [True, False]


def grids(model: Transformer, prepared: Any) -> dict[str, Any]:
    result = evaluate(model.eval(), Ranks(), TOKENIZER, prepared, generate=True)
    assert result["tasks"].keys() == {"needle", *GROUPS["ruler"], *GROUPS["recall"]}
    return result


def test_a_model_that_knows_the_answers_scores_all(prepared: Any):
    model = Oracle([item for items in prepared.questions.values() for item in items])
    result = grids(model, prepared)
    for task, grid in result["tasks"].items():
        assert {cell for what in ("score", "exact") for row in grid[what] for cell in row} == {1.0}, task
        assert sum(map(sum, grid["count"])) == len(prepared.questions[task])
        assert all(cut == 0 for row in grid["cut"] for cut in row), "the answer ends by itself"
    assert {n for group in result["groups"].values() for what in ("score", "exact") for n in group[what]} == {1.0}


def test_answers_count_for_their_own_questions(prepared: Any):
    """In each task the answer to the first question is wrong in one token, the first or the last: its cell alone falls,
    to the share of the other questions."""
    for at in (0, -1):
        items = []
        for several in prepared.questions.values():
            wrong = several[0].target.clone()
            wrong[at] = (wrong[at] + 1) % TOKENIZER.vocab_size
            items += [replace(several[0], target=wrong), *several[1:]]
        check_first_items_are_wrong(items, prepared)


def check_first_items_are_wrong(items: list[Question], prepared: Any) -> None:
    for task, grid in grids(Oracle(items), prepared)["tasks"].items():
        first = prepared.questions[task][0]
        for i, length in enumerate(grid["lengths"]):
            for d, depth in enumerate(grid["depths"] or [None]):
                hit = length == first.length and (grid["depths"] is None or depth == first.depth)
                count = grid["count"][i][d]
                assert grid["exact"][i][d] == (count - hit) / count, task


def test_a_model_that_knows_nothing_scores_none(prepared: Any):
    result = grids(Uniform(ARGS), prepared)
    for task, grid in result["tasks"].items():
        assert {cell for what in ("score", "exact") for row in grid[what] for cell in row} == {0.0}, task
        expected = -torch.tensor(float(ARGS.vocab_size)).log().item()
        assert all(cell == pytest.approx(expected) for row in grid["logprob"] for cell in row)
