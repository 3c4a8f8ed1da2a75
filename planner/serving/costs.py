"""The cost models of a serving job, by engine and formats: what a search and a simulation ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.costmodels.operators import OperatorModel
from meshwright.costmodels.serving.carried import carried_kernels, with_host_time
from meshwright.costmodels.serving.constants import CERTAINTIES, EngineConstants
from meshwright.costmodels.serving.kernels import load_serving_kernels
from meshwright.costmodels.serving.memory import ServingMemory, kv_bytes_per_token, serving_memory
from meshwright.costmodels.serving.replica import served_model
from meshwright.costmodels.serving.step import ServedModel, step_table
from meshwright.errors import InfeasiblePlanError
from meshwright.hardware_specs.specs import GpuSpec
from meshwright.simcore.domain.serving import PoolRole, ServingJob, ServingPlan, ServingPool
from meshwright.simcore.serving.step_table import StepTable

__all__ = ["AS_MEASURED", "Departure", "JobCosts", "check_stated_cache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """How GPUs depart from those that were measured.

    Parameters
    ----------
    measured_gpu : GpuSpec | None
        The GPU whose kernels apply, before any of its numbers changed; None when none did.
    collective_latency, launch_time, host_time : float
        Factors on the start-up of collectives inside a node, on the device's launch time of a kernel, and on the host's work
        of a step.
    """

    measured_gpu: GpuSpec | None = None
    collective_latency: float = 1.0
    launch_time: float = 1.0
    host_time: float = 1.0


AS_MEASURED = Departure()


class JobCosts:
    """Cost models of one job; kernels and constants are read once for each engine and set of formats.

    Parameters
    ----------
    job : ServingJob
        Model and cluster.
    calibration_paths : Sequence[Path]
        The user's calibrations; the built-in ones without any.
    departure : Departure
        How the cluster's GPUs depart from those that were measured; a prefill cluster's never do.
    """

    def __init__(
        self, job: ServingJob, calibration_paths: Sequence[Path] = (), departure: Departure = AS_MEASURED
    ) -> None:
        self._job = job
        self._paths = tuple(calibration_paths)
        self._departure = departure
        self._served: dict[tuple[str, str, str, str, bool], ServedModel] = {}

    def served(self, plan: ServingPlan, pool: ServingPool) -> ServedModel:
        """Return the model as the plan's engine runs it on the pool's GPUs."""
        cluster = self._job.cluster_of(pool.role)
        is_apart = cluster is not self._job.cluster
        key = (plan.engine, plan.engine_version, plan.precision, plan.kv_precision, is_apart)
        if key not in self._served:
            departure = AS_MEASURED if is_apart else self._departure
            measured = replace(cluster.node, gpu=departure.measured_gpu or cluster.gpu)
            kernels = carried_kernels(
                load_serving_kernels(measured.gpu, measured, plan.engine, self._paths),
                self._job.model,
                measured.gpu,
                cluster.gpu,
                collective_latency=departure.collective_latency,
                launch_time=departure.launch_time,
            )
            remembered = {
                name: cast("OperatorModel", _Remembered(operator))
                for name, operator in kernels.operators.items()
            }
            served = served_model(
                self._job.model, cluster, plan, kernels=replace(kernels, operators=remembered)
            )
            constants = with_host_time(served.constants, departure.host_time, departure.launch_time)
            self._served[key] = replace(served, constants=constants)
        return self._served[key]

    def memory(self, plan: ServingPlan, pool: ServingPool) -> ServingMemory:
        """Return how a rank's memory is spent.

        Raises
        ------
        InfeasiblePlanError
            If the weights leave no room for a cache.
        """
        served = self.served(plan, pool)
        return serving_memory(served.model, served.formats, pool, self._gpu(pool), served.constants)

    def kv_cache_tokens(self, plan: ServingPlan, pool: ServingPool) -> int:
        """Return the tokens one rank's KV cache holds; 0 when the weights leave no room."""
        try:
            return self.memory(plan, pool).kv_cache_tokens
        except InfeasiblePlanError:
            return 0

    def kv_bytes(self, plan: ServingPlan, pool: ServingPool) -> float:
        """Return the cache of one token over all ranks of a replica that hold a part of it [B]."""
        served = self.served(plan, pool)
        return kv_bytes_per_token(served.model, served.formats, pool) * pool.tp * pool.pp

    def step_table(self, plan: ServingPlan, pool: ServingPool) -> StepTable:
        """Return the step times of one replica."""
        return step_table(self.served(plan, pool), pool)

    def calibration_identities(self, plan: ServingPlan) -> Mapping[str, Mapping[str, str]]:
        """Return id, hash and reason of the operator calibrations, by key of a plan file.

        ``calibration`` is that of the last pool; ``prefill_calibration`` is there where the prefill pool has another.
        """
        first, last = (
            dict(self._calibration(plan, pool).identity) for pool in (plan.pools[0], plan.pools[-1])
        )
        return {"calibration": last} | ({} if first == last else {"prefill_calibration": first})

    def calibration_notes(self, plan: ServingPlan) -> tuple[str, ...]:
        """Return one line per calibration, named after the pool it is of where there are several."""
        found = [(pool.role, self._calibration(plan, pool)) for pool in plan.pools]
        return _by_role([(role, (f"{each.id} ({each.reason})",)) for role, each in found])

    def certainty_notes(self, plan: ServingPlan) -> tuple[str, ...]:
        """Return one sentence per kind of certainty: which engine constants are fitted, borrowed or defaults.

        Where pools differ, each sentence names its pool.
        """
        return _by_role(
            [(pool.role, _certainty_notes(self.served(plan, pool).constants)) for pool in plan.pools]
        )

    def _calibration(self, plan: ServingPlan, pool: ServingPool) -> DeviceCalibration:
        return self.served(plan, pool).kernels.calibration

    def _gpu(self, pool: ServingPool) -> GpuSpec:
        return self._job.cluster_of(pool.role).gpu


