"""What users and operators of a deployment measure, each defined here and nowhere else.

- TTFT, time to first token: from sending a request to seeing its first token.
- TPOT, time per output token: from the first token to the last, over the tokens after the first; requests of one
  token have none.
- ITL, inter-token latency: one gap between two arrivals of tokens; a speculative step's tokens arrive together.
- E2E: from sending a request to seeing its last token. Queueing: from sending it to the first step that holds it.
- Goodput: requests per second that keep every limit of the SLO themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.domain.serving import Slo, SloLimit
from meshwright.simcore.serving.simulate import ServingResult, StepRecord

__all__ = [
    "MetricStatistics",
    "RequestMetrics",
    "ServingMetrics",
    "TtftSplit",
    "dollars_per_million_tokens",
    "joules_per_million_tokens",
    "request_metrics",
    "slo_violations",
    "summarize",
]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricStatistics:
    """Mean and percentiles of one metric; NaN where nothing was measured [s]."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TtftSplit:
    """Means of the parts of TTFT, which add up to it [s].

    Parameters
    ----------
    queue : float
        Until the first step that holds the request, the front end included.
    prefill : float
        What the prompt takes on an engine with nothing else to do.
    transfer : float
        Of the KV cache to the decode pool.
    interference : float
        The rest: sharing steps with other requests, recomputation, the way of the token to the client.
    """

    queue: float
    prefill: float
    transfer: float
    interference: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestMetrics:
    """Metrics of every request, ``(num_requests,)`` [s]; TPOT and the longest gap of requests of one token are NaN.

    ``longest_gap`` is None unless steps were recorded.
    """

    ttft: FloatArray
    tpot: FloatArray
    e2e: FloatArray
    queue: FloatArray
    prefill: FloatArray
    transfer: FloatArray
    interference: FloatArray
    longest_gap: FloatArray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMetrics:
    """Summary of a run.

    Parameters
    ----------
    ttft, tpot, e2e, queue : MetricStatistics
        Over requests.
    itl : MetricStatistics
        Over tokens; percentiles are NaN unless steps were recorded.
    ttft_split : TtftSplit
        Where TTFT goes.
    duration : float
        From the first sending to the last token [s].
    requests_per_second, input_tokens_per_second, output_tokens_per_second : float
        Over ``duration`` [1/s].
    output_tokens_per_second_per_gpu : float
        Over all GPUs [1/s].
    goodput : float
        Requests per second that keep every limit of the SLO; all of them without one [1/s].
    good_share : float
        Share of requests that do.
    num_preemptions : int
        Times a request lost its KV cache.
    cached_share : float
        Prompt tokens found in the prefix cache, over all prompt tokens.
    """

    ttft: MetricStatistics
    tpot: MetricStatistics
    e2e: MetricStatistics
    queue: MetricStatistics
    itl: MetricStatistics
    ttft_split: TtftSplit
    duration: float
    requests_per_second: float
    input_tokens_per_second: float
    output_tokens_per_second: float
    output_tokens_per_second_per_gpu: float
    goodput: float
    good_share: float
    num_preemptions: int
    cached_share: float

    def statistic(self, limit: SloLimit) -> float:
        """Return the measured value that a limit bounds [s]."""
        statistics: MetricStatistics = getattr(self, limit.metric)
        value: float = getattr(statistics, limit.statistic)
        return value


def request_metrics(result: ServingResult) -> RequestMetrics:
    """Return the metrics of every request of a run."""
    ttft = result.first_token_time - result.arrival_time
    queue = result.scheduled_time - result.arrival_time
    prefill = np.minimum(result.prefill_time, result.prefill_end_time - result.scheduled_time)
    left = result.output_length - 1
    decode = result.finish_time - result.first_token_time
    tpot = np.where(left > 0, decode / np.maximum(left, 1), np.nan)
    return RequestMetrics(
        ttft=ttft,
        tpot=tpot,
        e2e=result.finish_time - result.arrival_time,
        queue=queue,
        prefill=prefill,
        transfer=result.transfer_time,
        interference=ttft - queue - prefill - result.transfer_time,
        longest_gap=None if result.steps is None else _longest_gaps(result, result.steps),
    )


