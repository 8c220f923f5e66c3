"""The RoPE of a stage beside that of its weights: what is refused, what rope.allow lets through, how far rows reach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchtitan.components.lineage import lineage
from torchtitan.components.reach import reach, trained_length
from torchtitan.components.setup import model_args
from torchtitan.components.stage_rope import StageRope, check_stage_rope, not_allowed, rope_of_weights, stage_rope
from torchtitan.components.start import Start
from torchtitan.config import JobConfig, as_tables, load_config
from torchtitan.config.keys import keys_of
from torchtitan.config.schema import Rope
from torchtitan.models.architecture import as_json
from torchtitan.models.registry import FLAVORS
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_config import build_rope
from torchtitan.models.rope_scaling import LongRopeScaling, YarnScaling
from torchtitan.tools.errors import UserError

K = 1024


def stage(flavor: str, seq_len: int, *more: str) -> JobConfig:
    return load_config(["--model.flavor", flavor, "--training.seq_len", str(seq_len), *more])


def checked(config: JobConfig, start: bool = True) -> StageRope:
    """What a stage from the published weights of its flavor is told; start: False: it is resumed."""
    weights = FLAVORS[config.model.flavor]
    before = weights.rope
    args = model_args(config, before)
    return check_stage_rope(config, args, before, Start(Path("hf"), ("model",), None, weights) if start else None)


@pytest.mark.parametrize(
    ("flavor", "seq_len"),
    [("llama3_8b", 128 * K), ("llama3_8b", 512 * K), ("qwen2.5_7b", 256 * K), ("smollm2_135m", 64 * K)],
)
def test_longer_rows_with_the_rope_of_the_weights_are_refused(flavor: str, seq_len: int):
    length = FLAVORS[flavor].rope.max_position_embeddings
    with pytest.raises(UserError) as refused:
        checked(stage(flavor, seq_len))
    message = str(refused.value)
    assert f"trained to {length:,} tokens, and rows reach position {seq_len:,}" in message
    assert 'rope.theta = "auto"' in message and 'rope.allow = ["beyond_trained"]' in message
    assert "\n" not in message and message.startswith("hf: ")

    meant = checked(stage(flavor, seq_len, "--rope.allow", "beyond_trained"))
    assert any("have not turned once" in warning for warning in meant.warnings)
    assert any("have not turned once" in w for w in checked(stage(flavor, seq_len), start=False).warnings)
    assert not checked(stage(flavor, seq_len, "--rope.theta", "auto")).warnings
    assert not checked(stage(flavor, length or 0)).warnings


def test_both_checks_are_named_and_one_does_not_allow_the_other():
    keys = ["--rope.type", "yarn", "--rope.factor", "2", "--rope.original_max_position_embeddings", "8192"]
    with pytest.raises(UserError, match=r'rope.allow = \["beyond_trained", "faster_than_trained"\]'):
        checked(stage("llama3.1_8b", 256 * K, *keys))
    with pytest.raises(UserError, match=r'would turn faster.*rope.allow = \["beyond_trained", "faster_than_trained"\]'):
        checked(stage("llama3.1_8b", 256 * K, *keys, "--rope.allow", "beyond_trained"))
    checked(stage("llama3.1_8b", 256 * K, *keys, "--rope.allow", "beyond_trained", "faster_than_trained"))


def test_a_chain_of_small_stages_is_told_what_it_should_do():
    """Heads of 64, trained to 128, and then with the base that 256 needs: 1e4 * 2^(64/62) = 20452.2."""
    args = FLAVORS["debugmodel"]
    raised = RopeArgs(1e4 * 2 ** (64 / 62), max_position_embeddings=256)

    def found(before: RopeArgs, length: int, *keys: str) -> StageRope:
        config = stage("debugmodel", length, *keys)
        rope = build_rope(config.rope, args.rope, 64, args.n_kv_heads, length, before)
        return stage_rope(config, replace(args, rope=rope), before)

    def yarn(factor: int, original: int) -> list[str]:
        return ["--rope.type", "yarn", f"--rope.factor={factor}", f"--rope.original_max_position_embeddings={original}"]

    refused = not_allowed(stage("debugmodel", 512), found(raised, 512, "--rope.theta", "20452.2"))
    assert (
        refused
        and 'rope.type = "yarn", factor = 2, original_max_position_embeddings = 256, theta = 20452.2; or' in refused
    )
    assert "RoPE stays (theta 20452.2)." in refused
    assert refused.index("What would do") < refused.index("have not turned once")
    way_out = found(raised, 512, *yarn(2, 256), "--rope.theta", "20452.2")
    assert (way_out.refused, way_out.warnings) == ({}, [])

    # YaRN's factor 2 of 128 and a base for twice as much: together 4 times, which is what 512 needs
    plain = RopeArgs(1e4, max_position_embeddings=128)
    both = found(plain, 512, *yarn(2, 128), "--rope.theta", "20452.2")
    assert (both.refused, both.warnings) == ({}, []) and "enough for 512 tokens" in both.line

    # a factor counted from the previous stage: both checks, each RoPE named once, and shorter rows are no way out
    scaled = RopeArgs(1e4, YarnScaling(4.0, 128), max_position_embeddings=512)
    text = not_allowed(stage("debugmodel", 1024), found(scaled, 1024, *yarn(2, 512)))
    assert text and "a factor is always against the length before any rescaling, 128 in every stage" in text
    assert text.count("theta 10000, yarn: factor 4, original") == 1 and text.count("yarn: factor 2, original") == 1
    assert "factor = 8" in text and "documents or rows" not in text and len(text) < 1050
    assert "is not enough even for those. What would do" in text
    assert "truncate true" in text and "cos and sin" not in text


def test_longrope_that_changes_its_short_list_is_told_which_number():
    args = FLAVORS["debugmodel"]
    grown = tuple(4 ** (j / 31) for j in range(32))
    before = RopeArgs(1e4, LongRopeScaling(128, grown, grown), max_position_embeddings=512)
    mixed = ["--rope.type", "longrope", "--rope.original_max_position_embeddings", "128", "--rope.mixed_window"]
    mixed += ["--rope.long_factor", *map(str, grown), "--data.packing", "best_fit"]

    def found(length: int) -> StageRope:
        config = stage("debugmodel", length, *mixed)
        rope = build_rope(config.rope, args.rope, 64, args.n_kv_heads, length, before)
        return stage_rope(config, replace(args, rope=rope), before)

    text = not_allowed(stage("debugmodel", 512), found(512))
    assert text and "in rows up to the original length: number 32 of short_factor was 4 and is 1)" in text
    assert "short_factor 1 to 4 (32 numbers) -> " in text and "short_factor 1 to 1 (32 numbers))" in text
    # for twice the rows: the long list by the NTK-aware rule, 2^(j / 31), and the short one as it was
    refused = found(1024).refused["beyond_trained"]
    assert "rope.long_factor = [1, 1.07, 1.15, " in refused and "8], short_factor = [1, 1.04573, " in refused
    assert "documents or rows" not in refused


def test_from_random_weights_nothing_is_refused():
    config = stage("llama3_8b", 128 * K)
    found = check_stage_rope(config, model_args(config), None, None)
    assert len(found.warnings) == 1 and "weights are random" in found.warnings[0] and "8,192" in found.warnings[0]
    config = stage("debugmodel", 1024)  # its length is not known
    assert not check_stage_rope(config, model_args(config), None, None).warnings


def test_what_is_not_known_is_said():
    config = stage("debugmodel", 1024)
    found = check_stage_rope(config, model_args(config), FLAVORS["debugmodel"].rope, None)
    assert "is not checked" in found.warnings[0] and "unknown length" in found.line


def test_the_line_says_reach_and_coverage():
    """ProLong's 8e6 at 64K: 8,192 * 16^(126/128) tokens by the slowest pair."""
    line = checked(stage("llama3_8b", 64 * K, "--rope.theta", "8e6")).line
    assert line.startswith("theta 8e+06; positions reach 65,536; the weights have theta 500000, trained to 8,192")
    assert line.endswith(f"enough for {8192 * 16 ** (126 / 128):,.0f} tokens")


