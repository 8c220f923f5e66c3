r"""Are the machines fit for the job? Before training, or by itself under any launcher that starts ranks:

    python -m torchtitan.extensions.cluster.launch --nproc 2 --module torchtitan.extensions.cluster.node_check -- \
        --folder outputs
    srun torchrun ... -m torchtitan.extensions.cluster.node_check --folder outputs

Times a matrix product on every rank, an all-reduce inside every node and between neighbouring ones, a write and a read
of the dump folder, and compares the clocks. A host that takes more than `factor` times the median host's time is slow;
one with a wrong result, without an answer, or that does not see the other hosts' files, is broken. The exit code is 0,
or 3 (from rank 0) if some host is named; node_check.json has the names as Slurm's --exclude takes them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.components.hooks import Hook
from torchtitan.extensions.cluster.node_report import Report, judge, table
from torchtitan.extensions.cluster.shared_folder import blind_hosts, hosts_of, not_shared
from torchtitan.tools.device import init_process_group, pick_device
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.torch_compat import default_store

REPEATS = 5
LEAVE_SECONDS = 10.0
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
            _write_report(report, folder / "node_check.json")
            for line in table(report):
                logger.info(line)
            for host, reasons in report.slow.items():
                logger.warning(f"node check: {host} is slow: {'; '.join(reasons)}")
        if report.broken:
            broken = "; ".join(f"{host}: {', '.join(reasons)}" for host, reasons in report.broken.items())
            raise UserError(
                f"The node check (comm.node_check) found hosts that cannot train: {broken}. Start without them "
                f"(Slurm: --exclude={','.join(sorted(report.broken))})."
            )


def disk_seconds(folder: Path, mib: int) -> dict[str, float]:
    """Seconds to write `mib` MiB to the folder so that they last, and to read them back; OSError if it fails."""
    file = folder / f".node-check-{uuid.uuid4().hex}"
    block = os.urandom(2**20)
    try:
        began = time.perf_counter()
        with file.open("wb") as f:
            for _ in range(mib):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            written = time.perf_counter() - began
            if hasattr(os, "posix_fadvise"):  # else it would be read from memory
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        with file.open("rb") as f:
            while read := f.read(2**20):
                if read != block:
                    raise OSError("what was read is not what was written")
        return {"write": written, "read": time.perf_counter() - began}
    finally:
        file.unlink(missing_ok=True)


def matmul_seconds(device: torch.device, seconds: float) -> tuple[float, bool]:
    """Mean time of a matrix product, repeated for about `seconds`, and whether every result was the same to the bit."""
    cuda = device.type == "cuda"
    n = 8192 if cuda else 512
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator).to(device, torch.bfloat16 if cuda else torch.float32)

    def product() -> torch.Tensor:
        result = a @ a
        if cuda:
            torch.cuda.synchronize(device)
        return result

    first = product()
    same, spent, count = True, 0.0, 0
    # the mean, not the best: a host that is held up now and then is a slow host
    while spent < seconds or count < REPEATS:
        began = time.perf_counter()
        result = product()
        spent, count = spent + time.perf_counter() - began, count + 1
        same = same and torch.equal(result, first)
    return spent / count, same


def all_reduce_seconds(device: torch.device, group: dist.ProcessGroup, mib: int) -> float:
    """Collective over group. Mean time of an all-reduce of `mib` MiB; RuntimeError where the sum is wrong."""
    size = dist.get_world_size(group)

    def reduce() -> torch.Tensor:
        ones = torch.ones(mib * 2**18, device=device)
        dist.all_reduce(ones, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return ones

    reduce()
    began = time.perf_counter()
    for _ in range(REPEATS):
        result = reduce()
    elapsed = time.perf_counter() - began
    if not bool((result == size).all()):
        raise RuntimeError(f"an all-reduce over {size} ranks gave a wrong sum")
    return elapsed / REPEATS


def rounds_of_neighbours(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours in a ring of `count` nodes, in rounds in which no node occurs twice: 2 or 3 rounds."""
    ring = [(i, (i + 1) % count) for i in range(count)] if count > 2 else [(0, 1)] * (count == 2)
    odd_one_out = [ring.pop()] if count > 2 and count % 2 else []
    return [pairs for pairs in (ring[::2], ring[1::2], odd_one_out) if pairs]


def clock_skews(group: dist.ProcessGroup) -> list[float]:
    """Collective. Seconds that each rank's clock is ahead of rank 0's, as exactly as a barrier ends everywhere."""
    rounds = []
    for _ in range(REPEATS):
        dist.barrier(group)
        every = torch.zeros(dist.get_world_size(group), dtype=torch.float64)
        every[dist.get_rank(group)] = time.time()
        dist.all_reduce(every, group=group)
        rounds.append((every - every[0]).tolist())
    return [statistics.median(column) for column in zip(*rounds)]


