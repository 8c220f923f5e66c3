"""AdamW's groups and state, gradient clipping, and the learning-rate schedule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from torchtitan.components.lr_scheduler import lr_factor
from torchtitan.components.optimizer import build_optimizer, clip_gradients, optimizer_state
from torchtitan.config.schema import LRScheduler, Optimizer

pytestmark = pytest.mark.usefixtures("one_process")


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": nn.Linear(4, 3), "norm": nn.RMSNorm(3)})


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_equals_pytorchs_own_adamw(implementation: str):
    """The state that is made up front is the one that AdamW would have made."""
    config = Optimizer(lr=0.1, implementation=implementation, weight_decay=0.3)
    ours, theirs = two_layers(), two_layers()
    a = build_optimizer(ours, config)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    weights = torch.randn(5, 3)
    for _ in range(3):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            (weights * model["norm"](model["layer"](torch.arange(20.0).view(5, 4)))).sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    state = optimizer_state(ours, a)
    assert set(state) == {
        f"{n}.{k}" for n in ("layer.weight", "layer.bias", "norm.weight") for k in ("step", "exp_avg", "exp_avg_sq")
    }
    assert state["layer.weight.step"] == 3 and state["layer.weight.exp_avg_sq"].any()


@pytest.mark.parametrize("implementation", ["fused", "for-loop"])
def test_moments_in_bfloat16_follow_those_in_float32(implementation: str):
    """Rounded once a step to 8 bits, while what is computed of them and the parameters are float32: the moments stay
    within their accumulated rounding of the exact ones, and each step within that of the exact step."""
    models = two_layers(), two_layers()
    optimizers = [
        build_optimizer(model, Optimizer(lr=0.1, state_dtype=dtype, implementation=implementation))
        for model, dtype in zip(models, ("bfloat16", "float32"), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        gradients = [torch.randn(p.shape, generator=generator) for p in models[0].parameters()]
        for model, optimizer in zip(models, optimizers, strict=True):
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    narrow, wide = (optimizer_state(m, o) for m, o in zip(models, optimizers, strict=True))
    for name, value in wide.items():
        stored = narrow[name]
        if name.endswith("step"):
            assert stored == 30
            continue
        assert stored.dtype == torch.bfloat16
        # each of up to 1 / (1 - beta) remembered steps rounds by 2^-9 of what was there
        remembered = 10 if name.endswith("exp_avg") else 20
        assert ((stored.float() - value).abs() <= remembered * 2**-9 * value.abs().max()).all(), name
        assert not torch.equal(stored.float(), value)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert p.dtype == torch.float32
        assert 0 < (p - q).abs().max() < 30 * 0.1 * 0.05  # of 30 steps of 0.1 at most


def test_moments_of_the_parameters_type_are_pytorchs_own():
    """The fused kernel works on whole groups; only mixed types need steps parameter by parameter."""
    assert type(build_optimizer(two_layers(), Optimizer(state_dtype="float32"))) is torch.optim.AdamW
    assert type(build_optimizer(two_layers().bfloat16(), Optimizer(state_dtype="bfloat16"))) is torch.optim.AdamW
    mixed = build_optimizer(two_layers().bfloat16(), Optimizer(state_dtype="float32"))
    assert {value.dtype for state in mixed.state.values() for value in state.values()} == {torch.float32}


def test_no_decay_patterns():
    """With a gradient of zero, decay is all that moves a parameter."""
    model = two_layers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, Optimizer(lr=0.1, weight_decay=0.5, no_decay=("*norm*", "*bias")))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"layer.weight"}


def test_clipping_scales_to_the_norm_and_leaves_small_gradients():
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    for scale, max_norm in ((1.0, 2.0), (1.0, 100.0), (1.0, 0.0), (1e-3, 2.0)):
        for i, p in enumerate(params[:2]):
            p.grad = torch.full_like(p, scale * (i + 1))
        expected = scale * math.sqrt(3 * 1 + 4 * 4)
        assert clip_gradients(params, max_norm, dist.group.WORLD) == pytest.approx(expected, rel=1e-6)
        after = math.sqrt(sum(p.grad.square().sum().item() for p in params[:2]))
        assert after == pytest.approx(min(expected, max_norm or math.inf), rel=1e-5)


def test_clipping_is_exact_on_large_matrices():
    """A float32 sum of 4M squares is off in the fifth digit."""
    p = nn.Parameter(torch.zeros(2048, 2048))
    p.grad = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    expected = p.grad.double().square().sum().sqrt().item()
    assert clip_gradients([p], 0.0, dist.group.WORLD) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_reported(bad: float):
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, bad, 1.0])
    assert not math.isfinite(clip_gradients([p], 1.0, dist.group.WORLD))


def factors(steps: int, **options) -> list[float]:
    return [lr_factor(step, steps, LRScheduler(**options)) for step in range(1, steps + 1)]


def test_warmup_then_decay_to_the_end():
    f = factors(100, warmup_steps=10)
    assert f[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert all(a > b for a, b in zip(f[10:], f[11:], strict=False))
    assert f[10] == 1.0 and f[-1] == pytest.approx(1 / 90)


def test_warmup_stable_decay():
    f = factors(100, warmup_steps=10, decay_ratio=0.2)
    assert f[9:81] == [1.0] * 72 and f[81] < 1.0 and f[-1] == pytest.approx(1 / 20)
    assert factors(50, warmup_steps=0, decay_ratio=0.0) == [1.0] * 50


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "sqrt"])
def test_decay_stays_between_the_ends(decay_type: str):
    f = factors(1000, warmup_steps=100, decay_type=decay_type, min_lr_factor=0.1)
    assert max(f) == 1.0 and 0.1 < f[-1] < 0.11
    assert all(a >= b for a, b in zip(f[100:], f[101:], strict=False))
    halfway = f[100 + 450]  # progress 1/2
    assert halfway == pytest.approx(0.1 + 0.9 * {"linear": 0.5, "cosine": 0.5, "sqrt": 1 - 0.5**0.5}[decay_type])
