"""Safetensors files as bytes: header and raw tensors, without torch (format: huggingface/safetensors, README)."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = ["RawTensor", "SafetensorsFile", "read_safetensors", "tensor_array", "write_safetensors"]

_MAX_HEADER = 100_000_000
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawTensor:
    """One tensor: format, shape, and its bytes in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SafetensorsFile:
    """The tensors of a file by name, in their order, and its metadata."""

    tensors: dict[str, RawTensor]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> SafetensorsFile:
    """Return the tensors of a file.

    Raises
    ------
    SpecError
        If the file cannot be read or is no safetensors file.
    """
    try:
        with path.open("rb") as stream:
            # Mapped, not read: a checkpoint is larger than memory.
            content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        raise SpecError(f"{path}: is empty") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    size = int.from_bytes(content[:8], "little") if len(content) >= 8 else _MAX_HEADER + 1
    if size > min(_MAX_HEADER, len(content) - 8):
        raise SpecError(f"{path}: is no safetensors file, or is truncated")
    try:
        header = json.loads(bytes(content[8 : 8 + size]))
        metadata = header.pop("__metadata__", {})
        data = content[8 + size :]
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= len(data):
                raise ValueError(name)
            shape = tuple(int(each) for each in entry["shape"])
            tensors[name] = RawTensor(dtype=str(entry["dtype"]), shape=shape, data=data[begin:end])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SpecError(f"{path}: the header is not that of a safetensors file") from None
    return SafetensorsFile(tensors=tensors, metadata=metadata)


def write_safetensors(path: Path, file: SafetensorsFile) -> None:
    """Write a new file that holds the tensors in their order, one after the other.

    Raises
    ------
    SpecError
        If the file exists or cannot be written.
    """
    try:
        with path.open("xb") as stream:
            stream.write(_header(file))
            for tensor in file.tensors.values():
                stream.write(tensor.data)
    except OSError as error:
        raise SpecError(f"{path}: cannot be written ({error.strerror})") from None


def _header(file: SafetensorsFile) -> bytes:
    header: dict[str, object] = {"__metadata__": file.metadata} if file.metadata else {}
    position = 0
    for name, tensor in file.tensors.items():
        end = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_array(tensor: RawTensor, name: str) -> NDArray[np.generic]:
    """Return a tensor as an array; formats numpy lacks (BF16, F8) are refused.

    Raises
    ------
    SpecError
        If numpy has no such format.
    """
    if tensor.dtype not in _DTYPES:
        raise SpecError(
            f"{name}: the format {tensor.dtype} cannot be read here; expected one of {', '.join(_DTYPES)}"
        )
    return np.frombuffer(tensor.data, dtype=_DTYPES[tensor.dtype]).reshape(tensor.shape)
