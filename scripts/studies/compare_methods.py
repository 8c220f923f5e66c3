"""Methods of context extension side by side: a small model is trained at 1K and extended to 4K by each, on a CPU.

    python scripts/studies/compare_methods.py WORK                 # untouched, ABF, PI, YaRN
    python scripts/studies/compare_methods.py WORK --methods all   # also NTK, GeNE, PoSE, LongRecipe, and 1K for longer

The documents reward copying from afar. They are made of real words: sentences from Python's own documentation, and
between them facts, `KEY VALUE VALUE VALUE .`. Each fact stands at several places of a document with the same values: at
the first place the values cannot be known, at the others they can only be copied. Copying is learned soonest in short
documents and from near copies, so the first stage has documents of 32 to 1,024 words, with as many tokens in each
octave of length. A second stage of 1K has documents in which most facts stand at two places only, near the document's
two ends; half of the tokens are in documents of more than 512 words. Every extension starts from the second stage's
checkpoint and trains on the same number of tokens in the same number of steps. If its rows have 4K tokens, its
documents are like the second stage's, of 32 to 4,096 words with any length as often, plus a quarter of the tokens from
the second stage itself; all processes then share a row (context parallelism).

Measured on other documents: whether all values of a fact are the likeliest tokens, by the document's length, if the
fact is stated only at the beginning and recalled only at the end; the loss by position; and the loss on documents like
the second stage's, to see what the extension has cost there. All stages are trained by run_train.sh's own code. Leaves
results.json, table.md and plot.png in WORK; what exists already is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from work_folder import begin_or_go_on

from torchtitan.extensions.evaluation.forward import answer_scores
from torchtitan.extensions.evaluation.loading import Loaded, load
from torchtitan.extensions.evaluation.runner import position_losses
from torchtitan.models.rope import rope_for
from torchtitan.tools.errors import UserError

SHORT, LONG = 1024, 4096
SHORTEST = 32
FILLER, KEYS, VALUES = 64, 30, 96  # words of each kind
IN_FACT = 3  # values
PLACES = 8
"""Of a fact in a document; more if there would be more facts than keys."""

FACT_SHARE = 0.9
"""Share of a document's words that are in facts."""

RARE_SHARE = 0.8
"""Share of a document's facts that stand near its two ends only."""

SHORT_SHARE = 0.7
"""Share of short documents in extensions with rows of LONG: a quarter of their tokens are in documents of up to SHORT,
as published mixtures keep a part of the earlier text."""

UNKNOWN, STOP = "<unknown>", "."
LENGTHS = (256, 512, 1024, 1536, 2048, 3072, 4096)
EDGES = (0, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584, 4096)

MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_theta": 100000.0,
    "max_position_embeddings": SHORT,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Method:
    """length: tokens per row in training. rope, data: keys of these tables, as TOML."""

    title: str
    length: int
    rope: str = ""
    data: str = ""


TO_LONG = f"factor = {LONG / SHORT}"
ORIGINAL = f"original_max_position_embeddings = {SHORT}"
ABF = "theta = 2e6"
METHODS = {
    "untouched": Method("untouched", SHORT),  # the second stage of 1K itself
    "abf": Method("ABF, base 2e6", LONG, ABF),
    "pi": Method("PI", LONG, f'type = "linear"\n{TO_LONG}'),
    "yarn": Method("YaRN", LONG, f'type = "yarn"\n{TO_LONG}\n{ORIGINAL}'),
    "ntk": Method("NTK-aware", LONG, f'type = "ntk"\n{TO_LONG}'),
    "gene": Method("GeNE", LONG, f'type = "gene"\n{TO_LONG}\n{ORIGINAL}'),
    "pose": Method(
        "PoSE with PI", SHORT, f'type = "linear"\n{TO_LONG}', f'positions = "pose"\ntarget_seq_len = {LONG}'
    ),
    "longrecipe": Method("LongRecipe with ABF", SHORT, ABF, f'positions = "longrecipe"\ntarget_seq_len = {LONG}'),
    "short": Method("1K for longer", SHORT),
}
PROOF = ("untouched", "abf", "pi", "yarn")

