"""Plans as columns: the whole search space as numpy arrays, one entry per plan.

Every cost function of this folder that depends on a plan takes these columns, so that one plan (a column of
length 1) and a million are scored by the same formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.domain.plan import (
    CP_METHODS,
    OFFLOADS,
    RECOMPUTE_MODULES,
    RECOMPUTES,
    SCHEDULES_KNOWN,
    SHARDINGS,
    VOCAB_PARALLELS,
    ParallelPlan,
)

__all__ = [
    "ALL_LAYERS",
    "LAYER_FIELDS",
    "V_SHAPED",
    "CpMethods",
    "FloatColumn",
    "IntColumn",
    "Offloads",
    "PlanColumns",
    "Recomputes",
    "Schedules",
    "Shardings",
    "Spread",
    "VocabParallels",
    "layer_counts",
    "module_mask",
    "stage_layers",
]

# Columns that describe how layers are spread over stages.
LAYER_FIELDS = (
    "layers_first",
    "layers_second",
    "layers_middle",
    "layers_last",
    "middle_earliest",
    "middle_latest",
    "chunk_first",
    "chunk_last",
    "chunk_before",
    "chunk_between",
)
_BOTH_ENDS = ("zb_v", "v_half", "v_min", "dualpipe", "dualpipe_v")
V_SHAPED = ("zb_v", "v_half", "v_min", "dualpipe_v")
"""Schedules whose stage ``s`` holds virtual stages ``s`` and ``2 pp - 1 - s``: both ends on the first stage."""
# ``recompute_layers`` of plans that recompute every layer of a stage: more than any stage has.
ALL_LAYERS = 1_000_000
# Tables up to this size are filled rather than combinations sorted.
_SMALL_TABLE = 2**16
# More keys than a whole number tells apart.
_MOST_KEYS = 2**62

FloatColumn = NDArray[np.float64]
IntColumn = NDArray[np.int64]


class Shardings:
    """Column codes of ``ParallelPlan.sharding``."""

    NONE, ZERO1, ZERO2, ZERO3, HSDP = (SHARDINGS.index(name) for name in SHARDINGS)


class Recomputes:
    """Column codes of ``ParallelPlan.recompute``."""

    NONE, SELECTIVE, FULL = (RECOMPUTES.index(name) for name in RECOMPUTES)


class Schedules:
    """Column codes of ``ParallelPlan.schedule`` that formulas tell apart."""

    NONE = SCHEDULES_KNOWN.index("none")
    GPIPE = SCHEDULES_KNOWN.index("gpipe")
    INTERLEAVED = SCHEDULES_KNOWN.index("interleaved_1f1b")
    ZB_H1 = SCHEDULES_KNOWN.index("zb_h1")
    ZB_H2 = SCHEDULES_KNOWN.index("zb_h2")
    ZB_V = SCHEDULES_KNOWN.index("zb_v")
    V_HALF = SCHEDULES_KNOWN.index("v_half")
    V_MIN = SCHEDULES_KNOWN.index("v_min")
    DUALPIPE = SCHEDULES_KNOWN.index("dualpipe")
    DUALPIPE_V = SCHEDULES_KNOWN.index("dualpipe_v")


class CpMethods:
    """Column codes of ``ParallelPlan.cp_method``."""

    RING, ULYSSES, ALL_GATHER, HIERARCHICAL = (CP_METHODS.index(name) for name in CP_METHODS)


class Offloads:
    """Column codes of ``ParallelPlan.optimizer_offload`` and ``parameter_offload``."""

    NONE, CPU, NVME = (OFFLOADS.index(name) for name in OFFLOADS)


class VocabParallels:
    """Column codes of ``ParallelPlan.vocab_parallel``."""

    NONE, REDISTRIBUTED, VOCAB_1, VOCAB_2, INTERLACED = (
        VOCAB_PARALLELS.index(name) for name in VOCAB_PARALLELS
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanColumns:
    """One plan per row; every array has shape ``(num_plans,)``.

    Codes index the tuples of :mod:`meshwright.simcore.domain.plan`; the layer fields say how layers are spread
    and are those of :func:`layer_counts`. ``recompute_modules`` is a mask over ``RECOMPUTE_MODULES`` (0 is the
    software's choice), ``recompute_layers`` is :data:`ALL_LAYERS` and ``secondary_group`` 0 where the plan says
    nothing.
    """

    dp: IntColumn
    tp: IntColumn
    pp: IntColumn
    vpp: IntColumn
    cp: IntColumn
    cp_method: IntColumn
    ep: IntColumn
    etp: IntColumn
    expert_overlap: IntColumn
    sequence_parallel: NDArray[np.bool_]
    micro_batch_size: IntColumn
    num_micro_batches: IntColumn
    schedule: IntColumn
    recompute: IntColumn
    recompute_modules: IntColumn
    recompute_layers: IntColumn
    sharding: IntColumn
    sharding_group: IntColumn
    secondary_group: IntColumn
    optimizer_offload: IntColumn
    optimizer_offload_fraction: FloatColumn
    parameter_offload: IntColumn
    activation_offload: NDArray[np.bool_]
    vocab_parallel: IntColumn
    layers_first: IntColumn
    layers_second: IntColumn
    layers_middle: IntColumn
    layers_last: IntColumn
    middle_earliest: IntColumn
    middle_latest: IntColumn
    chunk_first: IntColumn
    chunk_last: IntColumn
    chunk_before: IntColumn
    chunk_between: IntColumn

    def __len__(self) -> int:
        """Return the number of plans."""
        return len(self.dp)

    def take(self, index: IntColumn | NDArray[np.bool_] | slice) -> PlanColumns:
        """Return the selected rows."""
        return PlanColumns(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def distinct(self, *names: str) -> tuple[PlanColumns, IntColumn]:
        """Return one row per distinct combination of some fields, and for every plan the row that is its own.

        What depends on these fields alone is costed once per combination and gathered:
        ``rows, inverse = columns.distinct("tp", "cp"); cost(rows)[inverse]``. The columns may be an open mesh: the
        inverse then has the shape that the fields have together.
        """
        if not len(self):
            return self, np.zeros(0, dtype=np.int64)
        arrays = [np.asarray(getattr(self, name), dtype=np.int64) for name in names]
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
        codes, num_codes = _joint_codes(arrays)
        inverse = np.broadcast_to(codes, shape)
        # Any plan of a combination stands for it.
        member = np.zeros(num_codes, dtype=np.int64)
        member[inverse.reshape(-1)] = np.arange(inverse.size)
        if len(shape) == 1:
            return self.take(member), inverse
        chosen = np.unravel_index(member, shape)

        def of_members(values: NDArray[np.generic]) -> NDArray[np.generic]:
            # A mesh may have dimensions that the fields do not: there the first entry is as good as any.
            index = tuple(
                place if own > 1 and size > 1 else 0
                for place, own, size in zip(chosen, values.shape, shape, strict=True)
            )
            return np.broadcast_to(values[index], num_codes)

        rows = PlanColumns(**{each.name: of_members(getattr(self, each.name)) for each in fields(self)})  # type: ignore[arg-type]  # dtypes stay
        return rows, inverse

    def thinned(self, *names: str) -> tuple[PlanColumns, Spread]:
        """Return fewer plans with every combination of some fields, and what spreads their values over all plans.

        ``few, spread = columns.thinned("tp", "cp"); spread(cost(few))``, like :meth:`distinct`, but an open mesh stays
        one: of its entries along a dimension those stay that differ in one of the fields.
        """
        arrays = [np.asarray(getattr(self, name), dtype=np.int64) for name in names]
        shape = np.broadcast_shapes(*(getattr(self, each.name).shape for each in fields(self)))
        chosen, places = self, []
        for axis, size in enumerate(shape):
            member, place = _distinct_along(arrays, axis, size)
            places.append(place)
            if place is not None:
                chosen = chosen._entries(axis, member)
                arrays = [_entries(array, axis, member) for array in arrays]
        return chosen, Spread(places=tuple(places))

    def _entries(self, axis: int, index: IntColumn) -> PlanColumns:
        """Return some of the entries along a dimension."""
        return PlanColumns(
            **{each.name: _entries(getattr(self, each.name), axis, index) for each in fields(self)}
        )

    def with_recompute(self, code: int) -> PlanColumns:
        """Return the same plans under another recompute policy."""
        return replace(
            self,
            recompute=np.full_like(self.recompute, code),
            recompute_modules=np.zeros_like(self.recompute_modules),
            recompute_layers=np.full_like(self.recompute_layers, ALL_LAYERS),
        )

    @property
    def recomputes_all_layers(self) -> NDArray[np.bool_]:
        """Whether what is recomputed is so in every layer."""
        result: NDArray[np.bool_] = self.recompute_layers >= ALL_LAYERS
        return result

    @property
    def per_batch_sharding(self) -> IntColumn:
        """The sharding where micro-batches may feel it (ZeRO-2, ZeRO-3 and HSDP), 0 elsewhere."""
        return np.where(self.sharding >= Shardings.ZERO2, self.sharding, 0)

    @property
    def per_batch_group(self) -> IntColumn:
        """The sharding group where micro-batches may feel it, 0 elsewhere."""
        is_felt = (self.sharding >= Shardings.ZERO2) | (self.parameter_offload != Offloads.NONE)
        return np.where(is_felt, self.sharding_group, 0)

    @property
    def offload_share(self) -> IntColumn:
        """Share of the optimizer states that is offloaded, in thousandths, to tell plans apart by whole numbers."""
        shares: IntColumn = np.round(1000.0 * self.optimizer_offload_fraction).astype(np.int64)
        return shares

    @property
    def has_both_ends(self) -> NDArray[np.bool_]:
        """Whether embedding and LM head sit on the same stages: without a pipeline, on a V, with DualPipe."""
        codes = [SCHEDULES_KNOWN.index(name) for name in _BOTH_ENDS]
        result: NDArray[np.bool_] = (self.pp == 1) | np.isin(self.schedule, codes)
        return result

    @classmethod
    def from_plans(cls, plans: Sequence[ParallelPlan], global_batch_size: int) -> PlanColumns:
        """Return the columns of some plans.

        Raises
        ------
        SpecError
            If the batch does not divide for one of them.
        """

        def column(values: list[int]) -> IntColumn:
            return np.array(values, dtype=np.int64)

        layers = np.array(
            [layer_counts(plan.layers_per_stage, plan.pp, plan.schedule) for plan in plans], dtype=np.int64
        )
        return cls(
            dp=column([p.dp for p in plans]),
            tp=column([p.tp for p in plans]),
            pp=column([p.pp for p in plans]),
            vpp=column([p.vpp for p in plans]),
            cp=column([p.cp for p in plans]),
            cp_method=column([CP_METHODS.index(p.cp_method) for p in plans]),
            ep=column([p.ep for p in plans]),
            etp=column([p.etp for p in plans]),
            expert_overlap=column([p.expert_overlap for p in plans]),
            sequence_parallel=np.array([p.sequence_parallel for p in plans], dtype=np.bool_),
            micro_batch_size=column([p.micro_batch_size for p in plans]),
            num_micro_batches=column([p.num_micro_batches(global_batch_size) for p in plans]),
            schedule=column([SCHEDULES_KNOWN.index(p.schedule) for p in plans]),
            recompute=column([RECOMPUTES.index(p.recompute) for p in plans]),
            recompute_modules=column([module_mask(p.recompute_modules) for p in plans]),
            recompute_layers=column([p.recompute_layers or ALL_LAYERS for p in plans]),
            sharding=column([SHARDINGS.index(p.sharding) for p in plans]),
            sharding_group=column([p.sharding_group or p.dp for p in plans]),
            secondary_group=column([p.secondary_group or 0 for p in plans]),
            optimizer_offload=column([OFFLOADS.index(p.optimizer_offload) for p in plans]),
            optimizer_offload_fraction=np.array([p.optimizer_offload_fraction for p in plans]),
            parameter_offload=column([OFFLOADS.index(p.parameter_offload) for p in plans]),
            activation_offload=np.array([p.activation_offload for p in plans], dtype=np.bool_),
            vocab_parallel=column([VOCAB_PARALLELS.index(p.vocab_parallel) for p in plans]),
            **{name: layers[:, index] for index, name in enumerate(LAYER_FIELDS)},
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spread:
    """Where each plan finds its value among those of fewer plans; see :meth:`PlanColumns.thinned`.

    Parameters
    ----------
    places : tuple[IntColumn | None, ...]
        For each dimension the entry that stands for each of its entries; None where all of them stayed.
    """

    places: tuple[IntColumn | None, ...]

    def __call__(self, values: FloatColumn) -> FloatColumn:
        """Return the value of every plan; values may have other dimensions before those of the plans.

        A dimension of a mesh along which they do not differ may stay 1 long.
        """
        for axis, place in enumerate(reversed(self.places), start=1):
            are_rows = len(self.places) == 1
            if place is not None and (are_rows or (axis <= values.ndim and values.shape[-axis] > 1)):
                values = values.take(place, axis=-axis)
        return values


def _entries(array: NDArray[Any], axis: int, index: IntColumn) -> NDArray[Any]:
    return array.take(index, axis=axis) if array.shape[axis] > 1 else array


def _distinct_along(arrays: Sequence[IntColumn], axis: int, size: int) -> tuple[IntColumn, IntColumn | None]:
    """Return one entry of a dimension for each combination of the arrays' values, and where each entry finds its own."""
    if size < 2:
        return np.arange(size), None
    keys = [np.zeros(1, dtype=np.int64)]
    for array in arrays:
        if array.shape[axis] > 1:
            slices = np.moveaxis(array, axis, 0).reshape(size, -1)
            # Slices of more entries than there are slices are compared as a whole.
            keys += list(slices.T) if slices.shape[1] < size else [_slice_codes(slices)]
    codes, num_codes = _joint_codes(keys)
    if num_codes == size:
        return np.arange(size), None
    member = np.zeros(num_codes, dtype=np.int64)
    codes = np.broadcast_to(codes, size)
    member[codes] = np.arange(size)
    return member, codes


def _slice_codes(values: IntColumn) -> IntColumn:
    """Return a number for each row that equal rows share."""
    rows = np.ascontiguousarray(values).view(np.dtype((np.void, values.itemsize * values.shape[1])))
    codes: IntColumn = np.unique(rows[:, 0], return_inverse=True)[1]
    return codes


def _joint_codes(arrays: Sequence[IntColumn]) -> tuple[IntColumn, int]:
    """Return a code from 0 up for each combination of the arrays' entries, without gaps, and the number of codes."""
    key, num_keys = np.zeros((1,) * arrays[0].ndim, dtype=np.int64), 1
    # Those of few entries first: they are joined before the key has the dimensions of all.
    for array in sorted(arrays, key=np.size):
        least = int(array.min())
        num_values = int(array.max()) - least + 1
        if num_values == 1:
            continue
        values = array - least
        if num_keys * num_values > _MOST_KEYS:
            key, num_keys = _without_gaps(key, num_keys)
            values, num_values = _without_gaps(values, num_values)
        key, num_keys = key * num_values + values, num_keys * num_values
    return _without_gaps(key, num_keys)


def _without_gaps(codes: IntColumn, num_codes: int) -> tuple[IntColumn, int]:
    """Renumber codes so that each occurs; through a table where they are few, by sorting where they are many."""
    if num_codes > max(_SMALL_TABLE, 16 * codes.size):
        found, inverse = np.unique(codes, return_inverse=True)
        return inverse.reshape(codes.shape), len(found)
    occurs = np.zeros(num_codes, dtype=np.bool_)
    occurs[codes.reshape(-1)] = True
    number = np.cumsum(occurs) - 1
    return number[codes], int(number[-1]) + 1


def module_mask(modules: Sequence[str]) -> int:
    """Return recompute modules as the bit mask of the column."""
    return sum(1 << RECOMPUTE_MODULES.index(module) for module in modules)


def layer_counts(layers_per_stage: Sequence[int], pp: int, schedule: str) -> tuple[int, ...]:
    """Return what formulas need of a layer layout, in the order of :data:`LAYER_FIELDS`.

    Layers of the first, the second, the fullest inner and the last physical stage (all chunks); the earliest
    and the latest inner stage as full as that; layers of the first and the last virtual stage, of those after the first up to the
    latest fullest, and up to the last physical stage (first chunks only).
    """
    stages = stage_layers(layers_per_stage, pp, schedule)
    inner = stages[1:-1]
    fullest = max(inner, default=stages[0])
    earliest = 1 + inner.index(fullest) if inner else 0
    latest = len(inner) - inner[::-1].index(fullest) if inner else 0
    return (
        stages[0],
        stages[min(1, pp - 1)],
        fullest,
        stages[-1],
        earliest,
        latest,
        layers_per_stage[0],
        layers_per_stage[-1],
        sum(layers_per_stage[1:latest]),
        sum(layers_per_stage[1 : pp - 1]),
    )


def stage_layers(layers_per_stage: Sequence[int], pp: int, schedule: str) -> list[int]:
    """Return the layers each physical stage holds: every pp-th virtual stage, or both arms of a V.

    With DualPipe stage ``s`` holds virtual stages ``s`` and ``pp - 1 - s``, each for half of the micro-batches.
    """
    if schedule in V_SHAPED:
        return [layers_per_stage[stage] + layers_per_stage[-1 - stage] for stage in range(pp)]
    if schedule == "dualpipe":
        return [layers_per_stage[stage] + layers_per_stage[pp - 1 - stage] for stage in range(pp)]
    return [sum(layers_per_stage[stage::pp]) for stage in range(pp)]
