"""scripts/compare.py on small results whose differences are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from tests.scripts import load_script
from torchtitan.extensions.evaluation import plots

script = load_script("compare")
EDGES = (0, 512, 1024, 2048, 4096)


def text(nll: list[float | None], edges: tuple[int, ...] = EDGES, count: list[int] | None = None) -> dict[str, Any]:
    count = count or [100, 300, 200, 600, 800][: len(nll)]
    return {"edges": list(edges), "nll": nll, "count": count, "gain_of_context": None, "gains_of_context": []}


def grid(lengths: list[int], exact: Any, score: Any = None, depths: list[float] | None = None) -> dict[str, Any]:
    same = {"logprob": exact, "count": [[4] * len(row) for row in exact], "cut": [[0] * len(row) for row in exact]}
    score = score or [[None] * len(row) for row in exact]
    return {"lengths": lengths, "depths": depths, "exact": exact, "score": score, **same}


def result(label: str, perplexity: dict[str, Any], tasks: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    rope = {"theta": 1e4, "scaling": None, "layers": "all", "max_position_embeddings": 1024}
    known = {"label": label, "model": "m", "step": None, "rope": rope, "dtype": "float32", "world_size": 1}
    return known | {"perplexity": perplexity, "tasks": tasks or {}, "seconds": 1.0} | more


BEFORE = result(
    "before",
    {"books": text([3.0, 2.5, 5.0, 7.0]), "code": text([1.0], (0, 512))},
    {"needle": grid([1024, 4096], [[1.0, 0.5], [0.0, 0.25]], depths=[0.0, 1.0])},
)
AFTER = result(
    "after",
    {"books": text([3.009, 2.525, 2.5, 2.0])},
    {"needle": grid([1024, 4096], [[1.0, 1.0], [1.0, 0.75]], [[1.0, 1.0], [1.0, 0.5]], depths=[0.0, 1.0])},
)


@pytest.fixture
def say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the script on results; returns its exit code, standard output and standard error."""

    def run(*results: Any, flags: tuple[Any, ...] = ()) -> tuple[int, str, str]:
        for i, one in enumerate(results):
            (tmp_path / f"{i}.json").write_text(one if isinstance(one, str) else json.dumps(one))
        files = [str(tmp_path / f"{i}.json") for i in range(len(results))]
        code = script.main([*files, *map(str, flags)])
        return code, *capsys.readouterr()

    return run


def rows(out: str, first: str) -> list[str]:
    """The lines of tables that begin with `begins`, with single spaces between words."""
    lines = [" ".join(line.split()) for line in out.partition("not the same")[0].splitlines()]
    return [line for line in lines if line.startswith(f"{first} ")]


def test_losses_by_range_and_what_is_lost_short_and_gained_long(say: Any):
    code, out, _ = say(BEFORE, AFTER)
    assert code == 0
    assert rows(out, "0 - 512") == ["0 - 512 100 3.0000 (20.09) 3.0090 (20.27) +0.0090"]  # not significant
    assert rows(out, "512 - 1,024") == ["512 - 1,024 300 2.5000 (12.18) 2.5250 (12.49) +0.0250 *"]
    assert rows(out, "1,024 - 2,048")[0].endswith("-2.5000 *")
    # (100 * 0.009 + 300 * 0.025) / 400, and (200 * -2.5 + 600 * -5) / 800
    (line,) = rows(out, "after")
    short, _, long = line.removeprefix("after ").partition(" * ")
    assert short == "2.6250 (13.80) -> 2.6460 (14.10) +0.0210" and long.endswith("-> 2.1250 (8.37) -4.3750 *")
    assert "short context (to 1,024)" in out and "only in before: text code" in out


def test_short_context_is_as_told_or_not_known(say: Any):
    assert "short context (to 2,048)" in say(BEFORE, AFTER, flags=("--short", 2048))[1]
    (line,) = rows(out := say(BEFORE, AFTER, flags=("--short", 1500))[1], "after")
    assert line.endswith("-5.0000 *") and "neither short nor long context: books, positions 1,024 - 2,048" in out
    unknown = say(BEFORE | {"rope": {"max_position_embeddings": None}}, AFTER)[1]
    assert "--short N" in unknown and not rows(unknown, "after")


def test_tasks_by_length_and_way(say: Any):
    _, out, _ = say(BEFORE, AFTER)
    assert rows(out, "needle") == [
        "needle 1,024 8 75.0% 100.0% +25.0",
        "needle 4,096 8 12.5% 87.5% +75.0",
    ]
    assert "found in what was written" not in out  # the first one wrote nothing


def test_any_number_of_tasks_without_depths_and_their_mean(say: Any):
    names = [f"niah_single_{i}" for i in range(13)]
    a = result("a", {}, {name: grid([4096], [[0.0]], [[i / 13]]) for i, name in enumerate(names)})
    b = result("b", {}, {name: grid([4096, 8192], [[1.0], [0.0]], [[1.0], [0.0]]) for name in names})
    code, out, _ = say(a, b)
    assert code == 0 and all(len(rows(out, name)) == 2 for name in names)
    assert rows(out, "niah_single_0") == ["niah_single_0 4,096 4 0.0% 100.0% +100.0"] * 2
    assert rows(out, "mean of 13") == [
        "mean of 13 4,096 0.0% 100.0% +100.0",
        "mean of 13 4,096 46.2% 100.0% +53.8",
    ]
    assert out.count(" at 8,192") == 13 and out.count("only in b") == 1


