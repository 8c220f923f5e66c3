"""The closed form for FLOPs against PyTorch's own counter, which sees each allowed pair and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from torchtitan.attention.backends import BACKENDS, Backend
from torchtitan.attention.segments import Segments
from torchtitan.config.schema import ActivationCheckpoint, JobConfig, Training
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.options.tiled_mlp import apply_tiled_mlp
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights
from torchtitan.models.work import forward_flops, recomputed_by, training_flops, work_of

ARGS = TransformerArgs(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48, vocab_size=64)
WINDOWS = replace(ARGS, layer_types=("sliding_attention", "full_attention", "sliding_attention"), sliding_window=5)
ENDS = (0, 7, 8, 29, 48)
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])  # PyTorch leaves it uncounted


def query_by_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """The dense oracle, computed for each query on the keys that its mask allows and on nothing else."""
    repeat, mask = q.shape[1] // k.shape[1], segments.dense_mask()
    heads = [x.transpose(0, 1).repeat_interleave(n, dim=0) for x, n in ((q, 1), (k, repeat), (v, repeat))]
    outs = []
    for i, allowed in enumerate(mask):
        keys, values = (x[:, allowed] for x in heads[1:])
        scores = heads[0][:, i : i + 1] @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
        outs.append((scores.softmax(-1) @ values)[:, 0])
    return torch.stack(outs)


def model_of(args: TransformerArgs, backend: str) -> Transformer:
    model = Transformer(args, backend)
    init_weights(model, 0)
    return model


def pairs_of(args: TransformerArgs) -> float:
    full = Segments.whole(ENDS)
    sliding = replace(full, window=args.sliding_window).attended_pairs if args.sliding_window else 0
    return full.attended_pairs * (1 - args.sliding_share) + sliding * args.sliding_share


def counted(model: Transformer, counter: Any = None) -> float:
    """FLOPs of forward and backward on the documents of ENDS."""
    counter = counter or FlopCounterMode(display=False)
    tokens = torch.arange(ENDS[-1])
    positions = torch.cat([torch.arange(b - a) for a, b in zip(ENDS, ENDS[1:])])
    with counter:
        loss, _ = model(tokens, positions, Segments.whole(ENDS), labels=(tokens + 1) % 64, divisor=48.0)
        loss.backward()
    return float(counter.get_total_flops())


class Operators(TorchDispatchMode):
    """PyTorch's counts without its table by modules, which cannot be made where a module runs inside of backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result

    def get_total_flops(self) -> int:
        return self.total


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "exact", Backend(BACKENDS["dense"].prepare, query_by_query))


@pytest.mark.parametrize(
    "args",
    [ARGS, WINDOWS, replace(ARGS, n_kv_heads=4, tied_embeddings=True), replace(ARGS, post_norm=True, qk_norm=True)],
    ids=["grouped", "windows", "tied", "post_norm"],
)
def test_masked_flops_equal_those_counted(exact: None, args: TransformerArgs):
    """Documents, grouped queries and windows: to the last FLOP, forward, backward and the loss head."""
    work = work_of(args)
    assert counted(model_of(args, "exact")) == training_flops(work.parameters, ENDS[-1], work.width, pairs_of(args))


RECOMPUTATIONS = {
    "full": (ActivationCheckpoint(mode="full"), None),
    "every second": (ActivationCheckpoint(mode="selective", selective_ac_option="2"), None),
    "full, tiles": (ActivationCheckpoint(mode="full"), 16),
    "tiles": (ActivationCheckpoint(mode="none"), 16),
}


@pytest.mark.parametrize("name", RECOMPUTATIONS)
@pytest.mark.parametrize("post_norm", [False, True])
def test_recomputed_flops_equal_those_counted(exact: None, name: str, post_norm: bool):
    args = replace(ARGS, post_norm=post_norm)
    checkpointing, tile = RECOMPUTATIONS[name]
    model = model_of(args, "exact")
    if tile:
        apply_tiled_mlp(model, tile, 1)
    if checkpointing.mode != "none":
        apply_activation_checkpoint(model, checkpointing)
    config = JobConfig(activation_checkpoint=checkpointing, training=Training(mlp_tile_tokens=tile))
    work, again = work_of(args), recomputed_by(config, args)
    expected = training_flops(work.parameters, ENDS[-1], work.width, pairs_of(args))
    expected += forward_flops(again.parameters, ENDS[-1], again.width, pairs_of(args))
    assert counted(model, Operators()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("every", [0, 2, 3])
def test_selective_recomputation_is_counted_but_for_what_is_kept(every: int):
    """sdpa's kernel, on documents whose masks are plain causal: the counter sees whole squares of each."""
    checkpointing = ActivationCheckpoint(mode="selective", selective_ac_option="op", selective_ac_matmuls=every)
    plain, model = model_of(ARGS, "sdpa"), model_of(ARGS, "sdpa")
    apply_activation_checkpoint(model, checkpointing)
    again = recomputed_by(JobConfig(activation_checkpoint=checkpointing), ARGS)
    assert again.width == 0
    assert counted(model) - counted(plain) == forward_flops(again.parameters, ENDS[-1], 0, 0)


def test_the_dense_oracle_is_counted_whole():
    """It computes all T x T pairs: what counting without the mask would give."""
    work = work_of(ARGS)
    expected = training_flops(work.parameters, ENDS[-1], work.width, ENDS[-1] ** 2)
    assert counted(model_of(ARGS, "dense")) == expected
