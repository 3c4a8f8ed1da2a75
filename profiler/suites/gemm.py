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
from meshwright.profiler.suites.limits import Limits, Shape, fits_gemm, limits_of
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
_LAYOUTS = ("gemm", "gemm_dgrad", "gemm_wgrad")
# Gradients in other formats than the main one: a roofline of their own, under the forward layout's residual.
_OTHER_GRADIENTS = 16
# fp8 products want rows of whole 16 bytes: frameworks pad a batch's tokens to that, the inner size of its wgrad.
_FP8_TOKENS = 16
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
            reason = lacks(device, precision)
            for offset, operator in enumerate(_LAYOUTS):
                count = _num_shapes(operator, precision, main, settings)
                sampled = gemm_shapes(count, settings.seed + offset, limits, precision)
                exact = _model_shapes(operator, precision, main, limits, settings)
                shapes = _permuted(operator, precision, (*sampled, *exact))
                if reason is None:
                    yield from _cases(operator, precision, shapes, device)
                else:
                    yield from (unsupported(_NAME, operator, precision, each, reason) for each in shapes[:1])


SUITE: Suite = _GemmSuite()


def prepare_product(
    operator: str, precision: str, shape: Mapping[str, float], device: Device
) -> Callable[[], object]:
    """Return the product of fresh operands in the layout of an operator.

    Parameters
    ----------
    operator : str
        ``gemm`` is ``x (m, k) @ w (n, k)^T``; ``gemm_dgrad`` ``g (m, k) @ w (k, n)``; ``gemm_wgrad``
        ``g (k, m)^T @ x (k, n)``; all operands with their last dimension contiguous, but in fp8.
    precision : str
        Number format; fp8 is scaled per tensor and writes bf16.
    shape : Mapping[str, float]
        The product's own ``m, n, k``.
    device : Device
        Where.

    Notes
    -----
    The fp8 units read operands along ``k``: frameworks transpose gradients, inputs and weights as they cast them, which
    is part of the cast's time, and sum gradients at full width, not with the fast accumulation of forward products
    (defaults of torchao's ``Float8LinearConfig`` and of Transformer Engine, ``_2X_ACC_DGRAD`` and ``_2X_ACC_WGRAD``).
    """
    m, n, k = (int(shape[name]) for name in ("m", "n", "k"))
    if precision == "fp8":
        a, b = normal((m, k), precision, device), normal((n, k), precision, device).t()
        return _scaled_product(a, b, device, use_fast_accum=device.type == "cuda" and operator == "gemm")
    if operator == "gemm_dgrad":
        a, b = normal((m, k), precision, device), normal((k, n), precision, device)
    elif operator == "gemm_wgrad":
        a, b = normal((k, m), precision, device).t(), normal((k, n), precision, device)
    else:
        a, b = normal((m, k), precision, device), normal((n, k), precision, device).t()
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


def _scaled_product(
    a: torch.Tensor, b: torch.Tensor, device: Device, *, use_fast_accum: bool
) -> Callable[[], object]:
    one = torch.ones((), dtype=torch.float32, device=device.torch_name)
    return partial(
        torch._scaled_mm,
        a,
        b,
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=use_fast_accum,
    )


def _num_shapes(operator: str, precision: str, main: str, settings: ProfileSettings) -> int:
    """Return how many shapes of a layout to sample: fewer where models rarely compute."""
    points = settings.num_points(operator)
    if operator == "gemm":
        return points if precision in (main, "fp8") else -(-points // 3)
    return points if precision == main else min(points, _OTHER_GRADIENTS)


def _model_shapes(
    operator: str, precision: str, main: str, limits: Limits, settings: ProfileSettings
) -> list[Shape]:
    """Return the forward products of the user's model whose layout is measured: gradients in the main format only."""
    measured = (main, "fp8") if operator == "gemm" else (main,)
    if settings.model is None or precision not in measured:
        return []
    fewest = 1 if operator == "gemm" else _LEAST_GRADIENT_TOKENS
    return [
        shape
        for shape in model_gemm_shapes(settings.model, settings.tensor_parallel)
        if shape["m"] >= fewest and fits_gemm(shape, limits, precision, is_exact=True)
    ]


def _permuted(operator: str, precision: str, shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    """Return the products of an operator that belong to forward products of tokens m, outputs n and inputs k."""
    if operator == "gemm_dgrad":
        return tuple({"m": each["m"], "n": each["k"], "k": each["n"]} for each in shapes)
    if operator == "gemm_wgrad":
        step = _FP8_TOKENS if precision == "fp8" else 1
        return tuple({"m": each["n"], "n": each["k"], "k": -(-each["m"] // step) * step} for each in shapes)
    return tuple(shapes)


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
