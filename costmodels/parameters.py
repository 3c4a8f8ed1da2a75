"""Parameters one tensor parallel rank holds."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.plan_columns import FloatColumn, IntColumn
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["rank_boundary_parameters", "rank_layer_parameters"]


def rank_layer_parameters(model: ModelSpec, tp: IntColumn) -> FloatColumn:
    """Return the parameters of one dense layer on one rank.

    An even split, but for key and value projections: with fewer groups than ranks every rank keeps a copy of
    one group (Megatron's KV replication).
    """
    even: FloatColumn = model.num_layer_parameters / tp.astype(np.float64)
    held_groups = np.maximum(model.num_query_groups / tp, 1.0)
    extra_groups = held_groups - model.num_query_groups / tp
    return even + 2.0 * model.hidden_size * model.head_dim * extra_groups


def rank_boundary_parameters(model: ModelSpec, tp: IntColumn) -> FloatColumn:
    """Return the parameters of embedding and LM head on one rank; a tied table counts once."""
    result: FloatColumn = (model.num_embedding_parameters + model.num_head_parameters) / tp.astype(np.float64)
    return result
