"""Latency of dependent loads on an NVIDIA GPU: a CUDA C++ kernel, built with nvcc where it is run.

There is no CPU path: a chase in Python would measure Python. Neither torch nor Triton is needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import CalibrationError, SpecError

__all__ = ["build_pointer_chase", "pointer_chase_latency", "single_cycle_permutation"]

# One slot per cache line: no load brings its successor along.
_STRIDE_BYTES = 128
# Walked before the clock starts: 128 MiB of slots, more than the last cache of any GPU that nvcc builds for.
_MAX_WARM_UP_STEPS = 2**20


class _Walk(NamedTuple):
    seconds: float
    last_slot: int


def single_cycle_permutation(num_slots: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return a random permutation that visits every slot before it returns: ``next[i]`` follows ``i``.

    Parameters
    ----------
    num_slots : int
        Slots, at least 1.
    generator : numpy.random.Generator
        Source of randomness; equal seeds give equal cycles.

    Returns
    -------
    numpy.ndarray
        Successors (num_slots,), every cycle over all slots equally likely.

    Raises
    ------
    SpecError
        If ``num_slots`` < 1.

    Notes
    -----
    The distribution of Sattolo's shuffle  [Sattolo 1986], without its loop: a random visiting order, each
    slot linked to the next one of the order. Of all orders exactly ``num_slots`` rotations give the same
    cycle.

    Examples
    --------
    >>> single_cycle_permutation(1, np.random.default_rng(0))
    array([0])
    """
    if num_slots < 1:
        raise SpecError(f"single_cycle_permutation: num_slots is {num_slots}; pass at least 1")
    order = generator.permutation(num_slots)
    successors = np.empty(num_slots, dtype=np.int64)
    successors[order] = np.roll(order, -1)
    return successors


def build_pointer_chase(build_folder: Path) -> Path:
    """Return the shared library of the CUDA kernel; build it with nvcc unless it is there already.

    Parameters
    ----------
    build_folder : Path
        Where to build; made if missing. The file's name holds a digest of its source.

    Returns
    -------
    Path
        The library, with code for every GPU generation that this nvcc knows.

    Raises
    ------
    CalibrationError
        If there is no nvcc on the PATH, or it fails.
    """
    source = resources.files("meshwright.kernels").joinpath("pointer_chase.cu")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    library = build_folder / f"pointer_chase-{digest}.so"
    if library.exists():
        return library
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CalibrationError(
            "pointer_chase: there is no nvcc on the PATH; install the CUDA toolkit, or add its bin folder"
        )
    build_folder.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that no other process loads half a library.
    unfinished = library.with_suffix(f".{os.getpid()}.so")
    with resources.as_file(source) as source_file:
        done = subprocess.run(
            [
                nvcc,
                "-O3",
                "-std=c++17",
                "-arch=all-major",
                "-shared",
                "-Xcompiler",
                "-fPIC",
                "-o",
                str(unfinished),
                str(source_file),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise CalibrationError(
            f"pointer_chase: {nvcc} failed with exit code {done.returncode}; "
            "does it suit the host compiler?\n"
            f"{(done.stderr or done.stdout).strip()}"
        )
    unfinished.replace(library)
    return library


def pointer_chase_latency(
    num_bytes: int,
    *,
    build_folder: Path,
    generator: np.random.Generator,
    num_steps: int = 2**18,
    device_index: int = 0,
) -> float:
    """Return the seconds of one load whose address the load before it gave.

    One thread follows pointers, one per 128 bytes, around a random cycle through ``num_bytes`` of device
    memory; what fits a cache is in it when the clock starts. The size chooses what answers: L1, L2 or memory,
    and beyond that the reach of the address translation.

    Parameters
    ----------
    num_bytes : int
        Memory to walk [B]; rounded down to slots of 128 bytes, at least one.
    build_folder : Path
        See :func:`build_pointer_chase`.
    generator : numpy.random.Generator
        Draws the cycle.
    num_steps : int
        Timed loads, at least 1; the kernel's launch (microseconds) is spread over them.
    device_index : int
        GPU, as CUDA numbers them.

    Returns
    -------
    float
        Latency [s].

    Raises
    ------
    SpecError
        If ``num_bytes`` < 128 or ``num_steps`` < 1.
    CalibrationError
        If there is no nvcc, no NVIDIA GPU, or too little memory on it.
    """
    if num_bytes < _STRIDE_BYTES or num_steps < 1:
        raise SpecError(
            f"pointer_chase_latency: num_bytes is {num_bytes} and num_steps is {num_steps}; "
            f"pass at least {_STRIDE_BYTES} and 1"
        )
    library = build_pointer_chase(build_folder)
    successors = single_cycle_permutation(num_bytes // _STRIDE_BYTES, generator)
    return _walk(library, successors, num_steps, device_index).seconds / num_steps


def _warm_up_steps(num_slots: int) -> int:
    return min(num_slots, _MAX_WARM_UP_STEPS)


def _walk(library: Path, successors: NDArray[np.int64], num_steps: int, device_index: int) -> _Walk:
    loaded = ctypes.CDLL(str(library))
    loaded.pointer_chase_error.restype = ctypes.c_char_p
    walk = loaded.pointer_chase_walk
    walk.argtypes = [
        ctypes.c_int,
        np.ctypeslib.ndpointer(dtype=np.int64, ndim=1, flags="C_CONTIGUOUS"),
        *[ctypes.c_int64] * 4,
        ctypes.POINTER(ctypes.c_double),
        ctypes.POINTER(ctypes.c_int64),
    ]
    num_slots = len(successors)
    seconds, last_slot = ctypes.c_double(), ctypes.c_int64()
    code = walk(
        device_index,
        successors,
        num_slots,
        _STRIDE_BYTES,
        _warm_up_steps(num_slots),
        num_steps,
        ctypes.byref(seconds),
        ctypes.byref(last_slot),
    )
    if code != 0:
        reason = loaded.pointer_chase_error(code).decode()
        raise CalibrationError(
            f"pointer_chase: CUDA device {device_index}: {reason}; "
            f"run on a machine with an NVIDIA GPU that has {num_slots * (_STRIDE_BYTES + 8)} bytes free"
        )
    return _Walk(seconds.value, last_slot.value)
