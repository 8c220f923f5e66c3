"""The check at start-up finds what it is there to find: faults planted into the real code, one at a time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import torchtitan.components.build as build_module
from tests.distributed.harness import flags, run_stage, spawn, write_assets
from torchtitan.attention.backends import Mask
from torchtitan.attention.segments import Segments
from torchtitan.distributed import parallelize as parallelize_module
from torchtitan.distributed import self_check as self_check_module
from torchtitan.distributed.context_parallel import exchange as exchange_module
from torchtitan.distributed.context_parallel import local_batch as local_batch_module
from torchtitan.tools.errors import UserError

real_local_batch, real_train = local_batch_module.local_batch, build_module.train_micro_batch


def positions_not_sharded() -> Any:
    """Every rank gives RoPE the positions of the stream's first tokens."""

    def local_batch(batch, *rest, **named):
        local = real_local_batch(batch, *rest, **named)
        return replace(local, positions=batch.positions[: len(local.positions)].clone())

    return patch.object(self_check_module, "local_batch", local_batch)


def documents_ignored() -> Any:
    """The mask is causal over the whole stream."""
    whole = SimpleNamespace(whole=lambda cu, **_: Segments.whole((0, int(cu[-1]))))
    return patch.object(local_batch_module, "Segments", whole)


def gathered_on_the_wrong_dimension() -> Any:
    """What has arrived is read as if it lay side by side instead of end to end."""
    real = exchange_module.Permute.forward

    def forward(ctx, x, place, inverse):
        blocks = real(ctx, x, place, inverse)
        return blocks.transpose(0, 1).reshape(blocks.shape)

    return patch.object(exchange_module.Permute, "forward", staticmethod(forward))


def loss_divided_by_cp() -> Any:
    return patch.object(
        build_module, "train_micro_batch", lambda model, batch, valid: real_train(model, batch, 2 * valid)
    )


def layout_not_undone() -> Any:
    """Keys stay in the order in which they came from the ranks."""

    def forward(ctx, x, place, inverse):
        ctx.inverse = torch.arange(len(x))
        return x.clone()

    return patch.object(exchange_module.Permute, "forward", staticmethod(forward))


def gradients_not_returned() -> Any:
    """Keys and values used elsewhere get no gradient from there."""
    return patch.object(exchange_module.Transfer, "collect", lambda self, x, blocks: x.new_zeros(blocks, *x.shape[1:]))


def labels_of_a_neighbour() -> Any:
    def local_batch(batch, *rest, **named):
        local = real_local_batch(batch, *rest, **named)
        return replace(local, labels=local.labels.roll(1))

    return patch.object(self_check_module, "local_batch", local_batch)


def with_masks(change: Any) -> Any:
    """Every batch has the masks that change(masks) returns in place of some of its own."""

    def local_batch(batch, *rest, **named):
        local = real_local_batch(batch, *rest, **named)
        return replace(local, masks={**local.masks, **change(local.masks)})

    return patch.object(self_check_module, "local_batch", local_batch)


def one_token_wide(mask: Mask) -> Mask:
    """Segments that reach one token into the previous document."""
    wider = replace(mask.segments, k_start=(mask.segments.k_start - 1).clip(0))
    return replace(mask, segments=wider, prepared=wider)


def mask_one_token_wide() -> Any:
    return with_masks(lambda masks: {"full_attention": one_token_wide(masks["full_attention"])})


def windows_ignored() -> Any:
    """Layers with a window have the mask of those without, under its name."""

    def change(masks):
        full, window = masks["full_attention"], masks["sliding_attention"].segments.window
        return {"sliding_attention": replace(full, segments=replace(full.segments, window=window))}

    return with_masks(change)


def window_one_token_wide() -> Any:
    """The window's segments reach one token into the previous document; those of the other layers do not."""
    return with_masks(lambda masks: {"sliding_attention": one_token_wide(masks["sliding_attention"])})


def window_too_wide() -> Any:
    """Windows of one token more, if all layers have one."""

    def change(masks):
        mask = masks["sliding_attention"]
        wider = replace(mask.segments, window=mask.segments.window + 1)
        return {"sliding_attention": replace(mask, prepared=wider)}

    return with_masks(change)


def anchor_of_the_other_row() -> Any:
    """All documents of a micro-batch share the first row's anchor."""

    def local_batch(batch, *rest, **named):
        return real_local_batch(replace(batch, anchor=batch.anchor.clamp(max=0)), *rest, **named)

    return patch.object(self_check_module, "local_batch", local_batch)


