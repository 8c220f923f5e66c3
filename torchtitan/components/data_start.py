"""Where the data of a stage begin: what its chain has read before, and from which step on its plan holds.

Beside its tensors a checkpoint has two files, which one process writes and the manifest lists like all others:

    data_read.npz         what the chain has read at its step; the next stage goes on there
    data_read_before.npz  the same at the beginning of the stage's plan; a resumed stage makes its plan again from it,
                          even if the folder of the previous stage is gone

Checkpoints of older versions have neither, nor do merged or converted ones and Hugging Face folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.components.changes import changed_inputs
from torchtitan.components.manifest import complete_steps
from torchtitan.components.start import Start
from torchtitan.config.data_schema import Data
from torchtitan.config.keys import keys_of
from torchtitan.config.manager import from_tables
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.read_so_far import ReadSoFar, from_file, read_until, to_bytes
from torchtitan.tools.errors import UserError

READ = "data_read.npz"
READ_BEFORE = "data_read_before.npz"


@dataclass(frozen=True)
class DataStart:
    """Where a stage's plan begins."""

    read: ReadSoFar = ReadSoFar()
    """What the chain had read there."""

    first_step: int = 0
    """Of the stage; above 0 if its mixture was changed there (data.changed_at_step)."""

    changes: tuple[dict[str, Any], ...] = ()
    """For the manifest: of each change the step, and the plan's inputs and [data] until then."""

    note: str = ""
    """Why the order of the sources begins anew though there is something to start from; empty if it does not."""

    changed_now: bool = False
    """Whether this start changes the mixture: the checkpoint that is resumed has the earlier plan."""

    def files(self, plan: Plan, step: int) -> dict[str, bytes]:
        """What a checkpoint of `step` keeps of it, by file name."""
        return {READ: to_bytes(read_until(self.read, plan, step)), READ_BEFORE: to_bytes(self.read)}


def data_start(config: JobConfig, resumed: dict[str, Any] | None, start: Start | None) -> DataStart:
    """Where the data of a stage begin that resumes the checkpoint of a manifest, or is fresh and starts from `start`.

    UserError if data.changed_at_step is another step than the checkpoint's, or its files are damaged.
    """
    step = config.data.changed_at_step
    folder = Path(config.job.dump_folder) / config.checkpoint.folder
    if resumed is None:
        if step:
            raise UserError(f"{_no_checkpoint(folder, step)} {_HOW}")
        return _previous(config, start)
    own = folder / f"step-{resumed['step']}"
    before = from_tables(resumed.get("config", {})).data.changed_at_step
    if step != before:
        _check_change(folder, step, before, resumed["step"], config.checkpoint.load_step)
        if READ not in resumed.get("files", {}):
            raise UserError(
                f"data.changed_at_step = {step}, but {own} has no {READ}: an older version wrote it, which did not "
                "keep what has been read. Set the keys of [data] back and train to the next checkpoint; the mixture "
                "can be changed there."
            )
        change = {"step": step, "plan": resumed["plan"], "data": resumed["config"]["data"]}
        changes = (*resumed.get("data_changes", ()), change)
        return DataStart(from_file(own / READ), step, changes, changed_now=True)
    read = _own_read_before(folder, resumed) if READ_BEFORE in resumed.get("files", {}) else ReadSoFar()
    return DataStart(read, step, tuple(resumed.get("data_changes", ())))


def _own_read_before(folder: Path, resumed: dict[str, Any]) -> ReadSoFar:
    """The state at the plan's beginning, which is the same in all checkpoints of the plan: if it is damaged in one, the
    tensors of an earlier one may be resumed from, too. (Plan.inputs has its digest.)"""
    try:
        return from_file(folder / f"step-{resumed['step']}" / READ_BEFORE)
    except UserError:
        for step in reversed(complete_steps(folder)):
            with suppress(UserError):
                return from_file(folder / f"step-{step}" / READ_BEFORE)
        raise


_HOW = (
    "data.changed_at_step accepts other keys of [data] in a stage that has been trained to that step: it resumes the "
    "checkpoint of exactly that step. In a stage that has none yet leave it out (0, if a file in `extends` sets it)."
)


