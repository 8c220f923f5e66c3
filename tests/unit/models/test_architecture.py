"""The architecture in a manifest comes back as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from torchtitan.models.architecture import args_from_manifest, as_json
from torchtitan.models.registry import FLAVORS
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_method import Scaling
from torchtitan.models.rope_scaling import (
    DynamicNTKScaling,
    GeneScaling,
    HarpeScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    YarnScaling,
    methods,
)
from torchtitan.tools.errors import UserError

SCALINGS = [
    LinearScaling(2.5),
    NTKScaling(8.0),
    DynamicNTKScaling(10.0, 8192, 81920),
    Llama3Scaling(8.0, 1.0, 4.0, 8192),
    YarnScaling(16.0, 4096, 4.0, 2.0, False, 1.25, 0.5, 0.7),
    LongRopeScaling(8192, (1.0, 2.5), (1.0, 1.0), None, 16.0),
    GeneScaling(16.0, 4096),
    HarpeScaling((1e6, 2e6)),
]


@pytest.mark.parametrize("scaling", [None, *SCALINGS], ids=lambda s: type(s).__name__)
def test_round_trip(scaling: Scaling | None):
    args = replace(FLAVORS["qwen3_0.6b"], rope=RopeArgs(5e5, scaling, "full_attention", 131072))
    assert args_from_manifest(json.loads(json.dumps(as_json(args)))) == args
    assert {type(s) for s in SCALINGS} == set(methods()), "a method is missing here"


def test_older_and_newer_manifests():
    manifest = as_json(FLAVORS["llama3_8b"])
    del manifest["qk_norm"], manifest["rope"]["layers"]
    assert args_from_manifest(manifest) == FLAVORS["llama3_8b"]
    with pytest.raises(UserError, match="mixture_of_experts = 8"):
        args_from_manifest(manifest | {"mixture_of_experts": 8})
    with pytest.raises(UserError, match='rope_type = "spiral"'):
        args_from_manifest(manifest | {"rope": {"theta": 1.0, "scaling": {"rope_type": "spiral"}}})
