"""One training iteration in which every rank computes at its own, random speed.

Who waits for whom: the ranks of a stage and replica that exchange data inside every layer move in lock-step,
so an operation computes as long as on its slowest rank. Replicas run their pipelines alone and meet where a
stage's gradients are reduced: that begins when the last replica is ready. Communication does not jitter.

How slow a rank is at an operation: ``rank factor * operation factor``, each of mean 1, so that jitter adds no
work and every second it costs is somebody waiting for somebody slower.

- Rank factor: lognormal, drawn once per rank (silicon, cooling), its coefficient of variation ``rank_spread``.
- Operation factor: ``exp(b G) / Gamma(1 - b)`` with ``G`` standard Gumbel, drawn per rank and operation; ``b``
  makes the coefficient of variation ``operation_spread``. It leans to the right, as times do that are the
  largest of many (an operation waits for its slowest kernel, a kernel for its slowest block).

The slowest of a group is drawn exactly, from one random number per operation however large the group. The
maximum of n variates is ``F^-1(u^(1/n))``; for Gumbel variates shifted by the logarithms ``s_i`` of the rank
factors it is again Gumbel, shifted by ``b log sum exp(s_i / b)`` (max-stability; Coles 2001, An Introduction to
Statistical Modeling of Extreme Values, section 3.1), which is ``b log n`` for equal ranks. The sum is taken
once per group, and ``exp(b G)`` is ``E^-b`` with ``E = -log u`` exponential. Time and memory are those of
``2 * global batch / micro-batch size * virtual stages`` operations, whatever tensor and context parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import iteration_time
from meshwright.simcore.training.replicas import ReplicaGraph

__all__ = ["Jitter", "JitterResult", "RankGroups", "gumbel_scale", "rank_groups", "simulate_jitter"]

_MAX_SLOWNESS = 1000.0
_SMALL_SPREAD = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """How unequal the ranks are.

    Parameters
    ----------
    operation_spread : float
        Coefficient of variation of one rank's time for one operation, 0 to 1.
    rank_spread : float
        Coefficient of variation of the ranks' lasting speeds, 0 to 1.
    slow_ranks : tuple[tuple[int, float], ...]
        Global rank and how many times longer it computes, 1 to 1000; repeated ranks multiply.

    Raises
    ------
    SpecError
        If a number is out of range.
    """

    operation_spread: float = 0.0
    rank_spread: float = 0.0
    slow_ranks: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("operation_spread", "rank_spread"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise SpecError(f"{name} must be 0 to 1 (0 % to 100 %), not {value:g}")
        for rank, factor in self.slow_ranks:
            if not 1.0 <= factor <= _MAX_SLOWNESS:
                raise SpecError(
                    f"the factor of slow rank {rank} must be 1 to {_MAX_SLOWNESS:g}, not {factor:g}"
                )

    @property
    def is_random(self) -> bool:
        """Whether seeds differ."""
        return self.operation_spread > 0.0 or self.rank_spread > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroups:
    """Which ranks of a stage move together: global rank ``(stage * num_replicas + replica) * num_ranks + i``.

    Parameters
    ----------
    num_replicas : int
        Groups per stage that run alone until gradients are reduced.
    num_ranks : int
        Ranks of a stage and replica, in lock-step.
    """

    num_replicas: int
    num_ranks: int

    def __post_init__(self) -> None:
        for name in ("num_replicas", "num_ranks"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JitterResult:
    """Iterations of one plan, one per seed; arrays of shape ``(num_seeds,)``.

    Parameters
    ----------
    jitter : Jitter
        What was asked.
    groups : RankGroups
        Which ranks moved together.
    first_seed : int
        The seeds are this and the following.
    jitter_free_time : float
        The iteration without jitter or slow ranks [s].
    iteration_time : NDArray[np.float64]
        The iteration with them [s].
    replica_time : NDArray[np.float64]
        Mean over replicas of the iteration each would have run alone, waiting for no other replica [s].
    critical_replica, critical_stage : NDArray[np.int64]
        The straggler of the critical path, -1 for none
        (:class:`meshwright.simcore.training.replicas.ReplicaTimes`).
    """

    jitter: Jitter
    groups: RankGroups
    first_seed: int
    jitter_free_time: float
    iteration_time: NDArray[np.float64]
    replica_time: NDArray[np.float64]
    critical_replica: NDArray[np.int64]
    critical_stage: NDArray[np.int64]

    @property
    def num_seeds(self) -> int:
        """Iterations simulated."""
        return len(self.iteration_time)

    @property
    def mean(self) -> float:
        """Mean iteration time [s]."""
        return _mean(self.iteration_time)

    def percentile(self, percent: float) -> float:
        """Return the iteration time that ``percent`` % of the seeds do not exceed, interpolated [s]."""
        return float(np.percentile(self.iteration_time, percent))

    @property
    def slowdown(self) -> float:
        """Mean iteration time over the jitter-free one."""
        return self.mean / self.jitter_free_time if self.jitter_free_time else 1.0

    @property
    def lost_share(self) -> float:
        """Share of the mean iteration that waiting for stragglers costs: 1 - jitter-free time / mean."""
        return 1.0 - self.jitter_free_time / self.mean if self.mean else 0.0

    @property
    def lost_between_replicas(self) -> float:
        """The part of ``lost_share`` that a mean replica would not lose alone: waiting at reductions."""
        return 1.0 - _mean(self.replica_time) / self.mean if self.mean else 0.0

    @property
    def lost_inside_replicas(self) -> float:
        """The part of ``lost_share`` lost to lock-step ranks and in the pipeline."""
        return self.lost_share - self.lost_between_replicas


def rank_groups(plan: ParallelPlan, *, syncs_every_micro_batch: bool = False) -> RankGroups:
    """Return which ranks of a plan move in lock-step.

    Tensor and context parallel ranks do; experts' all-to-all binds ``ep * etp`` neighbouring ranks. Global
    rank order is that of :class:`ParallelPlan`.

    Parameters
    ----------
    plan : ParallelPlan
        Degrees.
    syncs_every_micro_batch : bool
        Weights are gathered or gradients reduced inside every micro-batch (FSDP, ZeRO-2): data parallel
        ranks of a sharding group then move in lock-step too.

    Raises
    ------
    SpecError
        If the groups do not divide the ranks of a stage.

    Examples
    --------
    >>> plan = ParallelPlan(dp=4, tp=8, micro_batch_size=1, schedule="none", layers_per_stage=(2,))
    >>> rank_groups(plan)
    RankGroups(num_replicas=4, num_ranks=8)
    """
    sharding_group = (plan.sharding_group or plan.dp) if syncs_every_micro_batch else 1
    num_ranks = math.lcm(plan.tp * plan.cp * sharding_group, plan.ep * plan.etp)
    num_replicas, rest = divmod(plan.tp * plan.cp * plan.dp, num_ranks)
    if rest:
        raise SpecError(
            f"groups of {num_ranks} ranks do not divide the {plan.tp * plan.cp * plan.dp} ranks of a stage: "
            "choose ep x etp that divides tp x cp x dp"
        )
    return RankGroups(num_replicas=num_replicas, num_ranks=num_ranks)


def gumbel_scale(spread: float) -> float:
    """Return the scale ``b`` at which ``exp(b G)``, ``G`` standard Gumbel, has this coefficient of variation.

    Notes
    -----
    The moments are ``Gamma(1 - k b)`` (the Frechet distribution of shape ``1 / b``; Coles 2001, section 3.1),
    so ``Gamma(1 - 2 b) / Gamma(1 - b)^2 = 1 + spread^2``, solved by bisection; for the smallest spreads, where
    that difference drowns in rounding, the standard deviation of ``b G``, ``b pi / sqrt(6)``, is the spread.

    Examples
    --------
    >>> gumbel_scale(0.0)
    0.0
    >>> round(gumbel_scale(0.02) * math.pi / math.sqrt(6.0), 3)
    0.02
    """
    if spread < _SMALL_SPREAD:
        return spread * math.sqrt(6.0) / math.pi
    low, high = 0.0, 0.5
    while low < (middle := 0.5 * (low + high)) < high:
        if math.expm1(math.lgamma(1.0 - 2.0 * middle) - 2.0 * math.lgamma(1.0 - middle)) > spread**2:
            high = middle
        else:
            low = middle
    return low


def simulate_jitter(
    costs: IterationCosts,
    schedule: str,
    groups: RankGroups,
    jitter: Jitter,
    *,
    num_seeds: int = 100,
    first_seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> JitterResult:
    """Return the distribution of an iteration's time when every rank has its own jitter.

    Every seed draws new rank and new operation factors; the same seed draws the same ones, whatever the spreads.
    The optimizer step is an operation like any other. With no jitter every iteration takes
    ``iteration_time(costs, schedule)``, bit for bit.

    Parameters
    ----------
    costs : IterationCosts
        Jitter-free durations; what their communication arrays name does not jitter.
    schedule : str
        A key of :data:`meshwright.simcore.schedules.SCHEDULES`.
    groups : RankGroups
        Replicas and their ranks.
    jitter : Jitter
        Spreads and slow ranks.
    num_seeds, first_seed : int
        Seeds ``first_seed`` to ``first_seed + num_seeds - 1``.
    progress : Callable[[str, int, int], None] | None
        Called with a phase, seeds done and seeds in all.

    Raises
    ------
    SpecError
        If there is no seed, a seed is negative, a slow rank does not exist, or the schedule cannot run.
    """
    if num_seeds < 1:
        raise SpecError(f"the number of seeds must be at least 1, not {num_seeds}")
    if first_seed < 0:
        raise SpecError(f"seeds start at 0, not at {first_seed}")
    graph = ReplicaGraph(costs, schedule, groups.num_replicas)
    sampler = _Sampler(jitter, costs.num_stages, groups, graph.max_rows)
    result = JitterResult(
        jitter=jitter,
        groups=groups,
        first_seed=first_seed,
        jitter_free_time=iteration_time(costs, schedule),
        iteration_time=np.empty(num_seeds),
        replica_time=np.empty(num_seeds),
        critical_replica=np.empty(num_seeds, dtype=np.int64),
        critical_stage=np.empty(num_seeds, dtype=np.int64),
    )
    for index in range(num_seeds):
        if progress is not None:
            progress("simulating jitter, seeds", index, num_seeds)
        times = graph.run(sampler.start(first_seed + index), sampler.draw)
        result.iteration_time[index] = times.iteration_time
        result.replica_time[index] = times.replica_time
        result.critical_replica[index] = times.critical_replica
        result.critical_stage[index] = times.critical_stage
    return result


def _mean(times: NDArray[np.float64]) -> float:
    """Return the mean; of equal times exactly that time."""
    return float(times.min() + (times - times.min()).mean())


class _Sampler:
    """What is random: the factors of ranks and operations."""

    def __init__(self, jitter: Jitter, num_stages: int, groups: RankGroups, max_rows: int) -> None:
        self._jitter = jitter
        self._shape = (num_stages, groups.num_replicas, groups.num_ranks)
        self._slow = _log_slow_ranks(jitter, self._shape)
        self._scale = gumbel_scale(jitter.operation_spread)
        self._noise = np.ones((max_rows, groups.num_replicas))
        self._generator = np.random.default_rng(0)

    def start(self, seed: int) -> NDArray[np.float64]:
        """Begin a seed; return what multiplies the operation factors, shape ``(num_stages, num_replicas)``."""
        ranks, operations = np.random.SeedSequence(seed).spawn(2)
        self._generator = np.random.Generator(np.random.SFC64(operations))
        variance = math.log1p(self._jitter.rank_spread**2)
        logarithm = self._slow
        if variance > 0.0:
            normal = np.random.Generator(np.random.SFC64(ranks)).standard_normal(self._shape)
            logarithm = logarithm + (math.sqrt(variance) * normal - 0.5 * variance)
        largest: NDArray[np.float64] = logarithm.max(axis=2)
        if self._scale > 0.0:
            weight = np.exp((logarithm - largest[..., np.newaxis]) / self._scale).sum(axis=2)
            largest = largest + (self._scale * np.log(weight) - math.lgamma(1.0 - self._scale))
        factor: NDArray[np.float64] = np.exp(largest)
        return factor

    def draw(self, num_rows: int) -> NDArray[np.float64]:
        """Return the operation factors ``E^-b`` of the next operations, shape ``(num_rows, num_replicas)``."""
        noise = self._noise[:num_rows]
        if self._scale > 0.0:
            self._generator.standard_exponential(out=noise)
            # Zero is drawn once in 2**53 times, and has no logarithm.
            np.maximum(noise, np.finfo(np.float64).tiny, out=noise)
            np.log(noise, out=noise)
            np.multiply(noise, -self._scale, out=noise)
            np.exp(noise, out=noise)
        return noise


def _log_slow_ranks(jitter: Jitter, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    logarithm = np.zeros(math.prod(shape))
    for rank, factor in jitter.slow_ranks:
        if not 0 <= rank < len(logarithm):
            raise SpecError(f"slow rank {rank} does not exist: the plan has ranks 0 to {len(logarithm) - 1}")
        logarithm[rank] += math.log(factor)
    return logarithm.reshape(shape)
