"""What a roofline leaves: corrections over log2 coordinates, fitted elsewhere; here those that are smooth.

A residual is ``log(measured / roofline)``. Outside the sampled box it fades, because a roofline extrapolates
(5.9 % at ten times the sampled FLOPs) and a residual does not (13 % untapered, 82 % without the roofline).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.simcore.compiled import compiled

__all__ = ["GRID_STEP", "RbfResidual", "Residual", "StackedResidual"]

Matrix = NDArray[np.float64]

# Octaves between nodes of a baked grid: at half an octave baking moves the error by less than 0.1 %.
GRID_STEP = 0.5
# Rows of queries taken at once, so that the table of distances stays near 32 MB.
_DISTANCES_AT_ONCE = 4_000_000
# Up to this many rows NumPy is quicker than loading a compiled kernel would be.
_FEW_ROWS = 2048


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
            self._grid.append(_empty_grid(self.centres))
        return self._grid[0].interpolate(coordinates, self.exact)

    def exact(self, coordinates: Matrix) -> FloatColumn:
        """Return the interpolant itself, ``offset - sum_i weights_i |x - centres_i|``."""
        step = max(1, _DISTANCES_AT_ONCE // len(self.centres))
        parts = [
            _distances(coordinates[start : start + step], self.centres) @ self.weights
            for start in range(0, len(coordinates), step)
        ]
        total: FloatColumn = self.offset - (np.concatenate(parts) if parts else np.zeros(0))
        return total


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
    """Nodes of an interpolant, evaluated as they are needed: a few queries touch a small part of the box."""

    low: FloatColumn
    counts: tuple[int, ...]
    values: FloatColumn

    def interpolate(self, coordinates: Matrix, exact: Callable[[Matrix], FloatColumn]) -> FloatColumn:
        """Return the multilinear interpolant, clamped to the box; ``exact`` gives the nodes nobody asked for yet."""
        padded = np.zeros((len(coordinates), 3))
        position = (coordinates - self.low) / GRID_STEP
        padded[:, 3 - position.shape[1] :] = np.clip(position, 0.0, np.array(self.counts) - 1.0)
        counts = np.array((1, 1, *self.counts)[-3:], dtype=np.int64)
        if len(coordinates) <= _FEW_ROWS:
            self._evaluate(_corners(padded, counts)[-1].ravel(), exact)
            return _interpolate_columns(padded, counts, self.values)
        self._evaluate(np.arange(len(self.values)), exact)
        total = np.empty(len(coordinates))
        _interpolate(padded, counts, self.values, total)
        return total

    def _evaluate(self, nodes: NDArray[np.int64], exact: Callable[[Matrix], FloatColumn]) -> None:
        missing = np.unique(nodes[np.isnan(self.values[nodes])])
        if len(missing):
            place = np.stack(np.unravel_index(missing, self.counts), axis=1)
            self.values[missing] = exact(self.low + GRID_STEP * place)


def _empty_grid(centres: Matrix) -> _Grid:
    """Return a regular grid over the box of the centres, no node of it evaluated."""
    low, high = centres.min(axis=0), centres.max(axis=0)
    counts = tuple(
        int(np.ceil((top - bottom) / GRID_STEP)) + 1 for bottom, top in zip(low, high, strict=True)
    )
    return _Grid(low=low, counts=counts, values=np.full(math.prod(counts), np.nan))


def _distances(points: Matrix, centres: Matrix) -> Matrix:
    """Return Euclidean distances ``(num_points, num_centres)``."""
    # In place: the table is far larger than any cache, and every further copy of it costs as much as the sums.
    table: Matrix = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)[None, :]
    table -= (2.0 * points) @ centres.T
    np.maximum(table, 0.0, out=table)
    return np.sqrt(table, out=table)


def _corners(position: Matrix, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the cell of each position, ``(num_rows, 3)``, and the nodes at its corners, ``(num_rows, 8)``."""
    low = np.minimum(position.astype(np.int64), np.maximum(counts - 2, 0))
    # A dimension of one node has no next one.
    x, y, z = (np.array([0, 1 if count > 1 else 0]) for count in counts)
    steps = (x[:, None, None] * counts[1] + y[:, None]) * counts[2] + z
    base = (low[:, 0] * counts[1] + low[:, 1]) * counts[2] + low[:, 2]
    return low, base[:, None] + steps.ravel()


def _interpolate_columns(position: Matrix, counts: NDArray[np.int64], values: FloatColumn) -> FloatColumn:
    """Return what :func:`_interpolate` writes, bit for bit, without a compiler to load."""
    low, nodes = _corners(position, counts)
    u, v, w = (position - low).T
    corner = values[nodes].T
    near = (1.0 - v) * ((1.0 - w) * corner[0] + w * corner[1]) + v * ((1.0 - w) * corner[2] + w * corner[3])
    far = (1.0 - v) * ((1.0 - w) * corner[4] + w * corner[5]) + v * ((1.0 - w) * corner[6] + w * corner[7])
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
