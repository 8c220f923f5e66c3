"""Dataclasses of tensors that go from a loader process to a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch

M = TypeVar("M", bound="Movable")


class Movable:
    """Base of such a dataclass. Its tensors move, and its fields that are Movable or a dictionary of Movables."""

    stay: ClassVar[tuple[str, ...]] = ()
    """Fields whose tensors no device needs."""

    def to(self: M, device: torch.device | str, non_blocking: bool = True) -> M:
        """On a device; asynchronous from pinned memory."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking), self.stay)

    def pin_memory(self: M, device: torch.device | str | None = None) -> M:
        """In pinned (page-locked) memory; the DataLoader calls it, with a device in some versions of PyTorch."""
        return self._each(lambda x: x.pin_memory())

    def _each(self: M, move: Callable[[Any], Any], stay: tuple[str, ...] = ()) -> M:
        assert is_dataclass(self)
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (torch.Tensor, Movable)) and field.name not in stay:
                moved[field.name] = move(value)
            elif isinstance(value, dict):
                moved[field.name] = {key: move(item) for key, item in value.items()}
        return replace(self, **moved) if moved else self
