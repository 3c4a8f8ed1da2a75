"""Ways to train through uneven routing: experts at home, hot experts copied each iteration, smaller groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.costmodels.parallelism.dispatch import link_rates
from meshwright.costmodels.parallelism.expert_gathering import gather_time, gathered_experts
from meshwright.costmodels.roofline import gemm_time
from meshwright.planner.placement.job import PlacementJob, with_layout
from meshwright.planner.placement.layer_times import COMBINE_BYTES, layer_times
from meshwright.planner.placement.layout import sampled_routing
from meshwright.planner.placement.routing import RoutingData, split_held_out
from meshwright.planner.placement.solving import solve_placement
from meshwright.simcore.domain import model_parameters

__all__ = ["TrainingOption", "training_options"]

_LAYERS, _TOKENS = 3, 32_768
# Experts copied to each rank.
_COPIES = (1, 2, 4)
# Backward over forward: gradients of inputs and of weights.
_BACKWARD = 2.0
# Weights and gradients travel in 16 bits.
_ELEMENT_BYTES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOption:
    """One way, priced for one layer forward and backward; means over the sampled layers.

    Parameters
    ----------
    name : str
        What it is.
    group_size : int
        Ranks that exchange tokens.
    copies_per_rank : int
        Experts copied to each rank every iteration.
    imbalance : float
        Heaviest rank over the mean, on tokens later than those the copies were chosen by.
    experts_seconds, exchange_seconds, gather_seconds, exposed_seconds : float
        Experts, dispatch and combine, weights gathered with gradients returned, and what of the latter
        nothing hides [s].
    layer_seconds : float
        Experts, exchange and what is exposed [s].
    gathered_bytes : float
        Weights of one layer that a rank holds for the time of its use [B].
    """

    name: str
    group_size: int
    copies_per_rank: int
    imbalance: float
    experts_seconds: float
    exchange_seconds: float
    gather_seconds: float
    exposed_seconds: float
    layer_seconds: float
    gathered_bytes: float


def training_options(
    job: PlacementJob, calibration: DeviceCalibration, tokens_per_gpu: int
) -> tuple[TrainingOption, ...]:
    """Return every way to train the job's experts on its ranks, fastest first.

    Parameters
    ----------
    job : PlacementJob
        Model, machines, ranks, dispatch and routing data; redundant slots do not count: weights have one home.
    calibration : DeviceCalibration
        Prices products.
    tokens_per_gpu : int
        Tokens of each rank in one micro-batch.

    Notes
    -----
    Copies are chosen by the tokens solved with and judged on later ones, as a system predicts loads from iterations
    past. Attention's products of the same layer run while weights are gathered.
    """
    routing = sampled_routing(job.request.routing, _LAYERS, _TOKENS)
    owners = job.request.num_ranks
    options = [_priced(*each, owners, calibration, tokens_per_gpu) for each in _ways(job, routing)]
    return tuple(sorted(options, key=lambda each: (each.layer_seconds, each.gathered_bytes)))


def _ways(job: PlacementJob, routing: RoutingData) -> Iterator[tuple[str, PlacementJob, int]]:
    """Yield name, job of one group and copies of every rank."""
    experts, ranks = routing.num_experts, job.request.num_ranks
    per_node = job.cluster.node.num_gpus
    if experts % ranks == 0:
        yield "experts at home", _plain(with_layout(job, ranks, 0, routing)), 0
    for copies in _COPIES:
        # Where the experts do not divide, the first copies only fill the ranks up.
        extra = -experts % ranks + (copies if experts % ranks == 0 else copies - 1) * ranks
        if extra and experts + extra <= experts * ranks:
            yield f"{copies} copied to each rank", _plain(with_layout(job, ranks, extra, routing)), copies
    for size in range(1, ranks):
        fills = ranks % size == 0 and (size % per_node == 0 or per_node % size == 0)
        if fills and experts % size == 0:
            yield f"groups of {size}", _plain(with_layout(job, size, 0, routing)), 0


def _plain(job: PlacementJob) -> PlacementJob:
    """Return the job with balance alone in view: what is copied is chosen anew every iteration."""
    dispatch = "full" if job.request.dispatch == "coherent" else job.request.dispatch
    return replace(
        job, request=replace(job.request, objective="balance", dispatch=dispatch, is_grouping_tokens=False)
    )


def _priced(
    name: str,
    job: PlacementJob,
    copies: int,
    owners: int,
    calibration: DeviceCalibration,
    tokens_per_gpu: int,
) -> TrainingOption:
    request, model = job.request, job.model
    answer = solve_placement(request, certificates=False)
    judge = split_held_out(request.routing, request.held_out_share)[1] or request.routing
    whole = layer_times(
        job,
        answer.placement,
        judge,
        "random",
        tokens_per_gpu,
        calibration,
        dispatch_bytes=COMBINE_BYTES,
    )[0]
    experts = float(whole.experts.mean()) * (1.0 + _BACKWARD)
    exchange = 2.0 * float((whole.dispatch + whole.combine).mean()) if request.num_ranks > 1 else 0.0
    gathered = float(copies)
    if not copies:
        gathered = gathered_experts(request.routing.num_experts, owners, request.num_ranks)
    window = _attention_time(job, calibration, tokens_per_gpu)
    expert_bytes = _ELEMENT_BYTES * model.num_expert_parameters
    gather = gather_time(
        gathered,
        expert_bytes,
        expert_bytes,
        link_rates(job.cluster),
        owners,
        min(job.cluster.node.num_gpus, owners),
        forward_window=window,
        backward_window=_BACKWARD * window,
    )
    return TrainingOption(
        name=name,
        group_size=request.num_ranks,
        copies_per_rank=copies,
        imbalance=(answer.held_out or answer.solved).imbalance,
        experts_seconds=experts,
        exchange_seconds=exchange,
        gather_seconds=gather.forward + gather.backward,
        exposed_seconds=gather.exposed,
        layer_seconds=experts + exchange + gather.exposed,
        gathered_bytes=gathered * expert_bytes,
    )


def _attention_time(job: PlacementJob, calibration: DeviceCalibration, tokens_per_gpu: int) -> float:
    """Return the seconds of the attention's products of one layer, forward."""
    model = job.model
    hidden = float(model.hidden_size)
    weights = model_parameters.qkv_parameters(model) + model_parameters.output_projection_parameters(model)
    m, n, k = (np.array([value]) for value in (float(tokens_per_gpu), weights / hidden, hidden))
    seconds = gemm_time(
        m,
        n,
        k,
        2.0 * (n * k + m * (n + k)),
        replace(calibration.gemm("bf16"), residual=None),
        calibration.clock("bf16"),
    )
    return float(seconds[0])
