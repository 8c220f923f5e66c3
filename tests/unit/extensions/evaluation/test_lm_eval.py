"""lm-evaluation-harness on our model against the harness' own `hf` model on the same Hugging Face folder, in fp32."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.distributed.harness import ASSETS, spawn
from tests.scripts import load_script, run_script
from tests.unit.extensions.convert.models import LLAMA, ORIGINAL, SCALINGS, export, save, with_rope
from torchtitan.datasets.corpus import ASSISTANT
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.lm_eval_model import TorchtitanLM, Writing
from torchtitan.extensions.evaluation.loading import load
from torchtitan.extensions.ingest.chat import ChatEncoder
from torchtitan.extensions.ingest.chat_template import load_chat_template
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

LENGTH = 64
"""Trained length of the model in conftest.py, and all that it may read here."""

TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "tiny_write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question or 'The bird'}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["e", "."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_write_on": {
        "output_type": "generate_until",
        "doc_to_text": "{{question or 'The bird'}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": [], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    },
}
SENTENCE = "the old house by the river was green, and a bird with 7 stones sat on it. Nobody saw"
WORDS = SENTENCE.split()
DOCUMENTS = [
    {
        "question": "" if n == 3 else " ".join(WORDS[n % 5 : n % 5 + 3 + n]),  # one without a context
        "choices": [" a", " bird of stone", " the river is old, said the bird", "."],  # some of one token
        "answer": n % 4,
        "text": " ".join(WORDS * (n + 1)),  # of one window, and of several
    }
    for n in range(7)
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files: they are YAML, which JSON is too."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | common | task))
    fetched = {"task": "tiny_fetched", "dataset_path": "nobody/has_this", "output_type": "multiple_choice"}
    (folder / "fetched.yaml").write_text(json.dumps(fetched | {"test_split": "test"}))
    return folder


def hf_model(folder: Path, **options: Any) -> Any:
    """The harness' own model class."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("accelerate") is None:
            # imported there, but not used for a model that is passed in
            stand_in, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
            for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
                setattr(stand_in, name, None)
            utils.get_max_memory = None  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "accelerate", stand_in)
            patch.setitem(sys.modules, "accelerate.utils", utils)
        from lm_eval.models.huggingface import HFLM
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, logits_cache=False, **options)


def our_model(model: Transformer, folder: Path, **options: Any) -> Any:
    return TorchtitanLM(model, Ranks(), load_tokenizer(folder), **({"max_length": LENGTH, "silent": True} | options))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, 0, ("t", n, 1)) for n, given in enumerate(arguments)]  # type: ignore[arg-type]


def script_in_rank(args: list[str], rank: int, world_size: int) -> int:
    """scripts/lm_eval.py, as a launcher starts it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return load_script("lm_eval").main(args)


def answers(result: dict[str, Any]) -> dict[str, list[Any]]:
    """By task: the answers to each request of each document."""
    found = {}
    for name, samples in result["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        found[name] = json.loads(json.dumps([sample["filtered_resps"] for sample in samples]))
    return found


def alike(a: Any, b: Any, rel: float = 1e-6) -> None:
    """rel: besides 1e-4, for sums of some hundred float32 numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            alike(a[key], b[key], rel)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            alike(x, y, rel)
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-4, rel=rel)
    else:
        assert a == b


