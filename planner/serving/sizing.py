"""How many units of a configuration a job takes, and what that is worth: the objectives of a serving search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.serving.job_file import ServingObjective

__all__ = ["Sizing"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The scale of a job. A unit is what is repeated: an aggregated replica, or a ratio of prefill to decode replicas.

    Parameters
    ----------
    objective : ServingObjective
        What is best.
    max_gpus : int
        GPUs there are.
    demand : float
        The stated load: requests per second, or clients of a closed loop.
    mean_output : float
        Output tokens of a request.
    """

    objective: ServingObjective
    max_gpus: int
    demand: float
    mean_output: float

    def num_units(self, load: FloatArray, num_gpus: IntArray) -> IntArray:
        """Return how many units are deployed: those the demand needs for ``cost``, else as many as there is room for.

        Parameters
        ----------
        load : NDArray[np.float64]
            Load that one unit carries within the limits, in the units of ``demand``, ``(num_candidates,)``.
        num_gpus : NDArray[np.int64]
            GPUs of one unit.
        """
        if self.objective == "cost":
            return self.units_needed(load)
        return np.maximum(1, self.max_gpus // num_gpus)

    def units_needed(self, load: FloatArray) -> IntArray:
        """Return the units that the demand needs; a very large number where a unit carries nothing."""
        with np.errstate(divide="ignore"):
            needed = np.ceil(self.demand / np.maximum(load, 0.0) - 1e-9)
        return np.where(np.isfinite(needed), np.clip(needed, 1, 2**40), 2**40).astype(np.int64)

    def carries_demand(self, load: FloatArray, num_gpus: IntArray) -> NDArray[np.bool_]:
        """Return whether the demand fits the cluster. ``throughput`` asks what the cluster can carry, not for a demand."""
        if self.objective == "throughput":
            return load > 0.0
        return self.units_needed(load) * num_gpus <= self.max_gpus

    def values(self, rate: FloatArray, load: FloatArray, num_gpus: IntArray) -> FloatArray:
        """Return what is maximised; -inf where the limits cannot be kept.

        Goodput per GPU counts output tokens per second and GPU of one unit. Throughput counts those of the whole
        cluster, idle GPUs included. Cost counts the GPUs that the demand needs, the fewer the better; equal numbers are
        told apart by the share of their room that stays free.

        Parameters
        ----------
        rate : NDArray[np.float64]
            Requests per second of one unit [1/s].
        load, num_gpus : NDArray
            As in :meth:`num_units`.
        """
        tokens = rate * self.mean_output
        if self.objective == "goodput_per_gpu":
            value = tokens / num_gpus
        elif self.objective == "throughput":
            value = tokens * (self.max_gpus // num_gpus) / self.max_gpus
        else:
            needed = self.units_needed(load) * num_gpus
            with np.errstate(divide="ignore", invalid="ignore"):
                free = 1.0 - self.demand / (self.units_needed(load) * np.maximum(load, 1e-300))
            value = -(needed.astype(np.float64) - np.clip(free, 0.0, 0.999))
        return np.where((load > 0.0) & (rate > 0.0), value, -np.inf)
