"""Which host runs which part of a plan: the traffic between hosts, and the time a host order makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = ["FlatProblem", "MappingProblem", "Traffic", "TrafficKind", "grid_problem", "order_cost"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TrafficKind = Literal["path", "ring", "exchange"]
KINDS: tuple[str, ...] = get_args(TrafficKind)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traffic:
    """Groups of slots that communicate alike.

    Parameters
    ----------
    kind : TrafficKind
        ``path``: the links from each slot to the next add up (a pipeline). ``ring``: the slowest link from each slot to
        the next, the last back to the first. ``exchange``: of the busiest slot, the mean of its links to the others.
    time : FloatArray
        What a link between two hosts costs, ``(num_hosts, num_hosts)`` [s].
    groups : tuple[tuple[int, ...], ...]
        Slots of each group, at least two. All groups run at once: the slowest counts.
    weights, steeper : tuple[float, ...]
        How much the time of each group counts, and how much more what is beyond ``knee``; empty is 1 and 0 for all.
    knee : float
        Time from which communication that was hidden is exposed [s].
    """

    kind: TrafficKind
    time: FloatArray
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] = ()
    steeper: tuple[float, ...] = ()
    knee: float = 0.0

    @property
    def group_weights(self) -> FloatArray:
        """What the time of each group counts up to the knee, and what it counts more beyond, ``(2, num_groups)``."""
        count = len(self.groups)
        return np.array([self.weights or (1.0,) * count, self.steeper or (0.0,) * count])

    def weighted(self, seconds: FloatArray) -> FloatArray:
        """Return what the time of each group counts."""
        weight, more = self.group_weights
        result: FloatArray = weight * seconds + more * np.maximum(seconds - self.knee, 0.0)
        return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlatProblem:
    """A problem as arrays: groups one after the other, and the groups of every slot.

    Parameters
    ----------
    time : FloatArray
        Link times of each kind of traffic, ``(num_traffic, num_hosts, num_hosts)`` [s].
    kind : IntArray
        Of each traffic, as its place in :data:`KINDS`.
    traffic_start : IntArray
        First group of each traffic, and the number of groups.
    group_start, group_slots : IntArray
        First member of each group, and the members.
    group_weight : FloatArray
        What each group's time counts, what it counts more beyond its knee, and the knee, ``(3, num_groups)``.
    slot_start, slot_groups : IntArray
        The groups each slot is in.
    """

    time: FloatArray
    kind: IntArray
    traffic_start: IntArray
    group_start: IntArray
    group_slots: IntArray
    group_weight: FloatArray
    slot_start: IntArray
    slot_groups: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class MappingProblem:
    """Hosts with unequal links, and a plan whose slots (the nodes it fills) communicate over them.

    Parameters
    ----------
    num_hosts, num_slots : int
        Hosts to choose from, and how many of them the plan fills; a host order gives each slot a host.
    traffic : tuple[Traffic, ...]
        What the plan moves between hosts and cannot hide; the parts add up.

    Raises
    ------
    SpecError
        If there are more slots than hosts, or link times are missing or negative.
    """

    num_hosts: int
    num_slots: int
    traffic: tuple[Traffic, ...]

    def __post_init__(self) -> None:
        if self.num_slots > self.num_hosts:
            raise SpecError(
                f"mapping: the plan fills {self.num_slots} hosts, the matrix has {self.num_hosts}"
            )
        for each in self.traffic:
            if each.time.shape != (self.num_hosts, self.num_hosts):
                raise SpecError(f"mapping: link times must be a square matrix, not {each.time.shape}")
            if not np.all(each.time >= 0.0):
                raise SpecError("mapping: link times must not be negative")

    @cached_property
    def flat(self) -> FlatProblem:
        """The problem as arrays."""
        groups = [group for each in self.traffic for group in each.groups]
        members: list[list[int]] = [[] for _ in range(self.num_hosts)]
        for number, group in enumerate(groups):
            for slot in sorted(set(group)):
                members[slot].append(number)
        return FlatProblem(
            time=np.array([each.time for each in self.traffic]).reshape(-1, self.num_hosts, self.num_hosts),
            kind=np.array([KINDS.index(each.kind) for each in self.traffic], dtype=np.int64),
            traffic_start=_starts([each.groups for each in self.traffic]),
            group_start=_starts(groups),
            group_slots=np.array([slot for group in groups for slot in group], dtype=np.int64),
            group_weight=np.concatenate(
                [
                    np.vstack([each.group_weights, np.full(len(each.groups), each.knee)])
                    for each in self.traffic
                ],
                axis=1,
            ),
            slot_start=_starts(members),
            slot_groups=np.array([group for each in members for group in each], dtype=np.int64),
        )


def grid_problem(
    bandwidth: FloatArray,
    num_stages: int,
    hosts_per_stage: int,
    pipeline_bytes: float,
    ring_bytes: float,
    latency: FloatArray | None = None,
) -> MappingProblem:
    """Return the problem of a plan that fills hosts stage by stage: slot ``stage * hosts_per_stage + column``.

    Slots of one stage share data parallel rings in the order of their columns, slots of one column send each other
    activations from stage to stage: the slowest pipeline plus the slowest ring,
    ``max_column sum_stage hop + max_stage max_link ring``  [Yim et al. 2024, Pipette, DATE, equations 4 to 6].

    Parameters
    ----------
    bandwidth : FloatArray
        From host to host, ``(num_hosts, num_hosts)``, per direction; the diagonal is not read [B/s].
    num_stages, hosts_per_stage : int
        Pipeline stages, and hosts that each of them fills.
    pipeline_bytes : float
        What every hop of a pipeline moves during one iteration and cannot hide [B].
    ring_bytes : float
        What crosses each link of a stage's data parallel ring during one iteration and cannot hide [B].
    latency : FloatArray | None
        Of one hop, ``(num_hosts, num_hosts)``, times how often it is paid; None is 0 [s].

    Raises
    ------
    SpecError
        If a matrix is not square, a bandwidth is 0, or the plan needs more hosts.
    """
    num_hosts = len(bandwidth)
    for name, matrix in (("bandwidth", bandwidth), ("latency", latency)):
        if matrix is not None and matrix.shape != (num_hosts, num_hosts):
            raise SpecError(f"mapping: {name} must be a square matrix, not {matrix.shape}")
    if not np.all((bandwidth > 0.0) | np.eye(num_hosts, dtype=bool)):
        raise SpecError("mapping: bandwidth between different hosts must be above 0")
    if num_stages < 1 or hosts_per_stage < 1:
        raise SpecError("mapping: num_stages and hosts_per_stage must be at least 1")
    grid = np.arange(num_stages * hosts_per_stage).reshape(num_stages, hosts_per_stage)

    def link_time(num_bytes: float) -> FloatArray:
        with np.errstate(divide="ignore"):
            seconds = num_bytes / bandwidth
        if latency is not None:
            seconds = seconds + latency * (num_bytes > 0.0)
        np.fill_diagonal(seconds, 0.0)
        # Either direction may be the slow one: a hop goes forward with activations and back with gradients.
        return np.maximum(seconds, seconds.T)

    traffic = []
    if num_stages > 1:
        pipelines = tuple(tuple(column) for column in grid.T.tolist())
        traffic.append(Traffic(kind="path", time=link_time(pipeline_bytes), groups=pipelines))
    if hosts_per_stage > 1:
        rings = tuple(tuple(row) for row in grid.tolist())
        traffic.append(Traffic(kind="ring", time=link_time(ring_bytes), groups=rings))
    return MappingProblem(num_hosts=num_hosts, num_slots=grid.size, traffic=tuple(traffic))


def order_cost(problem: MappingProblem, order: IntArray) -> float:
    """Return the exposed communication of a host order [s].

    Parameters
    ----------
    problem : MappingProblem
        Hosts and traffic.
    order : IntArray
        Host of each slot, idle hosts last, ``(num_hosts,)``.
    """
    return sum(
        float(each.weighted(np.array([_group_cost(each, order[list(group)]) for group in each.groups])).max())
        for each in problem.traffic
    )


def _group_cost(traffic: Traffic, hosts: IntArray) -> float:
    if traffic.kind == "path":
        return float(traffic.time[hosts[:-1], hosts[1:]].sum())
    if traffic.kind == "ring":
        return float(traffic.time[hosts, np.roll(hosts, -1)].max())
    links = traffic.time[np.ix_(hosts, hosts)]
    return float(((links.sum(axis=1) - np.diag(links)) / (len(hosts) - 1)).max())


def _starts(parts: Sequence[Sequence[object]]) -> IntArray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
