"""Layer times of a placement beside EPLB's, as a report shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.costmodels.calibration_choice import load_device_calibration, read_device_calibrations
from meshwright.planner.placement.evaluation import ReplicaChoice
from meshwright.planner.placement.job import PlacementJob
from meshwright.planner.placement.layer_times import LayerTimes, fastest, layer_times
from meshwright.planner.placement.request import PlacementAnswer
from meshwright.planner.placement.routing import split_held_out
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["job_calibration", "simulate_layers"]


def job_calibration(job: PlacementJob, paths: Sequence[Path] = ()) -> DeviceCalibration:
    """Return the user's calibration of the job's device, or the built-in one."""
    node = job.cluster.node
    return (
        read_device_calibrations(paths, node.gpu, node) if paths else load_device_calibration(node.gpu, node)
    )


def simulate_layers(
    job: PlacementJob, answer: PlacementAnswer, tokens_per_gpu: int, calibration: DeviceCalibration
) -> dict[str, object]:
    """Return mean layer times of EPLB's placement and of ours on the tokens that judge.

    Parameters
    ----------
    job : PlacementJob
        Model, machines and request.
    answer : PlacementAnswer
        Both placements.
    tokens_per_gpu : int
        Tokens of each rank in one batch.
    calibration : DeviceCalibration
        Of the device.

    Returns
    -------
    dict[str, object]
        ``tokens_per_gpu``, ``calibration``, and per placement the mean seconds of experts, dispatch, combine and
        layer, with the best degree of overlap.
    """
    request = job.request
    solve_with, judge_with = split_held_out(request.routing, request.held_out_share)
    routing = judge_with or solve_with
    cases: list[tuple[str, ExpertPlacement, ReplicaChoice]] = [("EPLB, any copy", answer.baseline, "random")]
    if request.choice == "nearest":
        cases.append(("EPLB, nearest copy", answer.baseline, "nearest"))
    cases.append(("this placement", answer.placement, request.choice))
    placements = {
        name: _mean(fastest(layer_times(job, placement, routing, choice, tokens_per_gpu, calibration)))
        for name, placement, choice in cases
    }
    if answer.grouping is not None:
        times = layer_times(
            job,
            answer.placement,
            routing,
            request.choice,
            tokens_per_gpu,
            calibration,
            groups=answer.grouping.grouped,
        )
        placements["this placement, tokens grouped"] = _mean(fastest(times))
    return {"tokens_per_gpu": tokens_per_gpu, "calibration": calibration.id, "placements": placements}


def _mean(times: LayerTimes) -> dict[str, float]:
    return {
        "experts": float(times.experts.mean()),
        "dispatch": float(times.dispatch.mean()),
        "combine": float(times.combine.mean()),
        "layer": float(times.layer.mean()),
        "overlap_degree": times.degree,
    }
