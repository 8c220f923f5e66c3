"""Which hosts a node check names, given invented measurements; which nodes are neighbours."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from torchtitan.extensions.cluster.node_check import rounds_of_neighbours
from torchtitan.extensions.cluster.node_report import judge, sentences, table


def measured(nodes: int, ranks: int, slow_pairs: tuple[int, ...] = ()) -> tuple[list[dict[str, Any]], list[str]]:
    """Answers of equal hosts; every pair with a node of slow_pairs takes ten times as long."""
    hosts = [f"node{i // ranks}" for i in range(nodes * ranks)]
    pairs = [pair for round_ in rounds_of_neighbours(nodes) for pair in round_]
    answers = []
    for i in range(nodes * ranks):
        node = i // ranks
        times = {f"node{a + b - node}": 0.2 if {a, b} & set(slow_pairs) else 0.02 for a, b in pairs if node in (a, b)}
        answer = {"matmul": 0.01, "same": True, "inside": 0.005, "pairs": times, "blind": []}
        answers.append(answer)
    return answers, hosts


@pytest.mark.parametrize("count", range(9))
def test_every_node_meets_both_neighbours_and_no_node_twice_at_once(count: int):
    rounds = rounds_of_neighbours(count)
    for pairs in rounds:
        nodes = list(itertools.chain(*pairs))
        assert len(nodes) == len(set(nodes)) and set(nodes) <= set(range(count))
    edges = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert len(edges) == sum(map(len, rounds)) == {0: 0, 1: 0, 2: 1}.get(count, count)
    assert all(sum(node in edge for edge in edges) == 2 for node in range(count)) or count < 3
    assert len(rounds) <= 3


@pytest.mark.parametrize("nodes", [2, 3, 4, 8])
def test_equal_hosts_are_not_named_and_one_that_computes_slowly_is(nodes: int):
    answers, hosts = measured(nodes, 2)
    report = judge(answers, hosts, 1.5)
    assert report["exclude"] == "" and len(table(report)) == nodes + 1
    answers[-1]["matmul"] *= 2  # one of its two ranks
    report = judge(answers, hosts, 1.5)
    assert list(report["slow"]) == [hosts[-1]] and "matrix product" in report["slow"][hosts[-1]][0]
    assert not report["broken"] and report["exclude"] == hosts[-1] and table(report)[-1].endswith("slow")
    assert sentences(report) == [f"{hosts[-1]} is slow: {report['slow'][hosts[-1]][0]}"]
    assert json.loads(json.dumps(report))["exclude"] == hosts[-1]
    assert judge(answers, hosts, 2.5)["exclude"] == ""


@pytest.mark.parametrize("nodes", [3, 4, 5, 8])
def test_a_slow_network_card_is_told_from_its_neighbours(nodes: int):
    answers, hosts = measured(nodes, 2, slow_pairs=(1,))
    report = judge(answers, hosts, 1.5)
    assert report["exclude"] == "node1" and "best neighbour" in report["slow"]["node1"][0]


def test_a_slow_link_between_two_nodes_names_neither():
    answers, hosts = measured(2, 2, slow_pairs=(1,))
    assert judge(answers, hosts, 1.5)["exclude"] == ""


def test_what_is_broken():
    def with_changes(rank: int, **changes: Any) -> dict[str, Any]:
        answers, hosts = measured(4, 2)
        answers[rank] = changes if "silent" in changes or "error" in changes else answers[rank] | changes
        return judge(answers, hosts, 1.5)

    report = with_changes(5, same=False)
    assert report["exclude"] == "node2" and "different results" in report["broken"]["node2"][0]
    report = with_changes(6, blind=["node3"])
    assert report["exclude"] == "node3" and "not shared" in report["broken"]["node3"][0]
    report = with_changes(2, error="No space left on device")
    assert report["broken"] == {"node1": ["No space left on device"]}
    # the collectives of a silent rank's neighbours fail too: only the silent rank is at fault
    answers, hosts = measured(4, 2)
    answers[2] = {"silent": "no answer from rank 2 in 60 s to what it does together"}
    answers[4] = {"error": "Timed out waiting"}
    assert list(judge(answers, hosts, 1.5)["broken"]) == ["node1"]
