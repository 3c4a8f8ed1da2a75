"""Attention kernels as torch picks them: causal prefill, its backward, decode over a cache, and latent attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch.nn import functional

from meshwright.profiler.device import Device
from meshwright.profiler.sampling import (
    attention_shapes,
    decode_shapes,
    mla_decode_shapes,
    mla_prefill_shapes,
)
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite
from meshwright.profiler.suites.limits import Limits, Shape, fits_attention, limits_of
from meshwright.profiler.suites.model_shapes import (
    model_attention_shapes,
    model_decode_shapes,
    model_mla_shapes,
)
from meshwright.profiler.suites.operands import main_precision, normal

__all__ = ["SUITE"]

_NAME = "attention"
# DeepSeek-V2/V3: widths of queries and keys, of values, and of the cached latent with its rotary part.
_MLA_QK, _MLA_V, _MLA_LATENT, _MLA_ROTARY = 192, 128, 512, 64


class _AttentionSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        precision = main_precision(device, settings)
        limits = limits_of(device, precision)
        prepare: Mapping[str, _Prepare] = {
            "attention_prefill": _prefill,
            "attention_backward": _backward,
            "attention_decode": _decode,
            "mla_prefill": _mla_prefill,
            "mla_decode": _mla_decode,
        }
        for operator, shapes in _shapes(settings, limits):
            for shape in shapes:
                yield Case(
                    suite=_NAME,
                    operator=operator,
                    precision=precision,
                    shape=shape,
                    prepare=partial(prepare[operator], shape, precision, device),
                    # Autograd runs a backward pass on the stream of its forward pass, outside the capture.
                    is_capturable=operator != "attention_backward",
                )


SUITE: Suite = _AttentionSuite()

_Prepare = Callable[[Shape, str, Device], Callable[[], object]]


def _shapes(settings: ProfileSettings, limits: Limits) -> Iterator[tuple[str, Iterable[Shape]]]:
    """Yield the shapes of each operator; backward repeats those of prefill, so that the two can be compared."""
    seed, count = settings.seed, settings.num_points
    yield "attention_prefill", attention_shapes(count("attention_prefill"), seed, limits)
    yield (
        "attention_backward",
        attention_shapes(count("attention_backward"), seed, limits, is_backward=True),
    )
    yield "attention_decode", decode_shapes(count("attention_decode"), seed, limits)
    yield "mla_prefill", mla_prefill_shapes(count("mla_prefill"), seed, limits)
    yield "mla_decode", mla_decode_shapes(count("mla_decode"), seed, limits)
    if settings.model is not None:
        tp = settings.tensor_parallel
        prefill = model_attention_shapes(settings.model, tp)
        mla_prefill, mla_decode = model_mla_shapes(settings.model, tp)
        decode = model_decode_shapes(settings.model, tp)
        for operator, shapes in (
            ("attention_prefill", prefill),
            ("attention_backward", prefill),
            ("attention_decode", decode),
            ("mla_prefill", mla_prefill),
            ("mla_decode", mla_decode),
        ):
            yield (
                operator,
                [shape for shape in shapes if fits_attention(operator, shape, limits, is_exact=True)],
            )


def _prefill(shape: Shape, precision: str, device: Device) -> Callable[[], object]:
    query, key, value = _operands(shape, precision, device)
    return partial(_causal, query, key, value)


def _backward(shape: Shape, precision: str, device: Device) -> Callable[[], object]:
    inputs = [each.requires_grad_() for each in _operands(shape, precision, device)]
    out = _causal(*inputs)
    return partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    # enable_gqa only where needed: kernels without it stay eligible for plain multi-head attention.
    is_grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)


def _operands(
    shape: Shape, precision: str, device: Device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, heads, kv_heads, width = (
        int(shape[name])
        for name in ("batch_size", "sequence_length", "num_heads", "num_kv_heads", "head_dim")
    )
    # Heads beside each other in a token, as the projections leave them.
    query, key, value = (
        normal((batch, length, each, width), precision, device).transpose(1, 2)
        for each in (heads, kv_heads, kv_heads)
    )
    return query, key, value


def _decode(shape: Shape, precision: str, device: Device) -> Callable[[], object]:
    """Return one decode step; the query heads that share a cache head go in as its queries, as kernels pack them."""
    batch, length, heads, kv_heads, width = (
        int(shape[name]) for name in ("batch_size", "context_length", "num_heads", "num_kv_heads", "head_dim")
    )
    query = normal((batch, kv_heads, heads // kv_heads, width), precision, device)
    key = normal((batch, kv_heads, length, width), precision, device)
    value = normal((batch, kv_heads, length, width), precision, device)
    return partial(functional.scaled_dot_product_attention, query, key, value)


def _mla_prefill(shape: Shape, precision: str, device: Device) -> Callable[[], object]:
    batch, length, heads = (int(shape[name]) for name in ("batch_size", "sequence_length", "num_heads"))
    query, key, value = (
        normal((batch, length, heads, width), precision, device).transpose(1, 2)
        for width in (_MLA_QK, _MLA_QK, _MLA_V)
    )
    return partial(_causal, query, key, value)


def _mla_decode(shape: Shape, precision: str, device: Device) -> Callable[[], object]:
    """Return one absorbed decode step: every head queries the one cached latent, whose first part is the value."""
    batch, length, heads = (int(shape[name]) for name in ("batch_size", "context_length", "num_heads"))
    query = normal((batch, 1, heads, _MLA_LATENT + _MLA_ROTARY), precision, device)
    cache = normal((batch, 1, length, _MLA_LATENT + _MLA_ROTARY), precision, device)
    scale = _MLA_QK**-0.5
    return partial(
        functional.scaled_dot_product_attention, query, cache, cache[..., :_MLA_LATENT], scale=scale
    )
