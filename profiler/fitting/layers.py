"""Hold measured layers against the sum of the fitted operators: what a calibration is worth where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.operators import OperatorModel, element_bytes
from meshwright.profiler.measurements import LayerSample

__all__ = ["LayerComparison", "compare_layers"]

Sizes = Mapping[str, float]
Kernel = tuple[str, Sizes]

# Operators that stand in for one that was not fitted, as in the cost models.
_STAND_INS = {"gemm_dgrad": "gemm", "gemm_wgrad": "gemm"}
# Parameter, gradient and two moments read, all but the gradient written, 4 bytes each.
_ADAM_BYTES = 28.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerComparison:
    """A measured layer and the sum of its operators [s]."""

    sample: LayerSample
    predicted: float

    @property
    def error(self) -> float:
        """Return predicted over measured, less 1."""
        return self.predicted / self.sample.seconds - 1.0


def compare_layers(
    samples: Sequence[LayerSample], operators: Mapping[str, OperatorModel]
) -> tuple[tuple[LayerComparison, ...], tuple[str, ...]]:
    """Return each measured layer beside the sum of its operators, and why others cannot be compared.

    Parameters
    ----------
    samples : Sequence[LayerSample]
        Of one device.
    operators : Mapping[str, OperatorModel]
        Fitted on that device, by ``OPERATOR.PRECISION``.

    Notes
    -----
    The sum counts every kernel of the plain layer once: four products, attention, two norms, rotary embeddings of
    queries and keys, SwiGLU and two residual sums; backward two products for each and the bytes of the gradients. An
    eager layer runs more and smaller kernels than these, a compiled one fuses some of them.
    """
    compared: list[LayerComparison] = []
    lacking: dict[tuple[str, ...], list[str]] = {}
    for sample in samples:
        kernels = list(_STEPS[sample.step](sample.shape, element_bytes(sample.precision)))
        models = {name: _model(operators, name, sample.precision) for name, _ in kernels}
        missing = tuple(f"{name}.{sample.precision}" for name, model in models.items() if model is None)
        if missing:
            lacking.setdefault(missing, []).append(_label(sample))
            continue
        seconds = (_seconds(models[name], sizes) for name, sizes in kernels)
        compared.append(LayerComparison(sample=sample, predicted=sum(seconds)))
    notes = tuple(
        f"layer {', '.join(labels)}: nothing to compare with, {', '.join(missing)} not fitted"
        for missing, labels in lacking.items()
    )
    return tuple(compared), notes


def _label(sample: LayerSample) -> str:
    return f"{sample.step} in {sample.precision}{', compiled' if sample.is_compiled else ''}"


def _model(operators: Mapping[str, OperatorModel], name: str, precision: str) -> OperatorModel | None:
    names = (name, _STAND_INS.get(name, name))
    return next((operators[key] for each in names if (key := f"{each}.{precision}") in operators), None)


def _seconds(model: OperatorModel | None, sizes: Sizes) -> float:
    assert model is not None
    return float(model.time({name: np.array([size]) for name, size in sizes.items()})[0])


def _products(shape: Sizes, tokens: float) -> Iterator[tuple[float, float, float]]:
    """Yield rows, output and input width of the products of a layer, forward."""
    hidden, ffn, width = shape["hidden_size"], shape["ffn_hidden_size"], shape["head_dim"]
    yield tokens, (shape["num_heads"] + 2.0 * shape["num_kv_heads"]) * width, hidden
    yield tokens, hidden, shape["num_heads"] * width
    yield tokens, 2.0 * ffn, hidden
    yield tokens, hidden, ffn


def _product(name: str, m: float, n: float, k: float) -> Kernel:
    return name, {"m": m, "n": n, "k": k}


def _elementwise(shape: Sizes, tokens: float, element: float, *, is_backward: bool) -> Iterator[Kernel]:
    """Yield the kernels bound by memory, bytes counted as the suites count them; a backward reads its gradient too."""
    hidden = tokens * shape["hidden_size"] * element
    ffn = tokens * shape["ffn_hidden_size"] * element
    for _ in range(2):
        yield "rms_norm", {"num_bytes": (3.0 if is_backward else 2.0) * hidden}
        yield "copy", {"num_bytes": 3.0 * hidden}  # a residual sum: two read, one written
    for heads in (shape["num_heads"], shape["num_kv_heads"]):
        # Read, write, and one row of the sines and cosines per token.
        yield "rotary", {"num_bytes": 2.0 * tokens * (heads + 1.0) * shape["head_dim"] * element}
    yield "swiglu", {"num_bytes": (5.0 if is_backward else 3.0) * ffn}


def _attention(name: str, shape: Sizes, length: str) -> Kernel:
    fields = ("batch_size", length, "num_heads", "num_kv_heads", "head_dim")
    return name, {field: shape[field] for field in fields}


def _forward(shape: Sizes, element: float) -> Iterator[Kernel]:
    tokens = shape["batch_size"] * shape["sequence_length"]
    for m, n, k in _products(shape, tokens):
        yield _product("gemm", m, n, k)
    yield _attention("attention_prefill", shape, "sequence_length")
    yield from _elementwise(shape, tokens, element, is_backward=False)


def _backward(shape: Sizes, element: float) -> Iterator[Kernel]:
    tokens = shape["batch_size"] * shape["sequence_length"]
    for m, n, k in _products(shape, tokens):
        yield _product("gemm_dgrad", m, k, n)
        yield _product("gemm_wgrad", n, k, m)
    yield _attention("attention_backward", shape, "sequence_length")
    yield from _elementwise(shape, tokens, element, is_backward=True)


def _decode(shape: Sizes, element: float) -> Iterator[Kernel]:
    tokens = shape["batch_size"]
    for m, n, k in _products(shape, tokens):
        yield _product("gemm", m, n, k)
    yield _attention("attention_decode", shape, "context_length")
    yield from _elementwise(shape, tokens, element, is_backward=False)
    for _ in range(2):  # the new keys and values into the cache
        yield "copy", {"num_bytes": 2.0 * tokens * shape["num_kv_heads"] * shape["head_dim"] * element}


def _optimizer(shape: Sizes, element: float) -> Iterator[Kernel]:
    del element
    weights = sum(n * k for _, n, k in _products(shape, 1.0)) + 2.0 * shape["hidden_size"]
    yield "adam_fused", {"num_bytes": _ADAM_BYTES * weights}


_STEPS: Mapping[str, Callable[[Sizes, float], Iterator[Kernel]]] = {
    "forward": _forward,
    "backward": _backward,
    "decode": _decode,
    "optimizer": _optimizer,
}
