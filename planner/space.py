"""The plan space as columns: every way to run a job, before any constraint has spoken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from meshwright.costmodels.plan_columns import ALL_LAYERS, LAYER_FIELDS, PlanColumns, layer_counts
from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import (
    RECOMPUTES,
    SCHEDULES_KNOWN,
    SHARDINGS,
    ParallelPlan,
    can_partition,
    partition_layers,
)

__all__ = ["LIMIT_KEYS", "SearchLimits", "divisors", "enumerate_space", "plan_of_row"]

_SHARDINGS = ("none", "zero1", "zero2", "zero3", "hsdp")
# Rows evaluated at once: bounds the working memory to some tens of MiB whatever the space.
_BLOCK_ROWS = 65_536
# Ten times the deepest model that was ever trained (1,000-layer DeepNet, arXiv 2203.00555).
_MAX_LAYERS = 10_000

LIMIT_KEYS = (
    "dp",
    "tp",
    "pp",
    "vpp",
    "micro_batch_size",
    "sequence_parallel",
    "schedule",
    "recompute",
    "sharding",
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


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def enumerate_space(job: TrainingJob, world_sizes: tuple[int, ...]) -> Iterator[PlanColumns]:
    """Yield the whole space in blocks of columns.

    Every factorisation of the world into tp, pp and dp; micro-batches that divide the global batch; chunks
    that divide the layers; sequence parallelism; recompute; sharding, with HSDP groups of whole nodes and
    upwards. Combinations no framework can run are included: constraints reject and count them.

    Parameters
    ----------
    job : TrainingJob
        Model, cluster and workload.
    world_sizes : tuple[int, ...]
        Numbers of GPUs to plan for.

    Raises
    ------
    SpecError
        If the model has more layers than any model; every divisor of them would be a number of chunks.
    """
    if job.model.num_layers > _MAX_LAYERS:
        raise SpecError(
            f"model {job.model.name}: num_layers must be at most {_MAX_LAYERS}, not {job.model.num_layers}"
        )
    pending: list[dict[str, np.ndarray]] = []
    rows = 0
    for world in world_sizes:
        for tp in divisors(world):
            for pp in divisors(world // tp):
                block = _block(job, tp, pp, world // (tp * pp))
                pending.append(block)
                rows += len(block["tp"])
                if rows >= _BLOCK_ROWS:
                    yield _columns(job, pending)
                    pending, rows = [], 0
    if pending:
        yield _columns(job, pending)


def _block(job: TrainingJob, tp: int, pp: int, dp: int) -> dict[str, np.ndarray]:
    """Return the cross product of the remaining choices for one (tp, pp, dp)."""
    micro_batches = divisors(job.workload.global_batch_size)
    # A schedule and its number of chunks are one choice.
    pipelines = [("none", 1)]
    if pp > 1:
        # Chunks that leave layers even, or even but for embedding and loss at the ends.
        layers = job.model.num_layers
        chunks = sorted({d for d in (*divisors(layers), *divisors(layers + 2)) if d > 1})
        pipelines = [("gpipe", 1), ("1f1b", 1), *(("interleaved_1f1b", v) for v in chunks)]
    shardings = _sharding_choices(job, tp, dp)
    choices = np.meshgrid(
        np.array(micro_batches),
        np.arange(len(pipelines)),
        np.array([0, 1] if tp > 1 else [0]),
        np.arange(len(RECOMPUTES)),
        np.arange(len(shardings)),
        indexing="ij",
    )
    micro, pipeline, sequence, recompute, sharding = (choice.ravel() for choice in choices)
    num_rows = len(micro)
    schedule_codes = np.array([SCHEDULES_KNOWN.index(name) for name, _ in pipelines])
    return {
        "tp": np.full(num_rows, tp),
        "pp": np.full(num_rows, pp),
        "dp": np.full(num_rows, dp),
        "micro_batch_size": micro,
        "schedule": schedule_codes[pipeline],
        "vpp": np.array([v for _, v in pipelines])[pipeline],
        "sequence_parallel": sequence.astype(np.bool_),
        "recompute": recompute,
        "sharding": np.array([SHARDINGS.index(name) for name, _ in shardings])[sharding],
        "sharding_group": np.array([group for _, group in shardings])[sharding],
    }


def _sharding_choices(job: TrainingJob, tp: int, dp: int) -> list[tuple[str, int]]:
    if dp == 1:
        return [("none", 1)]
    choices = [(name, dp) for name in _SHARDINGS if name != "hsdp"]
    group = max(2, job.cluster.node.num_gpus // tp)
    while group < dp:
        if dp % group == 0:
            choices.append(("hsdp", group))
        group *= 2
    return choices


def _columns(job: TrainingJob, blocks: list[dict[str, np.ndarray]]) -> PlanColumns:
    merged = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    per_step = merged["dp"] * merged["micro_batch_size"]
    # Where the batch does not divide the constraint rejects the row; 1 keeps the arithmetic defined.
    num_micro_batches = np.maximum(job.workload.global_batch_size // per_step, 1)
    num_rows = len(per_step)
    return PlanColumns(
        **merged,
        **_unsearched(num_rows),
        num_micro_batches=num_micro_batches,
        **_layer_columns(job.model.num_layers, merged["pp"], merged["vpp"]),
    )


def _unsearched(num_rows: int) -> dict[str, np.ndarray]:
    """Return the columns the space leaves at their default."""
    ones, zeros = np.ones(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=np.int64)
    return {
        "cp": ones,
        "cp_method": zeros,
        "ep": ones,
        "etp": ones,
        "expert_overlap": ones,
        "recompute_modules": zeros,
        "recompute_layers": np.full(num_rows, ALL_LAYERS),
        "secondary_group": zeros,
        "optimizer_offload": zeros,
        "optimizer_offload_fraction": np.ones(num_rows),
        "parameter_offload": zeros,
        "activation_offload": np.zeros(num_rows, dtype=np.bool_),
        "vocab_parallel": zeros,
    }


def _layer_columns(num_layers: int, pp: np.ndarray, vpp: np.ndarray) -> dict[str, np.ndarray]:
    """Return the layer fields of the columns, as ``partition_layers`` spreads the layers; 0 where it cannot."""
    pairs, inverse = np.unique(pp * (num_layers + 3) + vpp, return_inverse=True)
    table = np.zeros((len(pairs), len(LAYER_FIELDS)), dtype=np.int64)
    for row, pair in enumerate(pairs):
        stages, chunks = divmod(int(pair), num_layers + 3)
        if can_partition(num_layers, stages * chunks):
            table[row] = layer_counts(partition_layers(num_layers, stages * chunks), stages)
    return {name: table[inverse, index] for index, name in enumerate(LAYER_FIELDS)}


def plan_of_row(job: TrainingJob, columns: PlanColumns, row: int) -> ParallelPlan:
    """Return one row of the columns as a plan."""
    sharding = SHARDINGS[columns.sharding[row]]
    pp, vpp, dp = int(columns.pp[row]), int(columns.vpp[row]), int(columns.dp[row])
    group = int(columns.sharding_group[row])
    return ParallelPlan(
        dp=dp,
        tp=int(columns.tp[row]),
        pp=pp,
        vpp=vpp,
        sequence_parallel=bool(columns.sequence_parallel[row]),
        micro_batch_size=int(columns.micro_batch_size[row]),
        schedule=SCHEDULES_KNOWN[columns.schedule[row]],
        recompute=RECOMPUTES[columns.recompute[row]],
        sharding=sharding,
        sharding_group=group if group < dp else None,
        layers_per_stage=partition_layers(job.model.num_layers, pp * vpp),
    )
