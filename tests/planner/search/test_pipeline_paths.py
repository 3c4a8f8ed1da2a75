from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from meshwright.planner.search.pipeline_paths import PipelinePaths
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import iteration_time


def random_costs(rng: np.random.Generator, num_stages: int, num_micro_batches: int) -> IterationCosts:
    send = rng.uniform(0.0, 0.3, num_stages) * rng.integers(0, 2)
    send[-1] = 0.0
    nothing = np.zeros(num_stages)
    return IterationCosts(
        num_stages=num_stages,
        num_chunks=1,
        num_micro_batches=num_micro_batches,
        forward_time=rng.uniform(0.5, 1.5, num_stages),
        backward_time=rng.uniform(0.5, 3.0, num_stages),
        weight_gradient_time=nothing,
        forward_communication_time=nothing,
        backward_communication_time=nothing,
        send_time=send,
        is_send_blocking=bool(rng.integers(2)),
        gradient_reduce_time=rng.uniform(0.0, 2.0, num_stages),
        gradient_reduce_overlap=float(rng.uniform()),
        parameter_gather_time=rng.uniform(0.0, 1.0, num_stages),
        parameter_gather_overlap=float(rng.uniform()),
        optimizer_time=rng.uniform(0.0, 0.5, num_stages),
        fixed_time=0.25,
    )


def stage_costs(costs: IterationCosts) -> NDArray[np.float64]:
    return np.column_stack(
        [
            costs.forward_time,
            costs.backward_time,
            costs.gradient_reduce_time,
            costs.parameter_gather_time,
            costs.optimizer_time,
        ]
    )


def path_bound(costs: IterationCosts) -> float:
    paths, stages = PipelinePaths(costs), stage_costs(costs)
    own = [
        [float(stage @ path.weights) for path in per_stage]
        for stage, per_stage in zip(stages, paths.stages, strict=True)
    ]
    return paths.bound(own, float(stages[0] @ paths.once_weights), stages @ paths.way_weights)


@pytest.mark.parametrize("seed", range(300))
def test_no_path_is_longer_than_the_simulated_iteration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_stages = int(rng.integers(1, 7))
    costs = random_costs(rng, num_stages, int(rng.integers(1, 13)))
    seconds = iteration_time(costs, "1f1b" if num_stages > 1 else "none")
    assert path_bound(costs) <= seconds * (1 + 1e-12)


@pytest.mark.parametrize("slowest", range(4))
def test_the_longest_path_is_the_iteration_where_one_stage_is_slow(slowest: int) -> None:
    rng = np.random.default_rng(slowest)
    costs = random_costs(rng, 4, 16)
    costs.forward_time[:] = 1.0
    costs.backward_time[:] = 2.0
    costs.forward_time[slowest] = 1.3
    costs.backward_time[slowest] = 2.6
    for times in (costs.send_time, costs.gradient_reduce_time, costs.parameter_gather_time):
        times[:] = 0.0
    costs.optimizer_time[:] = 0.0
    # Path by path: the slow stage's micro-batches, the others once or, behind it, twice in place of its warm-up.
    behind = 3 - slowest
    expected = 16 * 3.9 + slowest * 3.0 + max(0.0, 2 * behind * 3.0 - behind * 3.9)
    assert path_bound(costs) == pytest.approx(expected + 0.25)
    assert iteration_time(costs, "1f1b") == pytest.approx(expected + 0.25)
