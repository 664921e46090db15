"""Settings of a process that trains on the CPU; they change no result beyond numbers too small for full precision.

Freed memory stays with the process, so that the large tensors of one step are not asked from the system again, page by
page, in the next. Denormal numbers, which the activations of trained language models hold in number and on which a
processor is many times slower, are taken for zero.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_BLOCK = 2**28  # bytes; larger blocks still go back to the system at once
_KEPT = 2**30  # bytes at the end of the heap


def settle() -> bool:
    """Apply the settings; call it before the first tensor operation, for threads take them over when they begin.

    Returns whether the C library took the first (only glibc can).
    """
    import torch

    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
