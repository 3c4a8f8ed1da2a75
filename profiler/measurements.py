"""What was measured on one device, whoever measured it: our profiler, or a public table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["CollectiveSamples", "MeasuredConstant", "Measurements", "OperatorSamples"]

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
        By dotted name of the part of a calibration they are: ``sustained_clock.bf16``,
        ``memory_stream.efficiency``, ``attention.backward_efficiency``, ``attention.flash_3.peak`` (FLOP/s) and
        ``.half_length``, ``software.all.FIELD``.
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
    attribution: str = ""
    licence: str = ""
    inputs: tuple[tuple[str, str, int], ...] = ()
