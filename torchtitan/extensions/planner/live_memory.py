"""Bytes of the tensors that are alive in a process, counted after every operator.

Counted: the storages of tensors that an operator has taken or returned, as long as they are alive, each once, by its
present size (FSDP resizes its storages). Not counted: what a kernel allocates and frees inside itself, fragmentation,
Python, and what other threads allocate.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from torchtitan.tools.torch_compat import TorchDispatchMode, storage_key, tree_iter


class LiveBytes(TorchDispatchMode):
    """Measures `peak`, in bytes, between enter and exit. only_new: without the storages that existed before."""

    def __init__(self, only_new: bool = False) -> None:
        super().__init__()
        self.only_new = only_new
        self.live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = _storages((args, kwargs))
        returned = _storages(result)
        # a view, or a result in place, has the storage of an input
        self.live |= (
            {key: ref for key, ref in returned.items() if key not in taken} if self.only_new else taken | returned
        )
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes that are alive."""
        found = [(key, ref, ref()) for key, ref in self.live.items()]
        self.live = {key: ref for key, ref, storage in found if storage is not None}
        return sum(storage.nbytes() for _, _, storage in found if storage is not None)

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = 0


def _storages(tree: Any) -> dict[int, weakref.ref[torch.UntypedStorage]]:
    """The storages of a tree's tensors, by a key that is unique among storages that are alive."""
    tensors = (x.to_local() if isinstance(x, DTensor) else x for x in tree_iter(tree) if isinstance(x, torch.Tensor))
    storages = (x.untyped_storage() for x in tensors if x.device.type != "meta")
    return {storage_key(storage): weakref.ref(storage) for storage in storages}
