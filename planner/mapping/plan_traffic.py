"""What a plan's communications are worth: seconds of iteration lost for every time its links become as slow again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np

from meshwright.costmodels.collectives import GroupPlacement, LinkSlowdown
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.costmodels.rank_layout import Hops, HostRanks, RankLayout
from meshwright.costmodels.topology import host_ranks, host_slowdown, with_stages
from meshwright.planner.mapping.problem import IntArray, Traffic, TrafficKind
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import iteration_time

__all__ = ["PlanTraffic", "plan_traffic"]

# Links this much slower than flat ones show what a communication costs beyond what is hidden, and those as slow as the
# slowest, or this slow at least, what it costs once nothing hides it any more.
_NEAR, _FAR = 2.0, 4.0
# Communications whose probe costs less of the iteration than this are nobody's concern.
_LEAST = 1e-7
# Stages of a pipeline that are probed apart.
_MOST_PROBED = 4

_Where = Literal["across", "inside"]
_Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTraffic:
    """Communications of a plan that groups of ranks run alike.

    Parameters
    ----------
    kind : TrafficKind
        How their links count; see :class:`meshwright.planner.mapping.problem.Traffic`.
    where : _Where
        On links between nodes or between GPUs of a node.
    groups : tuple[tuple[int, ...], ...]
        Nodes, or local ranks of any node, of each distinct group, at least two.
    seconds, steeper : tuple[float, ...]
        Iteration time that is lost when the links of this group's stage are twice as slow as flat ones, and what every
        further such step loses more than the first [s].
    """

    kind: TrafficKind
    where: _Where
    groups: _Groups
    seconds: tuple[float, ...]
    steeper: tuple[float, ...]

    def between_hosts(self, slowdown: FloatColumn) -> Traffic:
        """Return it on hosts whose links are so much slower than flat ones, ``(num_hosts, num_hosts)``."""
        # Beyond the flat fabric's time, which no host order changes.
        excess = np.maximum(slowdown - 1.0, 0.0)
        if self.kind == "path":
            excess = excess / (max(len(group) for group in self.groups) - 1)
        return Traffic(
            kind=self.kind,
            time=excess,
            groups=self.groups,
            weights=self.seconds,
            steeper=self.steeper,
            knee=_NEAR - 1.0,
        )


def plan_traffic(context: CostContext, plan: ParallelPlan) -> tuple[PlanTraffic, ...]:
    """Return the communications of a plan, in its own order of ranks, that unequal links can slow down.

    Every kind of group the cost models ask for is found by pricing the plan once, and what it is worth by pricing it
    again with links that are twice as slow for this kind alone, on one stage after the other: schedule, overlap and
    exposure are the simulator's own. Of long pipelines some stages are simulated, and those between are read off a line.
    """
    nodes = _node_ranks(context, plan)
    base = _Probe(ranks=nodes)
    even = _costs(context, plan, base)
    fastest = iteration_time(even, plan.schedule)
    found: list[PlanTraffic] = []

    def probe(kind: TrafficKind, where: _Where, size: int, stride: int, by_stage: list[_Groups]) -> None:
        groups = tuple(dict.fromkeys(group for groups in by_stage for group in groups))
        if not groups:
            return

        def lost(factor: float) -> FloatColumn:
            slow = _Probe(ranks=nodes, slow=(kind, where, size, stride), factor=factor)
            return _lost(plan, even, _costs(context, plan, slow))

        steep = lost(far)
        if steep.max() <= _LEAST * fastest:
            return
        near = lost(_NEAR)
        steeper = np.maximum(0.0, (steep - near) / (far - _NEAR) - near)
        stages = {
            group: [stage for stage, groups in enumerate(by_stage) if group in groups] for group in groups
        }
        worth = tuple(float(near[members].max()) for members in stages.values())
        more = tuple(float(steeper[members].max()) for members in stages.values())
        found.append(PlanTraffic(kind=kind, where=where, groups=groups, seconds=worth, steeper=more))

    far = max(_FAR, float(host_slowdown(context).max()))
    places: tuple[_Where, ...] = ("across",) if nodes.gpu_slowdown is None else ("across", "inside")
    for where in places:
        probe("path", where, 0, 0, [_pipelines(nodes, where)])
        for size, stride in sorted(base.asked):
            groups = [_groups(nodes, stage, size, stride, where) for stage in range(plan.pp)]
            probe("ring", where, size, stride, groups)
            probe("exchange", where, size, stride, groups)
    return tuple(found)


def _lost(plan: ParallelPlan, even: IterationCosts, slow: IterationCosts) -> FloatColumn:
    """Return what each stage's slow links cost the iteration, or slow sends all of it, ``(pp,)`` [s]."""
    fastest = iteration_time(even, plan.schedule)
    if not np.array_equal(even.send_time, slow.send_time):
        return np.full(plan.pp, max(0.0, iteration_time(slow, plan.schedule) - fastest))
    if all(np.array_equal(mine, theirs) for mine, theirs in _arrays(even, slow)):
        return np.zeros(plan.pp)
    probed = np.unique(np.linspace(0, plan.pp - 1, _MOST_PROBED).round().astype(np.int64))
    lost = [
        iteration_time(with_stages(plan, even, {int(stage): slow}), plan.schedule) - fastest
        for stage in probed
    ]
    return np.maximum(0.0, np.interp(np.arange(plan.pp), probed, lost))


