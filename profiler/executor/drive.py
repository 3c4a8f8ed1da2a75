"""Optimizer states on a drive: vectors in a file that has no name, so that nothing is left of it however a run ends."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from meshwright.errors import ExecutionError

__all__ = ["DriveVectors"]

_ELEMENT_BYTES = 4


class DriveVectors:
    """Single-precision vectors of equal length in a mapped file; what is not used is not in memory.

    Parameters
    ----------
    count, size : int
        Vectors, and elements of each.
    folder : Path | None
        A folder on the drive; None is that of temporary files.

    Raises
    ------
    ExecutionError
        If the drive has no room for them.
    """

    def __init__(self, count: int, size: int, folder: Path | None) -> None:
        num_bytes = count * size * _ELEMENT_BYTES
        # Nothing but this process, and its end, holds the file.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open as long as its vectors are
        weakref.finalize(self, self._file.close)
        try:
            # A file with holes would end the process where the drive is full.
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)
        except OSError as error:
            raise ExecutionError(
                f"{folder or tempfile.gettempdir()}: no room for {num_bytes / 2**30:,.1f} GiB of optimizer states"
                f" ({error.strerror}); name a folder on a larger drive with --out"
            ) from None
        self._map = mmap.mmap(self._file.fileno(), num_bytes)
        whole = torch.frombuffer(self._map, dtype=torch.float32)
        self.vectors: tuple[Tensor, ...] = torch.split(whole, size)

    def rest(self) -> None:
        """Write what has changed to the drive, and free the memory it took."""
        self._map.flush()
        if hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fadvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
