"""Bytes of the tensors that live in a process, counted operator by operator.

Counted: the storages of all tensors that an operator has taken or returned and that are still alive, each once, by its
present size (FSDP resizes its own), after every operator. Not counted: what a kernel allocates and frees inside itself,
fragmentation, Python, and what other threads allocate out of sight.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Between enter and exit: `now` and `peak` in bytes; `at_peak` has the sizes of the storages of the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0
        self.at_peak: list[tuple[int, str]] = []
        self.made_by: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_iter((args, kwargs, result)):
            if isinstance(x, torch.Tensor):
                self.see(x, str(func))
        now = self.now()
        if now > self.peak:
            self.peak = now
            self.at_peak = sorted(((s.nbytes(), self.made_by[k]) for k, s in self._alive()), reverse=True)
        return result

    def see(self, x: torch.Tensor, maker: str = "") -> None:
        """Count a tensor that was made before."""
        local = getattr(x, "_local_tensor", x)
        if local.device.type == "meta":
            return
        storage = local.untyped_storage()
        key = storage._cdata
        known = self.live.get(key)
        if known is None or known() is None:
            self.live[key] = weakref.ref(storage)
            self.made_by[key] = f"{maker} {tuple(local.shape)} {local.dtype}"

    def _alive(self) -> list[tuple[int, torch.UntypedStorage]]:
        found = [(k, ref()) for k, ref in self.live.items()]
        self.live = {k: self.live[k] for k, s in found if s is not None}
        return [(k, s) for k, s in found if s is not None]

    def now(self) -> int:
        """Bytes that live now."""
        return sum(s.nbytes() for _, s in self._alive())

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = 0, []
