"""The planner's peak against the bytes of the tensors that a training step has alive, on real ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.distributed.harness import ASSETS, flags, spawn, write_text
from torchtitan.extensions.planner.live_memory import LiveBytes

LONG = {"seq_len": 1024, "loss_tile_mib": 1, "global_batch_size": 2, "mixed_precision_param": "float32"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"training__global_batch_size": 8, "training__local_batch_size": 2},
    "cp, full": {
        "parallelism__context_parallel_degree": 2,
        "activation_checkpoint__mode": "full",
        **{f"training__{key}": value for key, value in LONG.items()},
    },
    "tp, every second block, tiles": {
        "parallelism__tensor_parallel_degree": 2,
        "activation_checkpoint__mode": "selective",
        "activation_checkpoint__selective_ac_option": 2,
        "training__mlp_tile_tokens": 256,
        **{f"training__{key}": value for key, value in LONG.items()},
    },
}


def peaks(case: tuple[str, str, dict[str, Any]], rank: int, world_size: int) -> tuple[int, float]:
    """Bytes at the peak of the second step, the first having made what is made once; counted and planned."""
    from torchtitan.config import load_config
    from torchtitan.extensions.planner.memory import peak
    from torchtitan.extensions.planner.stage_numbers import numbers_of
    from torchtitan.extensions.wiring import inputs_of
    from torchtitan.trainer import Trainer

    folder, assets, overrides = case
    config = load_config(flags(Path(folder), Path(assets), **overrides))
    inputs = inputs_of(config, world_size)
    with LiveBytes() as live:
        trainer = Trainer(config, inputs, rank, rank, world_size)
        trainer.train_step()
        live.reset()
        trainer.train_step()
    trainer.close()
    return live.peak, peak(numbers_of(config, inputs.args, world_size, "cpu")).total


def test_planned_peak_is_what_is_allocated(tmp_path: Path):
    """Within 15%, with documents of up to some 400 tokens; the planner is told nothing of them."""
    assets = tmp_path / "assets"
    shutil.copytree(ASSETS, assets)
    write_text(tmp_path, documents=400)
    common = {
        "model__flavor": "debugmodel",
        "training__seq_len": 256,
        "training__mixed_precision_param": "bfloat16",
    }
    cases = [(str(tmp_path), str(assets), {**common, **layout}) for layout in LAYOUTS.values()]
    for name, (counted, planned) in zip(LAYOUTS, spawn(2, peaks, cases, tmp_path), strict=True):
        print(f"{name}: counted {counted / 2**20:.1f} MiB, planned {planned / 2**20:.1f}: {planned / counted - 1:+.1%}")
        assert 0.85 < planned / counted < 1.15, name
