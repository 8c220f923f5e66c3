"""Train any recipe for two small steps on this machine, without its weights or data: a rehearsal before you pay.

    python scripts/try_recipe.py train_configs/prolong_8b/512k.toml
    python scripts/try_recipe.py train_configs/yarn/64k.toml --processes 2 --optimizer.lr 1e-3

The rows shrink to --seq-len tokens, and every other length of the stage by the same factor: the sources' bounds,
data.long_threshold, data.target_seq_len, RoPE's original length. The model becomes `debugmodel` with fresh weights, the
sources become stand-ins of random tokens (scripts/build_stand_in.py), and a step has two rows per process. RoPE,
packing, masks, positions, mixture, schedule and context parallelism (as far as --processes allows) stay the recipe's.
There is no previous stage, and nothing is evaluated; what training would say of the RoPE of the recipe itself is
printed first, and the exit code is 2 if it would refuse that. So this finds what cannot work; it says nothing about
memory, speed or learning. Lists that depend on the heads (rope.long_factor, rope.bases) are thinned to the size for
debugmodel, and theta = "auto" becomes debugmodel's own base.

Everything is written to a temporary folder, or to --folder, which must not exist: small.toml, data/, out/.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from torchtitan.config import JobConfig, dump_toml, load_config
from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import Evaluation, Rope
from torchtitan.extensions.cluster.rope_report import REFUSED, is_refused, rope_report
from torchtitan.extensions.ingest.stand_in import build as build_stand_ins
from torchtitan.tools.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
SEQ_LEN = 1024
TOKENS = 20_000
SHORTEST_ORIGINAL = 64
"""Smallest rope.original_max_position_embeddings: YaRN's ramp needs some turns in it."""


