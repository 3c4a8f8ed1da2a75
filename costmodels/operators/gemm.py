"""Matrix products ``(m, k) @ (k, n)``: forward, input gradient (dgrad) and weight gradient (wgrad) layouts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators.base import (
    DeviceRates,
    Operator,
    Shape,
    Work,
    element_bytes,
    in_columns,
    rows,
)

__all__ = ["GEMM", "GEMM_DGRAD", "GEMM_WGRAD"]

_FIELDS = ("m", "n", "k")
# Output tiles of the common kernels, in rows and columns: trees see how full the last wave of each would be. On
# Ampere a step over a tile edge costs 20 %; on Hopper the fitted weight of a wave term in the roofline is zero.
_TILES = ((128.0, 128.0), (128.0, 256.0), (256.0, 128.0), (64.0, 64.0))


def gemm_bytes(
    m: NDArray[np.float64], n: NDArray[np.float64], k: NDArray[np.float64], precision: str
) -> NDArray[np.float64]:
    """Return the bytes one product reads and writes once each; narrow formats write 16-bit outputs [B]."""
    width = element_bytes(precision)
    total: NDArray[np.float64] = width * (m * k + n * k) + max(2.0, width) * m * n
    return total


def _work(shape: Shape, precision: str, rates: DeviceRates, parameters: Mapping[str, float]) -> Work:
    del rates, parameters
    m, n, k = (shape[name] for name in _FIELDS)
    return Work(flops=2.0 * m * n * k, num_bytes=gemm_bytes(m, n, k, precision))


def _coordinates(shape: Shape, rates: DeviceRates) -> NDArray[np.float64]:
    del rates
    return rows(shape, _FIELDS)


def _steps(shape: Shape, rates: DeviceRates) -> NDArray[np.float64]:
    columns = []
    for tile_m, tile_n in _TILES:
        waves = np.ceil(shape["m"] / tile_m) * np.ceil(shape["n"] / tile_n) / rates.num_sms
        columns += [np.log2(np.ceil(waves) / waves), np.log2(waves)]
    return in_columns(columns)


def _gemm(name: str) -> Operator:
    return Operator(name=name, fields=_FIELDS, work=_work, coordinates=_coordinates, num_dims=3, steps=_steps)


GEMM, GEMM_DGRAD, GEMM_WGRAD = _gemm("gemm"), _gemm("gemm_dgrad"), _gemm("gemm_wgrad")
