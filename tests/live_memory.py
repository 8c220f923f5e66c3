"""Bytes of the tensors that live in a process, counted operator by operator.

Counted: the storages of all tensors that an operator has taken or returned and that are still alive, each once, by its
present size (FSDP resizes its own), after every operator. Not counted: what a kernel allocates and frees inside itself,
fragmentation, Python, and what other threads allocate out of sight.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Between enter and exit: `peak`, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_iter((args, kwargs, result)):
            if isinstance(x, torch.Tensor):
                self._see(x.to_local() if isinstance(x, DTensor) else x)
        self.peak = max(self.peak, self._now())
        return result

    def _see(self, x: torch.Tensor) -> None:
        if x.device.type == "meta":
            return
        storage = x.untyped_storage()
        key = storage._cdata  # of its own for as long as it lives
        known = self.live.get(key)
        if known is None or known() is None:
            self.live[key] = weakref.ref(storage)

    def _now(self) -> int:
        found = [(key, ref, ref()) for key, ref in self.live.items()]
        self.live = {key: ref for key, ref, storage in found if storage is not None}
        return sum(storage.nbytes() for _, _, storage in found if storage is not None)

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = 0
