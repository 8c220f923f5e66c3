"""A real model extended, and looked at before and after: SmolLM2-135M, from its 8K to 32K on a GPU or to 16K on a CPU.

    python scripts/extend_smollm2.py WORK                  # on a CPU: rows of 2K with PoSE's positions up to 16K
    python scripts/extend_smollm2.py WORK --steps 400      # longer

Fetches the model (scripts/fetch_smollm2.py; needs the dev extra) and six novels (Debian's r-cran-janeaustenr), reads
the source code and documentation of the installed Python packages (scripts/build_demo_corpus.py), and writes a stage,
WORK/stage.toml: books and code by halves, a tenth of short documentation, theta raised by the NTK-aware rule. A novel
and a package are held out. Measured by scripts/evaluate.py with one set of questions (the stage's [evaluation]
table): the model as it came; with the stage's RoPE but untrained; after the stage. scripts/compare.py sets them side by
side: WORK/before.json, rescaled.json, after.json, table.txt, compare.png. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import plot_smollm2_context as context

from torchtitan.tools.errors import UserError

SCRIPTS = Path(__file__).resolve().parent
TRAINED = 8192
HELD_OUT_PACKAGE = "asyncio"  # of the standard library
STAGE = """# of scripts/extend_smollm2.py
[job]
description = "SmolLM2-135M: {trained} -> {length}"
dump_folder = "{work}/out"
[model]
flavor = "auto"
hf_assets_path = "{work}/smollm2-135m"
[rope]
theta = "auto"
[training]
seq_len = {rows}
global_batch_tokens = {batch}
steps = {steps}
[optimizer]
lr = {lr}
[lr_scheduler]
warmup_steps = {warmup}
decay_type = "cosine"
min_lr_factor = 0.1
[activation_checkpoint]
mode = "{recompute}"
[metrics]
log_freq = 1
[checkpoint]
enable = true
initial_load_in_hf = true
interval = 50
keep_latest_k = 1
[data]
folder = "{work}/text"
cache_folder = "{work}/cache"
add_bos = false
packing = "best_fit"
{positions}
[[data.sources]]
name = "books"
path = "books.jsonl"
weight = 0.45
[[data.sources]]
name = "code"
path = "code.jsonl"
weight = 0.45
[[data.sources]]
name = "short"
path = "docs.jsonl"
weight = 0.1
"""
QUESTIONS = """
[data]
folder = "{work}/text"
add_bos = false
[evaluation]
texts = ["novel.jsonl", "package.jsonl"]
length = {length}
windows = [{trained}]
needle_lengths = {needle_lengths}
needle_depths = [0.1, 0.5, 0.9]
needles = {needles}
"""


def main(args: list[str]) -> int:
    """Exit code of the first part that fails."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the model, the text and the results")
    parser.add_argument("--length", type=int, default=32768 if gpu else 16384, help="to extend to")
    parser.add_argument(
        "--rows", type=int, default=32768 if gpu else 2048, help="shorter than --length: PoSE's positions"
    )
    parser.add_argument("--batch", type=int, default=524288 if gpu else 4096, help="tokens a step")
    parser.add_argument("--steps", type=int, default=300 if gpu else 100)
    parser.add_argument("--lr", type=float, default=3e-4 if gpu else 1e-4)
    parser.add_argument("--needles", type=int, default=4 if gpu else 1, help="of each length and depth")
    parser.add_argument("--processes", type=int, default=1 if gpu else 2)
    own = parser.parse_args(args)
    if own.length <= TRAINED:
        parser.error(f"--length {own.length} must be above the {TRAINED} that the model was trained for")
    began, work = time.monotonic(), own.work.resolve()
    (work / "text").mkdir(parents=True, exist_ok=True)
    try:
        model = context.fetch_model(work / "smollm2-135m")
        write_texts(work)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    pose = f'positions = "pose"\ntarget_seq_len = {own.length}' if own.rows < own.length else ""
    values = vars(own) | {"work": work, "trained": TRAINED, "positions": pose, "warmup": max(1, own.steps // 10)}
    values |= {"recompute": "full" if gpu else "none"}
    values["needle_lengths"] = [TRAINED // 2, TRAINED, *range(TRAINED * 3 // 2, own.length + 1, TRAINED // 2)]
    (work / "stage.toml").write_text(STAGE.format(**values))
    (work / "questions.toml").write_text(QUESTIONS.format(**values))
    last = work / "out/checkpoint" / f"step-{own.steps}"
    if not last.exists():
        launch = [sys.executable, "-m", "torchtitan.tools.launch", "--nproc", str(own.processes), "--"]
        if code := subprocess.run([*launch, "--job.config_file", str(work / "stage.toml")]).returncode:
            return code
    for name, folder, label, extra in (
        ("before", model, "SmolLM2-135M as it came", []),
        ("rescaled", model, f"theta raised for {own.length:,}, not trained", ["--rope.theta", "auto"]),
        ("after", last, f"after {own.steps} steps of {own.batch:,} tokens", []),
    ):
        if (work / f"{name}.json").exists():
            continue
        command = [sys.executable, str(SCRIPTS / "evaluate.py"), "--job.config_file", str(work / "questions.toml")]
        command += ["--model", str(folder), "--label", label, "--out", str(work / f"{name}.json"), *extra]
        command += ["--processes", str(own.processes), "--parallelism.context_parallel_degree", str(own.processes)]
        if code := subprocess.run(command).returncode:
            return code
    results = [str(work / f"{name}.json") for name in ("before", "rescaled", "after")]
    compare = [sys.executable, str(SCRIPTS / "compare.py"), *results, "--plot", str(work / "compare.png")]
    made = subprocess.run(compare, capture_output=True, text=True)
    print(made.stdout + made.stderr)
    (work / "table.txt").write_text(made.stdout)
    print(f"{(time.monotonic() - began) / 60:.0f} minutes; see {work}")
    return made.returncode


def write_texts(work: Path) -> None:
    """text/{books,code,docs}.jsonl to train on; text/{novel,package}.jsonl, a document each, held out."""
    text = work / "text"
    if (text / "package.jsonl").exists():
        return
    novel = context.fetch_book(work / "persuasion.txt")
    (text / "novel.jsonl").write_text(json.dumps({"text": novel.read_text(encoding="utf-8")}) + "\n")
    others = [book for title, book in context.books(work) if title != context.TITLE]
    (text / "books.jsonl").write_text("".join(json.dumps({"text": book}) + "\n" for book in others))
    subprocess.run([sys.executable, str(SCRIPTS / "build_demo_corpus.py"), "--out", str(work / "python")], check=True)
    (text / "docs.jsonl").write_bytes((work / "python/docs.jsonl").read_bytes())
    lines = (work / "python/code.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    held_out = [line for line in lines if json.loads(line)["source"].endswith(f" {HELD_OUT_PACKAGE}")]
    if not held_out:
        raise UserError(f"{work / 'python/code.jsonl'} has no {HELD_OUT_PACKAGE} of the standard library to hold out.")
    (text / "code.jsonl").write_text("".join(line for line in lines if line not in held_out))
    (text / "package.jsonl").write_text("".join(held_out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