def check_stated_cache(costs: JobCosts, plan: ServingPlan) -> None:
    """Raise when a pool states a larger cache than its memory holds.

    Raises
    ------
    InfeasiblePlanError
        Names the pool and what it holds.
    """
    for pool in plan.pools:
        stated, held = pool.kv_cache_tokens, costs.memory(plan, pool).kv_cache_tokens
        if stated is not None and stated > held:
            raise InfeasiblePlanError(
                f"{pool.role} pool: kv_cache_tokens {stated:,} do not fit; beside the weights a rank holds {held:,}; lower it "
                "or leave it out",
                {"memory": 1},
            )


def _certainty_notes(constants: EngineConstants) -> tuple[str, ...]:
    release = f"{constants.engine} {constants.version or '(no release stated)'}"
    by_certainty = {certainty: constants.names(certainty) for certainty in CERTAINTIES}
    return (
        *(
            f"{release}, {certainty}: {', '.join(names)}"
            for certainty, names in by_certainty.items()
            if names
        ),
        *(f"evidence: {text}" for text in constants.evidence),
    )


def _by_role(notes: Sequence[tuple[PoolRole, tuple[str, ...]]]) -> tuple[str, ...]:
    """Return the notes of all pools: once where they agree, else each named after its pool."""
    if all(texts == notes[0][1] for _, texts in notes):
        return notes[0][1]
    return tuple(f"{role} pool: {text}" for role, texts in notes for text in texts)


class _Remembered:
    """An operator model that remembers its answers: shapes of a search share most of their kernels."""

    def __init__(self, model: OperatorModel) -> None:
        self._model = model
        self._times: dict[tuple[tuple[str, bytes], ...], NDArray[np.float64]] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def time(self, shape: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Return the model's times [s]."""
        key = tuple((name, value.tobytes()) for name, value in shape.items())
        if key not in self._times:
            times = self._model.time(shape)
            times.setflags(write=False)
            self._times[key] = times
        return self._times[key]