def main(args: list[str]) -> int:
    """Exit code 1, and one line, for a mistake of the user's; otherwise training's exit code; if that is 0, 2 if the
    recipe itself would be refused for its RoPE."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every other --table.key overrides the recipe's key, before the recipe is made small",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a stage's TOML")
    parser.add_argument("--seq-len", "--seq_len", type=int, default=SEQ_LEN, help="tokens per row")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write; it must not exist")
    own, overrides = parser.parse_known_args(args)
    try:
        if min(own.seq_len, own.steps, own.processes) < 1:
            raise UserError("--seq-len, --steps and --processes must be at least 1.")
        if own.folder is not None and own.folder.exists():
            raise UserError(f"--folder {own.folder} exists, and nothing is written over: name another, or delete it.")
        config = load_config([f"--job.config_file={own.recipe}", *overrides])
        folder = own.folder or Path(tempfile.mkdtemp(prefix="try_recipe-"))
        toml = write_small(config, folder.resolve(), own.seq_len, own.steps, own.processes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rope = rope_report(config)
    if config.rope.theta == "auto":
        rope.append(
            'rehearsed with the base of debugmodel: rope.theta = "auto" goes on from weights, and here are none'
        )
    print("\n".join(f"{own.recipe}: {line}" for line in rope), flush=True)
    trainer = [
        "torchtitan.extensions.cluster.launch",
        "--nproc",
        str(own.processes),
        "--",
        "--job.config_file",
        str(toml),
    ]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    code = subprocess.run([sys.executable, "-m", *trainer], env=environment).returncode
    refused = "; but the recipe itself WOULD BE REFUSED for its RoPE, as said above" if is_refused(rope) else ""
    print(f"{own.recipe}: {f'{own.steps} small steps trained' if code == 0 else 'FAILED'}; see {folder}{refused}")
    return code or (REFUSED if refused else 0)


def write_small(config: JobConfig, folder: Path, seq_len: int, steps: int, processes: int) -> Path:
    """Write the small stage as `folder`/small.toml, and stand-ins for its sources; UserError if that cannot work."""
    folder.mkdir(parents=True, exist_ok=True)
    toml = folder / "small.toml"
    small = make_small(config, folder, seq_len, steps, processes)
    toml.write_text(dump_toml(small))
    build_stand_ins(small, TOKENS)
    return toml


def make_small(config: JobConfig, folder: Path, seq_len: int, steps: int, processes: int) -> JobConfig:
    """`config` with rows of at most seq_len tokens, every other length to match, and its data in folder/data."""
    factor = max(config.training.seq_len / seq_len, 1.0)
    seq_len = min(config.training.seq_len, seq_len)
    cp = largest_divisor(processes, config.parallelism.context_parallel_degree)
    tp = largest_divisor(processes // cp, config.parallelism.tensor_parallel_degree)
    replace = dataclasses.replace
    return replace(
        config,
        job=replace(config.job, dump_folder=str(folder / "out")),
        model=replace(config.model, flavor="debugmodel", hf_assets_path=str(REPOSITORY / "assets/tokenizer")),
        training=replace(
            config.training,
            seq_len=seq_len,
            local_batch_size=1,
            global_batch_size=None,
            global_batch_tokens=2 * processes * seq_len,
            steps=steps,
        ),
        lr_scheduler=replace(config.lr_scheduler, warmup_steps=min(config.lr_scheduler.warmup_steps, steps // 2)),
        parallelism=replace(
            config.parallelism,
            data_parallel_replicate_degree=1,
            data_parallel_shard_degree=-1,
            context_parallel_degree=cp,
            tensor_parallel_degree=tp,
        ),
        checkpoint=replace(
            config.checkpoint, enable=False, last_save_in_hf=False, initial_load_in_hf=False, initial_load_path=None
        ),
        evaluation=Evaluation(),  # its texts are missing here
        metrics=replace(config.metrics, log_freq=1, enable_tensorboard=False, enable_wandb=False),
        data=small_data(config.data, folder, factor),
        rope=small_rope(config.rope, factor),
        stage=replace(config.stage, after=None, run_chain=False, gates=()),
    )


def largest_divisor(of: int, up_to: int) -> int:
    """The largest number that divides both `of` and `up_to`."""
    return max(d for d in range(1, min(of, up_to) + 1) if of % d == 0 and up_to % d == 0)


def small_data(data: Data, folder: Path, factor: float) -> Data:
    """[data] with every length divided by factor, and a folder of its own for each source."""

    def less(length: int | None) -> int | None:
        return max(round(length / factor), 1) if length else length

    def source(number: int, s: Source) -> Source:
        return dataclasses.replace(
            s,
            path=f"source-{number}",
            where="",
            max_documents=None,
            min_length=less(s.min_length) or 0,
            max_length=less(s.max_length),
            chunk_length=less(s.chunk_length),
            long_threshold=less(s.long_threshold),
            length_bins=tuple(less(length) or 1 for length in s.length_bins),
            max_epochs=None,
        )

    return dataclasses.replace(
        data,
        sources=tuple(source(number, s) for number, s in enumerate(data.sources)),
        folder=str(folder / "data"),
        cache_folder=str(folder / "cache"),
        long_threshold=less(data.long_threshold) or 0,
        target_seq_len=less(data.target_seq_len),
        num_workers=0,
    )


def small_rope(rope: Rope, factor: float) -> Rope:
    """[rope] with the original length divided by factor, and lists for debugmodel's 32 pairs and 2 key-value heads."""
    original = rope.original_max_position_embeddings
    return dataclasses.replace(
        rope,
        theta=None if rope.theta == "auto" else rope.theta,
        original_max_position_embeddings=original and max(round(original / factor), SHORTEST_ORIGINAL),
        long_factor=thinned(rope.long_factor, 32),
        short_factor=thinned(rope.short_factor, 32),
        bases=thinned(rope.bases, 2),
    )


def thinned(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    """`count` of the values, evenly spaced from the first to the last; () for ()."""
    last = len(values) - 1
    return tuple(values[round(i * last / (count - 1))] for i in range(count)) if values else ()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
