"""Which shapes to measure: space-filling points of each operator's space, and the exact shapes of a model.

Points are a scrambled Sobol sequence in log2 space, snapped to sizes models have, and cut to what the device holds
and computes in reasonable time. Equal seeds give equal shapes, and fewer shapes are the first of more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import CalibrationError
from meshwright.profiler.suites.limits import Limits, Shape, fits_attention, fits_gemm, fits_moe

__all__ = [
    "attention_shapes",
    "byte_sizes",
    "decode_shapes",
    "expert_loads",
    "gemm_shapes",
    "mla_decode_shapes",
    "mla_prefill_shapes",
    "moe_shapes",
]

_HEAD_DIMS = (64, 128, 192, 256)
_NUM_HEADS = (1, 2, 4, 5, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
_HEADS_PER_KV_HEAD = (1, 2, 4, 8, 16)
_MLA_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_NUM_EXPERTS = (8, 16, 32, 64, 128, 256)
_TOP_K = (1, 2, 4, 6, 8)
_EP = (1, 2, 4, 8, 16, 32)
_TP = (1, 2, 4, 8)
# Exponent of the power law a skewed routing draws its loads from; 0 is balanced.
_SKEWS = (0.0, 1.2)
# Points of a sequence after which a space is taken to hold no more shapes.
_MAX_ROWS = 2**16

_Row = NDArray[np.float64]
_T = TypeVar("_T")


def gemm_shapes(count: int, seed: int, limits: Limits, precision: str = "bf16") -> tuple[Shape, ...]:
    """Return shapes ``m, n, k`` of forward products: tokens, outputs, inputs.

    Tokens are any number up to 32, then multiples of 8 and of 64; widths are multiples of 16 and of 64.
    """
    most_rows, widths = (512, (32, 1024)) if limits.is_small else (32768, (64, 65536))

    def shape(row: _Row) -> Shape | None:
        m = _snapped(_log_scaled(row[0], 1, most_rows), ((32, 1), (512, 8), (math.inf, 64)))
        n, k = (
            _snapped(_log_scaled(value, *widths), ((1024, 16), (8192, 64), (math.inf, 128)))
            for value in row[1:]
        )
        found = {"m": m, "n": n, "k": k}
        return found if fits_gemm(found, limits, precision) else None

    return _fill(count, seed, 3, shape)


def attention_shapes(
    count: int, seed: int, limits: Limits, *, is_backward: bool = False
) -> tuple[Shape, ...]:
    """Return shapes of causal attention over whole sequences; a backward pass takes 2.5 times the work."""
    longest = 1024 if limits.is_small else 2**17
    operator = "attention_backward" if is_backward else "attention_prefill"

    def shape(row: _Row) -> Shape | None:
        length = _snapped(_log_scaled(row[0], 16, longest), ((512, 16), (math.inf, 128)))
        batch = _snapped(_log_scaled(row[1], 1, 64), ((math.inf, 1),))
        heads, kv_heads = _heads(row[2], row[3], 8 if limits.is_small else 128)
        width = _pick(row[4], _HEAD_DIMS)
        found = _attention(batch, "sequence_length", length, heads, kv_heads, width)
        is_short = batch * length <= (2048 if limits.is_small else 2**17)
        return found if is_short and fits_attention(operator, found, limits) else None

    return _fill(count, seed, 5, shape)


def decode_shapes(count: int, seed: int, limits: Limits) -> tuple[Shape, ...]:
    """Return shapes of one query token per sequence against a cache of keys and values."""
    longest, most = (2048, 8) if limits.is_small else (2**17, 512)

    def shape(row: _Row) -> Shape | None:
        length = _snapped(_log_scaled(row[0], 128, longest), ((1024, 16), (math.inf, 128)))
        batch = _snapped(_log_scaled(row[1], 1, most), ((32, 1), (math.inf, 8)))
        heads, kv_heads = _heads(row[2], row[3], 8 if limits.is_small else 128)
        width = _pick(row[4], _HEAD_DIMS)
        found = _attention(batch, "context_length", length, heads, kv_heads, width)
        return found if fits_attention("attention_decode", found, limits) else None

    return _fill(count, seed, 5, shape)


def mla_prefill_shapes(count: int, seed: int, limits: Limits) -> tuple[Shape, ...]:
    """Return shapes of latent attention over whole sequences, expanded to heads of 192 and 128."""
    longest, most_heads = (512, 4) if limits.is_small else (2**15, 128)

    def shape(row: _Row) -> Shape | None:
        length = _snapped(_log_scaled(row[0], 16, longest), ((512, 16), (math.inf, 128)))
        batch = _snapped(_log_scaled(row[1], 1, 32), ((math.inf, 1),))
        heads = _pick(row[2], tuple(each for each in _MLA_HEADS if each <= most_heads))
        found = {"batch_size": batch, "sequence_length": length, "num_heads": heads}
        return found if fits_attention("mla_prefill", found, limits) else None

    return _fill(count, seed, 3, shape)


def mla_decode_shapes(count: int, seed: int, limits: Limits) -> tuple[Shape, ...]:
    """Return shapes of absorbed latent decode: all heads share one cached latent of 576 values a token."""
    longest, most = (1024, 4) if limits.is_small else (2**17, 512)

    def shape(row: _Row) -> Shape | None:
        length = _snapped(_log_scaled(row[0], 128, longest), ((1024, 16), (math.inf, 128)))
        batch = _snapped(_log_scaled(row[1], 1, most), ((32, 1), (math.inf, 8)))
        heads = _pick(row[2], tuple(each for each in _MLA_HEADS if each <= (16 if limits.is_small else 128)))
        found = {"batch_size": batch, "context_length": length, "num_heads": heads}
        return found if fits_attention("mla_decode", found, limits) else None

    return _fill(count, seed, 3, shape)


def moe_shapes(count: int, seed: int, limits: Limits) -> tuple[Shape, ...]:
    """Return shapes of the routed experts on one rank; ``skew`` is the exponent of a power law, 0 for balance."""
    most_tokens, widths = (128, (64, 256)) if limits.is_small else (16384, (1024, 16384))
    experts = (4, 8) if limits.is_small else _NUM_EXPERTS

    def shape(row: _Row) -> Shape | None:
        tokens = _snapped(_log_scaled(row[0], 1, most_tokens), ((32, 1), (math.inf, 16)))
        hidden = _snapped(_log_scaled(row[1], *widths), ((math.inf, 64),))
        ffn = _snapped(_log_scaled(row[2], *widths), ((math.inf, 64),))
        num_experts = _pick(row[3], experts)
        top_k = min(_pick(row[4], _TOP_K), num_experts)
        ep = _pick(row[5], tuple(each for each in _EP if each <= num_experts // 2))
        tp = _pick(row[6], _TP)
        found = {
            "num_tokens": tokens,
            "hidden_size": hidden,
            "moe_ffn_hidden_size": ffn,
            "top_k": top_k,
            "num_experts": num_experts,
            "tp": tp,
            "ep": ep,
            "skew": _pick(row[7], _SKEWS),
        }
        is_aligned = ffn // tp >= 32 and ffn % (16 * tp) == 0
        return found if is_aligned and fits_moe(found, limits) else None

    return _fill(count, seed, 8, shape)


def byte_sizes(count: int, smallest: float, largest: float) -> tuple[int, ...]:
    """Return sizes evenly spaced in their logarithm, multiples of 256, both ends included [B]."""
    spaced = np.geomspace(smallest, largest, count)
    return tuple(sorted({max(256, round(float(size) / 256.0) * 256) for size in spaced}))


def expert_loads(
    num_rows: int, num_experts: int, skew: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return how many routed rows each expert gets; they sum to ``num_rows``.

    Parameters
    ----------
    num_rows : int
        Tokens times experts per token.
    num_experts : int
        Experts of the layer.
    skew : float
        0 for the most even division; else shares are drawn from a power law with this exponent.
    generator : numpy.random.Generator
        Draws the shares.

    Examples
    --------
    >>> expert_loads(10, 4, 0.0, np.random.default_rng(0)).tolist()
    [3, 3, 2, 2]
    """
    if skew > 0.0:
        # Inverse of the distribution function of x ** -skew on [1, largest].
        power, largest = 1.0 - skew, max(2.0, 0.8 * num_rows)
        uniform = generator.random(num_experts)
        shares = (1.0 + uniform * (largest**power - 1.0)) ** (1.0 / power)
    else:
        shares = np.ones(num_experts)
    exact = num_rows * shares / shares.sum()
    loads: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    # What rounding left goes to the largest remainders.
    order = np.argsort(loads - exact, kind="stable")
    loads[order[: num_rows - int(loads.sum())]] += 1
    return loads


