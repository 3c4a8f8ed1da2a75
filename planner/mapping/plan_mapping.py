"""Place the ranks of plans on hosts and GPUs with unequal links, and rank the plans by what that makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.prediction import predict
from meshwright.costmodels.topology import gpu_slowdown, host_slowdown, on_best_hosts, uplinks
from meshwright.planner.export import EXPORTERS
from meshwright.planner.mapping.contended import ContendedTimes
from meshwright.planner.mapping.gpu_order import GpuOrder, search_gpu_order
from meshwright.planner.mapping.plan_traffic import plan_traffic
from meshwright.planner.mapping.problem import MappingProblem
from meshwright.planner.mapping.search import MappingResult, search_order
from meshwright.planner.search.base import Progress, RankedPlan, Search, SearchRequest, SearchResult
from meshwright.planner.search.non_dominated import non_dominated
from meshwright.simcore.domain.device_mapping import RANK_ORDERS, DeviceMapping, RankOrder
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["MappedPlan", "has_choice", "map_plan", "rank_orders", "search_mapped"]

# Plans that a search hands over to be mapped, at least: one that only wins on other hosts is among them.
_MOST_MAPPED = 20
# Host orders of a plan that is mapped among many are searched with this share of the usual effort; the winner again.
_FIRST_EFFORT = 0.01


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappedPlan:
    """A plan on the best hosts, GPUs and in the best order of ranks found for it.

    Parameters
    ----------
    plan : ParallelPlan
        With its device mapping; as given where no other is faster.
    seconds, given_seconds : float
        Iteration time of this plan, and as it was given [s].
    hosts : MappingResult | None
        What was searched of host orders, in the plan's order of ranks; None where nothing depends on them.
    gpus : GpuOrder | None
        The same of GPU orders.
    orders : tuple[RankOrder, ...]
        Orders of ranks that were tried.
    tried : tuple[tuple[ParallelPlan, float], ...]
        Placements to choose from and their iteration times, fastest first: as given, in the hosts' own order, pipeline
        beside pipeline below switches, and as searched, for each order of ranks.
    contended : float | None
        Iteration time with contention; None where it was not simulated [s].
    """

    plan: ParallelPlan
    seconds: float
    given_seconds: float
    hosts: MappingResult | None
    gpus: GpuOrder | None
    orders: tuple[RankOrder, ...]
    tried: tuple[tuple[ParallelPlan, float], ...] = ()
    contended: float | None = None

    @property
    def known_seconds(self) -> float:
        """Iteration time with contention where it was simulated, else without [s]."""
        return self.seconds if self.contended is None else self.contended


def has_choice(context: CostContext) -> bool:
    """Return whether hosts or GPUs of a cluster differ in their links, so that it matters who runs what."""
    if context.cluster.topology is None:
        return False
    return bool((host_slowdown(context) > 1.0).any()) or gpu_slowdown(context.cluster) is not None


def rank_orders(request: SearchRequest, plan: ParallelPlan) -> tuple[RankOrder, ...]:
    """Return the orders of ranks a plan may have: Megatron's other one only where the export target can express it."""
    target = request.limits.target
    if plan.pp == 1 or plan.dp == 1 or plan.layer_groups or target is None:
        return RANK_ORDERS[:1]  # type: ignore[return-value]  # words of the literal
    turned = replace(plan, device_mapping=DeviceMapping(rank_order=RANK_ORDERS[1]))  # type: ignore[arg-type]
    refused = EXPORTERS[target].unsupported(request.job, turned)
    return RANK_ORDERS[:1] if refused else RANK_ORDERS  # type: ignore[return-value]


