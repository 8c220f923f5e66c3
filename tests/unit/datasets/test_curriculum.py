"""Length bins, thresholds of single sources, and shares that move over the steps, by plain counts over the rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.scripts import load_script
from tests.unit.conftest import domain_data
from torchtitan.components.changes import changed_inputs
from torchtitan.config.data_schema import Data, Point, Source
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.curriculum import TOLERANCE, integral, resolve
from torchtitan.datasets.data_checks import check_data
from torchtitan.datasets.mixture import build_streams
from torchtitan.datasets.plan import Plan
from torchtitan.extensions.planner.data_report import format_report, make_report
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
    for step in plan.planned:
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
    streams, _ = build_streams(Data(sources=(source,)), [lengths], [0], 100, range(1))
    assert [(s.kind, s.share) for s in streams] == [("bin 0", 0.2), ("bin 1", 0.3), ("bin 2", 0.5)]
    for number, stream in enumerate(streams):
        mine = np.array([bin_of(n, (5, 10)) == number for n in lengths])
        assert (np.bincount(stream.documents, stream.lengths, 8) == np.where(mine, lengths, 0)).all()
        assert stream.tokens == lengths[mine].sum()

    def of_shares(*shares: float) -> list[tuple[str, float]]:
        data = Data(sources=(replace(source, length_shares=shares),))
        return [(s.kind, s.share) for s in build_streams(data, [lengths], [0], 100, range(1))[0]]

    assert [share for _, share in of_shares(0.333, 0.333, 0.333)] == pytest.approx([1 / 3] * 3)
    assert of_shares(1.0, 0.0, 0.0) == [("bin 0", 1.0)]


def read_of(plan: Plan, source: int) -> list[int]:
    """The documents of a source in the order in which rows hold them."""
    return plan.table.document[plan.table.source == source].tolist()


def test_an_empty_bin_is_refused_with_the_lengths_that_exist() -> None:
    source = Source("a", "a", length_bins=(5, 10), length_shares=(0.2, 0.3, 0.5))
    with pytest.raises(UserError) as error:
        build_streams(Data(sources=(source,)), [np.array([2, 3, 11, 1200])], [0], 100, range(1))
    for words in ("'a'", "bin 1", "[5, 10]", "6 to 10 tokens", "2 to 1,200 tokens", "2 in bin 0, 2 in bin 2"):
        assert words in str(error.value)
    # filters are applied before
    with pytest.raises(UserError, match="bin 2.*none.*6 to 8 tokens"):
        filtered = replace(source, max_length=8, min_length=4, length_shares=(0.0, 0.5, 0.5))
        build_streams(Data(sources=(filtered,)), [np.array([2, 6, 8, 1200])], [0], 100, range(1))


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


SHARES = (Point(0, None, (0.5, 0.5)), Point(9, None, (0.2, 0.8)))
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
    "points that fall": ({}, {"schedule": (Point(5, 1.0), Point(3, 2.0))}, ["steps 5, 3", "must rise"]),
    "a step twice": ({}, {"schedule": (Point(5, 1.0), Point(5, 2.0))}, ["steps 5, 5", "two points one step apart"]),
    "a point of nothing": ({}, {"schedule": (Point(0, 1.0), Point(5))}, ["schedule[1] (step 5)", "neither weight nor"]),
    "one point": ({}, {"schedule": (Point(4, 2.0),)}, ["weight at step 4 only", "write weight in the source"]),
    "a weight in two places": (
        {},
        {"weight": 2.0, "schedule": (Point(0, 1.0), Point(5, 2.0))},
        ["weight = 2 stands in the source and in its schedule"],
    ),
    "length_shares in two places": (
        {},
        {"length_bins": (5,), "length_shares": (0.5, 0.5), "schedule": SHARES},
        ["length_shares stands in the source and in its schedule"],
    ),
    "moving shares without bins": ({}, {"schedule": SHARES}, ["schedule[0].length_shares = [0.5, 0.5]", "length_bins"]),
    "a moving share too few": ({}, {"length_bins": (5, 9), "schedule": SHARES}, ["schedule[0]", "2 shares", "3 bins"]),
    "a moving sum that is not 1": (
        {},
        {"length_bins": (5,), "schedule": (Point(0, None, (0.5, 0.5)), Point(5, None, (0.5, 0.6)))},
        ["schedule[1].length_shares = [0.5, 0.6]", "not to 1.1"],
    ),
    "one point of length_shares": (
        {},
        {"length_bins": (5,), "schedule": (Point(0, 1.0, (0.5, 0.5)), Point(5, 2.0))},
        ["length_shares at step 0 only"],
    ),
    "a schedule and domain_upsampling": (
        {"strategy": "domain_upsampling", "upsampled_sources": ("web",)},
        {"schedule": (Point(0, 1.0), Point(5, 2.0))},
        ['a schedule of weight and data.strategy = "domain_upsampling" both'],
    ),
    "a schedule and global_upsampling": (
        {"strategy": "global_upsampling"},
        {"schedule": (Point(0, 1.0), Point(5, 2.0))},
        ['a schedule of weight and data.strategy = "global_upsampling" both'],
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


def test_no_step_can_be_without_a_source() -> None:
    going = (Point(0, 1.0), Point(5, 0.0))
    sources = Source("books", "b", schedule=going), Source("web", "w", schedule=going)
    with pytest.raises(UserError, match=r"Every source has weight = 0 at step 5 \(books, web\)"):
        check_data(JobConfig(data=Data(sources=sources)))


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


WEIGHTS = {"books": [(50, 1.0), (150, 4.0)], "web": [(0, 3.0), (100, 1.0)]}
LENGTHS = [(0, (0.6, 0.3, 0.1)), (120, (0.1, 0.3, 0.6))]
MOVING: dict[str, Any] = {
    "weights": (1, 2, 1, 1),
    **{f"{name}__schedule": tuple(Point(step, w) for step, w in points) for name, points in WEIGHTS.items()},
    "code__length_bins": EDGES,
    "code__schedule": tuple(Point(step, None, shares) for step, shares in LENGTHS),
}


def asked(step: float) -> np.ndarray:
    """float64[sources, bins]: what MOVING asks for at a step, by its words; only code has bins."""
    weights = np.array([1.0, 2.0, 1.0, 1.0])
    for number, name in ((0, "books"), (2, "web")):
        weights[number] = np.interp(step, *zip(*WEIGHTS[name]))
    bins = [np.interp(step, [0, 120], [LENGTHS[0][1][k], LENGTHS[1][1][k]]) for k in range(3)]
    return weights[:, None] / weights.sum() * np.array([[1, 0, 0], bins, [1, 0, 0], [1, 0, 0]])


def asked_tokens(tokens: np.ndarray) -> np.ndarray:
    """float64, the shape of counted(): the tokens of each step as MOVING asks, by the midpoint rule on tenths."""
    tenths = np.array([asked((i + 0.5) / 10) for i in range(10 * len(tokens))]).reshape(-1, 10, 4, 3)
    return np.asarray(tenths.mean(axis=1) * tokens.sum(axis=(1, 2), keepdims=True))


@pytest.mark.parametrize("packing", ["best_fit", "concat", "single"])
def test_every_window_has_the_integral_of_what_is_asked(domains: Domains, packing: str) -> None:
    """Weights of sources and shares of bins move at once, at other steps."""
    plan = make_plan(domains, domain_data(packing=packing, **MOVING), steps=250)
    tokens = counted(plan)
    tokens[:, (0, 2, 3), 0] = tokens[:, (0, 2, 3)].sum(axis=2)
    tokens[:, (0, 2, 3), 1:] = 0
    allowed = 0.005 if packing == "best_fit" else 0.02
    for width in (100, 50):
        off = np.abs(windows(tokens, width) - windows(asked_tokens(tokens), width)).max()
        assert off <= allowed * 100 / width
    assert np.abs(asked(0) - asked(250)).max() > 0.2
    for stream in plan.streams:
        exact = np.mean([asked((i + 0.5) / 10)[stream.source] for i in range(2500)], axis=0)
        number = int(stream.kind.removeprefix("bin ")) if stream.source == 1 else 0
        assert stream.share == pytest.approx(exact[number], abs=TOLERANCE)


def test_a_schedule_counts_the_steps_of_the_stage_from_its_beginning(domains: Domains) -> None:
    """Also in a plan of its later steps, which goes on in the data after a changed mixture."""
    plan = make_plan(domains, domain_data(**MOVING), steps=200, first_step=90)
    tokens = counted(plan)[90:].sum(axis=2)
    exact = np.mean([asked(90 + (i + 0.5) / 10) for i in range(1100)], axis=0)
    assert tokens.sum(axis=0) / tokens.sum() == pytest.approx(exact.sum(axis=1), abs=0.005)
    assert [s.share for s in plan.streams] == pytest.approx([e for e in exact.flatten() if e], abs=TOLERANCE)


@pytest.mark.parametrize("packing", ["best_fit", "concat", "single"])
def test_a_longer_stage_with_a_schedule_begins_the_same(domains: Domains, packing: str) -> None:
    """Also where it ends before the last point."""
    short, long = (make_plan(domains, domain_data(packing=packing, **MOVING), steps=steps) for steps in (60, 200))
    assert short.fingerprint == long.fingerprint
    parts = short.table.offsets[-1]
    assert (short.table.offsets == long.table.offsets[: 60 * ROWS + 1]).all()
    for column in ("source", "document", "epoch", "start", "length"):
        assert (getattr(short.table, column) == getattr(long.table, column)[:parts]).all()


def test_a_source_comes_and_goes(domains: Domains) -> None:
    """A weight of 0 up to a step, and from a step on; the jump takes one step."""
    books, web = ((Point(99, 0.0), Point(100, 1.0)), (Point(99, 1.0), Point(100, 0.0)))
    plan = make_plan(domains, domain_data(weights=(1, 1, 1, 1), books__schedule=books, web__schedule=web))
    tokens = counted(plan).sum(axis=2)
    near = 8  # steps: 128 rows are packed together
    assert not tokens[: 99 - near, 0].any() and not tokens[100 + near :, 2].any()
    share = tokens / tokens.sum(axis=1, keepdims=True)
    assert share[: 99 - near].mean(axis=0) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.01)
    assert share[100 + near :].mean(axis=0) == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.01)
    # a stage that ends before books come has no token of it, and its report says 0 of it is asked for
    early = make_plan(domains, domain_data(weights=(1, 1, 1, 1), books__schedule=books, web__schedule=web), steps=60)
    assert not (early.table.source == 0).any() and early.streams[0].share == 0


def test_a_schedule_of_another_source_does_not_reorder_this_one(domains: Domains) -> None:
    moving = domain_data(**MOVING)
    plan, other = make_plan(domains, moving), make_plan(domains, domain_data(weights=(1, 2, 1, 1)))
    mine, theirs = (set(read_of(p, 3)[:200]) for p in (plan, other))
    assert len(mine & theirs) > 0.5 * len(mine) > 4 * len(mine) ** 2 / len(plan.corpora[3])


def test_max_epochs_counts_what_the_schedule_asks_for(domains: Domains) -> None:
    points = (Point(0, 1.0), Point(200, 0.0))  # half of what a constant weight of 1 asks for
    tokens = 200 * ROWS * SEQ_LEN
    wiki = domains["wiki"].tokens
    options: dict[str, Any] = {"weights": (1, 1, 1, 1), "wiki__max_epochs": 0.2 * tokens / wiki}
    make_plan(domains, domain_data(wiki__schedule=points, **options))
    with pytest.raises(UserError, match="'wiki' cannot fill its share"):
        make_plan(domains, domain_data(**options))


def test_a_changed_schedule_is_other_data(domains: Domains) -> None:
    data = domain_data(**MOVING)
    saved = json.loads(json.dumps(make_plan(domains, data, steps=3).inputs))
    times_10 = tuple(
        replace(
            s, weight=10 * s.weight, schedule=tuple(replace(p, weight=p.weight and 10 * p.weight) for p in s.schedule)
        )
        for s in data.sources
    )
    same = replace(
        data, sources=(*(replace(s, weight=1.0) if s.schedule and s.name != "code" else s for s in times_10),)
    )
    plan, again = make_plan(domains, same, steps=30), make_plan(domains, data, steps=30)
    assert changed_inputs(saved, plan.inputs) == []
    assert (plan.table.document == again.table.document).all()
    later = domain_data(**MOVING | {"books__schedule": (Point(60, 1.0), Point(150, 4.0))})
    (line,) = changed_inputs(saved, make_plan(domains, later, steps=3).inputs)
    assert line.startswith("source books: share [[50, ") and "-> [[60, " in line
    constant = domain_data(**MOVING | {"code__schedule": (), "code__length_shares": (0.2, 0.3, 0.5)})
    lines = changed_inputs(saved, make_plan(domains, constant, steps=3).inputs)
    assert [line.split()[:3] for line in lines] == [
        ["source", "code:", "schedule"],
        ["source", "code:", "length_shares"],
    ]


def test_the_report_has_the_shares_at_the_points(domains: Domains) -> None:
    plan = make_plan(domains, domain_data(**MOVING), steps=130)
    report = json.loads(json.dumps(make_report(plan, 1, 1, 1.0, 1.0)))
    schedule, tokens = report["schedule"], counted(plan)
    assert schedule["steps"] == [0, 50, 100, 120, 130] and schedule["beyond_the_stage"] == [150]
    assert schedule["around"] == [[0, 50], [0, 100], [50, 130], [70, 130], [80, 130]]
    assert [(s["source"], s["documents"]) for s in schedule["streams"]] == [
        *(("books", "all"), ("code", "up to 4,096"), ("code", "4,097 to 16,384"), ("code", "over 16,384")),
        *(("web", "all"), ("wiki", "all")),
    ]
    for stream in schedule["streams"]:
        source = list(domains).index(stream["source"])
        mine = [
            source,
            ["up to 4,096", "4,097 to 16,384", "over 16,384"].index(stream["documents"]) if source == 1 else ...,
        ]
        for i, (step, (begin, end)) in enumerate(zip(schedule["steps"], schedule["around"])):
            number = mine[1] if source == 1 else 0
            between = np.mean([asked(begin + (k + 0.5) * (end - begin) / 1000)[source, number] for k in range(1000)])
            assert stream["asked"][i] == pytest.approx(
                asked(step)[source, number], abs=1e-9 if step < 130 else TOLERANCE
            )
            assert stream["asked_around"][i] == pytest.approx(between, abs=TOLERANCE)
            got = tokens[begin:end][:, mine[0], mine[1]].sum() / tokens[begin:end].sum()
            assert stream["share_around"][i] == pytest.approx(got)
    plot_plan = load_script("plot_plan")
    for i, name in enumerate(domains):
        at_points = [asked(step)[i].sum() for step in schedule["steps"]]
        assert plot_plan.asked_at_points(report, name) == pytest.approx(at_points, abs=TOLERANCE)
    text = format_report(report)
    assert "after the stage's last, 130" in text and "points at the steps 150" in text
    first = schedule["streams"][1]
    assert (
        f"schedule of code, up to 4,096: {first['asked'][0]:.2%} at step 0 (steps 0 to 50: "
        f"{first['asked_around'][0]:.2%} asked, {first['share_around'][0]:.2%} got); " in text
    )
    books = report["sources"][0]
    off = (windows(tokens) - windows(asked_tokens(tokens)))[:, 0].sum(axis=1)
    assert books["worst_window"] == pytest.approx(np.abs(off).max(), abs=2 * TOLERANCE)
    assert make_report(make_plan(domains, domain_data(), steps=5), 1, 1, 1.0, 1.0)["schedule"] is None


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