def summarize(result: ServingResult, *, num_gpus: int = 1, slo: Slo | None = None) -> ServingMetrics:
    """Return the summary of a run.

    Parameters
    ----------
    result : ServingResult
        The run.
    num_gpus : int
        GPUs of the deployment.
    slo : Slo | None
        Limits that goodput counts by.

    Raises
    ------
    SpecError
        If a limit bounds ITL by request and no steps were recorded.
    """
    each = request_metrics(result)
    duration = float(result.finish_time.max() - result.arrival_time.min())
    good = _good_requests(each, slo) if slo is not None else np.ones(result.num_requests, dtype=np.bool_)
    output_rate = float(result.output_length.sum()) / duration
    return ServingMetrics(
        ttft=_statistics(each.ttft),
        tpot=_statistics(each.tpot[~np.isnan(each.tpot)]),
        e2e=_statistics(each.e2e),
        queue=_statistics(each.queue),
        itl=_itl(result),
        ttft_split=TtftSplit(
            queue=float(each.queue.mean()),
            prefill=float(each.prefill.mean()),
            transfer=float(each.transfer.mean()),
            interference=float(each.interference.mean()),
        ),
        duration=duration,
        requests_per_second=result.num_requests / duration,
        input_tokens_per_second=float(result.input_length.sum()) / duration,
        output_tokens_per_second=output_rate,
        output_tokens_per_second_per_gpu=output_rate / num_gpus,
        goodput=float(good.sum()) / duration,
        good_share=float(good.mean()),
        num_preemptions=int(result.num_preemptions.sum()),
        cached_share=float(result.cached_tokens.sum() / result.input_length.sum()),
    )


def slo_violations(metrics: ServingMetrics, slo: Slo) -> tuple[tuple[SloLimit, float], ...]:
    """Return the limits that a run does not keep, each with how many times over it is, the worst first.

    Raises
    ------
    SpecError
        If a percentile of ITL is limited and no steps were recorded.
    """
    over = []
    for limit in slo.limits:
        value = metrics.statistic(limit)
        if np.isnan(value) and limit.metric == "itl":
            raise SpecError(f"slo.{limit.name}: record the steps of the simulation to measure it")
        if value > limit.seconds:
            over.append((limit, value / limit.seconds))
    return tuple(sorted(over, key=lambda pair: -pair[1]))


def dollars_per_million_tokens(output_tokens_per_second: float, dollars_per_hour: float) -> float:
    """Return the price of a million output tokens of a deployment that costs so much an hour [$]."""
    return dollars_per_hour / 3600.0 / output_tokens_per_second * 1e6


def joules_per_million_tokens(
    result: ServingResult, *, prompt_watts: float, decode_watts: float, idle_watts: float
) -> float:
    """Return the energy of a million output tokens [J], from the power of one engine's GPUs in each phase.

    Steps that hold prompt tokens run at ``prompt_watts``, steps of decoding alone at ``decode_watts`` [W].
    """
    duration = float(result.finish_time.max() - result.arrival_time.min())
    idle = duration - result.prompt_step_time - result.decode_step_time
    joules = (
        prompt_watts * result.prompt_step_time.sum()
        + decode_watts * result.decode_step_time.sum()
        + idle_watts * np.maximum(idle, 0.0).sum()
    )
    return float(joules / result.output_length.sum() * 1e6)


def _statistics(values: FloatArray) -> MetricStatistics:
    if not len(values):
        nan = float("nan")
        return MetricStatistics(mean=nan, p50=nan, p90=nan, p95=nan, p99=nan)
    marks = np.percentile(values, (50, 90, 95, 99))
    return MetricStatistics(
        mean=float(values.mean()),
        p50=float(marks[0]),
        p90=float(marks[1]),
        p95=float(marks[2]),
        p99=float(marks[3]),
    )


def _good_requests(each: RequestMetrics, slo: Slo) -> NDArray[np.bool_]:
    good = np.ones(len(each.ttft), dtype=np.bool_)
    for limit in slo.limits:
        values = each.longest_gap if limit.metric == "itl" else getattr(each, limit.metric)
        if values is None:
            raise SpecError(f"slo.{limit.name}: record the steps of the simulation to measure it")
        # A request of one token has no gap to be too long.
        good &= ~(values > limit.seconds)
    return good


