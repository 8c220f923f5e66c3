"""A stage of conversations and plain text: the loss is the contract's, under every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed.harness import flags, run_stage, spawn, write_assets
from torchtitan.attention.segments import Segments
from torchtitan.config import load_config
from torchtitan.extensions.wiring import inputs_of
from torchtitan.models.transformer import Transformer, init_weights

TEMPLATE = (
    "{% for m in messages %}{{ '<|begin_of_text|>' + m.role + '\\n' + m.content + '<|end_of_text|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin_of_text|>assistant\\n' }}{% endif %}"
)
SHARD, CONTEXT, TENSOR = (
    f"parallelism__{n}_degree" for n in ("data_parallel_shard", "context_parallel", "tensor_parallel")
)
LAYOUTS: list[dict[str, Any]] = [{SHARD: 2}, {CONTEXT: 2}, {TENSOR: 2}]


def arguments(folder: Path) -> list[str]:
    """The tiny stage with a second source: conversations of 1 to 3 turns, two thirds of the tokens."""
    assets = write_assets(folder)
    (assets / "chat_template.jinja").write_text(TEMPLATE)
    random = np.random.default_rng(0)
    words = ["red", "green", "blue", "stone", "river", "house", "bird"]
    with (folder / "chat.jsonl").open("w") as file:
        for _ in range(80):
            roles = ["user", "assistant"] * int(random.integers(1, 4))
            said = [{"role": r, "content": " ".join(random.choice(words, random.integers(1, 9)))} for r in roles]
            file.write(json.dumps({"messages": said}) + "\n")
    args = flags(folder, assets)
    with (folder / "stage.toml").open("a") as file:
        file.write(
            f'[[data.sources]]\nname = "chat"\npath = "{folder}/chat.jsonl"\nweight = 2.0\n'
            'messages_field = "messages"\nlong_document = "truncate"\n'
        )
    return args


def loss_by_hand(args: list[str]) -> float:
    """Of the first step: each document of its rows by itself, masked by what the tokens say."""
    config = load_config(args)
    inputs = inputs_of(config, 1)
    model = Transformer(inputs.args, "dense")
    init_weights(model, config.training.seed)
    opener = [0, *inputs.tokenizer.encode("assistant\n")]
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for slot in range(inputs.plan.rows_per_step):
        row = inputs.plan.row(0, slot)
        for source, document, start, length in zip(row.sources, row.documents, row.starts, row.lengths):
            ids = inputs.plan.corpora[source].document(int(document))[start : start + length].tolist()
            trained = [source == 0] * length
            at = 0
            while source == 1 and at < length:
                at += 1
                if ids[at - len(opener) : at] == opener and at >= len(opener):
                    while at < length:
                        trained[at] = True
                        at += 1
                        if ids[at - 1] == 1:
                            break
            labels = torch.tensor([t if keep else -100 for t, keep in zip(ids, trained)])[1:]
            if length < 2 or not (labels >= 0).any():
                continue
            with torch.no_grad():
                logits = model(
                    torch.tensor(ids[:-1]), torch.arange(length - 1), Segments.whole(np.array([0, length - 1]))
                )
            total += F.cross_entropy(logits.double(), labels, reduction="sum")
            count += int((labels >= 0).sum())
    return float(total) / count


def test_every_layout_gives_the_loss_on_responses_and_text(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    (alone,) = spawn(1, run_stage, [args], tmp_path)
    assert alone[0]["loss"] == pytest.approx(loss_by_hand(args), rel=1e-5)
    assert set(alone[0]["loss_by_source"]) == {"text", "chat"}
    cases = [args + [f"--{k.replace('__', '.')}={v}" for k, v in layout.items()] for layout in LAYOUTS]
    for numbers in spawn(2, run_stage, cases, tmp_path):
        for step, reference in zip(numbers, alone, strict=True):
            for key in ("loss", "grad_norm"):
                assert step[key] == pytest.approx(reference[key], rel=1e-5)
