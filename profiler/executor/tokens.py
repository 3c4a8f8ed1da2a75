"""Random tokens: the same sequences whatever the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.profiler.executor.context import local_positions
from meshwright.profiler.executor.rank_order import Coordinates
from meshwright.simcore.domain.execution import Execution

__all__ = ["MicroBatches"]


class MicroBatches:
    """The token numbers of a step that one rank works on.

    Parameters
    ----------
    execution : Execution
        Batch, sequence length and seed.
    at : Coordinates
        Where the rank stands.
    device : torch.device
        Where they are needed.

    Notes
    -----
    Micro-batch ``m`` of data parallel rank ``d`` holds the sequences from ``(m dp + d) micro_batch_size`` on.
    """

    def __init__(self, execution: Execution, at: Coordinates, device: torch.device) -> None:
        self._execution, self._at, self._device = execution, at, device
        plan, workload = execution.plan, execution.workload
        positions = local_positions(workload.sequence_length, plan.cp, at.cp, plan.cp_method)
        self.positions = torch.tensor(positions, device=device)
        self._tokens = torch.empty(0)

    def draw(self, step: int) -> None:
        """Draw the sequences of a step, each one token longer for its targets."""
        execution = self._execution
        generator = torch.Generator().manual_seed((execution.seed << 20) + step)
        shape = (execution.workload.global_batch_size, execution.workload.sequence_length + 1)
        tokens = torch.randint(0, execution.model.vocab_size, shape, generator=generator)
        self._tokens = tokens.to(self._device)

    def inputs(self, micro_batch: int) -> Tensor:
        """Return the tokens of a micro-batch, ``(sequence, batch)``."""
        return self._rows(micro_batch)[:, self.positions].t().contiguous()

    def targets(self, micro_batch: int) -> Tensor:
        """Return what they are to predict, ``(sequence, batch)``."""
        return self._rows(micro_batch)[:, self.positions + 1].t().contiguous()

    def _rows(self, micro_batch: int) -> Tensor:
        plan = self._execution.plan
        first = (micro_batch * plan.dp + self._at.dp) * plan.micro_batch_size
        return self._tokens[first : first + plan.micro_batch_size]
