"""A chain goes on in its data: what trained stages read, counted token by token, over kills, a folder that is deleted
and a mixture that changes in the middle of a stage."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import flags, spawn, write_assets, write_text
from torchtitan.components.data_start import READ, READ_BEFORE, describe
from torchtitan.components.manifest import complete_steps, read_manifest
from torchtitan.config import load_config
from torchtitan.datasets.plan import Plan
from torchtitan.extensions.cluster.rope_report import data_line
from torchtitan.extensions.cluster.stages import chain
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.planner.planned_start import planned_start
from torchtitan.extensions.wiring import build_trainer, check, inputs_of
from torchtitan.tools.errors import UserError

Parts = list[tuple[str, int, int, int]]
"""(corpus, document, start, stop) of what was trained on."""


def write_stages(folder: Path) -> None:
    """one: two sources. two: other weights, rows twice as long, a third source. three: concat, one source less. Without
    overrides they write to folders in which nothing is trained."""
    write_assets(folder)
    write_text(folder, 50)
    source = random.Random(1)
    for name in ("other", "late"):
        documents = [" ".join(source.choices(("red", "hill", "lake"), k=source.randint(1, 150))) for _ in range(150)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    flags(folder, folder / "assets-llama")  # writes stage.toml, whose source is `text`
    stage = (folder / "stage.toml").read_text()
    stage = stage.replace("[model]", f'[model]\nhf_assets_path = "{folder}/assets-llama"')
    stage, text = stage[: stage.index("[[data.sources]]")], stage[stage.index("[[data.sources]]") :]
    other, late = (text.replace("text", name) for name in ("other", "late"))
    job = f'[job]\ndump_folder = "{folder}/untrained'
    (folder / "one.toml").write_text(f'{stage}{text}{other}{job}-one"\n')
    (folder / "two.toml").write_text(
        f"""extends = "one.toml"
{job}-two"
[stage]
after = "one.toml"
[training]
seq_len = 256
steps = 6
seed = 3
[rope]
theta = "auto"
{late}weight = 0.2
{text}weight = 0.5
{other}weight = 0.3
"""
    )
    (folder / "three.toml").write_text(
        f"""extends = "two.toml"
{job}-three"
[stage]
after = "two.toml"
[training]
seq_len = 128
steps = 20
[data]
packing = "concat"
{text}weight = 0.9
{other}weight = 0.1
"""
    )


def run(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Train, until the process would be killed after step `die`; the parts of every step, and the log. move: a folder
    that is renamed, or copied, before."""
    if "move" in case:
        (shutil.copytree if case.get("copy") else shutil.move)(*case["move"])
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torchtitan").addHandler(handler)
    logging.getLogger("torchtitan").setLevel(logging.INFO)
    trainer = build_trainer(load_config(case["args"]), rank, rank, world_size)
    steps: dict[int, Parts] = {}
    step = trainer.train_step

    def recorded() -> Any:
        if trainer.step == case.get("die"):
            raise KeyboardInterrupt
        steps[trainer.step] = parts_of(trainer.inputs.plan, trainer.step)
        return step()

    trainer.train_step = recorded  # type: ignore[method-assign]
    try:
        trainer.train()
    except KeyboardInterrupt:
        pass
    finally:
        trainer.close()
        logging.getLogger("torchtitan").removeHandler(handler)
    return {"steps": steps, "lines": lines}


def parts_of(plan: Plan, step: int) -> Parts:
    """Without the separator and padding."""
    parts = []
    for slot in range(plan.rows_per_step):
        row = plan.row(step, slot)
        for source, document, start, length in zip(row.sources, row.documents, row.starts, row.lengths):
            corpus = plan.corpora[source]
            parts.append((corpus.fingerprint, int(document), int(start), int(start + length)))
    return parts


