"""Hooks: how everything beside the training step takes part in a run, unknown to the trainer.

The trainer calls each method of every hook, in the order of its list, on every rank. extensions/wiring.py makes that
list for a stage; users add their own hooks with the TOML key job.hooks (docs/extending.md).
"""

from __future__ import annotations

from typing import Any

from torchtitan.tools.errors import UserError
from torchtitan.tools.user_code import import_named


class Hook:
    """A base class with empty methods: override what is needed.

    `trainer` is the Trainer (torchtitan/trainer.py), whose docstring lists what a hook may use. "Collective" means
    that all ranks call the method at the same point of the run, so a hook may use collectives, on all ranks or on none.
    An exception in a hook ends the run; raise UserError for a mistake that the user can mend: it prints only its
    message.
    """

    def configured(self, trainer: Any) -> None:
        """Collective. The ranks are connected and the stage is checked; nothing is allocated, no weights are read."""

    def started(self, trainer: Any) -> None:
        """Collective. Model, optimizer, data and metrics exist, weights and counters are loaded; no step has run."""

    def before_step(self, trainer: Any) -> None:
        """Collective. trainer.step is the number of finished steps. No step follows if a rank was asked to stop."""

    def logging(self, trainer: Any, numbers: dict[str, Any]) -> None:
        """Collective. At each logged step, before its line is written: rank 0 may add to numbers."""

    def after_step(self, trainer: Any, numbers: dict[str, Any]) -> None:
        """Collective. Step trainer.step has ended and, if that was due, was logged and saved.

        numbers: step, loss, grad_norm, lr, ... of this step (docs/training.md).
        """

    def pausing(self, trainer: Any, what: str) -> None:
        """Not collective. Until the next before_step this rank is busy with `what`: "saving", "evaluating", or the
        words that a hook passes to trainer.pause."""

    def saving(self, trainer: Any, manifest: dict[str, Any]) -> None:
        """Collective. A checkpoint is about to be written: a hook may add its own key to the manifest."""

    def ended(self, trainer: Any) -> None:
        """Collective. The last step of this run has ended and, if checkpoints are on, is saved.

        If trainer.finished, it was the last step of the stage; otherwise the run was asked to stop. Not called after an
        error, nor if a gate does not hold: `closed` is.
        """

    def closed(self, trainer: Any) -> None:
        """Not collective. Called last, also if the run or another hook's `configured` has failed: release files,
        threads and processes."""


def load_hook(name: str) -> Hook:
    """An instance of "module:Class", an entry of job.hooks; UserError that says what is missing."""
    module, _, attribute = name.partition(":")
    key = f'job.hooks names "{name}"'
    hook = import_named(name, key, ', which must be "module:Class", e.g. "my_hooks:SayHello".')
    if hook is None:
        raise UserError(f"{key}, but {module} has no such class.")
    if not (isinstance(hook, type) and issubclass(hook, Hook)):
        raise UserError(f"{key}, but {module}.{attribute} is not a subclass of torchtitan.components.hooks.Hook.")
    points = [point for point in vars(Hook) if not point.startswith("_")]
    if all(getattr(hook, point) is getattr(Hook, point) for point in points):
        raise UserError(f"{key}, but {module}.{attribute} overrides no method of Hook: {', '.join(points)}.")
    return hook()
