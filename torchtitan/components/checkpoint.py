"""Checkpoints: complete or absent, never half.

A checkpoint is step-N/: DCP files with the tensors (model, optimizer, random state) and manifest.json with everything
else. It is written as step-N.partial/ and renamed by the coordinator once every rank's files are on disk, in the
foreground or in DCP's background thread alike; a kill at any moment leaves the last complete one. The manifest holds
size and CRC-32 of every file, so that damage is found on resume and the one before is taken.

A write that fails is tried again by the rank that failed, while the others wait: every rank learns in the end of the
same success or failure, in the foreground or in the background.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.components.manifest import (
    FORMAT,
    MANIFEST,
    check_load_step,
    complete_steps,
    find_damage,
    size_and_crc,
)
from torchtitan.config.schema import Checkpoint
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import sync
from torchtitan.tools.logging import logger

ROOM = 1.02  # a checkpoint is larger than its tensors by names and checksums
T = TypeVar("T")


class WholeWriter(FileSystemWriter):
    """Writes DCP files into step-N.partial/ and, once all ranks have, publishes the folder as step-N/."""

    def __init__(
        self,
        target: Path,
        manifest: dict[str, Any],
        single_file_per_rank: bool = True,
        needed: int = 0,
        retries: int = 0,
        retry_seconds: float = 0.0,
    ):
        """needed: bytes that must be free, or 0 to try without looking; retries: of each rank's writing."""
        self.target, self.manifest, self.needed = target, manifest, needed
        self.retries, self.retry_seconds = retries, retry_seconds
        self.files: dict[str, list[int]] = {}
        self.partial = target.with_name(target.name + ".partial")
        super().__init__(str(self.partial), single_file_per_rank=single_file_per_rank)

    def prepare_local_plan(self, plan: Any) -> Any:
        """Every rank: the folder."""
        return self._tried(super().prepare_local_plan, plan)

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """Coordinator, before any rank writes: is there room?"""
        self._tried(self._check_room)
        return super().prepare_global_plan(plans)

    def _check_room(self) -> None:
        usage = shutil.disk_usage(self.partial)
        if usage.total and usage.free < self.needed:  # some network file systems do not say
            raise OSError(
                errno.ENOSPC,
                f"it needs {self.needed / 2**30:.3f} GiB, and {usage.free / 2**30:.3f} GiB are free",
                str(self.partial),
            )

    def _tried(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments), again after longer and longer waits while it fails."""
        for attempt in range(self.retries):
            try:
                return function(*arguments)
            except (OSError, RuntimeError) as e:  # PyTorch's zip writer makes the latter of the former
                seconds = self.retry_seconds * 2**attempt
                logger.warning(
                    f"writing {self.target} failed ({str(e).splitlines()[0]}); attempt {attempt + 1} of "
                    f"{self.retries + 1}, the next in {seconds:g} s"
                )
                time.sleep(seconds)
        return function(*arguments)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Every rank: the tensors, then the checksums of its own files for the coordinator."""
        return self._tried(self._write_own, plan, planner)

    def _write_own(self, plan: Any, planner: Any) -> Any:
        prefix = plan.storage_data.prefix
        for left in (*self.partial.glob(f"{prefix}*"), *self.partial.glob(f"checksums-{prefix}*")):
            left.unlink()  # of an attempt that failed; its room may be what is missing
        done = super().write_data(plan, planner)
        files = {result.storage_data.relative_path for result in done.value()}
        if files:
            sums = {name: size_and_crc(self.partial / name) for name in sorted(files)}
            _write_json(self.partial / f"checksums-{min(sums)}.json", sums)
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        """Coordinator, after all ranks have written: the manifest, and the rename that makes it real."""
        self._tried(self._publish, metadata, results)

    def _publish(self, metadata: Any, results: Any) -> None:
        if self.partial.exists():  # not so if an attempt failed at the very last
            super().finish(metadata, results)
            self.files[".metadata"] = size_and_crc(self.partial / ".metadata")
            for part in sorted(self.partial.glob("checksums-*.json")):
                self.files |= json.loads(part.read_text())
                part.unlink()
            _write_json(self.partial / MANIFEST, self.manifest | {"files": self.files})
            self.partial.rename(self.target)
        sync(self.target.parent)


