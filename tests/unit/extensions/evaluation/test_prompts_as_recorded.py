"""Every task asks what it asked when its prompts were recorded: results of different versions stay comparable.

A digest is over all that a question is, except its task's name. It changes only with a decision to change prompts, and
then every result that users have is of other questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.harness import ASSETS
from torchtitan.config.data_schema import Data
from torchtitan.config.schema import Evaluation, JobConfig
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation.evaluate import Prepared, prepare
from torchtitan.extensions.evaluation.needle import needle_question
from torchtitan.extensions.evaluation.questions import Question
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import TransformerArgs

TOKENIZER = load_tokenizer(ASSETS)
ARGS = TransformerArgs(16, 1, 2, 1, 8, 16, TOKENIZER.vocab_size, rope=RopeArgs(1e4, max_position_embeddings=4096))
TEXT = " ".join(f"The river {i} is near the stone. A bird sees it.\n" for i in range(900))
RECORDED = {
    "needle": ("5edd05779fd4db91", "abf29540615b94bc"),
    "niah_single_1": ("5e214cc184d8a6a1", "fdba23efcb77fa54"),
    "niah_single_2": ("bceafe6be921fcd1", "8db4e416b0459bc5"),
    "niah_single_3": ("a89a36ab4f6f9f57", "cad206583790cfd4"),
    "niah_multikey_1": ("85a26111b2f4ec49", "803653d82d37e11c"),
    "niah_multikey_2": ("c61451e6f0401209", "859f491a251e30ba"),
    "niah_multikey_3": ("d6ba9fafc0592c59", "d7732e0f01bb0cd1"),
    "niah_multivalue": ("44feda1b3a3a31c7", "2c1370a6a107c08e"),
    "niah_multiquery": ("3497676f3afdab7c", "088a35713449ea99"),
    "vt": ("f582f9666f8e6aee", "a9603c805d7ca6f2"),
    "cwe": ("47d325d0224104c3", "725a2ae567a67882"),
    "fwe": ("d763578465578861", "4a1ed6a728c6363f"),
    "qa_1": ("4729305bc511fd9e", "03a24f5bcaebb2b1"),
    "qa_2": ("eec58d955d8e32c3", "d038ec24cb066e9f"),
    "niah_mk_2": ("4bd4760ac00ce3fe", "5f67392d7111f620"),
    "niah_mk_3": ("38d52e141731c9a2", "973640f9c05c4dd4"),
    "niah_mv": ("fc93d1e6bdd8e7ee", "22f1e929fa4fb5b6"),
    "json_kv": ("12a360add37110b1", "501aa099c9850c41"),
}
"""Of the two tables of questions in `prepared`."""

WHOLE = (
    "c9a7b08b2d4c23f4bbe5d347aa6db8f4ef3d8a8805a4d498d5c1aec343858023",
    "e6132c6bbc40ebd8addc23adc46e6add75927c7d2a7b0a557fedfd4cc9d88fb2",
)
"""What results keep as asked.questions."""


def digest(questions: Sequence[Question]) -> str:
    hashed = hashlib.sha256()
    for one in questions:
        rest = (one.length, one.answers, one.max_new_tokens, one.depth)
        hashed.update(repr((one.prompt.tolist(), one.target.tolist(), *rest)).encode())
    return hashed.hexdigest()[:16]


@pytest.fixture(scope="module")
def prepared(qa_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Prepared]:
    """With BOS and another seed, and without."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    several = []
    for bos, seed, lengths in ((True, 5, (2200, 4100)), (False, 0, (2600,))):
        e = Evaluation(
            texts=("text.txt",),
            length=4000,
            needle_lengths=(300, 1000),
            needles=2,
            tasks=("ruler", "recall"),  # type: ignore[arg-type]
            task_lengths=lengths,
            task_items=2,
            qa_files=tuple(str(file) for file in qa_files),
            seed=seed,
        )
        several.append(prepare(JobConfig(evaluation=e, data=Data(folder=str(folder), add_bos=bos)), TOKENIZER, ARGS))
    return several


@pytest.mark.parametrize("task", RECORDED)
def test_a_task_asks_what_it_asked(task: str, prepared: list[Prepared]):
    assert tuple(digest(one.questions[task]) for one in prepared) == RECORDED[task]


def test_all_tasks_are_recorded_and_results_compare(prepared: list[Prepared]):
    for one, recorded in zip(prepared, WHOLE, strict=True):
        assert list(one.questions) == list(RECORDED)
        assert one.settings["questions"] == recorded


def test_the_search_for_rope_factors_asks_what_it_asked():
    text = torch.tensor(TOKENIZER.encode(TEXT))
    questions = [needle_question(TOKENIZER, text, 300, np.random.default_rng([3, n]), TOKENIZER.bos_id) for n in (0, 1)]
    assert digest(questions) == "e5026460c6e3e168"