def test_tasks_have_the_numbers_of_the_harness_own_model_in_any_layout(folder: Path, tasks: Path, tmp_path: Path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(hf_model(folder, max_length=LENGTH), tasks=list(TASKS), task_manager=manager)
    args = ["--model", folder, "--include_path", tasks, "--log_samples", "--training.mixed_precision_param", "float32"]
    args += ["--data.add_bos", "false", "--tasks"]
    names = ",".join(TASKS)
    cp, tp = ([f"--parallelism.{kind}_parallel_degree", "2"] for kind in ("context", "tensor"))
    cases = [
        [*args, names, "--out", tmp_path / "cp2 dp2.json", *cp],
        # fewer documents than data-parallel ranks
        [*args, "tiny_choice,tiny_write", "--out", tmp_path / "tp2 dp2.json", *tp, "--limit", 1],
    ]
    spawn(4, script_in_rank, [list(map(str, case)) for case in cases], tmp_path)
    # by its path: beside it is evaluate.py, the name of a package that the harness imports
    done = run_script("lm_eval", *args, names, "--out", tmp_path / "one.json")
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout and "0 requests cut" in done.stdout

    wanted = answers(expected)
    assert len(set(map(str, wanted["tiny_write"]))) > 1 and any(written != [""] for written in wanted["tiny_write"])
    for name in ("one", "cp2 dp2"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        alike(answers(found), wanted)
        for task in TASKS:
            alike(found["results"][task], expected["results"][task], rel=1e-5)
        assert found["world_size"] == (1 if name == "one" else 4) and found["max_length"] == LENGTH
    few = answers(json.loads((tmp_path / "tp2 dp2.json").read_text()))
    alike(few, {task: wanted[task][:1] for task in ("tiny_choice", "tiny_write")})


def test_requests_at_the_limit_and_beyond(model: Transformer, folder: Path):
    """The limit is the harness' limit: the last token of a scored request is not read."""
    hf, ours = hf_model(folder, max_length=LENGTH), our_model(model, folder)
    cutting = our_model(model, folder, truncate=True)
    ids = ours.tok_encode(" ".join(WORDS * 9))
    assert ids == hf.tok_encode(" ".join(WORDS * 9))

    def pair(read: int, scored: int) -> Any:
        return (("", ""), ids[:read], ids[read : read + scored])

    fit = [pair(LENGTH, 1), pair(LENGTH - 9, 10), pair(1, LENGTH), pair(1, 1)]
    for lm in (ours, cutting):
        alike(lm._loglikelihood_tokens(fit), hf._loglikelihood_tokens(fit, disable_tqdm=True))
    long = [pair(LENGTH + 1, 1), pair(LENGTH, 20), pair(7, LENGTH), *fit]
    assert cutting.truncated == 0
    alike(cutting._loglikelihood_tokens(long), hf._loglikelihood_tokens(long, disable_tqdm=True))
    assert cutting.truncated == 3
    with pytest.raises(UserError, match="has 65 tokens to read and 1 to score: 1 more than max_length = 64"):
        ours._loglikelihood_tokens([pair(LENGTH + 1, 1)])
    with pytest.raises(UserError, match="max_length = 64 leaves no room"):
        cutting._loglikelihood_tokens([pair(1, LENGTH + 1)])
    with pytest.raises(UserError, match="continuation without a token"):
        ours._loglikelihood_tokens([pair(3, 0)])

    def write(count: int, words: int) -> list[Any]:
        return requests("generate_until", (" ".join(WORDS * words), {"until": [], "max_gen_toks": count}))

    room = LENGTH - len(ours.tok_encode(" ".join(WORDS)))
    for count, words in ((room, 1), (20, 9)):
        assert cutting.generate_until(write(count, words)) == hf.generate_until(write(count, words), disable_tqdm=True)
    assert cutting.truncated == 4
    assert len(ours.generate_until(write(room, 1))) == 1
    with pytest.raises(UserError, match=f"and {room + 1} to write: 1 more than max_length"):
        ours.generate_until(write(room + 1, 1))
    with pytest.raises(UserError, match="has 64 tokens to write, but max_length = 64 leaves no room"):
        cutting.generate_until(write(LENGTH, 1))


@pytest.mark.parametrize("kind", ["yarn", "longrope", "gene", "dynamic"])
def test_an_exported_checkpoint_with_rescaled_rope_answers_as_in_the_harness(kind: str, tmp_path: Path):
    """Below the original length, at it and beyond it: RoPE can depend on how much is read."""
    tokenizer = load_tokenizer(ASSETS)
    args = with_rope(SCALINGS[kind], replace(LLAMA, vocab_size=tokenizer.vocab_size))
    checkpoint = save(args, tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "exported", None, ASSETS)
    hf = hf_model(tmp_path / "exported", max_length=4 * ORIGINAL)
    ours = our_model(load(checkpoint, "float32", tokenizer_folder=ASSETS).model, ASSETS, max_length=4 * ORIGINAL)
    draw = random.Random(0)
    pairs = []
    for read in (5, *range(ORIGINAL - 2, ORIGINAL + 3), 3 * ORIGINAL):
        ids = [draw.randrange(2, tokenizer.vocab_size) for _ in range(read + 6)]
        pairs += [(("", str(len(pairs) + k)), ids[:read], ids[read : read + k]) for k in (1, 2, 6)]
    alike(ours._loglikelihood_tokens(pairs), hf._loglikelihood_tokens(pairs, disable_tqdm=True))
    whole = [(" ".join(WORDS * n),) for n in (1, 9)]
    asked = requests("loglikelihood_rolling", *whole)
    alike(ours.loglikelihood_rolling(asked), hf.loglikelihood_rolling(asked, disable_tqdm=True))


def test_a_tokenizer_with_bos_of_its_own_and_a_chat_template(model: Transformer, folder: Path, tmp_path: Path):
    """Like Llama 3's: the harness begins every text with BOS, unless the text has it already."""
    home = tmp_path / "with bos"
    shutil.copytree(folder, home)
    tokenizer = json.loads((home / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, text],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [0], "tokens": ["<|begin_of_text|>"]}
        },
    }
    (home / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (home / "chat_template.jinja").write_text(template)
    hf, ours = hf_model(home, max_length=LENGTH), our_model(model, home, add_bos=True)
    for said in ("The river", "<|begin_of_text|>The river<|end_of_text|>", ""):
        for special in (None, False, True):
            if not (special and said.startswith("<")):
                assert ours.tok_encode(said, special) == hf.tok_encode(said, special)
    asked = [
        ("The river", " is near"),
        ("", " bird"),
        ("<|begin_of_text|>a stone ", "stone"),
        ("", "<|begin_of_text|>a"),
    ]
    given = requests("loglikelihood", *asked)
    alike(ours.loglikelihood(given), hf.loglikelihood(given, disable_tqdm=True))
    talk = [{"role": "user", "content": " Where is the bird? "}, {"role": "assistant", "content": "It is "}]
    for generating in (True, False):
        made = hf.apply_chat_template(talk[: 2 - generating], add_generation_prompt=generating)
        assert ours.apply_chat_template(talk[: 2 - generating], add_generation_prompt=generating) == made
    assert ours.chat_template(True) and ours.chat_template() is None
    given = requests("generate_until", (made, {"until": ["<|end_of_text|>"], "max_gen_toks": 10}))
    assert ours.generate_until(given) == hf.generate_until(given, disable_tqdm=True)
    (home / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(UserError, match="no such role"):
        our_model(model, home).apply_chat_template(talk)
    with pytest.raises(UserError, match="need the model's chat template"):
        our_model(model, folder).apply_chat_template(talk)


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}"])
def test_a_template_decides_about_bos_as_in_training(model: Transformer, folder: Path, tmp_path: Path, begin: str):
    """Whatever data.add_bos says of plain text: never two, and none that training did not have."""
    home = tmp_path / "home"
    shutil.copytree(folder, home)
    (home / "chat_template.jinja").write_text(
        begin + "{% for m in messages %}{{ m.role + '>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
    )
    tokenizer = load_tokenizer(home)
    talk = [{"role": "user", "content": "Where is the bird?"}, {"role": "assistant", "content": "It is here."}]
    encoder = ChatEncoder(tokenizer, load_chat_template(tokenizer), "messages")
    ids, roles = encoder.encode(encoder.read({"messages": talk}))
    assert (ids == tokenizer.bos_id).sum() == (begin != "")
    before = ids[: int((roles == ASSISTANT).argmax())].tolist()
    hf = hf_model(home, max_length=LENGTH, add_bos_token=False)
    for add_bos in (True, False):
        ours = our_model(model, home, add_bos=add_bos)
        assert ours.tok_encode("The river")[:1] == (
            [tokenizer.bos_id] if add_bos else tokenizer.encode("The river")[:1]
        )
        asked = ours.apply_chat_template(talk[:1])
        assert ours.tok_encode(asked) == before == hf.tok_encode(asked)
        context, target = ours._encode_pair(asked, "It is here.")
        assert (context, target) == (before, ids[len(before) : -1].tolist()), "what is scored is what was trained"


def test_what_is_drawn_is_a_function_of_the_request(model: Transformer, folder: Path):
    ours = our_model(model, folder)
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 8, "until": "e"}
    both = ours.generate_until(requests("generate_until", ("a bird", settings), ("a bird", settings), ("x", settings)))
    assert both[0] != both[1]
    assert both[:2] == ours.generate_until(requests("generate_until", ("a bird", settings), ("a bird", settings)))
    assert all("e" not in text for text in both)


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({}, Writing((), 256, 0.0, 1.0)),
        ({"until": "\n", "max_new_tokens": 3}, Writing(("\n",), 3, 0.0, 1.0)),
        ({"until": ["a", ""], "do_sample": False, "temperature": 0.7, "top_k": 5}, Writing(("a",), 256, 0.0, 1.0)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": 1}, Writing((), 256, 0.7, 0.9)),
        ({"do_sample": True}, Writing((), 256, 1.0, 1.0)),  # transformers' default
    ],
)
def test_generation_kwargs(asked: dict[str, Any], expected: Writing):
    assert Writing.of(asked, 256) == expected


