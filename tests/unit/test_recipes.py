"""The recipes under train_configs/: their numbers are the published ones, and each can be planned, built and trained.

The tables below are typed from the publications (docs/recipes.md says which), not from the TOML files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from tests.before_the_move.losses import RECIPES as TRAINED
from tests.scripts import load_script
from torchtitan.components.setup import make_plan, model_args
from torchtitan.config import JobConfig, load_config
from torchtitan.config.checks import dp_degree, rows_per_step
from torchtitan.config.toml_file import tomllib
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.cluster.check_config import check_tables
from torchtitan.extensions.cluster.rope_report import rope_report
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.models.rope import RopeArgs, inverse_frequencies
from torchtitan.models.rope_change import lost_rope
from torchtitan.models.rope_config import rope_warnings
from torchtitan.models.transformer import Transformer

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "train_configs"
STAGES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.toml"))
RECIPES = [name for name in STAGES if not name.startswith("demo/")]
FU = [f"data_engineering_128k/{name}" for name in ("base", "original", "cut_4k", "cut_128k")] + [
    f"data_engineering_128k/{name}_upsampling" for name in ("per_source", "global", "domain")
]


build_stand_in, try_recipe = load_script("build_stand_in"), load_script("try_recipe")


@cache
def config_of(name: str) -> JobConfig:
    return load_config([f"--job.config_file={CONFIGS / name}.toml"])


@dataclass(frozen=True)
class Stage:
    """What is published of a stage; None: it is not."""

    seq_len: int | None
    batch: int | None  # tokens
    lr: float | None
    schedule: str | None
    floor: float | None
    warmup: int | None
    steps: int | None = None
    total: float | None = None  # tokens, where steps follow from them
    rope: str = "model"
    theta: float | None = None
    factor: float | None = None
    original: int | None = None  # rope.original_max_position_embeddings
    decay: float | None = None
    clip: float | None = None
    positions: str | None = None
    mask: str | None = None  # documents; none; anchor


YARN = Stage(
    65536, 64 * 65536, 2e-5, "linear", 0.0, 20, 400, rope="yarn", factor=16, original=4096, decay=0.0, mask="none"
)
PUBLISHED: dict[str, Stage] = {
    "llama2_long/32k": Stage(32768, 4194304, 2e-5, "cosine", None, 2000, steps=100_000, theta=5e5),
    "pi/32k": Stage(
        32768, 128 * 32768, 2e-5, None, None, 20, steps=1000, rope="linear", factor=16, decay=0.0, mask="none"
    ),
    "yarn/64k": YARN,
    "yarn/128k": replace(YARN, steps=200, factor=32),
    # 4M tokens in rows of 80K, made a number that 8 and 16 ranks share; the tokens, not the printed 2,000 steps
    **{
        name: Stage(81920, 48 * 81920, 2e-5, "constant", None, None, total=5e9, mask="none")
        for name in (*FU, "data_engineering_128k/7b_80k")
    },
    "data_engineering_128k/13b_64k": Stage(65536, 4194304, 2e-5, "constant", None, None, total=5e9, mask="none"),
    "prolong_8b/64k": Stage(
        65536, 4194304, 1e-5, "cosine", 0.1, 500, steps=5000, theta=8e6, decay=0.1, clip=1.0, mask="documents"
    ),
    "prolong_8b/512k": Stage(
        524288, 8388608, 5e-6, "cosine", 0.1, 250, steps=2500, theta=1.28e8, decay=0.1, clip=1.0, mask="documents"
    ),
    "prolong_8b/sft": Stage(
        65536, 4194304, 2e-5, "cosine", 0.1, 13, steps=250, theta=1.28e8, decay=0.1, clip=1.0, mask="documents"
    ),
    **{
        f"ultralong_8b/{size}m_{rope}": Stage(
            *(size * 2**20, 2 * 4194304 if size == 4 else None, 3e-5, None, None, None, 150 if size == 4 else None),
            rope=rope,
            factor=size * 128,
            original=8192,
            mask="none",
        )
        for size in (1, 2, 4)
        for rope in ("llama3", "yarn")
    },
    "olmo3_7b/64k": Stage(
        *(65536, 4194304, 2.0712352850360292e-4, "linear", 0.0, 200, None, 50e9),
        *("yarn", None, 8, 8192, 0.1, 1.0, None, "documents"),
    ),
    "longrope2_8b/128k": Stage(
        131072, 64 * 131072, 2e-5, "cosine", None, None, total=10e9, rope="longrope", original=8192
    ),
    "harpe_7b/128k": Stage(131072, None, 2e-5, None, None, None, total=6e9, rope="harpe"),
    "gene_7b/16k": Stage(
        16384, 128 * 16384, 2e-5, "cosine", None, 100, steps=300, rope="gene", factor=16, original=4096, mask="none"
    ),
    "longrecipe_8b/80k": Stage(
        24576, 96 * 24576, 5e-5, None, None, None, steps=104, theta=48.9e6, positions="longrecipe", mask="none"
    ),
    "longrecipe_8b/128k": Stage(
        38400, 96 * 38400, 5e-5, None, None, None, steps=104, theta=131.5e6, positions="longrecipe", mask="none"
    ),
    "longrecipe_8b/80k_anneal": Stage(None, None, 5e-6, None, 0.0, None, total=68e6, theta=48.9e6),
    "longrecipe_8b/128k_anneal": Stage(None, None, 5e-6, None, 0.0, None, total=68e6, theta=131.5e6),
    "pose_7b/16k": Stage(
        2048, 64 * 2048, 2e-5, None, None, 10, steps=1000, rope="linear", factor=8, positions="pose", mask="none"
    ),
    "anchor_7b/64k": Stage(
        65536, 8 * 65536, 2e-5, None, None, None, steps=2000, theta=5e6, decay=0.1, positions="continue", mask="anchor"
    ),
    "anchor_7b/128k": Stage(
        131072,
        8 * 131072,
        2e-5,
        None,
        None,
        None,
        steps=2000,
        theta=1e7,
        decay=0.1,
        positions="continue",
        mask="anchor",
    ),
    **{
        f"qwen25_1m/{length}k": Stage(length * 1024, None, None, None, None, None, theta=theta)
        for length, theta in ((4, 1e4), (32, 1e6), (64, 1e6), (128, 5e6), (256, 1e7))
    },
    "nemo_llama3_8b/2k": Stage(2048, None, None, None, None, 2000),
    "nemo_llama3_8b/16k": Stage(16384, 512 * 16384, None, None, None, 2000),
    "nemo_llama3_8b/64k": Stage(65536, 512 * 65536, None, None, None, 2000),
}

OURS: dict[str, Stage] = {
    "llama3_8b/128k": Stage(
        131072, 4194304, 1e-5, "cosine", 0.1, 120, total=5e9, theta=2e7, decay=0.1, clip=1.0, mask="documents"
    ),
    **{
        f"smollm2_135m/{length}k": Stage(
            length * 1024, 524288, 3e-4, "cosine", 0.1, 50, steps=500, decay=0.1, clip=1.0, mask="documents"
        )
        for length in (8, 32, 64)
    },
}

# rows that stand for longer ones
LENGTHS = {"pose_7b/16k": 16384, "longrecipe_8b/80k": 81920, "longrecipe_8b/128k": 131072}
AFTER = {
    "yarn/128k": "yarn/64k",
    "prolong_8b/512k": "prolong_8b/64k",
    "prolong_8b/sft": "prolong_8b/512k",
    "longrecipe_8b/80k_anneal": "longrecipe_8b/80k",
    "longrecipe_8b/128k_anneal": "longrecipe_8b/128k",
    "qwen25_1m/32k": "qwen25_1m/4k",
    "qwen25_1m/64k": "qwen25_1m/32k",
    "qwen25_1m/128k": "qwen25_1m/64k",
    "qwen25_1m/256k": "qwen25_1m/128k",
    "nemo_llama3_8b/16k": "nemo_llama3_8b/2k",
    "nemo_llama3_8b/64k": "nemo_llama3_8b/16k",
    "smollm2_135m/32k": "smollm2_135m/8k",
    "smollm2_135m/64k": "smollm2_135m/32k",
}
FRESH = {"qwen25_1m/4k", "nemo_llama3_8b/2k"}  # pretraining


def test_every_stage_stands_in_a_table_and_every_folder_says_what_it_is() -> None:
    assert sorted({**PUBLISHED, **OURS}) == RECIPES
    overview = (REPOSITORY / "docs/recipes.md").read_text()
    for folder in sorted({path.parent for path in CONFIGS.glob("*/*.toml")}):
        text = (folder / "README.md").read_text() if folder.name != "demo" else ""
        for path in folder.glob("*.toml") if text else ():
            assert f"`{path.name}`" in text, path
        if text:
            assert f"train_configs/{folder.name}/" in text and "Needs" in text and len(text.splitlines()) < 25
            assert f"`{folder.name}`" in overview, folder.name
    for path in (*CONFIGS.rglob("*.toml"), *CONFIGS.rglob("*.md")):
        assert max(map(len, path.read_text().splitlines())) <= 120, path


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_are_the_published_ones(name: str) -> None:
    config, stage = config_of(name), {**PUBLISHED, **OURS}[name]
    found = Stage(
        seq_len=config.training.seq_len,
        batch=rows_per_step(config, 8) * config.training.seq_len,
        lr=config.optimizer.lr,
        schedule="constant" if config.lr_scheduler.decay_ratio == 0 else config.lr_scheduler.decay_type,
        floor=config.lr_scheduler.min_lr_factor,
        warmup=config.lr_scheduler.warmup_steps,
        steps=config.training.steps,
        rope=config.rope.type,
        theta=None if config.rope.theta == "auto" else config.rope.theta,
        factor=config.rope.factor,
        original=config.rope.original_max_position_embeddings,
        decay=config.optimizer.weight_decay,
        clip=config.training.max_norm,
        positions=config.data.positions,
        mask=mask_of(config),
    )
    expected, values = vars(stage), vars(found)
    for key in ("rope", "factor", "original"):
        assert values[key] == expected[key], key
    for key in ("seq_len", "batch", "lr", "schedule", "floor", "warmup", "steps", "theta", "decay", "clip"):
        assert expected[key] is None or values[key] == expected[key], key
    for key in ("positions", "mask"):
        assert expected[key] is None or values[key] == expected[key], key
    if stage.total:
        assert found.batch and found.steps and found.batch * found.steps == pytest.approx(stage.total, rel=0.02)
    assert config.optimizer.beta1 == 0.9 and config.optimizer.beta2 == 0.95
    assert config.data.target_seq_len == LENGTHS.get(name)


def mask_of(config: JobConfig) -> str:
    if config.data.anchor_attention:
        return "anchor"
    return "none" if config.data.cross_document_attention else "documents"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_what_is_not_published_is_called_chosen(name: str) -> None:
    """And what is published is not, in the line of the key, wherever in the chain of `extends` that stands."""
    stage, config = PUBLISHED[name], config_of(name)
    constant = config.lr_scheduler.decay_ratio == 0
    keys = {
        "training.seq_len": stage.seq_len,
        "training.global_batch_tokens": stage.batch,
        "optimizer.lr": stage.lr,
        "lr_scheduler.decay_ratio" if constant else "lr_scheduler.decay_type": stage.schedule,
        "lr_scheduler.warmup_steps": stage.warmup,
        "training.steps": stage.steps or stage.total,
        "optimizer.weight_decay": stage.decay,
        "training.max_norm": stage.clip,
    }
    if not constant:
        keys["lr_scheduler.min_lr_factor"] = stage.floor
    for key, published in keys.items():
        line = line_of(CONFIGS / f"{name}.toml", *key.split("."))
        assert ("chosen" in line.partition("#")[2]) == (published is None), f"{key}: {line}"


def line_of(path: Path, table: str, key: str) -> str:
    """The line that sets a key, in the file or in one that it extends; "" if none does."""
    current, text = "", path.read_text()
    for line in text.splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif current == table and line.partition("=")[0].strip() == key:
            return line
    parent = tomllib.loads(text).get("extends")
    return line_of(path.parent / parent, table, key) if parent else ""


def test_lists_of_rope_factors() -> None:
    """LongRoPE2's factors by NTK-aware's base, of which they are the closed form; HARPE's bases as printed."""
    args = model_args(config_of("longrope2_8b/128k"))
    lambdas = config_of("longrope2_8b/128k").rope.long_factor
    assert len(lambdas) == 64 and all(x <= y for x, y in zip(lambdas, lambdas[1:]))
    assert lambdas[30:] == (16.0,) * 34
    base = 5e5 * 16 ** (128 / 60)  # NTK whose pair 30 is 16 times slower
    expected = torch.tensor([base ** (-2 * j / 128) for j in range(31)], dtype=torch.float64)
    assert torch.allclose(inverse_frequencies(args.rope, 128)[1, :31], expected, rtol=1e-6, atol=0)
    printed = """
        1.00 1.15 1.30 1.45 2.17 2.20 2.23 2.47 2.50 2.65 2.68 2.71 2.74 2.80 2.83 2.92
        3.01 3.04 3.10 3.13 3.16 3.22 3.43 3.46 3.61 3.88 4.09 4.15 4.39 4.45 4.51 4.54"""
    bases = config_of("harpe_7b/128k").rope.bases
    assert bases == pytest.approx([float(number) * 1e6 for number in printed.split()])
    in_strides = [(base - 1e6) / 3e4 for base in bases]
    assert in_strides == pytest.approx([round(n) for n in in_strides])


