"""Uneven pipeline stages: how many layers the first and the last stage leave to the others, or each stage takes.

Embedding and LM head take the time of some layers. Frameworks express an uneven split as the layers of the first
and of the last stage, the rest spread evenly (Megatron-Core's --decoder-first/last-pipeline-num-layers), so two
numbers are the whole choice. Where stages run on different GPUs every stage has its own number.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns, VocabParallels
from meshwright.costmodels.stage import leading_dense_layers

__all__ = ["StageWork", "balanced_ends", "balanced_shares", "boundary_layers", "stage_work"]

# Boundary costs are compared at this resolution of a layer; finer differences do not move a whole layer.
_RESOLUTION = 0.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageWork:
    """What stages do for one micro-batch, forward and backward; arrays of shape ``(num_plans,)`` [s].

    Parameters
    ----------
    layer : FloatColumn
        One layer, recompute included.
    first, last : FloatColumn
        What the first and the last virtual stage do besides: embedding, and LM head with loss and prediction modules.
        What the dense layers that lead a mixture-of-experts model save is taken off the first, which may leave less
        than nothing.
    every : FloatColumn
        What every stage does besides where vocabulary parallelism spreads embedding and head, 0 elsewhere.
    """

    layer: FloatColumn
    first: FloatColumn
    last: FloatColumn
    every: FloatColumn


def stage_work(context: CostContext, columns: PlanColumns) -> StageWork:
    """Return what stages of some plans do for one micro-batch on one kind of node."""
    times = micro_batch_times(context, columns)
    one_layer, dense_layer = (
        layer.forward + layer.backward + layer.recompute for layer in (times.layer, times.dense_layer)
    )
    spreads = columns.vocab_parallel >= VocabParallels.VOCAB_1
    leading = np.minimum(leading_dense_layers(context), columns.chunk_first)
    saved = leading * (one_layer - dense_layer)
    embedding = times.embedding_forward + times.embedding_backward
    head = times.head_forward + times.head_backward
    return StageWork(
        layer=one_layer,
        first=np.where(spreads, 0.0, embedding) - saved,
        last=np.where(spreads, 0.0, head),
        every=np.where(spreads, (embedding + head) / columns.pp, 0.0),
    )


def boundary_layers(context: CostContext, columns: PlanColumns) -> tuple[FloatColumn, FloatColumn]:
    """Return how many layers the first and the last stage do besides their own, shape ``(num_plans,)``."""
    work = stage_work(context, columns)
    return work.first / work.layer, work.last / work.layer


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


def balanced_shares(
    total: int,
    seconds: Sequence[float],
    extra: Sequence[float] | None = None,
    most: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """Return whole shares of layers or micro-batches that make the slowest of some unequal workers fastest.

    Parameters
    ----------
    total : int
        What is shared out.
    seconds : Sequence[float]
        What one unit takes each worker, above 0 [s].
    extra : Sequence[float] | None
        What each has to do besides; None is nothing [s].
    most : Sequence[int] | None
        What each can hold; None is no limit.

    Returns
    -------
    tuple[int, ...] | None
        At least 1 for each; None where they cannot hold the total, or there is too little to share.

    Notes
    -----
    Units go one by one to whom they make the least late. Exact: a worker's time grows with every unit, so whoever
    ends last got its last unit when every other would have been later still, and no other shares end before it. Among
    equals the later worker takes more: later stages hold fewer activations.

    Examples
    --------
    >>> balanced_shares(12, [1.0, 2.0])
    (8, 4)
    >>> balanced_shares(12, [1.0, 2.0], most=[6, 9])
    (6, 6)
    """
    num_workers = len(seconds)
    also = [0.0] * num_workers if extra is None else extra
    limits = [total] * num_workers if most is None else most
    if total < num_workers or min(limits) < 1 or sum(limits) < total:
        return None
    shares = [1] * num_workers
    waiting = [
        (2.0 * seconds[worker] + also[worker], -worker) for worker in range(num_workers) if limits[worker] > 1
    ]
    heapq.heapify(waiting)
    for _ in range(total - num_workers):
        _, number = heapq.heappop(waiting)
        worker = -number
        shares[worker] += 1
        if shares[worker] < limits[worker]:
            heapq.heappush(waiting, ((shares[worker] + 1) * seconds[worker] + also[worker], number))
    return tuple(shares)
