"""Paths through a 1F1B schedule whose lengths bound the iteration time from below.

Every path starts and ends with the first stage: its gather, a micro-batch on its way to a stage, what that stage
runs in between, the way back, the first stage's reduction and optimizer. A stage warms up with as many forwards as
there are stages behind it, then alternates, then drains; waiting for the first backward, or for the last, is a trip
to the end of the pipeline and back in place of the operations that lie before or behind it in the stage's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.search.stage_problem import BACKWARD, FORWARD, REDUCE, stage_weights
from meshwright.simcore.training.costs import IterationCosts

__all__ = ["PipelinePaths", "StagePath"]

FloatArray = NDArray[np.float64]


class StagePath(NamedTuple):
    """One path through a stage.

    Parameters
    ----------
    weights : FloatArray
        What the costs of the stage itself count, shape ``(5,)``.
    trips : int
        How often the path goes from the stage to the end of the pipeline and back.
    constant : float
        Sends on the way and those that hold the stage, and the iteration's fixed time [s].
    """

    weights: FloatArray
    trips: int
    constant: float


class PipelinePaths:
    """The paths of one pipeline.

    Parameters
    ----------
    costs : IterationCosts
        Micro-batches, sends, overlaps and fixed time; the durations of its stages do not matter.
    """

    def __init__(self, costs: IterationCosts) -> None:
        batches = float(costs.num_micro_batches)
        self.weights = stage_weights(batches, costs.gradient_reduce_overlap, costs.parameter_gather_overlap)
        # The first stage on a path through another one: one micro-batch, and its synchronisation.
        self.once_weights = self.weights.copy()
        self.once_weights[[FORWARD, BACKWARD]] = 1.0
        # The other stages on the way: one micro-batch.
        self.way_weights = np.where(np.arange(len(self.weights)) < REDUCE, 1.0, 0.0)
        self.stages = [self._stage_paths(costs, stage) for stage in range(costs.num_stages)]

    def bound(self, own: Sequence[Sequence[float]], once: float, way: FloatArray) -> float:
        """Return the length of the longest path.

        Parameters
        ----------
        own : Sequence[Sequence[float]]
            Per stage and path, the weighted cost of the stage [s].
        once : float
            Cost of the first stage by ``once_weights`` [s].
        way : FloatArray
            Cost of each stage by ``way_weights``, shape ``(num_stages,)`` [s].
        """
        return max(
            value + self.others(stage, path, once, way)
            for stage, values in enumerate(own)
            for value, path in zip(values, self.stages[stage], strict=True)
        )

    def longest(self, own: Sequence[Sequence[float]], once: float, way: FloatArray) -> tuple[int, int]:
        """Return stage and number of the longest path; arguments as for :meth:`bound`."""
        lengths = {
            (stage, number): value + self.others(stage, path, once, way)
            for stage, values in enumerate(own)
            for number, (value, path) in enumerate(zip(values, self.stages[stage], strict=True))
        }
        return max(lengths, key=lambda key: lengths[key])

    def others(self, stage: int, path: StagePath, once: float, way: FloatArray) -> float:
        """Return what a path counts besides its own stage [s]."""
        before = once + float(way[1:stage].sum()) if stage else 0.0
        trips = path.trips * float(way[stage + 1 :].sum()) if path.trips else 0.0
        return path.constant + before + trips

    def _stage_paths(self, costs: IterationCosts, stage: int) -> list[StagePath]:
        batches, behind = costs.num_micro_batches, costs.num_stages - 1 - stage
        # Forwards and backwards between the first backward and the last forward, beyond one each.
        steady = max(0, batches - behind - 1)
        send = costs.send_time
        onward = float(send[stage]) if costs.is_send_blocking else 0.0
        back = float(send[stage - 1]) if costs.is_send_blocking and stage else 0.0
        way, trip = 2.0 * float(send[:stage].sum()), 2.0 * float(send[stage:].sum())

        def path(forwards: int, backwards: int, trips: int, sends: float) -> StagePath:
            weights = self.weights.copy() if stage == 0 else np.zeros_like(self.weights)
            weights[FORWARD], weights[BACKWARD] = forwards, backwards
            return StagePath(weights, trips, way + trips * trip + sends + costs.fixed_time)

        paths = [path(batches, batches, 0, batches * onward + (batches - 1) * back)]
        if stage == 0:
            paths[0] = paths[0]._replace(constant=batches * onward + costs.fixed_time)
        if behind:
            paths.append(path(1 + steady, batches, 1, steady * onward + (batches - 1) * back))
            paths.append(path(batches, 1 + steady, 1, (batches - 1) * onward + steady * back))
        if behind and steady:
            both = batches - behind
            paths.append(path(both, both, 2, (both - 2) * onward + (both - 1) * back))
        return paths
