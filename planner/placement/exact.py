"""Exact placements of small instances by integer programming: PuLP with HiGHS, or CBC where HiGHS is missing.

PuLP calls a solution that a time limit cut short "Optimal". Here an answer is proven only when the solver's own bound
meets the value recomputed from the placement; otherwise bound and value are handed back as they are.
"""

from __future__ import annotations

import importlib
import math
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = ["ExactAnswer", "exact_balance", "exact_chain", "exact_replicated_balance"]

_PRECISION = 1e-6
_MAX_VARIABLES = 60_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactAnswer:
    """A placement by integer programming.

    Parameters
    ----------
    slots : NDArray[np.int64]
        Expert of each slot, ``(num_layers, num_slots)``.
    value : float
        Recomputed from the placement.
    is_proven : bool
        Whether the solver closed its gap before the time limit.
    solver : str
        Which one ran.
    """

    slots: NDArray[np.int64]
    value: float
    is_proven: bool
    solver: str


def exact_balance(
    loads: NDArray[np.float64], num_ranks: int, *, solver: str = "auto", time_limit: float = 20.0
) -> ExactAnswer:
    """Return the placement of one layer without copies whose heaviest rank is lightest.

    Parameters
    ----------
    loads : NDArray[np.float64]
        Load of each expert, ``(num_experts,)``.
    num_ranks : int
        Ranks; divides the experts.
    solver : str
        ``highs``, ``cbc`` or ``auto``.
    time_limit : float
        Of the solver [s].
    """
    import pulp  # type: ignore[import-untyped]

    num_experts = len(loads)
    problem = pulp.LpProblem("balance", pulp.LpMinimize)
    x = [
        [problem.add_variable(f"x_{e}_{g}", cat="Binary") for g in range(num_ranks)]
        for e in range(num_experts)
    ]
    z = problem.add_variable("z", lowBound=float(loads.sum()) / num_ranks)
    problem += z
    for e in range(num_experts):
        problem += pulp.lpSum(x[e]) == 1
    for g in range(num_ranks):
        problem += pulp.lpSum(x[e][g] for e in range(num_experts)) == num_experts // num_ranks
        problem += pulp.lpSum(float(loads[e]) * x[e][g] for e in range(num_experts)) <= z
    name, is_proven = _solve(problem, solver, time_limit)
    rank = np.asarray([int(np.argmax([var.value() or 0.0 for var in row])) for row in x])
    heaviest = float(np.bincount(rank, weights=loads, minlength=num_ranks).max())
    return ExactAnswer(
        slots=np.argsort(rank, kind="stable")[None], value=heaviest, is_proven=is_proven, solver=name
    )


def exact_replicated_balance(
    loads: NDArray[np.float64],
    num_slots: int,
    num_ranks: int,
    *,
    solver: str = "auto",
    time_limit: float = 20.0,
) -> ExactAnswer:
    """Return the placement of one layer with copies whose heaviest rank is lightest, copies sharing evenly.

    One binary per expert and number of copies makes the even share linear. A rank may hold several copies of an
    expert, as EPLB's may: it then serves as many shares.
    """
    import pulp

    num_experts = len(loads)
    most = num_slots - num_experts + 1
    room = num_slots // num_ranks
    problem = pulp.LpProblem("replicated", pulp.LpMinimize)
    z = problem.add_variable("z", lowBound=float(loads.sum()) / num_ranks)
    problem += z
    copies = range(1, most + 1)
    u = [[problem.add_variable(f"u_{e}_{n}", cat="Binary") for n in copies] for e in range(num_experts)]
    y = [
        [
            [problem.add_variable(f"y_{e}_{n}_{g}", 0, min(n, room), cat="Integer") for g in range(num_ranks)]
            for n in copies
        ]
        for e in range(num_experts)
    ]
    for e in range(num_experts):
        problem += pulp.lpSum(u[e]) == 1
        for n in copies:
            problem += pulp.lpSum(y[e][n - 1]) == n * u[e][n - 1]
    for g in range(num_ranks):
        held = [(e, n) for e in range(num_experts) for n in copies]
        problem += pulp.lpSum(y[e][n - 1][g] for e, n in held) == room
        problem += pulp.lpSum(float(loads[e]) / n * y[e][n - 1][g] for e, n in held) <= z
    name, is_proven = _solve(problem, solver, time_limit)
    rows: list[list[int]] = [[] for _ in range(num_ranks)]
    for e in range(num_experts):
        for n in copies:
            for g in range(num_ranks):
                rows[g] += [e] * round(y[e][n - 1][g].value() or 0.0)
    slots = np.asarray([expert for row in rows for expert in row])
    counts = np.bincount(slots, minlength=num_experts)
    value = float((loads / np.maximum(counts, 1))[slots].reshape(num_ranks, -1).sum(axis=1).max())
    return ExactAnswer(slots=slots[None], value=value, is_proven=is_proven, solver=name)


