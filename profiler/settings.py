"""What a profile measures, how it measures, and how long it may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["PRECISIONS", "ProfileSettings", "quick_settings"]

PRECISIONS = ("bf16", "fp8", "fp16", "fp32", "tf32")
_POINTS: Mapping[str, int] = {
    "gemm": 300,
    "gemm_dgrad": 100,
    "gemm_wgrad": 100,
    "attention_prefill": 300,
    "attention_backward": 150,
    "attention_decode": 300,
    "mla_prefill": 60,
    "mla_decode": 60,
    "moe": 150,
    "streaming": 8,
    "copies": 12,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    """How a profile is made.

    Parameters
    ----------
    points : Mapping[str, int]
        Shapes by operator; ``streaming`` and ``copies`` are sizes of each such kernel. Products in fp16, fp32
        and tf32 get a third of ``gemm``, gradients in other formats than the main one sixteen shapes at most.
    precisions : tuple[str, ...]
        Number formats to try; those the device lacks become rows with a reason.
    suites : tuple[str, ...]
        Names of suites; empty for all that suit the device.
    with_collectives : bool
        Measure collectives even with one device (several processes on a CPU).
    model : ModelSpec | None
        Adds the exact shapes of this model.
    tensor_parallel : tuple[int, ...]
        Tensor parallel degrees of those shapes.
    max_seconds : float
        Stop cleanly after this long [s]; what is missing is said.
    sustained_seconds : float
        How long the sustained clock is observed [s]; a second at most on a CPU.
    sentinel_interval : float
        Seconds between two rounds of the sentinels [s].
    max_drift : float
        Change of a sentinel that is flagged, as a share.
    num_passes : int | None
        Times each shape is measured, in rounds over all of them with the repeats divided; None for 3 on a CPU,
        whose neighbours come and go, and 1 on a GPU, which has sentinels.
    warm_up, min_repeats, max_repeats : int
        Calls before the first one that counts, and how many count.
    kernel_seconds : float
        Enough time inside one kernel, whatever the spread [s].
    confidence : float
        Width at which the 95 % confidence interval of the median is narrow enough, as a share of it.
    graph_below_seconds : float
        Kernels shorter than this are replayed from a CUDA graph [s].
    compiles_layer : bool
        Measure the transformer layer with ``torch.compile`` too, on a GPU, which takes half a minute.
    max_collective_bytes : float
        Largest message of a collective; 16 MiB at most on a CPU [B].
    seed : int
        Of shapes and order.
    """

    points: Mapping[str, int] = field(default_factory=lambda: dict(_POINTS))
    precisions: tuple[str, ...] = PRECISIONS
    suites: tuple[str, ...] = ()
    with_collectives: bool = False
    model: ModelSpec | None = None
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    max_seconds: float = 300.0
    sustained_seconds: float = 10.0
    sentinel_interval: float = 30.0
    max_drift: float = 0.03
    num_passes: int | None = None
    warm_up: int = 3
    min_repeats: int = 8
    max_repeats: int = 200
    kernel_seconds: float = 0.02
    confidence: float = 0.01
    graph_below_seconds: float = 200e-6
    compiles_layer: bool = True
    max_collective_bytes: float = 2.0**30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.points:
            if name not in _POINTS:
                raise SpecError(f"profile: points: unknown operator '{name}'{did_you_mean(name, _POINTS)}")
        for name in self.precisions:
            if name not in PRECISIONS:
                raise SpecError(
                    f"profile: unknown precision '{name}'{did_you_mean(name, PRECISIONS) or ';'} "
                    f"one of {', '.join(PRECISIONS)}"
                )
        for name in ("max_seconds", "sustained_seconds", "min_repeats", "max_repeats", "kernel_seconds"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise SpecError(f"profile: {name} must be above zero, not {getattr(self, name)}")

    def num_points(self, name: str) -> int:
        """Return how many shapes of an operator to measure; 0 for one that is left out."""
        return self.points.get(name, 0)

    def pass_of(self, num_passes: int) -> ProfileSettings:
        """Return the settings of one of several passes: its share of the repeats."""
        return dataclasses.replace(
            self,
            min_repeats=max(3, -(-self.min_repeats // num_passes)),
            kernel_seconds=self.kernel_seconds / num_passes,
        )


def quick_settings(model: ModelSpec | None = None) -> ProfileSettings:
    """Return settings that end within a minute: a hundred shapes of the large operators in 16 and 8 bits."""
    # Thirty shapes are the least that every operator's roofline can be fitted to.
    points = {name: min(100, max(30, count // 3)) for name, count in _POINTS.items()}
    return ProfileSettings(
        points={**points, "streaming": 5, "copies": 6},
        precisions=("bf16", "fp8"),
        model=model,
        max_seconds=55.0,
        sustained_seconds=3.0,
        kernel_seconds=0.01,
        compiles_layer=False,
    )
