"""Normalisation layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from meshwright.profiler.executor.build import BuildContext
from meshwright.profiler.executor.weights import Role, set_role

__all__ = ["Norm"]

_EPSILON = 1e-5


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with or without bias, as the model says.

    Parameters
    ----------
    context : BuildContext
        Model and weights.
    width : int
        Channels.
    role : Role
        How its vectors are spread.
    """

    def __init__(self, context: BuildContext, width: int, role: Role) -> None:
        super().__init__()
        self._kind = context.model.normalization
        self._width = width
        self.weight = set_role(nn.Parameter(context.source.constant(1.0, width)), role)
        has_bias = self._kind == "layernorm"
        self.bias = set_role(nn.Parameter(context.source.constant(0.0, width)), role) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input."""
        if self._kind == "rmsnorm":
            return functional.rms_norm(x, (self._width,), self.weight, _EPSILON)
        return functional.layer_norm(x, (self._width,), self.weight, self.bias, _EPSILON)
