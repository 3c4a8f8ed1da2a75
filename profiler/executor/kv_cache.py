"""Keys and values of the tokens so far, for one layer of a model that is served."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["KvCache"]


class KvCache:
    """Room for the keys and values of one layer on one rank.

    Parameters
    ----------
    batch, groups, capacity, head_dim : int
        Sequences, key/value heads of this rank, tokens of a sequence, channels of a head.
    dtype : torch.dtype
        Of keys and values.
    device : torch.device
        Where they stay.
    """

    def __init__(
        self,
        *,
        batch: int,
        groups: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, batch, groups, capacity, head_dim)
        self._held = torch.zeros(shape, dtype=dtype, device=device)
        self._length = 0

    def clear(self) -> None:
        """Forget all sequences."""
        self._length = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the keys and values of new tokens, and return the causal attention of their queries to all so far.

        Parameters
        ----------
        query, key, value : Tensor
            Of whole prompts where the cache is empty, of one token of each sequence otherwise,
            ``(batch, heads, tokens, head_dim)``.
        """
        is_prompt = self._length == 0
        end = self._length + key.shape[2]
        self._held[0, :, :, self._length : end] = key
        self._held[1, :, :, self._length : end] = value
        self._length = end
        keys, values = self._held[:, :, :, :end]
        # A single query sees every key, which needs no mask.
        return functional.scaled_dot_product_attention(
            query, keys, values, is_causal=is_prompt, enable_gqa=query.shape[1] != keys.shape[1]
        )
