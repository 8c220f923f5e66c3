"""What each test file costs in CPU seconds, which a busy machine changes less than the clock: a pytest plugin.

    python -m pytest -n 0 -p tests.cpu_seconds tests/distributed

`time` does not see the ranks of tests/distributed: they are children of a server that nobody waits for (harness.py).
"""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Generator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

SPENT: Counter[str] = Counter()


def seconds() -> float:
    """User and system time of this process, of its children that have ended, and of the server and its own."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    stat = Path(f"/proc/{server}/stat")
    ticks = stat.read_text().rpartition(")")[2].split()[11:15] if server and stat.exists() else []
    return sum(u.ru_utime + u.ru_stime for u in used) + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    before = seconds()
    result = yield
    SPENT[item.nodeid.split("::")[0]] += seconds() - before
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section(f"{sum(SPENT.values()):.0f} CPU seconds in tests, {seconds():.0f} in all")
    for file, spent in SPENT.most_common(25):
        terminalreporter.write_line(f"{spent:7.1f} {file}")
