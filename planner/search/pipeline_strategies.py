"""The strategies that layers of one pipeline may run under, each as the uniform plan that uses it throughout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.partition import balanced_ends, boundary_layers
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.planner.axes import divisors, recompute_axis
from meshwright.planner.constraints import CONSTRAINTS
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.layer_groups import GROUP_SHARDINGS
from meshwright.simcore.domain.plan import (
    RECOMPUTE_MODULES,
    RECOMPUTES,
    ParallelPlan,
    can_partition,
    partition_layers,
    partition_with_ends,
)

__all__ = ["pipeline_strategies"]

# Word and modules of a recompute policy.
_Recompute = tuple[str, tuple[str, ...]]

# Constraints that a layer strategy meets or not on its own: memory is that of the whole stage, and no export target
# has layer-wise plans.
_STRATEGY_CONSTRAINTS = tuple(
    each for each in CONSTRAINTS if each.name not in ("memory", "host_memory", "target")
)


def pipeline_strategies(
    context: CostContext, limits: SearchLimits, frame: ParallelPlan, num_gpus: int
) -> Iterator[tuple[list[ParallelPlan], PlanColumns]]:
    """Yield the strategies of every number of stages and split of the layers over them, for every micro-batch.

    Parameters
    ----------
    context : CostContext
        Job and software.
    limits : SearchLimits
        The user's restrictions; they hold for every strategy as they do for the uniform plan that uses it.
    frame : ParallelPlan
        Degrees that all layers share: cp, ep, etp and how they communicate.
    num_gpus : int
        World size.
    """
    batch, recomputes = context.workload.global_batch_size, _recomputes(context)
    for pp in divisors(num_gpus // frame.cp) if num_gpus % frame.cp == 0 else ():
        ranks = num_gpus // (frame.cp * pp)
        for layers in _layouts(context, pp, divisors(ranks)):
            pipeline = replace(
                frame, pp=pp, vpp=1, schedule="none" if pp == 1 else "1f1b", layers_per_stage=layers
            )
            plans = [
                plan
                for sequences in divisors(batch)
                for tp in divisors(ranks)
                for plan in _strategies(pipeline, tp, ranks // tp, sequences, recomputes)
            ]
            if not plans:
                continue
            columns = PlanColumns.from_plans(plans, batch)
            keep = np.ones(len(plans), dtype=np.bool_)
            for constraint in _STRATEGY_CONSTRAINTS:
                keep &= constraint.holds(context, columns, limits)
            if keep.any():
                chosen = np.flatnonzero(keep)
                yield [plans[int(row)] for row in chosen], columns.take(chosen)


def _layouts(context: CostContext, pp: int, degrees: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the splits of the layers that uniform plans have: the frameworks' own, and those that balance the ends.

    ``degrees`` are the tensor parallel degrees for which embedding and head are balanced.
    """
    num_layers = context.model.num_layers
    if not can_partition(num_layers, pp):
        return []
    own = partition_layers(num_layers, pp)
    if pp == 1:
        return [own]
    plans = [
        ParallelPlan(
            dp=1,
            tp=tp,
            micro_batch_size=1,
            schedule="none",
            sequence_parallel=tp > 1,
            layers_per_stage=(num_layers,),
        )
        for tp in degrees
    ]
    embedding, head = boundary_layers(context, PlanColumns.from_plans(plans, 1))
    ends = [balanced_ends(num_layers, pp, float(e), float(h)) for e, h in zip(embedding, head, strict=True)]
    others = [partition_with_ends(num_layers, pp, *each) for each in ends]
    return list(dict.fromkeys([own, *others]))


def _strategies(
    pipeline: ParallelPlan, tp: int, dp: int, sequences: int, recomputes: Sequence[_Recompute]
) -> Iterator[ParallelPlan]:
    """Yield the uniform plans of every strategy with one tp and micro-batch."""
    if sequences % dp:
        return
    shardings = GROUP_SHARDINGS if dp * pipeline.cp > 1 else ("none",)
    for is_split, sharding, (recompute, modules) in product(
        (False, True) if tp > 1 else (False,), shardings, recomputes
    ):
        yield replace(
            pipeline,
            tp=tp,
            dp=dp,
            micro_batch_size=sequences // dp,
            sequence_parallel=is_split,
            sharding=sharding,  # type: ignore[arg-type]  # one of the words of GroupSharding
            recompute=recompute,  # type: ignore[arg-type]  # one of the words of GroupRecompute
            recompute_modules=modules,
        )


def _recomputes(context: CostContext) -> list[_Recompute]:
    """Return the recompute policies of whole layers that uniform plans have."""
    options = recompute_axis(context.model).columns
    policies = zip(
        options["recompute"], options["recompute_modules"], options["recompute_share"], strict=True
    )
    return [
        (
            RECOMPUTES[int(code)],
            tuple(name for bit, name in enumerate(RECOMPUTE_MODULES) if int(mask) >> bit & 1),
        )
        for code, mask, share in policies
        if share == 1.0
    ]
