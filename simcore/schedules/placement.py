"""Which part of the model each chunk of each pipeline stage holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["looping_placement", "v_placement"]


def looping_placement(num_stages: int, num_chunks: int) -> NDArray[np.int32]:
    """Return the virtual stage of each chunk, ``(num_stages, num_chunks)``, where the model loops over stages.

    Chunk ``c`` of stage ``s`` is virtual stage ``c * num_stages + s``: every chunk runs from the first stage
    to the last.

    Examples
    --------
    >>> looping_placement(3, 2).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    virtual = np.arange(num_stages * num_chunks, dtype=np.int32).reshape(num_chunks, num_stages)
    return np.ascontiguousarray(virtual.T)


def v_placement(num_stages: int) -> NDArray[np.int32]:
    """Return the virtual stage of each chunk, ``(num_stages, 2)``, where the model goes there and back.

    Stage ``s`` holds virtual stages ``s`` and ``2 * num_stages - 1 - s`` [Qi 2024b].

    Examples
    --------
    >>> v_placement(3).tolist()
    [[0, 5], [1, 4], [2, 3]]
    """
    there = np.arange(num_stages, dtype=np.int32)
    return np.stack([there, 2 * num_stages - 1 - there], axis=1)
