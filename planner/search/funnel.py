"""The funnel: the whole space is counted, and the plans with the best bounds are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.bound import iteration_time_bound
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns
from meshwright.planner.feasibility import BATCH_AXES, OUTER_AXES, STATE_AXES, FeasiblePart, feasible_parts
from meshwright.planner.objectives import objective_values
from meshwright.planner.search.base import SearchRequest
from meshwright.planner.search.outline import CELL_AXES, BlockOutline
from meshwright.planner.space_block import SpaceBlock, concatenate

__all__ = ["BestBounds", "feasible_plans"]

# Plans bounded at once: bounds the working memory to some tens of MiB whatever the space.
_MOST_ROWS = 16_384
# Bounds that agree to this share are one: no plan is left out for the rounding of its relaxation.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bounded:
    """Plans by block and row of the space, with their bounds; arrays of shape ``(num_plans,)``.

    ``value`` is the bound of the objective, ``bound`` that of the iteration time [s].
    """

    block: IntColumn
    row: IntColumn
    value: FloatColumn
    bound: FloatColumn

    def __len__(self) -> int:
        """Return the number of plans."""
        return len(self.block)

    def take(self, index: IntColumn | NDArray[np.bool_]) -> Bounded:
        """Return the selected plans."""
        return Bounded(
            block=self.block[index], row=self.row[index], value=self.value[index], bound=self.bound[index]
        )

    def columns(self, blocks: Sequence[SpaceBlock]) -> PlanColumns:
        """Return the plans; they must be in the order of their blocks."""
        starts = np.flatnonzero(np.diff(self.block, prepend=-1))
        parts = np.split(self.row, starts[1:])
        return concatenate(
            [blocks[self.block[start]].columns(rows) for start, rows in zip(starts, parts, strict=True)]
        )


def no_plans() -> Bounded:
    """Return no plan at all."""
    none, nothing = np.zeros(0, dtype=np.int64), np.zeros(0)
    return Bounded(block=none, row=none, value=nothing, bound=nothing)


class BestBounds:
    """The plans with the best bounds of the objective, among equals those that are enumerated first.

    Which they are does not depend on the order in which plans are added.

    Parameters
    ----------
    num_kept : int
        Plans to keep.
    above : tuple[float, int, int] | None
        Keep plans behind this value, block and row only; None keeps the best of all.
    """

    def __init__(self, num_kept: int, above: tuple[float, int, int] | None = None) -> None:
        self.num_kept, self.above = num_kept, above
        self.threshold = np.inf
        self._parts = [no_plans()]
        self._num_waiting = 0

    def add(self, plans: Bounded) -> None:
        """Consider some plans."""
        plans = plans.take(plans.value <= self.threshold)
        if self.above is not None:
            plans = plans.take(_is_behind(plans, self.above))
        self._parts.append(plans)
        self._num_waiting += len(plans)
        if self._num_waiting > self.num_kept or (
            self._num_waiting and sum(len(part) for part in self._parts) >= self.num_kept
        ):
            self._merge()

    def _merge(self) -> None:
        every = _joined(self._parts)
        if len(every) > self.num_kept:
            every = every.take(np.sort(_order(every)[: self.num_kept]))
        if len(every) == self.num_kept:
            self.threshold = float(every.value.max())
        self._parts, self._num_waiting = [every], 0

    def kept(self) -> Bounded:
        """Return the plans kept, in the order of the space."""
        self._merge()
        (every,) = self._parts
        return every.take(np.lexsort((every.row, every.block)))


def _joined(parts: Sequence[Bounded]) -> Bounded:
    return Bounded(
        block=np.concatenate([part.block for part in parts]),
        row=np.concatenate([part.row for part in parts]),
        value=np.concatenate([part.value for part in parts]),
        bound=np.concatenate([part.bound for part in parts]),
    )


def _order(plans: Bounded) -> IntColumn:
    return np.lexsort((plans.row, plans.block, plans.value))


def _is_behind(plans: Bounded, place: tuple[float, int, int]) -> NDArray[np.bool_]:
    value, block, row = place
    later = (plans.block > block) | ((plans.block == block) & (plans.row > row))
    behind: NDArray[np.bool_] = (plans.value > value) | ((plans.value == value) & later)
    return behind


def feasible_plans(
    request: SearchRequest, outline: BlockOutline, best: BestBounds, rejections: dict[str, int]
) -> int:
    """Count the feasible plans of a block, and add those to the best whose bounds may be among them.

    Parameters
    ----------
    request : SearchRequest
        The search.
    outline : BlockOutline
        Of the block.
    best : BestBounds
        Added to in place.
    rejections : dict[str, int]
        Plans each constraint rejected; added to in place.

    Returns
    -------
    int
        Feasible plans.
    """
    for name, count in outline.rejections.items():
        rejections[name] = rejections.get(name, 0) + count
    num_feasible = 0
    for part in feasible_parts(request.context, outline.choices, request.limits, rejections):
        num_feasible += len(part)
        for rows, columns in _promising(part, outline, best):
            bound = iteration_time_bound(request.context, columns)
            best.add(
                Bounded(
                    block=np.full(len(rows), outline.number, dtype=np.int64),
                    row=rows,
                    value=objective_values(request.objective, columns, bound),
                    bound=bound,
                )
            )
    return num_feasible


def _promising(
    part: FeasiblePart, outline: BlockOutline, best: BestBounds
) -> Iterator[tuple[IntColumn, PlanColumns]]:
    """Yield feasible plans whose outline is not above the threshold: row in the whole block, and columns."""
    cells = outline.bounds[np.ix_(*(part.options[name] for name in CELL_AXES))]
    of_row = cells[part.rows[0], part.rows[1]]
    limit = best.threshold * (1.0 + _ROUNDING)
    if not (of_row <= limit).any():
        return
    row, *cell = np.nonzero(part.fits & (of_row <= limit)[..., np.newaxis])
    bounds = of_row[row, cell[0], cell[1]]
    order = np.argsort(bounds, kind="stable")
    step = max(1, _MOST_ROWS // len(part.free))
    for start in range(0, len(order), step):
        chosen = order[start : start + step]
        if bounds[chosen[0]] > best.threshold * (1.0 + _ROUNDING):
            return
        options = dict(zip((*OUTER_AXES, *STATE_AXES), part.rows[:, row[chosen]], strict=True))
        options |= dict(zip(BATCH_AXES, (index[chosen] for index in cell), strict=True))
        times = len(part.free)
        spread = {name: np.repeat(values, times) for name, values in options.items()}
        for place, name in enumerate(part.free_axes):
            spread[name] = np.tile(part.free[:, place], len(chosen))
        ordered = [spread[name] for name in part.block.axes]
        of_whole = [part.options[name][values] for name, values in zip(part.block.axes, ordered, strict=True)]
        yield (
            np.ravel_multi_index(of_whole, outline.block.shape).astype(np.int64),
            part.block.columns(np.ravel_multi_index(ordered, part.block.shape)),
        )
