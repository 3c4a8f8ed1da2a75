"""Pareto fronts: the rows of a table that no other row of their group beats."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled, for_kernel, from_kernel, kernel_output

__all__ = ["non_dominated"]


def non_dominated(group: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the rows no other row of the same group is at least as good as in every value, ascending.

    Of equal rows the first stays.

    Parameters
    ----------
    group : NDArray[np.int64]
        Rows are compared inside their group, shape ``(num_rows,)``.
    values : NDArray[np.float64]
        Smaller is better, shape ``(num_rows, num_values)``.

    Examples
    --------
    >>> group = np.array([0, 0, 0, 1])
    >>> non_dominated(group, np.array([[1.0, 5.0], [2.0, 4.0], [2.0, 5.0], [9.0, 9.0]])).tolist()
    [0, 1, 3]
    """
    num_rows, num_values = values.shape
    if num_rows == 0:
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort((*values.T[::-1], group)).astype(np.int64)
    kept = kernel_output(num_rows, 0, np.int64)
    count = _keep_front(
        for_kernel(np.ascontiguousarray(group[order])),
        for_kernel(np.ascontiguousarray(values[order]).reshape(-1)),
        num_values,
        kept,
    )
    rows: NDArray[np.int64] = np.sort(order[from_kernel(kept, np.int64)[:count]])
    return rows


@compiled
def _keep_front(
    group: NDArray[np.int64],
    values: NDArray[np.float64],
    num_values: int,
    kept: NDArray[np.int64],
) -> int:
    """Write the rows of each group's front to ``kept`` and return their number; rows are sorted.

    Sorted by group, then by all values in turn, so no row beats one before it.
    """
    count = 0
    start = 0
    for row in range(len(group)):
        if row > 0 and group[row] != group[row - 1]:
            start = count
        is_beaten = False
        for place in range(start, count):
            other = kept[place] * num_values
            own = row * num_values
            is_beaten = True
            # The first value is no larger by the order.
            for value in range(1, num_values):
                if values[other + value] > values[own + value]:
                    is_beaten = False
                    break
            if is_beaten:
                break
        if not is_beaten:
            kept[count] = row
            count += 1
    return count
