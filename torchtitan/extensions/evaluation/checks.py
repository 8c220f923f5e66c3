"""Mistakes in an [evaluation] table that can be found without a model, and how long its longest text is.

Pure arithmetic on the configuration, before anything is built; imports no PyTorch. Ranges of numbers are checked with
those of all tables (config/checks.py); files and the tokenizer are checked where they are opened.
"""

from __future__ import annotations

from torchtitan.config.schema import JobConfig
from torchtitan.tools.errors import UserError


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
    for name, file in (("qa_1", "SQuAD 2.0's dev-v2.0.json"), ("qa_2", "HotpotQA's hotpot_dev_distractor_v1.json")):
        if name in e.tasks and not e.qa_files:
            raise UserError(f"evaluation.tasks names {name}, which needs {file}: name that file in qa_files.")
    if (e.freq or e.windows) and not is_asked_for(config):
        raise UserError(
            "evaluation.freq or windows is set, but there is nothing to evaluate: name held-out text in "
            "evaluation.texts, or needle_lengths, or tasks."
        )
    if e.windows and not e.texts:
        raise UserError("evaluation.windows is set without texts, whose loss it cuts: name held-out text in texts.")
