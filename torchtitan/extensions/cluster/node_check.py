r"""Are the machines fit for the job? Before training, or by itself under any launcher that starts ranks:

    python -m torchtitan.extensions.cluster.launch --nproc 2 --module torchtitan.extensions.cluster.node_check -- \
        --folder outputs
    srun torchrun ... -m torchtitan.extensions.cluster.node_check --folder outputs

Times a matrix product on every rank, and an all-reduce inside every node and between neighbouring nodes. A host is slow
if it takes more than `factor` times the median host's time. A host is broken if it gives a wrong result or no answer,
or does not see the other hosts' files. The exit code is 0, or 3 (from rank 0) if a host is named; node_check.json has
the names as Slurm's --exclude takes them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.components.hooks import Hook
from torchtitan.extensions.cluster.node_report import judge, sentences, table
from torchtitan.extensions.cluster.shared_folder import blind_hosts, not_shared
from torchtitan.tools.constants import RANK_VARIABLES
from torchtitan.tools.device import host_names, init_process_group, pick_device
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import write_text
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.torch_compat import default_store

REPEATS = 5
NAMED = 3


class NodeCheck(Hook):
    """Before training: job.dump_folder must be shared by all hosts; with comm.node_check also the check above.

    UserError on all ranks if training could not work; slow hosts are logged.
    """

    def configured(self, trainer: Any) -> None:
        comm, folder, hosts, group = trainer.config.comm, trainer.dump_folder, trainer.hosts, trainer.cpu_group
        if not comm.node_check:
            if len(set(hosts)) > 1 and (blind := blind_hosts(folder, hosts, group)):
                raise UserError(not_shared(folder, hosts[0], blind))
            return
        report = node_check(folder, comm.node_check_factor, trainer.device, hosts, group, comm.init_timeout_seconds)
        if trainer.rank == 0:
            _write(report, folder / "node_check.json")
            for line in table(report):
                logger.info(line)
            for sentence in sentences(report):
                logger.warning(f"node check: {sentence}")
        if broken := ",".join(sorted(report["broken"])):
            reasons = ". ".join(sentences(report | {"slow": {}}))
            raise UserError(
                f"The node check (comm.node_check) found hosts that cannot train. {reasons}. Start without them "
                f"(Slurm: --exclude={broken})."
            )


def matmul_seconds(device: torch.device, seconds: float) -> tuple[float, bool]:
    """Mean time of a matrix product, repeated for about `seconds`, and whether every result was the same to the bit."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    first = a @ a
    same = torch.equal(a @ a, first)  # waits for the device
    start, count = time.perf_counter(), 0
    # the mean, not the best: a host that is held up now and then is a slow host
    while (spent := time.perf_counter() - start) < seconds or count < REPEATS:
        same &= torch.equal(a @ a, first)
        count += 1
    return spent / count, same


def all_reduce_seconds(device: torch.device, group: dist.ProcessGroup, mib: int) -> float:
    """Collective over group. Mean time of an all-reduce of `mib` MiB; RuntimeError if the sum is wrong."""
    seconds, size = 0.0, dist.get_world_size(group)
    for repeats in (1, REPEATS):  # the first sets up connections
        # all repeats at once: timed one by one, a host held up between two would look fast, and the other one slow
        start = time.perf_counter()
        for _ in range(repeats):
            ones = torch.ones(mib * 2**18, device=device)
            dist.all_reduce(ones, group=group)
        if not bool((ones == size).all()):  # waits for the device
            raise RuntimeError(f"an all-reduce over {size} ranks gave a wrong sum")
        seconds = (time.perf_counter() - start) / repeats
    return seconds


def rounds_of_neighbours(count: int) -> list[list[tuple[int, ...]]]:
    """Pairs of neighbours in a ring of `count` nodes, in rounds in which no node occurs twice: 2 or 3 rounds."""
    ring = [(i, (i + 1) % count) for i in range(count)] if count > 2 else [(0, 1)] * (count == 2)
    odd_one_out = [ring.pop()] if count > 2 and count % 2 else []
    return [[*pairs] for pairs in (ring[::2], ring[1::2], odd_one_out) if pairs]


def all_reduces(device: torch.device, hosts: list[str], timeout: float) -> dict[str, Any]:
    """Collective. {"inside": seconds among the ranks of this host, "pairs": {neighbour: seconds among both's}}."""
    names, here = list(dict.fromkeys(hosts)), hosts[dist.get_rank()]
    times: dict[str, Any] = {"pairs": {}}
    each_by_itself: list[tuple[int, ...]] = [(node,) for node in range(len(names))]
    for nodes_by_group in (each_by_itself, *rounds_of_neighbours(len(names))):
        groups = [[names[node] for node in nodes] for nodes in nodes_by_group]
        ranks = [[rank for rank, host in enumerate(hosts) if host in group] for group in groups]
        mine, _ = dist.new_subgroups_by_enumeration(ranks, timedelta(seconds=timeout))
        for group in groups:
            if here in group:
                seconds = all_reduce_seconds(device, mine, 256 if device.type == "cuda" else 4)
                times["pairs"] |= {name: seconds for name in group if name != here}
                times |= {"inside": seconds} if len(group) == 1 else {}
    return times