def _fill(count: int, seed: int, num_dims: int, shape: Callable[[_Row], Shape | None]) -> tuple[Shape, ...]:
    """Return the first ``count`` different shapes that a Sobol sequence meets."""
    try:
        from scipy.stats import qmc
    except ImportError:
        raise CalibrationError("profiling needs scipy; pip install 'meshwright[profile]'") from None
    found: dict[tuple[float, ...], Shape] = {}
    exponent = max(3, math.ceil(math.log2(max(4 * count, 1))))
    while count > 0:
        points = qmc.Sobol(num_dims, scramble=True, rng=np.random.default_rng(seed)).random_base2(exponent)
        for row in points:
            each = shape(row)
            if each is not None:
                found.setdefault(tuple(each.values()), each)
            if len(found) == count:
                return tuple(found.values())
        if len(points) >= _MAX_ROWS:
            break
        exponent += 2
    return tuple(found.values())


def _log_scaled(value: float, low: float, high: float) -> float:
    """Return where a number in [0, 1) lies between two others in log space."""
    return float(low * (high / low) ** value)


def _snapped(value: float, steps: Sequence[tuple[float, int]]) -> int:
    """Return the nearest multiple of the step that belongs to a value: ``(below, step), ...``, ascending."""
    step = next(step for below, step in steps if value <= below)
    return max(step, round(value / step) * step)


def _pick(value: float, choices: Sequence[_T]) -> _T:
    return choices[min(int(value * len(choices)), len(choices) - 1)]


def _heads(head_value: float, ratio_value: float, most: int) -> tuple[int, int]:
    """Return query heads and key-value heads."""
    heads = _pick(head_value, tuple(each for each in _NUM_HEADS if each <= most))
    return heads, heads // _pick(ratio_value, tuple(each for each in _HEADS_PER_KV_HEAD if heads % each == 0))


def _attention(batch: int, length_name: str, length: int, heads: int, kv_heads: int, width: int) -> Shape:
    return {
        "batch_size": batch,
        length_name: length,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": width,
    }
