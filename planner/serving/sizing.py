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
    max_prefill_gpus : int | None
        GPUs of the cluster that only prefill pools use; ``max_gpus`` are then those of the others. None shares one cluster.
    """

    objective: ServingObjective
    max_gpus: int
    demand: float
    mean_output: float
    max_prefill_gpus: int | None = None

    @property
    def total_gpus(self) -> int:
        """GPUs there are."""
        return self.max_gpus + (self.max_prefill_gpus or 0)

    def room(self, num_gpus: IntArray, prefill_gpus: IntArray | int = 0) -> IntArray:
        """Return how many units there is room for.

        Parameters
        ----------
        num_gpus, prefill_gpus : NDArray[np.int64]
            GPUs of one unit, and those of them in its prefill pool, ``(num_candidates,)``.
        """
        if self.max_prefill_gpus is None:
            return self.max_gpus // num_gpus
        first = np.asarray(prefill_gpus, dtype=np.int64)
        room: IntArray = self.max_gpus // (num_gpus - first)
        return np.where(first > 0, np.minimum(room, self.max_prefill_gpus // np.maximum(first, 1)), room)

    def may_beat(self, bound: float, value: float) -> bool:
        """Return whether something with a bound can be better than a value; ``cost`` counts whole GPUs."""
        if self.objective == "cost" and np.isfinite(value):
            return bool(np.ceil(-bound) < np.ceil(-value))
        return bound > value

    def num_units(self, load: FloatArray, num_gpus: IntArray, prefill_gpus: IntArray | int = 0) -> IntArray:
        """Return how many units are deployed: those the demand needs for ``cost``, else as many as there is room for.

        Parameters
        ----------
        load : NDArray[np.float64]
            Load that one unit carries within the limits, in the units of ``demand``, ``(num_candidates,)``.
        num_gpus, prefill_gpus : NDArray[np.int64]
            As in :meth:`room`.
        """
        if self.objective == "cost":
            return self.units_needed(load)
        return np.maximum(1, self.room(num_gpus, prefill_gpus))

    def units_needed(self, load: FloatArray) -> IntArray:
        """Return the units that the demand needs; a very large number where a unit carries nothing."""
        with np.errstate(divide="ignore"):
            needed = np.ceil(self.demand / np.maximum(load, 0.0) - 1e-9)
        return np.where(np.isfinite(needed), np.clip(needed, 1, 2**40), 2**40).astype(np.int64)

    def carries_demand(
        self, load: FloatArray, num_gpus: IntArray, prefill_gpus: IntArray | int = 0
    ) -> NDArray[np.bool_]:
        """Return whether the demand fits the cluster. ``throughput`` asks what the cluster can carry, not for a demand."""
        if self.objective == "throughput":
            return load > 0.0
        return self.units_needed(load) <= self.room(num_gpus, prefill_gpus)

    def values(
        self,
        rate: FloatArray,
        load: FloatArray,
        num_gpus: IntArray,
        prefill_gpus: IntArray | int = 0,
    ) -> FloatArray:
        """Return what is maximised; -inf where the limits cannot be kept.

        Goodput per GPU counts output tokens per second and GPU of one unit. Throughput counts those of the whole
        cluster, idle GPUs included. Cost counts the GPUs that the demand needs, the fewer the better; equal numbers are
        told apart by the share of their room that stays free.

        Parameters
        ----------
        rate : NDArray[np.float64]
            Requests per second of one unit [1/s].
        load, num_gpus, prefill_gpus : NDArray
            As in :meth:`num_units`.
        """
        tokens = rate * self.mean_output
        if self.objective == "goodput_per_gpu":
            value = tokens / num_gpus
        elif self.objective == "throughput":
            value = tokens * self.room(num_gpus, prefill_gpus) / self.total_gpus
        else:
            needed = self.units_needed(load) * num_gpus
            with np.errstate(divide="ignore", invalid="ignore"):
                free = 1.0 - self.demand / (self.units_needed(load) * np.maximum(load, 1e-300))
            value = -(needed.astype(np.float64) - np.clip(free, 0.0, 0.999))
        return np.where((load > 0.0) & (rate > 0.0), value, -np.inf)
