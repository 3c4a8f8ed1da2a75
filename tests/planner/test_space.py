from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.costmodels.bound import iteration_time_bound, schedule_time_bound
from meshwright.costmodels.context import cost_context
from meshwright.costmodels.memory import peak_memory
from meshwright.costmodels.plan_columns import ALL_LAYERS, PlanColumns
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.axes import divisors
from meshwright.planner.space import SearchLimits, enumerate_space, plan_of_row, space_blocks
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import CP_METHODS, SCHEDULES_KNOWN
from meshwright.simcore.domain.workload import TrainingWorkload

FREE = SearchLimits()
SEED = 20_241


def make_job(
    cluster: str = "dgx-h100:1",
    batch: int = 12,
    num_layers: int = 8,
    *,
    model: str = "llama-3-8b",
    length: int = 2048,
) -> TrainingJob:
    return TrainingJob(
        model=replace(load_model(model), num_layers=num_layers),
        cluster=resolve_cluster(cluster),
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=length),
        software="megatron-core",
    )


def space(job: TrainingJob, *worlds: int, limits: SearchLimits = FREE) -> Iterator[PlanColumns]:
    return enumerate_space(cost_context(job), limits, worlds or (job.cluster.num_gpus,))


def rows(job: TrainingJob, *names: str, limits: SearchLimits = FREE) -> set[tuple[int, ...]]:
    """Return the distinct values of some columns of the whole space."""
    return {
        tuple(row)
        for block in space(job, limits=limits)
        for row in np.stack([getattr(block, n) for n in names], 1).tolist()
    }