def _no_checkpoint(folder: Path, step: int) -> str:
    steps = ", ".join(map(str, complete_steps(folder))) or "none"
    return f"data.changed_at_step = {step}, but {folder} holds no complete checkpoint of that step; its steps: {steps}."


def _check_change(folder: Path, step: int, before: int, resumed: int, load_step: int) -> None:
    """UserError unless the checkpoint that is resumed is that of the step at which the mixture changes."""
    if step == resumed:
        return
    if not step:
        raise UserError(
            f"{folder}/step-{resumed} was trained with data.changed_at_step = {before}, which is no longer set: set it "
            f"back, with the keys of [data] as they were then. To take that change back, set checkpoint.load_step to "
            f"{before} or to an earlier step, with the keys of [data] of before (data_changes in its manifest.json has "
            "them); later checkpoints are kept as step-N.replaced."
        )
    if step not in complete_steps(folder):
        raise UserError(f"{_no_checkpoint(folder, step)} {_HOW}")
    if resumed > step:
        raise UserError(
            f"data.changed_at_step = {step}, but {folder}/step-{resumed}, which would be resumed, was trained with the "
            f"earlier keys of [data]. Set checkpoint.load_step = {step} to go back to that step "
            "(later checkpoints are kept as step-N.replaced), or name the newest step."
        )
    raise UserError(
        f"checkpoint.load_step = {load_step} goes back to before data.changed_at_step = {step}: the steps until then "
        "are those of the earlier keys of [data], which this configuration no longer has. Set them back (config.data "
        f"in {folder}/step-{resumed}/manifest.json has them) and leave changed_at_step out."
    )


def _previous(config: JobConfig, start: Start | None) -> DataStart:
    """Where the data of a fresh stage begin: where those of the checkpoint that it starts from stopped."""
    if start is None:
        return DataStart()
    if not (start.path / READ).is_file():
        return DataStart(note=f"{start.path} does not say what has been read: the order of the sources begins anew")
    return fresh_start(config, from_file(start.path / READ))


def fresh_start(config: JobConfig, read: ReadSoFar) -> DataStart:
    """Where the data of a fresh stage begin whose chain has read `read`."""
    if config.stage.continue_data:
        return DataStart(read)
    return DataStart(read.in_new_epochs(), note="stage.continue_data = false: the order of the sources begins anew")


def describe(begin: DataStart, plan: Plan) -> Iterator[str]:
    """What the chain has read of each source, a line each; nothing for the first stage of a chain."""
    if begin.note:
        yield f"data: {begin.note}"
    if not begin.read.corpora:
        return
    names = {known.name for known in begin.read.corpora.values()}
    for name, corpus in zip(plan.names, plan.corpora):
        if corpus.fingerprint in begin.read.corpora:
            order = "" if begin.note else "; its order goes on"
            yield f"data source {name}: epochs so far {begin.read.epochs(corpus):.2f}{order}"
        elif name in names:
            yield (
                f"data source {name}: its order begins anew: its documents are not those that were read under this "
                "name (other content, tokenizer, BOS or EOS)"
            )
        else:
            yield f"data source {name}: its order begins anew: no previous stage has read it"


def plan_differences(saved: dict[str, Any], plan: Plan, begin: DataStart) -> tuple[list[str], list[str]]:
    """How the plan differs from the inputs in the manifest that is resumed: (what is refused, what is accepted because
    data.changed_at_step says that the mixture changes here)."""
    if not begin.changed_now:
        return changed_inputs(saved, plan.inputs), []
    of_data = {*keys_of(Data), "sources", "sum_of_weights", "read_before", "first_step"}

    def part(inputs: dict[str, Any], data: bool) -> dict[str, Any]:
        return {key: value for key, value in inputs.items() if (key in of_data) == data}

    refused = changed_inputs(part(plan.inputs, True) | part(saved, False), plan.inputs)
    return refused, changed_inputs(part(saved, True) | part(plan.inputs, False), plan.inputs)
