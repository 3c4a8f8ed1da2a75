"""Units of all candidates in one list, the likeliest first: what a search simulates from the top."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.serving.candidates import CAUSES, CandidateColumns, PrefillColumns
from meshwright.planner.serving.job_file import ServingRequest
from meshwright.planner.serving.pairing import best_pairs
from meshwright.planner.serving.sizing import Sizing
from meshwright.planner.serving.space import CandidateSpace, option_pool
from meshwright.simcore.domain.serving import ServingPlan, ServingPool, Slo

__all__ = ["Unit", "UnitColumns", "rank_units", "unit_of_row"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# Shapes of each side of disaggregated plans that are paired with each other.
_SHAPES_PER_SIDE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One configuration with its bound.

    Parameters
    ----------
    plan : ServingPlan
        One unit: an aggregated replica, or the smallest numbers of prefill and decode replicas in their ratio.
    shape : int
        Configurations of equal shape differ in scheduler settings only.
    rate, load : float
        Bound of its requests per second [1/s], and of its load in the units of the demand.
    value : float
        Bound of the objective.
    tpot, ttft : float
        In the state of the bound [s].
    cause : str
        What stops a higher bound.
    """

    plan: ServingPlan
    shape: int
    rate: float
    load: float
    value: float
    tpot: float
    ttft: float
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnitColumns:
    """Units as columns, the one with the best estimate first.

    Parameters
    ----------
    decode : NDArray[np.int64]
        Row of the aggregated or the decode candidates.
    prefill : NDArray[np.int64]
        Row of the prefill candidates; -1 for aggregated units.
    num_prefill, num_decode : NDArray[np.int64]
        Replicas of a unit.
    rate, load, value : NDArray[np.float64]
        As in :class:`Unit`.
    estimate : NDArray[np.float64]
        The objective at the rate that is rather to be expected than the bound.
    num_gpus, prefill_gpus, shape, decode_shape : NDArray[np.int64]
        GPUs of a unit, those of them in its prefill pool, a number that configurations of equal shape share, and the shape
        that decodes.
    num_beyond_limits, num_beyond_demand : int
        Candidates that keep the limits at no load, and those that keep them but cannot carry the demand.
    refused : Mapping[str, int]
        Units that the export target refused, by reason, the most frequent first.
    """

    decode: IntArray
    prefill: IntArray
    num_prefill: IntArray
    num_decode: IntArray
    rate: FloatArray
    load: FloatArray
    value: FloatArray
    estimate: FloatArray
    num_gpus: IntArray
    prefill_gpus: IntArray
    shape: IntArray
    decode_shape: IntArray
    num_beyond_limits: int
    num_beyond_demand: int
    refused: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of units."""
        return len(self.rate)

    def kept(self, mask: NDArray[np.bool_], refused: Mapping[str, int]) -> UnitColumns:
        """Return the units of a mask, and why the others were refused."""
        columns = {each.name: getattr(self, each.name) for each in fields(self)}
        chosen = {name: column[mask] for name, column in columns.items() if isinstance(column, np.ndarray)}
        return replace(self, refused=refused, **chosen)  # type: ignore[arg-type]  # the columns by name

    def rows(self) -> Iterator[int]:
        """Return the rows, best first."""
        return iter(range(len(self)))


def rank_units(space: CandidateSpace, sizing: Sizing, is_closed_loop: bool) -> UnitColumns:
    """Return all units that keep the limits and carry the demand by their bound, best estimate first.

    Parameters
    ----------
    space : CandidateSpace
        The candidates.
    sizing : Sizing
        Objective, demand and GPUs.
    is_closed_loop : bool
        Whether the load counts clients instead of requests per second.
    """
    option_gpus = np.array([option.num_gpus for option in space.options], dtype=np.int64)
    parts: list[dict[str, NDArray[Any]]] = []
    if space.aggregated is not None:
        columns = space.aggregated
        count = np.ones(len(columns), dtype=np.int64)
        parts.append(
            {
                "decode": np.arange(len(columns)),
                "prefill": -count,
                "num_prefill": 0 * count,
                "num_decode": count,
                "rate": columns.rate,
                "estimate": columns.estimate,
                "load": columns.clients if is_closed_loop else columns.rate,
                "num_gpus": option_gpus[columns.option],
                "prefill_gpus": 0 * count,
                "shape": columns.option.copy(),
                "decode_shape": columns.option.copy(),
            }
        )
    if space.prefill is not None and space.decode is not None:
        parts.append(_disaggregated(space, space.prefill, space.decode, option_gpus, sizing, is_closed_loop))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    keeps = joined["rate"] > 0.0
    gpus = joined["num_gpus"], joined["prefill_gpus"]
    carries = keeps & sizing.carries_demand(joined["load"], *gpus)
    value = sizing.values(joined["rate"], joined["load"], *gpus)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(keeps, joined["estimate"] / joined["rate"], 0.0)
    likely = joined.pop("estimate")
    estimate = sizing.values(likely, joined["load"] * share, *gpus)
    order = np.flatnonzero(carries)
    # Equal estimates: the better bound, then smaller units, then the order of the space.
    order = order[np.lexsort((order, joined["num_gpus"][order], -value[order], -estimate[order]))]
    return UnitColumns(
        **{name: column[order] for name, column in joined.items()},  # type: ignore[arg-type]  # the columns by name
        value=value[order],
        estimate=estimate[order],
        num_beyond_limits=int((~keeps).sum()),
        num_beyond_demand=int((keeps & ~carries).sum()),
    )


def unit_of_row(request: ServingRequest, space: CandidateSpace, units: UnitColumns, row: int) -> Unit:
    """Return one unit of the ranking as a plan."""
    prefill, decode = int(units.prefill[row]), int(units.decode[row])
    columns = space.aggregated if prefill < 0 else space.decode
    assert columns is not None
    option = space.options[int(columns.option[decode])]
    settings: dict[str, Any] = {
        "max_num_sequences": int(columns.max_num_sequences[decode]),
        "max_num_batched_tokens": int(columns.budget[decode]),
        "num_speculative_tokens": int(columns.num_speculative_tokens[decode]),
        "has_prefix_cache": bool(columns.has_prefix_cache[decode]),
    }
    if settings["num_speculative_tokens"]:
        assert request.acceptance is not None
        acceptance = request.acceptance.of_draft(settings["num_speculative_tokens"])
        settings |= {"acceptance_rate": acceptance.rate, "acceptance_lengths": acceptance.lengths}
    ttft = float(columns.ttft[decode])
    pools: tuple[ServingPool, ...]
    if prefill < 0:
        pools = (option_pool(option, **settings),)
    else:
        assert space.prefill is not None
        first = space.options[int(space.prefill.option[prefill])]
        ttft = float(space.prefill.ttft[prefill])
        pools = (
            option_pool(
                first,
                "prefill",
                num_replicas=int(units.num_prefill[row]),
                max_num_batched_tokens=int(space.prefill.budget[prefill]),
                has_prefix_cache=bool(space.prefill.has_prefix_cache[prefill]),
            ),
            option_pool(option, "decode", num_replicas=int(units.num_decode[row]), **settings),
        )
    plan = ServingPlan(
        engine=option.engine,
        engine_version=request.engine_version,
        precision=option.precision,
        kv_precision=option.kv_precision,
        pools=pools,
    )
    return Unit(
        plan=plan,
        shape=int(units.shape[row]),
        rate=float(units.rate[row]),
        load=float(units.load[row]),
        value=float(units.value[row]),
        tpot=float(columns.tpot[decode]),
        ttft=ttft,
        cause=cause_name(int(columns.cause[decode]), request.job.slo),
    )


def cause_name(cause: int, slo: Slo) -> str:
    """Return what a cause of the columns stands for."""
    if cause < 0:
        return "nothing"
    return CAUSES[cause] if cause < len(CAUSES) else slo.limits[cause - len(CAUSES)].name


def _disaggregated(
    space: CandidateSpace,
    prefill: PrefillColumns,
    decode: CandidateColumns,
    option_gpus: IntArray,
    sizing: Sizing,
    is_closed_loop: bool,
) -> dict[str, NDArray[Any]]:
    """Return the units of pairs of shapes of one engine and format, each at its best ratios."""
    formats: dict[tuple[str, str, str], list[int]] = {}
    for index, option in enumerate(space.options):
        formats.setdefault((option.engine, option.precision, option.kv_precision), []).append(index)
    found: list[dict[str, NDArray[Any]]] = []
    for members in formats.values():
        likely = np.where(
            prefill.rate > 0.0, np.maximum(prefill.rate - prefill.margin, 0.01 * prefill.rate), 0.0
        )
        first = _best_rows(likely, prefill.option, option_gpus, members)
        second = _best_rows(decode.rate, decode.option, option_gpus, members)
        # Requests under way: those in the prefill pool beside those that decode.
        with np.errstate(divide="ignore", invalid="ignore"):
            decoding = np.where(decode.rate > 0.0, decode.clients / decode.rate, 0.0)
        seconds = prefill.ttft[first][:, None] + decoding[second]
        demand = sizing.demand / (seconds if is_closed_loop else np.ones_like(seconds))
        pairs = best_pairs(
            prefill.rate[first],
            option_gpus[prefill.option[first]],
            decode.rate[second],
            option_gpus[decode.option[second]],
            sizing.max_gpus,
            prefill.margin[first],
            sizing.max_prefill_gpus,
            demand if sizing.objective == "cost" else None,
        )
        p, d = first[pairs.prefill], second[pairs.decode]
        found.append(
            {
                "decode": d,
                "prefill": p,
                "num_prefill": pairs.num_prefill,
                "num_decode": pairs.num_decode,
                "rate": pairs.rate,
                "estimate": pairs.estimate,
                "load": pairs.rate * seconds[pairs.prefill, pairs.decode] if is_closed_loop else pairs.rate,
                "num_gpus": pairs.num_gpus,
                "prefill_gpus": pairs.num_prefill * option_gpus[prefill.option[p]],
                "shape": len(space.options) * (1 + prefill.option[p]) + decode.option[d],
                "decode_shape": decode.option[d],
            }
        )
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _best_rows(rate: FloatArray, option: IntArray, gpus: IntArray, members: list[int]) -> IntArray:
    """Return the best rows per GPU of the best shapes of one engine and format, one a shape."""
    rows = np.flatnonzero(np.isin(option, members) & (rate > 0.0))
    order = rows[np.argsort(-(rate[rows] / gpus[option[rows]]), kind="stable")]
    _, first = np.unique(option[order], return_index=True)
    return order[np.sort(first)][:_SHAPES_PER_SIDE]
