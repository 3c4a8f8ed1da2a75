from __future__ import annotations

import time
from collections import Counter
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_shapes import DUAL, V_SHAPED, shapes

from meshwright.errors import SpecError
from meshwright.simcore.domain.plan import ScheduleName
from meshwright.simcore.schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NO_OPERATION,
    SCHEDULES,
    WEIGHT_GRADIENT,
    v_shape,
)
from meshwright.simcore.schedules.interleaved import Interleaved

SPLIT = ("zb_h1", "zb_h2", *V_SHAPED)


@given(shapes(most_stages=7))
def test_every_forward_and_backward_runs_exactly_once(shape: tuple[str, int, int, int]) -> None:
    name, stages, chunks, micro_batches = shape
    operations = SCHEDULES[name].operations(stages, chunks, micro_batches)
    assert (operations.placement == SCHEDULES[name].placement(stages, chunks)).all()
    copy = operations.placement // (stages * chunks // operations.num_model_copies)
    each = micro_batches // operations.num_model_copies
    for stage in range(stages):
        # Half of DualPipe's micro-batches pass one copy of the model, the others the other.
        pairs = {
            (chunk, batch)
            for chunk in range(chunks)
            for batch in range(copy[stage, chunk] * each, (copy[stage, chunk] + 1) * each)
        }
        columns = (operations.kind[stage], operations.chunk[stage], operations.micro_batch[stage])
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        ran = Counter(row for row in rows if row[0] != NO_OPERATION)
        assert all(kind == NO_OPERATION for kind, _, _ in rows[ran.total() :])
        assert set(ran.values()) == {1}
        order = {key: index for index, key in enumerate(ran)}
        num_kinds = 0
        for pair in pairs:
            kinds = sorted(
                (kind for kind in range(4) if (kind, *pair) in ran), key=lambda k: order[(k, *pair)]
            )
            assert kinds in ([FORWARD, BACKWARD], [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT])
            assert kinds[1] == (INPUT_GRADIENT if name in SPLIT else kinds[1])
            num_kinds += len(kinds)
        assert num_kinds == len(ran)


@given(shapes(most_stages=7, most_micro_batches=40))
def test_activations_never_exceed_the_declared_peak(shape: tuple[str, int, int, int]) -> None:
    name, stages, chunks, micro_batches = shape
    executed = SCHEDULES[name].operations(stages, chunks, micro_batches).peak_in_flight()
    declared = SCHEDULES[name].peak_in_flight(stages, chunks, micro_batches)
    if name in V_SHAPED:
        assert np.all(executed <= declared)
        assert executed.max() == declared.max() or micro_batches < stages
    else:
        assert executed.tolist() == declared.tolist()


@given(shapes())
def test_a_joint_pair_is_a_forward_and_the_backward_after_it(shape: tuple[str, int, int, int]) -> None:
    name, *sizes = shape
    operations = SCHEDULES[name].operations(*sizes)
    assert (operations.is_overlapped is not None) == (name in DUAL)
    if operations.is_overlapped is None:
        return
    for stage in range(operations.num_stages):
        pairs = np.flatnonzero(operations.is_overlapped[stage]).reshape(-1, 2)
        assert np.all(pairs[:, 1] == pairs[:, 0] + 1)
        assert operations.kind[stage, pairs].tolist() == [[FORWARD, BACKWARD]] * len(pairs)
        assert np.all(operations.chunk[stage, pairs].sum(axis=1) == 1)


def test_placements_are_the_published_ones() -> None:
    assert SCHEDULES["interleaved_1f1b"].placement(2, 3).tolist() == [[0, 2, 4], [1, 3, 5]]
    for name in (*V_SHAPED, *DUAL):
        assert SCHEDULES[name].placement(4, 2).tolist() == [[0, 7], [1, 6], [2, 5], [3, 4]]
    copies = {name: schedule.num_model_copies for name, schedule in SCHEDULES.items()}
    assert copies == dict.fromkeys(SCHEDULES, 1) | {"dualpipe": 2}


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


@pytest.mark.parametrize("name", [*V_SHAPED, *DUAL])
def test_schedules_that_go_there_and_back_need_two_chunks(name: str) -> None:
    for stages, chunks in ((1, 2), (4, 1), (4, 3)):
        for call in (SCHEDULES[name].operations, SCHEDULES[name].peak_in_flight, SCHEDULES[name].check):
            with pytest.raises(SpecError, match=f"exactly 2 chunks per stage, not {stages} and {chunks}"):
                call(stages, chunks, 16)
        with pytest.raises(SpecError, match="exactly 2 chunks"):
            SCHEDULES[name].placement(stages, chunks)
    with pytest.raises(SpecError, match="num_micro_batches must be at least 1"):
        SCHEDULES[name].check(4, 2, 0)


