"""The order of a vocabulary split over stages: nobody waits for ever, and no stage holds more than is told."""

from __future__ import annotations

import pytest
from tests.profiler.executor.layouts import DENSE, NARROW, NARROW_TIED, execution

from meshwright.profiler.executor.local_tensors import local_tensors
from meshwright.profiler.executor.pipeline_order import OPERATION_NAMES, PipelineOrder
from meshwright.profiler.executor.vocabulary_order import (
    EMBEDDING,
    EMBEDDING_GRADIENT,
    GRADIENT_BROADCAST,
    HIDDEN_BROADCAST,
    KINDS_OVER_STAGES,
    LOGITS,
    LOGITS_GRADIENT,
    RESCALE,
    VOCABULARY_NAMES,
    vocabulary_operations,
)
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.schedules import BACKWARD, FORWARD

# Seconds of each operation; a stage's slice of the head costs less than its layers.
SECONDS = {FORWARD: 2.0, BACKWARD: 4.0, LOGITS: 0.4, LOGITS_GRADIENT: 0.6, EMBEDDING: 0.1}
WORK = sum(SECONDS.values())
Done = dict[tuple[int, int, int], float]


def orders(kind: str, stages: int, batches: int) -> list[list[tuple[int, int]]]:
    return [vocabulary_operations(kind, stages, stage, batches) for stage in range(stages)]


def needs(kind: str, stages: int, stage: int, operation: int, batch: int) -> list[tuple[int, int, int]]:
    """What has to be done before an operation begins: operation, micro-batch and stage."""
    everyone, last = range(stages), stages - 1
    reducing = RESCALE if kind == "vocab_2" else LOGITS_GRADIENT
    on_all = {LOGITS_GRADIENT: LOGITS, RESCALE: LOGITS}
    if operation == FORWARD:
        before = [(FORWARD, stage - 1)] if stage else [(EMBEDDING, each) for each in everyone]
    elif operation == BACKWARD:
        before = [(BACKWARD, stage + 1)] if stage < last else [(reducing, each) for each in everyone]
    elif operation in on_all:
        before = [(on_all[operation], each) for each in everyone]
    elif operation == LOGITS or (operation, stage) == (HIDDEN_BROADCAST, last):
        before = [(FORWARD, last)]
    elif operation == EMBEDDING_GRADIENT or (operation, stage) == (GRADIENT_BROADCAST, 0):
        before = [(BACKWARD, 0)]
    else:
        before = []
    return [(each, batch, where) for each, where in before]


def run_through(kind: str, stages: int, batches: int) -> float:
    """When the last stage has done everything; fails where all wait for each other."""
    left = orders(kind, stages, batches)
    done: Done = {}
    clock = [0.0] * stages
    is_moving = True
    while is_moving:
        is_moving = False
        for stage, operations in enumerate(left):
            while operations:
                operation, batch = operations[0]
                before = needs(kind, stages, stage, operation, batch)
                if any(each not in done for each in before):
                    break
                begin = max([clock[stage], *(done[each] for each in before)])
                clock[stage] = begin + SECONDS.get(operation, 0.0)
                done[operation, batch, stage] = clock[stage]
                operations.pop(0)
                is_moving = True
    assert not any(left)
    return max(clock)


def most_held(operations: list[tuple[int, int]]) -> int:
    held = peak = 0
    for kind, _ in operations:
        held += (kind == FORWARD) - (kind == BACKWARD)
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kind", KINDS_OVER_STAGES)
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_a_split_vocabulary_costs_no_bubble_beyond_that_of_1f1b(kind: str, stages: int) -> None:
    for batches in (1, 2, 3, 17):
        bubble = (stages - 1) * (SECONDS[FORWARD] + SECONDS[BACKWARD])
        assert run_through(kind, stages, batches) <= 1.001 * (batches * WORK + bubble)


@pytest.mark.parametrize("kind", KINDS_OVER_STAGES)
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_all_stages_meet_in_the_same_order_and_run_everything_once(kind: str, stages: int) -> None:
    of_stages = orders(kind, stages, 5)
    meetings = [[each for each in operations if each[0] in VOCABULARY_NAMES] for operations in of_stages]
    assert all(each == meetings[0] for each in meetings)
    kinds = {FORWARD, BACKWARD, *VOCABULARY_NAMES} - ({RESCALE} if kind != "vocab_2" else set())
    for operations in of_stages:
        assert sorted(operations) == sorted((each, batch) for each in kinds for batch in range(5))


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_a_barrier_costs_a_micro_batch_of_memory(stages: int) -> None:
    """Arxiv 2411.05288, section 5: p + 2, p + 1 and 1.5 p micro-batches on the first stage."""
    for stage in range(stages):
        left = stages - stage
        assert most_held(orders("vocab_1", stages, 40)[stage]) == left + 2
        assert most_held(orders("vocab_2", stages, 40)[stage]) == left + 1
        assert most_held(orders("interlaced", stages, 40)[stage]) == 3 * left // 2


@pytest.mark.parametrize("kind", KINDS_OVER_STAGES)
@pytest.mark.parametrize("model", [NARROW, NARROW_TIED])
def test_slices_hold_the_tables_of_the_model(kind: str, model: ModelSpec) -> None:
    """A padding of 67 tokens to 68 in four slices of everything that has a row for each."""
    plan = execution(
        model,
        pp=4,
        schedule="1f1b",
        vocab_parallel=kind,
        layers_per_stage=(0, 1, 1, 0),
        batch=8,
    ).plan
    order = PipelineOrder(plan, 8)
    held = sum(tensor.size for stage in range(4) for tensor in local_tensors(model, plan, order, stage))
    tables = 1 if model is NARROW_TIED else 2
    assert held == model.num_parameters + tables * 32 + 1


def test_every_operation_has_a_name_that_a_hang_can_be_told_by() -> None:
    order = PipelineOrder(execution(DENSE, pp=2, schedule="1f1b", vocab_parallel="vocab_2").plan, 4)
    texts = {operation.text for operation in order.operations(1)}
    assert "logits of micro-batch 3, virtual stage 1" in texts
    assert "rescaling of the head's gradient of micro-batch 0, virtual stage 1" in texts
    assert len(OPERATION_NAMES) == 4 + len(VOCABULARY_NAMES)
