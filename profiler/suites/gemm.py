"""Matrix products in the layouts of a linear layer: forward, input gradient (dgrad), weight gradient (wgrad)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch

from meshwright.costmodels.operators.base import element_bytes
from meshwright.profiler.device import Device
from meshwright.profiler.sampling import gemm_shapes
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite
from meshwright.profiler.suites.limits import Shape, fits_gemm, limits_of
from meshwright.profiler.suites.model_shapes import model_gemm_shapes
from meshwright.profiler.suites.operands import (
    dtype_of,
    lacks,
    main_precision,
    normal,
    unsupported,
    wanted_precisions,
)

__all__ = ["SUITE", "prepare_product"]

_NAME = "gemm"
# Gradients of short batches are never computed: a model trains on thousands of tokens.
_LEAST_GRADIENT_TOKENS = 1024
# More than a core's own caches (2 MiB of the largest server cores of 2023), and how many sets of tiny operands at most.
_ROTATED_BYTES, _MOST_SETS = 8.0 * 2**20, 256


class _GemmSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        main = main_precision(device, settings)
        for precision in wanted_precisions(device, settings):
            limits = limits_of(device, precision)
            share = 1 if precision in (main, "fp8") else 3
            count = -(-settings.num_points("gemm") // share)
            shapes = gemm_shapes(count, settings.seed, limits, precision)
            reason = lacks(device, precision)
            if reason is not None:
                yield from (unsupported(_NAME, "gemm", precision, shape, reason) for shape in shapes[:1])
                continue
            yield from _cases("gemm", precision, shapes, device)
            if precision == main:
                yield from self._gradients(precision, device, settings)
            if settings.model is not None and precision in (main, "fp8"):
                exact = model_gemm_shapes(settings.model, settings.tensor_parallel)
                fitting = [shape for shape in exact if fits_gemm(shape, limits, precision, is_exact=True)]
                yield from _cases("gemm", precision, fitting, device)
                if precision == main:
                    trained = [shape for shape in fitting if shape["m"] >= _LEAST_GRADIENT_TOKENS]
                    yield from _cases("gemm_dgrad", precision, map(_dgrad_shape, trained), device)
                    yield from _cases("gemm_wgrad", precision, map(_wgrad_shape, trained), device)

    def _gradients(self, precision: str, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        limits = limits_of(device, precision)
        layouts = (("gemm_dgrad", _dgrad_shape), ("gemm_wgrad", _wgrad_shape))
        for offset, (operator, permuted) in enumerate(layouts, 1):
            shapes = gemm_shapes(settings.num_points(operator), settings.seed + offset, limits, precision)
            yield from _cases(operator, precision, map(permuted, shapes), device)


SUITE: Suite = _GemmSuite()


def prepare_product(
    operator: str, precision: str, shape: Mapping[str, float], device: Device
) -> Callable[[], object]:
    """Return the product of fresh operands in the layout of an operator.

    Parameters
    ----------
    operator : str
        ``gemm`` is ``x (m, k) @ w (n, k)^T``; ``gemm_dgrad`` ``g (m, k) @ w (k, n)``; ``gemm_wgrad``
        ``g (k, m)^T @ x (k, n)``; all operands with their last dimension contiguous.
    precision : str
        Number format; fp8 is scaled per tensor and writes bf16.
    shape : Mapping[str, float]
        The product's own ``m, n, k``.
    device : Device
        Where.
    """
    m, n, k = (int(shape[name]) for name in ("m", "n", "k"))
    if operator == "gemm_dgrad":
        a, b = normal((m, k), precision, device), normal((k, n), precision, device)
    elif operator == "gemm_wgrad":
        a, b = normal((k, m), precision, device).t(), normal((k, n), precision, device)
    else:
        a, b = normal((m, k), precision, device), normal((n, k), precision, device).t()
    if precision == "fp8":
        return _scaled_product(a, b, device)
    out = torch.empty((m, n), dtype=dtype_of(precision, device), device=device.torch_name)
    return partial(_tf32_product if precision == "tf32" else _product, a, b, out)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(a, b, out=out)


def _tf32_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        torch.mm(a, b, out=out)
    finally:
        torch.set_float32_matmul_precision(before)


def _scaled_product(a: torch.Tensor, b: torch.Tensor, device: Device) -> Callable[[], object]:
    one = torch.ones((), dtype=torch.float32, device=device.torch_name)
    return partial(
        torch._scaled_mm,
        a,
        b,
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=device.type == "cuda",
    )


def _dgrad_shape(forward: Shape) -> Shape:
    """Return the product of a forward shape's output gradient with its weight."""
    return {"m": forward["m"], "n": forward["k"], "k": forward["n"]}


def _wgrad_shape(forward: Shape) -> Shape:
    """Return the product of a forward shape's output gradient, transposed, with its input."""
    return {"m": forward["n"], "n": forward["k"], "k": forward["m"]}


def _prepare_rotation(
    operator: str, precision: str, shape: Mapping[str, float], device: Device
) -> Callable[[], object]:
    """Return a product that finds its operands outside the core's own caches, as those of a training step are.

    On a GPU the caches are flushed before each call; here one operand set after the other takes its turn.
    """
    product = prepare_product(operator, precision, shape, device)
    m, n, k = (int(shape[name]) for name in ("m", "n", "k"))
    num_bytes = (m * k + k * n + m * n) * element_bytes(precision)
    count = min(_MOST_SETS, int(_ROTATED_BYTES / num_bytes))
    turns = itertools.cycle([product, *(_repeated(product) for _ in range(count))])

    def next_product() -> object:
        return next(turns)()

    return next_product


def _repeated(product: Callable[[], object]) -> Callable[[], object]:
    """Return the same product on copies of its operands, their layouts kept."""
    assert isinstance(product, partial)
    return partial(product.func, *(each.clone() for each in product.args), **product.keywords)


def _cases(operator: str, precision: str, shapes: Iterable[Shape], device: Device) -> Iterator[Case]:
    for shape in shapes:
        yield Case(
            suite=_NAME,
            operator=operator,
            precision=precision,
            shape=shape,
            prepare=partial(
                prepare_product if device.is_gpu else _prepare_rotation, operator, precision, shape, device
            ),
        )
