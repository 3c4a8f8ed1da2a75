"""What is asked of a plan: one training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from meshwright.errors import SpecError, did_you_mean

__all__ = ["MAX_GLOBAL_BATCH_SIZE", "MAX_SEQUENCE_LENGTH", "PRECISIONS", "Precision", "TrainingWorkload"]

Precision = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "fp8_block", "mxfp8", "nvfp4", "int8", "int4_wo"]
# Beyond any published run (16 M tokens per step); larger ones are slips of a finger, and would search for hours.
MAX_GLOBAL_BATCH_SIZE = 1_000_000
MAX_SEQUENCE_LENGTH = 100_000_000
# All tokens on one of a thousand ranks; beyond it lies a slip of a finger.
_MAX_IMBALANCE = 1_000.0
PRECISIONS: tuple[str, ...] = get_args(Precision)


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
    expert_capacity_factor : float | None
        Experts take at most this many times their mean share and drop the rest; None drops nothing.
    lora_rank : int | None
        Fine-tunes low-rank adapters of this rank beside every frozen matrix (Hu et al. 2021, arXiv 2106.09685);
        None trains all weights.
    """

    global_batch_size: int
    sequence_length: int
    precision: Precision = "bf16"
    routing_imbalance: float = 1.0
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

    @property
    def num_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch_size * self.sequence_length
