"""Groups of ranks and the collectives over them, each counted.

Bytes are those of the buffer a rank contributes: its shard for an all-gather, the whole for an all-reduce, a reduce and a
reduce-scatter, what it hands over for an all-to-all, a send and, from its root, a broadcast. Groups of one send nothing
and count nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from meshwright.profiler.executor.recording import Recorder

__all__ = ["Group", "Pending", "gather_single", "scatter_single"]


def gather_single(output: Tensor, shard: Tensor, group: Any, *, async_op: bool) -> Any:
    """Gather equal shards into one tensor; Torch 2.13 has renamed the function, and warns of the old name."""
    function = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    return function(output, shard, group=group, async_op=async_op)


def scatter_single(output: Tensor, whole: Tensor, group: Any, *, async_op: bool, op: Any = None) -> Any:
    """Sum tensors and leave each rank its shard."""
    function = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    return function(
        output, whole, op=distributed.ReduceOp.SUM if op is None else op, group=group, async_op=async_op
    )


@dataclass(slots=True)
class Pending:
    """A collective under way, and the tensors that must stay until it has ended."""

    work: Any
    tensors: tuple[Tensor, ...]
    axis: str
    operation: str
    partners: str
    recorder: Recorder

    def wait(self) -> None:
        """Wait for it, which counts as time inside it; on a GPU the stream waits."""
        with self.recorder.waiting(self.axis, self.operation, self.partners):
            self.work.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ranks that share an axis with this one.

    Parameters
    ----------
    axis : str
        Its name in reports.
    ranks : tuple[int, ...]
        Global ranks in the order of the axis.
    index : int
        Where this rank stands among them.
    handle : Any
        The process group; None for a group of one.
    recorder : Recorder
        Counts.
    """

    axis: str
    ranks: tuple[int, ...]
    index: int
    handle: Any
    recorder: Recorder

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def all_reduce(self, tensor: Tensor, *, takes_maximum: bool = False) -> Tensor:
        """Sum (or take the maximum of) a contiguous tensor in place."""
        if self.size > 1:
            op = distributed.ReduceOp.MAX if takes_maximum else distributed.ReduceOp.SUM
            with self._counted("all_reduce", tensor):
                distributed.all_reduce(tensor, op=op, group=self.handle)
        return tensor

    def all_gather(self, shard: Tensor) -> Tensor:
        """Return the shards of all ranks one after the other along dimension 0."""
        if self.size == 1:
            return shard
        shard = shard.contiguous()
        output = shard.new_empty((shard.shape[0] * self.size, *shard.shape[1:]))
        with self._counted("all_gather", shard):
            gather_single(output, shard, self.handle, async_op=False)
        return output

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """Return this rank's share, along dimension 0, of the sum over the ranks."""
        if self.size == 1:
            return whole
        whole = whole.contiguous()
        output = whole.new_empty((whole.shape[0] // self.size, *whole.shape[1:]))
        with self._counted("reduce_scatter", whole):
            scatter_single(output, whole, self.handle, async_op=False)
        return output

    def all_to_all(
        self, tensor: Tensor, sent: Sequence[int] | None = None, received: Sequence[int] | None = None
    ) -> Tensor:
        """Return what the ranks hand to this one; rows by rank as given, or in equal parts."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        rows = tensor.shape[0] if received is None else sum(received)
        output = tensor.new_empty((rows, *tensor.shape[1:]))
        with self._counted("all_to_all", tensor):
            distributed.all_to_all_single(
                output,
                tensor,
                output_split_sizes=None if received is None else list(received),
                input_split_sizes=None if sent is None else list(sent),
                group=self.handle,
            )
        return output

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Begin to sum a tensor in place."""
        with self._counted("all_reduce", tensor):
            work = distributed.all_reduce(tensor, group=self.handle, async_op=True)
        return self._pending("all_reduce", work, tensor)

    def start_reduce(self, tensor: Tensor, root: int) -> Pending:
        """Begin to sum a tensor, in place on the rank that stands at ``root`` in the group; the others' is used up."""
        with self._counted("reduce", tensor):
            work = distributed.reduce(tensor, dst=self.ranks[root], group=self.handle, async_op=True)
        return self._pending("reduce", work, tensor)

    def start_broadcast(self, tensor: Tensor, root: int) -> Pending:
        """Begin to copy the tensor of the rank that stands at ``root`` in the group into those of the others."""
        source = self.ranks[root]
        self.recorder.say(f"broadcast over {self.axis} ({self._partners})")
        is_root = source == self.ranks[self.index]
        with self._counted("broadcast", tensor) if is_root else contextlib.nullcontext():
            work = distributed.broadcast(tensor, src=source, group=self.handle, async_op=True)
        return self._pending("broadcast", work, tensor)

    def start_reduce_scatter(self, output: Tensor, whole: Tensor) -> Pending:
        """Begin to sum a tensor over the ranks into each one's share."""
        with self._counted("reduce_scatter", whole):
            work = scatter_single(output, whole, self.handle, async_op=True)
        return self._pending("reduce_scatter", work, output, whole)

    def start_all_gather(self, output: Tensor, shard: Tensor) -> Pending:
        """Begin to gather shards into one tensor."""
        with self._counted("all_gather", shard):
            work = gather_single(output, shard, self.handle, async_op=True)
        return self._pending("all_gather", work, output, shard)

    def pass_round(self, tensor: Tensor) -> tuple[Tensor, list[Pending]]:
        """Begin to send a tensor to the next rank of a ring; return where the previous one's arrives."""
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        following = self.ranks[(self.index + 1) % self.size]
        previous = self.ranks[self.index - 1]
        operations = [
            distributed.P2POp(distributed.isend, tensor, following, group=self.handle),
            distributed.P2POp(distributed.irecv, received, previous, group=self.handle),
        ]
        with self._counted("send", tensor):
            works = distributed.batch_isend_irecv(operations)
        return received, [self._pending("send", work, tensor, received) for work in works]

    def _counted(self, operation: str, tensor: Tensor) -> Any:
        num_bytes = tensor.numel() * tensor.element_size()
        return self.recorder.sending(self.axis, operation, num_bytes, self._partners)

    def _pending(self, operation: str, work: Any, *tensors: Tensor) -> Pending:
        return Pending(work, tensors, self.axis, operation, self._partners, self.recorder)

    @property
    def _partners(self) -> str:
        return "ranks " + ", ".join(map(str, self.ranks[:8])) + (", ..." if self.size > 8 else "")
