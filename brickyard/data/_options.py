"""Options that only some ways of a step read: given with another way they are refused, not ignored."""

from __future__ import annotations

import dataclasses
from typing import Any

from brickyard.core.errors import UsageError


def belong(config: Any, names: tuple[str, ...], to: str, *, used: bool) -> None:
    """Raise UsageError where nothing reads the options `names` (`used` is False) and one is away from its default.

    `to` says in words what they belong to.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        if not used and value != defaults[name]:
            raise UsageError(
                f"{name}={value!r} belongs to {to}; here it would change nothing. Leave it out, or set that."
            )
