"""Which global ranks form each communication group of a plan: the orders of Megatron-LM, which other trainers share.

Two grids cover the same ranks: one of attention and dense layers (tp, cp, dp, pp) and one of experts (etp, ep, expert
data parallel, pp), where context parallel ranks are data parallel. Source: ``RankGenerator`` and
``initialize_model_parallel`` of Megatron-Core 0.16 (megatron/core/parallel_state.py).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain.device_mapping import RANK_ORDERS, RankOrder
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["EXPERT_GROUPS", "RANK_ORDERS", "RankGroup", "RankOrder", "rank_groups"]

RankGroup = Literal[
    "tp", "cp", "dp", "pp", "dp_cp", "tp_cp", "tp_pp", "etp", "ep", "edp", "etp_ep", "etp_ep_pp"
]

#: Axes of each group on its grid; ``etp`` and ``edp`` are called tp and dp on the experts' grid.
_DENSE = {
    "tp": "tp",
    "cp": "cp",
    "dp": "dp",
    "pp": "pp",
    "dp_cp": "dp cp",
    "tp_cp": "tp cp",
    "tp_pp": "tp pp",
}
_EXPERT = {"etp": "tp", "ep": "ep", "edp": "dp", "etp_ep": "tp ep", "etp_ep_pp": "tp ep pp"}
#: Groups on the experts' grid.
EXPERT_GROUPS: tuple[str, ...] = tuple(_EXPERT)


def rank_groups(plan: ParallelPlan, group: RankGroup, order: RankOrder = "tp-cp-ep-dp-pp") -> np.ndarray:
    """Return the global ranks of every group of a kind.

    Parameters
    ----------
    plan : ParallelPlan
        Degrees.
    group : RankGroup
        Kind of group: one axis, or several that form one group. ``edp`` holds the replicas of an expert.
    order : RankOrder
        Axes, fastest first. The first is Megatron's default, the second its ``--use-tp-pp-dp-mapping``.

    Returns
    -------
    numpy.ndarray
        Integers, shape (groups, ranks of a group). Each row ascends, and so do the first ranks of the rows.

    Raises
    ------
    SpecError
        If the group or the order is unknown; for groups of experts if ``etp * ep`` does not divide the ranks of a stage,
        or if with pp before dp experts and dense layers have different numbers of replicas, which Megatron refuses.

    Examples
    --------
    >>> plan = ParallelPlan(
    ...     dp=2, tp=2, pp=2, micro_batch_size=1, schedule="1f1b", layers_per_stage=(1, 1)
    ... )
    >>> rank_groups(plan, "dp").tolist()
    [[0, 2], [1, 3], [4, 6], [5, 7]]
    >>> rank_groups(plan, "dp", "tp-cp-ep-pp-dp").tolist()
    [[0, 4], [1, 5], [2, 6], [3, 7]]
    """
    if order not in RANK_ORDERS:
        raise SpecError(
            f"rank order: unknown order '{order}'{did_you_mean(order, RANK_ORDERS) or '.'} "
            f"Known: {', '.join(RANK_ORDERS)}."
        )
    axes = _EXPERT.get(group) or _DENSE.get(group)
    if axes is None:
        known = (*_DENSE, *_EXPERT)
        raise SpecError(
            f"rank group: unknown group '{group}'{did_you_mean(group, known) or '.'} Known: {', '.join(known)}."
        )
    sizes = {"tp": plan.tp, "cp": plan.cp, "ep": 1, "dp": plan.dp, "pp": plan.pp}
    if group in _EXPERT:
        _check_expert_grid(plan, order)
        sizes = {"tp": plan.etp, "cp": 1, "ep": plan.ep, "dp": plan.expert_dp, "pp": plan.pp}
    slowest_first = [str(axis) for axis in reversed(order.split("-"))]
    inside = [axis for axis in slowest_first if axis in axes.split()]
    outside = [axis for axis in slowest_first if axis not in inside]
    grid = np.arange(plan.num_gpus).reshape([sizes[axis] for axis in slowest_first])
    grid = grid.transpose([slowest_first.index(axis) for axis in (*outside, *inside)])
    groups = grid.reshape(-1, math.prod(sizes[axis] for axis in inside))
    return groups[np.argsort(groups[:, 0], kind="stable")]


def _check_expert_grid(plan: ParallelPlan, order: str) -> None:
    stage = plan.tp * plan.cp * plan.dp
    if stage % (plan.etp * plan.ep):
        raise SpecError(
            f"plan.ep {plan.ep} x plan.etp {plan.etp} does not divide the {stage} ranks of a stage (tp x cp x dp)"
        )
    if plan.pp > 1 and not order.endswith("pp") and plan.expert_dp != plan.dp:
        raise SpecError(
            f"rank order '{order}' needs as many replicas of experts ({plan.expert_dp}) as of dense layers ({plan.dp}): "
            f"make ep x etp {plan.tp * plan.cp} (tp x cp), or use order 'tp-cp-ep-dp-pp'"
        )
