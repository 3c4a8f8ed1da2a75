"""One seam to numba: kernels compile on first call, or run as the plain Python they are.

Importing this module never imports numba. Where numba is missing or disabled (``NUMBA_DISABLE_JIT=1``) the
very same function bodies run over Python lists, which plain Python indexes about four times faster than
arrays; results are equal bit for bit because no kernel is compiled with fast-math.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["compiled", "for_kernel", "from_kernel", "has_compiler", "kernel_output"]

P = ParamSpec("P")
R = TypeVar("R")
ScalarT = TypeVar("ScalarT", bound=np.generic)


@functools.cache
def has_compiler() -> bool:
    """Return whether kernels are compiled: numba is installed and not disabled.

    The first call imports numba.
    """
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return False
    return not numba.config.DISABLE_JIT


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, compiled by numba on its first call where numba is at hand.

    The function must not call other compiled functions: inside a kernel their names are plain Python.

    Parameters
    ----------
    function : Callable
        A module-level function in the subset of Python that numba compiles.

    Returns
    -------
    Callable
        Same signature and, bit for bit, same results.
    """
    target: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal target
        if target is None:
            target = _compile(function) if has_compiler() else function
        return target(*args, **kwargs)

    return call


def _compile(function: Callable[P, R]) -> Callable[P, R]:
    njit = importlib.import_module("numba").njit
    try:
        return cast("Callable[P, R]", njit(cache=True)(function))
    except RuntimeError:  # numba found no folder it may write its cache to
        return cast("Callable[P, R]", njit(function))


def for_kernel(array: NDArray[ScalarT]) -> NDArray[ScalarT]:
    """Return what a kernel indexes fastest: the array itself, or its list without a compiler."""
    return array if has_compiler() else cast("NDArray[ScalarT]", array.tolist())


def kernel_output(size: int, fill: float, dtype: type[ScalarT]) -> NDArray[ScalarT]:
    """Return room for a kernel to write to, every entry ``fill``; :func:`from_kernel` reads it."""
    if has_compiler():
        # Zeros come from the operating system untouched: the kernel is the first to write to the pages.
        return np.full(size, fill, dtype=dtype) if fill else np.zeros(size, dtype=dtype)
    return cast("NDArray[ScalarT]", [fill] * size)


def from_kernel(values: NDArray[ScalarT], dtype: type[ScalarT]) -> NDArray[ScalarT]:
    """Return a kernel's output as an array again."""
    # NumPy reads a list three times faster as an iterator than as a nested sequence.
    return values if has_compiler() else np.fromiter(values, dtype, len(values))
