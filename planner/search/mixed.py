"""Search on clusters of several kinds of node: stages on islands, replicas on islands, and every kind alone.

The space of :mod:`meshwright.planner.space` is laid over the islands in every way and order; plans are taken in the
order of what the bounds of each kind of node promise together, get the layers or micro-batches that let fast and slow
GPUs finish together, and are simulated exactly. The best are then improved a layer or a micro-batch at a time. Nothing
is certified: the promises are no bounds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.bound import iteration_time_bound
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.mixed import (
    mixed_costs,
    mixed_memory,
    replica_groups,
    slowest_group,
    stages_of_virtual,
)
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns
from meshwright.costmodels.prediction import predict
from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.planner.choices import choices_left
from meshwright.planner.export import EXPORTERS
from meshwright.planner.search.base import (
    Progress,
    RankedPlan,
    Search,
    SearchCut,
    SearchRequest,
    SearchResult,
)
from meshwright.planner.search.island_plans import (
    can_schedule,
    device_work,
    most_layers,
    promised_time,
    replicas_that_fit,
    replicated_plans,
    share_unit,
    staged_plans,
)
from meshwright.planner.search.island_ways import (
    Island,
    IslandWay,
    Split,
    island_orders,
    islands_of,
    ways_of_degrees,
)
from meshwright.planner.search.simulation import without_noise
from meshwright.planner.space import space_blocks
from meshwright.planner.space_block import SpaceBlock
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.plan import SCHEDULES_KNOWN, ParallelPlan
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.iteration import iteration_time

__all__ = ["MixedSearch"]

# Plans simulated of each split, shared by the orders of the islands; and plans looked at at once.
_NUM_SIMULATED = 192
_LEAST_OF_A_WAY = 8
# Plans that promise to take this many times as long as the best one are not worth simulating: a promise is a few per
# cent off at most where stages are uneven.
_HOPE = 1.05
# Ways that the report names.
_NUM_NAMED = 6
_CHUNK = 2_048
# Plans that are improved, and how often each at most.
_NUM_IMPROVED = 4
_MOST_ROUNDS = 16
# Stages that give layers away in a round.
_NUM_GIVERS = 4
# Kinds of which every selection is tried; of more all together and each alone.
_MOST_KINDS = 4
_OFFLOADS = ("optimizer_offload", "parameter_offload", "activation_offload")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """A simulated plan: what it is, where it lies, how long it takes and what was promised [s]."""

    plan: ParallelPlan
    where: str
    seconds: float
    promised: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidates:
    """Plans of one block laid over islands in one way, most promising first."""

    way: IslandWay
    columns: PlanColumns
    promised: FloatColumn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Room:
    """Which plans fit, shape ``(num_plans,)``, and the layers each stage can hold, ``(num_plans, pp)``."""

    fits: NDArray[np.bool_]
    most: IntColumn


class MixedSearch:
    """Search the plans of a mixed cluster.

    Parameters
    ----------
    alone : Search
        What searches a kind of node alone.
    """

    name = "mixed"

    def __init__(self, alone: Search) -> None:
        self._alone = alone

    def run(self, request: SearchRequest, progress: Progress) -> SearchResult:
        """Return the best plans; see :class:`meshwright.planner.search.base.Search`.

        Raises
        ------
        SpecError
            If something is asked for that this search does not do.
        InfeasiblePlanError
            If no plan satisfies every constraint.
        """
        for is_asked, what in (
            (request.objective != "throughput", f"objective {request.objective}"),
            (request.resume is not None, "--resume"),
            (request.wants_front, "--pareto"),
        ):
            if is_asked:
                raise SpecError(
                    f"{what} is not searched on mixed clusters such as {request.context.cluster.id}; leave it out, or name "
                    "a cluster of one kind"
                )
        return _Run(request, progress, self._alone).result()


class _Run:
    """One search."""

    def __init__(self, request: SearchRequest, progress: Progress, alone: Search) -> None:
        self.request, self.progress, self.alone = request, progress, alone
        self.context, self.cluster = request.context, request.context.cluster
        self._started = time.monotonic()
        self.rejections: dict[str, int] = {}
        self.num_candidates = self.num_feasible = self.num_simulated = 0
        self.num_left = 0
        # The fastest plan simulated so far [s].
        self._best = np.inf

    def result(self) -> SearchResult:
        """Search, and return what was found."""
        islands = islands_of(self.cluster)
        kinds = range(len(self.cluster.kinds))
        found = [entry for kind in kinds for entry in self._alone_on(kind, islands)]
        for chosen in self._selections():
            found += self._together([island for island in islands if island.kind in chosen])
        best = self._fitting(_by_seconds(found), max(_NUM_IMPROVED, self.request.num_plans))
        if not best:
            raise InfeasiblePlanError("no plan satisfies every constraint", self.rejections)
        improved = [self._improved(entry) for entry in best[:_NUM_IMPROVED]]
        best = _by_seconds([*improved, *best[_NUM_IMPROVED:]])
        return self._ranked(_distinct(best), found)

    def _is_over(self) -> bool:
        limit = self.request.max_seconds
        return limit is not None and time.monotonic() - self._started >= limit

    def _selections(self) -> list[tuple[int, ...]]:
        """Return the selections of kinds that plans are laid over together."""
        every = tuple(range(len(self.cluster.kinds)))
        if len(every) > _MOST_KINDS:
            return [every]
        return [each for size in range(len(every), 1, -1) for each in itertools.combinations(every, size)]

    def _alone_on(self, kind: int, islands: Sequence[Island]) -> list[_Found]:
        """Return the best plans on all nodes of one kind."""
        nodes = tuple(node for island in islands if island.kind == kind for node in island.nodes)
        node = self.cluster.kinds[kind]
        # Over the kind's own links where it is one island; what more islands have between them is priced below.
        own = replace(self.cluster, id=node.id, node=node, num_nodes=len(nodes), topology=None)
        job = replace(self.request.job, cluster=own)
        context = replace(self.context.kinds[kind], cluster=own)
        try:
            result = self.alone.run(replace(self.request, job=job, context=context), self.progress)
        except InfeasiblePlanError as error:
            self._count(error.rejections)
            return []
        self._count(result.rejections)
        self.num_candidates += result.num_candidates
        self.num_feasible += result.num_feasible
        self.num_simulated += result.num_simulated
        where = f"{node.id} alone"
        mapping = None if nodes == tuple(range(len(nodes))) else DeviceMapping(host_order=nodes)
        plans = [replace(entry.plan, device_mapping=mapping) for entry in result.ranked]
        bounds = [entry.bound for entry in result.ranked]
        return self._timed(plans, where, bounds)

    def _together(self, islands: Sequence[Island]) -> list[_Found]:
        """Return the best plans over several islands in every way and order."""
        orders = island_orders(islands)
        candidates = list(self._candidates(islands, orders))
        found: list[_Found] = []
        for split in ("stages", "replicas"):
            ways = dict.fromkeys(
                tuple(island.name for island in each.way.islands)
                for each in candidates
                if each.way.split == split
            )
            for names in ways:
                of_way = [
                    each
                    for each in candidates
                    if each.way.split == split and tuple(island.name for island in each.way.islands) == names
                ]
                wanted = _NUM_SIMULATED // len(ways)
                found += self._best_of_way(of_way, wanted, _way_text(split, names))
        return found

    def _candidates(
        self, islands: Sequence[Island], orders: Sequence[tuple[Island, ...]]
    ) -> Iterator[_Candidates]:
        """Yield what the rules leave of the space over some islands, by block and way."""
        request, context = self.request, self.context
        world = sum(len(island.nodes) for island in islands) * self.cluster.node.num_gpus
        kinds = sorted({island.kind for island in islands})
        for block in space_blocks(context.kinds[kinds[0]], request.limits, (world,)):
            ways = list(ways_of_degrees(self.cluster, orders, **block.degrees))
            reduced = self._reduced(block)
            self.num_candidates += len(reduced)
            if not ways:
                self._count({"islands": len(reduced)})
                continue
            if self._is_over():
                self.num_left += len(reduced)
                continue
            rejections: dict[str, int] = {}
            choices = choices_left(context.kinds[kinds[0]], reduced, request.limits, rejections)
            self._count(rejections)
            if not len(choices):
                continue
            rows = np.flatnonzero(choices.joint(tuple(reduced.axes)))
            columns = reduced.columns(rows)
            bounds: list[FloatColumn] = [np.zeros(0)] * len(context.kinds)
            for kind in kinds:
                bounds[kind] = iteration_time_bound(context.kinds[kind], columns)
            for way in ways:
                yield _Candidates(way=way, columns=columns, promised=promised_time(bounds, way))

    def _reduced(self, block: SpaceBlock) -> SpaceBlock:
        """Return a block with one split of the layers for each pipeline, and offload where it was named."""
        layouts = block.axes["layout"].columns
        keys = list(
            zip(*(layouts[name].tolist() for name in ("schedule", "vpp", "vocab_parallel")), strict=True)
        )
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        # Schedules with several copies of the model put two stages on each GPU.
        kept = [
            place for key, place in first.items() if SCHEDULES[SCHEDULES_KNOWN[key[0]]].num_model_copies == 1
        ]
        options: dict[str, IntColumn] = {"layout": np.array(sorted(kept), dtype=np.int64)}
        if not any(name in self.request.limits.allowed for name in _OFFLOADS):
            options["offload"] = np.zeros(1, dtype=np.int64)
        return block.restricted(options)

    def _best_of_way(self, candidates: Sequence[_Candidates], wanted: int, where: str) -> list[_Found]:
        """Return the simulated plans of one way, as many as are wanted of the most promising."""
        block = np.concatenate([np.full(len(each.promised), place) for place, each in enumerate(candidates)])
        row = np.concatenate([np.arange(len(each.promised)) for each in candidates])
        promised = np.concatenate([each.promised for each in candidates])
        order = np.argsort(promised, kind="stable")
        num_hopeful = int(np.count_nonzero(promised <= _HOPE * self._best))
        wanted = max(_LEAST_OF_A_WAY, min(wanted, num_hopeful))
        found: list[_Found] = []
        for start in range(0, len(order), _CHUNK):
            if len(found) >= wanted or (found and self._is_over()):
                self.num_left += len(order) - start
                break
            chosen = order[start : start + _CHUNK]
            parts = {int(place): chosen[block[chosen] == place] for place in np.unique(block[chosen])}
            room = {place: self._room(candidates[place], row[own]) for place, own in parts.items()}
            fits = np.zeros(len(order), dtype=np.bool_)
            for place, own in parts.items():
                fits[own] = room[place].fits
            self._count({"memory": len(chosen) - int(np.count_nonzero(fits[chosen]))})
            self.num_feasible += int(np.count_nonzero(fits[chosen]))
            taken = np.zeros(len(order), dtype=np.bool_)
            taken[chosen[fits[chosen]][: wanted - len(found)]] = True
            for place, own in parts.items():
                index = np.flatnonzero(taken[own])
                plans = self._plans(candidates[place], row[own[index]], room[place].most[index])
                found += self._timed(plans, where, promised[own[index]].tolist())
                self.progress("simulating schedules", len(found), wanted)
        return found

    def _room(self, candidates: _Candidates, rows: IntColumn) -> _Room:
        """Return which plans fit, and what each stage can hold."""
        columns, way = candidates.columns.take(rows), candidates.way
        if way.split == "replicas":
            fits = replicas_that_fit(self.context, columns, way, self.request.limits)
            return _Room(fits=fits, most=np.zeros((len(rows), 0), dtype=np.int64))
        most = most_layers(self.context, columns, way, self.request.limits)
        holds = (most.sum(axis=1) >= self.request.job.model.num_layers) & (most.min(axis=1) >= columns.vpp)
        return _Room(fits=holds, most=most)

    def _plans(self, candidates: _Candidates, rows: IntColumn, most: IntColumn) -> list[ParallelPlan | None]:
        """Return plans with what each stage or replica takes; None where that cannot be."""
        columns, way, job = candidates.columns.take(rows), candidates.way, self.request.job
        if not len(rows):
            return []
        if way.split == "stages":
            return staged_plans(self.context, job, columns, way, most)
        return list(replicated_plans(self.context, job, columns, way))

    def _timed(
        self, plans: Sequence[ParallelPlan | None], where: str, promised: Sequence[float]
    ) -> list[_Found]:
        """Return the plans that the export target takes, simulated."""
        taken = [
            (plan, bound)
            for plan, bound in zip(plans, promised, strict=True)
            if plan is not None and self._is_exportable(plan)
        ]
        costs = mixed_costs(self.context, [plan for plan, _ in taken]) if taken else []
        self.num_simulated += len(taken)
        found = [
            _Found(plan=plan, where=where, seconds=iteration_time(each, plan.schedule), promised=bound)
            for (plan, bound), each in zip(taken, costs, strict=True)
        ]
        self._best = min([self._best, *(entry.seconds for entry in found)])
        return found

    def _is_exportable(self, plan: ParallelPlan) -> bool:
        target = self.request.limits.target
        if target is None or not EXPORTERS[target].unsupported(self.request.job, plan):
            return True
        self._count({"target": 1})
        return False

    def _fits(self, plan: ParallelPlan) -> bool:
        """Return whether every rank fits its own GPU: what stages can hold was worked out for whole layers only."""
        memory = mixed_memory(self.context, plan)
        return bool((memory.needed <= memory.usable * (1.0 - self.request.limits.memory_headroom)).all())

    def _fitting(self, found: Sequence[_Found], count: int) -> list[_Found]:
        """Return the first plans that fit."""
        return list(itertools.islice((entry for entry in found if self._fits(entry.plan)), count))

    def _improved(self, entry: _Found) -> _Found:
        """Return a plan after the best moves of a layer or a micro-batch, one by one while any helps."""
        for _ in range(_MOST_ROUNDS):
            if self._is_over():
                break
            plans = _neighbours(self.context, entry.plan)
            near = self._timed(plans, entry.where, [entry.promised] * len(plans))
            faster = [each for each in _by_seconds(near) if each.seconds < entry.seconds * (1.0 - 1e-9)]
            best = self._fitting(faster, 1)
            if not best:
                break
            entry = best[0]
        return entry

    def _count(self, rejections: Mapping[str, int]) -> None:
        for name, count in rejections.items():
            self.rejections[name] = self.rejections.get(name, 0) + count

    def _ranked(self, best: Sequence[_Found], found: Sequence[_Found]) -> SearchResult:
        request = self.request
        ranked = [
            RankedPlan(
                plan=entry.plan,
                prediction=predict(self.context, entry.plan, request.flops),
                bound=entry.promised,
            )
            for entry in best[: request.num_plans]
        ]
        others = [entry for entry in _by_seconds(found) if _degrees(entry.plan) != _degrees(best[0].plan)]
        rival = next(iter(self._fitting(others, 1)), None)
        cut = None
        if self._is_over():
            cut = SearchCut(num_unscored=self.num_left, gap=1.0)
        return SearchResult(
            ranked=tuple(ranked),
            rival=None
            if rival is None
            else RankedPlan(
                plan=rival.plan,
                prediction=predict(self.context, rival.plan, request.flops),
                bound=rival.promised,
            ),
            num_candidates=self.num_candidates,
            num_feasible=self.num_feasible,
            num_simulated=self.num_simulated,
            rejections=self.rejections,
            is_certified=False,
            notes=self._notes([*best, *_by_seconds(found)]),
            cut=cut,
        )

    def _notes(self, found: Sequence[_Found]) -> tuple[str, ...]:
        """Return what the best plan of each way takes, and what the search left out."""
        best: dict[str, float] = {}
        for entry in found:
            if entry.where not in best and self._fits(entry.plan):
                best[entry.where] = entry.seconds
        named = [f"{where} {seconds:.4g} s" for where, seconds in best.items()][:_NUM_NAMED]
        more = f"; {len(best) - _NUM_NAMED} slower ones" if len(best) > _NUM_NAMED else ""
        notes = [f"Mixed cluster, best of each way: {'; '.join(named)}{more}."]
        if not any(name in self.request.limits.allowed for name in _OFFLOADS):
            notes.append(
                "Offload was searched on each kind of node alone; name it under 'constraints' to search it on all."
            )
        if self._is_over():
            notes.append(f"Cut after {self.request.max_seconds:g} s: the best so far.")
        return tuple(notes)


def _way_text(split: Split, names: Sequence[str]) -> str:
    if split == "stages":
        return f"stages on {', then '.join(names)}"
    return f"replicas on {' and '.join(names)}"


def _neighbours(context: CostContext, plan: ParallelPlan) -> list[ParallelPlan]:
    """Return the plans in which the busiest stages give a layer away, or the slowest replicas a micro-batch."""
    if plan.micro_batch_shares:
        slow = slowest_group(context, plan).replicas
        unit = share_unit(plan)
        if plan.micro_batch_shares[slow[0]] <= unit:
            return []
        # Replicas of a group may stand for each other.
        groups = replica_groups(context.cluster, plan, context.workload.global_batch_size)
        takers = [group.replicas[0] for group in groups if group.replicas != slow]
        moved = [
            replace(plan, micro_batch_shares=_moved(plan.micro_batch_shares, slow[0], taker, unit))
            for taker in takers
        ]
        return [each for each in moved if can_schedule(each)]
    if plan.pp == 1:
        return []
    costs = mixed_costs(context, [plan])[0]
    layers = plan.layers_per_stage
    stage_of = stages_of_virtual(plan, costs)[: len(layers)]
    busiest = np.argsort(-device_work(plan, costs), kind="stable")[:_NUM_GIVERS]
    return [
        replace(plan, layers_per_stage=_moved(layers, giver, taker, 1))
        for giver in np.flatnonzero(np.isin(stage_of, busiest)).tolist()
        for taker in range(len(layers))
        if stage_of[taker] != stage_of[giver] and layers[giver] > 1
    ]


def _moved(counts: tuple[int, ...], giver: int, taker: int, unit: int) -> tuple[int, ...]:
    moved = list(counts)
    moved[giver] -= unit
    moved[taker] += unit
    return tuple(moved)


def _by_seconds(found: Sequence[_Found]) -> list[_Found]:
    """Return plans fastest first; ties stay in the order in which they were found."""
    if not found:
        return []
    values = without_noise(np.array([entry.seconds for entry in found]))
    return [found[index] for index in np.argsort(values, kind="stable")]


def _distinct(found: Sequence[_Found]) -> list[_Found]:
    """Leave out plans that improvement made the same."""
    return list({entry.plan: entry for entry in reversed(found)}.values())[::-1]


def _degrees(plan: ParallelPlan) -> tuple[int, int, int]:
    return plan.tp, plan.pp, plan.dp
