"""Attention kernels: causal prefill, its backward, and decode over a KV cache; multi-head latent attention (MLA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators.base import (
    DeviceRates,
    Operator,
    Parameter,
    Shape,
    Work,
    in_columns,
    rows,
)

__all__ = [
    "ATTENTION_BACKWARD",
    "ATTENTION_DECODE",
    "ATTENTION_PREFILL",
    "MLA_DECODE",
    "MLA_PREFILL",
]

_PREFILL_FIELDS = ("batch_size", "sequence_length", "num_heads", "num_kv_heads", "head_dim")
_DECODE_FIELDS = ("batch_size", "context_length", "num_heads", "num_kv_heads", "head_dim")
# Fused attention backward recomputes the scores: 5 products against 2 (Dao 2023, section 3.2).
_BACKWARD_FLOPS = 2.5
# DeepSeek-V2/V3 latent attention: query-key width in prefill, value width, and the cached latent with its rotary
# part that all heads of the absorbed decode share (DeepSeek-AI 2024, section 2.1).
_MLA_QK, _MLA_V, _MLA_LATENT, _MLA_ROTARY = 192.0, 128.0, 512.0, 64.0
# Tokens of the query one tensor-core tile of a decode kernel holds: fewer heads per KV head than this are padding.
_QUERY_TILE = 16.0

_PREFILL_PARAMETERS = (
    # Batch x heads that fill the device, in tokens of a sequence: below it a kernel pays for idle SMs.
    Parameter(name="parallelism", initial=8_000.0, low=1.0, high=200_000.0),
    # Serial depth of the loop over keys: seconds per doubling of the length.
    Parameter(name="octave_latency", initial=4e-7, low=0.0, high=2e-5),
)
_DECODE_PARAMETERS = (
    Parameter(name="octave_latency", initial=4e-7, low=0.0, high=2e-5),
    # Step when the KV cache outgrows the L2 cache and is read from memory: seconds.
    Parameter(name="spill_latency", initial=2e-6, low=0.0, high=1e-4),
    # Scheduling of one tile of batch x KV heads beyond the first wave over the SMs: seconds per wave.
    Parameter(name="wave_latency", initial=2e-6, low=0.0, high=1e-4),
    # Time of a byte of a KV cache that stays in the L2 cache over one from memory.
    Parameter(name="cached_cost", initial=0.7, low=0.1, high=1.0),
)


def _kv_width(precision: str) -> float:
    return 1.0 if "fp8" in precision else 2.0


def _ramped(shape: Shape, flops: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the FLOPs as long as short sequences and few heads make them count (the ramp of a fused kernel)."""
    heads = shape["batch_size"] * shape["num_heads"]
    length = shape["sequence_length"]
    ramped: NDArray[np.float64] = flops * (1.0 + parameters["parallelism"] / heads / length)
    return ramped


def _prefill(shape: Shape, precision: str, rates: DeviceRates, parameters: Mapping[str, float]) -> Work:
    del rates
    batch, length, heads, kv_heads, width = (shape[name] for name in _PREFILL_FIELDS)
    flops = 2.0 * batch * heads * length * length * width  # the causal half of two products
    num_bytes = (
        4.0 * batch * length * heads * width + 2.0 * _kv_width(precision) * batch * length * kv_heads * width
    )
    return Work(
        flops=_ramped(shape, flops, parameters),
        num_bytes=num_bytes,
        latency=parameters["octave_latency"] * np.log2(1.0 + length / 32.0),
    )


def _backward(shape: Shape, precision: str, rates: DeviceRates, parameters: Mapping[str, float]) -> Work:
    forward = _prefill(shape, precision, rates, parameters)
    return Work(flops=_BACKWARD_FLOPS * forward.flops, num_bytes=2.0 * forward.num_bytes)


def _decode(shape: Shape, precision: str, rates: DeviceRates, parameters: Mapping[str, float]) -> Work:
    batch, length, heads, kv_heads, width = (shape[name] for name in _DECODE_FIELDS)
    cache = 2.0 * _kv_width(precision) * batch * length * kv_heads * width
    padded = kv_heads * np.maximum(heads / kv_heads, _QUERY_TILE)
    return Work(
        flops=4.0 * batch * padded * length * width,
        num_bytes=_read_bytes(cache, rates, parameters) + 4.0 * batch * heads * width,
        latency=_decode_latency(length, cache, batch * kv_heads, rates, parameters),
    )


def _spilled(cache_bytes: NDArray[np.float64], rates: DeviceRates) -> NDArray[np.float64]:
    """Return the share of a KV cache that the L2 cache does not hold: 0 well below its size, 1 well above."""
    share: NDArray[np.float64] = 1.0 / (1.0 + (rates.l2_bytes / cache_bytes) ** 4)
    return share


def _read_bytes(
    cache_bytes: NDArray[np.float64], rates: DeviceRates, parameters: Mapping[str, float]
) -> NDArray[np.float64]:
    """Return the bytes that reading a KV cache counts for at the memory's bandwidth [B]."""
    spilled = _spilled(cache_bytes, rates)
    return cache_bytes * (spilled + (1.0 - spilled) * parameters["cached_cost"])


