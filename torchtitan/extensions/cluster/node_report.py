"""The report of a node check: which hosts are slow or broken by what every rank has measured, and a table of it."""

from __future__ import annotations

import statistics
from typing import Any

# key of the report -> (its name for people, which of the values of several ranks or pairs counts)
_TIMES = {
    "matmul": ("matrix product", max),
    "inside": ("all-reduce inside the node", max),
    "pair": ("all-reduce with its best neighbour", min),
}


def judge(answers: list[dict[str, Any]], hosts: list[str], factor: float) -> dict[str, Any]:
    """Find the hosts that are slow or broken; the content of node_check.json.

    {"hosts": {host: what was measured}, "slow": {host: reasons}, "broken": {host: reasons}, "exclude": names of both as
    Slurm's --exclude takes them}. answers: what each rank has measured (node_check.py), in seconds. hosts: the host
    name of each rank. factor: how many times the median host's time is slow. Between nodes a host is slow only if it is
    slow with its best neighbour: a slow host also slows one pair of each of its neighbours, but not their other pair.
    If there are two nodes, a slow link between them names neither.
    """
    summaries: dict[str, dict[str, Any]] = {}
    slow: dict[str, list[str]] = {}
    broken: dict[str, list[str]] = {}
    someone_is_silent = any("silent" in answer for answer in answers)
    for host in dict.fromkeys(hosts):
        ranks = [answer for answer, name in zip(answers, hosts) if name == host]
        pairs: dict[str, float] = {}
        for other, seconds in (pair for answer in ranks for pair in answer.get("pairs", {}).items()):
            pairs[other] = max(seconds, pairs.get(other, 0.0))
        summary = summaries[host] = {"ranks": len(ranks), "pairs": pairs}
        for key, (_, which) in _TIMES.items():
            if values := list(pairs.values()) if key == "pair" else [answer[key] for answer in ranks if key in answer]:
                summary[key] = which(values)
        reasons = [answer["silent"] for answer in ranks if "silent" in answer]
        if not someone_is_silent:  # otherwise a failed collective says nothing about this host
            reasons += [answer["error"] for answer in ranks if "error" in answer]
        if any(answer.get("same") is False for answer in ranks):
            reasons.append("the same matrix product gave different results")
        if any(host in answer.get("blind", []) for answer in answers):
            reasons.append("it does not see what rank 0 writes to the dump folder: the folder is not shared")
        if reasons:
            broken[host] = list(dict.fromkeys(reasons))
    for key, (what, _) in _TIMES.items():
        times = {host: summary[key] for host, summary in summaries.items() if key in summary}
        median = statistics.median_low(times.values()) if times else 0.0
        for host, seconds in times.items():
            if seconds > factor * median:
                ratio = f"{seconds / median:.1f} times the median host's {median * 1e3:.1f} ms"
                slow.setdefault(host, []).append(f"{what} {seconds * 1e3:.1f} ms, {ratio}")
    return {"hosts": summaries, "slow": slow, "broken": broken, "exclude": ",".join(sorted({**slow, **broken}))}


def sentences(report: dict[str, Any]) -> list[str]:
    """A sentence about every host that is broken or slow."""
    kinds = ("broken", "slow")
    return [f"{host} is {kind}: {'; '.join(reasons)}" for kind in kinds for host, reasons in report[kind].items()]


def table(report: dict[str, Any]) -> list[str]:
    """Lines for people: a header and one line per host, times in milliseconds."""
    width = max(4, *(len(host) for host in report["hosts"]))
    lines = [f"{'host':<{width}} ranks " + " ".join(f"{key + ' ms':>10}" for key in _TIMES)]
    for host, summary in report["hosts"].items():
        cells = (f"{summary[key] * 1e3:>10.1f}" if key in summary else f"{'-':>10}" for key in _TIMES)
        mark = "  BROKEN" if host in report["broken"] else "  slow" if host in report["slow"] else ""
        lines.append(f"{host:<{width}} {summary['ranks']:>5} {' '.join(cells)}{mark}")
    return lines
