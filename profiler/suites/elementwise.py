"""Kernels bound by memory around the matrix products, forward, as torch runs them without a compiler.

``num_bytes`` counts what must be read and written once; a kernel that torch splits in several moves more, and is
slower per byte of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch.nn import functional

from meshwright.costmodels.operators.base import element_bytes
from meshwright.profiler.device import Device
from meshwright.profiler.sampling import byte_sizes
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite
from meshwright.profiler.suites.operands import main_precision, normal

__all__ = ["SUITE"]

_NAME = "elementwise"
_HEAD_DIM = 128


class _ElementwiseSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        precision = main_precision(device, settings)
        element = element_bytes(precision)
        width, vocabulary, sizes = (
            (4096, 32768, (2**16, 2**31)) if device.is_gpu else (512, 2048, (2**14, 2**20))
        )
        largest = min(float(sizes[1]), 0.1 * device.memory_bytes)
        for operator, (row_bytes, fixed_bytes, prepare) in _operators(width, vocabulary, element).items():
            for size in byte_sizes(settings.num_points("streaming"), sizes[0], largest):
                num_rows = max(1, round((size - fixed_bytes) / row_bytes))
                columns = vocabulary if operator == "cross_entropy" else width
                yield Case(
                    suite=_NAME,
                    operator=operator,
                    precision=precision,
                    shape={"num_bytes": num_rows * row_bytes + fixed_bytes},
                    prepare=partial(prepare, num_rows, columns, precision, device),
                )


SUITE: Suite = _ElementwiseSuite()

_Prepare = Callable[[int, int, str, Device], Callable[[], object]]
# Rows of the embedding table: far more than are looked up, so that they come from memory.
_TABLE_ROWS = 32768


def _operators(width: int, vocabulary: int, element: float) -> Mapping[str, tuple[float, float, _Prepare]]:
    """Return bytes per row, bytes whatever the rows, and the function, by operator; indices are 8 bytes each."""
    return {
        "rms_norm": (2.0 * width * element, width * element, _rms_norm),
        # Read, write, and one row of each table per token.
        "rotary": (2.0 * (width + _HEAD_DIM) * element, 0.0, _rotary),
        "swiglu": (3.0 * width * element, 0.0, _swiglu),
        "softmax": (2.0 * width * element, 0.0, _softmax),
        "cross_entropy": (vocabulary * element + 8.0, 0.0, _cross_entropy),
        "embedding": (2.0 * width * element + 8.0, 0.0, _embedding),
    }


def _rms_norm(num_rows: int, width: int, precision: str, device: Device) -> Callable[[], object]:
    x, weight = normal((num_rows, width), precision, device), normal((width,), precision, device)
    return partial(functional.rms_norm, x, (width,), weight)


def _rotary(num_rows: int, width: int, precision: str, device: Device) -> Callable[[], object]:
    x = normal((num_rows, width // _HEAD_DIM, _HEAD_DIM), precision, device)
    cosine, sine = (normal((num_rows, 1, _HEAD_DIM), precision, device) for _ in range(2))

    def rotate() -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), dim=-1) * sine

    return rotate


def _swiglu(num_rows: int, width: int, precision: str, device: Device) -> Callable[[], object]:
    gate, up = normal((num_rows, 2 * width), precision, device).chunk(2, dim=-1)
    return lambda: functional.silu(gate) * up


def _softmax(num_rows: int, width: int, precision: str, device: Device) -> Callable[[], object]:
    return partial(torch.softmax, normal((num_rows, width), precision, device), dim=-1)


def _cross_entropy(num_rows: int, vocabulary: int, precision: str, device: Device) -> Callable[[], object]:
    logits = normal((num_rows, vocabulary), precision, device)
    targets = torch.randint(vocabulary, (num_rows,), device=device.torch_name)
    return partial(functional.cross_entropy, logits, targets)


def _embedding(num_rows: int, width: int, precision: str, device: Device) -> Callable[[], object]:
    num_table_rows = _TABLE_ROWS if device.is_gpu else 4096
    table = normal((num_table_rows, width), precision, device)
    return partial(
        functional.embedding, torch.randint(num_table_rows, (num_rows,), device=device.torch_name), table
    )