def test_ultralongs_two_readings_of_yarn() -> None:
    """What is left of the frequencies of pairs 29, 31 and 33 at 1M; the same below and above the ramp."""
    left = {}
    for rope in ("llama3", "yarn"):
        args = model_args(config_of(f"ultralong_8b/1m_{rope}"))
        left[rope] = inverse_frequencies(args.rope, 128) / inverse_frequencies(RopeArgs(5e5), 128)
        found = left[rope][[29, 31, 33]].tolist()
        assert found == pytest.approx({"llama3": [0.805, 0.426, 0.174], "yarn": [0.858, 0.575, 0.291]}[rope], abs=6e-4)
    kept = [j for j in range(64) if j <= 28 or j >= 35]
    assert torch.allclose(left["llama3"][kept], left["yarn"][kept])


def test_what_else_is_published() -> None:
    longrope, olmo = config_of("longrope2_8b/128k"), config_of("olmo3_7b/64k")
    assert longrope.rope.mixed_window and longrope.rope.attention_factor == 1.0
    (text,) = longrope.data.sources
    assert (text.length_bins, text.max_length) == ((8192, 102400), 204800)  # up to 8K, to 100K, to 200K
    assert text.length_shares == (0.3, 0.3, 0.4)
    assert olmo.rope.layers == "full_attention" and olmo.optimizer.no_decay == ("tok_embeddings.*",)
    assert olmo.data.sources[0].weight == 0.661 and {s.long_document for s in olmo.data.sources} == {"truncate"}
    for length in (64, 128, 256):
        qwen = config_of(f"qwen25_1m/{length}k")
        (text,) = qwen.data.sources
        assert (text.length_bins, text.length_shares) == ((length * 1024 - 1,), (0.25, 0.75))
    ultralong = config_of("ultralong_8b/4m_yarn").data
    assert {s.separator for s in ultralong.sources} == {"<s>"} and not (ultralong.add_bos or ultralong.add_eos)


