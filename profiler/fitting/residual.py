"""Fit what a roofline leaves: radial basis functions, or regression trees where kernels switch in steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators import (
    Operator,
    OperatorModel,
    RbfResidual,
    Residual,
    StackedResidual,
    TreeResidual,
)
from meshwright.costmodels.operators.trees import MAX_LEAVES
from meshwright.errors import CalibrationError

__all__ = ["fit_rbf", "fit_trees", "has_trees", "left_out_by_rbf", "unbaked"]

Matrix = NDArray[np.float64]

# Added to the diagonal, in octaves: the interpolant passes near, not through, samples of 1 % noise or so.
SMOOTHING = 0.6
NUM_TREES, LEARNING_RATE = 150, 0.15
# Leaves of one sample follow the draw of the thresholds: errors vary by a tenth with it, and are larger in the mean.
_LEAF_SAMPLES = 2


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


def has_trees() -> bool:
    """Return whether scikit-learn, which grows the trees, is installed."""
    return importlib.util.find_spec("sklearn") is not None


def fit_trees(coordinates: Matrix, log_errors: Matrix) -> TreeResidual:
    """Return boosted extremely randomised trees through ``log_errors``, as plain arrays.

    Parameters
    ----------
    coordinates : NDArray[np.float64]
        ``(num_samples, num_dims)``, smooth and stepwise ones.
    log_errors : NDArray[np.float64]
        ``log(measured / roofline)``, ``(num_samples,)``.

    Raises
    ------
    CalibrationError
        If scikit-learn is not installed.

    Notes
    -----
    Boosting (Friedman 2001) over trees whose thresholds are drawn at random (Geurts et al. 2006): a hundred and fifty trees of
    sixteen leaves, 4,650 nodes, do what forests of a hundred thousand do.
    """
    if not has_trees():
        raise CalibrationError(
            "stepwise residuals need scikit-learn: pip install 'meshwright[calibrate]', or fit without them"
        )
    from sklearn import config_context
    from sklearn.tree import ExtraTreeRegressor

    offset = float(log_errors.mean())
    left_over = log_errors - offset
    parts = []
    narrow = np.asarray(coordinates, dtype=np.float32)  # as scikit-learn compares them
    # Seeding a generator anew would take as long as growing a tree this small, and so would checking its parameters.
    generator = np.random.RandomState(0)
    with config_context(skip_parameter_validation=True):
        for _ in range(NUM_TREES):
            tree = ExtraTreeRegressor(
                max_leaf_nodes=MAX_LEAVES,
                max_features=None,
                min_samples_leaf=_LEAF_SAMPLES,
                random_state=generator,
            ).fit(narrow, left_over, check_input=False)
            # The tree's own prediction: the estimator's would check its state each time, which takes as long.
            left_over = left_over - LEARNING_RATE * tree.tree_.predict(narrow)[:, 0]
            parts.append(tree.tree_)
    return _joined(parts, offset)


def _joined(parts: list[Any], offset: float) -> TreeResidual:
    """Return the arrays of many scikit-learn trees one after the other; children keep following their parents."""
    starts = np.cumsum([0, *(part.node_count for part in parts)])
    is_leaf = np.concatenate([part.children_left < 0 for part in parts])
    shift = np.repeat(starts[:-1], [part.node_count for part in parts])
    return TreeResidual(
        roots=starts[:-1].astype(np.int64),
        feature=np.where(is_leaf, 0, np.concatenate([part.feature for part in parts])).astype(np.int64),
        threshold=np.where(is_leaf, 0.0, np.concatenate([part.threshold for part in parts])),
        left=np.where(is_leaf, -1, np.concatenate([part.children_left for part in parts]) + shift).astype(
            np.int64
        ),
        right=np.where(is_leaf, -1, np.concatenate([part.children_right for part in parts]) + shift).astype(
            np.int64
        ),
        value=np.where(is_leaf, LEARNING_RATE * np.concatenate([part.value[:, 0, 0] for part in parts]), 0.0),
        offset=offset,
    )
