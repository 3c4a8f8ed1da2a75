"""A first look at a block: which degrees, layouts and micro-batches are left, and a bound for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.bound import schedule_time_bound
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.planner.choices import Choices, choices_left
from meshwright.planner.objectives import Objective, objective_values
from meshwright.planner.space import SearchLimits
from meshwright.planner.space_block import SpaceBlock, concatenate

__all__ = ["CELL_AXES", "BlockOutline", "outlines"]

CELL_AXES = ("experts", "layout", "sequence", "micro_batch")
"""Axes of an outline. Of the others some never make a plan faster, and of the rest the best option counts."""
_FREE_AXES = ("context", "overlap")
# Cells that are bounded at once, over as many blocks as that takes.
_MOST_CELLS = 200_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockOutline:
    """What the rules but those of memory leave of a block, with lower bounds of the objective.

    Parameters
    ----------
    number : int
        Place of the block in the enumeration.
    block : SpaceBlock
        The block.
    choices : Choices
        What is left.
    rejections : dict[str, int]
        Plans each rule rejected.
    bounds : NDArray[np.float64]
        Lower bound of the objective by :data:`CELL_AXES`; infinite where nothing is left.
    """

    number: int
    block: SpaceBlock
    choices: Choices
    rejections: dict[str, int]
    bounds: NDArray[np.float64]

    @property
    def least(self) -> float:
        """Lower bound of all plans of the block."""
        return float(self.bounds.min(initial=np.inf))


def outlines(
    context: CostContext, blocks: Sequence[SpaceBlock], limits: SearchLimits, objective: Objective
) -> Iterator[BlockOutline]:
    """Yield the outline of each block, in order.

    Parameters
    ----------
    context : CostContext
        Job and software.
    blocks : Sequence[SpaceBlock]
        The space.
    limits : SearchLimits
        The user's restrictions.
    objective : Objective
        What is bounded.
    """
    waiting: list[_Cells] = []
    for number, block in enumerate(blocks):
        rejections: dict[str, int] = {}
        choices = choices_left(context, block, limits, rejections)
        waiting.append(_Cells(number, block, choices, rejections))
        if sum(len(cells) for cells in waiting) >= _MOST_CELLS:
            yield from _bounded(context, waiting, objective)
            waiting = []
    yield from _bounded(context, waiting, objective)


class _Cells:
    """The combinations of a block's options that decide how long its schedule takes."""

    def __init__(self, number: int, block: SpaceBlock, choices: Choices, rejections: dict[str, int]) -> None:
        self.number, self.block, self.choices, self.rejections = number, block, choices, rejections
        self.shape = [len(block.axes[name]) for name in (*CELL_AXES, *_FREE_AXES)]
        left = choices.joint((*CELL_AXES, *_FREE_AXES)) if len(choices) else np.zeros(self.shape, np.bool_)
        self.index = np.flatnonzero(left)

    def __len__(self) -> int:
        """Return the number of combinations."""
        return len(self.index)

    def columns(self, part: slice) -> PlanColumns:
        """Return a plan of each combination."""
        index = self.index[part]
        options = dict(zip((*CELL_AXES, *_FREE_AXES), np.unravel_index(index, self.shape), strict=True))
        first = np.zeros(len(index), dtype=np.int64)
        chosen = [options.get(name, first) for name in self.block.axes]
        return self.block.columns(np.ravel_multi_index(chosen, self.block.shape))

    def outline(self, values: FloatColumn) -> BlockOutline:
        """Return the outline, of the bounds of all combinations."""
        shape = self.shape[: len(CELL_AXES)]
        bounds = np.full(math.prod(shape), np.inf)
        np.minimum.at(bounds, self.index // math.prod(self.shape[len(CELL_AXES) :]), values)
        return BlockOutline(
            number=self.number,
            block=self.block,
            choices=self.choices,
            rejections=self.rejections,
            bounds=bounds.reshape(shape),
        )


def _bounded(context: CostContext, waiting: Sequence[_Cells], objective: Objective) -> Iterator[BlockOutline]:
    parts = [
        cells.columns(slice(start, start + _MOST_CELLS))
        for cells in waiting
        for start in range(0, len(cells), _MOST_CELLS)
    ]
    values = np.zeros(0)
    if parts:
        # A block alone may hold more than is bounded at once.
        groups = [parts] if len(waiting) > 1 else [[part] for part in parts]
        joined = [concatenate(group) for group in groups]
        values = np.concatenate(
            [objective_values(objective, each, schedule_time_bound(context, each)) for each in joined]
        )
    ends = np.cumsum([len(cells) for cells in waiting])
    for cells, part in zip(waiting, np.split(values, ends[:-1]) if len(ends) else [], strict=True):
        yield cells.outline(part)
