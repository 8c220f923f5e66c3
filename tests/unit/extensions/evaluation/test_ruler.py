"""RULER's tasks: a reader of the prompts scores all, lengths are kept, and counts and wording are the published
ones."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests.distributed.harness import ASSETS
from tests.unit.extensions.evaluation.solvers import solve
from torchtitan.config import load_config
from torchtitan.config.schema import EvaluationTask
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation import evaluate, plots, recall, results, ruler, words
from torchtitan.extensions.evaluation.checks import GROUPS, QA_FILES
from torchtitan.extensions.evaluation.fitting import Task, listed
from torchtitan.extensions.evaluation.questions import Question, string_match_all, string_match_part
from torchtitan.extensions.evaluation.tasks import group_means, group_name, tasks_of
from torchtitan.tools.errors import UserError

TOKENIZER = load_tokenizer(ASSETS)
TEXT = " ".join(f"The river {i} is near the stone. A bird sees it.\n" for i in range(900))
SHORTEST = {"niah_multikey_3": 1024, "vt": 1024, "cwe": 2048, "qa_1": 1024, "qa_2": 2048}  # of these; others 512
LENGTHS = (512, 1024, 2048, 8192, 16384)
KEYS_VALUES_QUERIES = {  # as in the paper's table and the published configuration
    "niah_single_1": (1, 1, 1),
    "niah_single_2": (1, 1, 1),
    "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 1, 1),
    "niah_multikey_2": (1, 1, 1),
    "niah_multikey_3": (1, 1, 1),
    "niah_multivalue": (1, 4, 1),
    "niah_multiquery": (4, 1, 4),
}


def task_named(name: str, qa_files: list[Path]) -> Task:
    (task,) = tasks_of([name], qa_files)
    return task


def text_of(item: Question) -> str:
    return TOKENIZER.decode(item.prompt.tolist())


@pytest.mark.parametrize("name", [*GROUPS["ruler"]])
def test_a_reader_scores_all_and_lengths_are_kept(name: str, qa_files: list[Path]):
    task = task_named(name, qa_files)
    for length in LENGTHS:
        if length < SHORTEST.get(name, 512):
            continue
        for item in task.make(TOKENIZER, TEXT, length, 1 if length > 8000 else 3, 5, None):
            assert (item.task, item.length, item.depth) == (name, length, None)
            assert item.prompt.dtype == item.target.dtype == torch.int64
            assert 0.9 * length <= len(item.prompt) + item.max_new_tokens <= length
            assert item.max_new_tokens >= max(task.max_new_tokens, len(item.target))
            prompt = text_of(item)
            found = solve(item, prompt)
            assert len(found) == (1 if name.startswith("qa") else len(item.answers))
            assert len(item.answers) == {"qa_1": 2, "qa_2": 1}.get(name, len(item.answers)), "spellings, each once"
            assert task.score("It is " + " ".join(found).upper(), item.answers) == 1
            assert task.score(TOKENIZER.decode(item.target.tolist()), item.answers) == 1
            assert task.score("", item.answers) == task.score("7 99 the grass is", item.answers) == 0


@pytest.mark.parametrize("name", [*GROUPS["ruler"]])
def test_an_item_is_a_function_of_seed_task_length_and_number(name: str, qa_files: list[Path]):
    def made(length: int, count: int, seed: int) -> list[Question]:
        return task_named(name, qa_files).make(TOKENIZER, TEXT, length, count, seed, 7)

    items, again, other = made(2048, 3, 1), made(2048, 2, 1), made(2048, 2, 2)
    for a, b in zip(items, again, strict=False):
        assert torch.equal(a.prompt, b.prompt) and a.answers == b.answers
        assert a.prompt[0] == 7
    assert len({item.answers for item in items + other}) == 5


@pytest.mark.parametrize("name", [*ruler.NIAH])
def test_needles_are_as_many_as_published(name: str):
    keys, values, queries = KEYS_VALUES_QUERIES[name]
    niah = ruler.NIAH[name]
    for item in ruler.TASKS[name].make(TOKENIZER, TEXT, 2048, 3, 0, None):
        prompt = text_of(item)
        told = re.findall(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.", prompt)
        assert len(item.answers) == values * queries
        assert TOKENIZER.decode(item.target.tolist()) == " " + listed(item.answers)
        assert {kind for kind, _, _ in told} == {niah.value}
        shape = {"numbers": r"\d{7}", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
        assert all(re.fullmatch(shape[niah.value], value) for _, _, value in told)
        assert all(re.fullmatch(shape.get(niah.key, r"[a-z]+-[a-z]+"), key) for _, key, _ in told)
        if niah.haystack == "needles":
            assert len(told) > 10 and len({key for _, key, _ in told if prompt.count(key) > 1}) >= 1
        else:
            assert len(told) == keys * values and len({key for _, key, _ in told}) == keys
        assert ("The grass is green" in prompt) == (niah.haystack == "noise")
        assert ("The river" in prompt) == (niah.haystack == "essay")
        head = "Some special magic" if values * queries > 1 else "A special magic"
        assert prompt.startswith(head)
        answer = prompt.splitlines()[-1].split("? ")[1]
        plural = values * queries > 1
        assert answer.startswith(f"The special magic {niah.value if plural else niah.value[:-1]} for ")
        assert answer.endswith("are" if plural else "is")


def test_needles_stand_anywhere():
    items = ruler.TASKS["niah_single_2"].make(TOKENIZER, TEXT, 1024, 30, 0, None)
    places = [text_of(item).index("One of the special") / len(text_of(item)) for item in items]
    assert min(places) < 0.2 and max(places) > 0.6
    assert all(re.search(r"[.!?] One of|\nOne of", text_of(item)) for item in items)  # after a sentence


def test_variables_are_chained():
    (item,) = ruler.TASKS["vt"].make(TOKENIZER, TEXT, 2048, 1, 0, None)
    example, task = text_of(item).split("\n\n\n\n")
    for part, letters in ((example, 3), (task, 5)):
        told = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", part)
        assert len(told) == 5 and all(len(name) == letters for name, _ in told)
        assert told[0][1].isdigit() and [told[i][0] for i in range(4)] == [value for _, value in told[1:]]
    assert example.endswith("they are: " + " ".join(re.findall(r"VAR ([A-Z]+) =", example)))
    assert example.count("There and back again.") == 10


@pytest.mark.parametrize("length, repeats, shot", [(2048, (6, 1), (3, 1, 20)), (8192, (30, 3), (10, 3, 40))])
def test_words_are_repeated_as_published(length: int, repeats: tuple[int, int], shot: tuple[int, int, int]):
    (item,) = ruler.TASKS["cwe"].make(TOKENIZER, TEXT, length, 1, 0, None)
    example, task = text_of(item).split("\nBelow is")
    counted = Counter(re.findall(r"\d+\. (\S+)", task.split("\nQuestion")[0]))
    assert Counter(counted.values()) == {repeats[0]: 10, repeats[1]: len(counted) - 10}
    counted = Counter(re.findall(r"\d+\. (\S+)", example.split("\nQuestion")[0]))
    assert Counter(counted.values()) == {shot[0]: 10, shot[1]: shot[2] - 10}
    assert TOKENIZER.decode(item.target.tolist()) == " ".join(f"{i}. {w}" for i, w in enumerate(item.answers, 1))


def test_coded_words_follow_a_zeta_distribution():
    (item,) = ruler.TASKS["fwe"].make(TOKENIZER, TEXT, 8192, 1, 0, None)
    context = text_of(item).split("coded words. ")[1].split("\nQuestion")[0].split()
    ranked = Counter(context).most_common()
    assert ranked[0][0] == "..." and item.answers == tuple(word for word, _ in ranked[1:4])
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    assert len({letter for word, _ in ranked[1:] for letter in word}) > 20
    assert ranked[1][1] / ranked[0][1] == pytest.approx(1 / 4, rel=0.02)
    assert ranked[3][1] / ranked[0][1] == pytest.approx(1 / 16, rel=0.05)


def test_documents_are_the_needed_ones_and_others(qa_files: list[Path]):
    squad = task_named("qa_1", qa_files).make(TOKENIZER, TEXT, 8192, 4, 0, None)
    hotpot = task_named("qa_2", qa_files).make(TOKENIZER, TEXT, 8192, 4, 0, None)
    for item in squad + hotpot:
        prompt = text_of(item)
        numbers = [int(n) for n in re.findall(r"^Document (\d+):$", prompt, re.M)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 20
        documents = re.findall(r"^The birds.*$", prompt, re.M)
        assert len(set(documents)) == len(documents) == len(numbers)
        needed = int(item.answers[0][1:-1])
        together = range(needed - needed % 10, needed - needed % 10 + 10)  # the question's article, or its ten pages
        assert all(f"The colour of {n} is c{n}q." in prompt for n in together)
        assert prompt.endswith(f"Question: The colour of {needed}? Answer:")
        assert TOKENIZER.decode(item.target.tolist()) == f" {item.answers[0]}"
    assert len({item.answers for item in squad}) == 4
    longer = task_named("qa_1", qa_files).make(TOKENIZER, TEXT, 2048, 4, 0, None)
    assert [item.answers for item in longer] == [item.answers for item in squad]  # the same questions at all lengths


def test_scores_on_cases_made_by_hand(qa_files: list[Path]):
    both = ("1234567", "Blue-Fox")
    assert string_match_all("It is 1234567, and blue-fox.", both) == 1
    assert string_match_all("It is 1234567.", both) == 0.5
    assert string_match_all("1 234 567", both) == 0
    assert string_match_part("in the BLUE-FOX inn", both) == 1
    assert string_match_part("in the fox inn", both) == 0
    budgets = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    tasks = {task.name: task for task in tasks_of(["ruler"], qa_files)}
    assert tasks.keys() == {*GROUPS["ruler"]}
    assert all(task.max_new_tokens == budgets.get(name, 128) for name, task in tasks.items())


def test_the_wording_is_that_of_the_harness(qa_files: list[Path]):
    """lm-evaluation-harness has RULER's templates, from NVIDIA's own code; they are read there, not copied here. Only
    vt's space after the last colon is left out (docs/evaluation.md)."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "tasks" / "ruler"

    def constant(file: str, name: str) -> Any:
        for node in ast.parse((folder / file).read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return ast.literal_eval(node.value)
        raise AssertionError(f"{file} has no {name}")

    def of_config(file: str) -> str:
        config = constant(file, "CONFIG")
        config = config.get("variable_tracking", config)
        return str(config["template"]) if file == "qa_utils.py" else config["template"] + config["answer_prefix"]

    source = (folder / "prepare_niah.py").read_text()
    niah = single = constant("niah_utils.py", "TEMPLATE")
    for many, word in (("Some", "A"), ("are all", "is"), ("are", "is")):  # as its code does for a single answer
        single = single.replace(many, word)
    ends = re.findall(r'f"(The special magic [^"]* provided text (?:is|are))"', source)
    one, niah = (f"{text} {end.replace('[:-1]', '')}" for text, end in zip((single, niah), ends, strict=True))
    templates = {name: one if KEYS_VALUES_QUERIES[name][1:] == (1, 1) else niah for name in ruler.NIAH}
    templates |= {name: of_config(f"{name}_utils.py") for name in ("vt", "cwe", "fwe")}
    templates |= dict.fromkeys(QA_FILES, of_config("qa_utils.py"))
    for name, template in templates.items():
        (item,) = task_named(name, qa_files).make(TOKENIZER, TEXT, 2400, 1, 0, None)
        parts = re.split(r"(\{\w+\})", template.rstrip())
        pattern = "".join(r"(?s:.+)" if part.startswith("{") else re.escape(part) for part in parts)
        prompt = text_of(item)
        begins = prompt.rindex(parts[0]) if name in ("vt", "cwe") else 0  # after a worked example of the same form
        assert re.fullmatch(pattern, prompt[begins:]), name
        assert re.match(pattern, prompt), name
    assert ruler.NOISE in source
    assert ruler.NEEDLE.format(kind="{type_needle_v}", key="{key}", value="{value}") in source


def test_words_are_enough_and_of_no_other_form():
    assert words.singles() > 800 and len(set(words.words())) == len(words.words()) > 100_000
    assert all(re.fullmatch("[a-z]+", word) for word in words.words()[: words.singles()])
    assert all(re.fullmatch("[a-z]+-[a-z]+", word) for word in words.words()[words.singles() :])


def test_mistakes_are_named(qa_files: list[Path], tmp_path: Path):
    for name, task in ruler.TASKS.items():
        with pytest.raises(UserError, match=rf"^{name} takes at least \d+ tokens .* the length is 200\.$"):
            task.make(TOKENIZER, TEXT, 200, 1, 0, None)
    with pytest.raises(UserError, match="cwe takes at least"):  # ten words thirty times are too many for these tokens
        ruler.TASKS["cwe"].make(TOKENIZER, TEXT, 4096, 1, 0, None)
    with pytest.raises(UserError, match="there are 800 documents, with which the prompt has"):
        task_named("qa_1", qa_files).make(TOKENIZER, TEXT, 10**6, 1, 0, None)
    with pytest.raises(UserError, match=r"names qa_1, which needs SQuAD 2\.0's dev-v2\.0\.json"):
        tasks_of(["qa_1"], qa_files[:1])
    with pytest.raises(UserError, match="names qa_2, which needs HotpotQA's"):
        tasks_of(["qa_2"])
    with pytest.raises(UserError, match="nowhere.json, which does not exist"):
        tasks_of(["vt"], [tmp_path / "nowhere.json"])
    for content in ("{", '{"a": 1}', "[1]", "3", '[{"question": "?"}]'):
        (tmp_path / f"{len(content)}.json").write_text(content)
        with pytest.raises(UserError, match="which is neither SQuAD"):
            tasks_of(["vt"], [tmp_path / f"{len(content)}.json"])
    (tmp_path / "empty.json").write_text('{"data": []}')
    with pytest.raises(UserError, match="no question that can be answered"):
        tasks_of(["vt"], [tmp_path / "empty.json"])


def test_a_misspelt_task_is_answered_with_the_nearest(tmp_path: Path):
    (tmp_path / "stage.toml").write_text('[evaluation]\ntasks = ["rulr"]\n')
    with pytest.raises(UserError, match=r'tasks\[0\] = "rulr" is not offered.*did you mean "ruler"'):
        load_config(["--job.config_file", str(tmp_path / "stage.toml")])


def test_groups_are_expanded(qa_files: list[Path]):
    def names(*asked: str, files: list[Path]) -> list[str]:
        return [task.name for task in tasks_of(asked, files)]

    assert names("ruler", files=[]) == list(ruler.TASKS) and len(ruler.TASKS) == 11
    assert names("ruler", files=qa_files) == [*ruler.TASKS, *QA_FILES] and len(GROUPS["ruler"]) == 13
    assert names("ruler", files=qa_files[:1]) == [*ruler.TASKS, "qa_2"]
    assert names("vt", "ruler", "vt", files=[])[0] == "vt" and len(names("vt", "ruler", "vt", files=[])) == 11
    assert names("recall", files=[]) == ["niah_mk_2", "niah_mk_3", "niah_mv", "json_kv"]
    assert set(get_args(EvaluationTask)) == {*GROUPS, *ruler.TASKS, *QA_FILES, *recall.TASKS}
    assert {"ruler": (*ruler.TASKS, *QA_FILES), "recall": tuple(recall.TASKS)} == GROUPS


def test_group_means_and_the_picture_of_tasks():
    def grid(lengths: list[int], scores: list[list[float | None]], depths: list[float] | None = None) -> dict[str, Any]:
        numbers = dict.fromkeys(("score", "exact", "logprob"), scores)
        return {"lengths": lengths, "depths": depths, **numbers, "count": [[2]], "cut": [[0]]}

    grids = {
        "vt": grid([1024, 2048], [[0.5], [0.25]]),
        "fwe": grid([1024, 2048], [[1.0], [0.75]]),
        "json_kv": grid([2048], [[1.0, 0.0, 0.5]], [0.0, 0.5, 1.0]),
        "niah_mv": grid([2048], [[0.7]]),
    }
    means = group_means(grids)
    assert means["ruler"] == {"lengths": [1024, 2048], "tasks": 2, "of": 13, "score": [0.75, 0.5], "exact": [0.75, 0.5]}
    assert means["recall"]["score"] == [pytest.approx(0.6)]
    assert group_name("ruler", means["ruler"]) == "ruler mean over 2 of 13 tasks"
    assert group_name("recall", {"tasks": 4, "of": 4}) == "recall"
    assert group_means({"vt": grids["vt"]}) == {}
    silent = group_means({name: {**grids[name], "score": [[None]] * 2} for name in ("vt", "fwe")})
    assert silent["ruler"]["score"] == [None, None]

    result = {"label": "x", "perplexity": {}, "tasks": grids, "groups": means}
    numbers = results.scalars(result)
    assert (
        numbers["ruler_score/2048"] == 0.5 and numbers["json_kv_score/2048"] == 0.5 and numbers["vt_exact/1024"] == 0.5
    )
    line = results.summary(result)
    assert "ruler mean over 2 of 13 tasks written 75% at 1,024, 50% at 2,048" in line
    assert "recall mean over 2 of 4 tasks answered exactly 60% at 2,048" in line and "fwe" not in line
    figures = plots.task_figures(result)
    assert set(figures) == {"json_kv", "tasks"}
    (image,) = figures["tasks"].axes[0].images
    assert image.get_array().filled(-1).tolist() == [[50, 25], [100, 75], [-1, 70]]
    assert [label.get_text() for label in figures["tasks"].axes[0].get_yticklabels()] == ["vt", "fwe", "niah_mv"]


def test_haystacks_of_held_out_text_have_no_special_tokens():
    assert TOKENIZER.bos_id is not None and TOKENIZER.eos_id is not None
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("A bird."), TOKENIZER.eos_id]
    assert evaluate.without_special(TOKENIZER, torch.tensor(ids)).tolist() == TOKENIZER.encode("A bird.")
