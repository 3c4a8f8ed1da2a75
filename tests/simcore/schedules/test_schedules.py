from __future__ import annotations

import time
from collections import Counter
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import SpecError
from meshwright.simcore.domain.plan import ScheduleName
from meshwright.simcore.schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    SCHEDULES,
    WEIGHT_GRADIENT,
)
from meshwright.simcore.schedules.interleaved import Interleaved


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """A schedule and numbers of stages, chunks and micro-batches for which it exists."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    if name == "none":
        return name, 1, 1, draw(st.integers(1, 20))
    if name == "interleaved_1f1b":
        stages = draw(st.integers(2, 6))
        return name, stages, draw(st.integers(2, 4)), stages * draw(st.integers(1, 5))
    return name, draw(st.integers(1, 7)), 1, draw(st.integers(1, 20))


@given(shapes())
def test_every_forward_and_backward_runs_exactly_once(shape: tuple[str, int, int, int]) -> None:
    name, stages, chunks, micro_batches = shape
    operations = SCHEDULES[name].operations(stages, chunks, micro_batches)
    pairs = {(chunk, batch) for chunk in range(chunks) for batch in range(micro_batches)}
    for stage in range(stages):
        columns = (operations.kind[stage], operations.chunk[stage], operations.micro_batch[stage])
        ran = Counter(zip(*(column.tolist() for column in columns), strict=True))
        assert set(ran.values()) == {1}
        has_split = any(kind == WEIGHT_GRADIENT for kind, _, _ in ran)
        kinds = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT) if has_split else (FORWARD, BACKWARD)
        assert set(ran) == {(kind, *pair) for kind in kinds for pair in pairs}
        order = {key: index for index, key in enumerate(ran)}
        for pair in pairs:
            assert sorted(kinds, key=lambda kind: order[(kind, *pair)]) == list(kinds)


@given(shapes())
def test_activations_never_exceed_the_declared_peak(shape: tuple[str, int, int, int]) -> None:
    name, *sizes = shape
    executed = SCHEDULES[name].operations(*sizes).peak_in_flight()
    declared = SCHEDULES[name].peak_in_flight(*sizes)
    assert executed.tolist() == declared.tolist()


def test_keys_are_the_words_of_plan_files() -> None:
    assert set(SCHEDULES) <= set(get_args(ScheduleName))
    assert [schedule.name for schedule in SCHEDULES.values()] == list(SCHEDULES)


# Megatron's order in an independent event simulation; peak of the first stage.
@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches", "peak"), [(4, 2, 8, 11), (8, 4, 32, 39), (16, 2, 64, 47)]
)
def test_interleaving_keeps_as_many_activations_as_measured(
    stages: int, chunks: int, micro_batches: int, peak: int
) -> None:
    assert (
        SCHEDULES["interleaved_1f1b"].operations(stages, chunks, micro_batches).peak_in_flight().max() == peak
    )


def test_interleaving_refuses_a_last_group_smaller_than_the_pipeline() -> None:
    with pytest.raises(
        SpecError, match="last group of 2 is smaller than the 4 stages; use 8 or 12 micro-batches"
    ):
        SCHEDULES["interleaved_1f1b"].check(4, 2, 10)


def test_interleaving_takes_larger_groups_and_a_smaller_last_one() -> None:
    schedule = Interleaved(micro_batch_group_size=6)
    operations = schedule.operations(4, 2, 10)
    is_forward = operations.kind[0] == FORWARD
    assert operations.micro_batch[0][is_forward].tolist() == [
        *range(6),
        *range(6),
        *range(6, 10),
        *range(6, 10),
    ]
    assert operations.chunk[0][is_forward].tolist() == [0] * 6 + [1] * 6 + [0] * 4 + [1] * 4
    assert operations.peak_in_flight().tolist() == schedule.peak_in_flight(4, 2, 10).tolist()
    with pytest.raises(SpecError, match="last group of 2"):
        schedule.check(4, 2, 8)
    with pytest.raises(SpecError, match="at least the 8 pipeline stages"):
        schedule.check(8, 2, 12)


@pytest.mark.parametrize("name", ["none", "gpipe", "1f1b", "zb_h1", "zb_h2"])
def test_schedules_without_interleaving_refuse_chunks(name: str) -> None:
    with pytest.raises(SpecError, match="one chunk per stage, not 2"):
        SCHEDULES[name].check(1, 2, 4)


@pytest.mark.parametrize("sizes", [(1, 2, 4), (4, 1, 4), (0, 2, 4), (4, 2, 0)])
def test_interleaving_refuses_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(SpecError):
        SCHEDULES["interleaved_1f1b"].operations(*sizes)


def test_no_pipeline_has_one_stage() -> None:
    with pytest.raises(SpecError, match="one stage, not 2"):
        SCHEDULES["none"].check(2, 1, 4)


def test_large_schedules_are_emitted_in_milliseconds() -> None:
    # A plan search builds a hundred of them; 30 ms on a quiet machine, three times that on a busy one.
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        SCHEDULES["interleaved_1f1b"].operations(64, 4, 1536)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.09


def test_one_f_one_b_order_is_the_published_one() -> None:
    operations = SCHEDULES["1f1b"].operations(4, 1, 8)
    rows = ["".join("FB"[kind] for kind in row) for row in operations.kind]
    assert rows == ["FFFFBFBFBFBFBBBB", "FFFBFBFBFBFBFBBB", "FFBFBFBFBFBFBFBB", "FBFBFBFBFBFBFBFB"]
    assert np.all(operations.chunk == 0)
