"""What was measured on one device, whoever measured it: our profiler, or a public table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["CollectiveSamples", "LayerSample", "MeasuredConstant", "Measurements", "OperatorSamples"]

Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OperatorSamples:
    """Measured times of one operator in one number format.

    Parameters
    ----------
    operator : str
        Name in :data:`meshwright.costmodels.operators.OPERATORS`.
    precision : str
        Number format.
    shape : Mapping[str, NDArray[np.float64]]
        The operator's fields, each ``(num_samples,)``.
    seconds : NDArray[np.float64]
        Median time of each sample, all above zero [s].
    source : str
        Where they come from, for the reader of the calibration.
    """

    operator: str
    precision: str
    shape: Mapping[str, Column]
    seconds: Column
    source: str

    @property
    def name(self) -> str:
        """``OPERATOR.PRECISION``, the name of the model they are fitted to."""
        return f"{self.operator}.{self.precision}"

    def take(self, rows: NDArray[np.int64]) -> OperatorSamples:
        """Return some of the samples."""
        return OperatorSamples(
            operator=self.operator,
            precision=self.precision,
            shape={name: column[rows] for name, column in self.shape.items()},
            seconds=self.seconds[rows],
            source=self.source,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CollectiveSamples:
    """Measured times of one collective in one group size.

    Parameters
    ----------
    collective : str
        ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast`` or ``send``.
    ranks : int
        Group size, all on one node.
    num_bytes : NDArray[np.float64]
        Bytes of the whole buffer (nccl-tests convention) [B].
    seconds : NDArray[np.float64]
        Median times [s].
    """

    collective: str
    ranks: int
    num_bytes: Column
    seconds: Column
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSample:
    """Measured time of a whole transformer layer, to hold against the sum of its operators.

    Parameters
    ----------
    step : str
        ``forward``, ``backward``, ``decode`` or ``optimizer``.
    precision : str
        Number format.
    is_compiled : bool
        Whether a compiler fused what it could.
    shape : Mapping[str, float]
        ``hidden_size``, ``ffn_hidden_size``, ``num_heads``, ``num_kv_heads``, ``head_dim``, and the tokens:
        ``batch_size`` with ``sequence_length``, or with ``context_length`` for a decode step.
    seconds : float
        Median time [s].
    """

    step: str
    precision: str
    is_compiled: bool
    shape: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredConstant:
    """One number with its source: ``sustained_clock.bf16``, ``memory_stream.efficiency`` and the like."""

    value: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Everything known of one device from one campaign.

    Parameters
    ----------
    gpu : str
        Device id of the specs.
    kernels : str
        Software whose kernels were measured, such as ``vllm 0.24.0``.
    constants : Mapping[str, MeasuredConstant]
        By dotted name. A calibration takes those that are part of it: ``sustained_clock.FORMAT``,
        ``memory_stream.efficiency``, ``attention.backward_efficiency`` and ``software.all.FIELD``. Others, such as
        ``launch.graph`` or ``contention.copy``, are for the reader.
    layers : tuple[LayerSample, ...]
        Whole layers, which check what the fitted operators add up to.
    attribution, licence : str
        Whose data, under which licence.
    inputs : tuple[tuple[str, str, int], ...]
        Name, SHA-256 and rows of every file they were read from.
    """

    gpu: str
    kernels: str
    operators: tuple[OperatorSamples, ...] = ()
    collectives: tuple[CollectiveSamples, ...] = ()
    constants: Mapping[str, MeasuredConstant] = field(default_factory=dict)
    layers: tuple[LayerSample, ...] = ()
    attribution: str = ""
    licence: str = ""
    inputs: tuple[tuple[str, str, int], ...] = ()
