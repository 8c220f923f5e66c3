"""What a node check found: which hosts are slow or broken, from what every rank measured, and how that is shown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

CLOCK_SECONDS = 1.0
"""Clocks that differ by more are named: logs and file times of the hosts do not fit together."""

# name in the report -> (what it is called, of several ranks the worst or the best)
_TIMES = {
    "matmul": ("matrix product", max),
    "inside": ("all-reduce inside the node", max),
    "pair": ("all-reduce with its best neighbour", min),
    "write": ("write to the dump folder", max),
    "read": ("read of the dump folder", max),
}


_UNNOTICED = {"write": 0.1, "read": 0.1}
"""Seconds by which a disk may be slower: small files come from caches, in times that say nothing."""


@dataclass
class Report:
    """What was measured, by host, and which hosts are named for what."""

    hosts: dict[str, dict[str, Any]]
    slow: dict[str, list[str]] = field(default_factory=dict)
    broken: dict[str, list[str]] = field(default_factory=dict)

    @property
    def exclude(self) -> str:
        """For Slurm's --exclude."""
        return ",".join(sorted({**self.slow, **self.broken}))

    def as_json(self) -> dict[str, Any]:
        """For node_check.json."""
        return {"hosts": self.hosts, "slow": self.slow, "broken": self.broken, "exclude": self.exclude}


def judge(answers: list[dict[str, Any]], hosts: list[str], factor: float) -> Report:
    """Hosts that are slow or broken, from what every rank measured.

    Between nodes a host counts as slow only if it is so with its best neighbour: a slow host spoils its neighbours'
    other pairs, but not those. With two nodes a slow link has two ends, and neither is named.
    """
    report = Report({})
    silent = [answer for answer in answers if "silent" in answer]
    for host in dict.fromkeys(hosts):
        mine = [answer for answer, name in zip(answers, hosts) if name == host]
        pairs = {
            k: max(a["pairs"][k] for a in mine if k in a.get("pairs", {})) for a in mine for k in a.get("pairs", {})
        }
        summary: dict[str, Any] = {"ranks": len(mine), "pairs": pairs}
        for key, (_, worst) in _TIMES.items():
            values = list(pairs.values()) if key == "pair" else [a[key] for a in mine if key in a]
            if values:
                summary[key] = worst(values)
        for key in ("clock", "free_gib"):
            values = [a[key] for a in mine if key in a]
            if values:
                summary[key] = max(values, key=abs)
        report.hosts[host] = summary
        reasons = [answer["silent"] for answer in mine if "silent" in answer]
        # a failed collective says nothing of this host when another one has fallen silent
        reasons += [answer["error"] for answer in mine if "error" in answer and not silent]
        if any(answer.get("same") is False for answer in mine):
            reasons.append("the same matrix product gave different results")
        if any(host in answer.get("blind", []) for answer in answers):
            reasons.append("it does not see what rank 0 writes to the dump folder, which is not shared")
        if reasons:
            report.broken[host] = list(dict.fromkeys(reasons))
    for key, (what, _) in _TIMES.items():
        known = {host: summary[key] for host, summary in report.hosts.items() if key in summary}
        if len(known) < 2:
            continue
        median = statistics.median_low(list(known.values()))
        for host, value in known.items():
            if value > factor * median and value > median + _UNNOTICED.get(key, 0.0):
                report.slow.setdefault(host, []).append(
                    f"{what} {value * 1e3:.1f} ms, {value / median:.1f} times the median host's {median * 1e3:.1f} ms"
                )
    for host, summary in report.hosts.items():
        if abs(summary.get("clock", 0.0)) > CLOCK_SECONDS:
            report.slow.setdefault(host, []).append(f"its clock is {summary['clock']:+.1f} s off rank 0's")
    return report


def table(report: Report) -> list[str]:
    """Lines for people: a host each, times in milliseconds."""
    keys = [*_TIMES, "clock"]
    width = max(4, *(len(host) for host in report.hosts))
    lines = [f"{'host':<{width}} ranks " + " ".join(f"{key + ' ms':>10}" for key in keys) + "   free GiB"]
    for host, summary in report.hosts.items():
        cells = [f"{summary[key] * 1e3:>10.1f}" if key in summary else f"{'-':>10}" for key in keys]
        free = f"{summary['free_gib']:>10.1f}" if "free_gib" in summary else f"{'-':>10}"
        mark = "  BROKEN" if host in report.broken else "  slow" if host in report.slow else ""
        lines.append(f"{host:<{width}} {summary['ranks']:>5} {' '.join(cells)} {free}{mark}")
    return lines