def _arrays(one: IterationCosts, two: IterationCosts) -> Iterator[tuple[FloatColumn, FloatColumn]]:
    for each in fields(one):
        if isinstance(getattr(one, each.name), np.ndarray):
            yield getattr(one, each.name), getattr(two, each.name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Probe:
    """A layout on equal links, of which one kind of group may be slow; notes which groups it is asked for."""

    ranks: HostRanks
    slow: tuple[str, str, int, int] = ("", "", 0, 0)
    factor: float = 1.0
    asked: set[tuple[int, int]] = field(default_factory=set)

    def place(self, size: FloatColumn, stride: FloatColumn) -> GroupPlacement:
        flat = self.ranks.place(size, stride)
        size, stride = np.broadcast_arrays(np.asarray(size, dtype=np.float64), stride)
        self.asked.update(
            (int(one), int(apart)) for one, apart in zip(size, stride, strict=True) if one > 1.0
        )
        is_meant = (size == self.slow[2]) & (stride == self.slow[3])
        factor = np.where(is_meant, self.factor, 1.0)

        def slowdown(kind: str) -> LinkSlowdown:
            return LinkSlowdown(
                across=factor if self.slow[:2] == (kind, "across") else 1.0,
                inside=factor if self.slow[:2] == (kind, "inside") else 1.0,
            )

        return replace(flat, ring=slowdown("ring"), exchange=slowdown("exchange"))

    def hops(self, plan: ParallelPlan, stage_of: IntArray) -> Hops:
        flat = self.ranks.hops(plan, stage_of)
        is_meant = flat.crosses_nodes > 0.0 if self.slow[1] == "across" else flat.crosses_nodes == 0.0
        factor = np.where(is_meant & (self.slow[0] == "path"), self.factor, 1.0)
        return Hops(crosses_nodes=flat.crosses_nodes, slowdown=factor)

    def least_hops(self, columns: PlanColumns) -> Hops:
        return self.ranks.least_hops(columns)


def _node_ranks(context: CostContext, plan: ParallelPlan) -> HostRanks:
    """Return the plan on nodes in their own order, joined by equal links."""
    mapping = plan.device_mapping
    if mapping is not None:
        plan = replace(plan, device_mapping=replace(mapping, host_order=(), gpu_orders=()))
    ranks = host_ranks(context, plan)
    return replace(ranks, slowdown=np.ones_like(ranks.slowdown), uplinks=None)


def _costs(context: CostContext, plan: ParallelPlan, layout: RankLayout) -> IterationCosts:
    return iteration_costs(replace(context, layout=layout), plan)


def _groups(ranks: HostRanks, stage: int, size: int, stride: int, where: _Where) -> _Groups:
    ranks = replace(ranks, stage=stage)
    nodes = ranks.members(ranks.hosts, size, stride)
    if where == "across":
        return _distinct(nodes.tolist(), _turns)
    gpus = ranks.members(ranks.gpus, size, stride)
    inside = [
        tuple(own[row == node].tolist())
        for row, own in zip(nodes, gpus, strict=True)
        for node in np.unique(row)
    ]
    return _distinct(inside, lambda row: row)


def _pipelines(ranks: HostRanks, where: _Where) -> _Groups:
    if len(ranks.hosts) < 2:
        return ()
    if where == "across":
        return _distinct(np.unique(ranks.hosts, axis=1).T.tolist(), lambda row: _turns(row, is_ring=False))
    stays = ranks.hosts[:-1] == ranks.hosts[1:]
    pairs = np.stack([ranks.gpus[:-1][stays], ranks.gpus[1:][stays]], axis=1)
    return _distinct(pairs.tolist(), lambda row: row)


def _distinct(rows: Sequence[Sequence[int]], shorten: Callable[[Sequence[int]], Sequence[int]]) -> _Groups:
    shortened = (tuple(shorten(row)) for row in rows)
    return tuple(dict.fromkeys(row for row in shortened if len(row) > 1))


def _turns(nodes: Sequence[int], *, is_ring: bool = True) -> Sequence[int]:
    """Return the nodes a sequence of ranks passes, each stay once."""
    passed = [node for place, node in enumerate(nodes) if place == 0 or node != nodes[place - 1]]
    return passed[:-1] if is_ring and len(passed) > 1 and passed[0] == passed[-1] else passed
