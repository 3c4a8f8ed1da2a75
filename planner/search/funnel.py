"""The funnel: the whole space is counted, and the plans with the best bounds are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.bound import iteration_time_bound
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns
from meshwright.planner.feasibility import FeasiblePart, feasible_parts
from meshwright.planner.objectives import objective_values
from meshwright.planner.search.base import SearchRequest
from meshwright.planner.search.outline import CELL_AXES, BlockOutline
from meshwright.planner.space_block import SpaceBlock, concatenate

__all__ = ["BestBounds", "Bounded", "Funnel", "no_plans"]

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
    at_most : float
        Keep plans up to this value only.
    """

    def __init__(
        self, num_kept: int, above: tuple[float, int, int] | None = None, at_most: float = np.inf
    ) -> None:
        self.num_kept, self.above = num_kept, above
        self.threshold = at_most
        self._parts = [no_plans()]
        self._num_waiting = 0

    def add(self, plans: Bounded) -> None:
        """Consider some plans."""
        plans = plans.take(plans.value <= self.threshold)
        if self.above is not None:
            plans = plans.take(_is_behind(plans, self.above))
        self._parts.append(plans)
        self._num_waiting += len(plans)
        if self._num_waiting > self.num_kept or sum(len(part) for part in self._parts) == self.num_kept:
            self._merge()

    def _merge(self) -> None:
        every = _joined(self._parts)
        if len(every) > self.num_kept:
            every = every.take(np.sort(_order(every)[: self.num_kept]))
        if len(every) == self.num_kept:
            self.threshold = min(self.threshold, float(every.value.max()))
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


class Funnel:
    """Counts the feasible plans of blocks and keeps those with the best bounds.

    Parameters
    ----------
    request : SearchRequest
        The search.
    best : BestBounds
        What is kept.
    """

    def __init__(self, request: SearchRequest, best: BestBounds) -> None:
        self.request, self.best = request, best
        self._waiting: list[tuple[int, IntColumn, PlanColumns]] = []
        self._num_waiting = 0

    def pour(self, outline: BlockOutline, rejections: dict[str, int]) -> int:
        """Return how many plans of a block are feasible, and consider those that may be among the best.

        Parameters
        ----------
        outline : BlockOutline
            Of the block.
        rejections : dict[str, int]
            Plans each constraint rejected; added to in place.
        """
        for name, count in outline.rejections.items():
            rejections[name] = rejections.get(name, 0) + count
        num_feasible = 0
        request = self.request
        for part in feasible_parts(request.context, outline.choices, request.limits, rejections):
            num_feasible += len(part)
            for rows, columns in _promising(part, outline, self.best):
                self._waiting.append((outline.number, rows, columns))
                self._num_waiting += len(rows)
                if self._num_waiting >= _MOST_ROWS:
                    self._bound()
        return num_feasible

    def kept(self) -> Bounded:
        """Return the plans with the best bounds of all blocks so far, in the order of the space."""
        self._bound()
        return self.best.kept()

    def _bound(self) -> None:
        """Bound the plans that wait; the more at once, the less each costs."""
        if not self._waiting:
            return
        columns = concatenate([part for _, _, part in self._waiting])
        bound = iteration_time_bound(self.request.context, columns)
        self.best.add(
            Bounded(
                block=np.concatenate([np.full(len(rows), number) for number, rows, _ in self._waiting]),
                row=np.concatenate([rows for _, rows, _ in self._waiting]),
                value=objective_values(self.request.objective, columns, bound),
                bound=bound,
            )
        )
        self._waiting, self._num_waiting = [], 0


def _promising(
    part: FeasiblePart, outline: BlockOutline, best: BestBounds
) -> Iterator[tuple[IntColumn, PlanColumns]]:
    """Yield feasible plans whose outline is not above the threshold: row in the whole block, and columns."""
    cells = outline.bounds[np.ix_(*(part.options[name] for name in CELL_AXES))]
    of_row = cells[part.rows[0], part.rows[1]]
    limit = best.threshold * (1.0 + _ROUNDING)
    if not (of_row <= limit).any():
        return
    # Recompute and the exchange of context parallel ranks are in no outline.
    row, *cell = np.nonzero(part.fits & (of_row <= limit)[..., np.newaxis, np.newaxis])
    bounds = of_row[row, cell[0], cell[1]]
    order = np.argsort(bounds, kind="stable")
    step = max(1, _MOST_ROWS // len(part.free))
    for start in range(0, len(order), step):
        chosen = order[start : start + step]
        if bounds[chosen[0]] > best.threshold * (1.0 + _ROUNDING):
            return
        yield part.plans(row[chosen], *(index[chosen] for index in cell))