def test_a_factor_that_was_switched_on_in_config_json_counts():
    """Qwen's YaRN: 32,768 trained, factor 4; rows of 128K are in reach, of 256K not."""
    weights = RopeArgs(1e6, YarnScaling(4.0, 32 * K), max_position_embeddings=32 * K)
    keys = ["--rope.type", "yarn", "--rope.factor", "4", "--rope.original_max_position_embeddings", "32768"]
    start = Start(Path("hf"), ("model",), None, FLAVORS["qwen2.5_7b"])
    config = stage("qwen2.5_7b", 128 * K, *keys)
    line = check_stage_rope(config, model_args(config, weights), weights, start).line
    assert "trained to 32,768 and good for 131,072 by their factor; starting from them" in line
    assert "this is enough for 131,072 tokens" in line
    config = stage("qwen2.5_7b", 256 * K, *keys)
    with pytest.raises(UserError, match="to 131,072 tokens by their factor, .* What would do: rope.factor = 8;"):
        check_stage_rope(config, model_args(config, weights), weights, start)


def test_the_key_makes_no_other_stage():
    assert keys_of(Rope)["allow"].decides == "nothing"


SOURCES = ["--data.sources.0.name", "a", "--data.sources.0.path", "a"]
TWO = [*SOURCES, "--data.sources.1.name", "b", "--data.sources.1.path", "b"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], 4096),
        (["--data.positions", "pose", "--data.target_seq_len", "65536"], 65536),
        ([*SOURCES, "--data.sources.0.max_length", "512"], 512),
        ([*SOURCES, "--data.sources.0.max_length", "512", "--data.positions", "continue"], 4096),
        ([*SOURCES, "--data.sources.0.max_length", "512", "--data.sources.0.separator", "<s>"], 4096),
        ([*SOURCES, "--data.sources.0.chunk_length", "256", "--data.sources.0.max_length", "512"], 256),
        ([*TWO, "--data.sources.0.max_length", "512"], 4096),
        ([*TWO, "--data.sources.0.max_length", "512", "--data.sources.1.chunk_length", "1024"], 1024),
    ],
)
def test_how_far_positions_reach(more: list[str], expected: int, tmp_path: Path):
    file = tmp_path / "stage.toml"
    count = 2 if "--data.sources.1.name" in more else 1 if "--data.sources.0.name" in more else 0
    file.write_text("[[data.sources]]\n" * count)
    assert reach(load_config(["--job.config_file", str(file), "--training.seq_len", "4096", *more])) == expected