def node_check(
    folder: Path,
    factor: float,
    device: torch.device,
    hosts: list[str],
    group: dist.ProcessGroup,
    timeout: float,
    seconds: float = 0.5,
) -> dict[str, Any]:
    """Collective, but a rank that does not answer in time is named as broken. The report of node_report.judge.

    All ranks get the same report. What a rank does alone comes first: a rank that hangs is then known before others
    wait for it in a collective. hosts: the host name of each rank; group: gloo, of all ranks; timeout: seconds that an
    answer may take; seconds: how long the matrix product is repeated. UserError if rank 0 cannot write to `folder`.
    """

    def alone() -> dict[str, Any]:
        return dict(zip(("matmul", "same"), matmul_seconds(device, seconds)))

    answers = _exchange("matrix product", alone, hosts, timeout)
    if not any("silent" in answer for answer in answers):
        # twice the time: a rank whose neighbour hangs answers after its collective has timed out
        together = _exchange("all-reduces", lambda: all_reduces(device, hosts, timeout), hosts, 2 * timeout)
        answers = [mine | more for mine, more in zip(answers, together)]
    if len(set(hosts)) > 1 and not any({"silent", "error"} & answer.keys() for answer in answers):
        answers[0]["blind"] = blind_hosts(folder, hosts, group)
    return judge(answers, hosts, factor)


def _exchange(
    name: str, measure: Callable[[], dict[str, Any]], hosts: list[str], timeout: float
) -> list[dict[str, Any]]:
    """What each rank has measured, the same list on all ranks. Through the store: a collective would wait for all.

    {"error": why} of a rank whose measurement failed, {"silent": sentence} of a rank that is `timeout` seconds late.
    """
    rank, store = dist.get_rank(), dist.PrefixStore(f"node-check/{name}", default_store())
    try:
        answer = measure()
    except (OSError, RuntimeError) as e:
        answer = {"error": str(e).partition("\n")[0] or type(e).__name__}
    store.set(f"{rank}", json.dumps(answer))
    if rank > 0:
        if not _in_store(store, ["all"], 2 * timeout + 60):  # rank 0 waits for the slowest
            raise UserError(f"The node check got no answer from rank 0 on {hosts[0]}.")
        answers: list[dict[str, Any]] = json.loads(store.get("all"))
        store.set(f"{rank} has read", "")
        return answers
    answers = [{"silent": f"no answer from rank {other} in {timeout:g} s ({name})"} for other in range(len(hosts))]
    deadline = time.monotonic() + timeout
    present = [other for other in range(len(hosts)) if _in_store(store, [f"{other}"], deadline - time.monotonic())]
    for other in present:
        answers[other] = json.loads(store.get(f"{other}"))
    store.set("all", json.dumps(answers))
    _in_store(store, [f"{other} has read" for other in present[1:]], 10)  # the store may end with this process
    return answers


def _in_store(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Wait until the keys are in the store; False if they are not within `seconds`."""
    with contextlib.suppress(RuntimeError):
        store.wait(keys, timedelta(seconds=max(seconds, 0.01)))
        return True
    return False


def _write(report: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(report, indent=1) + "\n")


def main(argv: list[str], rank: int, local_rank: int, world_size: int) -> int:
    parser = argparse.ArgumentParser(prog="python -m torchtitan.extensions.cluster.node_check")
    parser.add_argument("--folder", type=Path, required=True, help="the dump folder that training would use")
    parser.add_argument("--factor", type=float, default=1.5, help="how many times the median host's time is slow")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long the matrix product is repeated")
    parser.add_argument("--timeout", type=float, default=60.0, help="how many seconds an answer may take")
    parser.add_argument("--json", type=Path, help="where the report goes; default: node_check.json in the folder")
    options = parser.parse_args(argv)
    init_logger(rank, world_size)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        device = pick_device(local_rank)
        init_process_group(device, rank, world_size, int(options.timeout) + 60)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=options.timeout))
        hosts = host_names(group)
        report = node_check(options.folder, options.factor, device, hosts, group, options.timeout, options.seconds)
    except (UserError, OSError) as e:
        logger.error(str(e))
        return 1
    if rank > 0:
        return 0
    _write(report, options.json or options.folder / "node_check.json")
    print(*table(report), *sentences(report), f"exclude: {report['exclude'] or 'none'}", sep="\n", flush=True)
    return NAMED if report["exclude"] else 0


if __name__ == "__main__":
    code = main(sys.argv[1:], *(int(os.environ.get(name, default)) for name, default in RANK_VARIABLES))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as train.py ends
