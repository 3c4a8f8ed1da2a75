"""Random engines under random loads: what must hold whatever the settings."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from serving_deployments import FIELDS, LINK, behaviour, step_table, workload

from meshwright.simcore.domain.serving import POLICIES, ROUTERS, LengthDistribution
from meshwright.simcore.domain.speculation import Acceptance
from meshwright.simcore.serving.behaviour import EngineBehaviour
from meshwright.simcore.serving.metrics import request_metrics
from meshwright.simcore.serving.pool import ReplicaPool
from meshwright.simcore.serving.requests import RequestTable, generate_requests
from meshwright.simcore.serving.simulate import simulate_pools

MARKS = ("arrival_time", "scheduled_time", "prefill_end_time", "first_token_time", "finish_time")


def random_requests(generator: np.random.Generator) -> RequestTable:
    arrival = generator.choice(["poisson", "gamma", "closed_loop"])
    kinds = ["fixed", "lognormal", "uniform_ratio"]
    load = workload(
        arrival=arrival,
        rate=10 ** generator.uniform(-0.5, 3.0),
        concurrency=int(generator.integers(1, 30)),
        num_requests=int(generator.integers(1, 100)),
        num_turns=int(generator.choice([1, 1, 2, 4])),
        prefix_length=int(generator.choice([0, 0, 30, 200])),
        num_prefix_groups=2,
        input_length=LengthDistribution(
            mean=generator.uniform(1, 400), kind=generator.choice(kinds), ratio=0.5
        ),
        output_length=LengthDistribution(
            mean=generator.uniform(1, 120), kind=generator.choice(kinds), ratio=0.2
        ),
    )
    return generate_requests(load, int(generator.integers(1000)))


def random_engine(
    generator: np.random.Generator, policies: list[str], block_size: int, blocks: int
) -> EngineBehaviour:
    def of(*values: float) -> float:
        return float(generator.choice(values))

    return behaviour(
        policy=str(generator.choice(policies)),
        max_num_sequences=int(generator.integers(1, 12)),
        max_num_batched_tokens=int(of(16, 64, 256, 4096)),
        block_size=block_size,
        num_kv_blocks=blocks + int(of(0, 1, 5, 50, 1000)),
        watermark=of(0, 0.05),
        overlaps_steps=bool(of(0, 1)),
        serial_time_per_request=of(0, 0.003),
        fixed_time_per_request=of(0, 0.01),
        stream_time_per_token=of(0, 0, 1e-4, 0.002),
        burst_spread=of(0, 0.01),
        prompt_wait_steps=int(of(0, 0, 3, 20)),
        num_speculative_tokens=int(of(0, 0, 1, 4)),
        acceptance=Acceptance(rate=of(0, 0.5, 0.9, 1)),
        has_prefix_cache=bool(of(0, 1)),
        cached_prompt_share=of(0, 0.4, 1),
        attention_dp=int(of(1, 1, 1, 3)),
        pipeline_stages=int(of(1, 1, 1, 2)),
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_deployments_are_sound_and_skipping_changes_nothing(seed: int) -> None:
    generator = np.random.default_rng(seed)
    requests = random_requests(generator)
    block_size = int(generator.choice([1, 4, 16, 64]))
    blocks = int((-(-(requests.input_length + requests.output_length) // block_size)).max())
    table = step_table(is_host_hidden=bool(seed % 2), stage_share=generator.uniform(0.4, 1.0))
    roles = ("aggregated",) if generator.random() < 0.6 else ("prefill", "decode")
    policies = [policy for policy in POLICIES if policy != "static" or len(roles) == 1]
    pools = tuple(
        ReplicaPool(
            table=table,
            behaviour=random_engine(generator, policies, block_size, blocks),
            num_replicas=int(generator.choice([1, 2, 5])),
            role=role,  # type: ignore[arg-type]  # one of the literals above
            router=str(generator.choice(ROUTERS)),  # type: ignore[arg-type]  # likewise
        )
        for role in roles
    )
    result = simulate_pools(pools, requests, link=LINK)
    stepwise = simulate_pools(pools, requests, link=LINK, is_skipping=False)
    recorded = simulate_pools(pools, requests, link=LINK, is_recording=True)
    for other in (stepwise, recorded):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(result, field), getattr(other, field), field)
    for earlier, later in pairwise(MARKS):
        assert np.all(getattr(result, earlier) <= getattr(result, later)), (earlier, later)
    each = request_metrics(result)
    for part in (each.queue, each.prefill, each.transfer, each.interference):
        assert part.min() > -1e-9
    assert recorded.steps is not None
    if all(pool.behaviour.num_speculative_tokens == 0 for pool in pools):
        emitted = recorded.steps.num_decodes.sum() + recorded.steps.num_first_tokens.sum()
        assert emitted == requests.output_length.sum()
    if result.num_preemptions.sum() == 0:
        computed = recorded.steps.prompt_tokens.sum()
        assert computed == (requests.input_length - result.cached_tokens).sum()
