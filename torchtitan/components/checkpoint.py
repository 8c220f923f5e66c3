"""Checkpoints: complete or absent, never half.

A checkpoint is step-N/: DCP files with the tensors (model, optimizer, random state) and manifest.json with everything
else. It is written as step-N.partial/ and renamed by the coordinator once every rank's files are on disk, in the
foreground or in DCP's background thread alike; a kill at any moment leaves the last complete one. The manifest holds
size and CRC-32 of every file, so that damage is found on resume and the one before is taken.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.config.job_config import Checkpoint
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import sync
from torchtitan.tools.logging import logger

MANIFEST = "manifest.json"
FORMAT = 1
LONGEST_WAIT = timedelta(hours=2)  # for the rank with the slowest disk; far beyond what a collective may take


class WholeWriter(FileSystemWriter):
    """Writes DCP files into step-N.partial/ and, once all ranks have, publishes the folder as step-N/."""

    def __init__(self, target: Path, manifest: dict[str, Any], single_file_per_rank: bool = True):
        self.target, self.manifest = target, manifest
        self.partial = target.with_name(target.name + ".partial")
        super().__init__(str(self.partial), single_file_per_rank=single_file_per_rank)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Every rank: the tensors, then the checksums of its own files for the coordinator."""
        done = super().write_data(plan, planner)
        files = {result.storage_data.relative_path for result in done.value()}
        if files:
            sums = {name: _size_and_crc(self.partial / name) for name in sorted(files)}
            _write_json(self.partial / f"checksums-{min(sums)}.json", sums)
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        """Coordinator, after all ranks have written: the manifest, and the rename that makes it real."""
        super().finish(metadata, results)
        files = {".metadata": _size_and_crc(self.partial / ".metadata")}
        for part in sorted(self.partial.glob("checksums-*.json")):
            files |= json.loads(part.read_text())
            part.unlink()
        _write_json(self.partial / MANIFEST, self.manifest | {"files": files})
        self.partial.rename(self.target)
        sync(self.target.parent)