def manifest(config: JobConfig, before: Any, stages_before: list[Any] | None = None) -> dict[str, Any]:
    """Of a checkpoint of that stage."""
    return {
        "stage": config.stage.name,
        "step": 1,
        "config": as_tables(config),
        "architecture": as_json(model_args(config, before)),
        "rope_before": as_json(before) if before else None,
        "stages_before": stages_before or [],
    }


def test_what_weights_were_trained_to():
    """From random weights the rows alone count, not the length in the flavor; from published ones theirs too."""
    fresh = manifest(stage("llama3_8b", 2048), None)
    assert fresh["architecture"]["rope"]["max_position_embeddings"] == 2048 and trained_length(fresh) == 2048
    fresh["architecture"]["rope"]["max_position_embeddings"] = 8192  # as an older version said
    assert trained_length(fresh) == 2048
    before = rope_of_weights(stage("llama3_8b", 4096), None, lineage(fresh), None)
    assert before and before.max_position_embeddings == 2048

    after = ["--stage.after", "first.toml", "--rope.allow", "beyond_trained"]
    second = manifest(stage("llama3_8b", 4096, *after), before, lineage(fresh))
    assert trained_length(second) == 4096 and [s["rope"]["max_position_embeddings"] for s in lineage(second)] == [
        2048,
        4096,
    ]
    third = manifest(stage("llama3_8b", 1024, *after), before, lineage(second))
    assert trained_length(third) == 4096, "a stage with shorter rows"

    in_hf = manifest(stage("llama3_8b", 2048, "--checkpoint.initial_load_in_hf"), FLAVORS["llama3_8b"].rope)
    assert trained_length(in_hf) == 8192
    assert trained_length(in_hf | {"rope_before": None}) == 8192, "an older manifest"
    assert trained_length(fresh | {"config": {}}) == 8192, "one that says nothing"


def test_a_chain_from_random_weights_is_judged_by_its_rows():
    """NeMo's: trained in rows of 2K, then 16K, with a flavor whose published weights know 8K."""
    fresh = manifest(stage("llama3_8b", 2048), None)
    config = stage("llama3_8b", 8192)
    before = rope_of_weights(config, None, lineage(fresh), None)
    start = Start(Path("step-1"), ("model",), fresh, model_args(stage("llama3_8b", 2048)))
    with pytest.raises(UserError, match="trained to 2,048 tokens, and rows reach position 8,192"):
        check_stage_rope(config, model_args(config, before), before, start)
    auto = stage("llama3_8b", 8192, "--rope.theta", "auto")
    args = model_args(auto, before)
    assert args.rope.theta == pytest.approx(5e5 * 4 ** (128 / 126))
    assert not check_stage_rope(auto, args, before, start).warnings


def test_a_folder_without_config_json_is_judged_by_the_flavor():
    config = stage("llama3_8b", 128 * K)
    start = Start(Path("hf"), ("model",), None, None)
    before = rope_of_weights(config, None, [], start)
    assert before == FLAVORS["llama3_8b"].rope
    with pytest.raises(UserError, match="trained to 8,192 tokens"):
        check_stage_rope(config, model_args(config, before), before, start)


@pytest.mark.parametrize(
    "keys",
    [
        ["--rope.theta", "1e300"],
        ["--rope.type", "ntk", "--rope.factor", "1e300"],
        ["--rope.type", "linear", "--rope.factor", "1e20"],
        ["--rope.type", "yarn", "--rope.factor", "1e300", "--rope.original_max_position_embeddings", "8192"],
    ],
)
def test_numbers_with_which_no_pair_turns_are_refused(keys: list[str]):
    """They ended in an OverflowError or a ZeroDivisionError in the checks that follow."""
    with pytest.raises(UserError, match=r"^\[rope\] and the model: RoPE with .* one of these numbers is wrong"):
        checked(stage("llama3_8b", 8 * K, *keys))


def test_heads_of_one_pair_are_refused():
    with pytest.raises(UserError, match="Heads of 2 have one pair"):
        build_rope(Rope(), RopeArgs(), 2, 1, 8 * K)