STAGE = """{head}
[job]
dump_folder = "{work}/{name}"
[stage]
after = "{after}"
[model]
flavor = "auto"
hf_assets_path = "{work}/assets"
[rope]
{rope}
[training]
seq_len = {length}
local_batch_size = {rows}
global_batch_tokens = {batch}
steps = {steps}
mixed_precision_param = "float32"
[optimizer]
lr = {lr}
[lr_scheduler]
warmup_steps = {warmup}
decay_type = "cosine"
min_lr_factor = 0.1
[metrics]
log_freq = 50
enable_tensorboard = false
[checkpoint]
enable = true
interval = 1000000
[parallelism]
context_parallel_degree = {cp}
[data]
cache_folder = "{work}/cache"
folder = "{work}"
add_bos = false
add_eos = false
{data}
[[data.sources]]
name = "facts"
path = "{text}_{length}.jsonl"
"""


# ---- documents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """Real words; sentences have filler words only."""

    filler: list[str]
    keys: list[str]
    values: list[str]
    sentences: list[list[str]]

    @property
    def all(self) -> list[str]:
        """The vocabulary."""
        return [UNKNOWN, STOP, *self.filler, *self.keys, *self.values]


def find_words() -> Words:
    """The most frequent words of Python's installed documentation as filler words, and its sentences reduced to them;
    keys and values are the next most frequent words."""
    from pydoc_data.topics import topics

    found = [re.findall("[a-z]+", part.lower()) for text in topics.values() for part in re.split(r"[.!?:]\s", text)]
    counts = Counter(word for sentence in found for word in sentence if len(word) > 1)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    filler, keys, values = ranked[:FILLER], ranked[FILLER:][:KEYS], ranked[FILLER + KEYS :][:VALUES]
    sentences = [[word for word in sentence if word in set(filler)] for sentence in found]
    return Words(filler, keys, values, [[*s, STOP] for s in sentences if 4 <= len(s) <= 30])


def make_document(words: Words, length: int, random: np.random.Generator, far: bool, needle: bool = False) -> list[str]:
    """`length` words. far: RARE_SHARE of the facts stand once in the first and once in the last quarter, mostly near
    the ends, so that the model must learn distances of the whole length. needle: one fact is stated at the beginning
    and recalled at the end, and nowhere else; the document ends with its values."""
    size = IN_FACT + 2
    facts = max(1, min(round(length * FACT_SHARE / size / PLACES), KEYS))
    keys = random.permutation(words.keys)[:facts]
    values = random.permutation(words.values)[: facts * IN_FACT].reshape(facts, IN_FACT)
    rare = int(facts * RARE_SHARE) if far else 0
    often = max(2, round((length * FACT_SHARE / size - 2 * rare) / (facts - rare)))
    where = [abs(random.random(2) ** 2 / 4 - [0, 1]) if i < rare else random.random(often) for i in range(facts)]
    parts = [(when, [k, *v, STOP]) for k, v, several in zip(keys, values, where) for when in several]
    left = length - size * len(parts)
    if needle:
        parts = parts[len(where[0]) :]
        left = length - size * len(parts) - 2 * size + 1
    while left > 0:
        sentence = words.sentences[random.integers(len(words.sentences))]
        parts.append((random.random(), sentence[:left]))
        left -= len(sentence)
    parts.sort(key=lambda part: part[0])
    if needle:
        fact = [keys[0], *values[0]]
        parts = [(0.0, [*fact, STOP]), *parts, (1.0, fact)]
    return [str(word) for _, part in parts for word in part]


def write_corpus(words: Words, file: Path, length: int, tokens: int, far: bool) -> None:
    """Documents of up to `length` words, one token per word.

    Not far: as many tokens in documents of 32 to 64 words as of 64 to 128. far: as many documents, so that half of the
    tokens are in documents of more than half the length. Beyond 1K, SHORT_SHARE of the documents have up to 1K, and the
    others any length with the same probability.
    """
    random = np.random.default_rng([3 * far, length])
    with file.open("w") as out:
        while tokens > 0:
            size = document_size(length, random, far)
            out.write(json.dumps({"text": " ".join(make_document(words, size, random, far))}) + "\n")
            tokens -= size


