"""Sharded data parallelism by PyTorch's FSDP2: ZeRO-2, ZeRO-3 and HSDP.

Every layer is a unit, its experts another over the ranks that hold the same experts, and what else a chunk holds (tables,
last norm) the root unit, which is not resharded between forward and backward.

Without a pipeline ZeRO-3 gathers a layer's weights forward and again backward, ZeRO-2 once per step; both reduce the
gradients of every micro-batch, and HSDP sums the shards of its replicas once. With a pipeline the weights of a chunk are
gathered at its first forward and its gradients reduced after its last, as torchtitan does
(``torch.distributed.pipelining``, ``stage.py``), which also lets weight gradients be put off.

Weights that rest on the host travel to the device shard by shard before each gather, and the reduced gradients back, by
FSDP2's own policy: from and to pinned memory, on the streams of its collectives.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from meshwright.profiler.executor.adamw import Adamw, FlatTensor, StatesAway
from meshwright.profiler.executor.communication import Group, gather_single, scatter_single
from meshwright.profiler.executor.data_parallel import Optimizer, num_holders, sum_of_squares
from meshwright.profiler.executor.mesh import RankMesh
from meshwright.profiler.executor.offload import HostCopies
from meshwright.profiler.executor.recording import Recorder
from meshwright.profiler.executor.weights import Role, roles_of
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["ShardedParameters"]

# Shards, and their gradients, are kept in single precision.
_SHARD_BYTES = 4


class _Gather:
    """FSDP's all-gather, counted; ``from_host`` counts the way of the shards to the device as well."""

    def __init__(self, axis: str, recorder: Recorder, *, from_host: bool) -> None:
        self._axis, self._recorder, self._from_host = axis, recorder, from_host

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        """Gather."""
        num_bytes = input_tensor.numel() * input_tensor.element_size()
        self._count_copy("from_host", input_tensor)
        with self._recorder.sending(self._axis, "all_gather", num_bytes, _ranks(group)):
            return gather_single(output_tensor, input_tensor, group, async_op=async_op)

    def _count_copy(self, operation: str, shards: Tensor) -> None:
        """Count a copy of single-precision shards, which FSDP does itself."""
        if self._from_host:
            num_bytes = shards.numel() * _SHARD_BYTES
            with self._recorder.sending("host", operation, num_bytes, "host memory"):
                pass


