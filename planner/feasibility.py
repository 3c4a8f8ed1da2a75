"""Which plans of a block fit into memory, without listing those that do not.

Memory is the sum of a share that follows from the micro-batch and one that follows from the parameters: both are
tabulated on their own axes and added where the sum may fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.memory import MemoryShare, activation_share, state_share
from meshwright.costmodels.parallelism.offload_memory import host_demand
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, Offloads, PlanColumns
from meshwright.planner.choices import Choices
from meshwright.planner.constraints import HOST_MEMORY, MEMORY, Mask, allowed_memory
from meshwright.planner.space import SearchLimits
from meshwright.planner.space_block import SpaceBlock

__all__ = ["BATCH_AXES", "OUTER_AXES", "STATE_AXES", "FeasiblePart", "feasible_parts"]

# Axes of a memory table: those both shares depend on, those of the states alone, those of the activations alone.
OUTER_AXES = ("experts", "layout")
STATE_AXES = ("sharding", "offload")
BATCH_AXES = ("sequence", "micro_batch", "recompute", "context")
_ROW_AXES = (*OUTER_AXES, *STATE_AXES)
_TABLE_AXES = (*_ROW_AXES, *BATCH_AXES)
# Entries of a memory table that are held at once, and that are added up at once.
_MOST_ENTRIES = 4_000_000
_CACHED_ENTRIES = 60_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeasiblePart:
    """Feasible plans of a block: cells of a table over most axes, each with every option of the others.

    Parameters
    ----------
    block : SpaceBlock
        The block with the options that are left.
    whole : SpaceBlock
        The whole block.
    options : Mapping[str, IntColumn]
        For each axis the number that each of the options that are left has in the whole block.
    rows : NDArray[np.int64]
        Of each row of the table the options of :data:`OUTER_AXES` and :data:`STATE_AXES`, shape ``(4, num_rows)``.
    fits : NDArray[np.bool_]
        Cells that are feasible: rows by :data:`BATCH_AXES`, shape ``(num_rows, ...)``.
    free : NDArray[np.int64]
        Combinations of the axes that are in no table, by option, shape ``(num_combinations, num_free_axes)``.
    """

    block: SpaceBlock
    whole: SpaceBlock
    options: Mapping[str, IntColumn]
    rows: NDArray[np.int64]
    fits: NDArray[np.bool_]
    free: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of feasible plans."""
        return int(np.count_nonzero(self.fits)) * len(self.free)

    def plans(self, row: IntColumn, *cell: IntColumn) -> tuple[IntColumn, PlanColumns]:
        """Return the plans of some cells, with every combination of the free axes.

        Parameters
        ----------
        row, cell : IntColumn
            Where the cells are, as :func:`numpy.nonzero` of ``fits`` says it.

        Returns
        -------
        tuple[IntColumn, PlanColumns]
            Rows in the whole block, and the plans; ``len(free)`` of them for each cell.
        """
        chosen = dict(zip((*_ROW_AXES, *BATCH_AXES), (*self.rows[:, row], *cell), strict=True))
        spread = {name: np.repeat(values, len(self.free)) for name, values in chosen.items()}
        for place, name in enumerate(_free_axes(self.block)):
            spread[name] = np.tile(self.free[:, place], len(row))
        ordered = [spread[name] for name in self.block.axes]
        of_whole = [self.options[name][own] for name, own in zip(self.block.axes, ordered, strict=True)]
        return (
            np.ravel_multi_index(of_whole, self.whole.shape).astype(np.int64),
            self.block.columns(np.ravel_multi_index(ordered, self.block.shape)),
        )


def feasible_parts(
    context: CostContext, choices: Choices, limits: SearchLimits, rejections: dict[str, int]
) -> Iterator[FeasiblePart]:
    """Yield the plans that fit of those the other rules left, and add to the count of those that do not.

    The counts are complete when the last part was taken, and equal to those of
    :func:`meshwright.planner.constraints.apply_constraints` on all rows.

    Parameters
    ----------
    context : CostContext
        Job and software.
    choices : Choices
        What :func:`meshwright.planner.choices.choices_left` left of a block.
    limits : SearchLimits
        The user's restrictions.
    rejections : dict[str, int]
        Rejected plans per constraint name; added to in place.
    """
    for constraint in (MEMORY, HOST_MEMORY):
        rejections.setdefault(constraint.name, 0)
    if not len(choices):
        return
    allowed = allowed_memory(context, limits)
    for options in _slices(choices):
        tables = _Tables(context, choices.sliced(options))
        fits = tables.fitting(allowed)
        num_fitting = int(np.count_nonzero(fits)) * len(tables.free)
        rejections[MEMORY.name] += len(tables.choices) - num_fitting
        fits = tables.fitting_host(fits)
        num_feasible = int(np.count_nonzero(fits)) * len(tables.free)
        rejections[HOST_MEMORY.name] += num_fitting - num_feasible
        if num_feasible:
            kept = np.flatnonzero(fits.any(axis=1))
            yield FeasiblePart(
                block=tables.block,
                whole=choices.block,
                options=options,
                rows=tables.rows[:, kept],
                fits=fits[kept].reshape(len(kept), *tables.sizes[len(_ROW_AXES) :]),
                free=tables.free,
            )


def _free_axes(block: SpaceBlock) -> tuple[str, ...]:
    return tuple(name for name in block.axes if name not in _TABLE_AXES)


