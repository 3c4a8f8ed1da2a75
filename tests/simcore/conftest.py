"""Costs of an iteration, from a few numbers; lets the tests of this folder import ``schedule_shapes``.

Pytest's importlib mode adds no folder to the path.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from meshwright.simcore.training import IterationCosts

# The first example of a session compiles the kernels.
settings.register_profile("compiles", deadline=None)
settings.load_profile("compiles")

_SPEC = importlib.util.spec_from_file_location(
    "schedule_shapes", Path(__file__).with_name("schedule_shapes.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules["schedule_shapes"] = _MODULE
_SPEC.loader.exec_module(_MODULE)

MakeCosts = Callable[..., IterationCosts]


def make_iteration_costs(
    num_stages: int,
    num_chunks: int,
    num_micro_batches: int,
    forward: float = 1.0,
    backward: float = 2.0,
    weight: float = 1.0,
    rng: np.random.Generator | None = None,
    **overrides: object,
) -> IterationCosts:
    """Times of a whole stage, spread evenly over its chunks; ``rng`` makes every cost uneven instead."""
    num_virtual = num_stages * num_chunks

    def spread(time: float) -> np.ndarray:
        if rng is None:
            return np.full(num_virtual, time / num_chunks)
        # Multiples of 1/64: sums and differences are exact.
        return rng.integers(1, 64, num_virtual) / 64.0

    zero = np.zeros(num_virtual)
    is_uneven = rng is not None
    weight_time = spread(weight)
    values: dict[str, object] = {
        "num_stages": num_stages,
        "num_chunks": num_chunks,
        "num_micro_batches": num_micro_batches,
        "forward_time": spread(forward),
        "backward_time": spread(backward) + weight_time if is_uneven else spread(backward),
        "weight_gradient_time": weight_time,
        "forward_communication_time": zero,
        "backward_communication_time": zero,
        "send_time": spread(0.0) if is_uneven else zero,
        "is_send_blocking": False,
        "gradient_reduce_time": 4 * spread(0.0) if is_uneven else zero,
        "gradient_reduce_overlap": 0.5 if is_uneven else 0.0,
        "parameter_gather_time": 4 * spread(0.0) if is_uneven else zero,
        "parameter_gather_overlap": 0.25 if is_uneven else 0.0,
        "optimizer_time": rng.integers(0, 64, num_stages) / 64.0 if rng else np.zeros(num_stages),
        "fixed_time": 0.125 if is_uneven else 0.0,
    }
    return IterationCosts(**(values | overrides))  # type: ignore[arg-type]  # names checked by the dataclass


@pytest.fixture(scope="session")
def make_costs() -> MakeCosts:
    return make_iteration_costs
