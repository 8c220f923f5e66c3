"""Length bins, thresholds of single sources, and shares that move over the steps, by plain counts over the rows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.unit.conftest import domain_data
from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.curriculum import TOLERANCE, integral, resolve
from torchtitan.datasets.data_checks import check_data
from torchtitan.datasets.mixture import build_streams
from torchtitan.datasets.plan import Plan
from torchtitan.tools.errors import UserError

Domains = dict[str, Corpus]
STEPS = [0, 7, 1000]
SEQ_LEN, ROWS, SEED = 16384, 16, 5
EDGES = (4096, 16384)
BINS: dict[str, Any] = {"code__length_bins": EDGES, "code__length_shares": (0.2, 0.3, 0.5)}


def make_plan(domains: Domains, data: Data, steps: int = 200, **options: Any) -> Plan:
    arguments: dict[str, Any] = {"seq_len": SEQ_LEN, "rows_per_step": ROWS, "steps": steps, "seed": SEED} | options
    return Plan(data, list(domains.values()), **arguments)


def bin_of(length: int, edges: tuple[int, ...] = EDGES) -> int:
    """The number of edges that a document is longer than."""
    return sum(length > edge for edge in edges)


def counted(plan: Plan, edges: tuple[int, ...] = EDGES) -> np.ndarray:
    """float64[steps, sources, bins]: tokens by a plain count over the rows."""
    lengths = [corpus.lengths.tolist() for corpus in plan.corpora]
    tokens = np.zeros((plan.steps, len(lengths), len(edges) + 1))
    for step in range(plan.steps):
        for slot in range(plan.rows_per_step):
            row = plan.row(step, slot)
            for source, document, length in zip(row.sources.tolist(), row.documents.tolist(), row.lengths.tolist()):
                tokens[step, source, bin_of(lengths[source][document], edges)] += length
    return tokens


def windows(tokens: np.ndarray, width: int = 100) -> np.ndarray:
    """The shares in every `width` consecutive steps; the first axis are steps."""
    sums = np.cumsum(np.concatenate([np.zeros((1, *tokens.shape[1:])), tokens]), axis=0)
    sums = sums[width:] - sums[:-width]
    return np.asarray(sums / sums.sum(axis=(1, 2), keepdims=True))


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_each_bin_has_its_share_of_the_tokens_in_every_window(domains: Domains, packing: str) -> None:
    plan = make_plan(domains, domain_data(packing=packing, **BINS))
    shares = windows(counted(plan))
    # concat lays documents of up to 500,000 tokens down whole: half of one at both ends of a window
    most = 0.005 if packing == "best_fit" else 500_000 / (100 * plan.rows_per_step * plan.seq_len)
    assert shares.sum(axis=2) == pytest.approx(np.tile([0.35, 0.25, 0.25, 0.15], (101, 1)), abs=most)
    assert shares[:, 1] == pytest.approx(np.tile([0.05, 0.075, 0.125], (101, 1)), abs=most)
    assert [plan.tokens_of(s) for s in plan.streams[1:4]] == counted(plan)[:, 1].sum(axis=0).tolist()
    assert [s.name for s in plan.streams] == ["all", "up to 4,096", "4,097 to 16,384", "over 16,384", "all", "all"]


def test_a_bin_holds_each_document_of_its_lengths_once_an_epoch() -> None:
    lengths = np.array([1, 4, 5, 6, 9, 10, 11, 300])
    source = Source("a", "a", length_bins=(5, 10), length_shares=(0.2, 0.3, 0.5))
    streams, _ = build_streams(Data(sources=(source,)), [lengths], [0], 100, 1)
    assert [(s.kind, s.share) for s in streams] == [("bin 0", 0.2), ("bin 1", 0.3), ("bin 2", 0.5)]
    for number, stream in enumerate(streams):
        mine = np.array([bin_of(n, (5, 10)) == number for n in lengths])
        assert (np.bincount(stream.documents, stream.lengths, 8) == np.where(mine, lengths, 0)).all()
        assert stream.tokens == lengths[mine].sum()

    def of_shares(*shares: float) -> list[tuple[str, float]]:
        data = Data(sources=(replace(source, length_shares=shares),))
        return [(s.kind, s.share) for s in build_streams(data, [lengths], [0], 100, 1)[0]]

    assert [share for _, share in of_shares(0.333, 0.333, 0.333)] == pytest.approx([1 / 3] * 3)
    assert of_shares(1.0, 0.0, 0.0) == [("bin 0", 1.0)]


def read_of(plan: Plan, source: int) -> list[int]:
    """The documents of a source in the order in which rows hold them."""
    return plan.table.document[plan.table.source == source].tolist()


def test_an_empty_bin_is_refused_with_the_lengths_that_exist() -> None:
    source = Source("a", "a", length_bins=(5, 10), length_shares=(0.2, 0.3, 0.5))
    with pytest.raises(UserError) as error:
        build_streams(Data(sources=(source,)), [np.array([2, 3, 11, 1200])], [0], 100, 1)
    for words in ("'a'", "bin 1", "[5, 10]", "6 to 10 tokens", "2 to 1,200 tokens", "2 in bin 0, 2 in bin 2"):
        assert words in str(error.value)
    # filters are applied before
    with pytest.raises(UserError, match="bin 2.*none.*6 to 8 tokens"):
        filtered = replace(source, max_length=8, min_length=4, length_shares=(0.0, 0.5, 0.5))
        build_streams(Data(sources=(filtered,)), [np.array([2, 6, 8, 1200])], [0], 100, 1)


def test_a_source_can_have_a_threshold_of_its_own(domains: Domains) -> None:
    """Under a strategy and beside upsample_to; the others keep data.long_threshold."""
    code, web = (domains[name].lengths for name in ("code", "web"))
    for options in (
        {"strategy": "per_source_upsampling", "long_share": 0.9, "code__long_threshold": 16384},
        {"code__upsample_to": 0.9, "code__long_threshold": 16384, "web__upsample_to": 0.9},
    ):
        assert code[code > 16384].sum() < 0.9 * code.sum() and web[web > 4096].sum() < 0.9 * web.sum()
        tokens = counted(make_plan(domains, domain_data(**options), steps=100)).sum(axis=0)
        assert tokens[1, 2] / tokens[1].sum() == pytest.approx(0.9, abs=0.01)
        assert tokens[2, 1:].sum() / tokens[2].sum() == pytest.approx(0.9, abs=0.01)
    with pytest.raises(UserError, match="its long_threshold = 500001.*its longest has"):
        make_plan(domains, domain_data(code__upsample_to=0.9, code__long_threshold=500_001))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "threshold for nothing": (
        {},
        {"long_threshold": 9},
        ["long_threshold = 9", "upsample_to", "leave long_threshold out"],
    ),
    "threshold beside bins": (
        {},
        {"long_threshold": 9, "length_bins": (5,), "length_shares": (0.5, 0.5)},
        ["upsample"],
    ),
    "shares without bins": ({}, {"length_shares": (0.5, 0.5)}, ["length_shares = [0.5, 0.5]", "length_bins"]),
    "bins without shares": (
        {},
        {"length_bins": (5, 9)},
        ["no length_shares", "3 bins", "[0.33, 0.33, 0.34]"],
    ),
    "bins that fall": ({}, {"length_bins": (9, 5), "length_shares": (0.2, 0.3, 0.5)}, ["[9, 5]", "must rise"]),
    "a share too few": ({}, {"length_bins": (5, 9), "length_shares": (0.5, 0.5)}, ["2 shares", "3 bins"]),
    "a sum that is not 1": ({}, {"length_bins": (5,), "length_shares": (0.5, 0.6)}, ["[0.5, 0.6]", "not to 1.1"]),
    "bins and upsample": (
        {},
        {"length_bins": (5,), "length_shares": (0.5, 0.5), "upsample": 2.0},
        ["length_bins and upsample both"],
    ),
    "bins and upsample_to": (
        {},
        {"length_bins": (5,), "length_shares": (0.5, 0.5), "upsample_to": 0.7},
        ["length_bins and upsample_to both"],
    ),
    "bins and a strategy": (
        {"strategy": "global_upsampling"},
        {"length_bins": (5,), "length_shares": (0.5, 0.5)},
        ['length_bins and data.strategy = "global_upsampling" both'],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    data, source, words = REFUSED[name]
    sources = (Source("books", "b", **source), Source("web", "w"))
    with pytest.raises(UserError) as error:
        check_data(JobConfig(data=Data(sources=sources, **data)))
    assert "\n" not in str(error.value) and 'data.sources[0] ("books")' in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_bins_do_not_reorder_another_source_nor_depend_on_the_steps(domains: Domains) -> None:
    plan, other = make_plan(domains, domain_data(**BINS)), make_plan(domains, domain_data())
    for source in (2, 3):  # packing moves documents by some rows; another order would have few in common
        mine, theirs = (set(read_of(p, source)[:200]) for p in (plan, other))
        assert len(mine & theirs) > 0.5 * len(mine) > 4 * len(mine) ** 2 / len(plan.corpora[source])
    longer = make_plan(domains, domain_data(**BINS), steps=260)
    parts = plan.table.offsets[-1]
    for column in ("source", "document", "epoch", "start", "length"):
        assert (getattr(plan.table, column) == getattr(longer.table, column)[:parts]).all()
    assert plan.fingerprint == longer.fingerprint


def test_integrals_are_those_of_the_lines() -> None:
    curve = np.array([[3.0, 0.2], [5.0, 0.6], [9.0, 0.0]])
    steps = np.array([0.0, 2.5, 3.0, 4.0, 5.0, 7.0, 9.0, 20.0])
    slow = [np.interp((np.arange(100_000) + 0.5) * step / 100_000, *curve.T).mean() * step for step in steps]
    assert integral(curve, steps) == pytest.approx(slow, abs=1e-6)
    assert integral(np.array([[0.0, 1.0], [4.0, 0.0]]), np.array(4)) == pytest.approx(2)


def test_a_curve_is_exact_at_its_points_and_close_between() -> None:
    """Weights and length shares that move at once, over wide ranges of weights."""
    random = np.random.default_rng(0)
    for _ in range(50):
        weights, lengths = np.exp(random.uniform(-8, 8, (3, 4))), random.dirichlet([1, 1, 1], 3)
        shares = partial(shares_of, weights, lengths)
        table = resolve(shares, STEPS)
        for step in STEPS:
            assert table[table[:, 0] == step][0, 1:].tolist() == shares(step)
        for step in (*random.uniform(0, 1000, 500), *random.uniform(0, 20, 100)):
            between = [np.interp(step, table[:, 0], column) for column in table.T[1:]]
            assert np.abs(np.array(between) - shares(step)).max() <= TOLERANCE
        assert table[:, 1:].sum(axis=1) == pytest.approx(1)
        assert len(table) < 500 and math.isfinite(table.sum())


def shares_of(weights: np.ndarray, lengths: np.ndarray, step: float) -> list[float]:
    """Of the bins of the first source and of the others; weights, lengths: float64[3, n] at STEPS."""
    weight, share = ([np.interp(step, STEPS, column) for column in table.T] for table in (weights, lengths))
    return [*(weight[0] / sum(weight) * np.array(share)), *(w / sum(weight) for w in weight[1:])]
