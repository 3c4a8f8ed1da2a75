"""A calibration carried to faster or slower parts of the same kind: what measured absolute figures are scaled by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from meshwright.costmodels.calibration import (
    AttentionCurve,
    CollectiveCurve,
    CollectiveTable,
    DeviceCalibration,
)

__all__ = ["scaled_calibration"]

# Bytes over each rank's link per byte of the buffer: an all-reduce passes twice (nccl-tests, doc/PERFORMANCE.md).
_ALL_REDUCE_PASSES = 2.0


def scaled_calibration(
    calibration: DeviceCalibration,
    *,
    collective_latency: float = 1.0,
    attention_rate: float = 1.0,
    launch_time: float = 1.0,
) -> DeviceCalibration:
    """Return the calibration with what was measured as absolute figures scaled.

    Rooflines and link efficiencies are shares of the data sheet and follow it by themselves; these three do not.

    Parameters
    ----------
    calibration : DeviceCalibration
        What was measured.
    collective_latency : float
        Factor on the start-up of collectives inside a node. Measured tables keep what they deviate from the p-norm of
        latency and transfer by.
    attention_rate : float
        Factor on the FLOP/s of fused attention.
    launch_time : float
        Factor on the device's launch time of a kernel.
    """
    return replace(
        calibration,
        collectives=(
            _with_latency(calibration.collectives, collective_latency)
            if collective_latency != 1.0
            else calibration.collectives
        ),
        attention={
            name: AttentionCurve(
                peak_flops_per_second=curve.peak_flops_per_second * attention_rate,
                half_length=curve.half_length,
            )
            for name, curve in calibration.attention.items()
        },
        operators={
            name: replace(
                model, curve=replace(model.curve, launch_time=model.curve.launch_time * launch_time)
            )
            for name, model in calibration.operators.items()
        },
    )


def _with_latency(collectives: Mapping[str, CollectiveCurve], factor: float) -> dict[str, CollectiveCurve]:
    scaled = {}
    for name, curve in collectives.items():
        passes = _ALL_REDUCE_PASSES if name == "all_reduce" else 1.0
        tables = tuple(
            table and _table_with_latency(curve, index, table, passes, factor)
            for index, table in enumerate(curve.tables)
        )
        scaled[name] = replace(
            curve, latency=tuple(latency * factor for latency in curve.latency), tables=tables
        )
    return scaled


def _table_with_latency(
    curve: CollectiveCurve, index: int, table: CollectiveTable, passes: float, factor: float
) -> CollectiveTable:
    """Return measured times as they would be under another latency: the same multiple of the p-norm."""
    if curve.link_bandwidth is None:
        return table
    ranks, exponent, latency = curve.ranks[index], curve.exponent[index], curve.latency[index]
    rate = curve.link_bandwidth * curve.link_efficiency[index]
    transfer = passes * (ranks - 1.0) / ranks * table.num_bytes / rate
    before = (latency**exponent + transfer**exponent) ** (1.0 / exponent)
    after = ((factor * latency) ** exponent + transfer**exponent) ** (1.0 / exponent)
    return CollectiveTable(num_bytes=table.num_bytes, seconds=table.seconds * np.asarray(after / before))