class Checkpointer:
    """Saves and loads the checkpoints of one folder."""

    def __init__(self, config: Checkpoint, dump_folder: Path):
        self.config = config
        self.folder = dump_folder / config.folder
        self._pending: tuple[Future[Any], Path] | None = None
        # its own group: a save in the background must not meet the training's collectives
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.save_timeout_seconds))

    def prepare(self) -> None:
        """Rank 0: make the folder and clear what killed runs left half written."""
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for pattern in ("step-*.partial", "step-*.deleting"):
                for left in self.folder.glob(pattern):
                    shutil.rmtree(left)
        dist.barrier(self.group)

    def save(self, state: dict[str, Any], manifest: dict[str, Any], last: bool = False) -> bool:
        """Collective. state: {part: {name: tensor}}; manifest: JSON with `step`. A save under way is waited for.

        False if it failed and the run goes on (checkpoint.on_failed_save); last: of a run, then failure is an error.
        """
        self.wait()
        size = sum(t.numel() * t.element_size() for part in state.values() for t in part.values())
        writer = WholeWriter(
            self.folder / f"step-{manifest['step']}",
            {"format": FORMAT} | manifest,
            needed=int(size * ROOM),
            retries=self.config.save_retries,
            retry_seconds=self.config.retry_seconds,
        )
        if self.config.async_mode == "async":
            # the writer copies the state before this returns; the rest happens in DCP's thread
            future: Any = dcp.async_save(state, storage_writer=writer, process_group=self.group)
            self._pending = future, writer.target
            return True
        return self._completed(
            lambda: dcp.save(state, storage_writer=writer, process_group=self.group), writer.target, last
        )

    def wait(self, last: bool = False) -> bool:
        """Collective. Until a save in the background is complete; as save()."""
        if self._pending is None:
            return True
        (future, target), self._pending = self._pending, None
        return self._completed(future.result, target, last)

    def must_stop(self) -> bool:
        """Whether this rank has seen the save in the background fail, and that ends the run: wait() will raise."""
        if self._pending is None or self.config.on_failed_save != "stop" or not self._pending[0].done():
            return False
        return self._pending[0].exception() is not None

    def _completed(self, saving: Callable[[], Any], target: Path, last: bool) -> bool:
        try:
            with explain_failure(self.folder):
                saving()
        except UserError as e:
            self._discard(target)
            if last or self.config.on_failed_save == "stop":
                raise
            logger.error(f"{e} Training goes on (checkpoint.on_failed_save); the next save is tried at its time.")
            return False
        logger.info(f"checkpoint: {target}")
        self._delete_old()
        return True

    def _discard(self, target: Path) -> None:
        """Collective. Give back the room of a save that failed, which may be all there is for the next."""
        if dist.get_rank() == 0:
            partial = target.with_name(target.name + ".partial")
            with suppress(OSError):
                if target.exists():  # renamed, but perhaps not on disk for good
                    target.rename(partial)
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier(self.group)

    def _delete_old(self) -> None:
        if self.config.keep_latest_k and dist.get_rank() == 0:
            for step in complete_steps(self.folder)[: -self.config.keep_latest_k]:
                # renamed first, so that a kill leaves no half checkpoint; in a thread, since the other ranks wait
                try:
                    path = (self.folder / f"step-{step}").rename(self.folder / f"step-{step}.deleting")
                except OSError as e:
                    logger.warning(f"an old checkpoint is not deleted: {e}")
                    return
                threading.Thread(target=shutil.rmtree, args=(path, True)).start()

    def find(self) -> Path | None:
        """Collective. The checkpoint to resume from: load_step, or the newest undamaged one; None if there is none.

        All ranks share the reading of the files; a damaged checkpoint is skipped with a warning that names the file.
        Checkpoints later than the one that is returned are renamed to step-N.replaced: they are damaged or of a run
        that is being taken back, and must not be resumed from, nor counted in keep_latest_k, once this run saves.
        """
        here = self.config.load_step, complete_steps(self.folder)
        wanted, steps = _from_rank0(here if dist.get_rank() == 0 else None, self.group)
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
        try:
            free = f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB are free there"
        except OSError:
            free = "what is free there cannot be asked"
        raise UserError(
            f"A checkpoint could not be written to {folder}: {system or 'a write failed'}; {free}. Earlier "
            "checkpoints are whole: make room (checkpoint.keep_latest_k deletes older ones), or mount it for writing, "
            "and start again."
        ) from e


def _set_aside(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        target = path.with_name(path.name + ".replaced")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        logger.warning(f"{path} is later than the checkpoint that is resumed from; it is kept as {target.name}")


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
