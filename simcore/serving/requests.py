"""Requests to serve: their arrays, and seeded generators of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.domain.serving import LengthDistribution, ServingWorkload

__all__ = ["RequestTable", "arrival_times", "closed_loop_requests", "generate_requests", "sample_lengths"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def _no_ints() -> IntArray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTable:
    """Requests as arrays, one entry each.

    A request is sent at its ``arrival_time``; or, where another names it as its successor, ``think_time`` after
    that one's last token; or, in a closed loop, when a client is free.

    Parameters
    ----------
    arrival_time : NDArray[np.float64]
        When a request is sent, ascending over those that are no successors, ``(num_requests,)`` [s]; ignored for
        successors and in a closed loop.
    input_length, output_length : NDArray[np.int64]
        Prompt and answer, ``(num_requests,)`` [tokens].
    concurrency : int
        Clients of a closed loop: each sends the next request, in order, when its last one is answered. 0 for none.
    successor : NDArray[np.int64]
        Request that follows in a session, or -1; empty for no sessions.
    think_time : NDArray[np.float64]
        Of a successor, between the last token before it and its sending [s]; empty for none.
    segment_offset, segment : NDArray[np.int64]
        Prompt parts that several requests share: request ``i`` begins with the segments
        ``segment[segment_offset[i]:segment_offset[i + 1]]``, one after the other. Empty for none. A segment is
        known by all before it too: the same id has the same predecessors everywhere.
    segment_end : NDArray[np.int64]
        Tokens from the start of the prompt to the end of each segment.
    final_segment : NDArray[np.int64]
        Segment that a request's whole prompt and answer become for later turns, or -1; empty for none.
    num_failed : int
        Recorded requests that failed and were left out.
    """

    arrival_time: FloatArray
    input_length: IntArray
    output_length: IntArray
    concurrency: int = 0
    successor: IntArray = field(default_factory=_no_ints)
    think_time: FloatArray = field(default_factory=lambda: np.zeros(0))
    segment_offset: IntArray = field(default_factory=_no_ints)
    segment: IntArray = field(default_factory=_no_ints)
    segment_end: IntArray = field(default_factory=_no_ints)
    final_segment: IntArray = field(default_factory=_no_ints)
    num_failed: int = 0

    def __post_init__(self) -> None:
        count = len(self.input_length)
        if count == 0:
            raise SpecError("requests: the table is empty; give at least one request")
        for name, size in (
            ("arrival_time", count),
            ("output_length", count),
            ("successor", count),
            ("think_time", count),
            ("final_segment", count),
            ("segment_offset", count + 1),
        ):
            if len(getattr(self, name)) not in (size, 0) or (
                name in ("arrival_time", "output_length") and len(getattr(self, name)) != size
            ):
                raise SpecError(f"requests: {name} must have {size} entries, not {len(getattr(self, name))}")
        for name in ("input_length", "output_length"):
            lengths = getattr(self, name)
            if lengths.min() < 1:
                row = int(np.argmin(lengths))
                raise SpecError(
                    f"requests: {name} of request {row} must be at least 1 token, not {lengths[row]}"
                )
        if self.concurrency < 0:
            raise SpecError(f"requests: concurrency must not be below 0, nor {self.concurrency}")
        if self.concurrency == 0:
            times = self.arrival_time[self.roots]
            if not np.isfinite(times).all() or times.min() < 0.0:
                raise SpecError("requests: arrival times must be finite and not negative")
            if np.any(np.diff(times) < 0.0):
                row = int(self.roots[int(np.argmax(np.diff(times) < 0.0)) + 1])
                raise SpecError(
                    f"requests: arrival times must ascend; request {row} comes before the last one"
                )

    @property
    def num_requests(self) -> int:
        """Requests of the table."""
        return len(self.input_length)

    @property
    def roots(self) -> IntArray:
        """Requests that are no successors, in order."""
        is_root = np.ones(len(self.input_length), dtype=np.bool_)
        is_root[self.successor[self.successor >= 0]] = False
        return np.flatnonzero(is_root)


def sample_lengths(distribution: LengthDistribution, count: int, generator: np.random.Generator) -> IntArray:
    """Return ``count`` lengths of a distribution, each at least 1 [tokens]."""
    mean = distribution.mean
    if distribution.kind == "fixed":
        return np.full(count, round(mean), dtype=np.int64)
    if distribution.kind == "uniform_ratio":
        lowest = max(1, int(distribution.ratio * mean))
        return generator.integers(lowest, max(lowest, round(mean)) + 1, size=count)
    variance = np.log1p(distribution.coefficient_of_variation**2)
    lengths = generator.lognormal(np.log(mean) - variance / 2.0, np.sqrt(variance), size=count)
    return np.maximum(np.rint(lengths), 1.0).astype(np.int64)


def closed_loop_requests(
    *,
    concurrency: int,
    num_requests: int,
    input_length: int,
    output_length: int,
    ratio: float = 1.0,
    seed: int = 0,
) -> RequestTable:
    """Return the requests of a benchmark with a fixed number of clients.

    Lengths are uniform between ``ratio`` times the nominal length and the nominal length.
    """
    workload = ServingWorkload(
        arrival="closed_loop",
        concurrency=concurrency,
        num_requests=num_requests,
        input_length=LengthDistribution(mean=input_length, kind="uniform_ratio", ratio=ratio),
        output_length=LengthDistribution(mean=output_length, kind="uniform_ratio", ratio=ratio),
    )
    return generate_requests(workload, seed)


def generate_requests(workload: ServingWorkload, seed: int = 0) -> RequestTable:
    """Return the requests of a synthetic workload; equal seeds give equal requests.

    Sessions of ``num_turns`` requests start as the arrival says; a turn's prompt is everything said before plus a
    new prompt. ``num_requests`` counts turns; the last session may be cut.

    Raises
    ------
    SpecError
        If the workload is a trace, which :func:`meshwright.simcore.serving.traces.load_requests` reads.
    """
    if workload.input_length is None or workload.output_length is None or workload.arrival == "trace":
        raise SpecError("workload: a trace is read from its file, it is not generated")
    generator = np.random.default_rng(seed)
    count, turns = workload.num_requests, workload.num_turns
    inputs = sample_lengths(workload.input_length, count, generator)
    outputs = sample_lengths(workload.output_length, count, generator)
    num_sessions = -(-count // turns)
    times = arrival_times(workload, num_sessions, generator)
    arrival = np.zeros(count)
    arrival[::turns] = times
    concurrency = workload.concurrency if workload.arrival == "closed_loop" else 0
    prefix = workload.prefix_length
    if turns == 1 and prefix == 0:
        return RequestTable(
            arrival_time=arrival, input_length=inputs, output_length=outputs, concurrency=concurrency
        )
    group = np.repeat(generator.integers(0, workload.num_prefix_groups, size=num_sessions), turns)[:count]
    return _with_sessions(arrival, inputs, outputs, concurrency, turns, prefix, group)


def arrival_times(workload: ServingWorkload, count: int, generator: np.random.Generator) -> FloatArray:
    """Return the times at which ``count`` sessions of a synthetic workload start, zeros in a closed loop [s]."""
    if workload.arrival == "closed_loop":
        return np.zeros(count)
    # The rate is of requests, not of the sessions they come in.
    gap = workload.num_turns / workload.rate
    if workload.arrival == "poisson":
        return np.cumsum(generator.exponential(gap, size=count))
    shape = workload.burstiness**-2
    return np.cumsum(generator.gamma(shape, gap / shape, size=count))


def _with_sessions(
    arrival: FloatArray,
    inputs: IntArray,
    outputs: IntArray,
    concurrency: int,
    turns: int,
    prefix: int,
    group: IntArray,
) -> RequestTable:
    """Make prompts of what their sessions hold so far, and name the parts they share."""
    count = len(inputs)
    index = np.arange(count)
    turn = index % turns
    has_next = (turn < turns - 1) & (index + 1 < count)
    # A prompt never is shorter than the prefix it begins with and one token of its own.
    inputs = np.where(turn == 0, np.maximum(inputs, prefix + 1 if prefix else 1), inputs)
    said = np.cumsum(inputs + outputs)
    before_session = np.repeat(said[::turns] - (inputs + outputs)[::turns], turns)[:count]
    ends = said - before_session
    prompts = ends - outputs
    num_groups = int(group.max()) + 1 if prefix else 0
    own = turn + (1 if prefix else 0)
    offset = np.concatenate([[0], np.cumsum(own)])
    place = np.arange(offset[-1]) - np.repeat(offset[:-1], own)
    owner = np.repeat(index, own)
    earlier = place - (1 if prefix else 0)
    segment = np.where(earlier < 0, group[owner], num_groups + owner - turn[owner] + earlier)
    return RequestTable(
        arrival_time=arrival,
        input_length=prompts,
        output_length=outputs,
        concurrency=concurrency,
        successor=np.where(has_next, index + 1, -1),
        think_time=np.zeros(count),
        segment_offset=offset,
        segment=segment,
        # What a turn leaves in the cache lacks its last token, whose keys and values are never computed.
        segment_end=np.concatenate([np.full(num_groups, prefix, dtype=np.int64), ends - 1]),
        final_segment=np.where(has_next, num_groups + index, -1),
    )
