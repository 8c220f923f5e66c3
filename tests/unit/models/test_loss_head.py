"""The tiled loss against PyTorch's cross-entropy on whole logits: values, gradients, ignored labels, z-loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchtitan.models import loss_head
from torchtitan.models.loss_head import OutputHead
from torchtitan.tools.constants import IGNORED_LABEL

TOKENS, DIM, WORDS = 600, 24, 97


def inputs(dtype: torch.dtype = torch.float64) -> tuple[OutputHead, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(DIM, WORDS).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(WORDS, DIM, generator=generator))
    x = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) < 0.3] = IGNORED_LABEL
    labels[:140] = IGNORED_LABEL  # a whole tile of them
    return head, x, labels


def run(head: OutputHead, x: torch.Tensor, labels: torch.Tensor, **changes: Any) -> list[torch.Tensor]:
    """Loss, token losses, gradients of x and of the matrix."""
    for key, value in changes.items():
        setattr(head, key, value)
    x.grad = head.weight.grad = None
    loss, losses = head(x, labels, 50.0)
    assert not losses.requires_grad
    (loss * 3).backward()
    assert x.grad is not None and head.weight.grad is not None
    return [loss.detach(), losses, x.grad, head.weight.grad]


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_it_is_cross_entropy(z_loss: float):
    head, x, labels = inputs()
    ours = run(head, x, labels, tile_bytes=1, z_loss=z_loss)  # tiles of 128 tokens, the last one of 88
    x.grad = head.weight.grad = None
    logits = F.linear(x, head.weight)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
    penalty = z_loss * (logits.logsumexp(-1).square() * (labels != IGNORED_LABEL)).sum()
    loss = (losses.sum() + penalty) / 50
    (loss * 3).backward()
    for mine, expected in zip(ours, [loss, losses, x.grad, head.weight.grad], strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-12, atol=1e-12)


def test_tiles_change_nothing_and_no_logits_are_kept(monkeypatch: pytest.MonkeyPatch):
    head, x, labels = inputs()
    largest = []
    real = F.linear

    def spy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        largest.append(len(a))
        return real(a, b)

    monkeypatch.setattr(loss_head.F, "linear", spy)
    whole = run(head, x, labels, tile_bytes=1 << 30)
    assert largest == [TOKENS]
    tiled = run(head, x, labels, tile_bytes=256 * WORDS * 4)
    assert largest[1:] == [256, 256, 88]
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_sixteen_bits_are_summed_in_thirty_two():
    head, x, labels = inputs(torch.bfloat16)
    _, losses, _, grad = run(head, x, labels, tile_bytes=1)
    assert losses.dtype == torch.float32 and grad.dtype == torch.bfloat16
    head64, x64 = OutputHead(DIM, WORDS).double(), x.detach().double().requires_grad_()
    with torch.no_grad():
        head64.weight.copy_(head.weight)
    exact = run(head64, x64, labels)
    torch.testing.assert_close(losses.double(), exact[1], rtol=0, atol=0.15)  # logits of 20 are rounded to 1/8
    error = (grad.double() - exact[3]).norm() / exact[3].norm()
    assert error < 0.01


def test_nothing_is_differentiated_without_need(monkeypatch: pytest.MonkeyPatch):
    """Nor computed: under no_grad a parameter still says that it needs a gradient."""
    head, x, labels = inputs()
    assert head.weight.requires_grad
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(loss_head.torch, "mm", lambda *a, **k: pytest.fail("a gradient was computed"))
        loss, losses = head(x, labels, 50.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, losses.sum() / 50)
