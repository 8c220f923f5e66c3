"""FP8 layers: which they are, how far their products may be off, what is refused and with which advice."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from torchtitan.config.schema import Quantize
from torchtitan.distributed.options.quantize import apply_quantize, check_quantize, describe_quantize, fp8_layers
from torchtitan.models.registry import FLAVORS
from torchtitan.models.transformer import Transformer, TransformerArgs
from torchtitan.tools.errors import UserError

ARGS = TransformerArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=256)
EMULATED = Quantize("rowwise", smallest_features=16, emulate=True)
# Half of the spacing of numbers, relative to them: 3 and 2 bits of mantissa.
E4M3, E5M2 = 2**-4, 2**-3


def product(a: torch.Tensor, b: torch.Tensor, round_a: float, round_b: float, found: torch.Tensor) -> float:
    """The largest error of `found` as a share of what rounding each factor by so much can do at most."""
    bound = (a.abs() @ b.abs()) * ((1 + round_a) * (1 + round_b) - 1)
    # numbers below the smallest normal ones are rounded absolutely: at most 2**-10 of their scale's unit, 1/224 of the
    # largest where scales are powers of two
    for x, y in ((a, b), (b.t(), a.t())):
        tiny = x.abs().max() / 224 * 2**-10 * y.abs().sum(0, keepdim=True)
        bound = bound + (tiny if y is b else tiny.t())
    return float(((found - a @ b).abs() / bound).max().detach())


@pytest.mark.parametrize("recipe, of_gradients", [("rowwise", E4M3), ("tensorwise", E5M2)])
def test_the_three_products_are_within_the_bound_of_their_roundings(recipe, of_gradients):
    torch.manual_seed(0)
    model = Transformer(ARGS)
    exact = model.layers["0"].feed_forward.w1
    apply_quantize(model, replace(EMULATED, recipe_name=recipe), tp=1)
    layer = model.layers["0"].feed_forward.w1
    assert layer is not exact and layer.weight is exact.weight, "the parameter is the same object"
    x = torch.randn(128, 64) * torch.logspace(-2, 2, 128)[:, None]  # tokens of unlike size
    x.requires_grad_()
    grad, w = torch.randn(128, 96), layer.weight
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, w), grad)
    shares = [
        product(x, w.t(), E4M3, E4M3, y),
        product(grad, w, of_gradients, E4M3, dx),
        product(grad.t(), x, of_gradients, E4M3, dw),
    ]
    print(f"{recipe}: y, dx and dw are off by {shares} of what is allowed")
    for share in shares:
        assert 0.01 < share < 1, shares
    # one token grows a thousandfold: by rowwise no other one's output moves, by tensorwise they do
    larger = x.detach().clone()
    larger[127] *= 1000
    moved = int((layer(larger) != y).any(1)[:127].sum())
    assert moved == 0 if recipe == "rowwise" else moved > 100


def test_which_layers():
    args = FLAVORS["llama3.1_8b"]
    chosen = fp8_layers(args, Quantize("rowwise"))
    kinds = ("attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    assert {name for name, is_chosen in chosen.items() if is_chosen} == {
        f"layers.{i}.{kind}" for i in range(32) for kind in kinds
    }
    assert len(chosen) == 7 * 32, "keys and values, of 1024 features, are left out; head and embedding are not listed"
    # on 8 ranks wq gives 512 features, w1 1792; w2 takes 1792
    assert not any(fp8_layers(args, Quantize("rowwise"), tp=8).values())
    left_out = fp8_layers(args, Quantize("rowwise", filter_fqns=("attention.", "layers.3.")))
    assert left_out["layers.2.feed_forward.w2"] and left_out["layers.30.feed_forward.w2"]
    assert not left_out["layers.3.feed_forward.w2"] and not left_out["layers.2.attention.wq"]
    odd = replace(ARGS, ffn_dim=100)  # 100 is no multiple of 16
    assert not fp8_layers(odd, EMULATED)["layers.0.feed_forward.w1"]
    assert "attention.wq 2, attention.wk 2" in describe_quantize(ARGS, EMULATED, tp=1)
    model = Transformer(ARGS)
    apply_quantize(model, replace(EMULATED, filter_fqns=("wq",)), tp=1)
    kinds_of = {name: type(layer).__name__ for name, layer in model.named_modules() if hasattr(layer, "weight")}
    assert kinds_of["layers.1.attention.wk"] == "Float8Linear" and kinds_of["layers.1.attention.wq"] == "Linear"
    assert kinds_of["output"] == "OutputHead"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"filter_fqns": ("wx",)}, r'filter_fqns names "wx".*attention.wq, .*feed_forward.w3, N from 0 to 1'),
        ({"smallest_features": 4096}, r"would quantize no layer.*smallest_features = 4096"),
        ({"filter_fqns": ("layers",)}, r"would quantize no layer.*filter_fqns = \['layers'\]"),
        ({"recipe_name": "none"}, "quantizes nothing, but other keys"),
        ({"emulate": False}, r'"rowwise" needs a GPU.*has no GPU.*recipe_name = "none".*emulate = true'),
    ],
)
def test_what_is_refused(changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_quantize(ARGS, EMULATED, tp=1, tokens=100)
    check_quantize(ARGS, replace(EMULATED, filter_fqns=("output",)), tp=1, tokens=100)  # left out anyway
    with pytest.raises(UserError, match=message):
        check_quantize(ARGS, replace(EMULATED, **changes), tp=1, tokens=100)


def test_what_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    real = replace(EMULATED, emulate=False)
    with pytest.raises(UserError, match=r"A100 has compute capability 8\.0.*emulate = true"):
        check_quantize(ARGS, real, tp=1, tokens=128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_quantize(ARGS, real, tp=1, tokens=128)
    with pytest.raises(UserError, match=r"has 100 = 6 \* 16 \+ 4"):
        check_quantize(ARGS, real, tp=1, tokens=100)
    for tile, tp in ((32, 1), (1000, 1), (32, 2), (33, 2)):  # the second is not cut at all, the last as the third
        check_quantize(ARGS, real, tp=tp, tokens=128, mlp_tile_tokens=tile)
    with pytest.raises(UserError, match=r"mlp_tile_tokens = 40 makes tiles of 40: choose a multiple of 16"):
        check_quantize(ARGS, real, tp=1, tokens=128, mlp_tile_tokens=40)
    check_quantize(ARGS, EMULATED, tp=1, tokens=128, mlp_tile_tokens=40)


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"needs the package torchao.*pip install -e '.\[fp8\]'"):
        check_quantize(ARGS, EMULATED, tp=1, tokens=128)