def anchors_ignored() -> Any:
    def local_batch(batch, *rest, **named):
        return real_local_batch(replace(batch, anchor=None), *rest, **named)

    return patch.object(self_check_module, "local_batch", local_batch)


def fp8_scale_lost() -> Any:
    """One of the layers in FP8 gives twice what it should."""
    real = parallelize_module.apply_quantize

    def apply_quantize(model, *rest):
        real(model, *rest)
        model.layers["1"].feed_forward.w2.register_forward_hook(lambda module, inputs, output: 2 * output)

    return patch.object(parallelize_module, "apply_quantize", apply_quantize)


PLANTED = {
    "positions not sharded": (positions_not_sharded, "parity"),
    "documents ignored": (documents_ignored, "perturbation"),
    "gathered on the wrong dimension": (gathered_on_the_wrong_dimension, "perturbation|parity"),
    "loss divided by cp": (loss_divided_by_cp, "loss scale: .* 0.5000 times"),
    "layout not undone": (layout_not_undone, "perturbation|parity"),
    "gradients not returned": (gradients_not_returned, "parity"),
    "labels of a neighbour": (labels_of_a_neighbour, "perturbation|parity"),
    "mask one token wide": (mask_one_token_wide, "perturbation"),
}
WITH_WINDOWS = {
    "windows ignored": (windows_ignored, "parity"),
    "window one token wide": (window_one_token_wide, "perturbation"),
}
ALL_WINDOWS = {"window too wide": (window_too_wide, "perturbation")}
WITH_ANCHORS = {
    "anchor of the other row": (anchor_of_the_other_row, "perturbation: .* anchor .* of another"),
    "anchors ignored": (anchors_ignored, "perturbation: .* did not move"),
}
IN_FP8 = {"FP8 scale lost": (fp8_scale_lost, "parity: FP8|loss scale: .* 2")}
FAULTS = IN_FP8 | PLANTED | WITH_WINDOWS | ALL_WINDOWS | WITH_ANCHORS


def run_with_fault(case: tuple[str | None, list[str]], rank: int, world_size: int) -> str:
    import torch.distributed as dist

    fault, args = case
    try:
        if fault is None:
            run_stage(args, rank, world_size)
        else:
            with FAULTS[fault][0]():
                run_stage(args, rank, world_size)
    except UserError as e:
        dist.destroy_process_group()
        return str(e)
    return "trained"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("self-check")


def test_planted_faults_are_caught_and_named(folder: Path):
    checked = {"parallelism__self_check": True, "parallelism__context_parallel_degree": 2}
    options = checked | {"training__steps": 2, "training__local_batch_size": 4}
    args = flags(folder, write_assets(folder), **options)
    layout = ["--parallelism.context_parallel_layout"]
    z_loss = [*args, "--training.z_loss", "0.01"]  # what is trained on beside the loss is not what is compared
    cases: list[tuple[str | None, list[str]]] = [(None, z_loss)]
    windows = flags(folder, write_assets(folder, "olmo3"), **options)
    all_windows = flags(folder, write_assets(folder, "mistral"), **options)
    anchors = [*args, "--data.anchor_attention", "true", "--data.positions", "continue"]
    fp8 = [
        *args,
        "--quantize.recipe_name",
        "rowwise",
        "--quantize.emulate",
        "true",
        "--quantize.smallest_features",
        "16",
    ]
    cases.append((None, fp8))
    kinds = (
        (IN_FP8, fp8),
        (PLANTED, args),
        (WITH_WINDOWS, windows),
        (ALL_WINDOWS, all_windows),
        (WITH_ANCHORS, anchors),
    )
    for faults, arguments in kinds:
        for fault in faults:
            # the exchange that fetches all keys has a layout to undo on every batch, `needed` perhaps none on a small
            exchange = ["headtail", "--parallelism.context_parallel_exchange", "allgather"]
            cases.append((fault, [*arguments, *layout, *exchange]))
    cases.append(("documents ignored", [*args, "--parallelism.self_check", "false"]))
    results = spawn(2, run_with_fault, cases, folder)
    sound = [results[0], results[1], results[-1]]
    assert sound == ["trained"] * 3, f"it passes what is sound, and can be switched off: {sound}"
    for (fault, _), message in zip(cases[2:-1], results[2:-1], strict=True):
        assert fault is not None
        assert message != "trained", f"{fault}: not noticed"

        assert re.search(FAULTS[fault][1], message), f"{fault}: {message}"
        assert "cp 2" in message and "layout headtail" in message and "exchange allgather" in message
