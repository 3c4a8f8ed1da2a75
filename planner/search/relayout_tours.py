"""Tours through the ways in which layers hold their activations, from the layout of a stage's ends and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.search.non_dominated import non_dominated

__all__ = ["RelayoutTours"]


class _Path(NamedTuple):
    """Seconds forward and backward, and the layouts in the order of the visit."""

    forward: float
    backward: float
    order: tuple[int, ...]


class RelayoutTours:
    """The cheapest ways to visit a set of layouts.

    A stage takes its input and hands its output on in the layout of its ends. Re-layout times are those of the
    cheapest chain, so going through a third layout never pays and every layout is visited once.

    Parameters
    ----------
    relayout_time : NDArray[np.float64]
        Seconds from one layout to another, shape ``(num_layouts, num_layouts)``; a metric but for symmetry.
        Backward a gradient goes the other way [s].
    ends : int
        Layout of the stage's ends.
    """

    def __init__(self, relayout_time: NDArray[np.float64], ends: int) -> None:
        self._time, self._ends = relayout_time, ends
        # Being where one starts costs nothing, so the ends' own layout is no member of a set.
        self.bits = np.where(np.arange(len(relayout_time)) == ends, 0, 1 << np.arange(len(relayout_time)))
        self._tours: dict[int, list[_Path]] = {}
        self._paths: dict[tuple[int, int], list[_Path]] = {}

    def times(self, mask: int) -> NDArray[np.float64]:
        """Return forward and backward seconds of the Pareto-optimal tours of a set, shape ``(num_tours, 2)``."""
        return np.array([tour[:2] for tour in self._tours_of(mask)])

    def order(self, mask: int, weights: NDArray[np.float64]) -> tuple[int, ...]:
        """Return the layouts of the tour of least weighted time, in the order of the visit."""
        times = self.times(mask) @ weights
        return self._tours_of(mask)[int(times.argmin())].order

    def least(self, masks: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the least weighted time of each set, shape of ``masks``."""
        distinct, inverse = np.unique(masks, return_inverse=True)
        least = np.array([float((self.times(int(mask)) @ weights).min()) for mask in distinct])
        result: NDArray[np.float64] = least[inverse.reshape(-1)]
        return result

    def _tours_of(self, mask: int) -> list[_Path]:
        if mask not in self._tours:
            found = [_Path(0.0, 0.0, ())]
            if mask:
                found = [
                    self._onward(path, last, self._ends, path.order)
                    for last in self._members(mask)
                    for path in self._paths_to(mask, last)
                ]
            self._tours[mask] = _front(found)
        return self._tours[mask]

    def _paths_to(self, mask: int, last: int) -> list[_Path]:
        """Return the Pareto-optimal paths from the ends through a set that finish at ``last`` (Held and Karp)."""
        key = (mask, last)
        if key not in self._paths:
            rest = mask & ~(1 << last)
            found = [self._onward(_Path(0.0, 0.0, ()), self._ends, last, (last,))]
            if rest:
                found = [
                    self._onward(path, before, last, (*path.order, last))
                    for before in self._members(rest)
                    for path in self._paths_to(rest, before)
                ]
            self._paths[key] = _front(found)
        return self._paths[key]

    def _onward(self, path: _Path, here: int, there: int, order: tuple[int, ...]) -> _Path:
        """Return a path that goes on from one layout to another; its gradient comes back that way."""
        return _Path(
            path.forward + float(self._time[here, there]),
            path.backward + float(self._time[there, here]),
            order,
        )

    def _members(self, mask: int) -> list[int]:
        return [layout for layout in range(len(self._time)) if mask >> layout & 1]


def _front(paths: list[_Path]) -> list[_Path]:
    times = np.array([path[:2] for path in paths])
    keep = non_dominated(np.zeros(len(paths), dtype=np.int64), times)
    return [paths[row] for row in keep]
