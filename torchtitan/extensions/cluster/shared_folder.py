"""Do all hosts of a job see the same dump folder? A folder that each has for itself would tear checkpoints apart."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchtitan.tools.device import host_name
from torchtitan.tools.errors import UserError

SEEN_WITHIN_SECONDS = 20.0
"""How long a file may take to be seen on other hosts; NFS caches folders for seconds."""


def hosts_of(group: dist.ProcessGroup, host: str | None = None) -> list[str]:
    """Collective. The host of every rank; host: the name to give this one, for tests."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host or host_name(), group)
    return hosts


def blind_hosts(
    folder: Path, hosts: list[str], group: dist.ProcessGroup, seconds: float = SEEN_WITHIN_SECONDS
) -> list[str]:
    """Collective. The hosts whose first rank does not see, within `seconds`, a file that rank 0 writes to `folder`."""
    rank = dist.get_rank()
    box: list[Any] = [None]
    file = folder / ".shared"
    if rank == 0:
        box = [uuid.uuid4().hex]
        file = folder / f".shared-{box[0]}"
        try:
            file.write_text(box[0])
        except OSError as e:
            box = [e]
    dist.broadcast_object_list(box, src=0, group=group)
    if isinstance(box[0], OSError):
        raise UserError(f"{folder} cannot be written to on {hosts[0]}: {box[0]}.")
    file = folder / f".shared-{box[0]}"
    sees = hosts.index(hosts[rank]) != rank  # one rank a host looks
    deadline = time.monotonic() + seconds
    while not sees:
        try:
            os.listdir(folder)  # makes NFS look again
            sees = file.read_text() == box[0]
        except OSError:
            pass
        if sees or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    seen: list[bool] = [False] * len(hosts)
    dist.all_gather_object(seen, sees, group)
    if rank == 0:
        file.unlink(missing_ok=True)
    return list(dict.fromkeys(host for host, ok in zip(hosts, seen) if not ok))


def not_shared(folder: Path, writer: str, blind: list[str]) -> str:
    """The sentence for a dump folder that some hosts have for themselves."""
    return (
        f"job.dump_folder = {folder} is not shared between the nodes: {', '.join(blind)} "
        f"{'does' if len(blind) == 1 else 'do'} not see what {writer} wrote there ({SEEN_WITHIN_SECONDS:g} s ago). "
        "Checkpoints would be torn: name a folder on a file system that all nodes mount."
    )
