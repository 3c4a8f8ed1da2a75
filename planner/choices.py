"""Which combinations of a block's options are left: independent parts, each a mask over a few axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import IntColumn
from meshwright.planner.constraints import RULES, Mask
from meshwright.planner.space import SearchLimits
from meshwright.planner.space_block import SpaceBlock

__all__ = ["Choices", "choices_left"]


class Choices:
    """Combinations of a block's options that are left.

    Parameters
    ----------
    block : SpaceBlock
        The block.
    parts : Sequence[tuple[tuple[str, ...], Mask]]
        Axes in the order of the block, and which combinations of their options are left; every axis is in one
        part, and a plan is left where it is in all.
    """

    def __init__(self, block: SpaceBlock, parts: Sequence[tuple[tuple[str, ...], Mask]]) -> None:
        self.block, self.parts = block, list(parts)

    @classmethod
    def all_of(cls, block: SpaceBlock) -> Choices:
        """Return every combination."""
        return cls(block, [((name,), np.ones(len(axis), np.bool_)) for name, axis in block.axes.items()])

    def __len__(self) -> int:
        """Return how many combinations are left."""
        return math.prod(int(np.count_nonzero(mask)) for _, mask in self.parts)

    def restrict(self, mask: Mask) -> None:
        """Keep some combinations; the mask has a dimension for each axis, 1 long where it does not depend on it."""
        names, sizes = tuple(self.block.axes), self.block.shape
        # What depends on the degrees alone keeps all options of any axis, or none.
        places = [place for place, size in enumerate(mask.shape) if size > 1] or [0]
        axes = tuple(names[place] for place in places)
        own = mask.reshape([mask.shape[place] for place in places])
        apart = [part for part in self.parts if not set(part[0]) & set(axes)]
        touched = [part for part in self.parts if set(part[0]) & set(axes)]
        merged = tuple(name for name in names if any(name in part for part, _ in touched))
        joint = _spread(np.broadcast_to(own, [sizes[place] for place in places]), axes, merged)
        for part, left in touched:
            joint = joint & _spread(left, part, merged)
        self.parts = [*apart, (merged, joint)]

    def joint(self, axes: tuple[str, ...]) -> Mask:
        """Return which combinations of some axes' options are left, a dimension for each axis in this order."""
        left = np.ones([len(self.block.axes[name]) for name in axes], dtype=np.bool_)
        for names, mask in self.parts:
            own = tuple(name for name in names if name in axes)
            if own:
                others = tuple(place for place, name in enumerate(names) if name not in axes)
                left &= _spread(np.asarray(mask.any(axis=others)), own, axes)
        return left

    def sliced(self, options: Mapping[str, IntColumn]) -> Choices:
        """Return the combinations of some options of every axis."""
        parts = [(names, mask[np.ix_(*(options[name] for name in names))]) for names, mask in self.parts]
        return Choices(self.block.restricted(options), parts)

    def cells(self, rows: tuple[str, ...], index: NDArray[np.int64], cells: tuple[str, ...]) -> Mask:
        """Return which options of some axes are left for combinations of others.

        Parameters
        ----------
        rows : tuple[str, ...]
            Axes whose options are given.
        index : NDArray[np.int64]
            Their options, shape ``(num_row_axes, num_rows)``.
        cells : tuple[str, ...]
            The other axes.

        Returns
        -------
        Mask
            Shape ``(num_rows, ...)`` with a dimension for each of ``cells``; of parts without any of them nothing
            is asked.
        """
        axes = (*rows, *cells)
        sizes = [len(self.block.axes[name]) for name in axes]
        left = np.ones((len(index[0]), *sizes[len(rows) :]), dtype=np.bool_)
        for names, mask in self.parts:
            if set(names) & set(cells):
                left &= np.broadcast_to(_spread(mask, names, axes), sizes)[tuple(index)]
        return left


def choices_left(
    context: CostContext, block: SpaceBlock, limits: SearchLimits, rejections: dict[str, int]
) -> Choices:
    """Return what every rule but those of memory leaves of a block, and add to the count of those each rejected.

    A rule is evaluated on the axes it depends on; how many plans it rejects follows from the sizes of what is left.
    """
    choices, mesh = Choices.all_of(block), block.mesh(tuple(block.axes))
    for constraint in RULES:
        before = len(choices)
        for condition in constraint.conditions(context, limits):
            choices.restrict(condition(context, mesh))
        rejections[constraint.name] = rejections.get(constraint.name, 0) + before - len(choices)
    return choices


def _spread(mask: Mask, axes: tuple[str, ...], over: tuple[str, ...]) -> Mask:
    """Return a mask with its axes at their places among others, along which it is 1 long."""
    order = [axes.index(name) for name in over if name in axes]
    sizes = iter([mask.shape[place] for place in order])
    return mask.transpose(order).reshape([next(sizes) if name in axes else 1 for name in over])
