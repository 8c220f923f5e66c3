"""Tensors that wait in host memory: the inputs of recomputed blocks between forward and backward.

The copy to the host runs on a stream of its own while the next block computes. The copy back runs while
backward computes the following block (as in ALST, arXiv 2506.13996). On the CPU the same copies are made, without a
stream and without gain.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch

IN_FLIGHT = 2
"""Tensors on their way to the host that are still held on the device; beyond, computation waits for the oldest copy."""


class HostCopies:
    """Hooks on saved tensors that keep them in host memory, for a backward in the reverse order of forward."""

    def __init__(self) -> None:
        self.stream: Any = None
        """The side stream, made when the first CUDA tensor comes."""
        self.leaving: deque[tuple[torch.Tensor, Any]] = deque()
        """Tensors whose copies may still run, and the events after the copies."""
        self.last: weakref.ref[_Copy] | None = None
        """The copy made last; each copy knows the previous one."""

    def hooks(self) -> Any:
        """A context in which tensors that autograd saves are kept in host memory."""
        return torch.autograd.graph.saved_tensors_hooks(self.to_host, self.to_device)

    def to_host(self, tensor: torch.Tensor) -> _Copy:
        """Start the tensor's copy to the host."""
        cuda = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
        if cuda:
            self.stream = self.stream or torch.cuda.Stream(tensor.device)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
            # The tensor's memory belongs to the current stream, which may use it again only after the copy. The tensor
            # is held until that stream is told to wait for the copy: so late that in fact it does not wait.
            self.leaving.append((tensor.detach(), self.stream.record_event()))
            self._free_copied(IN_FLIGHT)
        else:
            host.copy_(tensor)
        copy = _Copy(host, tensor.device, self.last)
        self.last = weakref.ref(copy)
        return copy

    def to_device(self, copy: _Copy) -> torch.Tensor:
        """The tensor on its device again; the tensor that was saved before it starts its way back, too."""
        self._free_copied(0)
        tensor = self._fetched(copy)
        if copy.arrived is not None:
            torch.cuda.current_stream().wait_event(copy.arrived)
        copy.device_copy = copy.arrived = None
        if copy.before is not None and (before := copy.before()) is not None:
            self._fetched(before)
        return tensor

    def _free_copied(self, keep: int) -> None:
        """Drop all but the last `keep` tensors that leave; the current stream waits for their copies."""
        while len(self.leaving) > keep:
            _, event = self.leaving.popleft()
            torch.cuda.current_stream().wait_event(event)

    def _fetched(self, copy: _Copy) -> torch.Tensor:
        """The copy's tensor on the device; its copy from the host has at least started."""
        if copy.device_copy is None:
            # allocated on the current stream, where it is used and freed; kernels that used this memory may still run
            copy.device_copy = torch.empty_like(copy.host, device=copy.device)
            if copy.device.type == "cuda":
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    copy.device_copy.copy_(copy.host, non_blocking=True)
                copy.arrived = self.stream.record_event()
            else:
                copy.device_copy.copy_(copy.host)
        return copy.device_copy


class _Copy:
    """A tensor in host memory, and its way back."""

    def __init__(self, host: torch.Tensor, device: torch.device, before: weakref.ref[_Copy] | None):
        self.host, self.device, self.before = host, device, before
        self.device_copy: torch.Tensor | None = None
        self.arrived: Any = None
        """The event after the copy to the device."""
