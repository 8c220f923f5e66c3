"""Units that another corpus of the same source has already: taken over by a link instead of being made again.

A mended, added or removed file makes another corpus. Most of its units are made of the same content as before; their
keys (units.unit_keys) say so. They are looked for in unfinished folders, and in finished ones, whose UNITS_FILE names
the unit of each shard. The folder that a unit is taken from stays as it is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json, sync, written

logger = logging.getLogger(__name__)

UNITS_FILE = "units.json"
"""In a finished corpus: {"units": [the counts of each unit, its key, and the name of its shard or null]}."""


def left_folders(cache: Path, source: str) -> list[Path]:
    """The unfinished folders of a source."""
    wanted = re.compile(rf"\.unfinished-{re.escape(source)}-[0-9a-f]{{16}}\.[0-9a-f]{{8}}")
    return sorted(folder for folder in cache.glob(".unfinished-*") if wanted.fullmatch(folder.name) and folder.is_dir())


def take_over(cache: Path, source: str, left: Sequence[Path], missing: Mapping[str, Path], skips: bool) -> int:
    """Make the units that are missing (key -> the file of its documents) out of those of other corpora of the source,
    finished ones and the unfinished ones `left`; skips: also units that lack bad records. How many were found."""
    made = re.compile(rf"{re.escape(source)}-[0-9a-f]{{16}}")
    finished = sorted(path.parent for path in cache.glob(f"*/{UNITS_FILE}") if made.fullmatch(path.parent.name))
    wanted = dict(missing)
    for folder in [*finished, *left]:
        taken = 0
        for key, counts, documents in _units_in(folder) if wanted else ():
            if key in wanted and (skips or not counts.get("bad")) and _take(documents, counts, wanted[key]):
                del wanted[key]
                taken += 1
        if taken:
            logger.info(
                "%s: %d units are made of the same text as in %s: they are taken from there", source, taken, folder
            )
    if len(wanted) < len(missing):
        sync(next(iter(missing.values())).parent)
    return len(missing) - len(wanted)


def _units_in(folder: Path) -> Iterator[tuple[str, dict[str, Any], Path | None]]:
    """Key, counts, and the file of the documents (None: there are none) of each unit of a folder; what is damaged, or
    deleted meanwhile, is passed over."""
    with contextlib.suppress(OSError, UserError, KeyError, TypeError, AttributeError):
        if not folder.name.startswith("."):
            for unit in read_json(folder / UNITS_FILE)["units"]:
                shard = unit.pop("shard")
                yield unit.pop("key"), unit, folder / shard if shard else None
            return
    for path in sorted(folder.glob("unit-*.json")):
        with contextlib.suppress(OSError, UserError):
            yield path.stem.rpartition("-")[2], read_json(path), path.with_suffix(".arrow")


def _take(documents: Path | None, counts: dict[str, Any], file: Path) -> bool:
    """Link or copy a unit to the file; False if it is not there, or not whole."""
    try:
        if documents is not None and documents.stat().st_size != counts["bytes"]:
            return False
        file.unlink(missing_ok=True)  # its counts are missing: perhaps it was cut short by a loss of power
        if documents is None:
            file.touch()
        else:
            try:
                os.link(documents, file)
            except FileExistsError:
                return False  # another process makes this unit just now
            except OSError:  # a file system without links
                with written(file, durable=True, unique=True) as path:
                    shutil.copyfile(documents, path)
        if file.stat().st_size != counts["bytes"]:
            return False
        with written(file.with_suffix(".json"), unique=True) as path:
            path.write_text(json.dumps(counts))
    except (FileNotFoundError, KeyError, TypeError):
        return False
    return True