class _Scatter(_Gather):
    """FSDP's reduce-scatter, counted."""

    def __call__(  # type: ignore[override]
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        """Reduce."""
        num_bytes = input_tensor.numel() * input_tensor.element_size()
        self._count_copy("to_host", output_tensor)
        with self._recorder.sending(self._axis, "reduce_scatter", num_bytes, _ranks(group)):
            return scatter_single(output_tensor, input_tensor, group, async_op=async_op, op=op)


class ShardedParameters(Optimizer):
    """FSDP2 over the chunks of a rank.

    Parameters
    ----------
    chunks : list[Any]
        Of this rank; they become FSDP modules.
    plan : ParallelPlan
        Degrees.
    mesh : RankMesh
        Groups.
    param_dtype : torch.dtype
        Of the gathered weights; shards are kept, and gradients reduced, in single precision.
    counts_tied : list[bool]
        Whether a tied table counts for the norm in each chunk.
    num_micro_batches : int
        Of a step.
    away : StatesAway
        Where the optimizer states rest.
    """

    def __init__(
        self,
        chunks: list[Any],
        plan: ParallelPlan,
        mesh: RankMesh,
        *,
        param_dtype: torch.dtype,
        counts_tied: list[bool],
        num_micro_batches: int,
        away: StatesAway,
    ) -> None:
        self._mesh, self._chunks = mesh, chunks
        self._per_micro_batch = plan.pp == 1
        self._is_on_host = plan.parameter_offload != "none"
        self._copies = HostCopies(mesh.dp.recorder)
        self._gathers_again = self._per_micro_batch and plan.sharding in ("zero3", "hsdp")
        self._last_micro_batch = num_micro_batches - 1
        self._roles: dict[int, tuple[Role, bool]] = {}
        self._parameters: list[Any] = []
        policy = MixedPrecisionPolicy(
            param_dtype=None if param_dtype == torch.float32 else param_dtype, reduce_dtype=torch.float32
        )
        for index, chunk in enumerate(chunks):
            roles = roles_of(chunk)
            chunk.float()
            for layer in chunk.layers:
                if layer.moe is not None:
                    self._shard(layer.moe.experts, mesh.expert_mesh, policy, "expert_dp")
                self._shard(layer, mesh.shard_mesh, policy, "dp")
            self._shard(chunk, mesh.shard_mesh, policy, "dp")
            for name, parameter in chunk.named_parameters():
                self._parameters.append(parameter)
                self._roles[id(parameter)] = roles[name], counts_tied[index]
        self._optimizer = Adamw(
            [
                FlatTensor(
                    each.detach().to_local().view(-1), partial(_local_gradient, each), self._is_on_host
                )
                for each in self._parameters
            ],
            away,
            mesh.dp.recorder,
        )

    def begin_step(self) -> None:
        """Clear the gradients."""
        for parameter in self._parameters:
            parameter.grad = None
        for chunk in self._chunks:
            if not self._per_micro_batch:
                chunk.set_requires_gradient_sync(False)
                chunk.set_reshard_after_backward(False)
                chunk.set_is_last_backward(False)
            if chunk.vocabulary is not None:
                # Its rows are looked up before the forward that would gather them.
                chunk._get_fsdp_state()._lazy_init()
                chunk.unshard()

    def before_backward(self, chunk: int, micro_batch: int) -> None:
        """Set what FSDP does after the backward that follows."""
        if self._per_micro_batch:
            is_last = micro_batch == self._last_micro_batch
            module = self._chunks[chunk]
            module.set_reshard_after_backward(self._gathers_again or is_last)
            module.set_is_last_backward(is_last)

    def chunk_done(self, chunk: int) -> None:
        """Reduce the gradients of a chunk and free its gathered weights."""
        if self._per_micro_batch:
            return
        module = self._chunks[chunk]
        module.set_is_last_backward(True)
        module.set_reshard_after_backward(True)
        module.set_requires_gradient_sync(True)
        state = module._get_fsdp_state()
        for each in state._state_ctx.all_states:
            for group in each._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    # Weight gradients that were put off have come after the backward that widens them.
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()
                group.post_backward()
        state._root_post_backward_final_callback()

    def finish_gradients(self) -> None:
        """Sum what tensor parallel ranks and the first and last stage share."""
        for group in (self._mesh.tp, self._mesh.kv):
            joined = [each for each in self._parameters if self._roles[id(each)][0].summed_over == group.axis]
            self._sum_joined(joined, group)
        self._sum_joined(self._parameters, self._mesh.replica)
        tied = [each for each in self._parameters if self._roles[id(each)][0].is_tied]
        if len(tied) > 1:
            # A V holds both copies on one rank.
            total = tied[0].grad.to_local().add_(tied[1].grad.to_local())
            tied[1].grad.to_local().copy_(total)
        else:
            self._sum_joined(tied, self._mesh.embedding)

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared gradient norm."""
        by_holders: dict[int, list[Tensor]] = {}
        for parameter in self._parameters:
            role, counts = self._roles[id(parameter)]
            if counts or not role.is_tied:
                by_holders.setdefault(num_holders(role, self._mesh), []).append(_local_gradient(parameter))
        total = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        for holders, gradients in by_holders.items():
            total += sum_of_squares(gradients) / (self._mesh.replica.size * holders)
        return total

    def step(self) -> None:
        """Update this rank's shards."""
        self._optimizer.step()

    def _sum_joined(self, parameters: list[Any], group: Group) -> None:
        """Sum the shards of gradients over a group, in one message."""
        if group.size == 1 or not parameters:
            return
        shards = [parameter.grad.to_local() for parameter in parameters]
        joined = torch.cat([shard.flatten() for shard in shards])
        if self._is_on_host:
            # Devices sum; gradients come to them from the host and go back.
            on_device = torch.empty(joined.numel(), device=self._copies.device)
            self._copies.settle(self._copies.to_device(on_device, joined))
            joined = self._copies.to_host(group.all_reduce(on_device))
            self._copies.finish()
        else:
            group.all_reduce(joined)
        sums = torch.split(joined, [shard.numel() for shard in shards])
        for shard, total in zip(shards, sums, strict=True):
            shard.copy_(total.view_as(shard))

    def _shard(self, module: Any, mesh: Any, policy: MixedPrecisionPolicy, axis: str) -> None:
        # By default FSDP reshards all but the root after forward.
        reshards = None if self._gathers_again else False
        recorder, on_host = self._mesh.dp.recorder, self._is_on_host
        rests = CPUOffloadPolicy(pin_memory=recorder.device.type == "cuda") if on_host else OffloadPolicy()
        fully_shard(module, mesh=mesh, reshard_after_forward=reshards, mp_policy=policy, offload_policy=rests)
        assert isinstance(module, FSDPModule)
        module.set_custom_all_gather(_Gather(axis, recorder, from_host=on_host))  # type: ignore[arg-type]  # duck-typed
        module.set_custom_reduce_scatter(_Scatter(axis, recorder, from_host=on_host))  # type: ignore[arg-type]  # duck-typed
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _local_gradient(parameter: Any) -> Tensor:
    gradient: Tensor = parameter.grad.to_local().flatten()
    return gradient


def _ranks(group: Any) -> str:
    return "ranks " + ", ".join(map(str, distributed.get_process_group_ranks(group)[:8]))