def document_size(length: int, random: np.random.Generator, far: bool) -> int:
    """How many words a document of write_corpus has; drawn at random."""
    if length > SHORT and random.random() >= SHORT_SHARE:
        return round(random.uniform(SHORTEST, length))
    length = min(length, SHORT)
    if far:
        return round(math.exp(random.uniform(math.log(SHORTEST), math.log(length))))
    return round(1 / random.uniform(1 / length, 1 / SHORTEST))


def write_assets(words: Words, folder: Path) -> None:
    """A tokenizer whose tokens are words, and the model's config.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.all)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(MODEL | {"vocab_size": len(words.all)}))


# ---- measuring -------------------------------------------------------------------------------------------------------


def recalled(loaded: Loaded, tokens: list[int], count: int) -> bool:
    """Whether each of a document's last `count` tokens is the likeliest, given the tokens before it."""
    prompt, target = torch.tensor(tokens[:-count]), torch.tensor(tokens[-count:])
    rope = rope_for(loaded.model.args.rope, len(tokens) - 1)
    ((_, likeliest),) = answer_scores(loaded.model, loaded.ranks, [prompt], [target], rope)
    return bool(likeliest.all())


def measure(loaded: Loaded, words: Words, documents: int, needles: int) -> dict[str, Any]:
    """Recall by length, loss by position in documents of LONG words, and loss on documents of up to SHORT words like
    the second stage's; none of these documents were trained on."""
    encode = loaded.tokenizer.encode
    recall = []
    for length in LENGTHS:
        random = np.random.default_rng([1, length])
        made = [encode(" ".join(make_document(words, length, random, far=True, needle=True))) for _ in range(needles)]
        recall.append(float(np.mean([recalled(loaded, tokens, IN_FACT) for tokens in made])))
    random = np.random.default_rng([2, LONG])
    texts = [torch.tensor(encode(" ".join(make_document(words, LONG, random, far=True)))) for _ in range(documents)]
    losses = position_losses(loaded.model, loaded.ranks, texts, EDGES)
    random = np.random.default_rng([4, SHORT])
    sizes = [document_size(SHORT, random, far=True) for _ in range(8 * documents)]
    short = [torch.tensor(encode(" ".join(make_document(words, size, random, far=True)))) for size in sizes]
    return {
        "recall": recall,
        "nll": losses["nll"],
        "count": losses["count"],
        "short": position_losses(loaded.model, loaded.ranks, short, (0, SHORT))["mean_nll"],
    }


