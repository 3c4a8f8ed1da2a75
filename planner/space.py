"""The plan space: every way to run a job, before any constraint has spoken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.partition import boundary_layers
from meshwright.costmodels.plan_columns import ALL_LAYERS, PlanColumns
from meshwright.errors import SpecError, did_you_mean
from meshwright.planner.axes import (
    context_axis,
    context_degrees,
    divisors,
    expert_axis,
    expert_blocks,
    layout_axis,
    micro_batch_axis,
    offload_axis,
    overlap_degrees,
    recompute_axis,
    sequence_axis,
    sharding_axis,
)
from meshwright.planner.space_block import SpaceBlock, concatenate
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import (
    CP_METHODS,
    OFFLOADS,
    RECOMPUTE_MODULES,
    RECOMPUTES,
    SCHEDULES_KNOWN,
    SHARDINGS,
    VOCAB_PARALLELS,
    ParallelPlan,
    partition_layers,
    partition_with_ends,
)

__all__ = [
    "LIMIT_KEYS",
    "SearchLimits",
    "enumerate_space",
    "plan_of_row",
    "space_blocks",
]

# Rows evaluated at once: bounds the working memory to some tens of MiB whatever the space.
_BLOCK_ROWS = 65_536
# Ten times the deepest model that was ever trained (1,000-layer DeepNet, arXiv 2203.00555).
_MAX_LAYERS = 10_000

LIMIT_KEYS = (
    "dp",
    "tp",
    "pp",
    "vpp",
    "cp",
    "cp_method",
    "ep",
    "etp",
    "expert_overlap",
    "micro_batch_size",
    "sequence_parallel",
    "schedule",
    "vocab_parallel",
    "recompute",
    "sharding",
    "optimizer_offload",
    "parameter_offload",
    "activation_offload",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """What the user restricts the search to.

    Parameters
    ----------
    allowed : Mapping[str, tuple[int | str | bool, ...]]
        Allowed values by plan field (:data:`LIMIT_KEYS`); fields not named are free.
    memory_headroom : float
        Share of the usable memory that must stay free.
    target : str | None
        Export target whose limits apply.
    """

    allowed: Mapping[str, tuple[int | str | bool, ...]] = field(default_factory=dict)
    memory_headroom: float = 0.0
    target: str | None = None

    def __post_init__(self) -> None:
        for key in self.allowed:
            if key not in LIMIT_KEYS:
                raise SpecError(f"constraints: unknown key '{key}'{did_you_mean(key, LIMIT_KEYS)}")
        if not 0.0 <= self.memory_headroom < 1.0:
            raise SpecError(
                f"constraints.memory_headroom must be 0 % to below 100 %, not {self.memory_headroom:.0%}"
            )


def space_blocks(
    context: CostContext, limits: SearchLimits, world_sizes: tuple[int, ...]
) -> Iterator[SpaceBlock]:
    """Yield the whole space, one block per tp, cp, pp and dp; where experts overlap, one more for those that cannot.

    Every factorisation of the world into tp, cp, pp and dp, with every grid of expert ranks; micro-batches that
    divide a replica's batch; every schedule with its chunks and its split of the layers; sequence parallelism;
    context parallel exchange; recompute; sharding, with HSDP groups of whole nodes and upwards; offload.
    Combinations no framework can run are included: constraints reject and count them. Vocabulary parallelism and
    NVMe are tried where the limits name them, overlapped experts also where the routing is known.

    Parameters
    ----------
    context : CostContext
        Job, with the cost models that place its layers.
    limits : SearchLimits
        What the user asks for.
    world_sizes : tuple[int, ...]
        Numbers of GPUs to plan for.

    Raises
    ------
    SpecError
        If the model has more layers than any model; every divisor of them would be a number of chunks.
    """
    model, workload = context.model, context.workload
    if model.num_layers > _MAX_LAYERS:
        raise SpecError(
            f"model {model.name}: num_layers must be at most {_MAX_LAYERS}, not {model.num_layers}"
        )
    per_node = context.cluster.node.num_gpus
    overlaps = overlap_degrees(context, limits.allowed.get("expert_overlap"))
    vocab_words = tuple(str(word) for word in limits.allowed.get("vocab_parallel", ("none",)))
    allows_nvme = any(
        "nvme" in limits.allowed.get(key, ()) for key in ("optimizer_offload", "parameter_offload")
    )
    recompute, offload = recompute_axis(model), offload_axis(context.cluster.node, allows_nvme)
    boundaries = _boundaries(context, world_sizes)
    for world in world_sizes:
        for tp in divisors(world):
            for cp in context_degrees(workload.sequence_length, world // tp):
                for pp in divisors(world // (tp * cp)):
                    dp = world // (tp * cp * pp)
                    axes = {
                        "micro_batch": micro_batch_axis(workload.global_batch_size, dp),
                        "layout": layout_axis(context, pp, boundaries[tp], vocab_words),
                        "sequence": sequence_axis(tp),
                        "context": context_axis(cp, tp, per_node),
                        "recompute": recompute,
                        "sharding": sharding_axis(dp, cp, tp, per_node),
                        "offload": offload,
                    }
                    for experts, overlap in expert_blocks(expert_axis(model, tp * cp * dp, tp), overlaps):
                        yield SpaceBlock(
                            degrees={"tp": tp, "cp": cp, "pp": pp, "dp": dp},
                            axes={"experts": experts, **axes, "overlap": overlap},
                            global_batch_size=workload.global_batch_size,
                            num_layers=model.num_layers,
                        )


def _boundaries(context: CostContext, world_sizes: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    """Return what embedding and LM head take by tensor parallel degree, in layers, for a micro-batch of 1."""
    degrees = sorted({tp for world in world_sizes for tp in divisors(world)})
    plans = [
        ParallelPlan(
            dp=1,
            tp=tp,
            micro_batch_size=1,
            schedule="none",
            sequence_parallel=tp > 1,
            layers_per_stage=(context.model.num_layers,),
        )
        for tp in degrees
    ]
    embedding, head = boundary_layers(context, PlanColumns.from_plans(plans, 1))
    return {tp: (float(embedding[row]), float(head[row])) for row, tp in enumerate(degrees)}


def enumerate_space(
    context: CostContext, limits: SearchLimits, world_sizes: tuple[int, ...]
) -> Iterator[PlanColumns]:
    """Yield the whole space as columns, tens of thousands of plans at a time; see :func:`space_blocks`."""
    pending: list[PlanColumns] = []
    num_rows = 0
    for block in space_blocks(context, limits, world_sizes):
        for start in range(0, len(block), _BLOCK_ROWS):
            pending.append(block.columns(np.arange(start, min(start + _BLOCK_ROWS, len(block)))))
            num_rows += len(pending[-1])
            if num_rows >= _BLOCK_ROWS:
                yield concatenate(pending)
                pending, num_rows = [], 0
    if pending:
        yield concatenate(pending)


def plan_of_row(job: TrainingJob, columns: PlanColumns, row: int) -> ParallelPlan:
    """Return one row of the columns as a plan."""

    def number(name: str) -> int:
        return int(getattr(columns, name)[row])

    pp, vpp, dp = number("pp"), number("vpp"), number("dp")
    group, layers = number("sharding_group"), number("recompute_layers")
    mask = number("recompute_modules")
    return ParallelPlan(
        dp=dp,
        tp=number("tp"),
        pp=pp,
        vpp=vpp,
        cp=number("cp"),
        cp_method=CP_METHODS[number("cp_method")],  # type: ignore[arg-type]  # codes index the words
        ep=number("ep"),
        etp=number("etp"),
        expert_overlap=number("expert_overlap"),
        sequence_parallel=bool(columns.sequence_parallel[row]),
        micro_batch_size=number("micro_batch_size"),
        schedule=SCHEDULES_KNOWN[number("schedule")],  # type: ignore[arg-type]  # as above
        recompute=RECOMPUTES[number("recompute")],  # type: ignore[arg-type]  # as above
        recompute_modules=tuple(name for bit, name in enumerate(RECOMPUTE_MODULES) if mask >> bit & 1),
        recompute_layers=None if layers >= ALL_LAYERS else layers,
        sharding=SHARDINGS[number("sharding")],  # type: ignore[arg-type]  # as above
        sharding_group=group if group < dp else None,
        secondary_group=number("secondary_group") or None,
        optimizer_offload=OFFLOADS[number("optimizer_offload")],  # type: ignore[arg-type]  # as above
        optimizer_offload_fraction=float(columns.optimizer_offload_fraction[row]),
        parameter_offload=OFFLOADS[number("parameter_offload")],  # type: ignore[arg-type]  # as above
        activation_offload=bool(columns.activation_offload[row]),
        vocab_parallel=VOCAB_PARALLELS[number("vocab_parallel")],  # type: ignore[arg-type]  # as above
        layers_per_stage=_layers_of_row(job, columns, row),
    )


def _layers_of_row(job: TrainingJob, columns: PlanColumns, row: int) -> tuple[int, ...]:
    """Return the split of the layers that the row's layer fields were taken from."""
    num_layers = job.model.num_layers
    num_stages = int(columns.pp[row] * columns.vpp[row])
    own = partition_layers(num_layers, num_stages)
    first, last = int(columns.chunk_first[row]), int(columns.chunk_last[row])
    if (own[0], own[-1]) == (first, last):
        return own
    return partition_with_ends(num_layers, num_stages, first, last)