def test_three_results_of_which_one_lacks_a_task_and_has_other_ranges(say: Any):
    third = result("third", {"books": text([3.0, 2.5, 1.0], (0, 512, 1024, 8192))}, dtype="bfloat16")
    _, out, _ = say(BEFORE, AFTER, third)
    assert rows(out, "0 - 512")[0].endswith("3.0000 (20.09) +0.0000")
    assert rows(out, "1,024 - 2,048")[0].endswith(" - -")
    assert rows(out, "needle 1,024")[0].endswith("+25.0 - -")
    assert rows(out, "third")[0].endswith("+0.0000 -")  # no range beyond is shared
    for said in (
        "only in third: books, positions 1,024 - 8,192",
        "only in before, after: books, positions 1,024 - 2,048; books, positions 2,048 - 4,096; task needle",
        "dtype: float32 (before), float32 (after), bfloat16 (third)",
    ):
        assert f"  {said}\n" in out + "\n"


def test_other_documents_and_depths_are_named(say: Any):
    other = text([3.0, 2.5, 5.0, 7.0], count=[100, 299, 200, 600])
    needle = grid([1024], [[0.5, 0.0]], depths=[0.0, 0.5])
    _, out, _ = say(BEFORE, result("after", {"books": other}, {"needle": needle}))
    assert "other documents, or another tokenizer: books, positions 512 - 1,024\n" in out
    assert rows(out, "needle") == ["needle 1,024 4 100.0% 50.0% -50.0"]  # of the depth 0% alone
    assert "only in after: needle, depth 50%\n" in out
    assert "only in before: needle, depth 100%; needle at 4,096; text code" in out


def test_what_was_asked_otherwise_is_named(say: Any):
    about = {"add_bos": True, "seed": 0, "generate": False, "tokenizer": "a", "questions": "a", "texts": ["x"]}
    before, same = BEFORE | {"asked": about}, AFTER | {"asked": dict(about)}
    assert "BOS before" not in say(before, same)[1] and "other documents or questions" not in say(before, same)[1]
    other = AFTER | {"asked": about | {"add_bos": False, "questions": "b"}}
    said = say(before, other)[1]
    assert "BOS before documents and questions: True (before), False (after)" in said
    assert "other documents or questions: 1 (before), 2 (after)" in said and "seed" not in said


def test_labels(say: Any, tmp_path: Path):
    assert "difference to old" in say(BEFORE, AFTER, flags=("--labels", "old", "new"))[1]
    assert f"difference to {tmp_path}/0.json" in say(BEFORE, BEFORE)[1]  # two of one name


@pytest.mark.parametrize(
    "second, flags, says",
    [
        ("{", (), "1.json is not JSON"),
        ("[1]", (), "1.json holds a list, but a JSON object is expected"),
        ({"label": "curves", "curves": []}, (), "1.json is not a result"),
        (result("x", {"books": text([1.0], EDGES)}), (), "1.json is not a result"),  # fewer losses than ranges
        (
            result("x", {"other": text([1.0], (0, 512))}),
            (),
            "Nothing in common: before has the loss on books by 4 ranges",
        ),
        (result("x", {"books": text([1.0], (0, 300))}), (), "Nothing in common"),
        (AFTER, ("--labels", "one"), "--labels has 1 names for 2 results"),
        (AFTER, ("--short", "0"), "--short = 0"),
        (AFTER, ("--plot", "x.txt"), "--plot x.txt should end with .png"),
    ],
)
def test_mistakes_are_named(second: Any, flags: tuple[str, ...], says: str, say: Any):
    code, out, error = say(BEFORE, second, flags=flags)
    assert code == 1 and out == "" and says in error and error.count("\n") == 1


def test_one_result_or_none_is_not_compared(say: Any, tmp_path: Path):
    assert "is the only result: give at least two" in say(BEFORE)[2]
    assert "2.json cannot be read" in say(BEFORE, AFTER, flags=(tmp_path / "2.json",))[2]


def test_the_picture(say: Any, tmp_path: Path):
    assert say(BEFORE, AFTER, flags=("--plot", tmp_path / "a" / "plot.png"))[0] == 0
    assert (tmp_path / "a" / "plot.png").stat().st_size > 10_000
    figure = plots.comparison_figure([BEFORE, AFTER], ["x", "y"], ["books"], ["needle"], 1024)
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines["x"].get_ydata()) == [3.0, 2.5, 5.0, 7.0] and list(lines["y"].get_xdata())[0] == 256
    lines = {line.get_label(): line for line in right.lines}
    assert list(lines["x"].get_ydata()) == [75.0, 12.5] and list(lines["y"].get_ydata()) == [100.0, 87.5]  # exact
    assert len(plots.comparison_figure([BEFORE, AFTER], ["x", "y"], ["books"], []).axes) == 1
    plt.close("all")