def test_bases_that_stand_for_a_rule() -> None:
    """LongRecipe's are dynamic NTK's; theta = "auto" makes SmolLM2's from 8K on."""
    for name, factor, length in (("80k", 10, 81920), ("128k", 16, 131072)):
        rule = 5e5 * (factor * length / 8192 - (factor - 1)) ** (128 / 126)
        assert config_of(f"longrecipe_8b/{name}").rope.theta == pytest.approx(rule, rel=1e-3)
    thetas = [rope_of(f"smollm2_135m/{name}").theta for name in ("8k", "32k", "64k")]
    assert thetas == pytest.approx([1e5, 1e5 * 4 ** (64 / 62), 1e5 * 8 ** (64 / 62)], rel=1e-6)


def rope_of(name: str) -> RopeArgs:
    """A stage's RoPE, with those of the stages before it where theta = "auto" asks for them."""
    return model_args(config_of(name), rope_of(AFTER[name]) if name in AFTER else None).rope


MEANT = {
    **{f"ultralong_8b/{size}m_yarn": "faster_than_trained" for size in (1, 2, 4)},
    **dict.fromkeys(("nemo_llama3_8b/16k", "nemo_llama3_8b/64k", "qwen25_1m/64k"), "beyond_trained"),
}
"""What a publication does all the same, by rope.allow."""


