from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.space import SearchLimits, divisors, enumerate_space, plan_of_row
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.workload import TrainingWorkload


def make_job(cluster: str = "dgx-h100:1", batch: int = 12, num_layers: int = 8) -> TrainingJob:
    return TrainingJob(
        model=replace(load_model("llama-3-8b"), num_layers=num_layers),
        cluster=resolve_cluster(cluster),
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=2048),
        software="megatron-core",
    )


def rows(job: TrainingJob, *names: str) -> set[tuple[int, ...]]:
    """Return the distinct values of some columns of the whole space."""
    blocks = list(enumerate_space(job, (job.cluster.num_gpus,)))
    return {
        tuple(row) for block in blocks for row in np.stack([getattr(block, n) for n in names], 1).tolist()
    }


@given(number=st.integers(1, 5000))
def test_divisors_are_all_and_ascending(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_every_factorisation_of_the_world_is_a_candidate() -> None:
    expected = {(tp, pp, 24 // (tp * pp)) for tp in divisors(24) for pp in divisors(24 // tp)}
    assert rows(make_job("dgx-h100:3"), "tp", "pp", "dp") == expected


def test_every_micro_batch_that_divides_the_batch_is_a_candidate() -> None:
    assert rows(make_job(batch=12), "micro_batch_size") == {(d,) for d in (1, 2, 3, 4, 6, 12)}


def test_schedules_and_chunks_are_one_choice() -> None:
    # Codes: 0 none, 1 gpipe, 2 1f1b, 3 interleaved; chunks divide 8 layers, or 10 with embedding and loss.
    combinations = rows(make_job(), "pp", "schedule", "vpp")
    assert {(schedule, vpp) for pp, schedule, vpp in combinations if pp == 1} == {(0, 1)}
    expected = {(1, 1), (2, 1), (3, 2), (3, 4), (3, 5), (3, 8), (3, 10)}
    assert {(schedule, vpp) for pp, schedule, vpp in combinations if pp == 4} == expected


def test_one_replica_shards_nothing_and_hsdp_groups_are_whole_nodes() -> None:
    # Codes: 0 none to 3 zero3, 4 hsdp.
    shardings = rows(make_job("dgx-h100:4"), "tp", "dp", "sharding", "sharding_group")
    assert {(kind, group) for tp, dp, kind, group in shardings if dp == 1} == {(0, 1)}
    groups = {(tp, group) for tp, dp, kind, group in shardings if kind == 4 and tp * dp == 32}
    # 8 GPUs of a node hold 8 / tp ranks of a group; groups double from there and stay below dp.
    assert groups == {(1, 8), (1, 16), (2, 4), (2, 8), (4, 2), (4, 4), (8, 2)}


@pytest.mark.parametrize(
    ("cluster", "num_layers"), [("dgx-h100:1", 8), ("dgx-h100:2", 10), ("dgx-h100:3", 13)]
)
def test_rows_and_plans_say_the_same(cluster: str, num_layers: int) -> None:
    job = make_job(cluster, batch=48, num_layers=num_layers)
    for block in enumerate_space(job, (job.cluster.num_gpus,)):
        fits = (block.pp * block.vpp <= num_layers) & (48 % (block.dp * block.micro_batch_size) == 0)
        kept = block.take(fits)
        plans = [plan_of_row(job, kept, row) for row in range(len(kept))]
        assert all(plan.num_gpus == job.cluster.num_gpus for plan in plans)
        assert all(plan.num_layers == num_layers for plan in plans)
        read = PlanColumns.from_plans(plans, 48)
        for name in PlanColumns.__slots__:
            assert getattr(read, name).tolist() == getattr(kept, name).tolist(), name


def test_no_candidate_comes_twice() -> None:
    job = make_job("dgx-h100:2")
    names = ("tp", "pp", "vpp", "dp", "micro_batch_size", "schedule", "sequence_parallel", "recompute")
    blocks = list(enumerate_space(job, (16,)))
    num_rows = sum(len(block) for block in blocks)
    assert len(rows(job, *names, "sharding", "sharding_group")) == num_rows


def test_several_world_sizes_are_searched_one_after_the_other() -> None:
    job = make_job("dgx-h100:2")
    alone = [sum(len(block) for block in enumerate_space(job, (world,))) for world in (8, 16)]
    assert sum(len(block) for block in enumerate_space(job, (8, 16))) == sum(alone)


@pytest.mark.parametrize("headroom", [-0.1, 1.0, 1.5])
def test_an_impossible_headroom_is_refused(headroom: float) -> None:
    with pytest.raises(SpecError, match="memory_headroom must be 0 % to below 100 %"):
        SearchLimits(memory_headroom=headroom)


def test_an_unknown_limit_is_refused_with_a_suggestion() -> None:
    with pytest.raises(SpecError, match=r"unknown key 'schedul'; did you mean 'schedule'"):
        SearchLimits(allowed={"schedul": ("1f1b",)})
