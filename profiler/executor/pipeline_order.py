"""The pipeline of a plan as every rank sees it: operations, where virtual stages sit, and who sends what to whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.profiler.executor.vocabulary_order import (
    KINDS_OVER_STAGES,
    VOCABULARY_NAMES,
    vocabulary_operations,
)
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NO_OPERATION,
    SCHEDULES,
    WEIGHT_GRADIENT,
    StageOperations,
)

__all__ = ["OPERATION_NAMES", "Message", "Operation", "PipelineOrder"]

OPERATION_NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT_GRADIENT: "input gradient",
    WEIGHT_GRADIENT: "weight gradient",
    **VOCABULARY_NAMES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of a stage.

    Parameters
    ----------
    kind : int
        One of :mod:`meshwright.simcore.schedules` or of :mod:`meshwright.profiler.executor.vocabulary_order`.
    micro_batch, chunk, virtual_stage : int
        What it works on.
    """

    kind: int
    micro_batch: int
    chunk: int
    virtual_stage: int

    @property
    def text(self) -> str:
        """The operation in words."""
        return f"{OPERATION_NAMES[self.kind]} of micro-batch {self.micro_batch}, virtual stage {self.virtual_stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """An activation or a gradient that a stage sends another for one of its virtual stages."""

    is_forward: bool
    micro_batch: int
    virtual_stage: int


class PipelineOrder:
    """Operations and messages of all stages.

    Parameters
    ----------
    plan : ParallelPlan
        Schedule, stages and chunks.
    num_micro_batches : int
        Of a step.

    Raises
    ------
    SpecError
        If the schedule does not exist for these numbers.
    """

    def __init__(self, plan: ParallelPlan, num_micro_batches: int) -> None:
        schedule = SCHEDULES[plan.schedule]
        self.num_micro_batches = num_micro_batches
        self.num_copies = schedule.num_model_copies
        self.num_chunks = plan.vpp * self.num_copies
        self.table: StageOperations = schedule.operations(plan.pp, self.num_chunks, num_micro_batches)
        self.placement = self.table.placement
        # Virtual stages of one copy of the model.
        self.num_virtual = plan.pp * self.num_chunks // self.num_copies
        self.stage_of = {int(virtual): stage for stage, row in enumerate(self.placement) for virtual in row}
        self.layers = plan.layers_per_stage * self.num_copies
        self._vocab_parallel = plan.vocab_parallel

    @property
    def is_vocabulary_split(self) -> bool:
        """Whether each stage holds a slice of embedding and head, rather than the first and the last all of them."""
        return self._vocab_parallel in KINDS_OVER_STAGES

    def first_layer(self, virtual_stage: int) -> int:
        """Return the first layer of a virtual stage, in the model."""
        begin = virtual_stage // self.num_virtual * self.num_virtual
        return sum(self.layers[begin:virtual_stage])

    def has_embedding(self, virtual_stage: int) -> bool:
        """Return whether it is the first of its copy."""
        return virtual_stage % self.num_virtual == 0

    def has_head(self, virtual_stage: int) -> bool:
        """Return whether it is the last of its copy."""
        return virtual_stage % self.num_virtual == self.num_virtual - 1

    def operations(self, stage: int) -> list[Operation]:
        """Return what a stage runs, in order."""
        table = self.table
        if self.is_vocabulary_split:
            virtual = int(self.placement[stage, 0])
            kinds = vocabulary_operations(
                self._vocab_parallel, table.num_stages, stage, self.num_micro_batches
            )
            return [
                Operation(kind=kind, micro_batch=micro_batch, chunk=0, virtual_stage=virtual)
                for kind, micro_batch in kinds
            ]
        return [
            Operation(
                kind=kind,
                micro_batch=int(table.micro_batch[stage, index]),
                chunk=int(table.chunk[stage, index]),
                virtual_stage=int(self.placement[stage, table.chunk[stage, index]]),
            )
            for index, kind in enumerate(table.kind[stage].tolist())
            if kind != NO_OPERATION
        ]

    def edges(self) -> list[tuple[int, int]]:
        """Return the pairs of stages of which the first sends to the second."""
        pairs = {
            (stage, receiver)
            for stage in range(self.table.num_stages)
            for virtual in self.placement[stage].tolist()
            for receiver in self._receivers(virtual)
            if receiver != stage
        }
        return sorted(pairs)

    def _receivers(self, virtual: int) -> Iterator[int]:
        if not self.has_head(virtual):
            yield self.stage_of[virtual + 1]
        if not self.has_embedding(virtual):
            yield self.stage_of[virtual - 1]

    def sent(self, operation: Operation) -> tuple[int, Message] | None:
        """Return the stage that an operation's result goes to, and the message; None where it stays or ends."""
        virtual = operation.virtual_stage
        if operation.kind == FORWARD and not self.has_head(virtual):
            target = virtual + 1
        elif operation.kind in (BACKWARD, INPUT_GRADIENT) and not self.has_embedding(virtual):
            target = virtual - 1
        else:
            return None
        message = Message(
            is_forward=operation.kind == FORWARD, micro_batch=operation.micro_batch, virtual_stage=target
        )
        return self.stage_of[target], message

    def needed(self, operation: Operation) -> Message | None:
        """Return what an operation needs from another virtual stage; None where it needs nothing."""
        virtual = operation.virtual_stage
        if operation.kind == FORWARD and not self.has_embedding(virtual):
            return Message(is_forward=True, micro_batch=operation.micro_batch, virtual_stage=virtual)
        if operation.kind in (BACKWARD, INPUT_GRADIENT) and not self.has_head(virtual):
            return Message(is_forward=False, micro_batch=operation.micro_batch, virtual_stage=virtual)
        return None

    def arriving(self, sender: int, receiver: int) -> list[Message]:
        """Return what one stage sends another, in the order it does."""
        found = []
        for operation in self.operations(sender):
            sent = self.sent(operation)
            if sent is not None and sent[0] == receiver:
                found.append(sent[1])
        return found
