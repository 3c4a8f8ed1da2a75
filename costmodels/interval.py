"""How far a prediction may be off, and what that rests on: widths measured against published training runs.

Relative errors of independent causes add up in squares. Each width is the ratio to the measured time, as a logarithm,
that four runs in five of its kind stay within; ``benchmarks/interval_widths.py`` fits and prints all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.costmodels.calibration import CalibrationBasis
from meshwright.costmodels.context import CostContext
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["UNMEASURED_SOFTWARE", "Interval", "error_sources", "prediction_interval"]

# What the published runs of each software generation ask for; the others take the errors of sources predicted with no
# constant fitted to them (benchmarks/held_out_sources.py).
_SOFTWARE_WIDTHS: Mapping[str, float] = {
    "internevo": 0.032,
    "llm-foundry-fsdp1": 0.018,
    "megatron-2021": 0.025,
    "megatron-2023": 0.101,
    "megatron-2024": 0.021,
    "torchtitan": 0.053,
}
UNMEASURED_SOFTWARE = 0.088
"""Half-width of software generations without published runs enough."""

# Per doubling beyond 8 GPUs; and what a pipeline adds to it.
_PER_DOUBLING, _PIPELINE_PER_DOUBLING = 0.008, 0.024
# Formats of eight bits and fewer; and under tensor parallelism, where their gathers differ too.
_NARROW, _NARROW_TENSOR_PARALLEL = 0.041, 0.053
# The 80 % interval of expert kernels in the calibrations of nine GPUs; no published iteration of a mixture of experts
# states its whole plan.
_EXPERTS = 0.13
# Jobs of the table costed with the calibration of another device instead of the device's own: of the same
# architecture, and of another one with links of its kind.
_DEVICE_WIDTHS: Mapping[CalibrationBasis, float] = {
    "calibrated": 0.0,
    "prior of the same generation": 0.10,
    "data sheet only": 0.29,
}
_WIDE_FORMATS = ("fp32", "tf32", "fp16", "bf16")
_SMALL_JOB = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An 80 % interval and what it rests on.

    Parameters
    ----------
    low, high : float
        P10 and P90 [s].
    basis : CalibrationBasis
        What the device's constants rest on.
    widths : Mapping[str, float]
        Half-width that each cause would have alone, as a share; they add up in squares.
    """

    low: float
    high: float
    basis: CalibrationBasis
    widths: Mapping[str, float]


def prediction_interval(context: CostContext, plan: ParallelPlan, seconds: float) -> Interval:
    """Return the 80 % interval of an iteration time.

    Parameters
    ----------
    context : CostContext
        Job, software and calibration; of a mixed cluster the kind with the widest interval counts.
    plan : ParallelPlan
        The plan.
    seconds : float
        Its predicted iteration time [s].
    """
    if context.kinds:
        return max(
            (prediction_interval(kind, plan, seconds) for kind in context.kinds), key=lambda each: each.high
        )
    widths = {name: value for name, value in error_sources(context, plan).items() if value > 0.0}
    half = math.sqrt(sum(value**2 for value in widths.values()))
    return Interval(
        low=seconds * math.exp(-half),
        high=seconds * math.exp(half),
        basis=context.calibration.basis,
        widths=widths,
    )


def error_sources(context: CostContext, plan: ParallelPlan) -> dict[str, float]:
    """Return the half-width of each cause of error, 0 where it does not apply."""
    software = context.software.id
    doublings = math.log2(max(plan.num_gpus, _SMALL_JOB) / _SMALL_JOB)
    is_narrow = context.workload.precision not in _WIDE_FORMATS
    return {
        f"software {software}": _SOFTWARE_WIDTHS.get(software, UNMEASURED_SOFTWARE),
        "scale": _PER_DOUBLING * doublings,
        "pipeline at scale": _PIPELINE_PER_DOUBLING * doublings if plan.pp > 1 else 0.0,
        context.workload.precision: _NARROW if is_narrow else 0.0,
        f"{context.workload.precision} with tensor parallelism": (
            _NARROW_TENSOR_PARALLEL if is_narrow and plan.tp > 1 else 0.0
        ),
        "mixture of experts": _EXPERTS if context.model.moe is not None else 0.0,
        context.calibration.basis: _DEVICE_WIDTHS[context.calibration.basis],
    }
