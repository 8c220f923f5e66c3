"""The only file that names all extensions: which of their parts join a stage, and in which order.

Within the package only train.py imports it; scripts and tests may. Importing it does not import PyTorch.
"""

from __future__ import annotations

from typing import Any

from torchtitan.config import JobConfig
from torchtitan.extensions.cluster.check_config import check_tables
from torchtitan.extensions.cluster.gates import check_previous_gates

check = check_tables


def inputs_of(config: JobConfig, world_size: int) -> Any:
    """The StageInputs (components/setup.py) of a stage that has passed check(); text is tokenized first.

    UserError if a stage cannot start.
    """
    from torchtitan.components.setup import prepare_inputs
    from torchtitan.extensions.ingest.hygiene import cleaning

    check_previous_gates(config)
    return prepare_inputs(config, world_size, cleaning(config.evaluation))


def hooks_of(config: JobConfig) -> list[Any]:
    """The hooks of a stage, in the order in which the trainer calls them; the hooks of job.hooks come last."""
    from torchtitan.components.hooks import Hook, load_hook
    from torchtitan.extensions.cluster.gates import Gates
    from torchtitan.extensions.cluster.health import Heartbeat, StackDumps, Stragglers
    from torchtitan.extensions.cluster.node_check import NodeCheck
    from torchtitan.extensions.cluster.profiling import Profiler
    from torchtitan.extensions.cluster.progress import ProgressBar
    from torchtitan.extensions.cluster.requeue import WentBack
    from torchtitan.extensions.convert.export import Export
    from torchtitan.extensions.evaluation.hook import EvaluationHook
    from torchtitan.extensions.planner.data_report import DataReport
    from torchtitan.extensions.planner.host_memory import HostMemoryCheck

    hooks_of_user = [load_hook(name) for name in config.job.hooks]
    hooks: list[Hook] = [
        NodeCheck(),
        HostMemoryCheck(),
        DataReport(),
        Heartbeat(),
        StackDumps(),
        Stragglers(),
        ProgressBar(),
        WentBack(),  # before the evaluation: a run that is killed while it evaluates has gone back, too
        EvaluationHook(),
        Gates(),  # before the export: a stage whose gates do not hold is not exported
        Export(),
        Profiler(),
    ]
    return [*hooks, *hooks_of_user]


def build_trainer(config: JobConfig, rank: int, local_rank: int, world_size: int) -> Any:
    """Collective. The Trainer (trainer.py) of a stage that has passed check(), with all hooks, ready for train()."""
    from torchtitan.extensions.cluster.requeue import with_load_step
    from torchtitan.trainer import Trainer

    config = with_load_step(config)
    hooks = hooks_of(config)  # first: importing the user's module may add the user's model
    return Trainer(config, inputs_of(config, world_size), rank, local_rank, world_size, hooks)


def who_answers(trainer: Any) -> str:
    """After a collective has failed: which ranks no longer answer, in a sentence."""
    from torchtitan.extensions.cluster.health import who_answers
    from torchtitan.tools.torch_compat import default_store

    return who_answers(default_store(), trainer.rank, trainer.hosts)
