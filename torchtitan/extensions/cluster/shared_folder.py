"""Do all hosts of a job see the same dump folder? If each host has its own, every checkpoint is torn apart."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchtitan.tools.errors import UserError

SEEN_WITHIN_SECONDS = 20.0
"""How long a file may take to appear on other hosts; NFS caches folders for seconds."""


def blind_hosts(
    folder: Path, hosts: list[str], group: dist.ProcessGroup, seconds: float = SEEN_WITHIN_SECONDS
) -> list[str]:
    """Collective. The hosts whose first rank does not see, within `seconds`, a file that rank 0 writes to `folder`."""
    rank = dist.get_rank()
    word = uuid.uuid4().hex
    message: list[Any] = [word, None]
    if rank == 0:
        try:
            (folder / f".shared-{word}").write_text(word)
        except OSError as e:
            message[1] = e
    dist.broadcast_object_list(message, src=0, group=group)
    word, error = message
    if error:
        raise UserError(f"{folder} cannot be written to on {hosts[0]}: {error}.")
    file = folder / f".shared-{word}"
    sees = hosts.index(hosts[rank]) != rank  # one rank per host looks
    deadline = time.monotonic() + seconds
    while not sees:
        try:
            os.listdir(folder)  # makes NFS look again
            sees = file.read_text() == word
        except OSError:
            pass
        if not sees:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    seen: list[bool] = [False] * len(hosts)
    dist.all_gather_object(seen, sees, group)
    if rank == 0:
        file.unlink(missing_ok=True)
    return list(dict.fromkeys(host for host, ok in zip(hosts, seen) if not ok))


def not_shared(folder: Path, writer: str, blind: list[str]) -> str:
    """The message for a dump folder that the `blind` hosts do not share with the host `writer`."""
    return (
        f"job.dump_folder = {folder} is not shared between the nodes: {', '.join(blind)} "
        f"{'does' if len(blind) == 1 else 'do'} not see what {writer} wrote there ({SEEN_WITHIN_SECONDS:g} s ago). "
        "Each node would have a part of every checkpoint: name a folder on a file system that all nodes mount."
    )
