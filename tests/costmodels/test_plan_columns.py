from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.simcore.domain.plan import ParallelPlan

NAMES = ("tp", "micro_batch_size", "schedule", "sequence_parallel", "offload_share", "dp")


def columns_of(table: dict[str, np.ndarray], shape: tuple[int, ...]) -> PlanColumns:
    """Return columns with some fields given and the others those of one plan, for rows or an open mesh."""
    plan = ParallelPlan(dp=2, micro_batch_size=1, schedule="none", layers_per_stage=(4,))
    one = PlanColumns.from_plans([plan], 8)
    if len(shape) == 1:
        one = one.take(np.zeros(shape[0], dtype=np.int64))
    else:
        one = PlanColumns(
            **{each.name: getattr(one, each.name).reshape((1,) * len(shape)) for each in fields(one)}
        )
    return replace(one, **table)


def drawn_fields(draw: st.DrawFn, sizes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = draw(st.sampled_from([2, 5, 10**6]))
    return {
        "tp": 2 ** rng.integers(0, 4, sizes["tp"]),
        "micro_batch_size": rng.integers(1, largest + 1, sizes["micro_batch_size"]),
        "schedule": rng.integers(0, 3, sizes["schedule"]),
        "sequence_parallel": rng.random(sizes["sequence_parallel"]) < 0.5,
        "optimizer_offload_fraction": rng.choice([0.25, 0.5, 1.0], sizes["offload_share"]),
        "dp": rng.integers(1, largest + 1, sizes["dp"]),
    }


@settings(max_examples=150, deadline=None)
@given(data=st.data(), num_rows=st.integers(0, 300), names=st.sets(st.sampled_from(NAMES), min_size=1))
def test_distinct_rows_are_the_combinations_and_every_plan_finds_its_own(
    data: st.DataObject, num_rows: int, names: set[str]
) -> None:
    table = data.draw(st.composite(drawn_fields)(dict.fromkeys(NAMES, (num_rows,))))
    columns = columns_of(table, (num_rows,))
    rows, inverse = columns.distinct(*sorted(names))
    combinations = set(zip(*(getattr(columns, name).tolist() for name in sorted(names)), strict=True))
    assert len(rows) == len(combinations)
    assert inverse.shape == (num_rows,)
    few, spread = columns.thinned(*sorted(names))
    assert len(few) == len(combinations)
    for name in names:
        assert getattr(rows, name)[inverse].tolist() == getattr(columns, name).tolist()
        assert spread(getattr(few, name)).tolist() == getattr(columns, name).tolist()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), shape=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4)))
def test_a_mesh_finds_its_distinct_rows_too(data: st.DataObject, shape: tuple[int, int, int]) -> None:
    # Every field has a dimension or two of its own.
    first, second, third = shape
    sizes = {
        "tp": (first, 1, 1),
        "micro_batch_size": (1, second, 1),
        "schedule": (1, 1, third),
        "sequence_parallel": (1, 1, 1),
        "offload_share": (first, 1, third),
        "dp": (1, second, 1),
    }
    columns = columns_of(data.draw(st.composite(drawn_fields)(sizes)), shape)
    names = ("tp", "micro_batch_size", "offload_share")
    rows, inverse = columns.distinct(*names)
    assert inverse.shape == shape
    for name in names:
        assert np.array_equal(getattr(rows, name)[inverse], np.broadcast_to(getattr(columns, name), shape))
    assert len(rows) == len(np.unique(inverse))
    rows, inverse = columns.distinct("micro_batch_size", "dp")
    # Only as many dimensions as these fields have.
    assert inverse.shape == (1, second, 1)
    assert np.array_equal(rows.dp[inverse], columns.dp)
    few, spread = columns.thinned(*names)
    for name in names:
        values = getattr(columns, name)
        assert np.array_equal(np.broadcast_to(spread(getattr(few, name)), values.shape), values)
    # Along each dimension no two entries agree in all fields.
    kept = [getattr(few, name) for name in names]
    for axis in range(3):
        lines = [np.moveaxis(values, axis, 0) for values in kept if values.shape[axis] > 1]
        every = list(zip(*lines, strict=True))
        assert len({tuple(value.tobytes() for value in line) for line in every}) == len(every)
