"""What [model] names: a flavor, a config.json, or an architecture of the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from torchtitan.config.schema import Model
from torchtitan.models.flavor import architecture
from torchtitan.models.registry import FLAVORS
from torchtitan.tools.errors import UserError


def test_a_flavor_and_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_models.py").write_text(
        "from torchtitan.models.transformer import TransformerArgs\n"
        "TINY = TransformerArgs(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, vocab_size=50)\n"
        "WRONG = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert architecture(Model(flavor="llama3_8b")) is FLAVORS["llama3_8b"]
    args = architecture(Model(flavor="my_own_models:TINY"))
    assert (args.dim, args.n_layers, args.vocab_size) == (32, 2, 50)


@pytest.mark.parametrize(
    ("flavor", "says"),
    [
        ("llama9", r'"llama9" is not known; use auto, "module:NAME" .* or one of debugmodel, llama_7b'),
        ("my_own_models:", 'must be a flavor or "module:NAME"'),
        ("no_such_module:TINY", "there is no module no_such_module. It must be on PYTHONPATH"),
        ("math:TINY", "math does not have TINY; it must be a torchtitan.models.transformer.TransformerArgs"),
        ("math:pi", "math has pi as a float; it must be"),
    ],
)
def test_what_is_wrong_with_a_flavor_is_said(flavor: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        architecture(Model(flavor=flavor))


@pytest.mark.parametrize("heads", [{"head_dim": 31}, {"n_heads": 4, "n_kv_heads": 3}])
def test_heads_that_cannot_be_rotated_or_grouped_are_refused(heads: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"head_dim = \d+ must be even, and n_heads = \d+ a multiple of n_kv_heads"):
        replace(FLAVORS["debugmodel"], **heads)  # type: ignore[arg-type]
