"""Search RoPE factors for a longer context, as LongRoPE2 (arXiv 2502.20082) does: no training, only forward passes.

    python scripts/studies/search_rope.py --model FOLDER --text books/*.txt --length 131072 \\
        --state search.json --out rope.toml

A candidate (longrope2.py) is a factor per pair of dimensions. Its fitness is the perplexity of the answers to --prompts
questions, each about a needle at the start of --length tokens of real text. With the paper's population and iterations
(the defaults) 1,344 candidates are measured: hours on a GPU. Runs on one device, CUDA if there is a GPU. A search that
was cut off continues from --state. --out is a TOML [rope] table to train or evaluate with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope2 import Candidate, Space, evolve

from torchtitan.extensions.evaluation.command_line import check_at_least, check_given
from torchtitan.extensions.evaluation.position_curves import add_model_arguments, model_progress, wants_bos
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import check_can_be_written, read_json, write_text


def main(args: list[str]) -> int:
    """0; 1 and one line for a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_arguments(parser)
    parser.add_argument("--length", type=int, help="target length in tokens")
    parser.add_argument("--original", type=int, help="length that the model was trained for (what its config says)")
    parser.add_argument("--prompts", type=int, default=10, help="needle questions per candidate (10)")
    parser.add_argument("--pieces", type=int, default=1, help="how many prompts one document may give (1)")
    parser.add_argument("--population", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the search and of the needles (0)")
    parser.add_argument("--state", type=Path, help="JSON file that keeps every candidate measured so far")
    parser.add_argument("--out", type=Path, help="TOML file to write")
    options = parser.parse_args(args)
    try:
        check_given(options, "model", "text", "length")
        check_at_least(options, length=1, prompts=1, pieces=1, population=4, iterations=0, seed=0)
        if options.out:
            check_can_be_written(options.out)
        toml = search(options)
        print(toml, end="")
        if options.out:
            write_text(options.out, toml)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def search(options: argparse.Namespace) -> str:
    """The [rope] table of the best candidate."""
    # PyTorch takes seconds to import: a mistake on the command line should not.
    import numpy as np

    from torchtitan.extensions.evaluation.held_out_text import check_vocabulary, long_documents
    from torchtitan.extensions.evaluation.loading import load
    from torchtitan.extensions.evaluation.needle import needle_question
    from torchtitan.models.rope import RopeArgs
    from torchtitan.models.rope_scaling import LongRopeScaling, YarnScaling
    from torchtitan.tools.device import device_type

    device = options.device or device_type()
    loaded = load(options.model, options.dtype, device, options.tokenizer, options.attention_backend)
    model, args = loaded.model, loaded.model.args
    original = options.original or getattr(args.rope.scaling, "original_max_position_embeddings", None)
    original = original or args.rope.max_position_embeddings
    if original is None:
        raise UserError(f"{options.model} does not say how long it was trained for: give --original.")
    length, pieces = options.length, options.pieces
    if length <= original:
        raise UserError(f"--length = {length} is not beyond the original length, {original}: nothing to search.")
    space = Space(args.rope.theta, args.head_dim, original, length)

    texts = long_documents(options.text, loaded.tokenizer, length, options.prompts, options.text_field, pieces=pieces)
    if len(texts) < options.prompts:
        raise UserError(
            f"--prompts = {options.prompts}, but --text gives {len(texts)} stretches of {length:,} tokens, at most "
            f"{pieces} per document. Give more text, a larger --pieces, or fewer --prompts."
        )
    bos = loaded.tokenizer.bos_id if wants_bos(options, loaded.tokenizer) else None
    prompts = [
        needle_question(loaded.tokenizer, text, length, np.random.default_rng([options.seed, i]), bos)
        for i, text in enumerate(texts)
    ]
    check_vocabulary(max(int(p.prompt.max()) for p in prompts), args.vocab_size, loaded.tokenizer)

    def perplexity(rope: RopeArgs) -> float:
        return math.exp(min(float(answer_losses(model, loaded.ranks, prompts, rope).double().mean()), 700))

    def rope_of(candidate: Candidate) -> RopeArgs:
        factors = candidate.factors()
        return replace(args.rope, scaling=LongRopeScaling(original, factors, (1.0,) * len(factors), 1.0))

    tokens = b"".join(x.numpy().tobytes() for p in prompts for x in (p.prompt, p.target))
    content = hashlib.sha256(tokens).hexdigest()[:16]
    settings = {
        "model": str(options.model),
        "theta": args.rope.theta,
        "original": original,
        "length": length,
        "dtype": options.dtype,
        "prompts": content,
    }
    known = {Candidate(d, tuple(high)): value for d, high, value in read_state(options.state, settings)}
    if known:
        print(f"{options.state}: {len(known)} candidates are known", file=sys.stderr)
    at_start = len(known)

    total = options.population + options.iterations * (options.population - options.population // 2)
    with model_progress(model, (total - at_start + 2) * len(prompts)) as describe:
        describe("for comparison")
        before = {
            "as trained": perplexity(args.rope),
            f"YaRN {space.scale:g}": perplexity(replace(args.rope, scaling=YarnScaling(space.scale, original))),
        }

        def fitness(candidate: Candidate) -> float:
            if candidate not in known:
                known[candidate] = perplexity(rope_of(candidate))
                if options.state:
                    measured = [[c.d_rcd, list(c.high), value] for c, value in known.items()]
                    write_text(options.state, json.dumps({"settings": settings, "measured": measured}))
            return known[candidate]

        def on_iteration(done: int, living: list[tuple[float, Candidate]]) -> None:
            best, candidate = living[0]
            describe(f"iteration {done} of {options.iterations}: best {best:.4f}, d_rcd {candidate.d_rcd}")

        living = evolve(space, fitness, options.seed, options.population, options.iterations, on_iteration)
    best, candidate = living[0]
    start = min(known[c] for c in known if len(set(c.high)) == 1)
    return as_toml(
        candidate.factors(),
        original,
        [
            f"LongRoPE2's search: {length:,} tokens from {original:,}, {len(known):,} candidates on {len(prompts)} "
            f"prompts, seed {options.seed}, {options.dtype}.",
            f"d_rcd {candidate.d_rcd} of {space.indices.start} to {space.indices.stop - 1} (the theory's critical "
            f"index), {space.pairs} pairs.",
            f"Perplexity of the answers: {best:.4f}; the best of one factor from d_rcd on {start:.4f}; "
            + "; ".join(f"{name} {value:.4f}" for name, value in before.items())
            + ".",
        ],
    )


def as_toml(factors: tuple[float, ...], original: int, comments: list[str]) -> str:
    """The [rope] table that build_rope makes the best candidate of."""
    rows = [", ".join(f"{f:.6f}" for f in factors[i : i + 8]) for i in range(0, len(factors), 8)]
    return "\n".join(
        [
            *(f"# {line}" for line in comments),
            "[rope]",
            'type = "longrope"',
            f"original_max_position_embeddings = {original}",
            "attention_factor = 1.0",
            "long_factor = [",
            *(f"    {row}," for row in rows),
            "]\n",
        ]
    )


def answer_losses(model: Any, ranks: Any, questions: Sequence[Any], rope: Any) -> Any:
    """float32 [all questions' target tokens]: -log p of each under the RoPE, in nats."""
    import torch

    from torchtitan.extensions.evaluation.forward import answer_scores
    from torchtitan.models.rope import rope_for

    losses = []
    for one in questions:
        used = rope_for(rope, len(one.prompt) + len(one.target) - 1)
        losses.append(-answer_scores(model, ranks, [one.prompt], [one.target], used)[0][0])
    return torch.cat(losses)


def read_state(path: Path | None, settings: dict[str, Any]) -> list[list[Any]]:
    """[d_rcd, factors, fitness] of each candidate that an earlier run measured; UserError if its settings differ."""
    if path is None or not path.exists():
        return []
    state = read_json(path)
    if not state.keys() >= {"settings", "measured"}:
        raise UserError(f"--state {path} is not the state of a search: it lacks settings or measured.")
    was, measured = state["settings"], state["measured"]
    changed = [f"{key} {was.get(key)} -> {value}" for key, value in settings.items() if was.get(key) != value]
    if changed:
        raise UserError(
            f"--state {path} is of another search: {'; '.join(changed)}. (prompts changes with --text, --seed, "
            "--prompts and the tokenizer.) Name another file."
        )
    return list(measured)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