class Ledger:
    """How often each token of each document was read: the plainest count."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int, int]] = Counter()

    def add(self, parts: Parts) -> dict[str, tuple[int, int, int]]:
        """Corpus -> (tokens of these parts, those that the ledger had, those of documents of which it had any)."""
        had = set(self.counts)
        documents = {(corpus, document) for corpus, document, _ in had}
        result: dict[str, list[int]] = {}
        for corpus, document, start, stop in parts:
            numbers = result.setdefault(corpus, [0, 0, 0])
            numbers[0] += stop - start
            numbers[2] += (stop - start) * ((corpus, document) in documents)
            for place in range(start, stop):
                numbers[1] += (corpus, document, place) in had
                self.counts[corpus, document, place] += 1
        return {corpus: tuple(numbers) for corpus, numbers in result.items()}  # type: ignore[misc]

    def times(self, corpus: str, tokens: int) -> tuple[int, int]:
        """How often the token of a corpus was read that was read least, and most."""
        counts = [count for (of, *_), count in self.counts.items() if of == corpus]
        return min(counts) if len(counts) == tokens else 0, max(counts, default=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_stages(folder)
    return folder


def stage(folder: Path, file: str, out: str, after: str | None = None, **overrides: Any) -> list[str]:
    args = flags(folder, folder / "assets-llama", job__dump_folder=folder / out, **overrides)
    args[1] = str(folder / f"{file}.toml")
    args += ["--checkpoint.enable", "true", "--checkpoint.interval", "2"]
    return args + (["--stage.after_dump_folder", str(folder / after)] if after else [])


def without_state(checkpoint: Path) -> None:
    """What an older version wrote."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in (READ, READ_BEFORE):
        (checkpoint / name).unlink()
        del manifest["files"][name]
    del manifest["data_changes"], manifest["config"]["data"]["changed_at_step"]
    del manifest["config"]["stage"]["continue_data"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


CHANGE = {"data__sources__0__weight": 0.1, "data__sources__1__weight": 0.9, "data__packing": "concat"}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    mid = {"training__steps": 10, "data__changed_at_step": 4, **CHANGE}
    cases: dict[str, dict[str, Any]] = {
        "one": {"args": stage(folder, "one", "one")},
        "two killed": {"args": stage(folder, "two", "two", "one"), "die": 1},  # before its first checkpoint
        "two": {"args": stage(folder, "two", "two", "one"), "die": 3},
        "two resumed": {"args": stage(folder, "two", "two", "one"), "move": (folder / "one", folder / "one-kept")},
        "three": {"args": stage(folder, "three", "three", "two")},
        "anew": {"args": [*stage(folder, "two", "anew", "one-kept"), "--stage.no_continue_data"]},
        "after anew": {"args": stage(folder, "three", "after-anew", "anew", training__steps=2)},
        "elsewhere": {
            "args": stage(folder, "one", "else", checkpoint__initial_load_path=folder / "one-kept" / "checkpoint")
        },
        "mid": {"args": stage(folder, "one", "mid")},
        "mid changed": {
            "args": stage(folder, "one", "mid", **mid),
            "die": 7,
            "move": (folder / "mid", folder / "mid-before"),
            "copy": True,
        },
        "mid resumed": {"args": stage(folder, "one", "mid", **mid)},
    }
    return dict(zip(cases, spawn(1, run, list(cases.values()), folder), strict=True))


def together(*results: dict[str, Any]) -> Parts:
    """What counts of runs of one stage, of which a later one took back steps of an earlier one."""
    steps: dict[int, Parts] = {}
    for result in results:
        steps |= result["steps"]
    return [part for step in sorted(steps) for part in steps[step]]


def test_three_stages_read_each_token_once_before_any_twice(folder: Path, runs: dict[str, dict[str, Any]]):
    ledger = Ledger()
    stages = {
        "one-kept": together(runs["one"]),
        "two": together(runs["two"], runs["two resumed"]),
        "three": together(runs["three"]),
    }
    for name, parts in stages.items():
        counted = ledger.add(parts)
        report = json.loads((folder / name / "plan.json").read_text())
        for source in report["sources"]:
            corpus = fingerprint(report, source["name"])
            tokens, again, begun = counted[corpus]
            assert source["tokens_read"] == tokens
            assert source["overlap"] == pytest.approx(again / tokens)
            assert source["overlap_documents"] == pytest.approx(begun / tokens)
            least, most = ledger.times(corpus, source["tokens"])
            assert most - least <= 1, (name, source["name"], least, most)
            read = sum(count for (of, *_), count in ledger.counts.items() if of == corpus)
            assert source["epochs_after"] == pytest.approx(read / source["tokens"])
            if source["epochs_after"] <= 1:
                assert again == 0 == source["overlap"]
        assert report["overlap"] == pytest.approx(
            sum(again for _, again, _ in counted.values()) / sum(tokens for tokens, _, _ in counted.values())
        )
    assert 0.02 < report["overlap"] < 0.5  # the third stage is long enough to exhaust a source
    assert {source["epochs_before"] > 0 for source in report["sources"]} == {True}


def fingerprint(report: dict[str, Any], name: str) -> str:
    return next(source["corpus"] for source in report["inputs"]["sources"] if source["name"] == name)


def test_a_killed_stage_reads_on_as_it_would_have(folder: Path, runs: dict[str, dict[str, Any]]):
    """Killed before its first checkpoint, and after one; then the folder of the previous stage is gone."""
    assert runs["two killed"]["steps"][0] == runs["two"]["steps"][0]
    assert list(runs["two resumed"]["steps"]) == [2, 3, 4, 5]
    assert runs["two resumed"]["steps"][2] == runs["two"]["steps"][2]
    inputs = inputs_of(load_config(stage(folder, "two", "two", "one")), 1)
    assert inputs.plan.fingerprint == json.loads((folder / "two" / "plan.json").read_text())["fingerprint"]


def test_the_start_says_how_much_was_read(folder: Path, runs: dict[str, dict[str, Any]]):
    report = json.loads((folder / "two" / "plan.json").read_text())
    for source in report["sources"]:
        line = f"  data source {source['name']}: "
        if source["name"] == "late":
            line += "its order begins anew: no previous stage has read it"
        else:
            line += f"epochs so far {source['epochs_before']:.2f}; its order goes on"
        assert line in runs["two"]["lines"]
    assert any(f"epochs so far {report['sources'][1]['epochs_before']:.2f}, " in line for line in runs["two"]["lines"])


def test_a_source_that_a_stage_does_not_read_keeps_its_place(folder: Path, runs: dict[str, dict[str, Any]]):
    """`late` is read by the second stage only."""
    late = fingerprint(json.loads((folder / "two" / "plan.json").read_text()), "late")
    states = [inputs_of(load_config(stage(folder, "three", out, "two")), 1).data_start.read for out in ("three", "x")]
    assert all(late in state.corpora for state in states)
    assert states[0].corpora[late].tokens_read == states[1].corpora[late].tokens_read > 0


def test_the_key_turns_it_off(folder: Path, runs: dict[str, dict[str, Any]]):
    assert "  data: stage.continue_data = false: the order of the sources begins anew" in runs["anew"]["lines"]
    ledger = Ledger()
    ledger.add(together(runs["one"]))
    counted = ledger.add(together(runs["anew"]))
    report = json.loads((folder / "anew" / "plan.json").read_text())
    assert report["overlap"] > 0.05
    for source in report["sources"]:
        tokens, again, _ = counted[fingerprint(report, source["name"])]
        assert source["overlap"] == pytest.approx(again / tokens)
    ledger = Ledger()  # and a stage after it goes on where it stopped
    ledger.add(together(runs["anew"]))
    counted = ledger.add(together(runs["after anew"]))
    assert all(again == 0 for _, again, _ in counted.values())


def test_a_chain_turns_it_off_where_there_is_something_to_go_on_with(folder: Path):
    for flag in (["--stage.continue_data", "false"], ["--stage.no_continue_data"]):
        stages = chain(["--job.config_file", str(folder / "two.toml"), *flag])
        assert [stage.config.stage.continue_data for stage in stages] == [True, False]


def test_another_start_of_ours_goes_on_too(folder: Path, runs: dict[str, dict[str, Any]]):
    ledger = Ledger()
    ledger.add(together(runs["one"]))
    assert all(again == 0 for _, again, _ in ledger.add(together(runs["elsewhere"])).values())
    args = [*stage(folder, "one", "x"), "--stage.no_continue_data"]
    with pytest.raises(UserError, match="neither stage.after nor checkpoint.initial_load_path is set: leave it out"):
        check(load_config(args), 1)


def test_a_checkpoint_without_the_state_begins_anew_and_says_so(folder: Path, runs: dict[str, dict[str, Any]]):
    """An older version's is resumed too, and started from."""
    shutil.copytree(folder / "one-kept", folder / "one-old")
    without_state(folder / "one-old" / "checkpoint" / "step-4")
    inputs = inputs_of(load_config(stage(folder, "two", "x", "one-old")), 1)
    (line,) = describe(inputs.data_start, inputs.plan)
    assert line == (
        f"data: {folder}/one-old/checkpoint/step-4 does not say what has been read: the order of the sources begins "
        "anew"
    )
    assert "read_before" not in inputs.plan.inputs
    resumed = inputs_of(load_config(stage(folder, "one", "one-old", training__steps=6)), 1)
    fresh = json.loads((folder / "one-kept" / "plan.json").read_text())
    assert resumed.start is None and resumed.plan.fingerprint == fresh["fingerprint"]


def test_other_content_under_the_same_name_begins_anew(folder: Path, runs: dict[str, dict[str, Any]]):
    shutil.copy(folder / "late.jsonl", folder / "other2.jsonl")
    args = stage(folder, "three", "x", "two", data__sources__1__path=folder / "other2.jsonl")
    inputs = inputs_of(load_config(args), 1)
    state = inputs.data_start.read
    assert [line.partition(":")[0] for line in describe(inputs.data_start, inputs.plan)] == [
        "data source text",
        "data source other",
    ]
    # the content of `late`, under the name of `other`: it is the content that goes on
    assert state.epochs(inputs.plan.corpora[1]) == pytest.approx(
        json.loads((folder / "two" / "plan.json").read_text())["sources"][0]["epochs_after"]
    )
    (folder / "other3.jsonl").write_text('{"text": "a new text"}\n' * 99)
    inputs = inputs_of(load_config([*args, "--data.sources.1.path", str(folder / "other3.jsonl")]), 1)
    assert any(
        "other: its order begins anew: its documents are not" in x for x in describe(inputs.data_start, inputs.plan)
    )


def test_a_mixture_that_changes_in_the_middle_of_a_stage(folder: Path, runs: dict[str, dict[str, Any]]):
    ledger = Ledger()
    ledger.add(together(runs["mid"]))
    assert list(runs["mid changed"]["steps"]) == [4, 5, 6] and list(runs["mid resumed"]["steps"]) == [6, 7, 8, 9]
    assert runs["mid changed"]["steps"][6] == runs["mid resumed"]["steps"][6]
    after = together(runs["mid changed"], runs["mid resumed"])
    counted = ledger.add(after)
    report = json.loads((folder / "mid" / "plan.json").read_text())
    assert report["first_step"] == 4 and report["steps"] == 6
    for source in report["sources"]:
        corpus = fingerprint(report, source["name"])
        tokens, again, _ = counted[corpus]
        assert source["overlap"] == pytest.approx(again / tokens)
        least, most = ledger.times(corpus, source["tokens"])
        assert most - least <= 1 and (again == 0 or source["epochs_after"] > 1)
    share = counted[fingerprint(report, "other")][0] / sum(tokens for tokens, _, _ in counted.values())
    assert share == pytest.approx(0.9, abs=0.02)
    lines = [line for line in runs["mid changed"]["lines"] if line.startswith("changed from step 4 on: ")]
    assert any("source text: share 0.5 -> 0.1" in line for line in lines) and any("packing" in line for line in lines)
    assert not [line for line in runs["mid resumed"]["lines"] if line.startswith("changed from")]
    manifest = read_manifest(folder / "mid" / "checkpoint" / "step-10")
    (change,) = manifest["data_changes"]
    assert change["step"] == 4 and change["plan"] == read_manifest(folder / "mid-before/checkpoint/step-4")["plan"]
    assert [s["weight"] for s in change["data"]["sources"]] == [1.0, 1.0]


def refusal(args: list[str]) -> str:
    config = load_config(args)
    with pytest.raises(UserError) as error:
        check(config, 1)
        inputs_of(config, 1)
    assert len(str(error.value)) < 800
    return str(error.value)


def test_what_of_a_changed_mixture_is_refused(folder: Path, runs: dict[str, dict[str, Any]]):
    def mid(out: str = "mid-before", at: int = 4, **more: Any) -> list[str]:
        return stage(folder, "one", out, training__steps=10, data__changed_at_step=at, **CHANGE | more)

    inputs_of(load_config(mid()), 1)
    # without the key as ever, and with it all but [data]
    assert "source text: share 0.5 -> 0.1" in refusal(mid(at=0))
    assert "training.seed 0 -> 1" in refusal(mid(training__seed=1))
    other = refusal(mid(training__seq_len=256, data__sources__0__weight=0.2))
    assert "training.seq_len 128 -> 256" in other and "share" not in other and "packing" not in other
    # other steps
    assert "holds no complete checkpoint of that step; its steps: 2, 4" in refusal(mid(at=3))
    assert "holds no complete checkpoint of that step; its steps: none" in refusal(mid("x"))
    assert "which would be resumed, was trained with the earlier keys" in refusal(
        mid(at=2)
    ) and "checkpoint.load_step = 2" in refusal(mid(at=2))
    inputs_of(load_config(mid(at=2, checkpoint__load_step=2)), 1)
    assert "goes back to before data.changed_at_step = 4" in refusal(mid(checkpoint__load_step=2))
    assert "but training.steps = 10: no step is left" in refusal(mid(at=10))
    # a changed run
    assert "share 0.1 -> 0.3" in refusal(mid("mid", data__sources__0__weight=0.3, data__sources__1__weight=0.7))
    assert "was trained with data.changed_at_step = 4, which is no longer set" in refusal(mid("mid", at=0))
    inputs = inputs_of(load_config(mid("mid", at=8, checkpoint__load_step=8, data__packing="single")), 1)
    assert [change["step"] for change in inputs.data_start.changes] == [4, 8] and inputs.plan.first_step == 8
    back = stage(folder, "one", "mid", training__steps=10, checkpoint__load_step=2)  # the keys as they were
    assert inputs_of(load_config(back), 1).plan.first_step == 0
    with pytest.raises(UserError, match="data.changed_at_step is a step of one stage"):
        chain(["--job.config_file", str(folder / "two.toml"), "--data.changed_at_step", "4"])


def test_a_damaged_checkpoint_after_a_change_leads_back_to_the_change_and_no_further(
    folder: Path, runs: dict[str, dict[str, Any]]
):
    for out, damaged in (("mid-damaged", (6, 8, 10)), ("mid-lost", (4, 6, 8, 10))):
        shutil.copytree(folder / "mid", folder / out)
        for step in damaged:
            next((folder / out / "checkpoint" / f"step-{step}").glob("*.distcp")).write_bytes(b"?")
    args = stage(folder, "one", "mid-damaged", training__steps=10, data__changed_at_step=4, **CHANGE)
    lost = stage(folder, "one", "mid-lost", training__steps=10, data__changed_at_step=4, **CHANGE)
    back, message = spawn(1, first_steps, [args, lost], folder)
    assert back == runs["mid changed"]["steps"][4]
    assert "is damaged (steps 4, 6, 8, 10)" in message
    assert complete_steps(folder / "mid-lost" / "checkpoint") == [2, 4, 6, 8, 10]


def first_steps(args: list[str], rank: int, world_size: int) -> Parts | str:
    """The parts of the step with which a run goes on, or why it does not."""
    import torch.distributed as dist

    try:
        trainer = build_trainer(load_config(args), rank, rank, world_size)
    except UserError as error:
        dist.destroy_process_group()
        return str(error)
    parts = parts_of(trainer.inputs.plan, trainer.step)
    trainer.close()
    return parts


@pytest.mark.parametrize("name", [READ, READ_BEFORE])
def test_a_damaged_state_is_named(folder: Path, runs: dict[str, dict[str, Any]], name: str):
    out = f"state-{name}"
    shutil.copytree(folder / "two", folder / out)
    args = stage(folder, "three", "x", out) if name == READ else stage(folder, "two", out, training__steps=9)
    files = [folder / out / "checkpoint" / f"step-{step}" / name for step in (6, 4, 2)]
    sound = files[0].read_bytes()
    for content in (b"no", sound[:100] + b"0" + sound[101:]):
        files[0].write_bytes(content)
        if name == READ_BEFORE:  # it is the same in all checkpoints of the stage
            inputs_of(load_config(args), 1)
            for file in files:
                file.write_bytes(content)
        assert f"step-6/{name}" in refusal(args)
        for file in files[1:]:
            file.write_bytes(sound)


def test_a_stage_is_planned_before_the_previous_ones_are_trained(folder: Path, runs: dict[str, dict[str, Any]]):
    """By their plans, which the trained ones followed."""

    def planned(after: str, *more: str) -> tuple[dict[str, float], str]:
        config = load_config([*stage(folder, "three", "x", after and str(folder / after)), *more])
        begin, text = planned_start(config, 1, lambda _: resolve_source)
        return {corpus.name: corpus.epochs for corpus in begin.read.corpora.values()}, text

    trained, text = planned("two")
    assert len(trained) == 3 and text == ""
    untrained, text = planned("")
    assert untrained == trained and f"{folder}/two.toml, which has no finished checkpoint, is taken to read" in text
    (folder / "broken.toml").write_text((folder / "two.toml").read_text().replace("late.jsonl", "gone.jsonl"))
    unknown, text = planned("", "--stage.after", str(folder / "broken.toml"))
    assert unknown == {} and "will have read is unknown, nothing is assumed: " in text and "gone.jsonl" in text


def test_the_dry_run_says_where_the_data_go_on(folder: Path, runs: dict[str, dict[str, Any]]):
    (line,) = data_line(load_config(stage(folder, "three", "x", "two")))
    report = json.loads((folder / "two" / "plan.json").read_text())
    assert line.startswith("data: epochs so far at its beginning: ")
    assert all(f"{s['name']} {s['epochs_after']:.2f}" in line for s in report["sources"])
    (line,) = data_line(load_config(stage(folder, "three", "x", "nowhere")))
    assert "which has no finished checkpoint; scripts/plan.py computes" in line
    assert data_line(load_config(stage(folder, "one", "x"))) == []
