"""Checkpoints: complete or absent, never half.

A checkpoint is step-N/: DCP files with the tensors (model, optimizer, random state) and manifest.json with everything
else. It is written as step-N.partial/. The coordinator renames it once the files of all ranks are on disk, whether the
save runs in the foreground or in DCP's background thread. A kill at any moment leaves the last complete checkpoint. The
manifest holds size and CRC-32 of every file, so that a resume finds damage and takes the previous checkpoint.
(tools/folders.written does the same for a file that one process writes; this folder is written by all ranks.)

A rank whose write fails tries again while the other ranks wait: in the end all ranks learn of the same success or
failure.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.components.manifest import (
    MANIFEST,
    MANIFEST_FORMAT,
    check_load_step,
    complete_steps,
    find_damage,
    size_and_crc,
)
from torchtitan.config.schema import Checkpoint
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import partial_of, sync, write_text, written
from torchtitan.tools.logging import logger

OVERHEAD = 1.02  # a checkpoint is its tensors, their names and checksums
T = TypeVar("T")


class WholeWriter(FileSystemWriter):
    """Writes DCP files into step-N.partial/ and, once all ranks have written, renames the folder to step-N/."""

    def __init__(
        self,
        target: Path,
        manifest: dict[str, Any],
        single_file_per_rank: bool = True,
        needed: int = 0,
        retries: int = 0,
        retry_seconds: float = 0.0,
        more_files: Mapping[str, bytes] = MappingProxyType({}),
    ):
        """needed: bytes that must be free, or 0 to write without a check; retries: how many times a rank retries.
        more_files: name -> content of what the coordinator writes beside the tensors."""
        self.target, self.manifest, self.needed = target, manifest, needed
        self.retries, self.retry_seconds = retries, retry_seconds
        self.more_files = more_files
        self.files: dict[str, list[int]] = {}
        self.partial = partial_of(target)
        super().__init__(str(self.partial), single_file_per_rank=single_file_per_rank)

    def prepare_local_plan(self, plan: Any) -> Any:
        """Every rank: make the folder."""
        return self._tried(super().prepare_local_plan, plan)

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """Coordinator, before any rank writes: check that there is room."""
        self._tried(self._check_room)
        return super().prepare_global_plan(plans)

    def _check_room(self) -> None:
        usage = shutil.disk_usage(self.partial)
        if usage.total and usage.free < self.needed:  # some network file systems report 0
            raise OSError(
                errno.ENOSPC,
                f"it needs {self.needed / 2**30:.3f} GiB, and {usage.free / 2**30:.3f} GiB are free",
                str(self.partial),
            )

    def _tried(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments), retried after longer and longer waits."""
        for attempt in range(self.retries):
            try:
                return function(*arguments)
            except (OSError, RuntimeError) as e:  # PyTorch's zip writer turns an OSError into a RuntimeError
                seconds = self.retry_seconds * 2**attempt
                logger.warning(
                    f"writing {self.target} failed ({str(e).splitlines()[0]}); attempt {attempt + 1} of "
                    f"{self.retries + 1}, the next in {seconds:g} s"
                )
                time.sleep(seconds)
        return function(*arguments)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Every rank: write its tensors, then the checksums of its files for the coordinator."""
        return self._tried(self._write_own, plan, planner)

    def _write_own(self, plan: Any, planner: Any) -> Any:
        prefix = plan.storage_data.prefix
        for left in (*self.partial.glob(f"{prefix}*"), *self.partial.glob(f"checksums-{prefix}*")):
            left.unlink()  # left by an attempt that failed; it may take the room that is missing
        done = super().write_data(plan, planner)
        files = {result.storage_data.relative_path for result in done.value()}
        if files:
            sums = {name: size_and_crc(self.partial / name) for name in sorted(files)}
            _write_json(self.partial / f"checksums-{min(sums)}.json", sums)
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        """Coordinator, after all ranks have written: write the manifest, and rename the folder."""
        self._tried(self._publish, metadata, results)

    def _publish(self, metadata: Any, results: Any) -> None:
        if self.partial.exists():  # otherwise an earlier attempt has failed after the rename
            super().finish(metadata, results)
            self.files[".metadata"] = size_and_crc(self.partial / ".metadata")
            for part in sorted(self.partial.glob("checksums-*.json")):
                self.files |= json.loads(part.read_text())
                part.unlink()
            for name, content in self.more_files.items():
                with written(self.partial / name, durable=True) as aside:
                    aside.write_bytes(content)
                self.files[name] = size_and_crc(self.partial / name)
            _write_json(self.partial / MANIFEST, self.manifest | {"files": self.files})
            self.partial.rename(self.target)
        sync(self.target.parent)


class Checkpointer:
    """Saves and loads the checkpoints of one folder."""

    def __init__(self, config: Checkpoint, dump_folder: Path):
        self.config = config
        self.folder = dump_folder / config.folder
        self._pending: tuple[Future[Any], Path] | None = None
        # its own group: collectives of a background save must not mix with those of training
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.save_timeout_seconds))

    def prepare(self) -> None:
        """Collective. Rank 0 makes the folder and deletes what killed runs have left incomplete."""
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for pattern in ("step-*.partial", "step-*.deleting"):
                for left in self.folder.glob(pattern):
                    shutil.rmtree(left)
        dist.barrier(self.group)

    def save(
        self,
        state: dict[str, Any],
        manifest: dict[str, Any],
        last: bool = False,
        more_files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> bool:
        """Collective. Waits for a save under way first. state: {part: {name: tensor}}; manifest: JSON with `step`;
        more_files: of rank 0, see WholeWriter.

        False if it failed and the run goes on (checkpoint.on_failed_save). last: the last save of a run, of which a
        failure is a UserError in any case.
        """
        self.wait()
        size = sum(t.numel() * t.element_size() for part in state.values() for t in part.values())
        writer = WholeWriter(
            self.folder / f"step-{manifest['step']}",
            {"format": MANIFEST_FORMAT} | manifest,
            needed=int(size * OVERHEAD),
            retries=self.config.save_retries,
            retry_seconds=self.config.retry_seconds,
            more_files=more_files,
        )
        if self.config.async_mode == "async":
            # async_save copies the state before it returns; the rest happens in DCP's thread
            future: Any = dcp.async_save(state, storage_writer=writer, process_group=self.group)
            self._pending = future, writer.target
            return True
        return self._completed(
            lambda: dcp.save(state, storage_writer=writer, process_group=self.group), writer.target, last
        )

    def wait(self, last: bool = False) -> bool:
        """Collective. Wait for the save in the background, if there is one; result and `last` as of save()."""
        if self._pending is None:
            return True
        (future, target), self._pending = self._pending, None
        return self._completed(future.result, target, last)

    def must_stop(self) -> bool:
        """Whether this rank knows that the background save has failed and that this ends the run: wait() will raise."""
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
            logger.error(f"{e} Training goes on (checkpoint.on_failed_save) until the next save is due.")
            return False
        logger.info(f"checkpoint: {target}")
        self._delete_old()
        return True

    def _discard(self, target: Path) -> None:
        """Collective. Free the room of a save that failed: the next may need it."""
        if dist.get_rank() == 0:
            with suppress(OSError):
                if target.exists():  # renamed, but the rename may not survive a power loss
                    target.rename(partial_of(target))
            shutil.rmtree(partial_of(target), ignore_errors=True)
        dist.barrier(self.group)

    def _delete_old(self) -> None:
        if self.config.keep_latest_k and dist.get_rank() == 0:
            for step in complete_steps(self.folder)[: -self.config.keep_latest_k]:
                # renamed first, so that a kill leaves no incomplete checkpoint; in a thread, since other ranks wait
                try:
                    path = (self.folder / f"step-{step}").rename(self.folder / f"step-{step}.deleting")
                except OSError as e:
                    logger.warning(f"an old checkpoint is not deleted: {e}")
                    return
                threading.Thread(target=shutil.rmtree, args=(path, True)).start()

    def find(self, first_step: int = 0) -> Path | None:
        """Collective. The checkpoint to resume from: load_step, or the newest undamaged one; None if there is none.

        first_step: of the plan; earlier checkpoints are not resumed from.

        Each rank reads a share of the files; a damaged checkpoint is skipped with a warning that names the file.
        Checkpoints later than the returned one are renamed to step-N.replaced: they are damaged, or belong to steps
        that this run takes back. Once it saves, they must not be resumed from nor counted by keep_latest_k.
        """
        choices = self.config.load_step, [step for step in complete_steps(self.folder) if step >= first_step]
        load_step, steps = _from_rank0(choices, self.group)
        check_load_step(self.folder, load_step, steps)
        for step in [load_step] if load_step >= 0 else reversed(steps):
            path = self.folder / f"step-{step}"
            damage = damage_of_all(path, self.group)
            if not damage:
                if dist.get_rank() == 0:
                    _set_aside([self.folder / f"step-{later}" for later in steps if later > step])
                dist.barrier(self.group)
                return path
            if load_step >= 0:
                raise UserError(f"checkpoint.load_step = {load_step}: {damage}")
            if dist.get_rank() == 0:
                logger.warning(f"Skipping a damaged checkpoint: {damage}")
        if steps:
            raise UserError(
                f"Every checkpoint in {self.folder} is damaged (steps {', '.join(map(str, steps))}). "
                "Restore one, or choose another job.dump_folder to start anew."
            )
        return None


def load(path: Path, state: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Collective. Read a checkpoint into the tensors of `state`, whatever layout it was saved from.

    The random states of ranks that the saving run did not have stay as they are.
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
    """Which of "model", "optimizer" and "rng" a checkpoint holds."""
    return {name.partition(".")[0] for name in FileSystemReader(str(path)).read_metadata().state_dict_metadata}


def damage_of_all(path: Path, group: dist.ProcessGroup) -> str | None:
    """Collective. find_damage with the files shared out among all ranks; the damage that the lowest rank has found."""
    damage: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(damage, find_damage(path, dist.get_rank(), dist.get_world_size()), group=group)
    return next(filter(None, damage), None)


@contextmanager
def explain_failure(folder: Path) -> Iterator[None]:
    """Turn the failure of a save for lack of room or permission into a UserError that says so."""
    try:
        yield
    except CheckpointException as e:  # a BaseException, which `except Exception` would let through
        causes = [failure[0] for failure in e.failures.values()]
        causes += [c.__context__ for c in causes if c.__context__]
        system = next((c for c in causes if isinstance(c, OSError)), None)
        # PyTorch's zip writer drops the system's error and fails an assertion of its own
        if system is None and not any("inline_container" in str(c) for c in causes):
            raise RuntimeError(f"a checkpoint could not be written to {folder}: {e}") from e
        try:
            free = f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB are free there"
        except OSError:
            free = "how much is free there is unknown"
        raise UserError(
            f"A checkpoint could not be written to {folder}: {system or 'a write failed'}; {free}. Earlier "
            "checkpoints are complete: make room (checkpoint.keep_latest_k deletes old ones) or mount it for writing, "
            "and start again."
        ) from e


def _set_aside(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        target = path.with_name(path.name + ".replaced")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        logger.warning(f"{path} is later than the checkpoint that is resumed from; it is kept as {target.name}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1), durable=True)


def _from_rank0(value: T, group: dist.ProcessGroup) -> T:
    """Collective. Rank 0's value on all ranks."""
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
    """Restore random_state()."""
    for name, value in state.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(value)
        else:
            torch.set_rng_state(value)
