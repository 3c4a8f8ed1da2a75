"""The prediction of one plan: exact schedule, memory of every stage, and the figures users compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.calibration import CalibrationBasis
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.flops import FlopsConvention, hardware_flops, model_flops
from meshwright.costmodels.interval import prediction_interval
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.memory import MemoryColumns, plan_memory
from meshwright.costmodels.mixed import StageMemory, gpus_of_kinds, mixed_memory
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.hardware_specs.specs import NodeSpec
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.iteration import IterationResult, simulate_iteration

__all__ = ["Prediction", "predict"]

_TOKENS_PER_TRILLION = 1e12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """What a plan is predicted to do.

    Parameters
    ----------
    iteration : IterationResult
        The simulated iteration.
    low, high : float
        Interval of the iteration time that should hold four runs in five, P10 and P90 [s].
    basis : CalibrationBasis
        What the interval rests on: whether the device was calibrated.
    interval_widths : Mapping[str, float]
        Half-width of the interval that each cause would have alone, as a share; they add up in squares.
    memory : MemoryColumns
        Breakdown of every stage, shape ``(pp,)``; on a mixed cluster on the GPU that the stage fills the most [B].
    stage_usable_memory_bytes : FloatColumn
        What the GPU of each stage reports as its capacity, shape ``(pp,)`` [B].
    peak_memory_bytes, usable_memory_bytes : float
        Fullest rank, and what its device reports as its capacity [B].
    tokens_per_second_per_gpu : float
        Throughput [tokens/s].
    mfu, hfu : float
        Model and hardware FLOPs over the dense peak of the compute precision.
    dollars_per_trillion_tokens : float | None
        None when the node has no price [$].
    joules_per_token : float
        Energy at the node's full power, an upper bound [J].
    """

    iteration: IterationResult
    low: float
    high: float
    basis: CalibrationBasis
    interval_widths: Mapping[str, float]
    memory: MemoryColumns
    stage_usable_memory_bytes: FloatColumn
    peak_memory_bytes: float
    usable_memory_bytes: float
    tokens_per_second_per_gpu: float
    mfu: float
    hfu: float
    dollars_per_trillion_tokens: float | None
    joules_per_token: float

    @property
    def iteration_time(self) -> float:
        """One optimizer step [s]."""
        return self.iteration.iteration_time

    @property
    def fullest_stage(self) -> int:
        """Stage whose ranks hold the most of what their GPUs have."""
        usable = self.stage_usable_memory_bytes
        # Ties of rounding among equal GPUs go to the fuller stage, as they do without a division.
        return int(np.argmax(self.memory.total if np.ptp(usable) == 0.0 else self.memory.total / usable))

    @property
    def memory_headroom(self) -> float:
        """Free share of the usable memory; negative when the plan does not fit."""
        return 1.0 - self.peak_memory_bytes / self.usable_memory_bytes


def predict(context: CostContext, plan: ParallelPlan, flops: FlopsConvention = "causal") -> Prediction:
    """Return the prediction of one plan.

    Raises
    ------
    SpecError
        If the batch does not divide or the schedule cannot run the plan.
    """
    result = simulate_iteration(iteration_costs(context, plan), plan.schedule)
    seconds = result.iteration_time
    workload, model = context.workload, context.model
    interval = prediction_interval(context, plan, seconds)
    machines = _machines(context, plan)
    memory = _memory(context, plan)
    fullest = int(np.argmax(memory.needed / memory.usable))
    peak = machines.peak_flops_per_second * seconds
    tokens_per_second = workload.num_tokens / seconds
    dollars = None
    if machines.dollars_per_hour is not None:
        dollars = machines.dollars_per_hour / 3600.0 / tokens_per_second * _TOKENS_PER_TRILLION
    return Prediction(
        iteration=result,
        low=interval.low,
        high=interval.high,
        basis=interval.basis,
        interval_widths=interval.widths,
        memory=memory.memory,
        stage_usable_memory_bytes=memory.usable,
        peak_memory_bytes=float(memory.needed[fullest]),
        usable_memory_bytes=float(memory.usable[fullest]),
        tokens_per_second_per_gpu=tokens_per_second / plan.num_gpus,
        mfu=model_flops(model, workload.num_tokens, workload.sequence_length, flops) / peak,
        hfu=sum(
            share
            * hardware_flops(
                model,
                workload.num_tokens,
                workload.sequence_length,
                recompute,
                flops,
                recomputes_operators=context.software.selective_recompute == "operators",
                recompute_modules=plan.recompute_modules,
            )
            for recompute, share in _recompute_shares(plan).items()
        )
        / peak,
        dollars_per_trillion_tokens=dollars,
        joules_per_token=machines.watts / tokens_per_second,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machines:
    """The share of the cluster that a plan uses: peak of its GPUs, power of its nodes and their rent."""

    peak_flops_per_second: float
    watts: float
    dollars_per_hour: float | None


def _machines(context: CostContext, plan: ParallelPlan) -> _Machines:
    kinds = context.cluster.kinds
    counts = gpus_of_kinds(context.cluster, plan) if context.kinds else (plan.num_gpus,)
    used = [(kind, count) for kind, count in zip(kinds, counts, strict=True) if count]
    precision = context.workload.precision
    prices = [(_node_price(kind), count / kind.num_gpus) for kind, count in used]
    return _Machines(
        peak_flops_per_second=sum(kind.gpu.peak(precision) * count for kind, count in used),
        watts=sum(kind.power_watts * (count / kind.num_gpus) for kind, count in used),
        dollars_per_hour=None
        if any(price is None for price, _ in prices)
        else sum(price * nodes for price, nodes in prices if price is not None),
    )


def _node_price(node: NodeSpec) -> float | None:
    """Return the rent of a node [$/h]; that of its GPUs where nobody names one for the whole."""
    if node.price_dollars_per_hour is not None or node.gpu.price_dollars_per_hour is None:
        return node.price_dollars_per_hour
    return node.gpu.price_dollars_per_hour * node.num_gpus


def _memory(context: CostContext, plan: ParallelPlan) -> StageMemory:
    if context.kinds:
        return mixed_memory(context, plan)
    memory = plan_memory(context, plan)
    return StageMemory(
        memory=memory,
        needed=memory.total * (1.0 + context.software.fragmentation),
        usable=np.full(plan.pp, context.gpu.memory_bytes),
    )


def _recompute_shares(plan: ParallelPlan) -> dict[str, float]:
    """Return the share of the layers under each recompute policy."""
    if not plan.layer_groups:
        held = plan.layers_per_stage
        recomputed = sum(min(layers, plan.recompute_layers or layers) for layers in held) / max(1, sum(held))
        return (
            {plan.recompute: recomputed, "none": 1.0 - recomputed}
            if recomputed < 1.0
            else {plan.recompute: 1.0}
        )
    shares: dict[str, float] = {}
    for group in plan.layer_groups:
        shares[group.recompute] = shares.get(group.recompute, 0.0) + group.num_layers / plan.num_layers
    return shares
