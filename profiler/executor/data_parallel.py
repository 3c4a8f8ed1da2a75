"""Data parallelism without sharding, and with sharded optimizer states: flat buffers, one collective per chunk.

Parameters of a chunk stand in one buffer per kind (dense, tied, experts), ordered by role, and their gradients in
another in single precision, as Megatron-Core's distributed data parallel and distributed optimizer keep them
(``megatron/core/distributed/param_and_grad_buffer.py``). ``none`` all-reduces the gradients and every rank steps;
``zero1`` reduce-scatters them, steps on its shard and gathers the weights. A chunk's collectives begin when its last
gradient is there and run beside what follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.profiler.executor.adamw import Adamw, FlatTensor, StatesAway
from meshwright.profiler.executor.communication import Group, Pending
from meshwright.profiler.executor.mesh import RankMesh
from meshwright.profiler.executor.weights import Role, roles_of

__all__ = ["FlatGradients", "Optimizer", "num_holders", "sum_of_squares"]

# Few enough that single precision loses nothing that counts; a double copy would be read and written for nothing.
_NORM_BLOCK = 2**16


def sum_of_squares(gradients: Iterable[Tensor]) -> Tensor:
    """Return the sum of the squares of single-precision vectors: of blocks as they are, of all in double precision."""
    norms = torch._foreach_norm([block for each in gradients for block in torch.split(each, _NORM_BLOCK)])
    return torch.stack(norms).double().square().sum()


def num_holders(role: Role, mesh: RankMesh) -> int:
    """Return how many tensor parallel ranks hold the same weights."""
    if role.is_copied:
        return mesh.kv.size
    return 1 if role.is_split or role.is_expert else mesh.tp.size


class Optimizer:
    """What both ways of data parallelism offer to a step; this base has nothing to do."""

    def begin_step(self) -> None:
        """Clear the gradients."""

    def before_backward(self, chunk: int, micro_batch: int) -> None:
        """Prepare a backward."""

    def chunk_done(self, chunk: int) -> None:
        """Begin to synchronise a chunk whose last gradient is there."""

    def finish_gradients(self) -> None:
        """Wait until all gradients are synchronised."""

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared gradient norm; the shares of all ranks add up to it."""
        raise NotImplementedError

    def step(self) -> None:
        """Update the weights."""


@dataclass(slots=True)
class _Flat:
    """One kind of parameters of a chunk in one buffer."""

    chunk: int
    kind: str
    group: Group
    weights: Tensor
    gradients: Tensor
    # Gradients that tensor parallel ranks sum, and pieces with their share of the norm.
    sums: list[tuple[Group, slice]]
    pieces: list[tuple[int, int, float]]
    shard: slice = field(default_factory=lambda: slice(None))
    pending: list[Pending] = field(default_factory=list)


