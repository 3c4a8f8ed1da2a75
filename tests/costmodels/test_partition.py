"""Uneven pipeline stages: the ends that make the slowest stage fastest."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.partition import balanced_ends, boundary_layers
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.simcore.domain.plan import ParallelPlan, can_partition, partition_layers, partition_with_ends
from meshwright.simcore.training.iteration import iteration_time

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]


def slowest(counts: tuple[int, ...], embedding: float, head: float) -> float:
    """Return the most a stage takes, in layers."""
    return max(counts[0] + embedding, counts[-1] + head, *counts[1:-1], 0.0)


def best_by_force(num_layers: int, stages: int, embedding: float, head: float) -> float:
    """Return the least that the slowest stage can take over all ends with an even middle."""
    inner = stages - 2
    results = []
    for first, last in product(range(num_layers + 1), repeat=2):
        rest = num_layers - first - last
        if rest < inner or (inner == 0 and rest):
            continue
        results.append(slowest(partition_with_ends(num_layers, stages, first, last), embedding, head))
    return min(results)


@settings(max_examples=300)
@given(
    num_layers=st.integers(1, 24),
    stages=st.integers(2, 12),
    embedding=st.integers(-60, 80),
    head=st.integers(0, 400),
)
def test_the_slowest_stage_is_as_fast_as_by_brute_force(
    num_layers: int, stages: int, embedding: int, head: int
) -> None:
    assume(can_partition(num_layers, stages) or stages <= num_layers + 2)
    # Twentieths of a layer: the resolution of the comparison.
    costs = embedding * 0.05, head * 0.05
    first, last = balanced_ends(num_layers, stages, *costs)
    counts = partition_with_ends(num_layers, stages, first, last)
    assert sum(counts) == num_layers
    assert len(counts) == stages
    assert all(count >= 1 for count in counts[1:-1])
    assert slowest(counts, *costs) == pytest.approx(best_by_force(num_layers, stages, *costs))


@settings(max_examples=100)
@given(
    num_layers=st.integers(2, 128),
    stages=st.integers(2, 64),
    embedding=st.floats(0.0, 4.0),
    head=st.floats(0.0, 20.0),
)
def test_it_is_never_slower_than_the_frameworks_own_split(
    num_layers: int, stages: int, embedding: float, head: float
) -> None:
    assume(can_partition(num_layers, stages))
    first, last = balanced_ends(num_layers, stages, embedding, head)
    balanced = partition_with_ends(num_layers, stages, first, last)
    framework = partition_layers(num_layers, stages)
    # Costs are rounded to a twentieth of a layer, each at most half of one off.
    assert slowest(balanced, embedding, head) <= slowest(framework, embedding, head) + 0.05


@given(
    num_layers=st.integers(8, 64),
    stages=st.integers(2, 8),
    head=st.floats(0.0, 8.0),
    more=st.floats(0.0, 8.0),
)
def test_a_heavier_head_never_has_more_layers_beside_it(
    num_layers: int, stages: int, head: float, more: float
) -> None:
    lighter, heavier = (balanced_ends(num_layers, stages, 0.0, cost)[1] for cost in (head, head + more))
    # Ties go to the evener split, which may hold one more.
    assert heavier <= lighter + 1


def test_without_boundary_costs_the_split_is_even() -> None:
    for num_layers, stages in ((32, 4), (96, 8), (80, 16), (61, 61)):
        first, last = balanced_ends(num_layers, stages, 0.0, 0.0)
        assert first == last == num_layers // stages


@pytest.mark.parametrize(
    ("name", "pp", "vpp"),
    [
        ("gemma-2-9b", 2, 1),
        ("gemma-2-9b", 7, 1),
        ("gemma-2-9b", 7, 2),
        ("gemma-2-9b", 14, 1),
        ("llama-3-8b", 4, 1),
        ("llama-3-8b", 8, 1),
        ("llama-3-8b", 8, 2),
        ("llama-3.2-1b", 4, 1),
        ("llama-3.2-1b", 8, 1),
        ("qwen2.5-7b", 4, 1),
        ("qwen2.5-7b", 7, 1),
        ("deepseek-v3", 8, 1),
        ("deepseek-v3", 16, 1),
    ],
)
@pytest.mark.parametrize("batches", [4, 32])
def test_simulated_iterations_never_lose_by_it(
    make_context: MakeContext, make_plan: MakePlan, name: str, pp: int, vpp: int, batches: int
) -> None:
    batches = max(pp, batches // pp * pp)
    context = make_context(name, "dgx-h100:8", batch=batches, length=4096)
    num_layers = context.model.num_layers
    even = make_plan(num_layers, pp=pp, vpp=vpp, layers_per_stage=partition_layers(num_layers, pp * vpp))
    ends = boundary_layers(context, PlanColumns.from_plans([even], batches))
    embedding, head = (float(each[0]) for each in ends)
    # Below that there is no layer to move.
    assert abs(embedding) + head >= 1.0
    first, last = balanced_ends(num_layers, pp * vpp, embedding, head)
    layers = partition_with_ends(num_layers, pp * vpp, first, last)
    balanced = make_plan(num_layers, pp=pp, vpp=vpp, layers_per_stage=layers)
    costs = [iteration_costs(context, plan) for plan in (even, balanced)]
    seconds = [
        iteration_time(each, plan.schedule) for each, plan in zip(costs, (even, balanced), strict=True)
    ]
    assert seconds[1] <= seconds[0] * (1 + 1e-9)


def test_vocabulary_parallelism_leaves_the_ends_nothing(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = make_context("gemma-2-9b", "dgx-h100:1", batch=32)
    plan = make_plan(42, pp=2, vocab_parallel="vocab_1")
    embedding, head = boundary_layers(context, PlanColumns.from_plans([plan], 32))
    assert embedding[0] == head[0] == 0.0


def test_leading_dense_layers_make_room_for_others(make_context: MakeContext, make_plan: MakePlan) -> None:
    context = make_context("deepseek-v3", "dgx-h100:64", batch=64, length=4096, num_mtp_layers=0)
    plan = make_plan(61, pp=8, ep=64, dp=64, layers_per_stage=partition_layers(61, 8))
    embedding, head = (
        float(each[0]) for each in boundary_layers(context, PlanColumns.from_plans([plan], 64))
    )
    times = micro_batch_times(context, PlanColumns.from_plans([plan], 64))
    one, dense = (float((layer.forward + layer.backward)[0]) for layer in (times.layer, times.dense_layer))
    assert dense < one
    lookup = float((times.embedding_forward + times.embedding_backward)[0])
    assert embedding == pytest.approx((lookup - 3 * (one - dense)) / one)
    firsts = [
        tuple(balanced_ends(61, stages, cost, head)[0] for cost in (embedding, lookup / one))
        for stages in range(2, 17)
    ]
    assert all(with_room >= without for with_room, without in firsts)
    assert any(with_room > without for with_room, without in firsts)
