"""Published config.json files, read here and by transformers, with the numbers of their model cards.

published.json has for each: the file (verbatim, or rebuilt from what its source quotes), where it was found, the
parameters in billions as the hub shows them, the trained length and theta.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.models.hf.readings import differences, here, in_transformers
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.config_out import config_json
from torchtitan.models.registry import FLAVORS
from torchtitan.models.transformer import parameter_counts

PUBLISHED: dict[str, dict[str, Any]] = {
    entry["name"]: entry for entry in json.loads(Path(__file__).with_name("published.json").read_text())
}
SAME_AS_FLAVOR = {
    "meta-llama/Llama-2-7b-hf": "llama2_7b",
    "meta-llama/Llama-2-70b-hf": "llama2_70b",
    "meta-llama/Meta-Llama-3-8B": "llama3_8b",
    "meta-llama/Meta-Llama-3-70B": "llama3_70b",
    "meta-llama/Meta-Llama-3.1-8B": "llama3.1_8b",
    "meta-llama/Meta-Llama-3.1-70B": "llama3.1_70b",
    "meta-llama/Meta-Llama-3.1-405B": "llama3.1_405b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama3.2_1b",
    "mistralai/Mistral-7B-v0.3": "mistral_7b_v0.3",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5_7b",
    "Qwen/Qwen3-0.6B": "qwen3_0.6b",
    "Qwen/Qwen3-8B": "qwen3_8b",
    "HuggingFaceTB/SmolLM2-135M": "smollm2_135m",
    "HuggingFaceTB/SmolLM2-1.7B": "smollm2_1.7b",
}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[request.param]["config"]))
    return tmp_path


def rounded(billions: float) -> float:
    """To three digits, as the hub shows them."""
    return float(f"{billions:.3g}")


@pytest.mark.parametrize(("folder", "name"), [(name, name) for name in PUBLISHED], indirect=["folder"], ids=PUBLISHED)
def test_is_read_as_transformers_reads_it(folder: Path, name: str):
    entry = PUBLISHED[name]
    args = read_config(folder)
    assert not differences(in_transformers(folder, (1000, 4096)), here(folder, (1000, 4096)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    count = parameter_counts(args)[0]
    assert count == sum(math.prod(parameter.shape) for parameter in model.parameters())
    digits = entry["billions"]
    assert rounded(count / 1e9) == pytest.approx(digits, abs=0.051 if digits == 7.3 else 1e-9), "the published size"
    assert args.rope.max_position_embeddings == entry["length"], "the trained length"
    assert args.rope.theta == entry["theta"]


@pytest.mark.parametrize(("folder", "name"), [(name, name) for name in PUBLISHED], indirect=["folder"], ids=PUBLISHED)
def test_its_export_says_the_same(folder: Path, name: str):
    """To transformers and, with the trained length, to us: nothing has been trained."""
    args = read_config(folder)
    published = in_transformers(folder, (1000, 4096))
    (folder / "config.json").write_text(json.dumps(config_json(args, "bfloat16", PUBLISHED[name]["config"])))
    assert not differences(published, in_transformers(folder, (1000, 4096)))
    assert not differences(published, here(folder, (1000, 4096)))
    assert read_config(folder).rope.max_position_embeddings == args.rope.max_position_embeddings


@pytest.mark.parametrize(("folder", "flavor"), SAME_AS_FLAVOR.items(), indirect=["folder"], ids=SAME_AS_FLAVOR)
def test_a_flavor_is_its_published_file(folder: Path, flavor: str):
    assert read_config(folder) == FLAVORS[flavor]
