"""Matrix products whose weight gradients can be put off, as zero-bubble schedules need.

The backward of a product gives the input gradient at once. While gradients are put off, the weight gradient waits in a
queue as a function of the operands it needs, and runs when the schedule says (Qi et al. 2024, arXiv 2401.10241;
DeepSeek's DualPipe keeps the same kind of queue). So no product is done twice, and no collective either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from meshwright.profiler.executor.weights import Role, set_role

__all__ = ["Linear", "WeightGradients", "accumulate_gradient", "cut", "gradient_of", "linear"]


class WeightGradients:
    """The weight gradients that were put off."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], None]] | None = None

    @property
    def are_put_off(self) -> bool:
        """Whether the backward that runs now leaves them."""
        return self._queue is not None

    def put_off(self) -> None:
        """Leave the weight gradients of the backward that follows."""
        self._queue = []

    def take(self) -> list[Callable[[], None]]:
        """Return what was left, and leave no more."""
        queue, self._queue = self._queue or [], None
        return queue

    def add(self, gradient: Callable[[], None]) -> None:
        """Leave one."""
        assert self._queue is not None
        self._queue.append(gradient)


def accumulate_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add a gradient to where a parameter collects them."""
    main = getattr(parameter, "main_gradient", None)
    if main is None and parameter.grad is None:
        parameter.grad = gradient
    else:
        gradient_of(parameter).add_(gradient)


def gradient_of(parameter: Tensor) -> Tensor:
    """Return where a parameter collects its gradients."""
    main: Tensor | None = getattr(parameter, "main_gradient", None)
    if main is not None:
        return main
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class _Product(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gradients: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(x)
        # A leaf that outlives the graph; FSDP frees and refills its storage meanwhile.
        ctx.weight, ctx.gradients, ctx.has_bias = weight, gradients, bias is not None
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        weight: Tensor = ctx.weight
        rows = gradient.reshape(-1, gradient.shape[-1])
        columns = x.reshape(-1, x.shape[-1])
        for_input = gradient @ weight if ctx.needs_input_grad[0] else None
        for_bias = rows.sum(0) if ctx.has_bias else None
        if ctx.gradients.are_put_off:
            ctx.gradients.add(lambda: accumulate_gradient(weight, rows.t() @ columns))
            return for_input, None, for_bias, None
        return for_input, rows.t() @ columns, for_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gradients: WeightGradients) -> Tensor:
    """Return ``x weight^T + bias``; the weight gradient may be put off."""
    result: Tensor = _Product.apply(x, weight, bias, gradients)  # type: ignore[no-untyped-call]
    return result


class Linear(nn.Module):
    """A product with a weight, and a bias where one is given.

    Parameters
    ----------
    weight : Tensor
        Shape ``(outputs, inputs)``.
    bias : Tensor | None
        Shape ``(outputs,)``.
    role, bias_role : Role
        How weight and bias are spread.
    gradients : WeightGradients
        Takes weight gradients that are put off.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        role: Role,
        bias_role: Role | None = None,
        gradients: WeightGradients,
    ) -> None:
        super().__init__()
        self.weight = set_role(nn.Parameter(weight), role)
        self.bias = None if bias is None else set_role(nn.Parameter(bias), bias_role or role)
        self._gradients = gradients

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with its bias."""
        return linear(x, self.weight, self.bias, self._gradients)

    def without_bias(self, x: Tensor) -> Tensor:
        """Return the product alone; row-parallel products add the bias once their parts are summed."""
        return linear(x, self.weight, None, self._gradients)

    def add_bias(self, x: Tensor) -> Tensor:
        """Return the input with the bias added, where there is one."""
        return x if self.bias is None else x + self.bias


def cut(whole: Tensor, dimension: int, index: int, parts: int) -> Tensor:
    """Return one of the equal parts of a tensor as a tensor of its own."""
    size = whole.shape[dimension] // parts
    return torch.narrow(whole, dimension, index * size, size).contiguous()
