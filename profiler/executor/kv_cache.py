"""What one layer of a model that is served keeps of the tokens so far: keys and values, or their latents."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KvCache", "LatentCache"]


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

    def add(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values of new tokens, ``(batch, heads, tokens, head_dim)``, and return all so far."""
        end = self._length + key.shape[2]
        self._held[0, :, :, self._length : end] = key
        self._held[1, :, :, self._length : end] = value
        self._length = end
        return self._held[0, :, :, :end], self._held[1, :, :, :end]


class LatentCache:
    """Room for the latents and rotary keys of one layer, which all heads share and every tensor parallel rank holds.

    Parameters
    ----------
    batch, capacity, width : int
        Sequences, tokens of a sequence, channels of latent and rotary key together.
    dtype : torch.dtype
        Of both.
    device : torch.device
        Where they stay.
    """

    def __init__(
        self, *, batch: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._held = torch.zeros((batch, capacity, width), dtype=dtype, device=device)
        self._length = 0

    @property
    def is_empty(self) -> bool:
        """Whether prompts come next."""
        return self._length == 0

    def clear(self) -> None:
        """Forget all sequences."""
        self._length = 0

    def add(self, latents: Tensor) -> Tensor:
        """Keep those of new tokens, ``(batch, tokens, width)``, and return all so far."""
        end = self._length + latents.shape[1]
        self._held[:, self._length : end] = latents
        self._length = end
        return self._held[:, :end]
