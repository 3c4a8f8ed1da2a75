"""Kernels of an engine on a device that does not exist: the same shares of another data sheet, other latencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from meshwright.costmodels.calibration import CollectiveTable
from meshwright.costmodels.calibration_scaling import (
    carried_calibration,
    carried_operator,
    scaled_calibration,
    scaled_operator,
)
from meshwright.costmodels.operators import OperatorModel
from meshwright.costmodels.serving.constants import EngineConstants
from meshwright.costmodels.serving.kernels import ExpertTable, ServingKernels
from meshwright.hardware_specs.specs import GpuSpec
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["carried_kernels", "with_host_time"]

# What a curve of experts is of beside its tokens, and the skew of routing that all were measured with.
_FIELDS = ("hidden_size", "moe_ffn_hidden_size", "top_k", "num_experts", "tp", "ep", "skew")
_MEASURED_SKEW = 1.01


def carried_kernels(
    kernels: ServingKernels,
    model: ModelSpec,
    measured: GpuSpec,
    gpu: GpuSpec,
    *,
    collective_latency: float = 1.0,
    launch_time: float = 1.0,
) -> ServingKernels:
    """Return the kernels of a device for one with other numbers, at the same shares of the data sheet.

    Curves of the model's own experts change as the fit over all models does at their shapes. Of a one-shot all-reduce
    what its smallest buffer takes is latency, and the rest crosses the links.

    Parameters
    ----------
    kernels : ServingKernels
        Those of the measured device.
    model : ModelSpec
        What is served; curves of other models' experts are left out.
    measured, gpu : GpuSpec
        The measured device, and the one to price.
    collective_latency, launch_time : float
        As in :func:`meshwright.costmodels.calibration_scaling.scaled_calibration`.
    """
    if measured == gpu and collective_latency == launch_time == 1.0:
        return kernels

    def carried(operator: OperatorModel) -> OperatorModel:
        return scaled_operator(carried_operator(operator, gpu), launch_time)

    bandwidth = _link_bandwidth(gpu) / _link_bandwidth(measured)
    changed = replace(
        kernels,
        calibration=scaled_calibration(
            carried_calibration(kernels.calibration, measured, gpu),
            collective_latency=collective_latency,
            launch_time=launch_time,
        ),
        operators={name: carried(operator) for name, operator in kernels.operators.items()},
        all_reduce=_carried_all_reduces(kernels.all_reduce, collective_latency, bandwidth),
        fused_all_reduce=_carried_all_reduces(kernels.fused_all_reduce, collective_latency, bandwidth),
        other_gemms={
            precision: tuple(carried(each) for each in operators)
            for precision, operators in kernels.other_gemms.items()
        },
        memo={},
    )
    return replace(changed, expert_tables=_carried_experts(kernels, changed, model))


def with_host_time(constants: EngineConstants, host_time: float, launch_time: float) -> EngineConstants:
    """Return engine constants with the host's work of a step, and the device's launches of small kernels, times factors."""
    return replace(
        constants,
        host_time=constants.host_time * host_time,
        host_time_per_sequence=constants.host_time_per_sequence * host_time,
        host_time_per_prompt=constants.host_time_per_prompt * host_time,
        eager_kernel_time=constants.eager_kernel_time * host_time,
        kernel_time=constants.kernel_time * launch_time,
    )


def _link_bandwidth(gpu: GpuSpec) -> float:
    return (gpu.scale_up or gpu.host_link).bandwidth_bytes_per_second


def _carried_all_reduces(
    tables: Mapping[int, CollectiveTable], latency: float, bandwidth: float
) -> dict[int, CollectiveTable]:
    found = {}
    for size, table in tables.items():
        start = float(table.seconds.min())
        found[size] = replace(table, seconds=start * latency + (table.seconds - start) / bandwidth)
    return found


def _carried_experts(
    kernels: ServingKernels, changed: ServingKernels, model: ModelSpec
) -> dict[tuple[str, tuple[int, ...]], ExpertTable]:
    """Return the curves of a model's experts, times the change that the fit over all models sees."""
    moe = model.moe
    if moe is None:
        return {}
    sizes = (model.hidden_size, moe.moe_ffn_hidden_size, moe.top_k, moe.num_experts)
    found = {}
    for (precision, key), table in kernels.expert_tables.items():
        if key[: len(sizes)] != sizes:
            continue
        values = (*key, _MEASURED_SKEW)
        shape = {
            "num_tokens": table.num_tokens,
            **{
                name: np.full_like(table.num_tokens, value)
                for name, value in zip(_FIELDS, values, strict=True)
            },
        }
        before, after = (each.experts(precision).time(shape) for each in (kernels, changed))
        found[precision, key] = replace(table, seconds=table.seconds * after / before)
    return found
