"""Hooks: how everything beside the training step takes part in a run without the trainer knowing it.

The trainer calls each method of every hook, in the order of its list, on every rank. extensions/wiring.py makes the
list of a stage; users add hooks of their own by the TOML key job.hooks (docs/extending.md).
"""

from __future__ import annotations

import importlib
from typing import Any

from torchtitan.tools.errors import UserError


class Hook:
    """A base class with empty bodies: override what is needed.

    `trainer` is the Trainer (torchtitan/trainer.py); a hook may read all of its public attributes. "Collective" means
    that all ranks are at the same place and a hook may use collectives there, on all ranks or none. An exception that
    a hook raises ends the run: UserError for a mistake that a user can mend, which prints its message alone.
    """

    def configured(self, trainer: Any) -> None:
        """Collective. The ranks are connected and the stage is checked; nothing is allocated, no weight is read."""

    def started(self, trainer: Any) -> None:
        """Collective. Model, optimizer, data and metrics are there, weights and counters loaded; no step has run."""

    def before_step(self, trainer: Any) -> None:
        """Collective. trainer.step is the number of finished steps. The step may turn out to be none, at a stop."""

    def logging(self, trainer: Any, numbers: dict[str, Any]) -> None:
        """Collective. At steps that are logged, before the line is written: numbers may be added to, on rank 0."""

    def after_step(self, trainer: Any, numbers: dict[str, Any]) -> None:
        """Collective. Step trainer.step has ended, has been logged and, if that was due, saved.

        numbers: step, loss, grad_norm, lr, ... of this step (docs/training.md).
        """

    def pausing(self, trainer: Any, what: str) -> None:
        """Not collective. Until the next before_step this rank does something else than steps: "saving", "evaluating",
        or what a hook says with trainer.pause(what)."""

    def saving(self, trainer: Any, manifest: dict[str, Any]) -> None:
        """Collective. A checkpoint is about to be written: a hook may add a key of its own to its manifest."""

    def ended(self, trainer: Any) -> None:
        """Collective. The last step of this run has ended and everything is saved. trainer.finished says whether it
        was the last step of the stage; otherwise the run has been asked to stop."""

    def closed(self, trainer: Any) -> None:
        """Not collective. Always the last call, also after an error: release files, threads and processes."""


def load_hook(name: str) -> Hook:
    """The hook of a TOML entry "module:Class", made without arguments; UserError that says what is missing."""
    module, _, attribute = name.partition(":")
    key = f'job.hooks names "{name}"'
    if not module or not attribute:
        raise UserError(f'{key}, which must be "module:Class", e.g. "my_hooks:SayHello".')
    try:
        content = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}, but there is no module {error.name}. It must be on PYTHONPATH.") from None
    if not hasattr(content, attribute):
        raise UserError(f"{key}, but {module} has no such class.")
    hook = getattr(content, attribute)
    if not (isinstance(hook, type) and issubclass(hook, Hook)):
        raise UserError(f"{key}, but {module}.{attribute} is no subclass of torchtitan.components.hooks.Hook.")
    return hook()
