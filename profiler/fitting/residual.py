"""Fit what a roofline leaves by radial basis functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators import (
    Operator,
    OperatorModel,
    RbfResidual,
    Residual,
    StackedResidual,
)

__all__ = ["fit_rbf", "left_out_by_rbf", "unbaked"]

Matrix = NDArray[np.float64]

# Added to the diagonal, in octaves: the interpolant passes near, not through, samples of 1 % noise or so.
SMOOTHING = 0.6


def fit_rbf(operator: Operator, coordinates: Matrix, log_errors: Matrix) -> RbfResidual:
    """Return radial basis functions with the linear kernel through ``log_errors``.

    Parameters
    ----------
    operator : Operator
        Whose smooth coordinates count.
    coordinates : NDArray[np.float64]
        ``(num_samples, at least num_dims)``, no two rows equal in the first ``num_dims``.
    log_errors : NDArray[np.float64]
        ``log(measured / roofline)``, ``(num_samples,)``.

    Notes
    -----
    Solves ``[-D + s I, 1; 1', 0] [w; c] = [y; 0]`` with the matrix of distances ``D``: the smoothing conditionally
    positive definite kernel of order 1 (Wahba 1990, chapter 2).
    """
    centres = coordinates[:, : operator.num_dims]
    solution = np.linalg.solve(_system(centres), np.append(log_errors, 0.0))
    return RbfResidual(
        centres=centres,
        weights=solution[:-1],
        offset=float(solution[-1]),
        is_baked=operator.is_bakeable,
    )


def left_out_by_rbf(
    operator: Operator, coordinates: Matrix, log_errors: Matrix, folds: Sequence[NDArray[np.int64]]
) -> Matrix:
    """Return what :func:`fit_rbf` of all other folds leaves of each sample's log error.

    Parameters
    ----------
    operator, coordinates, log_errors
        As in :func:`fit_rbf`.
    folds : Sequence[NDArray[np.int64]]
        Rows of each fold, together all.

    Notes
    -----
    From one inverse of the system of all samples: ``(A^-1)_ff^-1 w_f`` for fold ``f`` (Rippa 1999 for folds of one),
    without solving the systems that lack a fold.
    """
    inverse = np.linalg.inv(_system(coordinates[:, : operator.num_dims]))[:-1, :-1]
    weights, left = inverse @ log_errors, np.empty_like(log_errors)
    for rows in folds:
        left[rows] = np.linalg.solve(inverse[np.ix_(rows, rows)], weights[rows])
    return left


def _system(centres: Matrix) -> Matrix:
    """Return the bordered matrix of an interpolant through ``centres``."""
    count = len(centres)
    system = np.ones((count + 1, count + 1))
    system[count, count] = 0.0
    squared = ((centres[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
    system[:count, :count] = -np.sqrt(squared) + SMOOTHING * np.eye(count)
    return system


def unbaked(model: OperatorModel) -> OperatorModel:
    """Return the model with radial basis functions evaluated as they are, not read from a grid.

    Times differ by less than 0.1 %; a grid takes as long to bake as thousands of shapes to evaluate.
    """
    return model if model.residual is None else replace(model, residual=_unbaked(model.residual))


def _unbaked(residual: Residual) -> Residual:
    if isinstance(residual, StackedResidual):
        return replace(residual, parts=tuple(_unbaked(part) for part in residual.parts))
    return replace(residual, is_baked=False) if isinstance(residual, RbfResidual) else residual
