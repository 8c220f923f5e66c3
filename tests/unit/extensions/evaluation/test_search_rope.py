"""LongRoPE2's search: the paper's printed indices, the constraints on candidates, and a known optimum that is found."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.scripts import load_script
from torchtitan.attention.segments import Segments
from torchtitan.config import load_config
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.needle import needle_question
from torchtitan.extensions.evaluation.questions import Question
from torchtitan.models.rope import RopeArgs, inverse_frequencies
from torchtitan.models.rope_config import build_rope
from torchtitan.models.rope_method import ntk_theta
from torchtitan.models.rope_scaling import LongRopeScaling
from torchtitan.tools.errors import UserError

search_rope = load_script("studies/search_rope")
answer_losses = search_rope.answer_losses
longrope2 = sys.modules["longrope2"]
Candidate, Space, evolve, initial = longrope2.Candidate, longrope2.Space, longrope2.evolve, longrope2.initial
critical_index, lower_bound = longrope2.critical_index, longrope2.lower_bound
crossover, mutate, uniform = longrope2.crossover, longrope2.mutate, longrope2.uniform

LLAMA3 = Space(5e5, 128, 8192, 131072)
PHI3 = Space(1e4, 96, 2048, 131072)
SMALL = Space(1e4, 32, 256, 640)  # s = 2.5
SPACES = [LLAMA3, PHI3, SMALL, Space(1e5, 64, 8192, 16384), Space(100.0, 8, 64, 100)]


def test_indices_are_those_that_the_paper_prints():
    assert (critical_index(5e5, 128, 8192), lower_bound(5e5, 128, 8192)) == (35, 24)
    assert (critical_index(1e4, 96, 2048), lower_bound(1e4, 96, 2048)) == (31, 19)
    assert (LLAMA3.indices, PHI3.indices) == (range(24, 36), range(19, 32))


@pytest.mark.parametrize("space", SPACES[:4])
def test_indices_part_the_pairs_by_their_turns(space: Space):
    turns = space.original * inverse_frequencies(RopeArgs(space.theta), space.head_dim) / (2 * math.pi)
    assert int((turns > 1).sum()) == critical_index(space.theta, space.head_dim, space.original)
    assert int((turns > 10).sum()) == lower_bound(space.theta, space.head_dim, space.original)


def check(candidate: Candidate, space: Space) -> None:
    factors = np.array(candidate.factors())
    assert len(factors) == space.pairs and candidate.d_rcd in space.indices
    assert factors[0] == 1 and (np.diff(factors) >= 0).all()
    high = factors[candidate.d_rcd :]
    assert (high >= space.scale).all() and (high <= 2 * space.scale).all()


@pytest.mark.parametrize("space", SPACES)
def test_candidates_are_monotone_and_within_their_bounds_whatever_is_done_to_them(space: Space):
    rng = np.random.default_rng(0)
    living = initial(space, 40, rng)
    assert len(set(living)) == 40 and {c.d_rcd for c in living} == set(space.indices)
    for _ in range(300):
        a, b = (living[i] for i in rng.integers(len(living), size=2))
        mutant, child = mutate(a, space, rng), crossover(a, b, space, rng)
        for candidate in (a, mutant, child):
            check(candidate, space)
        assert mutant.d_rcd == a.d_rcd == child.d_rcd
        living[rng.integers(len(living))] = mutant if rng.random() < 0.5 else child


def test_below_d_rcd_a_candidate_is_the_ntk_rule_up_to_the_factor_there():
    candidate = uniform(30, 20.0, LLAMA3)
    plain = inverse_frequencies(RopeArgs(LLAMA3.theta), LLAMA3.head_dim)
    scaled = inverse_frequencies(
        RopeArgs(LLAMA3.theta, LongRopeScaling(8192, candidate.factors(), (1.0,) * 64, 1.0)), LLAMA3.head_dim
    )[1]
    # the base b' = b c^(D / 2 d_rcd), as in the paper's Algorithm 2
    base = LLAMA3.theta * 20.0 ** (128 / (2 * 30))
    torch.testing.assert_close(scaled[:31], inverse_frequencies(RopeArgs(base), LLAMA3.head_dim)[:31])
    torch.testing.assert_close(scaled[30:], plain[30:] / 20.0)
    # at the last pair it is the usual NTK-aware base
    last = uniform(LLAMA3.pairs - 1, 20.0, LLAMA3).factors()
    usual = inverse_frequencies(RopeArgs(ntk_theta(LLAMA3.theta, 20.0, 128)), 128)
    torch.testing.assert_close(plain / torch.tensor(last).double(), usual)


def distance_to(target: Candidate):
    wanted = np.log(target.factors())

    def fitness(candidate: Candidate) -> float:
        return float(np.abs(np.log(candidate.factors()) - wanted).mean())

    return fitness


@pytest.mark.parametrize("space", [LLAMA3, SMALL])
def test_the_search_finds_a_known_optimum(space: Space):
    d_rcd = space.indices[len(space.indices) // 2]
    target = Candidate(d_rcd, tuple(np.linspace(1.2 * space.scale, 1.7 * space.scale, space.pairs - d_rcd)))
    fitness = distance_to(target)
    history: list[float] = []
    found = evolve(space, fitness, seed=1, on_iteration=lambda _, living: history.append(living[0][0]))
    best_value, best = found[0]
    check(best, space)
    assert best_value == fitness(best) and len(history) == 41
    assert history == sorted(history, reverse=True)  # the best is never lost
    assert best_value < history[0] / 4 and best_value < 0.03  # factors are within 3% on average
    assert [value for value, _ in found] == sorted(value for value, _ in found)


def test_the_same_seed_gives_the_same_search_and_what_is_remembered_is_not_asked_again():
    asked: list[Candidate] = []
    known: dict[Candidate, float] = {}
    rate = distance_to(uniform(SMALL.indices[1], 4.0, SMALL))

    def fitness(candidate: Candidate) -> float:
        if candidate not in known:
            asked.append(candidate)
            known[candidate] = rate(candidate)
        return known[candidate]

    whole = evolve(SMALL, fitness, 3, population=12, iterations=6)
    count = len(asked)
    assert count <= 12 + 6 * 6 and len(set(asked)) == count
    assert evolve(SMALL, rate, 3, population=12, iterations=6) == whole
    assert evolve(SMALL, rate, 4, population=12, iterations=6) != whole
    # repeated with half of the fitnesses known: only the other half is asked
    half = dict(list(known.items())[: count // 2])
    known.clear()
    known.update(half)
    asked.clear()
    assert evolve(SMALL, fitness, 3, population=12, iterations=6) == whole and len(asked) == count - count // 2


def test_what_is_not_a_number_is_worst():
    def fitness(candidate: Candidate) -> float:
        return math.nan if candidate.d_rcd == SMALL.indices[0] else sum(candidate.high)

    found = evolve(SMALL, fitness, 0, population=8, iterations=5)
    assert all(math.isfinite(value) for value, _ in found[:4]) and found[0][1].d_rcd != SMALL.indices[0]


TOKENIZER = load_tokenizer(Path(__file__).parents[4] / "assets/tokenizer")


def tokens_of(question: Question) -> torch.Tensor:
    return torch.cat((question.prompt, question.target))


def test_a_needle_prompt_has_its_length_and_holds_needle_and_answer():
    text = torch.tensor(TOKENIZER.encode("It was a bright cold day in April. " * 100))
    prompt = needle_question(TOKENIZER, text, 300, np.random.default_rng(0), bos_id=TOKENIZER.bos_id)
    tokens = tokens_of(prompt)
    assert len(tokens) == 300 and tokens[0] == TOKENIZER.bos_id
    answer = TOKENIZER.decode(prompt.target.tolist())
    whole = TOKENIZER.decode(tokens[1:].tolist())
    assert len(answer.strip(" .")) == 7 and answer.strip(" .").isdigit()
    name = whole.split("the number of the ")[1].split(" is")[0]
    assert whole.startswith(f"Remember this: the number of the {name} is{answer}\n\nIt was a bright")
    assert whole.endswith(f"\n\nWhat is the number of the {name}? The number of the {name} is{answer}")
    again = needle_question(TOKENIZER, text, 300, np.random.default_rng(0), bos_id=TOKENIZER.bos_id)
    other = needle_question(TOKENIZER, text, 300, np.random.default_rng(1), bos_id=TOKENIZER.bos_id)
    assert tokens.equal(tokens_of(again)) and not tokens.equal(tokens_of(other))
    with pytest.raises(UserError, match="but the length is 20"):
        needle_question(TOKENIZER, text, 20, np.random.default_rng(0))
    with pytest.raises(UserError, match="there are 5"):
        needle_question(TOKENIZER, text[:5], 300, np.random.default_rng(0))


def test_only_the_answers_tokens_are_scored_and_the_rope_of_the_call_counts(model):
    text = torch.tensor(TOKENIZER.encode("It was a bright cold day in April. " * 100))
    prompts = [needle_question(TOKENIZER, text, n, np.random.default_rng(n)) for n in (150, 170)]
    rope = RopeArgs(100.0, LongRopeScaling(64, (1.0, 2.0, 3.0, 4.0), (1.0,) * 4, 1.0))
    expected = []
    for prompt in prompts:
        tokens = tokens_of(prompt)
        total = len(tokens)
        with torch.no_grad():
            logits = model(tokens, torch.arange(total), Segments.whole([0, total]), rope=rope)
        scores = logits.log_softmax(-1)[torch.arange(total - 1), tokens[1:]]
        expected.append(-scores[len(prompt.prompt) - 1 :])
    found = answer_losses(model, Ranks(), prompts, rope)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert (found - answer_losses(model, Ranks(), prompts, model.args.rope)).abs().max() > 1e-4


def test_the_command_line_searches_resumes_and_writes_a_rope_table(model, folder, tmp_path, capsys):
    run = search_rope.main
    text = tmp_path / "book.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 40)
    state, out = tmp_path / "state.json", tmp_path / "rope.toml"
    what = ["--model", str(folder), "--text", str(text), "--length", "160", "--dtype", "float32", "--prompts", "2"]
    what += ["--pieces", "2", "--population", "8", "--iterations", "2", "--state", str(state), "--out", str(out)]
    assert run(what) == 0
    measured = json.loads(state.read_text())["measured"]
    assert 8 <= len(measured) <= 8 + 2 * 4
    rope = build_rope(load_config(["--job.config_file", str(out)]).rope, model.args.rope, 8, 2, 160)
    d_rcd, high, best = min(measured, key=lambda m: m[2])
    assert rope.scaling.long_factor == pytest.approx(Candidate(d_rcd, tuple(high)).factors(), abs=1e-6)
    assert rope.scaling.magnitude() == 1 and f"d_rcd {d_rcd} of 1 to 3" in out.read_text()
    # the fitness is the perplexity of the answers under these factors
    pieces = torch.tensor(TOKENIZER.encode(text.read_text())).split(160)
    prompts = [needle_question(TOKENIZER, pieces[i], 160, np.random.default_rng([0, i])) for i in range(2)]
    assert best == pytest.approx(float(answer_losses(model, Ranks(), prompts, rope).mean().exp()), rel=1e-4)
    # cut off after five candidates, the search continues to the same end and measures only the others
    written = out.read_text()
    state.write_text(json.dumps(json.loads(state.read_text()) | {"measured": measured[:5]}))
    assert run(what) == 0 and "5 candidates are known" in capsys.readouterr().err
    assert out.read_text() == written and json.loads(state.read_text())["measured"] == measured
    assert run([*what, "--seed", "1"]) == 1 and "is of another search: prompts" in capsys.readouterr().err
    assert run([*what, "--length", "64"]) == 1 and "not beyond the original length, 64" in capsys.readouterr().err
    assert run([*what, "--prompts", "3"]) == 1 and "gives 2 stretches of 160 tokens" in capsys.readouterr().err
