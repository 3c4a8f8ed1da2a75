"""Metrics of runs small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest
from serving_deployments import LINK, behaviour, split_pools, step_table, table_of, workload

from meshwright.errors import SpecError
from meshwright.simcore.domain.serving import POLICIES, Slo, SloLimit
from meshwright.simcore.serving.metrics import (
    dollars_per_million_tokens,
    joules_per_million_tokens,
    request_metrics,
    slo_violations,
    summarize,
)
from meshwright.simcore.serving.requests import generate_requests
from meshwright.simcore.serving.simulate import ServingResult, StepRecord, simulate, simulate_pools


def result(steps: StepRecord | None = None) -> ServingResult:
    """Return two requests: one of 3 tokens seen at 1, 2 and 4 s, one of a single token."""
    return ServingResult(
        arrival_time=np.array([0.0, 1.0]),
        scheduled_time=np.array([0.25, 2.0]),
        prefill_end_time=np.array([0.75, 4.0]),
        first_token_time=np.array([1.0, 4.0]),
        finish_time=np.array([4.0, 4.0]),
        transfer_time=np.array([0.125, 0.0]),
        prefill_time=np.array([0.375, 3.0]),
        input_length=np.array([100, 300]),
        output_length=np.array([3, 1]),
        cached_tokens=np.array([40, 0]),
        num_preemptions=np.array([1, 0]),
        engine=np.array([0, 0]),
        replica=np.array([0, 0]),
        prefill_engine=np.array([0, 0]),
        prefill_replica=np.array([0, 0]),
        prompt_step_time=np.array([2.5]),
        decode_step_time=np.array([1.0]),
        num_steps=3,
        steps=steps,
    )


STEPS = StepRecord(
    start=np.array([0.0, 1.0, 2.0]),
    end=np.array([1.0, 2.0, 4.0]),
    engine=np.array([0, 0, 0]),
    num_decodes=np.array([0, 1, 1]),
    prompt_tokens=np.array([100, 0, 300]),
    num_first_tokens=np.array([1, 0, 1]),
)


def limits(**seconds: float) -> Slo:
    made = []
    for name, value in seconds.items():
        metric, statistic = name.split("_")
        made.append(SloLimit(metric=metric, statistic=statistic, seconds=value))  # type: ignore[arg-type]
    return Slo(limits=tuple(made))


def test_metrics_follow_their_definitions() -> None:
    each = request_metrics(result(STEPS))
    np.testing.assert_allclose(each.ttft, [1.0, 3.0])
    np.testing.assert_allclose(each.tpot, [1.5, np.nan])
    np.testing.assert_allclose(each.e2e, [4.0, 3.0])
    np.testing.assert_allclose(each.queue, [0.25, 1.0])
    np.testing.assert_allclose(each.prefill, [0.375, 2.0])
    np.testing.assert_allclose(each.interference, [0.25, 0.0])
    assert each.longest_gap is not None
    np.testing.assert_allclose(each.longest_gap, [2.0, np.nan])
    metrics = summarize(result(STEPS), num_gpus=2)
    assert metrics.duration == 4.0
    assert metrics.requests_per_second == 0.5
    assert metrics.output_tokens_per_second == 1.0
    assert metrics.output_tokens_per_second_per_gpu == 0.5
    assert metrics.input_tokens_per_second == 100.0
    assert metrics.cached_share == 0.1
    assert metrics.num_preemptions == 1
    assert metrics.itl.mean == 1.5
    assert (metrics.itl.p50, metrics.itl.p99) == (1.0, 2.0)
    assert metrics.ttft.p50 == 2.0
    split = metrics.ttft_split
    assert split.queue + split.prefill + split.transfer + split.interference == pytest.approx(
        metrics.ttft.mean
    )


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    assert summarize(result(), slo=limits(ttft_p99=1.5)).good_share == 0.5
    assert summarize(result(), slo=limits(ttft_p99=1.5, tpot_p50=1.0)).goodput == 0.0
    assert summarize(result(), slo=limits(tpot_p50=1.5)).goodput == 0.5
    assert summarize(result(STEPS), slo=limits(itl_p99=1.5)).good_share == 0.5
    with pytest.raises(SpecError, match="record the steps"):
        summarize(result(), slo=limits(itl_p99=1.0))


def test_violations_name_the_limit_that_is_missed_most() -> None:
    slo = limits(ttft_mean=1.0, tpot_p50=0.5, e2e_p99=9.0)
    missed = slo_violations(summarize(result()), slo)
    assert [(limit.name, times) for limit, times in missed] == [("tpot_p50", 3.0), ("ttft_mean", 2.0)]
    with pytest.raises(SpecError, match="record the steps"):
        slo_violations(summarize(result()), limits(itl_p50=1.0))


def test_prices_and_energy_are_of_output_tokens() -> None:
    assert dollars_per_million_tokens(1000.0, 3.6) == pytest.approx(1.0)
    joules = joules_per_million_tokens(result(), prompt_watts=700.0, decode_watts=400.0, idle_watts=100.0)
    assert joules == pytest.approx((2.5 * 700 + 400 + 0.5 * 100) / 4 * 1e6)


@pytest.mark.parametrize("policy", POLICIES)
def test_gaps_of_recorded_steps_are_those_of_the_tokens(policy: str) -> None:
    requests = generate_requests(workload(), 2)
    run = simulate(
        step_table(),
        behaviour(policy=policy, num_kv_blocks=2000),
        requests,
        num_replicas=2,
        is_recording=True,
    )
    metrics, each = summarize(run), request_metrics(run)
    assert run.num_preemptions.sum() == 0
    assert each.longest_gap is not None
    has_more = requests.output_length > 1
    assert np.all(each.longest_gap[has_more] >= each.tpot[has_more] * (1 - 1e-9))
    assert metrics.itl.p50 <= metrics.itl.p99 <= np.nanmax(each.longest_gap) * (1 + 1e-9)
    # The mean over recorded gaps is the mean over requests' own spans.
    from meshwright.simcore.serving.metrics import _token_gaps

    assert run.steps is not None
    gaps, weights = _token_gaps(run.steps)
    assert weights.sum() == (requests.output_length - 1).sum()
    assert (gaps * weights).sum() / weights.sum() == pytest.approx(metrics.itl.mean, rel=1e-9)


def test_the_parts_of_ttft_are_never_negative() -> None:
    requests = generate_requests(workload(rate=3.0), 2)
    run = simulate_pools(split_pools(behaviour(), behaviour()), requests, link=LINK)
    each = request_metrics(run)
    for part in (each.queue, each.prefill, each.transfer, each.interference):
        assert part.min() > -1e-9
    alone = request_metrics(simulate(step_table(), behaviour(), table_of((0.0, 300, 5))))
    assert alone.interference[0] == pytest.approx(0.0, abs=1e-12)
    assert alone.queue[0] == 0.0
