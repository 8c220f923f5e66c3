"""scripts/plan.py, plot_plan.py and build_stand_in.py, and the recipes whose data mixtures are planned with them.

Each is planned on a stand-in of its sources. The scripts run in this process: main(arguments) -> exit code.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.scripts import load_script
from torchtitan.config import load_config
from torchtitan.config.checks import dp_degree, rows_per_step
from torchtitan.datasets.corpus import open_corpus

REPOSITORY = Path(__file__).parents[3]
RECIPES = sorted(
    REPOSITORY / "train_configs" / folder / f"{stage}.toml"
    for folder, stages in {
        "prolong_8b": ("64k", "512k"),
        "data_engineering_128k": (
            "original",
            "cut_4k",
            "cut_128k",
            "per_source_upsampling",
            "global_upsampling",
            "domain_upsampling",
        ),
    }.items()
    for stage in stages
)
"""Those whose data are mixed in a way of their own; tests/unit/test_recipes.py plans all."""
STEPS = 12
SHORT_STAGE = [f"--training.steps={STEPS}", "--lr_scheduler.warmup_steps=1"]


plan, plot_plan, build_stand_in = load_script("plan"), load_script("plot_plan"), load_script("build_stand_in")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each folder of recipes and each set of sources in it, data of its own."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name in ("prolong_8b/64k", "prolong_8b/512k", "data_engineering_128k/base"):
        arguments = ["--job.config_file", str(REPOSITORY / f"train_configs/{name}.toml")]
        assert build_stand_in.main([*arguments, "--data.folder", str(folder / name)]) == 0
    return folder


@pytest.fixture(autouse=True)
def no_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NGPU", raising=False)


def data_of(recipe: Path, stand_ins: Path) -> Path:
    return stand_ins / recipe.parent.name / (recipe.stem if recipe.parent.name == "prolong_8b" else "base")


def arguments_of(recipe: Path, stand_ins: Path, tmp_path: Path) -> list[str]:
    return [
        f"--job.config_file={recipe}",
        f"--data.folder={data_of(recipe, stand_ins)}",
        f"--model.hf_assets_path={REPOSITORY / 'assets/tokenizer'}",
        f"--data.cache_folder={tmp_path / 'cache'}",
        *SHORT_STAGE,
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_recipe_is_planned_as_asked(
    recipe: Path, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments_of(recipe, stand_ins, tmp_path)
    assert plan.main([*arguments, f"--out={tmp_path / 'plan.json'}"]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.startswith(f"stage {recipe.stem} on 8 processes")
        and "stand-ins of random tokens were read for all sources" in printed
    )

    config = load_config(arguments)
    report = json.loads((tmp_path / "plan.json").read_text())
    rows = rows_per_step(config, 8)
    assert report["rows"] == STEPS * rows and rows % dp_degree(config, 8) == 0
    assert 3.9e6 < rows * config.training.seq_len < 8.5e6

    data = config.data
    weights = {s.name: s.weight for s in data.sources}
    assert sum(weights.values()) == pytest.approx(1, abs=2e-4)  # as published, which is rounded for Fu's
    if data.strategy == "domain_upsampling":
        weights |= dict.fromkeys(data.upsampled_sources, 0.6)
        assert data.upsampled_sources == ("github", "arxiv", "books")
    total = sum(weights.values())
    for source in report["sources"]:
        assert source["share"] == pytest.approx(source["share_asked"], abs=0.005)
        if data.strategy != "global_upsampling":
            assert source["share"] == pytest.approx(weights[source["name"]] / total, abs=0.005)
        assert source["name"] in printed
    overall = sum(s["share"] * s["long_share"] for s in report["sources"])
    if data.strategy == "global_upsampling":
        assert overall == pytest.approx(0.7, abs=0.005)
    if data.strategy == "per_source_upsampling":
        for source in report["sources"]:  # to within a row
            assert abs(source["long_share"] - 0.7) * source["tokens_read"] < report["inputs"]["seq_len"]
    if data.strategy in ("original", "cut_4k", "cut_128k") and recipe.parent.name == "data_engineering_128k":
        assert overall < 0.5


def test_what_the_recipes_promise_of_lengths(stand_ins: Path, tmp_path: Path) -> None:
    """cut_4k has no longer piece; pieces of 64K stand in rows of 512K."""

    def longest_parts(recipe: str) -> dict[str, int]:
        out = tmp_path / "plan.json"
        arguments = arguments_of(REPOSITORY / f"train_configs/{recipe}.toml", stand_ins, tmp_path)
        assert plan.main([*arguments, f"--out={out}"]) == 0
        sources = json.loads(out.read_text())["sources"]
        return {s["name"]: max(map(int, s["parts_by_length_from"])) for s in sources}

    assert set(longest_parts("data_engineering_128k/cut_4k").values()) == {4096}
    longest = longest_parts("prolong_8b/512k")
    assert longest["repos@524288"] == longest["books@524288"] == 524288
    assert longest["repos@65536"] == longest["books@65536"] == 65536


def test_a_picture_of_one_plan_and_of_several(stand_ins: Path, tmp_path: Path) -> None:
    recipe = REPOSITORY / "train_configs/prolong_8b/512k.toml"
    dump = tmp_path / "dump"
    dump.mkdir()
    assert plan.main([*arguments_of(recipe, stand_ins, tmp_path), f"--out={dump / 'plan.json'}"]) == 0
    report = json.loads((dump / "plan.json").read_text())
    report["sources"][0] |= {"name": "a name $x_1$ that is much longer than there is room for it", "epochs": []}
    report["imbalance"]["ranks"] = 1
    (tmp_path / "other.json").write_text(json.dumps(report))
    heights = []
    for number, plans in enumerate(([dump], [dump, tmp_path / "other.json"])):
        picture = tmp_path / f"{number}.png"
        assert plot_plan.main([*map(str, plans), f"--out={picture}"]) == 0
        width, height = struct.unpack(">II", picture.read_bytes()[16:24])
        assert 1500 < width < 2000 and 30_000 < picture.stat().st_size < 2_000_000
        heights.append(height)
    assert heights[1] == pytest.approx(2 * heights[0], abs=2)


def test_the_fates_of_a_sources_tokens_sum_to_them(stand_ins: Path, tmp_path: Path) -> None:
    recipe = REPOSITORY / "train_configs/data_engineering_128k/original.toml"
    arguments = [
        *arguments_of(recipe, stand_ins, tmp_path),
        *(
            "--data.packing=best_fit",
            "--training.steps=1",
            "--training.seq_len=8192",
            "--training.global_batch_tokens=65536",
        ),
        *(
            "--data.sources.0.long_document=truncate",
            "--data.sources.1.long_document=drop",
            "--data.sources.2.weight=0",
        ),
        *("--data.sources.3.min_length=300", "--data.sources.4.max_length=5000", "--data.sources.5.max_documents=40"),
    ]
    assert plan.main([*arguments, f"--out={tmp_path / 'plan.json'}"]) == 0
    sources = json.loads((tmp_path / "plan.json").read_text())["sources"]
    fates = [plot_plan.fates_of(source) for source in sources]
    for source, found in zip(sources, fates):
        assert sum(found.values()) == pytest.approx(source["tokens"])
    for number, fate in enumerate(
        ("cut off by truncate", "dropped, too long", "no part of the mix", "below min_length", "above max_length")
    ):
        assert fates[number][fate] > 0 and not fates[6][fate]
    lengths = open_corpus(data_of(recipe, stand_ins) / "train").lengths
    assert fates[5]["no part of the mix"] == pytest.approx(lengths[40:].sum())
    assert fates[2]["no part of the mix"] == sources[2]["tokens"]


def test_a_stand_in_is_as_its_source_asks(stand_ins: Path, tmp_path: Path) -> None:
    for recipe in ("64k", "512k"):
        config = load_config([f"--job.config_file={REPOSITORY / f'train_configs/prolong_8b/{recipe}.toml'}"])
        for source in config.data.sources:
            corpus = open_corpus(stand_ins / "prolong_8b" / recipe / source.path)
            assert corpus.lengths.min() >= max(1, source.min_length) and corpus.tokens < 4_000_000
            assert corpus.lengths.max() > config.data.long_threshold and len(corpus) >= 4
            assert max(int(corpus.document(i).max()) for i in range(len(corpus))) < 256
    size = sum(file.stat().st_size for file in (stand_ins / "prolong_8b/512k").rglob("*.arrow"))
    assert size < 15e6


def test_a_stand_in_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    config = f"--job.config_file={REPOSITORY / 'train_configs/prolong_8b/64k.toml'}"
    contents = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        folder = tmp_path / name
        assert build_stand_in.main([config, f"--data.folder={folder}", "--tokens=20000", f"--seed={seed}"]) == 0
        corpora = [open_corpus(folder / source) for source in ("book-65536", "fineweb-edu")]
        contents.append([np.concatenate([c.document(i) for i in range(len(c))]).tolist() for c in corpora])
    assert contents[0] == contents[1] != contents[2]
    assert contents[0][0][:100] != contents[0][1][:100]


def write_toml(folder: Path, *sources: str, more: str = "") -> str:
    tables = "".join(f'[[data.sources]]\nname = "s{i}"\npath = "{path}"\n' for i, path in enumerate(sources))
    (folder / "stage.toml").write_text(f'{more}\n[data]\nfolder = "{folder}/data"\n{tables}')
    return f"--job.config_file={folder / 'stage.toml'}"


def one_line(captured: pytest.CaptureFixture[str]) -> str:
    error = captured.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("hub:someone/something", "names no folder"),
        ("books/*.jsonl", "--data.sources.1.path"),
        ("/elsewhere/books", "does not lie in data.folder"),
        ("../books", "does not lie in data.folder"),
        ("taken", "never overwrites"),
        ("file/books", "never overwrites"),
    ],
)
def test_where_a_stand_in_does_not_belong_nothing_is_written(
    path: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_toml(tmp_path, "good", path)
    (tmp_path / "data/taken").mkdir(parents=True)
    (tmp_path / "data/file").touch()
    assert build_stand_in.main([config]) == 1
    assert said in one_line(capsys)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["file", "taken"]


def test_a_stand_in_with_nothing_to_stand_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_stand_in.main([f"--data.folder={tmp_path}"]) == 1
    assert "no [[data.sources]]" in one_line(capsys)
    assert build_stand_in.main([write_toml(tmp_path, "a"), "--tokens=0"]) == 1
    assert "--tokens 0" in one_line(capsys)


def test_two_sources_of_one_path_get_one_stand_in(tmp_path: Path) -> None:
    assert build_stand_in.main([write_toml(tmp_path, "a", "a"), "--tokens=10"]) == 0
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["a"]


def test_the_number_of_processes(tmp_path: Path) -> None:
    def chosen(more: str = "", asked: int | None = None, ngpu: str | None = None) -> int:
        return plan.choose_world_size(load_config([write_toml(tmp_path, "a", more=more)]), asked, ngpu)[0]

    assert chosen() == 8
    assert chosen(asked=3) == 3 and chosen(ngpu="5") == 5 and chosen(asked=3, ngpu="5") == 3
    assert chosen("[training]\nglobal_batch_size = 6") == 6
    assert chosen("[parallelism]\ntensor_parallel_degree = 16") == 16
    with pytest.raises(plan.UserError, match="6 rows"):
        chosen("[training]\nglobal_batch_size = 6", asked=4)
    with pytest.raises(plan.UserError, match="training.steps"):
        chosen("[training]\nsteps = 0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--job.config_file=no/such.toml"], "no/such.toml does not exist"),
        ([], "no [[data.sources]]"),
        (["{config}", "--world-size=0"], "--world-size = 0"),
        (["{config}", "--trainin.steps=3"], "--trainin.steps is not known"),
        (["{config}", "--out=no/such/folder/plan.json"], "--out no/such/folder/plan.json cannot be written"),
        (["{config}", "--data.cache_folder={folder}/stage.toml"], "data.cache_folder"),
        (["{config}", "--model.flavor=llama9"], "llama9"),
        (["{config}", "--model.hf_assets_path=nowhere"], "nowhere"),
        (["{config}"], "missing"),
    ],
)
def test_what_a_user_has_wrong_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_toml(tmp_path, "missing")
    filled = [a.format(config=config, folder=tmp_path) for a in arguments]
    if arguments and not any(a.startswith("--data.cache_folder") for a in arguments):
        filled.append(f"--data.cache_folder={tmp_path / 'cache'}")
    if not any(a.startswith("--model.hf_assets_path") for a in arguments):
        filled.append(f"--model.hf_assets_path={REPOSITORY / 'assets/tokenizer'}")
    assert plan.main(filled) == 1
    assert said in one_line(capsys)


def test_a_plan_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "other.json").write_text('{"inputs": {"format": 1}, "sources": []}')
    for name, said in ((".", "cannot be read"), ("text.json", "another version"), ("other.json", "another version")):
        assert plot_plan.main([str(tmp_path / name), f"--out={tmp_path / 'plan.png'}"]) == 1
        assert said in one_line(capsys)
    assert not (tmp_path / "plan.png").exists()


def test_a_picture_that_cannot_be_written(stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = REPOSITORY / "train_configs/data_engineering_128k/original.toml", tmp_path / "plan.json"
    assert plan.main([*arguments_of(recipe, stand_ins, tmp_path), f"--out={out}"]) == 0
    capsys.readouterr()
    for name, said in (("plan.word", ".word"), ("no/such/plan.png", "cannot be written")):
        assert plot_plan.main([str(out), f"--out={tmp_path / name}"]) == 1
        assert said in one_line(capsys)