@pytest.mark.parametrize("name", RECIPES)
def test_rope_takes_the_weights_as_far_as_its_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused or warned of, and rope.allow names what the publication does, and no more."""
    monkeypatch.chdir(tmp_path)  # there are no checkpoints here
    lines = rope_report(config_of(name))
    assert lines[0].startswith("RoPE: theta") and not [x for x in lines if x.startswith(("WARNING", "WOULD"))], lines
    assert [x.startswith("allowed: ") for x in lines[1:]] == [True] * len(config_of(name).rope.allow)
    assert config_of(name).rope.allow == ((MEANT[name],) if name in MEANT else ())
    assert ("which has no finished checkpoint" in lines[0]) == (name in AFTER)


def test_chains() -> None:
    """Where a stage begins: after another, which exists, or from weights, or from nothing."""
    for name in RECIPES:
        config = config_of(name)
        given = config.stage.after  # absolute, whatever the file says
        after = str(Path(given).relative_to(CONFIGS).with_suffix("")) if given else None
        assert after == AFTER.get(name), name
        assert after is None or after in RECIPES
        assert config.checkpoint.initial_load_in_hf == (name not in AFTER and name not in FRESH), name
        assert config.job.dump_folder == f"./outputs/{name}"
        if after:
            before = config_of(after)
            assert lost_rope(rope_of(after), rope_of(name), 128) is None, name
            assert (config.model.flavor, config.model.hf_assets_path) == (
                before.model.flavor,
                before.model.hf_assets_path,
            )
        seen = [name]
        while seen[-1] in AFTER:
            assert AFTER[seen[-1]] not in seen
            seen.append(AFTER[seen[-1]])
    keeps = {name for name in AFTER if "optimizer" in config_of(name).stage.carry}
    assert keeps >= {"prolong_8b/512k"} and not keeps & {"prolong_8b/sft", "yarn/128k", "longrecipe_8b/80k_anneal"}


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_on_one_two_and_eight_processes(name: str) -> None:
    config = config_of(name)
    p = config.parallelism
    for processes in (1, 2, 8):
        if processes < 8:  # too few for a long row, but enough to try
            p = replace(p, context_parallel_degree=min(p.context_parallel_degree, processes), tensor_parallel_degree=1)
        else:
            p = config.parallelism
        check_tables(replace(config, parallelism=p), processes)
        dp = dp_degree(replace(config, parallelism=p), processes)
        assert dp * p.context_parallel_degree * p.tensor_parallel_degree == processes


@pytest.mark.parametrize("name", RECIPES)
def test_its_model_is_built(name: str) -> None:
    config = config_of(name)
    args = model_args(config, rope_of(AFTER[name]) if name in AFTER else None)
    with torch.device("meta"):
        model = Transformer(args)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    size = next(size for key, size in SIZES.items() if key in config.model.flavor)
    assert billions == pytest.approx(size, rel=0.02)
    assert rope_warnings(args.rope, args.head_dim, config.data.target_seq_len or config.training.seq_len) == []


SIZES = {"qwen2.5_7b": 7.616, "olmo3_7b": 7.298, "llama2_13b": 13.02, "_7b": 6.738, "_8b": 8.030, "135m": 0.1345}


SLIMPAJAMA = {
    "c4": "C4",
    "commoncrawl": "CommonCrawl",
    "stackexchange": "StackExchange",
    "wikipedia": "Wikipedia",
    "github": "Github",
    "arxiv": "ArXiv",
    "books": "Book",
}
"""meta.redpajama_set_name, less RedPajama, as the card of cerebras/SlimPajama-627B names them."""


def test_slimpajama_is_read_as_published(tmp_path: Path) -> None:
    """Chunks of compressed lines, beside the other splits; every record is in one source."""
    files = tmp_path / "train" / "chunk1", tmp_path / "train" / "chunk2", tmp_path / "validation"
    for folder, kinds in zip(files, ([*SLIMPAJAMA.values()][:4], [*SLIMPAJAMA.values()][4:], ["C4"])):
        folder.mkdir(parents=True)
        lines = [{"text": f"one of {kind}", "meta": {"redpajama_set_name": f"RedPajama{kind}"}} for kind in kinds]
        with pa.CompressedOutputStream(str(folder / "example_train_0.jsonl.zst"), "zstd") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    tokenizer = load_tokenizer(str(REPOSITORY / "assets/tokenizer"))
    for name in ("data_engineering_128k/base", "ultralong_8b/1m_llama3"):
        data = replace(config_of(name).data, folder=str(tmp_path), cache_folder=str(tmp_path / "cache"))
        assert [source.name for source in data.sources] == list(SLIMPAJAMA)
        for source in data.sources:
            corpus = resolve_source(source, tokenizer, data)
            assert len(corpus) == 1 and f"one of {SLIMPAJAMA[source.name]}" in tokenizer.decode(
                corpus.document(0).tolist()
            )
            assert corpus.left_out == {"where": 6}


@pytest.mark.parametrize("name", RECIPES)
def test_its_data_are_planned(name: str, tmp_path: Path) -> None:
    arguments = [f"--job.config_file={CONFIGS / name}.toml", f"--data.folder={tmp_path / 'data'}"]
    assert build_stand_in.main([*arguments, "--tokens=40000"]) == 0
    config = load_config(
        [*arguments, "--training.steps=1", "--lr_scheduler.warmup_steps=0", f"--data.cache_folder={tmp_path / 'cache'}"]
    )
    rows = min(rows_per_step(config, 8), 8)
    config = replace(config, training=replace(config.training, global_batch_tokens=rows * config.training.seq_len))
    args = model_args(config, rope_of(AFTER[name]) if name in AFTER else None)
    tokenizer = load_tokenizer(str(REPOSITORY / "assets/tokenizer"))
    plan = make_plan(config, 1, tokenizer, replace(args, vocab_size=32000), resolve_source)
    assert plan.rows_per_step == rows
    tokens = [int(plan.row(0, slot).lengths.sum()) for slot in range(rows)]
    assert max(tokens) <= config.training.seq_len and sum(tokens) > 0.5 * rows * config.training.seq_len


def kind_of(name: str) -> tuple[object, ...]:
    """What matters of a stage in small, numbers aside."""
    config = config_of(name)
    d = config.data
    return (config.rope.type, config.rope.mixed_window, d.strategy, d.packing, d.positions, mask_of(config), d.add_bos)


ONE_OF_A_KIND = sorted({kind_of(name): name for name in RECIPES}.values())


def test_one_of_every_kind_is_trained_in_small() -> None:
    """By test_losses_as_recorded.py, which looks at its losses. A recipe of a new kind: record them anew."""
    assert set(ONE_OF_A_KIND) == set(TRAINED)


def test_what_the_rehearsal_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(CONFIGS / "pi/32k.toml")
    for arguments, said in (
        ([recipe, f"--folder={tmp_path}"], "nothing is written over"),
        ([recipe, "--steps=0"], "must be at least 1"),
        (["no/such.toml"], "no/such.toml does not exist"),
    ):
        assert try_recipe.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_rehearsal_keeps_proportions(tmp_path: Path) -> None:
    asking = ["--evaluation.texts", "held_out.jsonl", "--evaluation.length", "131072"]  # neither is there in small
    config = load_config([f"--job.config_file={CONFIGS / 'longrope2_8b/128k.toml'}", *asking])
    small = try_recipe.make_small(config, tmp_path, seq_len=2048, steps=2, processes=6)
    assert not small.evaluation.texts
    assert [(s.length_bins, s.max_length) for s in small.data.sources] == [((128, 1600), 3200)]
    assert small.rope.original_max_position_embeddings == 128 and len(small.rope.long_factor) == 32
    assert (small.rope.long_factor[0], small.rope.long_factor[-1]) == (1.0, 16.0)
    assert small.parallelism.context_parallel_degree == 2  # of 6 processes and 8 ranks
    check_tables(small, 6)
