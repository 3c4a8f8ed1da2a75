"""Which host runs which part of a plan: the traffic between hosts, and the time a host order makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = ["MappingProblem", "order_cost"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappingProblem:
    """Hosts with unequal links, and a plan that fills them stage by stage.

    Slot ``stage * hosts_per_stage + column`` is a place in the plan; a host order gives each slot a host. Slots of
    one stage share data parallel rings in the order of their columns, slots of one column send each other
    activations from stage to stage. Hosts beyond the slots stay idle.

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
    """

    bandwidth: FloatArray
    num_stages: int
    hosts_per_stage: int
    pipeline_bytes: float
    ring_bytes: float
    latency: FloatArray | None = None

    def __post_init__(self) -> None:
        num_hosts = len(self.bandwidth)
        for name, matrix in (("bandwidth", self.bandwidth), ("latency", self.latency)):
            if matrix is not None and matrix.shape != (num_hosts, num_hosts):
                raise SpecError(f"mapping: {name} must be a square matrix, not {matrix.shape}")
        if not np.all((self.bandwidth > 0.0) | np.eye(num_hosts, dtype=bool)):
            raise SpecError("mapping: bandwidth between different hosts must be above 0")
        if self.num_stages < 1 or self.hosts_per_stage < 1:
            raise SpecError("mapping: num_stages and hosts_per_stage must be at least 1")
        if self.num_slots > num_hosts:
            raise SpecError(f"mapping: the plan fills {self.num_slots} hosts, the matrix has {num_hosts}")

    @property
    def num_hosts(self) -> int:
        """Hosts to choose from."""
        return len(self.bandwidth)

    @property
    def num_slots(self) -> int:
        """Hosts the plan fills."""
        return self.num_stages * self.hosts_per_stage

    @property
    def hop_time(self) -> FloatArray:
        """Time of one pipeline hop from host to host, ``(num_hosts, num_hosts)`` [s]."""
        return self._transfer(self.pipeline_bytes)

    @property
    def ring_time(self) -> FloatArray:
        """Time of a ring whose slowest link joins two hosts, ``(num_hosts, num_hosts)`` [s]."""
        return self._transfer(self.ring_bytes)

    def _transfer(self, num_bytes: float) -> FloatArray:
        with np.errstate(divide="ignore"):
            seconds = num_bytes / self.bandwidth
        if self.latency is not None:
            seconds = seconds + self.latency * (num_bytes > 0.0)
        np.fill_diagonal(seconds, 0.0)
        # Either direction may be the slow one: a hop goes forward with activations and back with gradients.
        return np.maximum(seconds, seconds.T)


def order_cost(problem: MappingProblem, order: IntArray) -> float:
    """Return the exposed communication of a host order: the slowest pipeline plus the slowest ring [s].

    Parameters
    ----------
    problem : MappingProblem
        Hosts and traffic.
    order : IntArray
        Host of each slot, idle hosts last, ``(num_hosts,)``.

    Notes
    -----
    ``max_column sum_stage hop + max_stage max_link ring``  [Yim et al. 2024, Pipette, DATE, equations 4 to 6].
    """
    grid = order[: problem.num_slots].reshape(problem.num_stages, problem.hosts_per_stage)
    hops = problem.hop_time[grid[:-1], grid[1:]].sum(axis=0)
    slowest_pipeline = float(hops.max()) if problem.num_stages > 1 else 0.0
    slowest_ring = 0.0
    if problem.hosts_per_stage > 1:
        slowest_ring = float(problem.ring_time[grid, np.roll(grid, -1, axis=1)].max())
    return slowest_pipeline + slowest_ring