def _itl(result: ServingResult) -> MetricStatistics:
    decode = result.finish_time - result.first_token_time
    num_gaps = int((result.output_length - 1).sum())
    mean = float(decode.sum()) / num_gaps if num_gaps else float("nan")
    marks = np.full(4, np.nan)
    if result.steps is not None and num_gaps:
        gaps, weights = _token_gaps(result.steps)
        order = np.argsort(gaps, kind="stable")
        seen = np.cumsum(weights[order])
        rows = np.searchsorted(seen, np.array([0.5, 0.9, 0.95, 0.99]) * seen[-1])
        marks = gaps[order][np.minimum(rows, len(gaps) - 1)]
    return MetricStatistics(
        mean=mean, p50=float(marks[0]), p90=float(marks[1]), p95=float(marks[2]), p99=float(marks[3])
    )


def _by_engine(steps: StepRecord) -> tuple[NDArray[np.intp], FloatArray, NDArray[np.bool_]]:
    """Return the order of steps by engine and end, the gap before each decode, and which steps decode.

    A sequence that decodes had its last token in its engine's decode step before, steps of prompts alone between
    them included; where the engine slept since, the gap is the step itself.
    """
    order = np.lexsort((steps.end, steps.engine))
    start, end, engine = steps.start[order], steps.end[order], steps.engine[order]
    is_decode = steps.num_decodes[order] > 0
    is_resting = np.ones(len(order), dtype=np.bool_)
    is_resting[1:] = (engine[1:] != engine[:-1]) | (start[1:] > end[:-1])
    index = np.arange(len(order))
    rest = np.maximum.accumulate(np.where(is_resting, index, 0))
    last = np.maximum.accumulate(np.where(is_decode, index, -1))
    previous = np.append(-1, last[:-1])
    begin = np.where(previous >= rest, end[np.maximum(previous, 0)], start)
    return order, np.where(is_decode, end - begin, 0.0), is_decode


def _token_gaps(steps: StepRecord) -> tuple[FloatArray, FloatArray]:
    """Return gaps between tokens and how many sequences had each."""
    order, gap, is_decode = _by_engine(steps)
    end, engine = steps.end[order], steps.engine[order]
    decodes = steps.num_decodes[order].astype(np.float64)
    # First tokens of steps without decoding wait for the next decode step from their own step's end.
    firsts = np.where(is_decode, 0, steps.num_first_tokens[order])
    count = len(order)
    following = np.minimum.accumulate(np.where(is_decode, np.arange(count), count)[::-1])[::-1]
    fresh = np.flatnonzero((firsts > 0) & (following < count))
    fresh = fresh[engine[following[fresh]] == engine[fresh]]
    np.subtract.at(decodes, following[fresh], firsts[fresh])
    decodes = np.where(is_decode, np.maximum(decodes, 0.0), 0.0)
    gaps = np.concatenate([gap, end[following[fresh]] - end[fresh]])
    return gaps, np.concatenate([decodes, firsts[fresh].astype(np.float64)])


def _longest_gaps(result: ServingResult, steps: StepRecord) -> FloatArray:
    """Return each request's longest gap: to its second token, then the longest of its engine while it decoded."""
    order, gap, is_decode = _by_engine(steps)
    # Steps without decoding bring no token.
    order, gap = order[is_decode], gap[is_decode]
    end, engine = steps.end[order], steps.engine[order]
    longest = np.full(result.num_requests, np.nan)
    bounds = np.searchsorted(engine, np.arange(int(result.engine.max()) + 2))
    for number in range(len(bounds) - 1):
        part = slice(bounds[number], bounds[number + 1])
        rows = np.flatnonzero((result.engine == number) & (result.output_length > 1))
        low = np.searchsorted(end[part], result.first_token_time[rows], side="right")
        high = np.searchsorted(end[part], result.finish_time[rows], side="right")
        has_gap = low < high
        rows, low, high = rows[has_gap], low[has_gap], high[has_gap]
        if not len(rows):
            continue
        first = end[part][low] - result.first_token_time[rows]
        # Two zeros past the end keep every pair of bounds valid and ascending.
        later = np.append(gap[part], (0.0, 0.0))
        pairs = np.stack([low + 1, np.maximum(high, low + 2)], axis=1).ravel()
        rest = np.maximum.reduceat(later, pairs)[::2]
        longest[rows] = np.maximum(first, np.where(high > low + 1, rest, 0.0))
    return longest
