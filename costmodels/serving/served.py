"""What a step's cost depends on but the pool: model, number formats, device, kernels and constants of the engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.serving.constants import EngineConstants
from meshwright.costmodels.serving.formats import ServingFormats
from meshwright.costmodels.serving.kernels import ServingKernels
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["Column", "ServedModel"]

Column = NDArray[np.float64]

# Share of a memory's data-sheet bandwidth that reading and writing in order reaches.
_STREAM_EFFICIENCY = 0.8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedModel:
    """Everything a step's cost depends on but the pool.

    Parameters
    ----------
    model : ModelSpec
        The model.
    formats : ServingFormats
        Number formats of its parts.
    cluster : ClusterSpec
        Where it runs.
    kernels : ServingKernels
        Kernels of the engine on the device.
    constants : EngineConstants
        What the engine costs beside them.
    """

    model: ModelSpec
    formats: ServingFormats
    cluster: ClusterSpec
    kernels: ServingKernels
    constants: EngineConstants

    @property
    def stream_rate(self) -> float:
        """Bytes per second that kernels bound by the memory read and write [B/s]."""
        return _STREAM_EFFICIENCY * self.cluster.gpu.memory_bandwidth_bytes_per_second
