"""One seam to numba: kernels compile on first call, or run as the plain Python they are.

Importing this module never imports numba. Where numba is missing or disabled (``NUMBA_DISABLE_JIT=1``) the
very same function bodies run over Python lists, which plain Python indexes about four times faster than
arrays; results are equal bit for bit because no kernel is compiled with fast-math.
"""

from __future__ import annotations

import functools
import importlib
import zlib
from collections.abc import Callable
from types import FunctionType
from typing import ParamSpec, TypeGuard, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["compiled", "for_kernel", "from_kernel", "has_compiler", "kernel_output", "kernel_part"]

# What annotations of parts mean: arrays are contiguous, without dimensions but one.
_KERNEL_TYPES = {
    "int": "int64",
    "float": "float64",
    "bool": "boolean",
    "None": "void",
    "Ints": "int64[::1]",
    "Floats": "float64[::1]",
}
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

    The function must not call other compiled functions: inside a kernel their names are plain Python. What it
    may call are parts, see :func:`kernel_part`.

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


def kernel_part(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that kernels and other parts may call; it stays plain Python for everyone else.

    Its annotations are its signature: ``int``, ``float``, ``bool``, ``None``, ``Ints`` and ``Floats`` (contiguous
    arrays of int64 and float64), under ``from __future__ import annotations``.
    """
    function.__dict__["is_kernel_part"] = True
    return function


def _compile(function: Callable[P, R]) -> Callable[P, R]:
    njit = importlib.import_module("numba").njit
    linked = _with_compiled_parts(function)
    try:
        return cast("Callable[P, R]", njit(cache=True)(linked))
    except RuntimeError:  # numba found no folder it may write its cache to
        return cast("Callable[P, R]", njit(linked))


class _NamesOfParts(dict[str, object]):
    """Globals of a module in which the names of parts mean their compiled forms, from when they are looked up.

    A kernel that comes from numba's cache looks up none, so its parts are not compiled in vain.
    """

    def __getitem__(self, name: str) -> object:
        value = super().__getitem__(name)
        return _compiled_part(value) if _is_part(value) else value


def _with_compiled_parts(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, or where it calls parts a copy that calls their compiled forms."""
    plain = cast("FunctionType", function)
    if not any(_is_part(plain.__globals__.get(name)) for name in plain.__code__.co_names):
        return function
    names = _NamesOfParts(plain.__globals__)
    copy = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    # Numba's cache knows a kernel by its name and by the date of its own file, but parts may change in theirs.
    copy.__qualname__ = f"{plain.__qualname__}_{zlib.crc32(repr(_contents(plain, set())).encode()):08x}"
    copy.__module__ = plain.__module__
    return cast("Callable[P, R]", copy)


def _contents(function: FunctionType, seen: set[FunctionType]) -> list[object]:
    """Return all that a function's machine code depends on: code and constants, its own and its parts'."""
    seen.add(function)
    code = function.__code__
    contents: list[object] = [function.__qualname__, code.co_code, code.co_consts, code.co_names]
    for name in code.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, int | float):
            contents.append(value)
        elif _is_part(value) and value not in seen:
            contents.append(_contents(value, seen))
    return contents


def _is_part(value: object) -> TypeGuard[FunctionType]:
    return isinstance(value, FunctionType) and "is_kernel_part" in value.__dict__


@functools.cache
def _compiled_part(function: FunctionType) -> object:
    numba = importlib.import_module("numba")
    types = [_KERNEL_TYPES[cast("str", name)] for name in function.__annotations__.values()]
    # Without its signature a part is compiled again for every mix of variables and constants it is called with.
    signature = f"{types[-1]}({', '.join(types[:-1])})"
    # Parts are called by kernels alone, and divide by zero nowhere: neither wrappers nor checks to compile.
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy"}
    return numba.njit(signature, **options)(_with_compiled_parts(function))


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