def map_plan(
    context: CostContext,
    plan: ParallelPlan,
    *,
    orders: Sequence[RankOrder] = (RANK_ORDERS[0],),  # type: ignore[assignment]  # a word of the literal
    seed: int = 0,
    effort: float = 1.0,
) -> MappedPlan:
    """Return a plan with the order of hosts, GPUs and ranks under which its iteration takes least.

    What each communication is worth is asked of the simulator (:mod:`meshwright.planner.mapping.plan_traffic`), orders
    are searched under these weights, and the best of each order of ranks is simulated.

    Parameters
    ----------
    context : CostContext
        Job; its cluster has a topology, or nothing is to be chosen.
    plan : ParallelPlan
        Any plan.
    orders : Sequence[RankOrder]
        Orders of ranks to try.
    seed, effort : int, float
        As in :func:`meshwright.planner.mapping.search.search_order`; the orders of ranks share the effort.
    """
    given = predict(context, plan).iteration_time
    best = MappedPlan(
        plan=plan, seconds=given, given_seconds=given, hosts=None, gpus=None, orders=tuple(orders)
    )
    if not has_choice(context) or context.kinds:
        return replace(best, tried=((plan, given),))
    tried = {plan: given}
    for order in orders:
        for placed in (_natural(plan, order), *_beside(context, plan, order)):
            if placed not in tried:
                tried[placed] = predict(context, placed).iteration_time
        mapped = _mapped(context, plan, order, seed, effort / len(orders))
        tried.setdefault(mapped.plan, mapped.seconds)
        # What was searched is told even where nothing was gained.
        if mapped.seconds < best.seconds or (best.hosts is None and best.gpus is None):
            best = mapped
    ranked = tuple(sorted(tried.items(), key=lambda each: each[1]))
    return replace(
        best,
        plan=ranked[0][0],
        seconds=ranked[0][1],
        given_seconds=given,
        orders=tuple(orders),
        tried=ranked,
    )


