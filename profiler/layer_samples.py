"""Whole layers of a measurement file: the self-check of what the fitted operators add up to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from meshwright.errors import SpecError
from meshwright.profiler.measurements import LayerSample
from meshwright.profiler.records import SampleRecord

__all__ = ["LAYER", "layer_samples"]

LAYER = "layer"
"""Operator under which files hold them."""

_WIDTHS = ("hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "head_dim")
_TOKENS = {
    "forward": ("batch_size", "sequence_length"),
    "backward": ("batch_size", "sequence_length"),
    "decode": ("batch_size", "context_length"),
    "optimizer": (),
}


def layer_samples(records: Iterable[tuple[str, SampleRecord]]) -> tuple[LayerSample, ...]:
    """Return the median time of each step and shape; steps this release does not know are left out.

    Parameters
    ----------
    records : Iterable[tuple[str, SampleRecord]]
        Samples of ``layer`` that succeeded, each with its ``file:line``.

    Raises
    ------
    SpecError
        If a width or a number of tokens is missing or not above zero.
    """
    times: dict[tuple[str, str, bool, tuple[float, ...]], list[float]] = {}
    for where, record in records:
        step = record.shape.get("name")
        if not isinstance(step, str) or step not in _TOKENS or record.seconds is None:
            continue
        sizes = tuple(_size(record, name, where) for name in (*_WIDTHS, *_TOKENS[step]))
        key = (step, record.precision, record.shape.get("compiled") == 1, sizes)
        times.setdefault(key, []).append(record.seconds)
    return tuple(
        LayerSample(
            step=step,
            precision=precision,
            is_compiled=is_compiled,
            shape=dict(zip((*_WIDTHS, *_TOKENS[step]), sizes, strict=True)),
            seconds=statistics.median(seconds),
        )
        for (step, precision, is_compiled, sizes), seconds in sorted(times.items())
    )


def _size(record: SampleRecord, name: str, where: str) -> float:
    value = record.shape.get(name)
    if not isinstance(value, int | float) or value <= 0.0:
        raise SpecError(f"{where}: shape: {name} of {record.operator} must be a number above 0")
    return float(value)
