"""One class per cause of failure; the message says what was given, what was expected and what to do next.

`exit_code` is what the command line returns: 1 a run failed, 2 bad usage or input, 3 finished, but a proof does not
hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_FEW = 20  # names that are listed whole


class BrickyardError(Exception):
    """Base of every error that Brickyard raises on purpose."""

    exit_code = 2


class UsageError(BrickyardError):
    """An option, an arm or a command that cannot be understood."""


class UnknownName(UsageError):
    """A method, option, metric, role or embedded name that does not exist."""

    @classmethod
    def among(cls, what: str, given: str, known: Iterable[str], hint: str = "") -> UnknownName:
        """Build the error for `given`, naming the nearest of the `known` names, and all of them where they are few."""
        known = sorted(known)
        near = get_close_matches(given, known, n=3, cutoff=0.5)
        advice = [f"did you mean {' or '.join(near)}?"] if near else []
        if not near or len(known) <= _FEW:
            advice.append(f"known: {', '.join(known) or 'none'}.")
        return cls(f"unknown {what} {given!r}; {' '.join([*advice, *([hint] if hint else [])])}")


class BadData(BrickyardError):
    """A data set that cannot be used as given."""


class BadBase(BrickyardError):
    """A base folder or hub id that cannot be opened."""


class UnsafeFile(BrickyardError):
    """A file that could run code, leads out of its folder, or is malformed or damaged."""


class BadBrick(BrickyardError):
    """A brick that is incomplete, damaged, or of an unknown schema."""


class WrongBase(BrickyardError):
    """A brick or adapter made for another base."""


class Unmatched(BrickyardError):
    """A pattern or tensor name that matches nothing, or only partly."""


class Refused(BrickyardError):
    """A method that does not fit this base, task or combination; the message says why."""


class Locked(BrickyardError):
    """A folder that another process is using."""


class Changed(BrickyardError):
    """A resumed run whose config, data or code differs from what was stored."""


class DiskFull(BrickyardError):
    """Not enough room to write an artefact."""

    exit_code = 1


class BadMix(UsageError, ValueError):
    """A mixed batch that cannot be served; also a ValueError, which is what PEFT raises for its own types."""


class OutOfMemory(BrickyardError):
    """A run that exceeded its memory."""

    exit_code = 1


class NotFinite(BrickyardError):
    """NaN or infinity in a loss, gradient, weight change or saved tensor."""

    exit_code = 1


class RunFailed(BrickyardError):
    """A trial or step that crashed, hung or was killed."""

    exit_code = 1


class NoEffect(BrickyardError):
    """A stage that changed nothing."""

    exit_code = 3


class ParityBroken(BrickyardError):
    """A hand-over (save, merge, export) after which the model behaves differently."""

    exit_code = 3
