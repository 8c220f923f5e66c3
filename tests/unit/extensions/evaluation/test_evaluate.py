"""Needles, grids of results, pictures, and scripts/evaluate.py from mistakes to a table."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.harness import ASSETS, TINY
from tests.scripts import load_script, run_script
from tests.unit.extensions.evaluation.full_logits import losses_of_all_logits
from torchtitan.config.data_schema import Data
from torchtitan.config.schema import Evaluation, Job, JobConfig, Rope, Training
from torchtitan.datasets.positions import sentence_end_ids
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation import evaluate as asking
from torchtitan.extensions.evaluation import hook, needle, plots, results
from torchtitan.extensions.evaluation.checks import longest_asked
from torchtitan.extensions.evaluation.command_line import begins_with_bos, resolve_request
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.hook import EvaluationHook
from torchtitan.extensions.evaluation.loading import ModelOnDisk, check_own_results, inspect_model
from torchtitan.extensions.evaluation.questions import Question, default_text
from torchtitan.extensions.evaluation.runner import Outcome, mean_by_length_and_depth, position_losses
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.weights import hf_name
from torchtitan.models.rope import RopeArgs, rope_for
from torchtitan.models.rope_scaling import DynamicNTKScaling, GeneScaling
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import put_aside, write_text

TOKENIZER = load_tokenizer(ASSETS)
TEXT = torch.tensor(TOKENIZER.encode(" ".join(f"The river {i} is near the stone. A bird sees it." for i in range(200))))
script = load_script("evaluate")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    shutil.copytree(ASSETS, folder)
    (folder / "config.json").write_text(json.dumps(TINY | {"max_position_embeddings": 256}))
    transformer = Transformer(read_config(folder))
    init_weights(transformer, seed=7)
    save_file({hf_name(n): p.detach() for n, p in transformer.named_parameters()}, folder / "model.safetensors")
    (folder.parent / "text.jsonl").write_text(json.dumps({"text": TOKENIZER.decode(TEXT.tolist())}) + "\n")
    return folder


def test_needles_stand_where_they_should_and_can_be_found_by_reading():
    task = needle.NeedleTask([0.0, 0.3, 1.0])
    items = [item for length in (200, 500) for item in task.make(TOKENIZER, TEXT, length, 3, 0, TOKENIZER.bos_id)]
    assert len(items) == 18
    ends = set(sentence_end_ids(TOKENIZER))
    for item in items:
        # with room for what is written: a RoPE that depends on the length is the RoPE of that length
        assert len(item.prompt) + item.max_new_tokens == item.length
        assert item.max_new_tokens == len(item.target) + needle.SPARE_TOKENS
        text = TOKENIZER.decode(item.prompt.tolist())
        name = text.rsplit("The number of the ", 1)[1].removesuffix(" is")
        sentence = f"Remember this: the number of the {name} is {item.answers[0]}."
        assert text.count(sentence) == 1 and text.count(item.answers[0]) == 1
        assert TOKENIZER.decode(item.target.tolist()) == f" {item.answers[0]}."
        assert TOKENIZER.bos_id is None or item.prompt[0] == TOKENIZER.bos_id
        before, question = text.index(sentence), text.index("\n\nWhat is the number")
        share = before / (question - len(sentence))
        assert item.depth is not None and share == pytest.approx(item.depth, abs=0.15)
        tokens = TOKENIZER.encode(text[:before])
        assert item.depth == 0 or tokens[-1] in ends
        # the oracle: a copy of what follows the name scores 1, anything else 0
        assert task.score(f"{item.answers[0]}, I think", item.answers) == 1
        assert task.score("1234", item.answers) == 0 and task.score("", item.answers) == 0
    one_depth = needle.NeedleTask([0.3])
    same, others = (one_depth.make(TOKENIZER, TEXT, 500, 3, seed, TOKENIZER.bos_id) for seed in (0, 1))
    asked = [item.answers for item in items if (item.length, item.depth) == (500, 0.3)]
    assert [item.answers for item in same] == asked
    assert not {item.answers for item in others} & set(asked)


def test_text_is_repeated_for_a_length_beyond_it():
    (item,) = needle.NeedleTask([0.5]).make(TOKENIZER, TEXT[:90], 700, 1, 0, None)
    assert len(item.prompt) + len(item.target) + needle.SPARE_TOKENS == 700
    with pytest.raises(UserError, match="the length is 10"):
        needle.NeedleTask([0.5]).make(TOKENIZER, TEXT, 10, 1, 0, None)


def test_the_default_text_is_there():
    assert len(default_text()) > 300_000


def item(length: int, depth: float | None) -> Question:
    return Question("t", length, torch.zeros(1), torch.zeros(1), ("1",), 4, depth)


def test_grids_are_means_of_their_cells():
    items = [item(8, 0.0), item(8, 1.0), item(16, 1.0), item(8, 1.0)]
    outcomes = [
        Outcome(True, -1.0, 1.0, "a"),
        Outcome(True, -1.0, 0.0, "b", cut=True),
        Outcome(False, -2.0, 0.5, "c"),
        Outcome(False, -3.0, 1.0, "d", cut=True),
    ]
    grid = mean_by_length_and_depth(items, outcomes)
    assert grid == {
        "lengths": [8, 16],
        "depths": [0.0, 1.0],
        "score": [[1.0, 0.5], [None, 0.5]],
        "exact": [[1.0, 0.5], [None, 0.0]],
        "logprob": [[-1.0, -2.0], [None, -2.0]],
        "count": [[1, 2], [None, 1]],
        "cut": [[0, 2], [None, 0]],
        "written": [["a", "b"], [None, "c"]],
    }
    silent = mean_by_length_and_depth([item(8, None)], [Outcome(True, -1.0)])
    assert silent["depths"] is None and silent["score"] == [[None]] and silent["exact"] == [[1.0]]


def test_the_heatmap_shows_lengths_across_and_depths_down():
    grid = mean_by_length_and_depth([item(1024, 0.0), item(2048, 1.0)], [Outcome(True, 0.0), Outcome(False, 0.0)])
    figure = plots.needle_figure(grid, "title")
    (image,) = figure.axes[0].images
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), -1), [[100, -1], [-1, 0]])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1K", "2K"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0%", "100%"]


@pytest.mark.parametrize("at_end, due", [(True, [0, 2, 4, 5]), (False, [0, 2, 4])])
def test_the_evaluation_after_the_last_step_may_be_left_to_another_job(at_end: bool, due: list[int], tmp_path: Path):
    assert [step for step in range(6) if is_due(tmp_path, Evaluation(freq=2, at_end=at_end), step)] == due


def is_due(folder: Path, evaluation: Evaluation, step: int) -> bool:
    """Whether an evaluation is due after a step of a stage of 5 steps, whose results are in the folder."""
    config = JobConfig(job=Job(dump_folder=str(folder)), evaluation=evaluation, training=Training(steps=5))
    one = EvaluationHook()
    one.prepared = asking.Prepared(settings={"seed": evaluation.seed})
    return one.is_due(SimpleNamespace(config=config, rank=0, step=step))


def test_results_are_kept_for_the_same_questions_of_the_same_run(tmp_path: Path):
    assert is_due(tmp_path, Evaluation(), 0)
    file = tmp_path / "evaluation/step-0.json"
    for text, due in (('{"asked": {"seed": 0}}', False), ('{"asked": {"seed": 1}}', True), ("{}", True), ("[", True)):
        file.parent.mkdir(exist_ok=True)
        write_text(file, text)
        assert is_due(tmp_path, Evaluation(), 0) == due
    put_aside(file.parent, after=-1)  # another run in the same folder
    assert is_due(tmp_path, Evaluation(), 0) and (tmp_path / "evaluation-1/step-0.json").exists()
    assert put_aside(file.parent, after=-1) is None
    assert not (tmp_path / "evaluation-2").exists()
    for step in (0, 9, 10):
        write_text(file.with_name(f"step-{step}.json"), "{}")
    put_aside(file.parent, after=9)  # a run that goes back to step 9
    assert [p.name for p in (tmp_path / "evaluation-2").iterdir()] == ["step-10.json"]
    assert sorted(p.name for p in file.parent.iterdir()) == ["step-0.json", "step-9.json"]


def test_a_long_evaluation_in_training_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    clock = iter([10.0, 25.0, 31.0, 31.0, 40.0, 62.0, 62.0])
    monkeypatch.setattr(hook.logger, "info", lines.append)
    monkeypatch.setattr(hook.time, "perf_counter", lambda: next(clock))
    one = EvaluationHook()
    for done in range(1, 6):
        one.report_progress("needle", done, 5)
    assert lines == ["evaluation: needle, 3 of 5", "evaluation: needle, 5 of 5"]


def evaluate(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str]:
    code = script.main([str(arg) for arg in args])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "Nothing to evaluate"),
        (["--model", "MODEL"], "Nothing to ask"),
        (["--model", "MODEL", "--evaluation.needle_lengths", "128", "--processes", "0"], "--processes = 0"),
        (["--model", "/", "--evaluation.needle_lengths", "128"], "has neither config.json nor manifest.json"),
        (["--model", "MODEL", "--evaluation.needle_lengths", "0"], "needle_lengths[0] = 0 must be at least 1"),
        (
            ["--model", "MODEL", "--evaluation.needle_lengths", "128", "--evaluation.needle_depths", "1.5"],
            "needle_depths[0] = 1.5 must be at least 0 and at most 1",
        ),
        (["--model", "MODEL", "--evaluation.texts", "x", "--evaluation.max_documents", "0"], "must be at least 1"),
        (
            ["--model", "MODEL", "--evaluation.texts", "x", "--evaluation.length", "64", "--evaluation.windows", "64"],
            "windows[0] = 64 must be below evaluation.length = 64",
        ),
        (
            ["--model", "MODEL", "--evaluation.needle_lengths", "128", "--evaluation.windows", "64"],
            "windows is set without texts",
        ),
        (
            ["--model", "MODEL", "--evaluation.texts", "nowhere.txt", "--evaluation.length", "99"],
            "nowhere.txt, which does not exist",
        ),
        (["--model", "MODEL", "--evaluation.needle_lengths", "20"], "the length is 20"),
        (["--model", "MODEL", "--evaluation.needle_lengths", "128", "--out", "x.txt"], "should end with .json"),
        (["--model", "MODEL", "--evaluation.tasks", "vt"], "without task_lengths"),
        (["--model", "MODEL", "--evaluation.needle_lengths", "128", "--rope.factor", "4"], "rope.factor = 4.0 is read"),
        (["--model", "MODEL", "--evaluation.needle_lengths", "128", "--rope.type", "yarn"], "needs rope.factor"),
        (["--model", "MODEL", "--evaluation.needle_lengths", "128", "--out", "/proc/x/a.json"], "cannot be written"),
        (
            ["--model", "MODEL", "--evaluation.tasks", "vt", "--evaluation.task_lengths", "0"],
            "task_lengths[0] = 0 must",
        ),
        (["--model", "MODEL", "--evaluation.tasks", "vt", "--evaluation.task_lengths", "99"], "the length is 99"),
        (
            ["--model", "MODEL", "--evaluation.needle_lengths", "128", "--evaluation.task_lengths", "99"],
            "task_lengths is set without tasks",
        ),
        (
            ["--model", "MODEL", "--evaluation.tasks", "vt", "qa_2", "--evaluation.task_lengths", "4096"],
            "names qa_2, which needs HotpotQA's",
        ),
        (
            ["--model", "MODEL", "--evaluation.tasks", "vt", "--evaluation.task_lengths", "999"]
            + ["--evaluation.task_items", "0"],
            "task_items = 0 must be at least 1",
        ),
        (
            ["--model", "MODEL", "--evaluation.needle_lengths", "128", "--parallelism.context_parallel_degree", "3"],
            "context_parallel_degree 3",
        ),
    ],
)
def test_mistakes_are_named(args: list[str], says: str, model: Path, capsys: pytest.CaptureFixture[str]):
    code, error = evaluate(capsys, *(str(model) if arg == "MODEL" else arg for arg in args))
    assert code == 1 and says in error and error.count("\n") == 1


def test_rope_of_the_command_line_counts_and_that_of_a_file_does_not(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Weights keep their own RoPE unless the command line says otherwise, with a TOML and without."""
    config = tmp_path / "questions.toml"
    config.write_text('[evaluation]\ntexts = ["text.jsonl"]\nlength = 1024\n[rope]\ntheta = 77.0\n')
    rope = ["--rope.theta", "auto"]  # the model was trained for 256
    found = {}
    for name, start, extra in (
        ("own", ["--evaluation.length=1024"], []),
        ("auto", ["--evaluation.length=1024"], rope),
        ("own, file", ["--job.config_file", str(config)], []),
        ("auto, file", ["--job.config_file", str(config)], rope),
    ):
        options = SimpleNamespace(model=model, step=None, tokenizer=None, processes=1, out=None)
        texts = ["--evaluation.texts", "text.jsonl"]
        configured, folder = resolve_request(options, [*start, *texts, *extra])  # type: ignore[arg-type]
        weights = inspect_model(folder, configured, longest_asked(configured))
        found[name] = weights.args.rope.theta
        assert weights.args.rope.max_position_embeddings == 256, "rescaled is not trained"
        assert weights.rescaled == bool(extra) and ("rescaled" in weights.label) == bool(extra)
        assert ("keeps its own RoPE" in capsys.readouterr().err) == (name == "own, file")
    assert found["own"] == found["own, file"] == TINY["rope_theta"]
    assert found["auto"] == found["auto, file"] > 4 * TINY["rope_theta"]
    options = SimpleNamespace(model=model, step=None, tokenizer=None, processes=1, out=None)
    asked = ["--evaluation.length=300", "--evaluation.needle_lengths", "500", "1024", *rope]
    configured, folder = resolve_request(options, asked)  # type: ignore[arg-type]
    assert inspect_model(folder, configured, longest_asked(configured)).args.rope.theta == found["auto"]


