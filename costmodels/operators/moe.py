"""The routed experts of one mixture-of-experts layer on one rank: dispatch, grouped products, weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators.base import (
    DeviceRates,
    Operator,
    Parameter,
    Shape,
    Work,
    element_bytes,
    in_columns,
)

__all__ = ["MOE"]

_FIELDS = ("num_tokens", "hidden_size", "moe_ffn_hidden_size", "top_k", "num_experts", "tp", "ep", "skew")
_PARAMETERS = (
    # Share of a GEMM tile's padding rows that costs like real rows.
    Parameter(name="padding", initial=0.7, low=0.0, high=1.5),
    # Exponent of ep by which the most loaded rank exceeds the mean under skewed routing.
    Parameter(name="rank_heat", initial=0.3, low=0.0, high=1.0),
    # Share of the experts that skewed routing keeps busy.
    Parameter(name="skewed_spread", initial=0.6, low=0.05, high=1.0),
    # Passes over the routed rows of this rank, and over those of the other ranks, outside the products.
    Parameter(name="row_passes", initial=2.0, low=0.0, high=30.0),
    Parameter(name="foreign_passes", initial=1.0, low=0.0, high=30.0),
    # An intermediate width that is no multiple of 16 loses vector loads in the second product.
    Parameter(name="unaligned_factor", initial=3.0, low=0.0, high=30.0),
)
_LARGEST_TILE = 128.0
_SMALLEST_TILE = 16.0
_ALIGNMENT = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routed:
    """Expected rows and active experts of the measured rank; arrays of shape ``(num_cases,)``."""

    rows: NDArray[np.float64]
    active: NDArray[np.float64]
    width: NDArray[np.float64]


def _routed(shape: Shape, rank_heat: float, skewed_spread: float) -> _Routed:
    """Return what reaches the most loaded rank: under skew more rows on fewer experts than on the mean rank."""
    rows = _rows(shape, rank_heat)
    busy = shape["num_experts"] / shape["ep"] * np.where(shape["skew"] > 0.0, skewed_spread, 1.0)
    # Experts that draw at least one of the rows, were the rows independent.
    active = np.maximum(1.0, busy * (1.0 - np.exp(-rows / busy)))
    return _Routed(rows=rows, active=active, width=shape["moe_ffn_hidden_size"] / shape["tp"])


def _rows(shape: Shape, rank_heat: float) -> NDArray[np.float64]:
    """Return the routed rows of the most loaded rank: under skew its share of them, times ``ep ** rank_heat``."""
    every = shape["num_tokens"] * shape["top_k"]
    rows: NDArray[np.float64] = every / shape["ep"]
    if rank_heat > 0.0:
        heat = np.where(shape["skew"] > 0.0, shape["ep"] ** rank_heat, 1.0)
        rows = np.minimum(rows * heat, every)
    return rows


def _work(shape: Shape, precision: str, rates: DeviceRates, parameters: Mapping[str, float]) -> Work:
    del rates
    routed = _routed(shape, parameters["rank_heat"], parameters["skewed_spread"])
    hidden, width = shape["hidden_size"], routed.width
    per_expert = routed.rows / routed.active
    tile = np.clip(2.0 ** np.ceil(np.log2(np.maximum(per_expert, 1.0))), _SMALLEST_TILE, _LARGEST_TILE)
    tiled = routed.active * np.ceil(np.maximum(per_expert, 1.0) / tile) * tile
    rows = routed.rows + parameters["padding"] * np.maximum(0.0, tiled - routed.rows)
    second = 1.0 + parameters["unaligned_factor"] * (width % _ALIGNMENT > 0.0)
    element = element_bytes(precision)
    all_rows = shape["num_tokens"] * shape["top_k"]
    row_bytes = 2.0 * (2.0 * hidden + 4.0 * width)
    passes = parameters["row_passes"] * routed.rows + parameters["foreign_passes"] * (all_rows - routed.rows)
    return Work(
        flops=2.0 * rows * hidden * width * (2.0 + second),
        num_bytes=element * routed.active * hidden * width * (2.0 + second) + passes * row_bytes,
    )


def _coordinates(shape: Shape, rates: DeviceRates) -> NDArray[np.float64]:
    del rates
    routed = _routed(shape, 0.0, 1.0)
    tokens, hidden, experts, top_k, ep = (
        np.log2(np.maximum(shape[name], 1.0))
        for name in ("num_tokens", "hidden_size", "num_experts", "top_k", "ep")
    )
    per_expert = np.log2(routed.rows / routed.active + 0.25)
    width, active = np.log2(np.maximum(routed.width, 1.0)), np.log2(routed.active)
    is_skewed = (shape["skew"] > 0.0).astype(np.float64)
    is_unaligned = (routed.width % _ALIGNMENT > 0.0).astype(np.float64)
    smooth = [tokens, 0.5 * per_expert, 0.5 * active, hidden, width, experts, top_k, 0.5 * ep]
    smooth += [is_skewed, 2.0 * is_unaligned, (ep > 0.0).astype(np.float64), is_skewed * ep * 0.5]
    return in_columns(smooth)


def _steps(shape: Shape, rates: DeviceRates) -> NDArray[np.float64]:
    del rates
    rows = np.log2(np.maximum(_rows(shape, 0.0), 0.25))
    return in_columns([rows, np.log2(shape["tp"]), np.log2(shape["ep"]), shape["skew"]])


MOE = Operator(
    name="moe",
    fields=_FIELDS,
    work=_work,
    coordinates=_coordinates,
    num_dims=12,
    steps=_steps,
    parameters=_PARAMETERS,
    launch_time=3e-5,
)
