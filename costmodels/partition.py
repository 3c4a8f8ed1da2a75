"""Uneven pipeline stages: how many layers the first and the last stage leave to the others.

Embedding and LM head take the time of some layers. Frameworks express an uneven split as the layers of the first
and of the last stage, the rest spread evenly (Megatron-Core's --decoder-first/last-pipeline-num-layers), so two
numbers are the whole choice.
"""

from __future__ import annotations

import functools

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns, VocabParallels
from meshwright.costmodels.stage import leading_dense_layers

__all__ = ["balanced_ends", "boundary_layers"]

# Boundary costs are compared at this resolution of a layer; finer differences do not move a whole layer.
_RESOLUTION = 0.05


def boundary_layers(context: CostContext, columns: PlanColumns) -> tuple[FloatColumn, FloatColumn]:
    """Return how many layers embedding and LM head (with loss and prediction modules) take, shape ``(num_plans,)``.

    What the dense layers that lead a mixture-of-experts model save is taken off the embedding, which may leave less
    than nothing.
    """
    times = micro_batch_times(context, columns)
    one_layer, dense_layer = (
        layer.forward + layer.backward + layer.recompute for layer in (times.layer, times.dense_layer)
    )
    spreads = columns.vocab_parallel >= VocabParallels.VOCAB_1
    leading = np.minimum(leading_dense_layers(context), columns.chunk_first)
    saved = leading * (1.0 - dense_layer / one_layer)
    embedding = np.where(spreads, 0.0, (times.embedding_forward + times.embedding_backward) / one_layer)
    return (
        embedding - saved,
        np.where(spreads, 0.0, (times.head_forward + times.head_backward) / one_layer),
    )


def balanced_ends(
    num_layers: int, num_virtual_stages: int, embedding_layers: float, head_layers: float
) -> tuple[int, int]:
    """Return the layers of the first and the last virtual stage that make the slowest stage fastest.

    Exact over all pairs with an even middle. Among equals the split nearest to even, then the one with fewer layers
    on the first stage, which holds the most activations.

    Parameters
    ----------
    num_layers, num_virtual_stages : int
        Layers of the model; stages, at least 2 and at most two more than layers.
    embedding_layers, head_layers : float
        What the ends take besides, in layers; below 0 where their own layers take less than the others.

    Examples
    --------
    >>> balanced_ends(32, 4, 0.0, 2.0)
    (8, 7)
    """
    return _balanced_ends(
        num_layers,
        num_virtual_stages,
        round(embedding_layers / _RESOLUTION),
        round(head_layers / _RESOLUTION),
    )


@functools.lru_cache(maxsize=65_536)
def _balanced_ends(num_layers: int, num_stages: int, embedding: int, head: int) -> tuple[int, int]:
    even = -(-num_layers // num_stages)
    most = min(num_layers, 2 * even + 2)
    first, last = np.meshgrid(np.arange(most + 1), np.arange(most + 1), indexing="ij")
    rest = num_layers - first - last
    inner = num_stages - 2
    is_possible = (rest >= 0) if inner else (rest == 0)
    # An inner stage without a layer is no stage.
    is_possible &= rest >= inner
    middle = -(-rest // inner) if inner else np.zeros_like(rest)
    slowest = np.maximum(first + embedding * _RESOLUTION, last + head * _RESOLUTION)
    slowest = np.where(is_possible, np.maximum(slowest, middle), np.inf)
    mean = num_layers / num_stages
    unevenness = (first - mean) ** 2 + (last - mean) ** 2
    # Rounded so that equal splits tie.
    order = np.lexsort((first.ravel(), unevenness.ravel(), np.round(slowest, 9).ravel()))
    best = int(order[0])
    return int(first.ravel()[best]), int(last.ravel()[best])
