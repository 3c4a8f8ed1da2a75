"""The ranks of a plan as device meshes, in Megatron's order: tp fastest, then cp, dp, pp slowest.

Experts fold over ``tp x cp x dp``: etp fastest, then ep, then the ranks that hold the same experts (Megatron-Core,
``megatron/core/parallel_state.py``, order ``tp-cp-ep-dp-pp``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from meshwright.profiler.executor.communication import Group
from meshwright.profiler.executor.rank_order import Coordinates, coordinates
from meshwright.profiler.executor.recording import Recorder
from meshwright.profiler.executor.vocabulary_order import KINDS_OVER_STAGES
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["RankMesh", "build_mesh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMesh:
    """The groups of one rank.

    Parameters
    ----------
    at : Coordinates
        Where it stands.
    tp, cp, ep, etp : Group
        Tensor, context and expert parallel ranks, and those that split each expert.
    kv : Group
        Tensor parallel ranks that hold copies of the same key/value head; of one rank where each holds its own.
    dp : Group
        Ranks that hold the same dense weights: ``dp x cp``.
    expert_dp : Group
        Ranks that hold the same experts.
    replica : Group
        Ranks that hold the same shard (HSDP).
    embedding : Group
        First and last stage, which both hold a tied embedding; of one rank elsewhere.
    mirror : Group
        Stages ``s`` and ``pp - 1 - s``, which hold the same layers under DualPipe; of one rank elsewhere.
    vocabulary_stages, vocabulary_slices : Group
        The stages of a pipeline, each with a slice of the vocabulary, and all their ranks that do, tensor parallel
        ones included; of one rank where the vocabulary is not split over stages.
    world : Group
        All.
    shard_mesh, expert_mesh : DeviceMesh
        What FSDP shards dense weights and experts over.
    stages : tuple[int, ...]
        Global ranks of this rank's pipeline.
    channels : dict[tuple[int, int], Any]
        Process group of the messages from one stage to another, by stages.
    """

    at: Coordinates
    tp: Group
    cp: Group
    ep: Group
    etp: Group
    kv: Group
    dp: Group
    expert_dp: Group
    replica: Group
    embedding: Group
    mirror: Group
    vocabulary_stages: Group
    vocabulary_slices: Group
    world: Group
    shard_mesh: DeviceMesh
    expert_mesh: DeviceMesh
    stages: tuple[int, ...]
    channels: dict[tuple[int, int], Any]
    handles: tuple[Any, ...]

    def destroy(self) -> None:
        """Give up the process groups but the world's, which is the caller's; those that are gone are no error."""
        world = distributed.group.WORLD
        if world is None:
            return
        # By name: an axis as long as the world is the world's own group, which torch may hand out as another object.
        for name, handle in {each.group_name: each for each in self.handles}.items():
            if name != world.group_name:
                # What torch says to a group that is gone.
                with contextlib.suppress(ValueError):
                    distributed.destroy_process_group(handle)


def build_mesh(
    plan: ParallelPlan, edges: Sequence[tuple[int, int]], recorder: Recorder, num_copies: int = 1
) -> RankMesh:
    """Return the groups of this rank; every rank of the run calls this.

    Parameters
    ----------
    plan : ParallelPlan
        Degrees.
    edges : Sequence[tuple[int, int]]
        Pairs of stages of which the first sends to the second.
    recorder : Recorder
        Counts what the groups send.
    num_copies : int
        Neighbouring tensor parallel ranks that share a key/value head.
    """
    rank, device = distributed.get_rank(), recorder.device.type
    at = coordinates(plan, rank)
    handles: list[Any] = []
    ranks = torch.arange(plan.num_gpus)
    dense = DeviceMesh(
        device, ranks.view(plan.pp, plan.dp, plan.cp, plan.tp), mesh_dim_names=("pp", "dp", "cp", "tp")
    )
    expert = DeviceMesh(
        device,
        ranks.view(plan.pp, -1, plan.ep, plan.etp),
        mesh_dim_names=("pp", "expert_dp", "ep", "etp"),
    )
    shards = (plan.sharding_group or plan.dp) * plan.cp
    sync = DeviceMesh(
        device, ranks.view(plan.pp, -1, shards, plan.tp), mesh_dim_names=("pp", "replica", "shard", "tp")
    )
    for mesh in (dense, expert, sync):
        handles += [mesh.get_group(name) for name in mesh.mesh_dim_names or ()]

    def group(axis: str, handle: Any) -> Group:
        members = tuple(distributed.get_process_group_ranks(handle))
        return Group(axis=axis, ranks=members, index=members.index(rank), handle=handle, recorder=recorder)

    def of_lists(axis: str, lists: list[list[int]]) -> Group:
        """Return the group of those listed that this rank is in; every rank makes all of them."""
        mine = Group(axis=axis, ranks=(rank,), index=0, handle=None, recorder=recorder)
        for members in lists:
            if len(members) > 1:
                handle = distributed.new_group(members)
                if rank in members:
                    handles.append(handle)
                    mine = Group(
                        axis=axis,
                        ranks=tuple(members),
                        index=members.index(rank),
                        handle=handle,
                        recorder=recorder,
                    )
        return mine

    stride = plan.tp * plan.cp * plan.dp
    pipelines = [[first + stage * stride for stage in range(plan.pp)] for first in range(stride)]
    replicas = [
        [(pp * plan.dp * plan.cp + each) * plan.tp + tp for each in range(plan.dp * plan.cp)]
        for pp in range(plan.pp)
        for tp in range(plan.tp)
    ]
    is_mirrored = plan.schedule == "dualpipe"
    is_vocabulary_split = plan.vocab_parallel in KINDS_OVER_STAGES
    slices = [
        [rank for line in pipelines[first : first + plan.tp] for rank in line]
        for first in range(0, stride, plan.tp)
    ]
    by_stages = of_lists("vocab", pipelines if is_vocabulary_split else [])
    channels: dict[tuple[int, int], Any] = {}
    for sender, receiver in edges:
        for pipeline in pipelines:
            if device == "cpu":
                # gloo tells messages apart by their tags; NCCL has none, and orders those of a communicator.
                channels[sender, receiver] = None
                continue
            handle = distributed.new_group([pipeline[sender], pipeline[receiver]])
            if rank in (pipeline[sender], pipeline[receiver]):
                channels[sender, receiver] = handle
                handles.append(handle)
    line_here = pipelines[rank % stride]
    _greet(line_here, at.pp, edges, channels, recorder)
    mirrors = [[line[stage], line[-1 - stage]] for line in pipelines for stage in range(plan.pp // 2)]
    return RankMesh(
        at=at,
        tp=group("tp", dense.get_group("tp")),
        cp=group("cp", dense.get_group("cp")),
        ep=group("ep", expert.get_group("ep")),
        etp=group("etp", expert.get_group("etp")),
        kv=of_lists("kv", _runs(plan.num_gpus, num_copies)),
        dp=of_lists("dp", replicas),
        expert_dp=group("expert_dp", expert.get_group("expert_dp")),
        embedding=of_lists("embedding", [[line[0], line[-1]] for line in pipelines] if plan.pp > 1 else []),
        mirror=of_lists("mirror", mirrors if is_mirrored else []),
        vocabulary_stages=by_stages,
        # One communicator where they are the same ranks: NCCL's would wait for each other.
        vocabulary_slices=(of_lists("vocab", slices) if is_vocabulary_split and plan.tp > 1 else by_stages),
        world=Group(
            axis="world", ranks=tuple(range(plan.num_gpus)), index=rank, handle=None, recorder=recorder
        ),
        replica=group("replica", sync.get_group("replica")),
        shard_mesh=sync["shard"],
        expert_mesh=expert["expert_dp"],
        stages=tuple(line_here),
        channels=channels,
        handles=tuple(handles),
    )


def _runs(num_ranks: int, length: int) -> list[list[int]]:
    """Return runs of neighbouring ranks."""
    return [list(range(first, first + length)) for first in range(0, num_ranks, length)]


def _greet(
    line: Sequence[int],
    stage: int,
    edges: Sequence[tuple[int, int]],
    channels: dict[tuple[int, int], Any],
    recorder: Recorder,
) -> None:
    """Send one number over every channel, in the same order on all ranks.

    NCCL forms a communicator at its first message and waits for the other end; in the middle of a schedule the other
    end may be waiting for this one.
    """
    number = torch.zeros(1, device=recorder.device)
    for sender, receiver in edges:
        if stage == sender:
            distributed.send(number, dst=line[receiver], group=channels[sender, receiver])
        elif stage == receiver:
            distributed.recv(number, src=line[sender], group=channels[sender, receiver])