def test_generation_kwargs_that_are_not_known_are_named():
    with pytest.raises(UserError, match="num_beams = 4"):
        Writing.of({"num_beams": 4}, 256)
    for wrong in ({"top_p": 0}, {"top_p": 1.5}, {"temperature": -1}):
        with pytest.raises(UserError, match="top_p"):
            Writing.of({"do_sample": True} | wrong, 256)
    with pytest.raises(UserError, match="max_gen_toks = 0"):
        Writing.of({"max_gen_toks": 0}, 256)
    with pytest.raises(UserError, match="top_k = 5"):
        Writing.of({"do_sample": True, "temperature": 0.7, "top_k": 5}, 256)


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "name tasks of lm-evaluation-harness with --tasks"),
        (["--tasks", "x", "--include_path", "nowhere"], "--include_path nowhere is not a folder"),
        (["--tasks", "x", "--limit", "1.5"], "--limit = 1.5 must be a number"),
        (["--tasks", "x", "--max_length", "0"], "--max_length = 0 must be at least 1"),
        (
            ["--tasks", "tiny_chioce", "--include_path", "TASKS"],
            "no task, group or tag of this name; near it: tiny_choice",
        ),
        (
            ["--tasks", "tiny_fetched", "--include_path", "TASKS"],
            "--tasks tiny_fetched could not be loaded (Connection",
        ),
        (["--tasks", "tiny_text", "--include_path", "TASKS", "--max_length", "0"], "--max_length = 0"),
        (
            [
                "--tasks",
                "tiny_choice",
                "--include_path",
                "TASKS",
                "--max_length",
                "9",
                "--training.mixed_precision_param",
            ]
            + ["float32"],
            "more than max_length = 9 has room for",
        ),
    ],
)
def test_mistakes_are_named(
    args: list[str],
    says: str,
    folder: Path,
    tasks: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))  # else it reads 14,000 files
    code = load_script("lm_eval").main(["--model", str(folder), *(str(tasks) if a == "TASKS" else a for a in args)])
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert code == 1 and len(errors) == 1 and says in errors[0]


def test_the_harness_may_be_missing(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert load_script("lm_eval").main(["--model", str(folder), "--tasks", "x"]) == 1
    assert capsys.readouterr().err == 'error: lm-evaluation-harness is not installed: pip install -e ".[eval]"\n'
