"""What an operator is to the cost models: its shape, its work, and the coordinates its residual lives in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.plan_columns import FloatColumn

__all__ = [
    "ELEMENT_BYTES",
    "DeviceRates",
    "Operator",
    "Parameter",
    "Shape",
    "Work",
    "element_bytes",
    "in_columns",
    "rows",
]

Shape = Mapping[str, FloatColumn]
"""Arrays by the names of :attr:`Operator.fields`, each of shape ``(num_cases,)``."""

# Bytes of one stored element by number format; block formats carry their scales (one byte per 32 or 16 values).
ELEMENT_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "tf32": 4.0,
    "fp16": 2.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "mxfp8": 1.03125,
    "nvfp4": 0.5625,
    "int8": 1.0,
    "int8_wo": 1.0,
    # Four-bit weights with one scale per group of 32 or so; activations count apart where they are wider.
    "int4_wo": 0.53,
    "w4a16_mxfp4": 0.53,
    "w4a8_mxfp4_mxfp8": 0.53,
    "w4afp8": 0.53,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """What the data sheet promises an operator in its number format.

    Parameters
    ----------
    peak_flops_per_second : float
        Dense peak of the number format [FLOP/s].
    bandwidth_bytes_per_second : float
        Memory or link bandwidth the operator's bytes cross [B/s].
    num_sms : int
        Streaming multiprocessors (compute units, cores) that share the work.
    l2_bytes : float
        Last-level cache they share [B].
    is_nominal : bool
        Whether peak and bandwidth are rough guesses, as a CPU's are: only then may a fitted efficiency pass 1.
    """

    peak_flops_per_second: float
    bandwidth_bytes_per_second: float
    num_sms: int
    l2_bytes: float = 0.0
    is_nominal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """FLOPs and bytes of each case, as the smooth roofline prices them; arrays of shape ``(num_cases,)``.

    ``latency`` is what grows with the shape before any of it overlaps, beyond the constant launch time [s].
    """

    flops: FloatColumn
    num_bytes: FloatColumn
    latency: FloatColumn | float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One constant of an operator's work beyond the four of the roofline, with its bounds in a fit."""

    name: str
    initial: float
    low: float
    high: float


WorkFunction = Callable[[Shape, str, DeviceRates, Mapping[str, float]], Work]
CoordinateFunction = Callable[[Shape, DeviceRates], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One kind of kernel: everything the cost models know of it before it is measured.

    Parameters
    ----------
    name : str
        Key in :data:`meshwright.costmodels.operators.OPERATORS` and prefix of its models in a calibration.
    fields : tuple[str, ...]
        Names of the shape's columns.
    work : WorkFunction
        ``(shape, precision, rates, parameters) -> Work``.
    coordinates : CoordinateFunction
        ``(shape, rates) -> (num_cases, num_dims)``: log2 coordinates in which the residual is smooth, one unit about
        as far in each.
    num_dims : int
        How many coordinates there are.
    steps : CoordinateFunction | None
        Further coordinates for stepwise residuals, such as the fill of the last wave over the SMs.
    parameters : tuple[Parameter, ...]
        Constants of ``work`` that a fit finds.
    launch_time : float
        Where a fit starts its fixed latency [s].
    """

    name: str
    fields: tuple[str, ...]
    work: WorkFunction
    coordinates: CoordinateFunction
    num_dims: int
    steps: CoordinateFunction | None = None
    parameters: tuple[Parameter, ...] = ()
    launch_time: float = 3e-6

    @property
    def is_bakeable(self) -> bool:
        """Whether a smooth residual has few enough dimensions for a regular grid."""
        return self.num_dims <= 3


def element_bytes(precision: str) -> float:
    """Return bytes of one stored element; formats not listed count as 16 bits."""
    return ELEMENT_BYTES.get(precision, 2.0)


def rows(shape: Shape, fields: tuple[str, ...]) -> NDArray[np.float64]:
    """Return ``log2`` of the named columns as ``(num_cases, num_fields)``; zeros count as one."""
    return in_columns([np.log2(np.maximum(shape[name], 1.0)) for name in fields])


def in_columns(columns: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return columns side by side, ``(num_cases, num_columns)``, each contiguous in memory."""
    return np.stack(columns).T