@given(number=st.integers(1, 5000))
def test_divisors_are_all_and_ascending(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_every_factorisation_of_the_world_is_a_candidate() -> None:
    # 4096 tokens over two context parallel ranks leave each two parts of 1024.
    expected = {
        (tp, cp, pp, 24 // (tp * cp * pp))
        for tp in divisors(24)
        for cp in (1, 2)
        if 24 // tp % cp == 0
        for pp in divisors(24 // (tp * cp))
    }
    assert rows(make_job("dgx-h100:3", length=4096), "tp", "cp", "pp", "dp") == expected


def test_every_micro_batch_that_divides_the_batch_is_a_candidate() -> None:
    assert rows(make_job(batch=12), "micro_batch_size") == {(d,) for d in (1, 2, 3, 4, 6, 12)}


def test_schedules_and_chunks_are_one_choice() -> None:
    combinations = {
        (pp, SCHEDULES_KNOWN[schedule], vpp)
        for pp, schedule, vpp in rows(make_job(), "pp", "schedule", "vpp")
    }
    assert {(name, vpp) for pp, name, vpp in combinations if pp == 1} == {("none", 1)}
    single = {(name, 1) for name in ("gpipe", "1f1b", "zb_h1", "zb_h2", "dualpipe")}
    bent = {(name, 2) for name in ("zb_v", "v_half", "v_min", "dualpipe_v")}
    # Chunks divide 8 layers, or 10 with embedding and loss.
    interleaved = {("interleaved_1f1b", count) for count in (2, 4, 5, 8, 10)}
    assert {(name, vpp) for pp, name, vpp in combinations if pp == 4} == single | bent | interleaved


def test_every_grid_of_experts_is_a_candidate() -> None:
    grids = rows(make_job("dgx-h100:1", model="mixtral-8x7b"), "tp", "cp", "dp", "ep", "etp")
    for tp, cp, dp, ep, etp in grids:
        assert 8 % ep == 0
        assert tp % etp == 0
        assert (tp * cp * dp) % (ep * etp) == 0
    assert {(ep, etp) for tp, cp, dp, ep, etp in grids if (tp, dp) == (2, 4)} == {
        *((ep, 1) for ep in (1, 2, 4, 8)),
        *((ep, 2) for ep in (1, 2, 4)),
    }


def test_context_parallel_methods_are_tried_where_there_are_ranks() -> None:
    methods = rows(make_job("dgx-h100:2", length=32_768), "tp", "cp", "cp_method")
    names = {
        degrees: {CP_METHODS[m] for *of, m in methods if tuple(of) == degrees}
        for degrees in [(4, 1), (4, 2), (4, 4)]
    }
    assert names == {
        (4, 1): {"ring"},
        (4, 2): {"ring", "ulysses", "all_gather"},
        # Sixteen ranks of a tensor and context parallel group span two nodes.
        (4, 4): {"ring", "ulysses", "all_gather", "hierarchical"},
    }


def test_a_share_of_the_layers_is_recomputed_once_for_each_number_it_comes_to() -> None:
    found = rows(make_job(num_layers=8), "pp", "vpp", "schedule", "recompute", "recompute_layers")
    one_f_one_b = SCHEDULES_KNOWN.index("1f1b")
    numbers = {
        pp: {
            count
            for at, vpp, schedule, kind, count in found
            if (at, vpp, schedule, kind) == (pp, 1, one_f_one_b, 2)
        }
        for pp in (2, 4, 8)
    }
    # Four layers of a stage: one, two, three or all; two: one or all; one: all. 0 marks what repeats another.
    assert numbers == {2: {1, 2, 3, ALL_LAYERS}, 4: {0, 1, ALL_LAYERS}, 8: {0, ALL_LAYERS}}


def test_uneven_splits_are_tried_beside_the_frameworks_own() -> None:
    splits = rows(make_job(num_layers=32), "pp", "vpp", "chunk_first", "chunk_last")
    # A head of a few layers leaves the last stage fewer.
    assert {(first, last) for pp, vpp, first, last in splits if (pp, vpp) == (4, 1)} >= {(8, 8)}
    assert any(last < first for pp, vpp, first, last in splits if (pp, vpp) == (4, 1))


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
    rng = np.random.default_rng(SEED)
    for block in space(job):
        fits = (block.pp * block.vpp <= num_layers) & (48 % (block.dp * block.micro_batch_size) == 0)
        # What no plan says: counts that repeat others, weights away from ZeRO-3.
        fits &= (block.recompute_layers > 0) & ((block.parameter_offload == 0) | (block.sharding >= 3))
        # Even stages only: another split may have the same ends.
        kept = block.take(np.sort(rng.choice(np.flatnonzero(fits), min(500, int(fits.sum())), replace=False)))
        plans = [plan_of_row(job, kept, row) for row in range(len(kept))]
        assert all(plan.num_gpus == job.cluster.num_gpus for plan in plans)
        assert all(plan.num_layers == num_layers for plan in plans)
        read = PlanColumns.from_plans(plans, 48)
        for name in PlanColumns.__slots__:
            assert getattr(read, name).tolist() == getattr(kept, name).tolist(), name


@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b"])
def test_no_candidate_comes_twice(model: str) -> None:
    limits = SearchLimits(allowed={"vocab_parallel": ("none", "vocab_1"), "expert_overlap": (1, 2)})
    found: set[bytes] = set()
    num_rows = 0
    for block in space(make_job("dgx-h100:1", model=model, num_layers=6), limits=limits):
        kept = block.take((block.recompute_layers > 0) & (block.pp * block.vpp <= 6))
        table = np.stack([getattr(kept, name).astype(np.float64) for name in PlanColumns.__slots__], 1)
        found.update(row.tobytes() for row in table)
        num_rows += len(kept)
    assert len(found) == num_rows


def test_several_world_sizes_are_searched_one_after_the_other() -> None:
    job = make_job("dgx-h100:2")
    alone = [sum(len(block) for block in space(job, world)) for world in (8, 16)]
    assert sum(len(block) for block in space(job, 8, 16)) == sum(alone)


def test_a_mesh_of_a_block_holds_its_rows() -> None:
    context = cost_context(make_job("dgx-h100:1", model="mixtral-8x7b"))
    rng = np.random.default_rng(SEED)
    for block in space_blocks(context, FREE, (8,)):
        chosen = rng.integers(0, len(block), 50)
        rows_of, mesh = block.columns(chosen), block.mesh(tuple(block.axes))
        index = np.unravel_index(chosen, block.shape)
        for name in PlanColumns.__slots__:
            spread = np.broadcast_to(getattr(mesh, name), block.shape)
            assert spread[index].tolist() == getattr(rows_of, name).tolist(), name


@pytest.mark.parametrize("model", ["llama-3-8b", "gpt2-xl", "mixtral-8x7b", "deepseek-v3"])
def test_a_mesh_is_bounded_like_its_rows(model: str) -> None:
    job = replace(make_job(batch=8, model=model, length=4096), software="torchtitan")
    context = cost_context(job)
    rng = np.random.default_rng(SEED)
    blocks = list(space_blocks(context, FREE, (8,)))
    for whole in (blocks[index] for index in rng.integers(0, len(blocks), 6)):
        num_layouts = len(whole.axes["layout"])
        block = whole.restricted(
            {"layout": np.sort(rng.choice(num_layouts, min(3, num_layouts), replace=False))}
        )
        axes = tuple(block.axes)
        rows_of = rng.integers(0, len(block), 50)
        index = dict(zip(block.axes, np.unravel_index(rows_of, block.shape), strict=True))
        shape = [len(block.axes[name]) for name in axes]
        for values_of in (schedule_time_bound, iteration_time_bound, peak_memory):
            values = np.broadcast_to(values_of(context, block.mesh(axes)), shape)
            expected = values_of(context, block.columns(rows_of))
            assert np.array_equal(values[tuple(index[name] for name in axes)], expected, equal_nan=True)


def test_a_restricted_block_holds_the_chosen_options() -> None:
    context = cost_context(make_job())
    block = next(block for block in space_blocks(context, FREE, (8,)) if len(block.axes["micro_batch"]) > 2)
    few = block.restricted({"micro_batch": np.array([0, 2])})
    assert few.axes["micro_batch"].columns["micro_batch_size"].tolist() == [1, 3]
    assert len(few) * len(block.axes["micro_batch"]) == 2 * len(block)


@pytest.mark.parametrize("headroom", [-0.1, 1.0, 1.5])
def test_an_impossible_headroom_is_refused(headroom: float) -> None:
    with pytest.raises(SpecError, match="memory_headroom must be 0 % to below 100 %"):
        SearchLimits(memory_headroom=headroom)


def test_an_unknown_limit_is_refused_with_a_suggestion() -> None:
    with pytest.raises(SpecError, match=r"unknown key 'schedul'; did you mean 'schedule'"):
        SearchLimits(allowed={"schedul": ("1f1b",)})
