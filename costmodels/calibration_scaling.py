"""A calibration for parts that do not exist: the same shares of another data sheet, other latencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from meshwright.costmodels.calibration import CollectiveCurve, CollectiveTable, DeviceCalibration
from meshwright.costmodels.calibration_document import device_rates
from meshwright.costmodels.operators import OperatorModel
from meshwright.hardware_specs.specs import GpuSpec

__all__ = ["carried_calibration", "carried_operator", "scaled_calibration", "scaled_operator"]

# Bytes over each rank's link per byte of the buffer: an all-reduce passes twice (nccl-tests, doc/PERFORMANCE.md).
_ALL_REDUCE_PASSES = 2.0


def carried_calibration(calibration: DeviceCalibration, measured: GpuSpec, gpu: GpuSpec) -> DeviceCalibration:
    """Return the calibration of a device for one with other numbers, at the same shares of the data sheet.

    Fused attention, measured in FLOP/s, follows the 16-bit peak. Where peak, memory bandwidth or links differ, a
    calibration of the device becomes a prior of the same generation.

    Parameters
    ----------
    calibration : DeviceCalibration
        That of the measured device.
    measured, gpu : GpuSpec
        The measured device, and the one to price.
    """
    if _rates(measured) == _rates(gpu):
        return calibration
    scale = _sixteen_bit_peak(gpu) / _sixteen_bit_peak(measured)
    is_calibrated = calibration.basis == "calibrated"
    return replace(
        calibration,
        is_estimate=True,
        basis="prior of the same generation" if is_calibrated else calibration.basis,
        operators={name: carried_operator(model, gpu) for name, model in calibration.operators.items()},
        attention={
            name: replace(curve, peak_flops_per_second=curve.peak_flops_per_second * scale)
            for name, curve in calibration.attention.items()
        },
    )


def carried_operator(model: OperatorModel, gpu: GpuSpec) -> OperatorModel:
    """Return an operator at the same shares of another data sheet."""
    return replace(model, rates=device_rates(gpu, model.operator.name, model.precision))


def scaled_operator(model: OperatorModel, launch_time: float) -> OperatorModel:
    """Return an operator with its launch time times a factor."""
    return replace(model, curve=replace(model.curve, launch_time=model.curve.launch_time * launch_time))


def _rates(gpu: GpuSpec) -> tuple[object, ...]:
    links = (gpu.scale_up, gpu.host_link)
    return dict(gpu.peak_flops_per_second), gpu.memory_bandwidth_bytes_per_second, links


def _sixteen_bit_peak(gpu: GpuSpec) -> float:
    peaks = gpu.peak_flops_per_second
    return peaks.get("bf16") or peaks["fp16"]


def scaled_calibration(
    calibration: DeviceCalibration, *, collective_latency: float = 1.0, launch_time: float = 1.0
) -> DeviceCalibration:
    """Return the calibration with latencies, which no data sheet states, scaled.

    Parameters
    ----------
    calibration : DeviceCalibration
        What was measured.
    collective_latency : float
        Factor on the start-up of collectives inside a node. Measured tables keep what they deviate from the p-norm of
        latency and transfer by.
    launch_time : float
        Factor on the device's launch time of a kernel.
    """
    if collective_latency != 1.0:
        collectives = _with_latency(calibration.collectives, collective_latency)
        calibration = replace(calibration, collectives=collectives)
    if launch_time != 1.0:
        operators = {
            name: scaled_operator(model, launch_time) for name, model in calibration.operators.items()
        }
        calibration = replace(calibration, operators=operators)
    return calibration


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