def test_a_hugging_face_model_ends_its_answers_as_its_own_folder_says(tmp_path: Path):
    """Whatever folder the tokenizer is taken from; of a checkpoint the manifest counts."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    found = ModelOnDisk(tmp_path, TransformerArgs(16, 1, 2, 1, 8, 16, 32), TOKENIZER, None)
    assert found.ends_of_turn == [1, 7]
    assert replace(found, manifest={}).ends_of_turn == [] and replace(
        found, manifest={"ends_of_turn": [9]}
    ).ends_of_turn == [9]


def test_a_checkpoint_is_asked_with_bos_as_it_was_trained(tmp_path: Path):
    def trained(bos: bool) -> None:
        about = {"format": 1, "config": {"data": {"add_bos": bos}}}
        (tmp_path / "manifest.json").write_text(json.dumps(about))

    (tmp_path / "stage.toml").write_text("")
    for args, bos in (
        ([], False),
        (["--data.add_bos", "true"], True),
        (["--data.no_add_bos"], False),
        (["--job.config_file", str(tmp_path / "stage.toml")], True),  # whose default it is
    ):
        options = SimpleNamespace(model=tmp_path, step=None, tokenizer=None, processes=1, out=None)
        for was in (False, True):
            trained(was)
            assert resolve_request(options, args)[0].data.add_bos == (bos if args else was)  # type: ignore[arg-type]
    # what the documents had counts, and a converted checkpoint was not trained here
    content = {"format": 1, "config": {"data": {"add_bos": True}}, "begins_with_bos": False}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert not begins_with_bos(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    assert not begins_with_bos(tmp_path, ASSETS) and not TOKENIZER.adds_bos


def test_a_hugging_face_folder_is_asked_with_bos_as_its_tokenizer_does(tmp_path: Path):
    """Unless the command line says otherwise. The tokenizer's file says it, or its configuration."""
    shutil.copytree(ASSETS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    file, about = tmp_path / "tokenizer.json", json.loads((tmp_path / "tokenizer_config.json").read_text())
    plain = json.loads(file.read_text())
    bos = about["bos_token"]["content"] if isinstance(about["bos_token"], dict) else about["bos_token"]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {bos: {"id": bos, "ids": [TOKENIZER.bos_id], "tokens": [bos]}}
    adding = {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, *text],
        "special_tokens": special,
    }
    for processor, said, expected in (
        (None, None, False),
        (adding, None, True),
        (adding, False, False),  # what transformers does for Llama's class
        (None, True, True),
    ):
        file.write_text(json.dumps(plain | {"post_processor": processor}))
        more = {} if said is None else {"add_bos_token": said}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | more))
        options = SimpleNamespace(model=tmp_path, step=None, tokenizer=None, processes=1, out=None)
        assert resolve_request(options, [])[0].data.add_bos == expected  # type: ignore[arg-type]
        for asked in (True, False):
            args = ["--data.add_bos", str(asked).lower()]
            assert resolve_request(options, args)[0].data.add_bos == asked  # type: ignore[arg-type]


