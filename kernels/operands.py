"""What every kernel asks of its tensors, and what it answers when it does not get it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from meshwright.errors import SpecError

__all__ = [
    "FLOAT_TYPES",
    "INDEX_TYPES",
    "accumulation_type",
    "require_dense",
    "require_device",
    "require_shape",
    "require_type",
]

FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_TYPES = (torch.int32, torch.int64)


def require_type(where: str, name: str, tensor: torch.Tensor, types: Collection[torch.dtype]) -> None:
    """Raise SpecError unless a tensor has one of the number types.

    Parameters
    ----------
    where : str
        Function that asks.
    name : str
        Its argument.
    tensor : torch.Tensor
        What was given for it.
    types : Collection[torch.dtype]
        What the kernel takes.
    """
    if tensor.dtype not in types:
        known = ", ".join(str(one) for one in types)
        raise SpecError(f"{where}: {name} is {tensor.dtype}; convert it to one of {known}")


def require_shape(
    where: str, name: str, tensor: torch.Tensor, shape: Sequence[int | None], spoken: str
) -> None:
    """Raise SpecError unless a tensor has a shape; ``None`` stands for any size.

    Parameters
    ----------
    where, name, tensor
        As in :func:`require_type`.
    shape : Sequence[int | None]
        Size per dim.
    spoken : str
        The shape in the words of the documentation, such as ``"(num_tokens, k)"``.
    """
    fits = len(shape) == tensor.ndim and all(
        wanted is None or wanted == size for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise SpecError(
            f"{where}: {name} has shape {tuple(tensor.shape)}; pass {spoken}, which is here ({sizes})"
        )


def require_dense(where: str, name: str, tensor: torch.Tensor) -> None:
    """Raise SpecError unless a tensor's elements follow each other in memory."""
    if not tensor.is_contiguous():
        raise SpecError(f"{where}: {name} has strides {tensor.stride()}; pass {name}.contiguous()")


def require_device(where: str, **tensors: torch.Tensor) -> torch.device:
    """Return the device that all tensors lie on.

    Raises
    ------
    SpecError
        If they lie on several.
    """
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on '{device}'" for name, device in devices.items())
        raise SpecError(f"{where}: {places}; move all of them to one device")
    return next(iter(devices.values()))


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """Return what a reference computes in: at least fp32.

    Examples
    --------
    >>> accumulation_type(torch.bfloat16), accumulation_type(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)
