"""Schedules that torchtitan does not know by name, as the table of operations that it loads from a CSV file.

One row per pipeline rank; each cell is an operation as torch.distributed.pipelining writes it (``_dump_csv`` of
``PipelineScheduleMulti``): virtual stage, letter, micro-batch. ``F`` is a forward, ``B`` a whole backward, ``I`` the
gradient of the input, ``W`` that of the weights. torch adds the sends and receives when it loads the table.
"""

from __future__ import annotations

from meshwright.errors import SpecError
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NO_OPERATION,
    SCHEDULES,
    WEIGHT_GRADIENT,
)

__all__ = ["PLACED_LIKE", "SCHEDULE_FILE", "schedule_csv", "schedule_fits"]

SCHEDULE_FILE = "schedule.csv"
#: Schedules written as tables -> the known schedule after which torchtitan places the virtual stages on ranks.
PLACED_LIKE = {"zb_h2": "1F1B", "v_half": "ZBVZeroBubble", "v_min": "ZBVZeroBubble"}
_LETTERS = {FORWARD: "F", BACKWARD: "B", INPUT_GRADIENT: "I", WEIGHT_GRADIENT: "W"}


def schedule_fits(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Return why a schedule of :data:`PLACED_LIKE` does not exist for these stages and micro-batches."""
    if plan.schedule not in PLACED_LIKE:
        return None
    per_step = plan.dp * plan.micro_batch_size
    if job.workload.global_batch_size % per_step:
        return None  # another rule says so
    try:
        SCHEDULES[plan.schedule].check(plan.pp, plan.vpp, job.workload.global_batch_size // per_step)
    except SpecError as error:
        return f"{error}."
    return None


def schedule_csv(job: TrainingJob, plan: ParallelPlan) -> str:
    """Return the table of a plan's schedule.

    Raises
    ------
    SpecError
        If the schedule does not exist for the plan's stages and micro-batches.
    """
    count = plan.num_micro_batches(job.workload.global_batch_size)
    operations = SCHEDULES[plan.schedule].operations(plan.pp, plan.vpp, count)
    rows = []
    for stage in range(operations.num_stages):
        cells = [
            f"{operations.placement[stage, chunk]}{_LETTERS[int(kind)]}{micro_batch}"
            for kind, micro_batch, chunk in zip(
                operations.kind[stage], operations.micro_batch[stage], operations.chunk[stage], strict=True
            )
            if kind != NO_OPERATION
        ]
        rows.append(",".join(cells))
    return "\n".join(rows) + "\n"
