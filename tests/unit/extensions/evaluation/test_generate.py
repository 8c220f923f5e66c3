"""Generation with a cache against whole forward passes, and against teacher forcing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.extensions.evaluation.full_logits import losses_of_all_logits
from torchtitan.attention.segments import Segments
from torchtitan.extensions.evaluation import evaluate
from torchtitan.extensions.evaluation.forward import Ranks, answer_scores, document_losses, window_pieces
from torchtitan.extensions.evaluation.generate import choose, generate, groups_of, write_and_score
from torchtitan.extensions.evaluation.questions import Question
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_scaling import DynamicNTKScaling, YarnScaling
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights

BASE = TransformerArgs(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=61)
MODELS: dict[str, TransformerArgs] = {
    "llama": BASE,
    "tied, qwen": replace(BASE, tied_embeddings=True, qkv_bias=True, qk_norm=True),
    "window": replace(BASE, sliding_window=7, layer_types=("sliding_attention",) * 3),
    "olmo": replace(
        BASE,
        post_norm=True,
        qk_norm=True,
        qk_norm_joint=True,
        sliding_window=5,
        layer_types=("sliding_attention", "sliding_attention", "full_attention"),
    ),
    "yarn": replace(BASE, rope=RopeArgs(1e4, YarnScaling(4.0, 16))),
    "dynamic": replace(BASE, rope=RopeArgs(1e4, DynamicNTKScaling(2.0, 16))),
}
SDPA = Ranks()


def build(args: TransformerArgs, backend: str = "sdpa", scale: float = 3.0) -> Transformer:
    """With large weights, so that the likeliest token depends on what is read."""
    model = Transformer(args, backend)
    init_weights(model, seed=1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" not in name:
                param.mul_(scale)
    return model


def ragged(count: int, rng: np.random.Generator, longest: int = 40) -> list[torch.Tensor]:
    return [torch.from_numpy(rng.integers(0, 61, int(rng.integers(1, longest)))) for _ in range(count)]


def by_whole_passes(model: Transformer, prompt: torch.Tensor, new: int, rope: RopeArgs | None = None) -> list[int]:
    """The oracle: everything is read anew for every token."""
    tokens = prompt.clone()
    for _ in range(new):
        with torch.no_grad():
            logits = model(tokens, torch.arange(len(tokens)), Segments.whole([0, len(tokens)]), rope=rope)
        tokens = torch.cat((tokens, logits[-1].argmax()[None]))
    return tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_changes_nothing(name: str, backend: str):
    """Ragged prompts together, against one at a time without a cache."""
    model, rng = build(MODELS[name], backend), np.random.default_rng(0)
    prompts = ragged(5, rng)
    written = generate(model, replace(SDPA, backend=backend), prompts, 9)
    for prompt, tokens in zip(prompts, written, strict=True):
        rope = model.args.rope
        if name == "dynamic":  # its RoPE depends on the length with all new tokens
            rope = replace(rope, scaling=replace(rope.scaling, length=len(prompt) + 9))
        assert tokens == by_whole_passes(model, prompt, 9, rope)
    assert len({tuple(tokens) for tokens in written}) > 1


def test_teacher_forcing_is_greedy_generation_on_200_cases():
    """A target is exact if and only if the model writes it: right and wrong targets."""
    rng, matched = np.random.default_rng(1), 0
    cases = 0
    for name, args in MODELS.items():
        if name == "dynamic":
            continue
        model = build(args)
        prompts = ragged(40, rng)
        written = generate(model, SDPA, prompts, 6)
        targets = []
        for i, tokens in enumerate(written):
            target = torch.tensor(tokens)
            if i % 2:
                target[rng.integers(6)] = int(rng.integers(61))
            targets.append(target)
        order = rng.permutation(40).tolist()  # another order, so that prompts are read with others
        scores = answer_scores(model, SDPA, [prompts[i] for i in order], [targets[i] for i in order])
        for i, (_, likeliest) in zip(order, scores, strict=True):
            assert bool(likeliest.all()) == (targets[i].tolist() == written[i])
            matched += bool(likeliest.all())
            cases += 1
        some = range(0, 40, 5)  # both from one reading
        chosen = [prompts[i] for i in some], [targets[i] for i in some]
        limits = [1 + n % 6 for n in range(len(some))]
        together, forced = write_and_score(model, SDPA, *chosen, limits, frozenset(), model.args.rope)
        assert together == [written[i][:limit] for i, limit in zip(some, limits, strict=True)]
        for i, (logprobs, likeliest) in zip(some, forced, strict=True):
            expected, exact = scores[order.index(i)]
            torch.testing.assert_close(logprobs, expected)
            assert torch.equal(likeliest, exact)
    assert cases == 200 and 80 < matched < 160


def test_log_probabilities_are_the_losses():
    model, rng = build(BASE), np.random.default_rng(2)
    prompts, targets = ragged(3, rng), ragged(3, rng, 8)
    for (found, _), prompt, target in zip(answer_scores(model, SDPA, prompts, targets), prompts, targets, strict=True):
        losses = losses_of_all_logits(model, torch.cat((prompt, target)))[len(prompt) - 1 :]
        torch.testing.assert_close(-found, losses)


@pytest.mark.parametrize("window", [None, 1, 7, 16, 60])
def test_windows_overlap_by_half(window: int | None):
    """Each token against a pass of its own over what it may see."""
    model, tokens = build(BASE), torch.arange(50) * 7 % 61
    found = document_losses(model, SDPA, tokens, window=window)
    pieces = window_pieces(49, window or 49)
    seen: list[int] = []
    for begin, kept, end in pieces:
        whole = losses_of_all_logits(model, tokens[begin : end + 1], exact=False)
        torch.testing.assert_close(found[kept:end], whole[kept - begin :])
        seen += [p - begin for p in range(kept, end)]
        assert end - begin <= (window or 49)
    assert [p for _, kept, end in pieces for p in range(kept, end)] == list(range(49))
    assert window is None or min(seen[window:], default=window) >= window // 2, "no token is scored cold"


def test_what_is_no_number_is_null_and_said(monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr(evaluate.logger, "warning", lines.append)
    model = build(BASE)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    prepared = evaluate.Prepared({"t": [torch.arange(50) % 61]}, 49)
    result = evaluate.evaluate(model, SDPA, None, prepared)  # type: ignore[arg-type]
    assert result["perplexity"]["t"]["nll"] == [None] and result["perplexity"]["t"]["mean_nll"] is None
    assert "null in the results" in lines[0]


def test_a_stop_token_ends_an_answer_and_is_left_out():
    model, rng = build(BASE), np.random.default_rng(3)
    prompts = ragged(6, rng)
    free = generate(model, SDPA, prompts, 12)
    stop = free[0][4]
    stopped = generate(model, SDPA, prompts, 12, frozenset([stop]))
    for tokens, short in zip(free, stopped, strict=True):
        assert short == (tokens[: tokens.index(stop)] if stop in tokens else tokens)
    assert len(stopped[0]) <= 4


def test_an_evaluation_ends_answers_where_conversations_did(tmp_path: Path):
    model, prompt = build(BASE), ragged(1, np.random.default_rng(3))[0]
    (free,) = generate(model, SDPA, [prompt], 12)
    at = next(i for i in range(2, 12) if free[i] not in free[:i])
    tokenizer: Any = SimpleNamespace(eos_id=None, folder=tmp_path, decode=lambda ids: " ".join(map(str, ids)))
    question = Question("t", len(prompt), prompt, torch.tensor([1]), ("1",), 12)
    for ends, written, cut in (([], free, 1), ([free[at]], free[:at], 0)):
        prepared = evaluate.Prepared(questions={"t": [question]}, scores={"t": lambda text, answers: 0.0}, ends=ends)
        result = evaluate.evaluate(model, SDPA, tokenizer, prepared, generate=True)["tasks"]["t"]
        assert result["written"] == [[" ".join(map(str, written))]] and result["cut"] == [[cut]]


def test_draws_are_those_of_the_seed_whoever_else_is_read():
    model, rng = build(BASE, scale=1.5), np.random.default_rng(4)
    prompts = ragged(4, rng)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}
    first = generate(model, SDPA, prompts, 8, seed=5, **options)
    assert first == generate(model, SDPA, prompts, 8, seed=5, **options)
    assert first != generate(model, SDPA, prompts, 8, seed=6, **options)
    assert first[:2] == generate(model, SDPA, prompts[:2], 8, seed=5, **options)


def test_sampling_has_the_probabilities_of_the_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = [choose(logits, n, 1.0, 0.75, [(0,)])[0] for n in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.03)
    sharp = [choose(logits, n, 0.5, 1.0, [(0,)])[0] for n in range(4000)]
    squares = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(np.bincount(sharp, minlength=4) / 4000, squares / squares.sum(), atol=0.03)


def test_prompts_of_about_a_length_go_together():
    prompts = [torch.zeros(n, dtype=torch.int64) for n in (10, 40000, 30000, 20, 70000)]
    # beside a long prompt a short one takes as much of the cache
    assert [members for _, members in groups_of(SDPA, prompts, [10] * 5, BASE.rope)] == [[4], [1], [2, 3], [0]]
    many = groups_of(SDPA, [prompts[0]] * 20, [10] * 20, BASE.rope)
    assert [len(members) for _, members in many] == [16, 4]
    dynamic = groups_of(SDPA, prompts, [10] * 5, MODELS["dynamic"].rope)
    assert len(dynamic) == 5 and {rope.scaling.length for rope, _ in dynamic} == {20, 30, 30010, 40010, 70010}


def test_what_cannot_be_generated_from():
    with pytest.raises(ValueError, match="without a token"):
        generate(build(BASE), SDPA, [torch.zeros(0, dtype=torch.int64)], 3)
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        generate(build(BASE), SDPA, [torch.zeros(1, dtype=torch.int64)], 0)
