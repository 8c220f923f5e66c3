"""What the tiled loss costs in collectives: the head is gathered and reduced once, however many tiles there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import TINY, Collectives, flags, spawn, write_assets
from torchtitan.components.loss import train_micro_batch
from torchtitan.config import load_config
from torchtitan.extensions.wiring import build_trainer
from torchtitan.models import loss_head


def count(args: list[str], rank: int, world_size: int) -> dict[str, int]:
    """Collectives of the second micro-batch (the first one sets FSDP up), and its tiles of the loss."""
    config = load_config(args)
    trainer = build_trainer(config, rank, rank, world_size)
    first, second = next(trainer.batches), next(trainer.batches)
    train_micro_batch(trainer.model, first, 100.0)
    tiles, real = 0, loss_head._TiledLoss.apply

    def spy(x: torch.Tensor, *others: Any) -> Any:
        nonlocal tiles
        tiles += -(-len(x) // others[3])
        return real(x, *others)

    with pytest.MonkeyPatch.context() as patch, Collectives() as seen:
        patch.setattr(loss_head._TiledLoss, "apply", spy)
        train_micro_batch(trainer.model, second, 100.0)
    trainer.close()
    return {**seen.counts, "tiles": tiles}


def test_the_head_is_gathered_and_reduced_once_whatever_the_tiles(tmp_path: Path):
    """1 MiB of float32 logits of 4,096 words are 64 tokens, of which a tile has at least 128."""
    assets = write_assets(tmp_path)
    rows = {"training__local_batch_size": 4}
    cases = [flags(tmp_path, assets, **rows, training__loss_tile_mib=mib) for mib in (1024, 1)]
    one_tile, four_tiles = spawn(2, count, cases, tmp_path)
    assert one_tile.pop("tiles") == 1 and four_tiles.pop("tiles") == 4
    assert one_tile == four_tiles
    # blocks and embedding are gathered again for backward, norm and head are not
    groups = TINY["num_hidden_layers"] + 2
    assert four_tiles["_reduce_scatter_base_"] == groups
    assert four_tiles["_allgather_base_"] == 2 * (TINY["num_hidden_layers"] + 1) + 1
