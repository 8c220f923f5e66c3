"""Code of the user's own, which the configuration names as "module:NAME" (docs/extending.md)."""

from __future__ import annotations

import importlib
from typing import Any

from torchtitan.tools.errors import UserError


def import_named(text: str, key: str, expected: str) -> Any:
    """What `text`, a "module:NAME" on PYTHONPATH, names; None if the module lacks it.

    UserError, which begins with `key`, if there is no such module, or, with `expected`, if text has another form.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise UserError(f"{key}{expected}")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}, but there is no module {error.name}. It must be on PYTHONPATH.") from None
