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
# Rows of those tiles: the last one is computed in full, however few of its rows are there. Tokens come in any number,
# while the widths of models are multiples of them.
_TILE_ROWS = (128.0, 256.0)
# Parts that share the inner dimension of one tile where there are fewer tiles than SMs, and about what each costs beside
# the largest tiles in one part: a tenth more per doubling, as smaller tiles read their operands more often.
_SPLIT_COSTS = ((1.0, 1.0), (2.0, 1.1), (4.0, 1.2), (8.0, 1.35))
_TILE_COSTS = (1.1, 1.0, 1.0, 1.3)


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
    m, n, k = (shape[name] for name in _FIELDS)
    columns, least = [], np.full(m.shape, np.inf)
    for (tile_m, tile_n), tile_cost in zip(_TILES, _TILE_COSTS, strict=True):
        waves = np.ceil(m / tile_m) * np.ceil(n / tile_n) / rates.num_sms
        columns += [np.log2(np.ceil(waves) / waves), np.log2(waves)]
        for split, split_cost in _SPLIT_COSTS:
            work = np.ceil(split * waves) * (tile_cost * split_cost / split * tile_m * tile_n)
            np.minimum(least, work, out=least)
    columns += [np.log2(np.ceil(m / tile_rows) * tile_rows / m) for tile_rows in _TILE_ROWS]
    # The least work of whole waves over that of the product: what a library that knows its kernels gets down to.
    columns.append(np.log2(least * rates.num_sms / (m * n)))
    # Both sides of the roofline: kernels switch by how much there is to compute and to read.
    return in_columns([*columns, np.log2(m * n * k), np.log2(m * k + n * k + m * n)])


def _gemm(name: str) -> Operator:
    return Operator(name=name, fields=_FIELDS, work=_work, coordinates=_coordinates, num_dims=3, steps=_steps)


GEMM, GEMM_DGRAD, GEMM_WGRAD = _gemm("gemm"), _gemm("gemm_dgrad"), _gemm("gemm_wgrad")
