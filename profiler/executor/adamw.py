"""The optimizer of all runs, its states on the device, in host memory or on a drive as far as a plan says.

Gradients of states off the device travel to the host, which updates its single-precision weights, and the weights travel
back (ZeRO-Offload, Ren et al. 2021, arXiv 2101.06840, section 4). States on a drive come through host memory group by
group (ZeRO-Infinity, Rajbhandari et al. 2021, arXiv 2104.07857, section 5.2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from meshwright.profiler.executor.drive import DriveVectors
from meshwright.profiler.executor.expected import DRIVE_GROUP
from meshwright.profiler.executor.offload import HostCopies
from meshwright.profiler.executor.recording import Recorder
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["Adamw", "FlatTensor", "StatesAway"]

# Master weight and two moments, in single precision.
_NUM_STATES, _STATE_BYTES = 3, 4
_LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class StatesAway:
    """Which optimizer states rest off the device.

    Parameters
    ----------
    share : float
        Of each tensor's states, from its first element on, 0 to 1.
    is_on_drive : bool
        On a drive rather than in host memory.
    folder : Path | None
        Where on the drive; None is the folder of temporary files.
    """

    share: float = 0.0
    is_on_drive: bool = False
    folder: Path | None = None

    @classmethod
    def of(cls, plan: ParallelPlan, folder: Path | None) -> StatesAway:
        """Return what a plan says."""
        share = 0.0 if plan.optimizer_offload == "none" else plan.optimizer_offload_fraction
        return cls(share=share, is_on_drive=plan.optimizer_offload == "nvme", folder=folder)


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """Weights of one dimension, where their gradients are when the optimizer steps, and where both rest."""

    weights: Tensor
    gradients: Callable[[], Tensor]
    is_on_host: bool = False


@dataclass(slots=True)
class _Part:
    """A run of weights, and the single-precision copy that is updated: the weights themselves where they are one."""

    source: FlatTensor
    run: slice
    master: nn.Parameter
    is_away: bool

    @property
    def weights(self) -> Tensor:
        return self.source.weights[self.run]


class Adamw:
    """AdamW as Llama 2 was trained (arXiv 2307.09288, section 2.2).

    Its epsilon keeps a gradient that is zero but for rounding from becoming a whole step.

    Parameters
    ----------
    tensors : Sequence[FlatTensor]
        What is updated.
    away : StatesAway
        Where the states rest.
    recorder : Recorder
        Counts the copies.
    """

    def __init__(self, tensors: Sequence[FlatTensor], away: StatesAway, recorder: Recorder) -> None:
        self._recorder, self._copies = recorder, HostCopies(recorder)
        resident: list[_Part] = []
        self._on_drive: list[tuple[_Part, DriveVectors, torch.optim.Optimizer]] = []
        for each in tensors:
            size = each.weights.numel()
            num_away = round(away.share * size)
            if away.is_on_drive:
                self._on_drive += (self._drive_part(each, run, away.folder) for run in _groups(num_away))
            elif num_away:
                resident.append(self._part(each, slice(0, num_away), is_away=True))
            if num_away < size or not size:
                resident.append(self._part(each, slice(num_away, size), is_away=False))
        self._resident = resident
        self._optimizer = _optimizer([part.master for part in resident]) if resident else None

    def step(self) -> None:
        """Update the weights."""
        for part in self._resident:
            part.master.grad = self._gradient(part)
        self._copies.finish()
        if self._optimizer is not None:
            self._optimizer.step()
        for part in self._resident:
            self._return(part)
        for part, vectors, optimizer in self._on_drive:
            self._drive_step(part, vectors, optimizer)

    def _drive_step(self, part: _Part, vectors: DriveVectors, optimizer: torch.optim.Optimizer) -> None:
        num_bytes = _NUM_STATES * _STATE_BYTES * part.master.numel()
        part.master.grad = self._gradient(part)
        self._copies.finish()
        # The pages come as the update reads them.
        with self._recorder.sending("drive", "read", num_bytes, "the drive"):
            optimizer.step()
        self._return(part)
        self._copies.finish()
        part.master.grad = None
        with self._recorder.sending("drive", "write", num_bytes, "the drive"):
            vectors.rest()

    def _gradient(self, part: _Part) -> Tensor:
        """Return the gradient where the states are, or on its way there."""
        gradient = part.source.gradients()[part.run]
        if part.is_away == part.source.is_on_host or not gradient.numel():
            return gradient
        if part.is_away:
            return self._copies.to_host(gradient)
        target = torch.empty_like(part.master)
        self._copies.settle(self._copies.to_device(target, gradient))
        return target

    def _return(self, part: _Part) -> None:
        """Bring updated weights to where weights rest."""
        if not part.master.numel():
            return
        if part.is_away and not part.source.is_on_host:
            self._copies.settle(self._copies.to_device(part.weights, part.master))
        elif part.source.is_on_host and not part.is_away:
            staged = self._copies.to_host(part.master)
            self._copies.finish()
            part.weights.copy_(staged)
        elif part.master.data_ptr() != part.weights.data_ptr():
            part.weights.copy_(part.master.detach())

    def _part(self, source: FlatTensor, run: slice, *, is_away: bool) -> _Part:
        held = source.weights[run].detach()
        if is_away != source.is_on_host:
            size, device = held.numel(), self._copies.device
            there = self._copies.room(size, torch.float32) if is_away else torch.empty(size, device=device)
            held = there.copy_(held)
        return _Part(source, run, nn.Parameter(held.float()), is_away)

    def _drive_part(
        self, source: FlatTensor, run: slice, folder: Path | None
    ) -> tuple[_Part, DriveVectors, torch.optim.Optimizer]:
        vectors = DriveVectors(_NUM_STATES, run.stop - run.start, folder)
        master, mean, square = vectors.vectors
        master.copy_(source.weights[run].detach())
        part = _Part(source, run, nn.Parameter(master), is_away=True)
        optimizer = _optimizer([part.master])
        # What Torch would begin with, in memory, at the first step; the file begins as zeros.
        state = {"step": torch.zeros(()), "exp_avg": mean, "exp_avg_sq": square}
        optimizer.state[part.master] = state
        vectors.rest()
        return part, vectors, optimizer


def _groups(num_parameters: int) -> Iterator[slice]:
    for first in range(0, num_parameters, DRIVE_GROUP):
        yield slice(first, min(first + DRIVE_GROUP, num_parameters))


def _optimizer(masters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        masters,
        lr=_LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=1e-5,
        weight_decay=0.1,
        # One pass over the states, on a CPU too (from Torch 2.4): what the optimizer is priced as.
        fused=True,
    )
