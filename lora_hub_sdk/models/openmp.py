"""On a CPU, one thread computes at full speed: others give their OpenMP threads back when they are done."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Final

#: omp_pause_hard: free everything that can be freed.
_HARD: Final = 2


def give_threads_back() -> None:
    """End the OpenMP threads that this thread's computing has left waiting; the next computation starts new ones.

    libgomp keeps a pool of threads for each thread that ever computed. While all pools together have more threads than
    the machine has cores, none of them waits actively for its next piece of work, and a step of a small model, which is
    some hundred pieces, takes half as long again. So this is called also where no engine is yet: one prompt's embedding
    then takes 4 % longer. Does nothing with another OpenMP.
    """
    _pause()(_HARD)


@cache
def _pause() -> Callable[[int], object]:
    import ctypes
    from pathlib import Path

    import torch

    packages = Path(torch.__file__).parent
    loaded_only = getattr(os, "RTLD_NOLOAD", None)
    if loaded_only is not None:
        for path in (*packages.glob("lib/libgomp*.so*"), *packages.parent.glob("torch.libs/libgomp*.so*")):
            try:
                library = ctypes.CDLL(str(path), mode=loaded_only | os.RTLD_LAZY)
                pause: Callable[[int], object] = library.omp_pause_resource_all
            except (OSError, AttributeError):  # not the one that torch uses, or one older than OpenMP 5
                continue
            return pause
    return lambda _: None
