"""Files of ``torch.save`` without torch: tensors become arrays, and nothing else may be built from them.

Such a file is a zip archive with a pickle and one raw file per storage. The pickle is read by an unpickler that
knows dictionaries, lists, numbers, text and the two functions tensors are rebuilt with; any other name is refused,
so that a file can run no code.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = ["read_torch_file"]

_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def read_torch_file(path: Path) -> object:
    """Return the object of a file, its tensors as arrays.

    Raises
    ------
    SpecError
        If the file is no archive of ``torch.save``, or holds anything but plain data and dense tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise SpecError(f"{path}: is no file of torch.save in its zip format")
            folder = names[0].removesuffix("data.pkl")
            return _PlainUnpickler(archive, folder, path).load()
    except (zipfile.BadZipFile, OSError):
        raise SpecError(f"{path}: is no file of torch.save in its zip format") from None
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(
            f"{path}: holds more than plain data and tensors; convert it to .npz or .json"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str, path: Path) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self._archive, self._folder, self._path = archive, folder, path

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name a tensor is rebuilt with."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise SpecError(
            f"{self._path}: would run '{module}.{name}', which is refused; convert it to .npz or .json with torch"
        )

    def persistent_load(self, pid: Any) -> NDArray[np.generic]:
        """Return a storage: ``("storage", format, file, device, size)``."""
        _, dtype, key, _, size = pid
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), dtype=dtype)[:size]


def _rebuild(
    storage: NDArray[np.generic], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> NDArray[np.generic]:
    """Return a dense view of a storage, as an array of its own."""
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if offset < 0 or min(stride, default=0) < 0 or (0 not in shape and last >= len(storage)):
        raise ValueError("a tensor reaches beyond its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides).copy()
