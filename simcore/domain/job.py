"""A training job: which model, on which machines, with which workload and software."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.workload import TrainingWorkload

__all__ = ["TrainingJob"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """What stays fixed while plans are compared.

    Parameters
    ----------
    model, cluster, workload : ModelSpec, ClusterSpec, TrainingWorkload
        What runs where.
    software : str
        Id of the software generation whose overheads apply (``megatron-core``, ``torchtitan``, ...).
    features : tuple[str, ...]
        Switches of the software beyond its defaults (``deepep``, ``async_tp``, ...), sorted.
    """

    model: ModelSpec
    cluster: ClusterSpec
    workload: TrainingWorkload
    software: str
    features: tuple[str, ...] = ()
