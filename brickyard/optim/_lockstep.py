"""Two passes of one function that take turns: each runs until it hands over, and only one of them ever computes.

Every pass has its own stack, so whatever a forward keeps between two layers (masks, rotary tables, caches) is its own
without anybody having to know it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

T = TypeVar("T")


class _Stopped(Exception):
    """The other pass has failed; its error is the one to report."""


class Lockstep:
    """Runs a function twice, pass 0 in the calling thread and pass 1 in a thread that it keeps."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "second-pass")
        self._mine = threading.local()
        self._turns = (threading.Semaphore(0), threading.Semaphore(0))
        self._failed = self._ended = False

    @property
    def current(self) -> int:
        """Which pass the caller is: 0 or 1."""
        return getattr(self._mine, "number", 0)

    @property
    def ended(self) -> bool:
        """Whether pass 1 has returned."""
        return self._ended

    def run(self, function: Callable[[], T]) -> tuple[T, T]:
        """Return what the two passes returned; an error of either ends both and is raised here."""
        self._turns = (threading.Semaphore(0), threading.Semaphore(0))
        self._failed = self._ended = False
        # What counts the operators of the caller's thread (memory, FLOPs) must see those of both passes.
        second = self._thread.submit(self._second, function, _get_current_dispatch_mode_stack())
        try:
            first = function()
        except BaseException as error:
            self._failed = True
            self._turns[1].release()
            other = second.exception()
            if isinstance(error, _Stopped) and other is not None:
                raise other from None
            raise
        self._turns[1].release()
        return first, second.result()

    def hand_over(self) -> None:
        """Let the other pass run until it hands over, or ends."""
        self._turns[1 - self.current].release()
        self._turns[self.current].acquire()
        if self._failed:
            raise _Stopped

    def _second(self, function: Callable[[], T], modes: list[Any]) -> T:
        self._mine.number = 1
        self._turns[1].acquire()
        try:
            if self._failed:
                raise _Stopped
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode)
                return function()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._ended = True
            self._turns[0].release()
