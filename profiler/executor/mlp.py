"""The MLP of a layer, of shared experts and of one expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.profiler.executor.build import BuildContext
from meshwright.profiler.executor.communication import Group
from meshwright.profiler.executor.linear import Linear, cut
from meshwright.profiler.executor.weights import Role

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """Two matrices, or three when gated; the inner ones split by column, the last by row.

    Parameters
    ----------
    context : BuildContext
        Model and weights.
    name : str
        Before the names of its weights.
    width : int
        Inner width.
    group : Group
        Ranks that share the inner width.
    role, bias_role : Role
        How its matrices, and the bias of its output, are spread.
    """

    def __init__(
        self, context: BuildContext, name: str, width: int, group: Group, role: Role, bias_role: Role
    ) -> None:
        super().__init__()
        model, source = context.model, context.source
        self._context, self._is_gated, self._is_expert = context, model.is_gated_mlp, role.is_expert
        inner = ("gate", "up") if model.is_gated_mlp else ("up",)

        def drawn(suffix: str, *inputs: int) -> Tensor:
            wholes = [source.normal(f"{name}.{each}.{suffix}", (width, *inputs)) for each in inner]
            return torch.cat([cut(whole, 0, group.index, group.size) for whole in wholes])

        self.up = Linear(
            drawn("weight", model.hidden_size),
            drawn("bias") if model.has_mlp_bias else None,
            role=role,
            gradients=context.gradients,
        )
        down = source.normal(f"{name}.down.weight", (model.hidden_size, width))
        self.down = Linear(
            cut(down, 1, group.index, group.size),
            source.normal(f"{name}.down.bias", (model.hidden_size,)) if model.has_mlp_bias else None,
            role=role,
            bias_role=bias_role,
            gradients=context.gradients,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's part of the output, without its bias."""
        inner = self.up(x)
        active = (
            self._context.recompute("moe_act", self._activate, inner)
            if self._is_expert
            else self._activate(inner)
        )
        return self.down.without_bias(active)

    def _activate(self, inner: Tensor) -> Tensor:
        if self._is_gated:
            gate, up = inner.chunk(2, dim=-1)
            return functional.silu(gate) * up
        return functional.gelu(inner, approximate="tanh")

    def with_bias(self, x: Tensor) -> Tensor:
        """Return the whole output of an MLP that is not split."""
        return self.add_bias(self(x))

    def add_bias(self, x: Tensor) -> Tensor:
        """Return the summed output with its bias."""
        return self.down.add_bias(x)
