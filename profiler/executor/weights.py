"""Weights that do not depend on the layout: every tensor is drawn whole, from its name, and then cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Role", "WeightSource", "roles_of", "set_role"]

# Standard deviation of biases.
_BIAS_SPREAD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """How a parameter is spread over the ranks.

    Parameters
    ----------
    is_split : bool
        Each tensor parallel rank holds a part.
    is_partial : bool
        Whole on every tensor parallel rank, which sees a part of the tokens or heads: gradients are summed over them.
    is_copied : bool
        A key/value head on all tensor parallel ranks that share it: gradients are summed over those.
    is_expert : bool
        Of a routed expert: synchronised over the ranks that hold the same experts.
    is_tied : bool
        Shared by embedding and head.
    """

    is_split: bool = False
    is_partial: bool = False
    is_copied: bool = False
    is_expert: bool = False
    is_tied: bool = False

    @property
    def summed_over(self) -> str:
        """Axis of the ranks that sum its gradients beside its replicas; empty where none do."""
        return "tp" if self.is_partial else "kv" if self.is_copied else ""


def set_role(parameter: nn.Parameter, role: Role) -> nn.Parameter:
    """Note the role of a parameter on it."""
    parameter.role = role  # type: ignore[attr-defined]
    return parameter


def roles_of(module: nn.Module) -> dict[str, Role]:
    """Return the role of every parameter by its name; sharding replaces the parameters themselves."""
    return {name: parameter.role for name, parameter in module.named_parameters()}  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Draws weights.

    Parameters
    ----------
    seed : int
        Of the run.
    dtype : torch.dtype
        Of the parameters.
    device : torch.device
        Where they are drawn and stay.
    """

    seed: int
    dtype: torch.dtype
    device: torch.device

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return the whole tensor of a name, in the precision of the parameters.

        Matrices keep the variance of what they multiply, ``1 / columns`` (LeCun et al. 1998, "Efficient BackProp",
        section 4.6), at any width: small models are then as well conditioned as large ones.
        """
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator(device=self.device)
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.randn(tuple(shape), generator=generator, device=self.device, dtype=torch.float32)
        return (whole * (shape[-1] ** -0.5 if len(shape) > 1 else _BIAS_SPREAD)).to(self.dtype)

    def constant(self, value: float, size: int) -> Tensor:
        """Return a vector of one value."""
        return torch.full((size,), value, device=self.device, dtype=self.dtype)