class Checkpointer:
    """Saves and loads the checkpoints of one folder."""

    def __init__(self, config: Checkpoint, dump_folder: Path):
        self.config = config
        self.folder = dump_folder / config.folder
        self._pending: Future[Any] | None = None
        # its own group: a save in the background must not meet the training's collectives
        self.group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def prepare(self) -> None:
        """Rank 0: make the folder and clear what killed runs left half written."""
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for pattern in ("step-*.partial", "step-*.deleting"):
                for left in self.folder.glob(pattern):
                    shutil.rmtree(left)
        dist.barrier(self.group)

    def save(self, state: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Collective. state: {part: {name: tensor}}; manifest: JSON with `step`. A save under way is waited for."""
        self.wait()
        writer = WholeWriter(self.folder / f"step-{manifest['step']}", {"format": FORMAT} | manifest)
        if self.config.async_mode == "async":
            # the writer copies the state before this returns; the rest happens in DCP's thread
            self._pending = dcp.async_save(state, storage_writer=writer, process_group=self.group)  # type: ignore
        else:
            with explain_failure(self.folder):
                dcp.save(state, storage_writer=writer, process_group=self.group)
            logger.info(f"checkpoint: {writer.target}")
            self._delete_old()

    def wait(self) -> None:
        """Until a save in the background is complete; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with explain_failure(self.folder):
                pending.result()
            self._delete_old()

    def _delete_old(self) -> None:
        if self.config.keep_latest_k and dist.get_rank() == 0:
            for step in complete_steps(self.folder)[: -self.config.keep_latest_k]:
                # renamed first, so that a kill leaves no half checkpoint; in a thread, since the other ranks wait
                path = (self.folder / f"step-{step}").rename(self.folder / f"step-{step}.deleting")
                threading.Thread(target=shutil.rmtree, args=(path, True)).start()

    def find(self) -> Path | None:
        """Collective. The checkpoint to resume from: load_step, or the newest undamaged one; None if there is none.

        All ranks share the reading of the files; a damaged checkpoint is skipped with a warning that names the file.
        Checkpoints later than the one that is returned are renamed to step-N.replaced: they are damaged or of a run
        that is being taken back, and must not be resumed from, nor counted in keep_latest_k, once this run saves.
        """
        wanted = self.config.load_step
        steps = _from_rank0(complete_steps(self.folder) if dist.get_rank() == 0 else None, self.group)
        check_load_step(self.folder, wanted, steps)
        for step in [wanted] if wanted >= 0 else reversed(steps):
            path = self.folder / f"step-{step}"
            found = damage_of_all(path, self.group)
            if not found:
                if dist.get_rank() == 0:
                    _set_aside([self.folder / f"step-{later}" for later in steps if later > step])
                dist.barrier(self.group)
                return path
            if wanted >= 0:
                raise UserError(f"checkpoint.load_step = {wanted}: {found}")
            if dist.get_rank() == 0:
                logger.warning(f"Skipping a damaged checkpoint: {found}")
        if steps:
            raise UserError(
                f"Every checkpoint in {self.folder} is damaged (steps {', '.join(map(str, steps))}). "
                "Restore one, or choose another job.dump_folder to start anew."
            )
        return None


def load(path: Path, state: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Collective. Reads into the tensors of state, whatever layout they were saved from.

    Random states of ranks that the saving run did not have are left as they are.
    """
    reader = FileSystemReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    state = dict(state)
    state["rng"] = {k: v for k, v in state.get("rng", {}).items() if f"rng.{k}" in saved}
    try:
        dcp.load(state, storage_reader=reader, process_group=group)
    except CheckpointException as e:  # a BaseException, which `except Exception` would let through
        raise RuntimeError(f"{path} could not be loaded: {e}") from e


def saved_parts(path: Path) -> set[str]:
    """Of "model", "optimizer" and "rng", those that a checkpoint holds."""
    return {name.partition(".")[0] for name in FileSystemReader(str(path)).read_metadata().state_dict_metadata}


def damage_of_all(path: Path, group: dist.ProcessGroup) -> str | None:
    """Collective. find_damage with the reading shared by all ranks; the first that some rank found."""
    damage: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(damage, find_damage(path, dist.get_rank(), dist.get_world_size()), group=group)
    return next(filter(None, damage), None)


@contextmanager
def explain_failure(folder: Path) -> Iterator[None]:
    """A save that fails for want of room or permission becomes a UserError that says so."""
    try:
        yield
    except CheckpointException as e:  # a BaseException, which `except Exception` would let through
        causes = [failure[0] for failure in e.failures.values()]
        causes += [c.__context__ for c in causes if c.__context__]
        system = next((c for c in causes if isinstance(c, OSError)), None)
        # PyTorch's zip writer loses the system's error and fails an assertion
        if system is None and not any("inline_container" in str(c) for c in causes):
            raise RuntimeError(f"a checkpoint could not be written to {folder}: {e}") from e
        free = shutil.disk_usage(folder).free / 2**30
        raise UserError(
            f"A checkpoint could not be written to {folder}: {system or 'a write failed'}; {free:.2f} GiB are free "
            "there. Earlier checkpoints are whole: make room (checkpoint.keep_latest_k deletes older ones) and start "
            "again."
        ) from e


def _set_aside(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        target = path.with_name(path.name + ".replaced")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        logger.warning(f"{path} is later than the checkpoint that is resumed from; it is kept as {target.name}")


def complete_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints, ascending."""
    names = (re.fullmatch(r"step-(\d+)", p.name) for p in folder.glob("step-*"))
    return sorted(int(m[1]) for m in names if m)


def check_load_step(folder: Path, wanted: int, steps: list[int]) -> None:
    """UserError if checkpoint.load_step names a step (one from 0 up) that is not among those in the folder."""
    if wanted >= 0 and wanted not in steps:
        raise UserError(
            f"checkpoint.load_step = {wanted}, but {folder} holds no complete checkpoint of that step; there: "
            f"{', '.join(map(str, steps)) or 'none'}. -1 takes the newest, and starts anew where there is none."
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of step-N/; UserError if it is missing, not JSON, or not one of this format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this version reads {FORMAT}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path / MANIFEST} cannot be read: {type(e).__name__} {e}.") from None


def find_damage(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a sentence that names the file, or None. Reads every parts-th file."""
    try:
        manifest = read_manifest(path)
    except UserError as e:
        return str(e)
    for name, expected in sorted(manifest.get("files", {}).items())[part::parts]:
        try:
            actual = _size_and_crc(path / name)
        except OSError as e:
            return f"{path / name} cannot be read: {e.strerror}."
        if actual != expected:
            return f"{path / name} has size and CRC-32 {actual}, the manifest says {expected}."
    return None


def _size_and_crc(path: Path) -> list[int]:
    crc = size = 0
    with path.open("rb") as f:
        while block := f.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as f:
        json.dump(content, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _from_rank0(value: Any, group: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def random_state() -> dict[str, torch.Tensor]:
    """This rank's CPU and CUDA generators, named by rank."""
    rank = dist.get_rank()
    state = {f"cpu-{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"cuda-{rank}"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Undo random_state()."""
    for name, value in state.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(value)
        else:
            torch.set_rng_state(value)