def exact_chain(
    transitions: NDArray[np.float64], num_ranks: int, *, solver: str = "auto", time_limit: float = 20.0
) -> ExactAnswer:
    """Return the placement of all layers that keeps most transitions on ranks.

    The two-sided product form (Sherali and Adams' RLT): with y = x x', ``sum_f y[e, f, g] = S x[e, g]`` and
    ``sum_e y[e, f, g] = S x'[f, g]``. One-sided products, as in ExFlow's formulation, leave a bound so weak that 8
    experts in 8 layers do not close in 20 s; this form closes them in a few.

    Raises
    ------
    SpecError
        If the instance has more products than a solver can hold.
    """
    import pulp

    num_layers, num_experts = len(transitions) + 1, transitions.shape[1]
    room = num_experts // num_ranks
    if (num_layers - 1) * num_experts * num_experts * num_ranks > _MAX_VARIABLES:
        raise SpecError(
            f"the exact chain of {num_layers} layers, {num_experts} experts and {num_ranks} ranks has more than "
            f"{_MAX_VARIABLES:,} products; use --solver heuristic"
        )
    problem = pulp.LpProblem("chain", pulp.LpMaximize)
    x = [
        [
            [problem.add_variable(f"x_{layer}_{e}_{g}", cat="Binary") for g in range(num_ranks)]
            for e in range(num_experts)
        ]
        for layer in range(num_layers)
    ]
    objective = []
    for layer in range(num_layers):
        for e in range(num_experts):
            problem += pulp.lpSum(x[layer][e]) == 1
        for g in range(num_ranks):
            problem += pulp.lpSum(x[layer][e][g] for e in range(num_experts)) == room
    # Names of ranks are free: fix the first layer's first expert.
    problem += x[0][0][0] == 1
    for layer in range(num_layers - 1):
        weights = transitions[layer]
        for g in range(num_ranks):
            y = [
                [problem.add_variable(f"y_{layer}_{g}_{e}_{f}", 0, 1) for f in range(num_experts)]
                for e in range(num_experts)
            ]
            for e in range(num_experts):
                problem += pulp.lpSum(y[e]) == room * x[layer][e][g]
                problem += pulp.lpSum(y[f][e] for f in range(num_experts)) == room * x[layer + 1][e][g]
                for f in range(num_experts):
                    problem += y[e][f] <= x[layer][e][g]
                    problem += y[e][f] <= x[layer + 1][f][g]
            objective += [
                float(weights[e, f]) * y[e][f] for e in range(num_experts) for f in range(num_experts)
            ]
    problem.setObjective(pulp.lpSum(objective))
    name, is_proven = _solve(problem, solver, time_limit)
    ranks = np.asarray(
        [[int(np.argmax([var.value() or 0.0 for var in row])) for row in layer] for layer in x],
        dtype=np.int64,
    )
    stays = ranks[:-1, :, None] == ranks[1:, None, :]
    value = float((transitions * stays).sum())
    return ExactAnswer(
        slots=np.argsort(ranks, axis=1, kind="stable"), value=value, is_proven=is_proven, solver=name
    )


def _solve(problem: Any, solver: str, time_limit: float) -> tuple[str, bool]:
    """Solve in place with one thread and a fixed seed; return the solver and whether it proved its answer.

    Raises
    ------
    SpecError
        If the solver is not installed, or found nothing in time.
    """
    import pulp

    # PuLP ships CBC up to release 3; later a cbc on the path is taken.
    bundled = getattr(importlib.import_module("pulp.apis.coin_api"), "pulp_cbc_path", None)
    cbc = pulp.COIN_CMD(
        path=bundled,
        msg=False,
        threads=1,
        timeLimit=time_limit,
        gapRel=0.0,
        options=["RandomS 1", "RandomC 1"],
    )
    highs = pulp.HiGHS(
        msg=False, threads=1, timeLimit=time_limit, gapRel=0.0, gapAbs=0.0, random_seed=1, parallel="off"
    )
    wanted = {"highs": (highs,), "cbc": (cbc,)}.get(solver, (highs, cbc))
    engine = next((each for each in wanted if each.available()), None)
    if engine is None:
        raise SpecError(f"--solver {solver}: is not installed; install highspy, or use --solver heuristic")
    if engine is highs:
        problem.solve(engine)
        info = problem.solverModel.getInfo()
        gap = abs(info.objective_function_value - info.mip_dual_bound)
        is_proven = gap <= _PRECISION * max(1.0, abs(info.objective_function_value))
    else:
        with tempfile.TemporaryDirectory() as folder:
            engine.tmpDir = folder
            problem.solve(engine)
        is_proven = (
            problem.sol_status == pulp.constants.LpSolutionOptimal
            and problem.solutionTime < 0.95 * time_limit
        )
    name = "HiGHS" if engine is highs else "CBC"
    value = pulp.value(problem.objective)
    if value is None or not math.isfinite(value) or problem.sol_status <= 0:
        raise SpecError(f"{name} found no placement in {time_limit:g} s; use --solver heuristic")
    return name, is_proven