class FlatGradients(Optimizer):
    """Gradients all-reduced over the ranks that hold the same weights, or reduce-scattered.

    Parameters
    ----------
    chunks : list[nn.Module]
        Of this rank.
    mesh : RankMesh
        Groups.
    is_sharded : bool
        zero1 rather than none.
    away : StatesAway
        Where the optimizer states rest.
    copies : list[int]
        Which copy of the model each chunk belongs to.
    counts_tied : list[bool]
        Whether a tied table counts for the norm in each chunk: once in the model.
    """

    def __init__(
        self,
        chunks: list[Any],
        mesh: RankMesh,
        *,
        is_sharded: bool,
        away: StatesAway,
        copies: list[int],
        counts_tied: list[bool],
    ) -> None:
        self._mesh, self._is_sharded = mesh, is_sharded
        self._flats: list[_Flat] = []
        for index, chunk in enumerate(chunks):
            for kind, parameters in _kinds(chunk).items():
                weight = 0.0 if copies[index] or (kind == "tied" and not counts_tied[index]) else 1.0
                self._flats.append(self._flat(index, kind, parameters, weight))
        self._optimizer = Adamw(
            [FlatTensor(flat.weights[flat.shard], partial(_shard_gradients, flat)) for flat in self._flats],
            away,
            mesh.dp.recorder,
        )
        self._is_mirrored = mesh.mirror.size > 1

    def begin_step(self) -> None:
        """Clear the gradients."""
        for flat in self._flats:
            flat.gradients.zero_()

    def chunk_done(self, chunk: int) -> None:
        """Begin to reduce what no other stage shares."""
        if self._is_mirrored:
            return
        for flat in self._flats:
            if flat.chunk == chunk and flat.kind != "tied":
                self._begin(flat)

    def finish_gradients(self) -> None:
        """Sum what stages share, reduce it, and wait for everything."""
        tied = [flat for flat in self._flats if flat.kind == "tied"]
        if self._is_mirrored:
            self._sum_mirrored()
        if tied:
            # A V holds both copies on one rank, DualPipe both on the first and on the last stage.
            total = tied[0].gradients
            for other in tied[1:]:
                total.add_(other.gradients)
            if len(tied) == 1 or self._is_mirrored:
                self._mesh.embedding.all_reduce(total)
            for other in tied[1:]:
                other.gradients.copy_(total)
        for flat in self._flats if self._is_mirrored else tied:
            self._begin(flat)
        for flat in self._flats:
            for work in flat.pending:
                work.wait()
            flat.pending.clear()

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared gradient norm."""
        total = torch.zeros((), dtype=torch.float64, device=self._flats[0].gradients.device)
        for flat in self._flats:
            begin, end = _range(flat)
            replicas = 1.0 if self._is_sharded else 1.0 / flat.group.size
            for first, last, weight in flat.pieces:
                low, high = max(first, begin), min(last, end)
                if low < high and weight:
                    total += weight * replicas * sum_of_squares([flat.gradients[low:high]])
        return total

    def step(self) -> None:
        """Update this rank's shard, and gather the weights of the others."""
        self._optimizer.step()
        pending = [
            flat.group.start_all_gather(flat.weights, flat.weights[flat.shard])
            for flat in self._flats
            if self._is_sharded and flat.group.size > 1
        ]
        for work in pending:
            work.wait()

    def _flat(self, chunk: int, kind: str, parameters: list[nn.Parameter], weight: float) -> _Flat:
        group = self._mesh.expert_dp if kind == "expert" else self._mesh.dp
        first = parameters[0]
        size = sum(parameter.numel() for parameter in parameters)
        padded = -(-size // group.size) * group.size if self._is_sharded else size
        weights = torch.zeros(padded, dtype=first.dtype, device=first.device)
        gradients = torch.zeros(padded, dtype=torch.float32, device=first.device)
        pieces: list[tuple[int, int, float]] = []
        begin = 0
        summed: dict[str, list[int]] = {}
        for parameter in parameters:
            role: Role = parameter.role  # type: ignore[attr-defined]
            end = begin + parameter.numel()
            weights[begin:end].copy_(parameter.detach().flatten())
            parameter.data = weights[begin:end].view_as(parameter)
            _collect(parameter, gradients[begin:end].view_as(parameter))
            summed.setdefault(role.summed_over, []).extend((begin, end))
            share = weight / num_holders(role, self._mesh)
            if pieces and pieces[-1][2] == share:
                # Neighbours that count alike are one sum.
                begin = pieces.pop()[0]
            pieces.append((begin, end, share))
            begin = end
        sums = [
            (each, slice(min(ends), max(ends)))
            for each in (self._mesh.tp, self._mesh.kv)
            if (ends := summed.get(each.axis))
        ]
        flat = _Flat(chunk, kind, group, weights, gradients, sums, pieces)
        if self._is_sharded:
            size = padded // group.size
            flat.shard = slice(group.index * size, (group.index + 1) * size)
        return flat

    def _begin(self, flat: _Flat) -> None:
        for group, part in flat.sums:
            group.all_reduce(flat.gradients[part])
        if flat.group.size == 1:
            return
        if self._is_sharded:
            # In place, as Megatron-Core does, and so is the gather.
            flat.pending.append(flat.group.start_reduce_scatter(flat.gradients[flat.shard], flat.gradients))
        else:
            flat.pending.append(flat.group.start_all_reduce(flat.gradients))

    def _sum_mirrored(self) -> None:
        """Sum the gradients of the layers that the mirrored stage holds too, in the order of the virtual stages."""
        last = max(flat.chunk for flat in self._flats)
        is_first_half = self._mesh.mirror.index == 0
        for chunk in (0, last) if is_first_half else (last, 0):
            for flat in self._flats:
                if flat.chunk == chunk and flat.kind != "tied":
                    self._mesh.mirror.all_reduce(flat.gradients)


def _collect(parameter: nn.Parameter, target: Tensor) -> None:
    """Have the gradients of a parameter added up in single precision."""
    parameter.main_gradient = target  # type: ignore[attr-defined]

    def add(each: Tensor) -> None:
        # None where the weight gradient was put off.
        if each.grad is not None:
            target.add_(each.grad)
            each.grad = None

    parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]


def _kinds(chunk: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of a chunk by kind; those whose gradients are summed together stand together."""
    roles = roles_of(chunk)
    kinds: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in chunk.named_parameters():
        role = roles[name]
        kind = "expert" if role.is_expert else "tied" if role.is_tied else "dense"
        kinds.setdefault(kind, []).append((role.summed_over, parameter))
    return {
        kind: [parameter for _, parameter in sorted(found, key=lambda each: each[0])]
        for kind, found in sorted(kinds.items())
    }


def _shard_gradients(flat: _Flat) -> Tensor:
    return flat.gradients[flat.shard]


def _range(flat: _Flat) -> tuple[int, int]:
    begin, end, _ = flat.shard.indices(flat.gradients.numel())
    return begin, end
