"""Short runs of every kind on one process, each through torchtitan.train.main, and what they lost: losses.json.

    python -m tests.before_the_move.losses --record         writes losses.json anew
    python -m tests.before_the_move.losses --out FILE       writes what the code gives now to FILE

In the root of the repository, with OMP_NUM_THREADS=1. The runs follow each other in one process, since importing
PyTorch takes longer than any of them; none has a loader process, since a fork of a process that has trained can hang
(test_before_the_move.py has one). They are those of KINDS (the tiny model of this folder), the demo's two stages
(on this folder's texts) and one recipe of each kind that CI trains (scripts/try_recipe.py, debugmodel in small). Each
gives loss and grad_norm of every step, exact.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.before_the_move.record import FOLDER, REPOSITORY, machine, metrics
from tests.scripts import load_script

RECORD = FOLDER / "losses.json"
Run = tuple[str, ...]  # overrides; a first one that ends in .toml is the file, else it is first.toml

SLIDING = ["sliding_attention", "full_attention"]
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 30, "layer_types": SLIDING}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2_windows": {"model_type": "qwen2"} | QWEN_WINDOW,
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "mistral": {"model_type": "mistral", "sliding_window": 30},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "sliding_window": 30, "layer_types": SLIDING, "rope_scaling": YARN},
    "tied": {"tie_word_embeddings": True},
}
"""What each changes in model/config.json."""

ORIGINAL = "--rope.original_max_position_embeddings=64"
FOUR = ("--rope.factor=4", ORIGINAL)
TARGET = "--data.target_seq_len=512"
ACCUMULATE = ("--training.local_batch_size=1", "--training.global_batch_size=4")
LONG = ("--training.seq_len=6144", "--training.local_batch_size=1", "--training.global_batch_size=1")
KINDS: dict[str, Run] = {
    "plain": (),
    "bfloat16": ("--training.mixed_precision_param=bfloat16",),
    "bfloat16 parameters": (
        *("--training.dtype=bfloat16", "--training.mixed_precision_param=bfloat16"),
        "--optimizer.state_dtype=float32",
    ),
    # rows
    "concat, cross-document": ("--data.packing=concat", "--data.cross_document_attention=True"),
    "single": ("--data.packing=single",),
    "sources": ("text.toml",),
    "no BOS": ("text.toml", "--data.add_bos=False", "--data.packing=concat"),
    "anchor": ("--data.anchor_attention=True", "--data.positions=continue"),
    "continue": ("--data.positions=continue",),
    "pose": ("--data.positions=pose", TARGET),
    "longrecipe": ("--data.positions=longrecipe", TARGET),
    "cream": ("--data.positions=cream", TARGET),
    "random": ("--data.positions=random", TARGET),
    "uncut": ("text.toml", *LONG),
    "cut_4k": ("text.toml", *LONG, "--data.strategy=cut_4k"),
    "cut_128k": ("--data.strategy=cut_128k",),
    "per_source_upsampling": (
        *("--data.strategy=per_source_upsampling", "--data.long_threshold=200", "--data.long_share=0.95"),
    ),
    "global_upsampling": ("--data.strategy=global_upsampling", "--data.long_threshold=300"),
    "domain_upsampling": ("--data.strategy=domain_upsampling", "--data.upsampled_sources", "tales"),
    "chat": ("chat.toml",),
    "chat, single": ("chat.toml", "--data.packing=single"),
    # RoPE
    "rope none": ("--rope.type=none", "--rope.theta=50000"),
    "rope auto": ("--rope.theta=auto", "--training.seq_len=256"),
    "rope linear": ("--rope.type=linear", "--rope.factor=4"),
    "rope ntk": ("--rope.type=ntk", "--rope.factor=4"),
    "rope dynamic": ("--rope.type=dynamic", *FOUR),
    "rope ntk_by_parts": ("--rope.type=ntk_by_parts", *FOUR),
    "rope yarn": ("--rope.type=yarn", *FOUR),
    "rope yarn, options": (
        *("--rope.type=yarn", *FOUR, "--rope.beta_fast=8", "--rope.beta_slow=2", "--rope.truncate=False"),
        *("--rope.mscale=1.0", "--rope.mscale_all_dim=0.7"),
    ),
    "rope llama3": ("--rope.type=llama3", *FOUR),
    "rope longrope": ("--rope.type=longrope", ORIGINAL, "--rope.factor=4", "--rope.long_factor", *"1248"),
    "rope longrope, mixed window": (
        *("--rope.type=longrope", "--rope.mixed_window=True", ORIGINAL),
        *("--rope.long_factor", *"1248"),
    ),
    "rope gene": ("--rope.type=gene", *FOUR, *ACCUMULATE),
    "rope harpe": ("--rope.type=harpe", "--rope.bases", "10000", "30000"),
    # how a step is computed
    "accumulation": ACCUMULATE,
    "z_loss": ("--training.z_loss=0.001",),
    "loss in tiles": ("--training.loss_tile_mib=1", "--training.local_batch_size=8", "--training.global_batch_size=8"),
    "mlp in tiles": ("--training.mlp_tile_tokens=64",),
    "recomputation full": ("--activation_checkpoint.mode=full",),
    "recomputation full, offload": ("--activation_checkpoint.mode=full", "--activation_checkpoint.offload=True"),
    "recomputation by op": ("--activation_checkpoint.mode=selective",),
    "recomputation by layer": (
        *("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"),
    ),
    "dense attention": ("--model.attention_backend=dense",),
    "optimizer": (
        *("--optimizer.implementation=for-loop", "--optimizer.no_decay", "*norm*", "tok_embeddings.*"),
        *("--lr_scheduler.decay_type=sqrt", "--training.max_norm=0.5", "--training.seed=7"),
    ),
    "skipped steps": (
        *("--optimizer.lr=1.0", "--training.on_bad_loss=skip"),
        *("--training.loss_spike_factor=1", "--training.loss_spike_window=1"),
    ),
    # models
    **{name: (f"--model.hf_assets_path={name}",) for name in MODELS},
    "olmo3, yarn": (
        "--model.hf_assets_path=olmo3",
        *("--rope.type=yarn", "--rope.layers=full_attention", "--rope.factor=8", ORIGINAL),
    ),
    # what is written and read again; a second stage
    "exports": (
        *("--checkpoint.enable=True", "--checkpoint.last_save_in_hf=True", "--checkpoint.export_dtype=float32"),
        "--job.dump_folder=runs/exports",
    ),
    "from Hugging Face": (
        *("--model.hf_assets_path=runs/exports/export/step-3", "--checkpoint.initial_load_in_hf=True"),
    ),
    "from elsewhere, model only": (
        *("--checkpoint.initial_load_path=runs/first/checkpoint/step-3", "--stage.carry", "model"),
    ),
    "second stage": ("second.toml",),
}
DEMO = {
    "demo 1k": ("--training.global_batch_tokens=2048", "--training.steps=3", "--training.seq_len=512"),
    "demo 4k": (
        *("--training.global_batch_tokens=1024", "--training.steps=3", "--training.seq_len=1024"),
        "--parallelism.context_parallel_degree=1",
    ),
}
RECIPES = (  # tests/unit/test_recipes.py's ONE_OF_A_KIND when this was recorded
    "anchor_7b/64k",
    *(f"data_engineering_128k/{name}" for name in ("cut_128k", "cut_4k", "original")),
    *(f"data_engineering_128k/{name}_upsampling" for name in ("domain", "global", "per_source")),
    "gene_7b/16k",
    "harpe_7b/128k",
    "longrecipe_8b/80k",
    "longrope2_8b/128k",
    "olmo3_7b/64k",
    "pi/32k",
    "pose_7b/16k",
    "qwen25_1m/64k",
    "smollm2_135m/8k",
    "ultralong_8b/4m_llama3",
    "ultralong_8b/4m_yarn",
    "yarn/64k",
)


def write_models(folder: Path) -> None:
    """A folder beside model/ for each of MODELS."""
    for name, changes in MODELS.items():
        shutil.copytree(folder / "model", folder / name)
        config = folder / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def write_long_text(folder: Path) -> None:
    """Two documents of over 4,096 tokens, for strategies that cut there."""
    tales = [json.loads(line)["text"] for line in (folder / "texts/tales.jsonl").read_text().splitlines()]
    with (folder / "texts/long.jsonl").open("w") as file:
        for texts in (tales, tales[::-1]):
            file.write(json.dumps({"text": "\n\n".join(texts)}) + "\n")


def runs(folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Name, dump folder and arguments of each run; what is written stays in `folder`."""
    for name, overrides in KINDS.items():
        named = bool(overrides) and overrides[0].endswith(".toml")
        file, rest = (overrides[0], overrides[1:]) if named else ("first.toml", overrides)
        dump = folder / "runs" / name.replace(" ", "_").replace(",", "")
        own = (f"--job.dump_folder={dump}", "--checkpoint.enable=False", "--training.steps=3")
        yield name, dump, ["--job.config_file", file, *own, *rest]
    for text, source in (("code", "tales"), ("docs", "notes")):
        target = folder / f"data_cache/demo_text/{text}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"texts/{source}.jsonl", target)
    for name, overrides in DEMO.items():
        dump = folder / "outputs/demo" / name.split()[1]
        file = REPOSITORY / f"train_configs/demo/{dump.name}.toml"
        assets = f"--model.hf_assets_path={REPOSITORY / 'assets/tokenizer'}"
        own = ("--training.local_batch_size=1", "--metrics.log_freq=1", "--lr_scheduler.warmup_steps=1")
        workers = ("--data.num_workers=0", "--metrics.enable_tensorboard=False")
        yield name, dump, ["--job.config_file", str(file), assets, *own, *workers, *overrides]


