"""What is asked of a plan: one training step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from meshwright.errors import SpecError, did_you_mean

__all__ = [
    "MAX_GLOBAL_BATCH_SIZE",
    "MAX_SEQUENCE_LENGTH",
    "PRECISIONS",
    "ExpertRouting",
    "Precision",
    "TrainingWorkload",
]

Precision = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "fp8_block", "mxfp8", "nvfp4", "int8", "int4_wo"]
# Beyond any published run (16 M tokens per step); larger ones are slips of a finger, and would search for hours.
MAX_GLOBAL_BATCH_SIZE = 1_000_000
MAX_SEQUENCE_LENGTH = 100_000_000
# All tokens on one of a thousand ranks; beyond it lies a slip of a finger.
_MAX_IMBALANCE = 1_000.0
PRECISIONS: tuple[str, ...] = get_args(Precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRouting:
    """What routing comes to on one number of expert parallel ranks.

    Parameters
    ----------
    ep : int
        Expert parallel ranks, at least 2.
    imbalance : float
        Tokens of the most loaded rank over the mean, 1 to ep.
    remote_nodes_per_token : float | None
        Nodes other than its own that a token reaches where the ranks fill nodes in order; None where unknown.
    capacity_factor : float | None
        On this ep experts take at most this many times their mean share and drop the rest; None drops nothing.
    """

    ep: int
    imbalance: float
    remote_nodes_per_token: float | None = None
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if self.ep < 2:
            raise SpecError(f"workload.routing_by_ep: ep must be at least 2, not {self.ep}")
        if not 1.0 <= self.imbalance <= self.ep:
            raise SpecError(
                f"workload.routing_by_ep: the imbalance of ep {self.ep} is the most loaded rank over the mean: 1 to "
                f"{self.ep}, not {self.imbalance:g}"
            )
        remote = self.remote_nodes_per_token
        if remote is not None and not 0.0 <= remote < self.ep:
            raise SpecError(
                f"workload.routing_by_ep: the remote nodes per token of ep {self.ep} are 0 to below {self.ep}, not "
                f"{remote:g}"
            )
        capacity = self.capacity_factor
        if capacity is not None and not 0.0 < capacity <= _MAX_IMBALANCE:
            raise SpecError(
                f"workload.routing_by_ep: the capacity factor of ep {self.ep} must lie above 0 and up to "
                f"{_MAX_IMBALANCE:g}, not {capacity:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingWorkload:
    """One optimizer step.

    Parameters
    ----------
    global_batch_size : int
        Sequences per optimizer step over the whole cluster.
    sequence_length : int
        Tokens of one sequence.
    precision : Precision
        Number format of the matrix multiplications; weights and activations stay 16-bit.
    routing_imbalance : float
        Tokens of the most loaded expert parallel rank over the mean, at least 1 (mixture-of-experts models).
    routing_by_ep : tuple[ExpertRouting, ...]
        In its place, what routing comes to on each number of expert parallel ranks, ascending; empty when unknown.
    expert_capacity_factor : float | None
        Experts take at most this many times their mean share and drop the rest, whatever ep; None leaves it to
        ``routing_by_ep``.
    lora_rank : int | None
        Fine-tunes low-rank adapters of this rank beside every frozen matrix (Hu et al. 2021, arXiv 2106.09685);
        None trains all weights.
    """

    global_batch_size: int
    sequence_length: int
    precision: Precision = "bf16"
    routing_imbalance: float = 1.0
    routing_by_ep: tuple[ExpertRouting, ...] = ()
    expert_capacity_factor: float | None = None
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        for field, largest in (
            ("global_batch_size", MAX_GLOBAL_BATCH_SIZE),
            ("sequence_length", MAX_SEQUENCE_LENGTH),
        ):
            value = getattr(self, field)
            if value < 1:
                raise SpecError(f"workload.{field} must be at least 1, not {value}")
            if value > largest:
                raise SpecError(f"workload.{field} must be at most {largest}, not {value}")
        if self.precision not in PRECISIONS:
            raise SpecError(
                f"workload.precision: unknown precision '{self.precision}'"
                f"{did_you_mean(self.precision, PRECISIONS) or '.'} Known: {', '.join(PRECISIONS)}."
            )

        if not 1.0 <= self.routing_imbalance <= _MAX_IMBALANCE:
            raise SpecError(
                f"workload.routing_imbalance is the most loaded rank over the mean: 1 to {_MAX_IMBALANCE:g}, "
                f"not {self.routing_imbalance:g}"
            )
        if self.routing_by_ep and self.routing_imbalance != 1.0:
            raise SpecError("workload: give routing_imbalance or routing_by_ep, not both")
        if any(second.ep <= first.ep for first, second in pairwise(self.routing_by_ep)):
            raise SpecError("workload.routing_by_ep: list every ep once, in ascending order")
        if (
            self.expert_capacity_factor is not None
            and not 0.0 < self.expert_capacity_factor <= _MAX_IMBALANCE
        ):
            raise SpecError(
                f"workload.expert_capacity_factor must lie above 0 and up to {_MAX_IMBALANCE:g}, "
                f"not {self.expert_capacity_factor:g}"
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise SpecError(f"workload.lora_rank must be at least 1, not {self.lora_rank}")

    def imbalance_at(self, ep: int) -> float:
        """Return the tokens of the most loaded of ``ep`` expert parallel ranks over the mean.

        Of an ep that ``routing_by_ep`` leaves out, the value of the next larger one (of the largest, past that):
        fewer ranks hold more experts each, which even out better.
        """
        stated = self.routing_imbalance
        if self.routing_by_ep:
            at = next((each for each in self.routing_by_ep if each.ep >= ep), self.routing_by_ep[-1])
            stated = at.imbalance
        return min(stated, float(ep))

    def remote_nodes_at(self, ep: int) -> float | None:
        """Return the nodes other than its own that a token reaches with ``ep`` ranks; None where unknown."""
        return next((each.remote_nodes_per_token for each in self.routing_by_ep if each.ep == ep), None)

    def capacity_at(self, ep: int) -> float | None:
        """Return the capacity factor of the experts with ``ep`` ranks; None where nothing is dropped."""
        if self.expert_capacity_factor is not None:
            return self.expert_capacity_factor
        return next((each.capacity_factor for each in self.routing_by_ep if each.ep == ep), None)

    @property
    def num_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch_size * self.sequence_length