def _beside(context: CostContext, plan: ParallelPlan, order: RankOrder) -> tuple[ParallelPlan, ...]:
    """Return the plan with the hosts of each pipeline side by side, where switches and not pairs are described.

    Sends then stay below a switch, and rings leave it once: a host order that swaps priced link by link do not find, for a
    link over a switch is priced there as if all hosts sent over it.
    """
    num_nodes = -(-plan.num_gpus // context.cluster.node.num_gpus)
    columns, left = divmod(num_nodes, plan.pp)
    if order != RANK_ORDERS[0] or left or min(columns, plan.pp) < 2 or uplinks(context) is None:
        return ()
    hosts = np.arange(num_nodes).reshape(columns, plan.pp).T.ravel()
    return (replace(plan, device_mapping=DeviceMapping(host_order=tuple(hosts.tolist()))),)


def _natural(plan: ParallelPlan, order: RankOrder) -> ParallelPlan:
    """Return the plan on hosts and GPUs in their own order."""
    mapping = DeviceMapping(rank_order=order)
    return replace(plan, device_mapping=None if mapping == DeviceMapping() else mapping)


def _mapped(
    context: CostContext, plan: ParallelPlan, order: RankOrder, seed: int, effort: float
) -> MappedPlan:
    """Return the plan on the best hosts and GPUs in one order of ranks."""
    turned = _natural(plan, order)
    traffic = plan_traffic(context, turned)
    slowdown = host_slowdown(context)
    num_nodes = -(-plan.num_gpus // context.cluster.node.num_gpus)
    across = tuple(each.between_hosts(slowdown) for each in traffic if each.where == "across")
    hosts = gpus = None
    if across and (slowdown > 1.0).any():
        problem = MappingProblem(num_hosts=len(slowdown), num_slots=num_nodes, traffic=across)
        hosts = search_order(problem, seed=seed, effort=effort)
    between_gpus = gpu_slowdown(context.cluster)
    if between_gpus is not None:
        gpus = search_gpu_order(between_gpus, traffic, seed)
    is_ordered = hosts is not None and hosts.cost < hosts.identity_cost
    is_permuted = gpus is not None and gpus.cost < gpus.identity_cost
    mapping = DeviceMapping(
        host_order=tuple(int(host) for host in hosts.order[:num_nodes]) if is_ordered and hosts else (),
        gpu_orders=(gpus.order[: plan.num_gpus],) if is_permuted and gpus else (),
        rank_order=order,
    )
    placed = replace(turned, device_mapping=None if mapping == DeviceMapping() else mapping)
    seconds = predict(context, placed).iteration_time
    return MappedPlan(
        plan=placed, seconds=seconds, given_seconds=seconds, hosts=hosts, gpus=gpus, orders=(order,)
    )


def search_mapped(
    search: Search, request: SearchRequest, progress: Progress, *, seed: int = 0, effort: float = 1.0
) -> SearchResult:
    """Return the best plans of a search, each on the hosts that suit it.

    On unequal links the search sees every plan at what it costs at least, whatever hosts it is given, so that no
    order of the hosts in the user's list decides which plans are met. The best of these are mapped in their order
    and simulated on their hosts, until none that is left can win. Where the fabric is described, the plans that lead
    then, each as mapped and in the hosts' own order, are ranked by their time with contention.

    Parameters
    ----------
    search : Search
        Finds plans.
    request : SearchRequest
        What to search.
    progress : Progress
        Told how far it is.
    seed, effort : int, float
        Of the mapping; see :func:`map_plan`.
    """
    context = request.context
    if not has_choice(context) or context.kinds:
        return search.run(request, progress)
    may_turn = request.limits.target is not None
    optimistic = on_best_hosts(context, may_turn=may_turn)
    found = search.run(
        replace(request, context=optimistic, num_plans=max(_MOST_MAPPED, request.num_plans)), progress
    )
    return _Mapping(request, progress, seed, effort).result(found)


# A plan as the search found it, and on its hosts.
_Entry = tuple[RankedPlan, MappedPlan]


class _Mapping:
    """Maps what a search found."""

    def __init__(self, request: SearchRequest, progress: Progress, seed: int, effort: float) -> None:
        self.request, self.progress = request, progress
        self.seed, self.effort = seed, effort
        self.contended = ContendedTimes(request.context) if ContendedTimes.is_known(request.context) else None

    def result(self, found: SearchResult) -> SearchResult:
        """Return the plans on their hosts, best first, and what is known of those that were not mapped."""
        request = self.request
        entries: list[_Entry] = []
        left: float | None = None
        for place, ranked in enumerate(found.ranked):
            least = self._value(ranked.plan, ranked.prediction.iteration_time)
            values = sorted(self._value(mapped.plan, mapped.seconds) for _, mapped in entries)
            if len(values) >= request.num_plans and least >= values[request.num_plans - 1]:
                left = least
                break
            self.progress("mapping plans", place + 1, len(found.ranked))
            entries.append((ranked, self._map(ranked.plan, _FIRST_EFFORT)))
        if left is None and len(found.ranked) >= _MOST_MAPPED:
            last = found.ranked[-1]
            left = self._value(last.plan, last.prediction.iteration_time)
        if found.least_left is not None:
            # What the search settled is who wins on the best hosts thinkable, not on those there are.
            left = found.least_left if left is None else min(left, found.least_left)
        entries = self._ranked(entries)
        winner, mapped = entries[0]
        again = self._settled(self._map(winner.plan, 1.0))
        best = min(mapped, again, key=lambda each: each.known_seconds)
        entries[0] = (winner, best)
        placed = tuple(self._entry(each, on_hosts) for each, on_hosts in entries[: request.num_plans])
        degrees = _degrees(best.plan)
        rival = next((each for each in entries if _degrees(each[1].plan) != degrees), None)
        value = self._value(best.plan, best.known_seconds)
        return replace(
            found,
            ranked=placed,
            rival=None if rival is None else self._entry(rival[0], self._settled(rival[1])),
            is_certified=found.is_certified
            and found.least_left is not None
            and (left is None or value <= left),
            notes=(*found.notes, _note(best, winner.prediction.iteration_time, value, left)),
            front=self._front(found),
        )

    def _ranked(self, entries: list[_Entry]) -> list[_Entry]:
        """Return plans best first, those that are asked for with contention where the fabric is described."""
        wanted, waiting = self.request.num_plans, sorted(entries, key=self._key)
        leading: list[_Entry] = []
        while waiting and self.contended is not None:
            # Contention makes no plan faster: one behind so many that have met it stays behind them.
            if len(leading) >= wanted and self._key(waiting[0]) >= self._key(leading[wanted - 1]):
                break
            ranked, mapped = waiting.pop(0)
            self.progress("simulating contention", len(leading) + 1, len(entries))
            leading = sorted([*leading, (ranked, self._settled(mapped))], key=self._key)
        return leading + waiting

    def _settled(self, mapped: MappedPlan) -> MappedPlan:
        """Return the plan on those of the hosts tried that contention leaves fastest."""
        if self.contended is None or mapped.contended is not None:
            return mapped
        best: tuple[float, float, ParallelPlan] | None = None
        for plan, alone in mapped.tried:
            # Contention makes no placement faster, and the fastest without it come first.
            if best is not None and alone >= best[0]:
                break
            seconds, contended = self.contended.seconds(plan)
            if best is None or contended < best[0]:
                best = contended, seconds, plan
        if best is None:
            return mapped
        return replace(mapped, plan=best[2], seconds=best[1], contended=best[0])

    def _map(self, plan: ParallelPlan, share: float) -> MappedPlan:
        orders = rank_orders(self.request, plan)
        return map_plan(self.request.context, plan, orders=orders, seed=self.seed, effort=self.effort * share)

    def _entry(self, ranked: RankedPlan, mapped: MappedPlan) -> RankedPlan:
        prediction = predict(self.request.context, mapped.plan, self.request.flops)
        return replace(ranked, plan=mapped.plan, prediction=prediction, contended_time=mapped.contended)

    def _front(self, found: SearchResult) -> tuple[RankedPlan, ...]:
        """Return the plans of the front that still stand on it on their hosts, fastest first."""
        if not found.front:
            return ()
        entries = [
            self._entry(each, self._settled(self._map(each.plan, _FIRST_EFFORT))) for each in found.front
        ]
        values = np.array(
            [
                (
                    each.seconds,
                    each.seconds * each.plan.num_gpus,
                    each.prediction.peak_memory_bytes,
                )
                for each in entries
            ]
        )
        kept = non_dominated(np.zeros(len(entries), dtype=np.int64), values)
        return tuple(entries[row] for row in sorted(kept.tolist(), key=lambda row: values[row, 0]))

    def _key(self, entry: _Entry) -> float:
        return self._value(entry[1].plan, entry[1].known_seconds)

    def _value(self, plan: ParallelPlan, seconds: float) -> float:
        return seconds if self.request.objective == "throughput" else seconds * plan.num_gpus


def _degrees(plan: ParallelPlan) -> tuple[int, int, int]:
    return plan.tp, plan.pp, plan.dp


def _note(best: MappedPlan, least: float, value: float, left: float | None) -> str:
    """Return what mapping did to the winner, what it cannot do, and what was not mapped.

    ``least`` is the winner's time on hosts as good as any, ``value`` and ``left`` are objectives of the winner and of the
    plans that were not mapped.
    """
    parts = [
        f"{best.given_seconds:.4g} s in the order given, {best.seconds:.4g} s as mapped, "
        f"at least {least:.4g} s on any hosts ({1.0 - least / best.seconds:.1%} gap)"
    ]
    if best.contended is not None:
        parts.append(f"{best.contended:.4g} s with contention, by which plans are ranked")
    if best.hosts is not None:
        tried = "all" if best.hosts.is_exact else f"{best.hosts.num_evaluations:,}"
        parts.append(f"{tried} host orders priced")
    if best.gpus is not None:
        parts.append("all GPU orders priced" if best.gpus.is_exact else "GPU orders climbed")
    if len(best.orders) > 1:
        mapping = best.plan.device_mapping or DeviceMapping()
        parts.append(f"rank order {mapping.rank_order}, the better of {len(best.orders)}")
    if left is not None and left < value:
        parts.append(f"a plan that was not mapped may be up to {1.0 - left / value:.1%} better")
    return f"hosts of the winner: {'; '.join(parts)}"