@pytest.mark.parametrize(
    ("name", "stages", "micro_batches", "message"),
    [
        ("dualpipe", 5, 20, "an even number of stages, not 5: use 4 or 6"),
        ("dualpipe", 4, 9, "an even number of micro-batches, .* not 9: use 10"),
        ("dualpipe", 4, 5, "at least twice the 4 stages, not 5: use 8"),
        ("dualpipe_v", 4, 7, "at least twice as many micro-batches as the 4 stages, not 7: use 8"),
    ],
)
def test_dual_pipes_say_what_they_lack(name: str, stages: int, micro_batches: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SCHEDULES[name].operations(stages, 2, micro_batches)


def test_no_pipeline_has_one_stage() -> None:
    with pytest.raises(SpecError, match="one stage, not 2"):
        SCHEDULES["none"].check(2, 1, 4)


# A plan search builds a hundred of them; 30 ms on a quiet machine, three times that on a busy one.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("interleaved_1f1b", (64, 4, 1536)), *((name, (16, 2, 512)) for name in (*V_SHAPED, *DUAL))],
)
def test_large_schedules_are_emitted_in_milliseconds(name: str, sizes: tuple[int, int, int]) -> None:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        SCHEDULES[name].operations(*sizes)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.09


@given(
    name=st.sampled_from(V_SHAPED),
    stages=st.integers(2, 12),
    more=st.integers(1, 30),
)
def test_long_v_schedules_repeat_what_short_ones_settle_into(name: str, stages: int, more: int) -> None:
    worked_out, calls = v_shape.worked_out_operations, []

    def record(*args: object) -> tuple[np.ndarray, ...]:
        calls.append(args)
        return worked_out(*args)  # type: ignore[arg-type]  # passed on as they came

    micro_batches = 2 * stages + 2 + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v_shape, "worked_out_operations", record)
        operations = SCHEDULES[name].operations(stages, 2, micro_batches)
    ((block, num_worked_out, limit, draining_chunk),) = calls
    assert num_worked_out == micro_batches - more
    whole = worked_out(block, micro_batches, limit, draining_chunk)
    for short_cut, each in zip(
        (operations.kind, operations.micro_batch, operations.chunk), whole, strict=True
    ):
        assert np.array_equal(short_cut, each)
        assert short_cut.dtype == each.dtype


def test_v_schedules_put_micro_batches_in_order() -> None:
    # One stage's forwards of a chunk, and its gradients, keep the order in which micro-batches enter.
    for name in V_SHAPED:
        operations = SCHEDULES[name].operations(5, 2, 17)
        for kind in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT):
            for chunk in range(2):
                is_this = (operations.kind == kind) & (operations.chunk == chunk)
                assert operations.micro_batch[is_this].reshape(5, 17).tolist() == [list(range(17))] * 5


def test_dual_pipe_order_is_the_published_one() -> None:
    # Steps 1 to 8 of the reference implementation, four ranks and eight micro-batches: the second half of the
    # ranks mirrors the first. Lower case is chunk 1, I a split input gradient.
    operations = SCHEDULES["dualpipe"].operations(4, 2, 8)
    assert operations.is_overlapped is not None
    letters = (("F", "f"), ("B", "b"), ("I", "i"), ("W", "w"), ("", ""))
    rows = [
        "".join(
            letters[kind][chunk] + ("+" if joint and kind == FORWARD else "")
            for kind, chunk, joint in zip(
                operations.kind[stage].tolist(),
                operations.chunk[stage].tolist(),
                operations.is_overlapped[stage].tolist(),
                strict=True,
            )
        )
        for stage in range(4)
    ]
    assert rows[:2] == ["FFFfiwfF+bf+Bbf+BbIWIW", "FfFfFbf+BF+bf+BbBiIwW"]
    assert rows[2:] == [row.swapcase() for row in (rows[1], rows[0])]


def test_one_f_one_b_order_is_the_published_one() -> None:
    operations = SCHEDULES["1f1b"].operations(4, 1, 8)
    rows = ["".join("FB"[kind] for kind in row) for row in operations.kind]
    assert rows == ["FFFFBFBFBFBFBBBB", "FFFBFBFBFBFBFBBB", "FFBFBFBFBFBFBFBB", "FBFBFBFBFBFBFBFB"]
    assert np.all(operations.chunk == 0)