def _decode_latency(
    length: NDArray[np.float64],
    cache_bytes: NDArray[np.float64],
    num_tiles: NDArray[np.float64],
    rates: DeviceRates,
    parameters: Mapping[str, float],
) -> NDArray[np.float64]:
    """Return what a decode step pays beyond its bytes: serial depth, a cold cache, waves of tiles [s]."""
    spills = _spilled(cache_bytes, rates)
    waves = num_tiles / rates.num_sms
    latency: NDArray[np.float64] = (
        parameters["octave_latency"] * np.log2(1.0 + length / 128.0)
        + parameters["spill_latency"] * spills
        + parameters["wave_latency"] * (np.sqrt(1.0 + waves * waves) - 1.0)
    )
    return latency


def _mla_prefill(shape: Shape, precision: str, rates: DeviceRates, parameters: Mapping[str, float]) -> Work:
    del rates
    batch, length, heads = (shape[name] for name in ("batch_size", "sequence_length", "num_heads"))
    flops = batch * heads * length * length * (_MLA_QK + _MLA_V)
    num_bytes = (2.0 + _kv_width(precision)) * batch * length * heads * (_MLA_QK + _MLA_V)
    return Work(
        flops=_ramped(shape, flops, parameters),
        num_bytes=num_bytes,
        latency=parameters["octave_latency"] * np.log2(1.0 + length / 32.0),
    )


def _mla_decode(shape: Shape, precision: str, rates: DeviceRates, parameters: Mapping[str, float]) -> Work:
    batch, length, heads = (shape[name] for name in ("batch_size", "context_length", "num_heads"))
    latent = _MLA_LATENT + _MLA_ROTARY
    cache = _kv_width(precision) * batch * length * latent
    padded = np.maximum(heads, _QUERY_TILE)
    return Work(
        flops=2.0 * batch * padded * length * (latent + _MLA_LATENT),
        num_bytes=_read_bytes(cache, rates, parameters) + 2.0 * batch * heads * (latent + _MLA_LATENT),
        latency=_decode_latency(length, cache, batch, rates, parameters),
    )


def _coordinates(length_name: str) -> Callable[[Shape, DeviceRates], NDArray[np.float64]]:
    def coordinates(shape: Shape, rates: DeviceRates) -> NDArray[np.float64]:
        del rates
        batch, length, heads, kv_heads, width = (
            np.log2(np.maximum(shape[name], 1.0))
            for name in ("batch_size", length_name, "num_heads", "num_kv_heads", "head_dim")
        )
        # Kernels tile over batch x KV heads, treat multi-head attention apart and change with the head's width.
        smooth = [batch + kv_heads, length, 0.5 * batch, 0.5 * (heads - kv_heads), 4.0 * width]
        return in_columns([*smooth, 2.0 * (heads == kv_heads)])

    return coordinates


def _steps(length_name: str) -> Callable[[Shape, DeviceRates], NDArray[np.float64]]:
    is_decode = length_name == "context_length"

    def steps(shape: Shape, rates: DeviceRates) -> NDArray[np.float64]:
        del rates
        batch, length, heads, kv_heads, width = (
            np.log2(np.maximum(shape[name], 1.0))
            for name in ("batch_size", length_name, "num_heads", "num_kv_heads", "head_dim")
        )
        columns = [heads, kv_heads, batch + heads, batch + kv_heads + length, batch + heads + length]
        # Both sides of the roofline, but for a factor: kernels switch by how much there is to compute and to read.
        queries, every_head = (0.0, kv_heads) if is_decode else (length, np.logaddexp2(heads, kv_heads))
        return in_columns(
            [*columns, batch + heads + queries + length + width, batch + every_head + length + width]
        )

    return steps


def _mla_coordinates(length_name: str) -> Callable[[Shape, DeviceRates], NDArray[np.float64]]:
    def coordinates(shape: Shape, rates: DeviceRates) -> NDArray[np.float64]:
        del rates
        return rows(shape, ("batch_size", length_name, "num_heads"))

    return coordinates


ATTENTION_PREFILL = Operator(
    name="attention_prefill",
    fields=_PREFILL_FIELDS,
    work=_prefill,
    coordinates=_coordinates("sequence_length"),
    num_dims=6,
    steps=_steps("sequence_length"),
    parameters=_PREFILL_PARAMETERS,
    launch_time=1e-5,
)
ATTENTION_BACKWARD = Operator(
    name="attention_backward",
    fields=_PREFILL_FIELDS,
    work=_backward,
    coordinates=_coordinates("sequence_length"),
    num_dims=6,
    steps=_steps("sequence_length"),
    parameters=_PREFILL_PARAMETERS,
    launch_time=2e-5,
)
ATTENTION_DECODE = Operator(
    name="attention_decode",
    fields=_DECODE_FIELDS,
    work=_decode,
    coordinates=_coordinates("context_length"),
    num_dims=6,
    steps=_steps("context_length"),
    parameters=_DECODE_PARAMETERS,
    launch_time=1e-5,
)
MLA_PREFILL = Operator(
    name="mla_prefill",
    fields=("batch_size", "sequence_length", "num_heads"),
    work=_mla_prefill,
    coordinates=_mla_coordinates("sequence_length"),
    num_dims=3,
    parameters=_PREFILL_PARAMETERS,
    launch_time=1e-5,
)
MLA_DECODE = Operator(
    name="mla_decode",
    fields=("batch_size", "context_length", "num_heads"),
    work=_mla_decode,
    coordinates=_mla_coordinates("context_length"),
    num_dims=3,
    parameters=_DECODE_PARAMETERS,
    launch_time=1e-5,
)
