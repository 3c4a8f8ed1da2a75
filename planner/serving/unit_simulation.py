"""Simulations of a job: one unit of a plan at one load, or a whole plan on given requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.serving.costs import JobCosts
from meshwright.planner.serving.deployment import replica_pools, transfer_link
from meshwright.planner.serving.load_profile import LoadProfile, load_profile
from meshwright.planner.serving.load_search import LoadPoint
from meshwright.simcore.domain.serving import ServingJob, ServingPlan
from meshwright.simcore.serving.metrics import request_metrics, summarize
from meshwright.simcore.serving.requests import RequestTable, generate_requests
from meshwright.simcore.serving.simulate import ServingResult, simulate_pools

__all__ = [
    "JobSimulator",
    "first_requests",
    "load_point",
    "phase_shares",
    "profile_of_requests",
    "trace_rate",
]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
# Requests of a load: so many times those under way at once, within these bounds; and where it is to be certain.
_TURNOVERS, _FEWEST, _MOST = 2.5, 600, 4000
_THOROUGH_TURNOVERS, _THOROUGH_FEWEST, _THOROUGH_MOST = 4.0, 2000, 8000
# Requests that meet an empty system, over those under way at once; and those that see it drain.
_WARM_UP, _DRAIN = 1.0, 0.5
# Share of the requests that come in which a load that does not pile up sends out again, but for chance.
_STEADY_SHARE = 0.95
_STATISTICS = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}


class JobSimulator:
    """Simulates units of plans of one job at chosen loads; equal seeds give equal requests.

    Parameters
    ----------
    job : ServingJob
        The job.
    costs : JobCosts
        Its cost models.
    trace : RequestTable | None
        The requests of a file; None draws them from the workload.
    seed : int
        Of whatever is drawn.
    """

    def __init__(
        self, job: ServingJob, costs: JobCosts, trace: RequestTable | None = None, seed: int = 0
    ) -> None:
        self._job, self._costs, self._trace, self._seed = job, costs, trace, seed
        self._drawn: dict[int, RequestTable] = {}

    def sample(self) -> RequestTable:
        """Return the requests that stand for the load."""
        return self._trace if self._trace is not None else self._requests(_FEWEST)

    def profile(self) -> LoadProfile:
        """Return the means of the load."""
        workload = self._job.workload
        is_poisson = workload.arrival == "poisson" and workload.num_turns == 1
        return replace(profile_of_requests(self.sample()), comes_in_groups=not is_poisson)

    def demand(self) -> float:
        """Return the stated load: clients of a closed loop, else requests per second."""
        workload = self._job.workload
        if workload.arrival == "closed_loop":
            return float(workload.concurrency)
        return workload.rate or trace_rate(self.sample())

    def run(self, plan: ServingPlan, load: float, clients: float, *, is_thorough: bool = False) -> LoadPoint:
        """Return what a load comes to once the system is warm.

        Parameters
        ----------
        plan : ServingPlan
            One unit.
        load : float
            Requests per second, or clients of a closed loop.
        clients : float
            How many requests are expected under way at once.
        is_thorough : bool
            Serve more requests.
        """
        if is_thorough:
            num_requests = int(np.clip(_THOROUGH_TURNOVERS * clients, _THOROUGH_FEWEST, _THOROUGH_MOST))
        else:
            num_requests = int(np.clip(_TURNOVERS * clients, _FEWEST, _MOST))
        requests = self._at_load(self._requests(num_requests), load)
        limits = self._job.slo.limits
        result = self.simulate(plan, requests, is_recording=any(limit.metric == "itl" for limit in limits))
        return load_point(result, plan, load, clients, is_closed_loop=requests.concurrency > 0)

    def simulate(
        self, plan: ServingPlan, requests: RequestTable, *, is_recording: bool = False
    ) -> ServingResult:
        """Return what every request goes through.

        Raises
        ------
        InfeasiblePlanError
            If a pool's weights do not fit, or a request does not fit the cache.
        """
        return simulate_pools(
            replica_pools(plan, self._costs, float(requests.input_length.mean())),
            requests,
            link=transfer_link(self._job, plan, self._costs),
            seed=self._seed,
            is_recording=is_recording,
        )

    def _requests(self, count: int) -> RequestTable:
        if self._trace is not None:
            return first_requests(self._trace, count)
        # Few different counts, so that most loads see the very same requests.
        size = -(-count // _FEWEST) * _FEWEST
        if size not in self._drawn:
            workload = replace(self._job.workload, num_requests=size)
            self._drawn[size] = generate_requests(workload, self._seed)
        return self._drawn[size]

    def _at_load(self, requests: RequestTable, load: float) -> RequestTable:
        if self._job.workload.arrival == "closed_loop":
            return replace(requests, concurrency=int(load))
        base = self._job.workload.rate or trace_rate(requests)
        return replace(requests, arrival_time=requests.arrival_time * (base / load))


def first_requests(requests: RequestTable, count: int) -> RequestTable:
    """Return the first requests of a table; all of them where some are parts of sessions, which are never cut."""
    if count >= requests.num_requests or len(requests.successor):
        return requests
    offset = requests.segment_offset[: count + 1]
    return replace(
        requests,
        arrival_time=requests.arrival_time[:count],
        input_length=requests.input_length[:count],
        output_length=requests.output_length[:count],
        segment_offset=offset,
        segment=requests.segment[: offset[-1]] if len(offset) else requests.segment,
        final_segment=requests.final_segment[:count],
    )


def trace_rate(requests: RequestTable) -> float:
    """Return the mean requests per second of a trace; one a second where all come at once."""
    times = requests.arrival_time[requests.roots]
    span = float(times[-1] - times[0])
    return (requests.num_requests - 1) / span if span > 0.0 and requests.num_requests > 1 else 1.0


def profile_of_requests(requests: RequestTable) -> LoadProfile:
    """Return the means of a table of requests, what a warm prefix cache holds among them."""
    cached: FloatArray | None = None
    if len(requests.segment_offset):
        count = np.diff(requests.segment_offset)
        last = np.maximum(requests.segment_offset[1:] - 1, 0)
        ends = np.where(count > 0, requests.segment_end[requests.segment[last]], 0)
        cached = np.minimum(ends, requests.input_length).astype(np.float64)
    return load_profile(
        requests.input_length.astype(np.float64), requests.output_length.astype(np.float64), cached
    )


def load_point(
    result: ServingResult, plan: ServingPlan, load: float, clients: float, *, is_closed_loop: bool
) -> LoadPoint:
    """Return the figures of a simulation, without the requests that met an empty or a draining system."""
    order = np.argsort(result.arrival_time, kind="stable")
    count = len(order)
    first = int(min(_WARM_UP * clients, count / 3))
    last = count - int(min(_DRAIN * clients, count / 3))
    kept = order[first:last]
    arrivals, finished = result.arrival_time[order], np.sort(result.finish_time)
    begin, end = float(arrivals[first]), float(arrivals[last - 1])
    num_finished = int(np.searchsorted(finished, end) - np.searchsorted(finished, begin))
    needed = _STEADY_SHARE * len(kept) - 2.0 * np.sqrt(2.0 * len(kept))
    rate = num_finished / (end - begin) if end > begin else 0.0
    is_stable = is_closed_loop or num_finished >= needed
    if is_closed_loop:
        # Little's law: every client has a request under way. Requests that finish in step would make a count of a window
        # depend on where it begins.
        rate = load / float((result.finish_time - result.arrival_time)[kept].mean())
    elif is_stable:
        # What goes out is what comes in; the count of a window only adds chance.
        rate = load
    middle = (begin + end) / 2.0
    under_way = float(
        np.searchsorted(arrivals, middle, side="right") - np.searchsorted(finished, middle, side="right")
    )
    shares = zip(plan.pools, phase_shares(result, plan), strict=True)
    return LoadPoint(
        load=load,
        rate=rate,
        metrics=_statistics(result, kept),
        figures={
            "output_tokens_per_second": rate * float(result.output_length.mean()),
            "requests_under_way": under_way,
            **{
                f"{phase}_step_share_{pool.role}": share
                for pool, each in shares
                for phase, share in zip(("prompt", "decode"), each, strict=True)
            },
            "preemptions_per_request": float(result.num_preemptions[kept].mean()),
            "cached_prompt_share": float(result.cached_tokens[kept].sum() / result.input_length[kept].sum()),
        },
        is_stable=is_stable,
    )


def phase_shares(result: ServingResult, plan: ServingPlan) -> tuple[tuple[float, float], ...]:
    """Return, by pool, the shares of its GPUs' time in steps that hold prompt tokens and in steps of decoding alone."""
    duration = float(result.finish_time.max() - result.arrival_time.min())
    shares, first = [], 0
    for pool in plan.pools:
        # The micro-batches of a pipeline are engines that share their GPUs.
        count = pool.num_replicas * pool.attention_dp * pool.pp
        engines = slice(first, first + count)
        first += count
        prompts = float(result.prompt_step_time[engines].sum()) / (duration * count)
        decodes = float(result.decode_step_time[engines].sum()) / (duration * count)
        total = max(1.0, prompts + decodes)
        shares.append((prompts / total, decodes / total))
    return tuple(shares)


def _statistics(result: ServingResult, kept: IntArray) -> dict[str, float]:
    """Return every statistic of every metric over the requests kept, ``ttft_p99`` and so on [s].

    Gaps between tokens are over all requests; their percentiles are there only where steps were recorded.
    """
    each = request_metrics(result)
    statistics = {}
    for name in ("ttft", "tpot", "e2e"):
        values = getattr(each, name)[kept]
        values = values[~np.isnan(values)]
        marks = (
            np.percentile(values, list(_STATISTICS.values())) if len(values) else np.zeros(len(_STATISTICS))
        )
        statistics[f"{name}_mean"] = float(values.mean()) if len(values) else 0.0
        statistics |= {f"{name}_{word}": float(mark) for word, mark in zip(_STATISTICS, marks, strict=True)}
    if result.steps is not None:
        gaps = summarize(result).itl
        statistics |= {f"itl_{word}": getattr(gaps, word) for word in ("mean", *_STATISTICS)}
    return statistics
