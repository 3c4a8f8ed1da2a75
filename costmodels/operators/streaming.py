"""Kernels bound by memory or by a link: time is a latency and bytes over a bandwidth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators.base import DeviceRates, Operator, Shape, Work, rows

__all__ = ["STREAMING"]

_FIELDS = ("num_bytes",)


def _work(shape: Shape, precision: str, rates: DeviceRates, parameters: Mapping[str, float]) -> Work:
    del precision, rates, parameters
    num_bytes = shape["num_bytes"]
    return Work(flops=np.zeros_like(num_bytes), num_bytes=num_bytes)


def _coordinates(shape: Shape, rates: DeviceRates) -> NDArray[np.float64]:
    del rates
    return rows(shape, _FIELDS)


def _streaming(name: str) -> Operator:
    return Operator(name=name, fields=_FIELDS, work=_work, coordinates=_coordinates, num_dims=1)


# Bytes are what the kernel must read and write once: the suites and the cost models count them alike.
STREAMING = {
    name: _streaming(name)
    for name in (
        "copy",
        "host_to_device",
        "device_to_host",
        "peer_to_peer",
        "rms_norm",
        "rotary",
        "swiglu",
        "softmax",
        "cross_entropy",
        "embedding",
        "adam_fused",
        "adam_unfused",
    )
}