def mean_loss(result: dict[str, Any], begin: int, end: int) -> float:
    """Mean loss over the positions [begin, end), both of EDGES."""
    inside = [i for i, edge in enumerate(EDGES[:-1]) if begin <= edge < end]
    sums = sum(result["nll"][i] * result["count"][i] for i in inside)
    return float(sums / sum(result["count"][i] for i in inside))


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One line per method: recall by length, loss by position, loss on short documents and its change against the
    untouched model's."""
    shown = [length for length in LENGTHS if length >= SHORT]
    spans = [(0, SHORT), *pairwise((SHORT, 2 * SHORT, LONG))]
    titles = [f"recall at {n:,}" for n in shown] + [f"loss {a:,}-{b:,}" for a, b in spans]
    titles += ["short documents", "against untouched"]
    lines = [f"| method | rows | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for name, result in results.items():
        cells = [f"{result['recall'][LENGTHS.index(n)]:.0%}" for n in shown]
        cells += [f"{mean_loss(result, *span):.3f}" for span in spans]
        change = result["short"] / results["untouched"]["short"] - 1
        cells.append(f"{result['short']:.3f}")
        method = METHODS[name]
        lines.append(f"| {method.title} | {method.length:,} | {' | '.join(cells)} | {change:+.1%} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Recall by length and loss by position, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, result in results.items():
        style = "--" if name in ("untouched", "short") else "-"
        left.plot(LENGTHS, result["recall"], style, marker=".", label=METHODS[name].title)
        right.plot([(a + b) / 2 for a, b in pairwise(EDGES)], result["nll"], style, marker=".")
    for axes in (left, right):
        axes.axvline(SHORT, color="grey", linestyle=":", linewidth=1)
        axes.grid(alpha=0.25)
    left.set(xlabel="tokens between a fact and its recall", ylabel="recalled exactly", ylim=(-0.03, 1.03))
    right.set(xlabel="position in the document", ylabel="loss (nats per token)")
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Trained at {SHORT:,} tokens, extended to {LONG:,}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- running ---------------------------------------------------------------------------------------------------------


def write_stages(work: Path, own: argparse.Namespace) -> None:
    """Write the TOML files of all stages."""
    stages = [
        ("1k", Method("", SHORT), "", own.steps, own.lr),
        ("untouched", METHODS["untouched"], "1k.toml", own.far_steps, own.lr / 4),
    ]
    names = [name for name in METHODS if name != "untouched"]
    stages += [(name, METHODS[name], "untouched.toml", own.extension_steps, own.lr / 4) for name in names]
    for name, method, after, steps, lr in stages:
        cp = own.processes if method.length == LONG else 1
        rows = own.batch * cp // (method.length * own.processes)
        values = {"work": work, "name": name, "after": after, "length": method.length, "rope": method.rope}
        values |= {"data": method.data, "steps": steps, "lr": lr, "warmup": steps // 10, "batch": own.batch}
        values |= {"rows": rows, "cp": cp}
        values |= {
            "text": "near" if name == "1k" else "far",
            "head": f"# {name}: of scripts/studies/compare_methods.py",
        }
        (work / f"{name}.toml").write_text(STAGE.format(**values))


def train(work: Path, name: str, steps: int, processes: int) -> Path:
    """The last checkpoint of a stage, which is trained unless it exists."""
    last = work / name / "checkpoint" / f"step-{steps}"
    if not last.exists():
        command = [sys.executable, "-m", "torchtitan.extensions.cluster.launch", "--nproc", str(processes), "--"]
        subprocess.run([*command, "--job.config_file", str(work / f"{name}.toml")], check=True)
    return last


def main(args: list[str]) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for documents, stages and results")
    parser.add_argument("--methods", nargs="+", default=list(PROOF), choices=[*METHODS, "all"])
    parser.add_argument("--steps", type=int, default=2000, help=f"steps of the first stage of {SHORT}")
    parser.add_argument("--far-steps", type=int, default=600, help=f"steps of the second stage of {SHORT}")
    parser.add_argument("--extension-steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4096, help=f"tokens per step, a multiple of {LONG}")
    parser.add_argument(
        "--lr", type=float, default=4e-3, help="learning rate of the first stage; later stages have a quarter"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--documents", type=int, default=16, help="how many documents the loss by position is measured on"
    )
    parser.add_argument("--needles", type=int, default=40, help="how many facts are recalled at each length")
    own = parser.parse_args(args)
    if own.batch < 1 or own.batch % LONG or own.processes < 1 or own.batch // SHORT % own.processes:
        parser.error(f"--batch must be a multiple of {LONG}, and its rows of {SHORT} of --processes")
    began = time.monotonic()
    work = own.work.resolve()
    constants = {name: value for name, value in globals().items() if name.isupper() and name != "METHODS"}
    try:
        begin_or_go_on(work, {k: v for k, v in vars(own).items() if k not in ("work", "methods")} | constants)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    words = find_words()
    write_assets(words, work / "assets")
    write_stages(work, own)
    extension = own.extension_steps * own.batch
    for text, length, tokens in (
        ("near", SHORT, own.steps * own.batch),
        ("far", SHORT, max(own.far_steps * own.batch, extension)),
        ("far", LONG, extension),
    ):
        file = work / f"{text}_{length}.jsonl"
        if not file.exists():
            write_corpus(words, file, length, tokens, far=text == "far")
    train(work, "1k", own.steps, own.processes)
    results = {}
    names = list(METHODS) if "all" in own.methods else list(dict.fromkeys(["untouched", *own.methods]))
    for name in names:
        file = work / f"{name}.json"
        if not file.exists():
            steps = own.far_steps if name == "untouched" else own.extension_steps
            last = train(work, name, steps, own.processes)
            made = measure(load(last, "float32"), words, own.documents, own.needles)
            file.write_text(json.dumps(made))
        results[name] = json.loads(file.read_text())
    (work / "results.json").write_text(json.dumps(results, indent=1))
    (work / "table.md").write_text(markdown(results) + "\n")
    draw(results, work / "plot.png")
    print(markdown(results))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; see {work}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
