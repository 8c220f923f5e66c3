"""Folders of studies that make nothing twice: what is there must have been made with the options of this run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError

OPTIONS = "options.json"


def begin_or_go_on(folder: Path, options: dict[str, Any]) -> None:
    """Make the folder and write the options into it; UserError that names an option if it was begun with another."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = json.loads(json.dumps(options, default=str))
    file = folder / OPTIONS
    if not file.exists():
        file.write_text(json.dumps(asked, indent=1) + "\n")
        return
    begun = json.loads(file.read_text())
    for key in sorted(begun.keys() | asked.keys()):
        if begun.get(key) != asked.get(key):
            raise UserError(
                f"{folder} was begun with {key} = {begun.get(key)}, and not {asked.get(key)}: its results "
                "would be kept. Name another folder, or delete this one."
            )
