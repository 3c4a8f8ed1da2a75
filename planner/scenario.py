"""A job whose machines, workload or software depart from the real ones, and the context that costs a training job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from meshwright.costmodels.calibration_scaling import carried_calibration, scaled_calibration
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import GpuSpec, LinkSpec, NodeSpec
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.serving import ServingJob

__all__ = [
    "JobT",
    "Scenario",
    "scenario_context",
    "with_cluster",
    "with_gpu",
    "with_link_bandwidth",
    "with_link_latency",
    "with_node",
    "with_peak",
    "with_workload",
]


JobT = TypeVar("JobT", TrainingJob, ServingJob)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario(Generic[JobT]):
    """A job and how its devices depart from those that were measured.

    Parameters
    ----------
    job : TrainingJob | ServingJob
        Model, machines and workload; of training the software too.
    calibration_paths : tuple[Path, ...]
        The user's calibration files.
    measured_gpu : GpuSpec | None
        The GPU whose calibration applies, before any of its numbers changed; None when none did.
    constants : Mapping[str, float]
        Constants of a training software in place of its own, by field.
    collective_latency, launch_time : float
        Factors on measured absolute figures, as :func:`meshwright.costmodels.calibration_scaling.scaled_calibration`
        takes them.
    host_time : float
        Factor on what a serving engine's host does for a step.
    """

    job: JobT
    calibration_paths: tuple[Path, ...] = ()
    measured_gpu: GpuSpec | None = None
    constants: Mapping[str, float] = field(default_factory=dict)
    collective_latency: float = 1.0
    launch_time: float = 1.0
    host_time: float = 1.0

    @property
    def node(self) -> NodeSpec:
        """The cluster's node."""
        return self.job.cluster.node

    @property
    def gpu(self) -> GpuSpec:
        """The cluster's accelerator."""
        return self.job.cluster.gpu


def scenario_context(scenario: Scenario[TrainingJob]) -> CostContext:
    """Return the context of a training scenario.

    A GPU with changed numbers reaches the same shares of its data sheet as the measured one; it counts as another
    device of its generation once anything changed that kernels and collectives run at.

    Raises
    ------
    SpecError
        If the device lacks the precision.
    CalibrationError
        If the device has no calibration.
    """
    measured = scenario.measured_gpu or scenario.gpu
    real = with_node(scenario, gpu=measured).job
    context = cost_context(real, calibration_paths=scenario.calibration_paths)
    calibration = scaled_calibration(
        carried_calibration(context.calibration, measured, scenario.gpu),
        collective_latency=scenario.collective_latency,
        launch_time=scenario.launch_time,
    )
    software = replace(context.software, **scenario.constants)  # type: ignore[arg-type]  # keys are number fields
    return replace(context, cluster=scenario.job.cluster, calibration=calibration, software=software)


def with_cluster(scenario: Scenario[JobT], **changes: Any) -> Scenario[JobT]:
    """Return the scenario with other fields of its cluster."""
    return replace(scenario, job=replace(scenario.job, cluster=replace(scenario.job.cluster, **changes)))


def with_node(scenario: Scenario[JobT], **changes: Any) -> Scenario[JobT]:
    """Return the scenario with other fields of its node."""
    return with_cluster(scenario, node=replace(scenario.node, **changes))


def with_gpu(scenario: Scenario[JobT], **changes: Any) -> Scenario[JobT]:
    """Return the scenario with other numbers of its GPU, whose calibration stays that of the real one."""
    measured = scenario.measured_gpu or scenario.gpu
    return replace(with_node(scenario, gpu=replace(scenario.gpu, **changes)), measured_gpu=measured)


def with_workload(scenario: Scenario[JobT], **changes: Any) -> Scenario[JobT]:
    """Return the scenario with other fields of its workload."""
    return replace(scenario, job=replace(scenario.job, workload=replace(scenario.job.workload, **changes)))


def with_peak(scenario: Scenario[JobT], precision: str, flops_per_second: float) -> Scenario[JobT]:
    """Return the scenario with another dense peak.

    Raises
    ------
    SpecError
        If the GPU has no such format.
    """
    peaks = dict(scenario.gpu.peak_flops_per_second)
    if precision not in peaks:
        raise SpecError(f"{scenario.gpu.id} has no {precision} units; it offers {', '.join(peaks)}")
    peaks[precision] = flops_per_second
    return with_gpu(scenario, peak_flops_per_second=peaks)


def with_link_bandwidth(scenario: Scenario[JobT], bytes_per_second: float) -> Scenario[JobT]:
    """Return the scenario with another bandwidth between the GPUs of a node."""
    link = scenario.node.intra_link
    return _with_link(scenario, replace(link, bandwidth_bytes_per_second=bytes_per_second))


def with_link_latency(scenario: Scenario[JobT], seconds: float) -> Scenario[JobT]:
    """Return the scenario with another latency between the GPUs of a node; collectives start in proportion.

    Raises
    ------
    SpecError
        If the latency is not above zero.
    """
    if seconds <= 0.0:
        raise SpecError("must be above zero")
    link = scenario.node.intra_link
    factor = seconds / link.latency if link.latency > 0.0 else 1.0
    changed = _with_link(scenario, replace(link, latency=seconds))
    return replace(changed, collective_latency=scenario.collective_latency * factor)


def _with_link(scenario: Scenario[JobT], link: LinkSpec) -> Scenario[JobT]:
    """Replace what the GPUs of a node talk over: NVLink and its like, or the host link where there is none."""
    if scenario.gpu.scale_up is not None:
        return with_gpu(scenario, scale_up=link)
    return with_gpu(scenario, host_link=link)