def losses(dump: Path) -> list[dict[str, Any]]:
    return metrics(dump / "metrics.jsonl", ("loss", "grad_norm"))


@contextlib.contextmanager
def starting_here(main: Any) -> Iterator[None]:
    """What try_recipe.py would start in a process of its own, the launcher of one rank, is called in this one."""

    def call(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, main(command[command.index("--") + 1 :]))

    theirs, subprocess.run = subprocess.run, call  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess.run = theirs


def all_losses(folder: Path) -> dict[str, Any]:
    """Name -> the steps of the run, or the error that it ended with."""
    from torchtitan.train import main

    shutil.copytree(FOLDER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    write_models(folder)
    write_long_text(folder)
    os.chdir(folder)
    found: dict[str, Any] = {}
    for name, dump, arguments in runs(folder):
        try:
            code = main(arguments)
            found[name] = losses(dump) if code == 0 else f"exit code {code}"
        except Exception as error:
            traceback.print_exc()
            found[name] = repr(error)
    try_recipe = load_script("try_recipe")
    for name in RECIPES:
        small = folder / "recipes" / name
        given = [str(REPOSITORY / f"train_configs/{name}.toml"), f"--folder={small}", "--seq-len=256", "--steps=2"]
        try:
            with starting_here(main):
                code = try_recipe.main(given)
            found[name] = losses(small / "out") if code == 0 else f"exit code {code}"
        except Exception as error:
            traceback.print_exc()
            found[name] = repr(error)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--record", action="store_true", help=f"write {RECORD.name} of this folder")
    where.add_argument("--out", type=Path, help="write there")
    own = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        print("error: bits depend on the number of threads: set OMP_NUM_THREADS=1", file=sys.stderr)
        return 1
    target = RECORD if own.record else own.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        found = {"machine": machine(), "runs": all_losses(Path(folder).resolve())}
        os.chdir(REPOSITORY)
    target.write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name, steps in found["runs"].items() if not isinstance(steps, list)]
    print(f"{len(found['runs'])} runs, of which failed: {', '.join(failed) or 'none'}")
    return 1 if failed and own.record else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as train.py does, and for its reason