def _slices(choices: Choices) -> Iterator[dict[str, IntColumn]]:
    """Yield the options that are left in slices of the outer axes whose tables are small enough to hold."""
    alive = {name: np.flatnonzero(choices.joint((name,))) for name in choices.block.axes}
    per_pair = math.prod(len(alive[name]) for name in (*STATE_AXES, *BATCH_AXES))
    first, second = OUTER_AXES
    num_pairs = max(1, _MOST_ENTRIES // per_pair)
    per_first = max(1, num_pairs // len(alive[second]))
    per_second = min(num_pairs, len(alive[second]))
    for start in range(0, len(alive[first]), per_first):
        for begin in range(0, len(alive[second]), per_second):
            yield {
                **alive,
                first: alive[first][start : start + per_first],
                second: alive[second][begin : begin + per_second],
            }


def _flat(values: FloatColumn, shape: list[int], leading: int = 0) -> FloatColumn:
    """Return a mesh's values, broadcast to a shape, in one dimension behind the leading ones."""
    first = values.shape[:leading]
    return np.broadcast_to(values, (*first, *shape)).reshape(*first, -1)


class _Tables:
    """Both shares of the memory of a slice, and which of its rows (outer and state axes) may fit at all."""

    def __init__(self, context: CostContext, choices: Choices) -> None:
        self.context, self.choices, self.block = context, choices, choices.block
        self.sizes = [len(self.block.axes[name]) for name in _TABLE_AXES]
        # Memory depends on none of these axes (how experts overlap), and no rule ties them to those it depends on.
        self.free = np.argwhere(choices.joint(_free_axes(self.block)))
        row_sizes, cell_sizes = self.sizes[: len(_ROW_AXES)], self.sizes[len(_ROW_AXES) :]
        states = state_share(context, self.block.mesh(_ROW_AXES))
        self.states = MemoryShare(
            stages=_flat(states.stages, row_sizes, 1),
            host=_flat(states.host, row_sizes),
            nvme=_flat(states.nvme, row_sizes),
        )
        # Of the offload choices, activations only see whether they are offloaded themselves.
        kinds = self.block.axes["offload"].columns["activation_offload"]
        _, first_of_kind, self.kind = np.unique(kinds, return_index=True, return_inverse=True)
        self.num_kinds = len(first_of_kind)
        few = self.block.restricted({"offload": first_of_kind})
        activations = activation_share(context, few.mesh((*OUTER_AXES, "offload", *BATCH_AXES)))
        table = [*row_sizes[: len(OUTER_AXES)], self.num_kinds, *cell_sizes]
        self.num_cells = math.prod(cell_sizes)
        self.held = _flat(activations.stages, table, 1).reshape(len(states.stages), -1, self.num_cells)
        self.held_by_host = _flat(activations.host, table).reshape(-1, self.num_cells)
        self.factor = 1.0 + context.software.fragmentation
        self.rows = np.zeros((len(_ROW_AXES), 0), dtype=np.int64)
        self.index = np.zeros(0, dtype=np.int64)

    def fitting(self, allowed: float) -> Mask:
        """Choose the rows that may fit, and return which of their cells do, shape ``(num_rows, num_cells)``."""
        rows = np.indices(self.sizes[: len(_ROW_AXES)]).reshape(len(_ROW_AXES), -1)
        # The row of the activations' table that belongs to each of ours.
        index = (rows[0] * self.sizes[1] + rows[1]) * self.num_kinds + self.kind[rows[-1]]
        least = self.held.min(axis=-1)[:, index] + self.states.stages
        chosen = (least * self.factor <= allowed).all(axis=0) & self.choices.joint(_ROW_AXES).reshape(-1)
        self.rows, self.index = rows[:, chosen], index[chosen]
        self.states = MemoryShare(
            stages=self.states.stages[:, chosen], host=self.states.host[chosen], nvme=self.states.nvme[chosen]
        )
        fits = self.choices.cells(_ROW_AXES, self.rows, BATCH_AXES).reshape(-1, self.num_cells)
        for held, states in zip(self.held, self.states.stages, strict=True):
            for part in self._passes(np.arange(len(self.index))):
                total = held[self.index[part]] + states[part, np.newaxis]
                total *= self.factor
                fits[part] &= total <= allowed
        return fits

    def fitting_host(self, fits: Mask) -> Mask:
        """Return which of the cells that fit the device fit the host as well."""
        offload = self.block.axes["offload"].columns
        is_used = offload["activation_offload"].astype(np.bool_)
        for name in ("optimizer_offload", "parameter_offload"):
            is_used = is_used | (offload[name] != Offloads.NONE)
        result = fits.copy()
        for part in self._passes(np.flatnonzero(is_used[self.rows[-1]] & fits.any(axis=1))):
            host = self.held_by_host[self.index[part]] + self.states.host[part, np.newaxis]
            nvme = np.broadcast_to(self.states.nvme[part, np.newaxis], host.shape)
            result[part] &= host_demand(self.context, host, nvme).fits
        return result

    def _passes(self, rows: IntColumn) -> Iterator[IntColumn]:
        """Yield some rows of the table, as many at once as the caches hold."""
        step = max(1, _CACHED_ENTRIES // self.num_cells)
        for start in range(0, len(rows), step):
            yield rows[start : start + step]