def test_losses_by_position_are_those_of_each_document_under_its_own_rope():
    """Against all logits of each document, in ranges that cut documents."""
    for scaling in (None, DynamicNTKScaling(4.0, 32), GeneScaling(2.0, 32)):
        rope = RopeArgs(100.0, scaling, max_position_embeddings=32)
        model = Transformer(TransformerArgs(32, 2, 4, 2, 8, 64, TOKENIZER.vocab_size, rope=rope)).eval()
        init_weights(model, seed=3)
        documents, edges = [TEXT[:101], TEXT[200:320], TEXT[50:201]], (0, 7, 8, 64, 100)
        losses = [losses_of_all_logits(model, tokens, rope_for(rope, len(tokens) - 1)) for tokens in documents]
        by_range = [torch.cat([x[a:b] for x in losses]) for a, b in pairwise(edges)]
        found = position_losses(model, Ranks(), documents, edges)
        assert found["count"] == [len(x) for x in by_range] == [21, 3, 168, 108]
        assert found["nll"] == pytest.approx([float(x.mean()) for x in by_range], rel=1e-5)


def test_windows_are_as_long_as_asked():
    model = Transformer(TransformerArgs(32, 2, 4, 2, 8, 64, TOKENIZER.vocab_size)).eval()
    init_weights(model, seed=3)
    found = asking.evaluate(model, Ranks(), TOKENIZER, asking.Prepared({"text": [TEXT[:91]]}, 90), windows=(16, 40))
    for window, gain in zip((16, 40), found["perplexity"]["text"]["gains_of_context"], strict=True):
        losses = torch.zeros(90)
        for begin in range(0, 90 - window // 2, window // 2):  # each piece alone; the second half of it counts
            piece = losses_of_all_logits(model, TEXT[begin : min(begin + window, 90) + 1])
            kept = 0 if begin == 0 else window - window // 2
            losses[begin + kept : begin + len(piece)] = piece[kept:]
        assert gain["nll_cut"] == [pytest.approx(float(losses.mean()), rel=1e-5)] and gain["window"] == window


def test_nothing_begins_or_ends_in_a_haystack(tmp_path: Path):
    """A haystack is made of several documents, which have BOS only when they are read for their loss."""
    lines = [json.dumps({"text": TOKENIZER.decode(TEXT[i : i + 160].tolist())}) for i in range(0, 640, 160)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    e = Evaluation(texts=("text.jsonl",), length=100, needle_lengths=(300,), needle_depths=(0.5,), tasks=("niah_mk_2",))
    e = replace(e, task_lengths=(600,), task_items=1)
    config = JobConfig(evaluation=e, data=Data(folder=str(tmp_path), add_bos=True))
    prepared = asking.prepare(config, TOKENIZER, TransformerArgs(16, 1, 2, 1, 8, 16, TOKENIZER.vocab_size))
    assert all(document[0] == TOKENIZER.bos_id for document in prepared.texts["text"])
    special = torch.tensor([*TOKENIZER.special.values()])
    for item in [item for items in prepared.questions.values() for item in items]:
        assert item.prompt[0] == TOKENIZER.bos_id and not torch.isin(item.prompt[1:], special).any()


def test_pictures_of_an_earlier_result_are_not_left_beside_a_new_one(tmp_path: Path):
    names = {f"x_{what}.png" for what in ("positions", "tasks", "needle", "json_kv")}
    others = {"x_y_tasks.png", "x.png", "y_tasks.png"}
    for name in names | others:
        (tmp_path / name).write_bytes(b"")
    grid = {"lengths": [8], "depths": None, "count": [[1]]} | dict.fromkeys(("score", "exact", "logprob"), [[0.5]])
    results.write_result({"label": "x", "perplexity": {}, "tasks": {"vt": grid}}, tmp_path / "x.json")
    assert {file.name for file in tmp_path.iterdir()} == {"x.json", "x_tasks.png"} | others
    assert (tmp_path / "x_tasks.png").stat().st_size


def test_a_stage_own_results_are_of_its_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stage_file, checkpoint = tmp_path / "stage.toml", tmp_path / "out/checkpoint/step-3"
    stage_file.write_text(f'[job]\ndump_folder = "{tmp_path / "out"}"\n[rope]\ntheta = 77.0\n')
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    monkeypatch.setattr("torchtitan.extensions.evaluation.command_line.complete_steps", lambda folder: [3])

    def asked(*args: str, out: Path | None = None) -> Any:
        options = SimpleNamespace(model=None, step=None, tokenizer=None, processes=1, out=out)
        config, folder = resolve_request(options, ["--job.config_file", str(stage_file), *args])  # type: ignore[arg-type]
        assert folder == checkpoint
        return options, config

    options, config = asked()
    assert options.of_stage and options.out == tmp_path / "out/evaluation/step-3.json"
    assert config.rope == Rope(), "its checkpoint has the RoPE of the TOML"
    options, config = asked("--rope.type", "linear", "--rope.factor", "2")
    assert config.rope == Rope(theta=77.0, type="linear", factor=2.0)
    weights = ModelOnDisk(checkpoint, TransformerArgs(16, 1, 2, 1, 8, 16, 32), TOKENIZER, None)
    check_own_results(options, weights)  # the override that it was trained with
    with pytest.raises(UserError, match="--rope.KEY asks another model than the stage's"):
        check_own_results(options, replace(weights, rescaled=True))
    options, _ = asked("--rope.theta", "5", out=tmp_path / "x.json")
    assert not options.of_stage
    check_own_results(options, replace(weights, rescaled=True))


def test_two_processes_give_the_table_of_one(model: Path, tmp_path: Path):
    """A Hugging Face folder from the command line, at lengths that its RoPE does not cover: with a warning."""
    found = {}
    for name, extra in (("one", []), ("two", ["--processes", "2", "--parallelism.context_parallel_degree", "2"])):
        out = tmp_path / f"{name}.json"
        done = run_script(
            "evaluate",
            *("--model", model, "--out", out, "--training.mixed_precision_param", "float32", *extra),
            *("--evaluation.texts", model.parent / "text.jsonl", "--evaluation.length", "300"),
            *("--evaluation.needle_lengths", "150", "300", "--evaluation.generate", "--evaluation.windows", "50"),
            *("--evaluation.tasks", "niah_single_1", "fwe", "json_kv", "--evaluation.task_lengths", "600"),
            *("--evaluation.task_items", "3"),
        )
        assert done.returncode == 0, done.stderr
        assert "needle, found in what was written, of 20" in done.stdout and "were cut" in done.stdout
        assert "tasks, answer is the likeliest, of 6" in done.stdout and "mean over 2 of 13" in done.stdout
        assert "evaluation at 600 tokens" in done.stderr  # RoPE reaches 256
        found[name] = json.loads(out.read_text())
        for picture in ("needle", "positions", "tasks", "json_kv"):
            assert (tmp_path / f"{name}_{picture}.png").exists()
    one, two = found["one"], found["two"]
    assert one["tasks"]["needle"]["exact"] == two["tasks"]["needle"]["exact"]
    np.testing.assert_allclose(one["tasks"]["needle"]["logprob"], two["tasks"]["needle"]["logprob"], rtol=1e-5)
    for task in ("niah_single_1", "fwe", "json_kv"):
        np.testing.assert_allclose(one["tasks"][task]["logprob"], two["tasks"][task]["logprob"], rtol=1e-5)
        assert one["tasks"][task]["score"] == two["tasks"][task]["score"]
    assert one["groups"] == two["groups"] and one["groups"]["ruler"]["lengths"] == [600]
    np.testing.assert_allclose(one["perplexity"]["text"]["nll"], two["perplexity"]["text"]["nll"], rtol=1e-5)
    assert two["world_size"] == 2 and one["label"] == "model"
