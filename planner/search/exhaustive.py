"""Exhaustive search: every plan is counted, the best by their bounds are kept and simulated exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from meshwright.costmodels.prediction import predict
from meshwright.errors import InfeasiblePlanError
from meshwright.planner.objectives import world_sizes
from meshwright.planner.search.base import Progress, RankedPlan, SearchCut, SearchRequest, SearchResult
from meshwright.planner.search.funnel import BestBounds, Funnel
from meshwright.planner.search.outline import BlockOutline, outlines
from meshwright.planner.search.pareto import pareto_front
from meshwright.planner.search.simulation import SimulatedPlan, Simulation, without_noise
from meshwright.planner.search.state import SearchState, load_state, request_digest, save_state
from meshwright.planner.space import space_blocks
from meshwright.planner.space_block import SpaceBlock
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["ExhaustiveSearch", "by_rank"]

# Plans kept by their bounds, and how many times as many are collected where these do not suffice.
NUM_KEPT = 2_000
_MORE_KEPT = 10
# The state is written after a block, but not more often than this [s].
_SAVE_EVERY = 0.5


class ExhaustiveSearch:
    """Count the whole space, keep the plans with the best closed-form bounds, and simulate those in order.

    Simulation goes on until no plan that is left can be among those asked for. Where the plans kept do not suffice
    for that, because bounds are loose or an export target refuses plans, the next best are collected.

    Deterministic, cut and resumed or not: ties go to the plan with less memory, then to enumeration order.
    """

    name = "exhaustive"

    def run(self, request: SearchRequest, progress: Progress) -> SearchResult:
        """Return the best plans; see :class:`meshwright.planner.search.base.Search`.

        Those of mixed clusters are :class:`meshwright.planner.search.mixed.MixedSearch`'s.

        Raises
        ------
        SpecError
            If the file to resume from belongs to another search.
        InfeasiblePlanError
            If no plan satisfies every constraint.
        """
        if request.context.kinds:
            # It searches each kind of node with this one.
            from meshwright.planner.search.mixed import MixedSearch

            return MixedSearch(self).run(request, progress)
        return _Run(request, progress).result()


class _Run:
    """One search."""

    def __init__(self, request: SearchRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self._started = self._saved = time.monotonic()
        worlds = world_sizes(request.objective, request.context)
        self.blocks: Sequence[SpaceBlock] = list(space_blocks(request.context, request.limits, worlds))
        self.num_plans = sum(len(block) for block in self.blocks)
        self.state, self._digest = SearchState(), ""
        if request.resume is not None:
            self._digest = request_digest(request, self.num_plans)
            self.state = load_state(request.resume, self._digest) or self.state
        best = BestBounds(NUM_KEPT)
        best.add(self.state.kept)
        self._funnel = Funnel(request, best)
        # Lower bound of the objective of every plan that was not scored, or scored and not kept.
        self._least_left = np.inf

    def result(self) -> SearchResult:
        """Search, and return what was found."""
        try:
            outline = self._outline()
            self._score(outline)
            simulation = self._simulate(outline)
        finally:
            self._save()
        return self._ranked(simulation)

    def _is_over(self) -> bool:
        """Return whether time is up."""
        limit = self.request.max_seconds
        return limit is not None and time.monotonic() - self._started >= limit

    def _outline(self) -> list[BlockOutline]:
        """Return the outlines of all blocks, most promising first."""
        request = self.request
        found, num_plans = [], 0
        for outline in outlines(request.context, self.blocks, request.limits, request.objective):
            found.append(outline)
            num_plans += len(outline.block)
            self.progress("outlining the space", num_plans, self.num_plans)
        return sorted(found, key=lambda outline: (outline.least, outline.number))

    def _score(self, outline: Sequence[BlockOutline]) -> None:
        """Count the plans of every block and keep those with the best bounds."""
        state = self.state
        for each in outline:
            if each.number in state.done:
                continue
            if self._is_over() and state.num_feasible:
                self._least_left = each.least
                break
            # A block counts as a whole or not at all, so that the state may be written at any time.
            rejections = dict(state.rejections)
            num_feasible = self._funnel.pour(each, rejections)
            state.rejections = rejections
            state.num_feasible += num_feasible
            state.num_candidates += len(each.block)
            state.done.add(each.number)
            self.progress("scoring plans", state.num_candidates, self.num_plans)
            if time.monotonic() - self._saved > _SAVE_EVERY:
                self._save()
        state.kept = self._funnel.kept()
        if not len(state.kept):
            raise InfeasiblePlanError("no plan satisfies every constraint", state.rejections)

    def _simulate(self, outline: Sequence[BlockOutline]) -> Simulation:
        """Simulate the plans kept, and collect the next best while these do not settle who wins."""
        request, state, kept = self.request, self.state, self.state.kept
        simulation = Simulation(request, self.blocks, dict(state.rejections), state.known, state.relaxed)
        num_kept = NUM_KEPT
        while True:
            simulation.run(kept, self._is_over, self._told)
            if len(kept) < num_kept:
                # Every plan was kept, but for those beyond what can still be among the best.
                break
            last = int(np.lexsort((kept.row, kept.block, kept.value))[-1])
            place = float(kept.value[last]), int(kept.block[last]), int(kept.row[last])
            worst = simulation.best(request.num_plans)
            if place[0] >= worst or self._is_over() or simulation.is_exhausted:
                self._least_left = min(self._least_left, place[0])
                break
            num_kept = NUM_KEPT * _MORE_KEPT
            behind = Funnel(request, BestBounds(num_kept, above=place, at_most=worst))
            for each in outline:
                if each.number in state.done and each.least <= worst:
                    behind.pour(each, {})
            self._least_left = min(self._least_left, worst)
            kept = behind.kept()
            if not len(kept):
                break
        self._least_left = min(self._least_left, simulation.least_left)
        return simulation

    def _told(self, done: int, wanted: int) -> None:
        self.progress("simulating schedules", done, wanted)
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self._save()

    def _save(self) -> None:
        if self.request.resume is not None:
            self.state.kept = self._funnel.kept()
            save_state(self.request.resume, self._digest, self.state)
            self._saved = time.monotonic()

    def _ranked(self, simulation: Simulation) -> SearchResult:
        if not simulation.simulated:
            raise InfeasiblePlanError("no plan satisfies every constraint", simulation.rejections)
        state, found = self.state, by_rank(simulation.simulated)
        winner = found[0]
        others = (entry for entry in found if _degrees(entry.plan) != _degrees(winner.plan))
        rival = next(others, None)
        num_unscored = self.num_plans - state.num_candidates
        cut = None
        if num_unscored or (self._is_over() and not simulation.is_settled):
            gap = max(0.0, 1.0 - float(self._least_left) / winner.value)
            cut = SearchCut(num_unscored=num_unscored, gap=gap)
        front = [found[index] for index in pareto_front(found)] if self.request.wants_front else []
        return SearchResult(
            ranked=tuple(self._entry(entry) for entry in found[: self.request.num_plans]),
            rival=None if rival is None else self._entry(rival),
            num_candidates=state.num_candidates,
            num_feasible=state.num_feasible - simulation.num_refused,
            num_simulated=len(found),
            rejections=simulation.rejections,
            is_certified=bool(winner.value <= self._least_left),
            least_left=float(self._least_left),
            notes=() if cut is None else (self._note(cut),),
            cut=cut,
            front=tuple(self._entry(entry) for entry in front),
        )

    def _note(self, cut: SearchCut) -> str:
        resume = self.request.resume
        more = "" if resume is None else f"; the same command continues from {resume}"
        return (
            f"Cut after {self.request.max_seconds:g} s: {cut.num_unscored:,} of {self.num_plans:,} plans were not "
            f"scored, and one that was not simulated may be up to {cut.gap:.2%} better than the winner{more}."
        )

    def _entry(self, entry: SimulatedPlan) -> RankedPlan:
        prediction = predict(self.request.context, entry.plan, self.request.flops)
        return RankedPlan(plan=entry.plan, prediction=prediction, bound=entry.bound)


def by_rank(simulated: Sequence[SimulatedPlan]) -> list[SimulatedPlan]:
    """Return plans best first: by the objective, then by memory, then in the order of the space."""
    values = without_noise(np.array([entry.value for entry in simulated]))
    order = sorted(
        range(len(simulated)),
        key=lambda index: (
            values[index],
            simulated[index].memory,
            simulated[index].block,
            simulated[index].row,
        ),
    )
    return [simulated[index] for index in order]


def _degrees(plan: ParallelPlan) -> tuple[int, int, int]:
    return plan.tp, plan.pp, plan.dp
