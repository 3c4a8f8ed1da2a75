from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner import feasibility
from meshwright.planner.choices import choices_left
from meshwright.planner.constraints import RULES, apply_constraints
from meshwright.planner.export import EXPORTERS
from meshwright.planner.feasibility import FeasiblePart, feasible_parts
from meshwright.planner.space import SearchLimits, space_blocks
from meshwright.planner.space_block import SpaceBlock
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.schedules import SCHEDULES

NUM_CASES = 60


@functools.cache
def case(seed: int) -> tuple[CostContext, SearchLimits]:
    """Return a small random job whose space has every kind of choice, and restrictions of the user."""
    rng = np.random.default_rng(seed)
    model = load_model(
        str(rng.choice(["llama-3-8b", "gpt2-xl", "mixtral-8x7b", "deepseek-v3", "gemma-2-2b"]))
    )
    num_layers = int(rng.choice([4, 5, 6, 8]))
    changes: dict[str, object] = {"num_layers": num_layers}
    if model.moe is not None:
        leading = min(model.moe.num_dense_layers, int(rng.integers(0, 3)))
        changes["moe"] = replace(
            model.moe, num_experts=8, num_dense_layers=leading, num_expert_groups=1, top_k_groups=1, top_k=2
        )
    cluster = resolve_cluster(str(rng.choice(["dgx-h100:1", "dgx-a100:1", "l40s-8:1", "gb200-nvl72:1"])))
    cluster = replace(
        cluster,
        node=replace(cluster.node, num_gpus=int(rng.choice([2, 4]))),
        num_nodes=int(rng.choice([1, 2])),
    )
    job = TrainingJob(
        model=replace(model, **changes),  # type: ignore[arg-type]  # checked by the class
        cluster=cluster,
        workload=TrainingWorkload(
            global_batch_size=int(rng.choice([6, 8, 16])),
            sequence_length=int(rng.choice([1024, 4096, 16_384])),
        ),
        software=str(rng.choice(["megatron-core", "megatron-2021", "torchtitan", "llm-foundry-fsdp1"])),
    )
    # What is named is taken as available, so most schedules and levers stay in.
    allowed: dict[str, tuple[int | str | bool, ...]] = {"schedule": tuple(SCHEDULES)}
    if rng.random() < 0.5:
        allowed |= {"sharding": ("none", "zero1", "zero3", "hsdp"), "parameter_offload": ("none", "cpu")}
    if rng.random() < 0.3:
        allowed |= {"tp": (1, 2), "recompute": ("none", "full")}
    if rng.random() < 0.3:
        allowed["vocab_parallel"] = ("none", "vocab_2")
    target = str(rng.choice(sorted(EXPORTERS))) if rng.random() < 0.2 else None
    limits = SearchLimits(
        allowed=allowed, memory_headroom=float(rng.choice([0.0, 0.05, 0.5, 0.8])), target=target
    )
    return cost_context(job), limits


def one_by_one(
    context: CostContext, limits: SearchLimits, block: SpaceBlock
) -> tuple[PlanColumns, np.ndarray, dict[str, int]]:
    """Return the feasible rows of a block by evaluating every constraint on every row."""
    rejections: dict[str, int] = {}
    rows = np.arange(len(block))
    columns = block.columns(rows)
    feasible = apply_constraints(context, columns, limits, rejections)
    keep = np.ones(len(rows), dtype=np.bool_)
    for constraint in (*RULES, feasibility.MEMORY, feasibility.HOST_MEMORY):
        chosen = np.flatnonzero(keep)
        keep[chosen] = constraint.holds(context, columns.take(chosen), limits)
    assert int(keep.sum()) == len(feasible)
    return feasible, rows[keep], rejections


def plans_of(part: FeasiblePart) -> tuple[np.ndarray, PlanColumns]:
    return part.plans(*np.nonzero(part.fits))


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_what_is_counted_without_listing_is_what_listing_counts(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, limits = case(seed)
    # Small tables, so that blocks come in several slices.
    monkeypatch.setattr(feasibility, "_MOST_ENTRIES", 3_000)
    monkeypatch.setattr(feasibility, "_CACHED_ENTRIES", 500)
    for block in space_blocks(context, limits, (context.cluster.num_gpus,)):
        if len(block) > 60_000:
            continue
        _, expected_rows, expected = one_by_one(context, limits, block)
        rejections: dict[str, int] = {}
        choices = choices_left(context, block, limits, rejections)
        rows = [np.zeros(0, dtype=np.int64)]
        for part in feasible_parts(context, choices, limits, rejections):
            found, columns = plans_of(part)
            assert len(found) == len(part)
            again = block.columns(found)
            for name in PlanColumns.__slots__:
                assert getattr(columns, name).tolist() == getattr(again, name).tolist(), name
            rows.append(found)
        assert rejections == expected
        assert np.sort(np.concatenate(rows)).tolist() == expected_rows.tolist()


@pytest.mark.parametrize("seed", range(0, NUM_CASES, 6))
def test_joint_choices_are_those_of_some_plan(seed: int) -> None:
    context, limits = case(seed)
    for block in space_blocks(context, limits, (context.cluster.num_gpus,)):
        choices = choices_left(context, block, limits, {})
        if not len(choices) or len(block) > 60_000:
            continue
        keep = np.ones(len(block), dtype=np.bool_)
        columns = block.columns(np.arange(len(block)))
        for constraint in RULES:
            keep &= constraint.holds(context, columns, limits)
        assert len(choices) == int(keep.sum())
        whole = keep.reshape(block.shape)
        axes = ("layout", "micro_batch", "offload")
        places = tuple(tuple(block.axes).index(name) for name in axes)
        others = tuple(place for place in range(whole.ndim) if place not in places)
        assert np.array_equal(
            choices.joint(axes), whole.any(axis=others).transpose(np.argsort(np.argsort(places)))
        )
