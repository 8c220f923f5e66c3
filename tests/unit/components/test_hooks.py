"""Hooks: a user's class is found by its name in job.hooks, and called at the documented points, in their order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import flags, write_assets, write_text
from torchtitan.components.hooks import Hook, load_hook
from torchtitan.components.manifest import read_manifest
from torchtitan.config import load_config
from torchtitan.extensions.wiring import build_trainer
from torchtitan.tools.errors import UserError

MODULE = """
from torchtitan.components.hooks import Hook

calls = []

class Recorder(Hook):
    def configured(self, trainer): calls.append(("configured", trainer.step, hasattr(trainer, "model")))
    def started(self, trainer): calls.append(("started", trainer.step, hasattr(trainer, "model")))
    def before_step(self, trainer): calls.append(("before_step", trainer.step))
    def logging(self, trainer, numbers): numbers["mine"] = 7.0 * trainer.step
    def after_step(self, trainer, numbers):
        calls.append(("after_step", trainer.step))
        trainer.stop_requested = trainer.step == 2
    def saving(self, trainer, manifest):
        calls.append(("saving", trainer.step))
        manifest["mine"] = "kept"
    def pausing(self, trainer, what): calls.append(("pausing", what))
    def ended(self, trainer): calls.append(("ended", trainer.finished))
    def closed(self, trainer): calls.append(("closed",))

class NoHook: ...

class Misspelt(Hook):
    def after_steps(self, trainer, numbers): ...
"""


def test_the_points_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hook is called as docs/extending.md lists, adds to metrics and manifest, and may stop the run."""
    (tmp_path / "my_hooks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_text(tmp_path)
    args = flags(tmp_path, write_assets(tmp_path), training__steps=3, checkpoint__enable=True, metrics__log_freq=1)
    config = load_config([*args, "--job.hooks", "my_hooks:Recorder"])
    assert config.job.hooks == ("my_hooks:Recorder",)
    trainer = build_trainer(config, 0, 0, 1)
    trainer.train()
    trainer.close()
    import my_hooks  # type: ignore[import-not-found]

    steps = [("before_step", 0), ("after_step", 1), ("before_step", 1), ("after_step", 2), ("before_step", 2)]
    saved = [("pausing", "saving"), ("saving", 2), ("pausing", "saving")]
    assert my_hooks.calls == [
        ("configured", 0, False),
        ("started", 0, True),
        *steps,
        *saved,
        ("ended", False),
        ("closed",),
    ]
    lines = [json.loads(line) for line in (trainer.dump_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["mine"] for line in lines] == [7.0, 14.0]
    assert read_manifest(trainer.dump_folder / "checkpoint" / "step-2")["mine"] == "kept"


def test_all_hooks_are_closed_if_one_fails_before_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files that a hook has opened in `configured` are closed, whichever hook or part of the set-up fails."""
    code = (
        MODULE
        + """
class Failing(Hook):
    def configured(self, trainer): raise RuntimeError("no licence")
    def closed(self, trainer): raise OSError("not open")
"""
    )
    (tmp_path / "failing_hooks.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_text(tmp_path)
    args = flags(tmp_path, write_assets(tmp_path), training__steps=3)
    config = load_config([*args, "--job.hooks", "failing_hooks:Failing", "failing_hooks:Recorder"])
    with pytest.raises(RuntimeError, match="no licence"):
        build_trainer(config, 0, 0, 1)
    torch.distributed.destroy_process_group()
    import failing_hooks  # type: ignore[import-not-found]

    assert failing_hooks.calls == [("closed",)]


def test_a_name_that_is_no_hook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "other_hooks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(load_hook("other_hooks:Recorder"), Hook)
    for name, why in (
        ("other_hooks", 'must be "module:Class"'),
        ("other_hooks:", 'must be "module:Class"'),
        ("no_such_module:Recorder", "there is no module no_such_module"),
        ("other_hooks:Missing", "other_hooks has no such class"),
        ("other_hooks:NoHook", "other_hooks.NoHook is not a subclass"),
        ("other_hooks:calls", "other_hooks.calls is not a subclass"),
        ("other_hooks:Misspelt", "Misspelt overrides no method of Hook: configured, started, before_step, .*closed"),
    ):
        with pytest.raises(UserError, match=why):
            load_hook(name)
