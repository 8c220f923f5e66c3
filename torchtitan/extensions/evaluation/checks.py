"""What an [evaluation] table asks: mistakes that can be found without a model, lengths, whether a result answers it.

Pure arithmetic on the configuration, before anything is built; imports no PyTorch. Ranges of numbers are checked with
those of all tables (config/checks.py); files and the tokenizer are checked where they are opened.
"""

from __future__ import annotations

from typing import Any, get_args

from torchtitan.config.schema import EvaluationTask, JobConfig
from torchtitan.tools.errors import UserError

NEEDLE_TASK = "needle"
"""The name of the task of evaluation.needle_lengths."""

_NAMES = get_args(EvaluationTask)
GROUPS = {"ruler": _NAMES[1 : _NAMES.index("recall")], "recall": _NAMES[_NAMES.index("recall") + 1 :]}
"""The tasks of each group, which follow its name in the schema."""

QA_FILES = {
    "qa_1": "SQuAD 2.0's dev-v2.0.json (rajpurkar.github.io/SQuAD-explorer)",
    "qa_2": "HotpotQA's hotpot_dev_distractor_v1.json (hotpotqa.github.io)",
}
"""Tasks that need a file, and the file."""


def evaluation_length(config: JobConfig) -> int:
    """How many tokens are read of each document of evaluation.texts."""
    return config.evaluation.length or config.data.target_seq_len or config.training.seq_len


def longest_asked(config: JobConfig) -> int:
    """How many tokens the longest document or question of [evaluation] has; 0 if nothing is asked."""
    e = config.evaluation
    return max([evaluation_length(config)] * bool(e.texts) + list(e.needle_lengths) + list(e.task_lengths), default=0)


def is_asked_for(config: JobConfig) -> bool:
    """Whether [evaluation] asks anything."""
    return bool(config.evaluation.texts or config.evaluation.needle_lengths or config.evaluation.tasks)


def check_asked(config: JobConfig) -> None:
    """UserError if [evaluation] asks nothing: for commands that only evaluate."""
    if not is_asked_for(config):
        raise UserError(
            "Nothing to ask: name held-out text in evaluation.texts, or evaluation.needle_lengths, or evaluation.tasks."
        )


def check_evaluation(config: JobConfig) -> None:
    """UserError for the first mistake in [evaluation]: what no model can be asked."""
    e = config.evaluation
    length = evaluation_length(config)
    if e.needle_lengths and not e.needle_depths:
        raise UserError("evaluation.needle_lengths is set without needle_depths: name at least one, such as 0.5.")
    for i, window in enumerate(e.windows):
        if window >= length:
            raise UserError(f"evaluation.windows[{i}] = {window} must be below evaluation.length = {length}.")
    if e.tasks and not e.task_lengths:
        raise UserError(
            f'evaluation.tasks = ["{e.tasks[0]}", ...] is set without task_lengths: name at least one, such as 4096.'
        )
    if (e.task_lengths or e.qa_files) and not e.tasks:
        key = "task_lengths" if e.task_lengths else "qa_files"
        raise UserError(f'evaluation.{key} is set without tasks: name some, such as "ruler", "recall" or "vt".')
    for task in e.tasks:
        if task in QA_FILES and not e.qa_files:
            raise missing_file(task)
    if (e.freq or e.windows) and not is_asked_for(config):
        raise UserError(
            "evaluation.freq or windows is set, but there is nothing to evaluate: name held-out text in "
            "evaluation.texts, or needle_lengths, or tasks."
        )
    if e.windows and not e.texts:
        raise UserError("evaluation.windows is set without texts, whose loss it cuts: name held-out text in texts.")


def missing_file(task: str) -> UserError:
    """The error if qa_1 or qa_2 is asked without its file."""
    return UserError(f"evaluation.tasks names {task}, which needs {QA_FILES[task]}: name that file in qa_files.")


def is_answered(config: JobConfig, result: dict[str, Any]) -> bool:
    """Whether a result (docs/evaluation.md) answers what [evaluation] asks, as far as that shows without a tokenizer.

    Compared are texts, windows, tasks, lengths, depths, numbers of questions, seed and generate; not what the files
    hold, nor how many documents are read. scripts/evaluate.py and training compare all of it, by a digest.
    """
    e, grids = config.evaluation, result["tasks"]
    settings = {"texts": list(e.texts), "windows": list(e.windows), "generate": e.generate, "seed": e.seed}
    if any(result["asked"].get(key) != value for key, value in settings.items()):
        return False
    if any(text["edges"][-1] != evaluation_length(config) for text in result["perplexity"].values()):
        return False
    names = {member for name in e.tasks for member in GROUPS.get(name, (name,))}
    with_file = QA_FILES.keys() & grids.keys()
    if "ruler" in e.tasks:  # it leaves out qa_1 and qa_2 if they have no file
        if bool(with_file) != bool(e.qa_files):
            return False
        names -= QA_FILES.keys() - with_file - set(e.tasks)
    asked = dict.fromkeys(names, (e.task_lengths, e.task_items))
    if e.needle_lengths:
        depths = sorted(set(e.needle_depths))
        asked[NEEDLE_TASK] = (e.needle_lengths, e.needles * len(depths))
        if grids.get(NEEDLE_TASK, {}).get("depths") != depths:
            return False
    expected = {name: dict.fromkeys(lengths, count) for name, (lengths, count) in asked.items()}
    answered = {
        name: {length: sum(n or 0 for n in row) for length, row in zip(grid["lengths"], grid["count"], strict=True)}
        for name, grid in grids.items()
    }
    return answered == expected
