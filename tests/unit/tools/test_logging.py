"""What is logged by which rank, and how often."""

import logging

import pytest

from torchtitan.tools import logging as logs


def test_a_warning_is_given_once_and_by_rank_0_alone(monkeypatch: pytest.MonkeyPatch):
    messages: list[str] = []
    monkeypatch.setattr(logs, "_said", set())
    monkeypatch.setattr(logs.logger, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logs.logger, "warning", messages.append)
    before = logs.logger.level
    logs.logger.setLevel(logging.WARNING)  # as init_logger does in ranks beyond 0
    logs.warn_once("from another rank")
    logs.logger.setLevel(logging.INFO)
    for _ in range(2):
        logs.warn_once("from rank 0")
    monkeypatch.setattr(logs.logger, "handlers", [])  # a script
    logs.logger.setLevel(logging.WARNING)
    logs.warn_once("from a script")
    logs.logger.setLevel(before)
    assert messages == ["from rank 0", "from a script"]
