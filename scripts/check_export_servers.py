"""Do the servers read an exported model as it was trained? Compares their next-token log-probabilities with ours.

    python scripts/check_export_servers.py outputs/export/step-1000
    python scripts/check_export_servers.py ./export --checkpoint outputs/checkpoint/step-1000 --lengths 4000 16000 \\
        --python-of vllm=/envs/vllm/bin/python --python-of mlx-lm=/envs/mlx/bin/python
    python scripts/check_export_servers.py ./export --python-of llama.cpp=/envs/llama/bin/python \\
        --gguf-converter llama_cpp_python-0.3.36/vendor/llama.cpp

Ours is the model read from the folder, or from --checkpoint, in float32 on the CPU. The servers are transformers, vLLM,
mlx-lm and llama.cpp (xllamacpp, and the converter out of the source package of llama-cpp-python), each in a process of
its own, also in float32. Prompts are random token ids, below the model's original length and beyond it; the largest and
the mean difference over the whole vocabulary are printed, in nats.

A model whose answers hardly depend on where a token stands (an untrained one) agrees with every server, whatever RoPE
that computes. So it is also printed how far ours moves with another RoPE; if that is not beyond --tolerance, the
verdict is "cannot tell".

Exit code 3 if nothing is worse than such a verdict. Exit code 1 if a server that is installed cannot load the folder,
or is off by more than --tolerance, and the notes on that server (docs/servers.md) do not say so. A server that is not
installed is named, and is no fault.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from torchtitan.attention.backends import choose_backend
from torchtitan.distributed.context_parallel.local_batch import LocalBatch
from torchtitan.extensions.convert import ask_server
from torchtitan.extensions.convert.conversion import open_any
from torchtitan.extensions.convert.servers import notes_on_answers
from torchtitan.extensions.convert.weights import Weights
from torchtitan.extensions.evaluation.command_line import text_table
from torchtitan.extensions.evaluation.forward import Ranks, lay_out, logits_of
from torchtitan.models.rope import RopeArgs, rope_for
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

UNLIKELY = -60.0
"""Nats: less likely tokens count as this likely, for some servers compute probabilities, which end at 1e-38."""

NAMES = {"vllm": "vLLM"}
"""What the notes call a server, if it is another name than here."""

REPEATED = "--override-kv"

CANNOT_TELL = 3
"""Exit code, if no answer of the model shows which RoPE a server computes."""


@dataclass(frozen=True)
class Model:
    """An export, the prompts that it is asked, and our answers."""

    folder: Path
    original: int
    """The length in tokens before the extension."""
    prompts: list[list[int]]
    ours: torch.Tensor
    """Log-probabilities of the next token, float32 [prompts, vocabulary]."""
    moved: dict[str, float] = field(default_factory=dict)
    """How far, in nats, our answers move with another RoPE: to prompts "below" the original length, and "beyond" it."""


@dataclass(frozen=True)
class Row:
    """What came out for one model and one server."""

    model: str
    server: str
    versions: dict[str, str]
    options: dict[str, str]
    """Of the server's command line: none, or those of the notes on it."""
    verdict: str
    """agrees; cannot tell; off; fails; not installed"""
    below: list[float] | None = None
    """Mean and largest difference in nats, of prompts up to the original length."""
    beyond: list[float] | None = None
    agrees_at: list[int] = field(default_factory=list)
    """The lengths of the prompts that it answers as we do, in tokens."""
    remarks: list[str] = field(default_factory=list)
    """What is to be known of how it was asked, or why it failed."""
    notes: list[str] = field(default_factory=list)
    """Unless it agrees: what the export says about it."""
    explained: bool = False
    """Whether they account for it: a prompt that is answered otherwise is one that they name, or is answered as ours
    with the options that they name."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="exports: config.json, *.safetensors")
    parser.add_argument("--checkpoint", type=Path, help="the step-N folder that was exported")
    parser.add_argument(
        "--python-of", action="append", default=[], metavar="SERVER=PYTHON", help="the interpreter that has it"
    )
    parser.add_argument("--servers", nargs="+", default=list(ask_server.SERVERS), choices=list(ask_server.SERVERS))
    parser.add_argument("--gguf-converter", type=Path, help="folder with llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--lengths", type=int, nargs="+", help="of the prompts, in tokens")
    parser.add_argument("--original-length", type=int, help="before the extension, if config.json does not say")
    parser.add_argument("--tolerance", type=float, default=0.01, help="largest difference that agrees, in nats (0.01)")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    options = parser.parse_args(argv)
    try:
        pythons = interpreters(options.python_of)
        converter = gguf_converter(options.gguf_converter)
        models = [ask_ours(folder, options) for folder in options.folders]
        rows = []
        for name in options.servers:
            python = pythons.get(name, sys.executable)
            rows += with_notes(name, python, converter, models, options.tolerance)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(as_table(rows, models))
    if options.out:
        options.out.write_text(
            json.dumps(
                {
                    "tolerance": options.tolerance,
                    "moved": {str(m.folder): m.moved for m in models},
                    "rows": [asdict(r) for r in rows],
                },
                indent=1,
            )
        )
    if any(row.verdict in ("off", "fails") and not row.explained for row in rows):
        return 1
    return CANNOT_TELL if any(row.verdict == "cannot tell" for row in rows) else 0


def interpreters(given: list[str]) -> dict[str, str]:
    """SERVER=PYTHON, several times -> by name."""
    result = {}
    for text in given:
        name, _, python = text.partition("=")
        if name not in ask_server.SERVERS:
            raise UserError(f"--python-of {text}: the servers are {', '.join(ask_server.SERVERS)}.")
        if not Path(python).is_file():
            raise UserError(
                f"--python-of {text}: {python or 'after the = there'} is no file. Name a Python interpreter."
            )
        result[name] = python
    return result


def gguf_converter(given: Path | None) -> str | None:
    """Path of convert_hf_to_gguf.py, which is given or is in the folder that is given."""
    if given is None:
        return None
    file = given if given.suffix == ".py" else given / "convert_hf_to_gguf.py"
    if not file.is_file():
        raise UserError(
            f"--gguf-converter {given}: {file} does not exist. It is in the folder vendor/llama.cpp of the "
            "source package of llama-cpp-python."
        )
    return str(file.resolve())


def ask_ours(folder: Path, options: argparse.Namespace) -> Model:
    """The model's own answers. Prompts are shorter than the original or the trained length: a server writes a token."""
    exported = open_any(folder)
    weights = open_any(options.checkpoint) if options.checkpoint else exported
    trained, original = lengths_of(exported, options.original_length)
    beyond = [original + 1, (original + trained) // 2, trained - 1] if trained > original + 2 else []
    lengths = sorted(options.lengths or {max(original // 4, 1), original // 2, original - 1, *beyond})
    if min(lengths) < 1:
        raise UserError(f"--lengths {min(lengths)}: a prompt has at least one token.")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(weights.args.vocab_size, (n,), generator=generator) for n in lengths]
    ours, moved = our_log_probs(weights, prompts, original, options.tolerance)
    return Model(folder, original, [p.tolist() for p in prompts], ours, moved)


def lengths_of(weights: Weights, original: int | None) -> tuple[int, int]:
    """(length that the model was trained for, length before its extension) in tokens."""
    rope = weights.args.rope
    trained = rope.max_position_embeddings or int(weights.manifest.get("seq_len") or 0)
    if not trained:
        raise UserError(
            f"{weights.where} does not say how long the model was trained for: config.json lacks "
            "max_position_embeddings."
        )
    of_method = getattr(rope.scaling, "original_max_position_embeddings", None)
    if of_method is None and getattr(rope.scaling, "rope_type", None) == "linear":
        of_method = round(trained / rope.scaling.factor)  # type: ignore[union-attr]
    return trained, original or of_method or trained


@torch.no_grad()
def our_log_probs(
    weights: Weights, prompts: list[torch.Tensor], original: int, tolerance: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """float32 [prompts, vocabulary]: after each prompt's last token. And Model.moved, from the first prompts (the
    shortest) that move further than `tolerance`, if there are such."""
    ranks = Ranks(backend=choose_backend("auto", "cpu"))
    with torch.device("meta"):
        model = Transformer(weights.args, ranks.backend)
    model.to_empty(device="cpu")
    model.tie_embeddings()
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.read(name))
    rope = weights.args.rope
    plain = 1e4 if rope.scaling or rope.theta > 1e5 else 1e6  # far from the model's own
    rows, moved = [], {}
    for prompt in prompts:
        last = torch.tensor([len(prompt) - 1])
        local = lay_out(model, ranks, [prompt])

        def answer(of: RopeArgs, local: LocalBatch = local, last: torch.Tensor = last) -> torch.Tensor:
            return logits_of(model.eval(), ranks, local, last, of)[0].log_softmax(-1)

        rows.append(answer(rope_for(rope, len(prompt))))
        side = "below" if len(prompt) <= original else "beyond"
        if moved.get(side, 0.0) <= tolerance:
            further = (answer(replace(rope, theta=plain, scaling=None)) - rows[-1]).abs().max().item()
            moved[side] = max(moved.get(side, 0.0), further)
    return torch.stack(rows), moved


def with_notes(name: str, python: str, converter: str | None, models: list[Model], tolerance: float) -> list[Row]:
    """Asks the server plainly; and where it did not agree once more, with the options of the notes on it."""
    rows = compare(name, python, converter, [(model, {}) for model in models], tolerance)
    notes: list[list[tuple[str, dict[str, str]]]] = [[] for _ in rows]
    again: list[tuple[Model, dict[str, str]]] = []
    for i, (model, row) in enumerate(zip(models, rows, strict=True)):
        if row.verdict in ("off", "fails"):
            config = json.loads((model.folder / "config.json").read_text())
            notes[i] = notes_on_answers(config, NAMES.get(name, name), next(iter(row.versions.values()), ""))
            given = together([options for _, options in notes[i] if options])
            again += [(that_fit(model, options), options) for options in given]
    noted = compare(name, python, converter, again, tolerance)
    for i, (model, row) in enumerate(zip(models, rows, strict=True)):
        own = [row, *(other for other in noted if other.model == row.model)]
        right = {length for other in own for length in other.agrees_at}
        said = [text for text, options in notes[i] if not options]
        explained = bool(notes[i]) and all(
            length in right or any(is_about(text, length) for text in said) for length in map(len, model.prompts)
        )
        rows[i] = replace(row, notes=[text for text, _ in notes[i]], explained=explained)
        noted = [
            replace(other, explained=explained and other.verdict not in ("agrees", "cannot tell"))
            if other in own
            else other
            for other in noted
        ]
    return rows + noted


def is_about(note: str, length: int) -> bool:
    """Whether the note says that a prompt of this length is answered otherwise: all are, unless it names a limit."""
    limit = re.search(r"texts of (up to|more than) (\d+) tokens only", note)
    return limit is None or (length > int(limit[2])) == (limit[1] == "up to")


def together(options: list[dict[str, str]]) -> list[dict[str, str]]:
    """Options that contradict each other (two lengths) need two servers; all others are given to the first."""
    servers: list[dict[str, str]] = []
    for given in options:
        first = servers[0] if servers else {}
        if REPEATED in first and REPEATED in given:  # llama.cpp takes several, with a comma between them
            given = given | {REPEATED: f"{first[REPEATED]},{given[REPEATED]}"}
        elif any(first.get(key, value) != value for key, value in given.items()):
            servers.append(given)
            continue
        servers[:1] = [first | given]
    return servers


def that_fit(model: Model, given: dict[str, str]) -> Model:
    """The model with the prompts for which a server with these options has room, and for a token to write."""
    longest = int(given.get("--max-model-len", 0)) or math.inf
    kept = [i for i, prompt in enumerate(model.prompts) if len(prompt) < longest]
    return replace(model, prompts=[model.prompts[i] for i in kept], ours=model.ours[kept])


def compare(
    name: str, python: str, converter: str | None, asked: list[tuple[Model, dict[str, str]]], tolerance: float
) -> list[Row]:
    """asked: models, each with options for the server. One process is asked all of them, since some take a minute to
    start; if it dies, the next one goes on behind the model that it died of."""
    rows: list[Row] = []
    while len(rows) < len(asked):
        left = asked[len(rows) :]
        request = [
            {"folder": str(m.folder.resolve()), "prompts": m.prompts, "vocab_size": m.ours.shape[1], "options": given}
            for m, given in left
        ]
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            (work / "request.json").write_text(json.dumps({"models": request, "gguf_converter": converter}))
            with (work / "log").open("w") as log:
                code = subprocess.run([python, ask_server.__file__, name, work], stdout=log, stderr=log).returncode
            report = json.loads((work / "report.json").read_text()) if (work / "report.json").exists() else {}
            said = last_words((work / "log").read_text(errors="replace"))
            died = {"remarks": [], "error": f"its process ended with code {code}: {said}"}
            empty = [
                Row(str(model.folder), name, report.get("versions", {}), given, "not installed")
                for model, given in left
            ]
            if "missing" in report:
                return rows + [replace(row, remarks=[report["missing"]]) for row in empty]
            entries = [*report.get("models", []), died][: len(left)]
            for i, entry in enumerate(entries):
                rows.append(judge(empty[i], left[i][0], entry, work / f"{i}.f32", tolerance))
    return rows


def last_words(log: str) -> str:
    """The last line that speaks of an error, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in reversed(lines) if re.search("error|assert|fatal|killed", line, re.I)), lines[-1])


def judge(row: Row, model: Model, entry: dict[str, Any], answers: Path, tolerance: float) -> Row:
    """The row with its verdict. answers: float32 [prompts, vocabulary], as many as the server has given."""
    remarks = [*dict.fromkeys(entry["remarks"]), *([entry["error"]] if "error" in entry else [])]
    given = answers.read_bytes() if answers.exists() else b""
    prompts, size = len(given) // (4 * model.ours.shape[1]), len(given) // 4
    if size != prompts * model.ours.shape[1] or (prompts < len(model.prompts) and "error" not in entry):
        remarks.append(f"{size:,} numbers came back, not {model.ours.numel():,}: one for each id and prompt")
        prompts = 0
    if prompts == 0:
        return replace(row, verdict="fails", remarks=remarks)
    theirs = torch.frombuffer(bytearray(given), dtype=torch.float32).view(prompts, -1)
    difference = (theirs.clamp(min=UNLIKELY) - model.ours[:prompts].clamp(min=UNLIKELY)).abs()
    difference = difference.nan_to_num(nan=math.inf)
    is_below = torch.tensor([len(prompt) <= model.original for prompt in model.prompts[:prompts]])
    below, beyond = (
        [part.mean().item(), part.max().item()] if len(part) else None
        for part in (difference[is_below], difference[~is_below])
    )
    agrees = (difference.amax(1) <= tolerance).tolist()
    lengths = [len(prompt) for prompt, right in zip(model.prompts[:prompts], agrees, strict=True) if right]
    same = "agrees" if all(further > tolerance for further in model.moved.values()) else "cannot tell"
    verdict = "fails" if prompts < len(model.prompts) else same if all(agrees) else "off"
    return replace(row, verdict=verdict, below=below, beyond=beyond, agrees_at=lengths, remarks=remarks)


def as_table(rows: list[Row], models: list[Model]) -> str:
    """A line for each model and server, what was said of it, and what was compared."""
    lines = []
    for model in models:
        lengths = ", ".join(f"{len(prompt):,}" for prompt in model.prompts)
        lines += [f"{model.folder}: prompts of {lengths} tokens; original length {model.original:,}"]
        moved = " and ".join(f"{further:.1e} {side} the original length" for side, further in model.moved.items())
        lines += [
            f"With another RoPE our own answers differ by {moved}: a server's should differ by far less.",
            "",
        ]
        own = [row for row in rows if row.model == str(model.folder)]
        cells = [["server", "below: mean", "largest", "beyond: mean", "largest", ""]]
        for row in own:
            numbers = [f"{x:.1e}" for x in row.below or ()] or ["-", "-"]
            numbers += [f"{x:.1e}" for x in row.beyond or ()] or ["-", "-"]
            asked = " ".join([row.server, *(f"{key} {value}" for key, value in row.options.items())])
            cells.append([asked, *numbers, f"{row.verdict}, as noted" if row.explained else row.verdict])
        lines += text_table(cells) + [""]
        remarks = [f"{row.server}: {remark}" for row in own for remark in row.remarks]
        notes = [f"the export notes: {note}" for row in own for note in row.notes]
        lines += [*dict.fromkeys(remarks), *notes, ""]
    versions = {row.server: ", ".join(f"{p} {v}" for p, v in row.versions.items()) for row in rows}
    return "\n".join([*lines, *(f"{name}: {said}" for name, said in versions.items() if said)])


if __name__ == "__main__":
    sys.exit(main())
