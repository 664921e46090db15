"""What takes long says so, to whoever listens: the command line does, a caller in Python need not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str], None]
# What is computed does not depend on who hears of it, so no function takes a listener for it.
_LISTENER: ContextVar[Listener] = ContextVar("listener", default=lambda text: None)


def tell(text: str) -> None:
    """Say a line about what is under way or done."""
    _LISTENER.get()(text)


@contextmanager
def told_to(listen: Listener) -> Iterator[None]:
    """Let `listen` hear what is told inside."""
    token = _LISTENER.set(listen)
    try:
        yield
    finally:
        _LISTENER.reset(token)
