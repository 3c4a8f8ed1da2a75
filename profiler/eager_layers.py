"""How many times the bytes of fused kernels an eager layer moves, from a layer measured both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshwright.costmodels.operators import element_bytes
from meshwright.profiler.measurements import LayerSample

__all__ = ["EAGER_KERNELS", "eager_elementwise_factor", "fused_bytes"]

EAGER_KERNELS: Mapping[str, int] = {"forward": 40, "backward": 80}
"""Kernels an eager pass launches at most: with unfused norms and rotary embedding, and twice as many backward."""

# Two norms read and write, backward with the input and its gradient and that of the weights; residual sums; SwiGLU.
_HIDDEN_TENSORS = {"forward": 2.0 * 2.0 + 2.0 * 3.0, "backward": 2.0 * 5.0 + 2.0 * 2.0}
_FFN_TENSORS = {"forward": 3.0, "backward": 5.0}
# Rotary embedding and the copies around attention.
_HEAD_TENSORS = 4.0


def fused_bytes(step: str, precision: str, shape: Mapping[str, float]) -> float:
    """Return the bytes that the element-wise kernels of a layer's pass move when fused [B].

    As :func:`meshwright.costmodels.layers.elementwise.elementwise_times` counts them for a layer with two RMSNorms,
    rotary positions and a gated MLP, in one rank.

    Parameters
    ----------
    step : str
        ``forward`` or ``backward``.
    precision : str
        Number format of the activations.
    shape : Mapping[str, float]
        Widths and tokens as in :class:`LayerSample`.
    """
    tokens = shape["batch_size"] * shape["sequence_length"]
    heads = shape["head_dim"] * (shape["num_heads"] + 2.0 * shape["num_kv_heads"])
    widths = (
        _HIDDEN_TENSORS[step] * shape["hidden_size"]
        + _FFN_TENSORS[step] * shape["ffn_hidden_size"]
        + _HEAD_TENSORS * heads
    )
    return element_bytes(precision) * tokens * widths


def eager_elementwise_factor(
    layers: Sequence[LayerSample], stream_bytes_per_second: float, launch_latency: float
) -> float | None:
    """Return the bytes that eager element-wise kernels move over those of fused ones; None where layers do not tell.

    Parameters
    ----------
    layers : Sequence[LayerSample]
        Of one device.
    stream_bytes_per_second : float
        Bandwidth that its copies reach [B/s].
    launch_latency : float
        Time the host takes per launch [s].

    Notes
    -----
    Products and attention are the same kernels in both layers and cancel:
    ``1 + sum(eager - compiled) / sum(fused_bytes / stream)`` over the passes measured both ways, if a compiled layer
    moves the fused bytes. Passes that the host could delay, shorter than twice their launches, do not count: what they
    are longer by is launches.
    """
    compiled = {_identity(each): each.seconds for each in layers if each.is_compiled}
    longer = ideal = 0.0
    for each in layers:
        if each.is_compiled or each.step not in EAGER_KERNELS or _identity(each) not in compiled:
            continue
        if each.seconds < 2.0 * EAGER_KERNELS[each.step] * launch_latency:
            continue
        longer += each.seconds - compiled[_identity(each)]
        ideal += fused_bytes(each.step, each.precision, each.shape) / stream_bytes_per_second
    return 1.0 + longer / ideal if longer > 0.0 else None


def _identity(layer: LayerSample) -> tuple[object, ...]:
    return layer.step, layer.precision, *layer.shape.items()
