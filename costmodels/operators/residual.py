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
# Up to this many rows NumPy is quicker than loading a compiled kernel would be.
_FEW_ROWS = 2048
_FEW_TREE_ROWS = 256


class Residual(Protocol):
    """A correction of the logarithm of a time."""

    @property
    def has_steps(self) -> bool:
        """Whether it sees the operator's stepwise coordinates after the smooth ones."""
        ...

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

    @property
    def has_steps(self) -> bool:
        """Smooth coordinates only."""
        return False

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

    @property
    def has_steps(self) -> bool:
        """Trees see everything."""
        return True

    def log_correction(self, coordinates: Matrix) -> FloatColumn:
        """Return the sum over the trees."""
        total = np.full(len(coordinates), self.offset)
        if len(coordinates) <= _FEW_TREE_ROWS:
            leaves = self._leaves(coordinates)
            # One tree after the other, as the kernel adds them: the same bits.
            for tree in range(len(self.roots)):
                total += self.value[leaves[:, tree]]
            return total
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

    def _leaves(self, coordinates: Matrix) -> NDArray[np.int64]:
        """Return the leaf of each row in each tree, ``(num_rows, num_trees)``."""
        node = np.broadcast_to(self.roots, (len(coordinates), len(self.roots)))
        rows = np.arange(len(coordinates))[:, None]
        while True:
            is_inner = self.left[node] >= 0
            if not is_inner.any():
                return node
            goes_left = coordinates[rows, self.feature[node]] <= self.threshold[node]
            below = np.where(goes_left, self.left[node], self.right[node])
            node = np.where(is_inner, below, node)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedResidual:
    """A weighted sum of residuals that see the same coordinates."""

    parts: tuple[Residual, ...]
    weights: tuple[float, ...]

    @property
    def has_steps(self) -> bool:
        """Whether any part sees the stepwise coordinates."""
        return any(part.has_steps for part in self.parts)

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
        padded = np.zeros((len(coordinates), 3))
        position = (coordinates - self.low) / GRID_STEP
        padded[:, 3 - position.shape[1] :] = np.clip(position, 0.0, np.array(self.counts) - 1.0)
        counts = np.array((1, 1, *self.counts)[-3:], dtype=np.int64)
        if len(coordinates) <= _FEW_ROWS:
            return _interpolate_columns(padded, counts, self.values)
        total = np.empty(len(coordinates))
        _interpolate(padded, counts, self.values, total)
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
    # In place: the table is far larger than any cache, and every further copy of it costs as much as the sums.
    table: Matrix = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)[None, :]
    table -= (2.0 * points) @ centres.T
    np.maximum(table, 0.0, out=table)
    return np.sqrt(table, out=table)


def _interpolate_columns(position: Matrix, counts: NDArray[np.int64], values: FloatColumn) -> FloatColumn:
    """Return what :func:`_interpolate` writes, bit for bit, without a compiler to load."""
    low = np.minimum(position.astype(np.int64), np.maximum(counts - 2, 0))
    u, v, w = (position - low).T
    step_x, step_y = counts[1] * counts[2], counts[2]
    base = low[:, 0] * step_x + low[:, 1] * step_y + low[:, 2]
    to_x, to_y, to_z = (
        step if count > 1 else 0 for step, count in zip((step_x, step_y, 1), counts, strict=True)
    )
    near = (1.0 - v) * ((1.0 - w) * values[base] + w * values[base + to_z]) + v * (
        (1.0 - w) * values[base + to_y] + w * values[base + to_y + to_z]
    )
    far = (1.0 - v) * ((1.0 - w) * values[base + to_x] + w * values[base + to_x + to_z]) + v * (
        (1.0 - w) * values[base + to_x + to_y] + w * values[base + to_x + to_y + to_z]
    )
    total: FloatColumn = (1.0 - u) * near + u * far
    return total


@compiled
def _interpolate(
    position: Matrix, counts: NDArray[np.int64], values: FloatColumn, total: FloatColumn
) -> None:
    """Write the trilinear interpolant at ``position``, in cells of the grid, into ``total``."""
    step_x, step_y = counts[1] * counts[2], counts[2]
    for case in range(len(total)):
        x = min(int(position[case, 0]), max(counts[0] - 2, 0))
        y = min(int(position[case, 1]), max(counts[1] - 2, 0))
        z = min(int(position[case, 2]), max(counts[2] - 2, 0))
        u, v, w = position[case, 0] - x, position[case, 1] - y, position[case, 2] - z
        base = x * step_x + y * step_y + z
        # A dimension of one node has no next one.
        to_x = step_x if counts[0] > 1 else 0
        to_y = step_y if counts[1] > 1 else 0
        to_z = 1 if counts[2] > 1 else 0
        near = (1.0 - v) * ((1.0 - w) * values[base] + w * values[base + to_z]) + v * (
            (1.0 - w) * values[base + to_y] + w * values[base + to_y + to_z]
        )
        far = (1.0 - v) * ((1.0 - w) * values[base + to_x] + w * values[base + to_x + to_z]) + v * (
            (1.0 - w) * values[base + to_x + to_y] + w * values[base + to_x + to_y + to_z]
        )
        total[case] = (1.0 - u) * near + u * far


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
    """Add each tree's leaf value to ``total``, in place; in blocks of cases, so that one tree at a time is in cache."""
    for start in range(0, len(total), 256):
        for tree in range(len(roots)):
            for case in range(start, min(start + 256, len(total))):
                node = roots[tree]
                while left[node] >= 0:
                    goes_left = coordinates[case, feature[node]] <= threshold[node]
                    node = left[node] if goes_left else right[node]
                total[case] += value[node]
