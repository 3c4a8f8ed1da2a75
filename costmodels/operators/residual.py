"""What a roofline leaves: smooth or stepwise corrections over log2 coordinates, fitted elsewhere, evaluated here.

A residual is ``log(measured / roofline)``. Outside the sampled box it fades, because a roofline extrapolates
(5.9 % at ten times the sampled FLOPs) and a residual does not (13 % untapered, 82 % without the roofline).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.simcore.compiled import compiled

__all__ = ["GRID_STEP", "RbfResidual", "Residual", "StackedResidual", "TreeResidual"]

Matrix = NDArray[np.float64]

# Octaves between nodes of a baked grid: at half an octave baking moves the error by less than 0.1 %.
GRID_STEP = 0.5
# Rows of queries taken at once, so that the table of distances stays near 32 MB.
_DISTANCES_AT_ONCE = 4_000_000


class Residual(Protocol):
    """A correction of the logarithm of a time."""

    def log_correction(self, coordinates: Matrix) -> FloatColumn:
        """Return ``log(time / roofline)`` at coordinates of shape ``(num_cases, num_dims)``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RbfResidual:
    """Radial basis functions with the linear kernel ``-r``; three dimensions or fewer are baked to a grid.

    Parameters
    ----------
    centres : NDArray[np.float64]
        Sampled coordinates, ``(num_centres, num_dims)``.
    weights : NDArray[np.float64]
        ``(num_centres,)``, summing to zero.
    offset : float
        Constant term.
    is_baked : bool
        Evaluate by multilinear interpolation on a regular grid over the box of the centres, clamped at it.
    """

    centres: Matrix
    weights: FloatColumn
    offset: float
    is_baked: bool = False
    _grid: list[_Grid] = field(default_factory=list, repr=False)

    def log_correction(self, coordinates: Matrix) -> FloatColumn:
        """Return the interpolant; on the baked grid where there is one."""
        coordinates = coordinates[:, : self.centres.shape[1]]
        if not self.is_baked:
            return self.exact(coordinates)
        if not self._grid:
            self._grid.append(_bake(self))
        return self._grid[0].interpolate(coordinates)

    def exact(self, coordinates: Matrix) -> FloatColumn:
        """Return the interpolant itself, ``offset - sum_i weights_i |x - centres_i|``."""
        step = max(1, _DISTANCES_AT_ONCE // len(self.centres))
        parts = [
            _distances(coordinates[start : start + step], self.centres) @ self.weights
            for start in range(0, len(coordinates), step)
        ]
        total: FloatColumn = self.offset - (np.concatenate(parts) if parts else np.zeros(0))
        return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeResidual:
    """A sum of regression trees as plain arrays: node ``i`` goes left where ``x[feature] <= threshold``.

    Parameters
    ----------
    roots : NDArray[np.int64]
        First node of each tree.
    feature, left, right : NDArray[np.int64]
        By node; ``left`` is -1 at a leaf.
    threshold, value : NDArray[np.float64]
        By node; ``value`` counts at leaves.
    offset : float
        Constant term.
    """

    roots: NDArray[np.int64]
    feature: NDArray[np.int64]
    threshold: FloatColumn
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: FloatColumn
    offset: float

    def log_correction(self, coordinates: Matrix) -> FloatColumn:
        """Return the sum over the trees."""
        total = np.full(len(coordinates), self.offset)
        _add_trees(
            np.ascontiguousarray(coordinates, dtype=np.float64),
            self.roots,
            self.feature,
            self.threshold,
            self.left,
            self.right,
            self.value,
            total,
        )
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedResidual:
    """A weighted sum of residuals that see the same coordinates."""

    parts: tuple[Residual, ...]
    weights: tuple[float, ...]

    def log_correction(self, coordinates: Matrix) -> FloatColumn:
        """Return the weighted sum of the parts."""
        total = np.zeros(len(coordinates))
        for part, weight in zip(self.parts, self.weights, strict=True):
            total = total + weight * part.log_correction(coordinates)
        return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Grid:
    low: FloatColumn
    counts: tuple[int, ...]
    values: FloatColumn

    def interpolate(self, coordinates: Matrix) -> FloatColumn:
        """Return the multilinear interpolant, clamped to the box."""
        last = np.array(self.counts) - 1
        position = np.clip((coordinates - self.low) / GRID_STEP, 0.0, last)
        cell = np.minimum(position.astype(np.int64), np.maximum(last - 1, 0))
        share = position - cell
        strides = np.cumprod([1, *self.counts[:0:-1]])[::-1]
        base = cell @ strides
        num_dims = len(self.counts)
        total = np.zeros(len(coordinates))
        for corner in range(1 << num_dims):
            weight = np.ones(len(coordinates))
            offset = np.zeros(len(coordinates), dtype=np.int64)
            for dim in range(num_dims):
                if corner >> dim & 1:
                    weight *= share[:, dim]
                    offset += strides[dim] * (last[dim] > 0)
                else:
                    weight *= 1.0 - share[:, dim]
            total += weight * self.values[base + offset]
        return total


def _bake(residual: RbfResidual) -> _Grid:
    """Evaluate the interpolant on a regular grid over the box of its centres."""
    low, high = residual.centres.min(axis=0), residual.centres.max(axis=0)
    counts = tuple(
        int(np.ceil((top - bottom) / GRID_STEP)) + 1 for bottom, top in zip(low, high, strict=True)
    )
    axes = [bottom + GRID_STEP * np.arange(count) for bottom, count in zip(low, counts, strict=True)]
    nodes = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    return _Grid(low=low, counts=counts, values=residual.exact(nodes))


def _distances(points: Matrix, centres: Matrix) -> Matrix:
    """Return Euclidean distances ``(num_points, num_centres)``."""
    squared = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)[None, :] - 2.0 * points @ centres.T
    distances: Matrix = np.sqrt(np.maximum(squared, 0.0))
    return distances


@compiled
def _add_trees(
    coordinates: Matrix,
    roots: NDArray[np.int64],
    feature: NDArray[np.int64],
    threshold: FloatColumn,
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    value: FloatColumn,
    total: FloatColumn,
) -> None:
    """Add each tree's leaf value to ``total``, in place."""
    for case in range(len(total)):
        for tree in range(len(roots)):
            node = roots[tree]
            while left[node] >= 0:
                goes_left = coordinates[case, feature[node]] <= threshold[node]
                node = left[node] if goes_left else right[node]
            total[case] += value[node]
