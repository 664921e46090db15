"""Two passes of one function that take turns: each runs until it hands over, and only one of them ever computes.

Every pass has its own stack, so whatever a forward keeps between two layers (masks, rotary tables, caches) is its own
without anybody having to know it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import torch
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
        second = self._thread.submit(self._second, function, _surroundings())
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

    def _second(self, function: Callable[[], T], surroundings: list[AbstractContextManager[Any]]) -> T:
        self._mine.number = 1
        self._turns[1].acquire()
        try:
            if self._failed:
                raise _Stopped
            with ExitStack() as stack:
                for context in surroundings:
                    stack.enter_context(context)
                return function()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._ended = True
            self._turns[0].release()


def _surroundings() -> list[AbstractContextManager[Any]]:
    """Return what torch keeps for the caller's thread alone and the second pass must have too.

    The streams and the device on which CUDA computes, autocast, and what counts operators (memory, FLOPs).
    """
    found: list[AbstractContextManager[Any]] = []
    if torch.cuda.is_initialized():
        now = torch.cuda.current_device()
        streams = [torch.cuda.current_stream(place) for place in range(torch.cuda.device_count())]
        # A new thread has the default ones, and touching a device that nobody uses takes memory on it.
        wanted = [s for s in streams if s.device_index == now or s != torch.cuda.default_stream(s.device)]
        # Each makes its device the present one, so that of the caller comes last.
        found += [torch.cuda.stream(s) for s in sorted(wanted, key=lambda s: s.device_index == now)]
    found += [
        torch.autocast(kind, dtype=torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda", "xpu", "mps")
        if torch.is_autocast_enabled(kind)
    ]
    return [*found, *_get_current_dispatch_mode_stack()]
