"""Transfers over shared links: fluid flows under weighted max-min fairness.

Every flow gets the largest rate that takes nothing from a flow with a smaller rate per weight (Bertsekas and
Gallager, Data Networks, section 6.5.2). Rates change only when a flow begins or ends, and only in the part of
the network that shares a link with it, directly or through other flows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.compiled import for_kernel
from meshwright.simcore.network.flow_memory import OWNER, flow_memory
from meshwright.simcore.network.task_loop import run_tasks
from meshwright.simcore.network.task_memory import read_tasks, task_memory

__all__ = ["FlowSet", "FlowTimes", "run_communications", "simulate_flows"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlowSet:
    """Flows and the directed links they cross.

    Parameters
    ----------
    capacity : FloatArray
        Bytes per second of each directed link, shape ``(num_links,)`` [B/s].
    route_starts : IntArray
        Where each flow's links begin in ``route_links``, and the end of the last, ``(num_flows + 1,)``.
    route_links : IntArray
        Links of all flows, one flow after the other.
    num_bytes : FloatArray
        Bytes of each flow, ``(num_flows,)`` [B].
    start : FloatArray
        When each flow is sent; its first byte moves ``latency`` later [s].
    latency : FloatArray | None
        Latency of each flow's path [s]; None is 0.
    multiplicity : FloatArray | None
        Equal flows that one entry stands for; each moves ``num_bytes``. None is 1.
    """

    capacity: FloatArray
    route_starts: IntArray
    route_links: IntArray
    num_bytes: FloatArray
    start: FloatArray
    latency: FloatArray | None = None
    multiplicity: FloatArray | None = None

    def __post_init__(self) -> None:
        num_flows = len(self.num_bytes)
        if len(self.route_starts) != num_flows + 1 or int(self.route_starts[-1]) != len(self.route_links):
            raise SpecError("flows: route_starts must hold one entry per flow and the number of route_links")
        if len(self.start) != num_flows or np.any(np.diff(self.route_starts) < 1):
            raise SpecError("flows: every flow needs a start and at least one link")
        if np.any((self.route_links < 0) | (self.route_links >= len(self.capacity))):
            raise SpecError(f"flows: links are 0 to {len(self.capacity) - 1}")
        for name, values, is_zero_allowed in (
            ("capacity", self.capacity, False),
            ("num_bytes", self.num_bytes, True),
            ("start", self.start, True),
            ("latency", self.latency, True),
            ("multiplicity", self.multiplicity, False),
        ):
            if values is None:
                continue
            if not np.all(np.isfinite(values)) or np.any(values < 0.0):
                raise SpecError(f"flows: {name} must be finite and not negative")
            if not is_zero_allowed and np.any(values == 0.0):
                raise SpecError(f"flows: {name} must be above 0")

    @property
    def num_flows(self) -> int:
        """Entries, each standing for ``multiplicity`` equal flows."""
        return len(self.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlowTimes:
    """When flows end.

    Parameters
    ----------
    finish : FloatArray
        When each flow's last byte arrives, ``(num_flows,)`` [s].
    num_solves : int
        How often rates were computed anew.
    """

    finish: FloatArray
    num_solves: int


def simulate_flows(flows: FlowSet) -> FlowTimes:
    """Return when every flow ends under max-min fair sharing of the links.

    Notes
    -----
    Events (a flow begins or ends) at the same time are taken together, then rates are filled progressively in
    the component of links and flows they touch. Equal to SimGrid's CM02 model without its TCP corrections.

    Examples
    --------
    Two equal flows share a link of 10 B/s; a third crosses another link alone.

    >>> flows = FlowSet(
    ...     capacity=np.array([10.0, 10.0]),
    ...     route_starts=np.array([0, 1, 2, 3]),
    ...     route_links=np.array([0, 0, 1]),
    ...     num_bytes=np.array([50.0, 50.0, 50.0]),
    ...     start=np.zeros(3),
    ... )
    >>> simulate_flows(flows).finish.tolist()
    [10.0, 10.0, 5.0]
    """
    num_flows = flows.num_flows
    begin = flows.start if flows.latency is None else flows.start + flows.latency
    usage = np.ones(len(flows.route_links))
    if flows.multiplicity is not None:
        usage = np.repeat(flows.multiplicity.astype(np.float64), np.diff(flows.route_starts))
    # A flow is a task that waits for its start and then sends.
    times, num_solves = run_communications(
        np.empty((0, num_flows), dtype=np.int64),
        begin,
        np.arange(num_flows),
        flows.num_bytes,
        flow_memory(flows.capacity, flows.route_starts, flows.route_links, usage),
    )
    return FlowTimes(finish=times[2], num_solves=num_solves)


def run_communications(
    predecessors: IntArray,
    fixed: FloatArray,
    channel: IntArray,
    volume: FloatArray,
    flows: tuple[IntArray, FloatArray, IntArray],
) -> tuple[FloatArray, int]:
    """Return start, begin of communication and end of tasks, ``(3, num_tasks)`` [s], and how often rates were solved.

    Parameters
    ----------
    predecessors, fixed, channel, volume
        As :func:`~meshwright.simcore.network.task_memory.task_memory` takes them.
    flows : tuple[IntArray, FloatArray, IntArray]
        A :func:`~meshwright.simcore.network.flow_memory.flow_memory` with one flow per channel.
    """
    ints, floats, records = flows
    tasks, times, channels = task_memory(predecessors, fixed, channel, volume, records)
    ints[records + OWNER] = channels
    num_solves = run_tasks(tasks, times, for_kernel(ints), for_kernel(floats))
    return read_tasks(times, len(fixed)), num_solves