def node_check(
    folder: Path,
    factor: float,
    device: torch.device,
    hosts: list[str],
    group: dist.ProcessGroup,
    timeout: float,
    seconds: float = 0.5,
) -> Report:
    """Collective, but does not rely on it: a rank that gives no answer within `timeout` seconds is named as broken.

    Results go through the store, and first those that no other rank is needed for. The same report on all ranks.
    """
    rank, store = dist.get_rank(), default_store()
    first = hosts.index(hosts[rank]) == rank  # of its host
    cuda = device.type == "cuda"

    def alone() -> dict[str, Any]:
        matmul, same = matmul_seconds(device, seconds)
        result: dict[str, Any] = {"matmul": matmul, "same": same}
        if first:
            result |= disk_seconds(folder, 64 if cuda else 8) | {"free_gib": shutil.disk_usage(folder).free / 2**30}
        return result

    def together() -> dict[str, Any]:
        result: dict[str, Any] = {"clock": clock_skews(group)[rank]}
        names = list(dict.fromkeys(hosts))
        members = {name: [r for r, host in enumerate(hosts) if host == name] for name in names}
        limit, mib = timedelta(seconds=timeout), 256 if cuda else 4
        inside = [dist.new_group(members[name], timeout=limit) for name in names][names.index(hosts[rank])]
        if len(members[hosts[rank]]) > 1:
            result["inside"] = all_reduce_seconds(device, inside, mib)
        result["pairs"] = {}
        for pairs in rounds_of_neighbours(len(names)):
            for a, b in pairs:
                both = dist.new_group(members[names[a]] + members[names[b]], timeout=limit)
                if hosts[rank] in (names[a], names[b]):
                    other = names[b] if hosts[rank] == names[a] else names[a]
                    mine = both, other
            if any(hosts[rank] in (names[a], names[b]) for a, b in pairs):
                result["pairs"][mine[1]] = all_reduce_seconds(device, mine[0], mib)
        result["blind"] = blind_hosts(folder, hosts, group) if len(names) > 1 else []
        return result

    answers: list[dict[str, Any]] = [{} for _ in hosts]
    for phase, function in (("alone", alone), ("together", together)):
        store.set(f"node-check/{phase}/{rank}", json.dumps(_answer(function)))
        if rank == 0:
            for other, answer in enumerate(_collect(store, phase, len(hosts), timeout)):
                answers[other] |= answer
            report = judge(answers, hosts, factor)
            go_on = not any("silent" in answer for answer in answers)  # else the others would wait for it
            store.set(f"node-check/{phase}/report", json.dumps(report.as_json() | {"go_on": go_on}))
        told = f"node-check/{phase}/report"
        try:
            # rank 0 waits for the slowest before it answers
            store.wait([told], timedelta(seconds=2 * timeout + 60))
        except Exception as e:
            raise UserError(f"The node check got no answer from rank 0 on {hosts[0]}: {e}") from None
        found = json.loads(store.get(told))
        store.set(f"node-check/{phase}/read/{rank}", "1")
        if rank == 0:  # which may keep the store: it must not leave before the others have read
            heard = [r for r, answer in enumerate(answers) if "silent" not in answer]
            deadline = time.monotonic() + LEAVE_SECONDS
            while time.monotonic() < deadline and not store.check([f"node-check/{phase}/read/{r}" for r in heard]):
                time.sleep(0.02)
        if not found["go_on"]:
            break
    return Report(found["hosts"], found["slow"], found["broken"])


def _answer(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return function()
    except (OSError, RuntimeError, UserError) as e:
        return {"error": str(e).splitlines()[0] if str(e) else type(e).__name__}


def _collect(store: dist.Store, phase: str, ranks: int, timeout: float) -> list[dict[str, Any]]:
    deadline = time.monotonic() + timeout
    answers: list[dict[str, Any]] = []
    for rank in range(ranks):
        key = f"node-check/{phase}/{rank}"
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.02)
        answers.append(
            json.loads(store.get(key))
            if store.check([key])
            else {"silent": f"no answer from rank {rank} in {timeout:g} s to what it does {phase}"}
        )
    return answers


def _write_report(report: Report, path: Path) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    aside.replace(path)


def main(argv: list[str], rank: int, local_rank: int, world_size: int) -> int:
    parser = argparse.ArgumentParser(prog="python -m torchtitan.extensions.cluster.node_check")
    parser.add_argument("--folder", type=Path, required=True, help="the dump folder that training would use")
    parser.add_argument("--factor", type=float, default=1.5, help="slower than so many times the median is slow")
    parser.add_argument("--seconds", type=float, default=1.0, help="that the matrix product is repeated for")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that an answer may take")
    parser.add_argument("--json", type=Path, help="where the report goes; default: node_check.json in the folder")
    options = parser.parse_args(argv)
    init_logger(rank, world_size)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        device = pick_device(local_rank)
        init_process_group(device, rank, world_size, int(options.timeout) + 60)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=options.timeout))
        hosts = hosts_of(group)
        report = node_check(
            options.folder, options.factor, device, hosts, group, options.timeout, seconds=options.seconds
        )
        if rank == 0:
            _write_report(report, options.json or options.folder / "node_check.json")
            print("\n".join(table(report)), flush=True)
            for kind, named in (("broken", report.broken), ("slow", report.slow)):
                for host, reasons in named.items():
                    print(f"{kind}: {host}: {'; '.join(reasons)}", flush=True)
            print(f"exclude: {report.exclude or 'none'}", flush=True)
        return NAMED if rank == 0 and report.exclude else 0
    except (UserError, OSError) as e:
        logger.error(str(e))
        return 1


if __name__ == "__main__":
    code = main(
        sys.argv[1:], *(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as train.py ends
