"""Score serving predictions against measured runs: each row simulated as its closed loop of clients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import spearmanr

from meshwright.costmodels.serving.constants import CERTAINTIES, EngineConstants
from meshwright.costmodels.serving.kernels import ServingKernels, load_serving_kernels
from meshwright.costmodels.serving.replica import (
    Replica,
    engine_behaviour,
    replica,
    served_model,
    with_engine_defaults,
)
from meshwright.costmodels.serving.step import ServedModel, step_table
from meshwright.errors import MeshwrightError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.profiler.serving_runs import (
    ServingRun,
    ServingSetup,
    UnstatedLoadError,
    decode_setup,
    prefill_setup,
    serving_setup,
)
from meshwright.simcore.domain.serving import ServingPool
from meshwright.simcore.serving.requests import closed_loop_requests
from meshwright.simcore.serving.simulate import simulate
from meshwright.simcore.serving.step_times import decode_step_time, prompt_step_time

__all__ = [
    "SERVING_RESULT_COLUMNS",
    "RankCorrelation",
    "ScoredServingRun",
    "ServingErrors",
    "ServingStatus",
    "ServingValidator",
    "grouped",
    "rank_correlations",
    "simulated_means",
    "summarise_serving",
]

ServingStatus = Literal["scored", "skipped"]
SERVING_RESULT_COLUMNS = (
    "id",
    "status",
    "reason",
    "measured_ttft_s",
    "predicted_ttft_s",
    "measured_tpot_s",
    "predicted_tpot_s",
)
# A batch and the time of its steps settle on each other from above in a few rounds.
_LITTLE_ROUNDS = 30
# Fewer rows of a model on a system order nothing.
_LEAST_ROWS = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredServingRun:
    """One row with its prediction, or the reason why there is none.

    Parameters
    ----------
    run : ServingRun
        The row.
    status, reason : ServingStatus, str
        What became of it; of a scored row, where its constants come from.
    ttft, tpot : float | None
        Predicted means [s]; rows of separate pools have no time to the first token, as they state no load.
    is_complete : bool
        False where the row leaves out what a prediction needs.
    """

    run: ServingRun
    status: ServingStatus
    reason: str
    ttft: float | None = None
    tpot: float | None = None
    is_complete: bool = True

    @property
    def ttft_error(self) -> float | None:
        """Predicted over measured time to the first token minus 1."""
        return None if self.ttft is None else self.ttft / self.run.ttft_mean - 1.0

    @property
    def tpot_error(self) -> float | None:
        """Predicted over measured time per output token minus 1."""
        return None if self.tpot is None else self.tpot / self.run.tpot_mean - 1.0

    @property
    def group(self) -> str:
        """Where its error counts: the headline's ``ok``, another quality, or ``disaggregated``."""
        return "disaggregated" if self.run.is_disaggregated else self.run.quality


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingErrors:
    """Errors of some rows as shares of the measured value; None without a row.

    Parameters
    ----------
    name : str
        What the rows have in common.
    num_scored, num_rows : int
        Rows with a prediction, and all of them.
    tpot_median, tpot_p90, tpot_bias, ttft_median, ttft_p90, ttft_bias : float | None
        Median and 90th percentile of the absolute error, median signed error.
    """

    name: str
    num_scored: int
    num_rows: int
    tpot_median: float | None
    tpot_p90: float | None
    tpot_bias: float | None
    ttft_median: float | None
    ttft_p90: float | None
    ttft_bias: float | None

    @property
    def coverage(self) -> float:
        """Scored over all rows; 1 without any."""
        return self.num_scored / self.num_rows if self.num_rows else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCorrelation:
    """Spearman's correlation of predicted and measured times of one model on one system."""

    model: str
    gpu: str
    num_rows: int
    tpot: float
    ttft: float


class ServingValidator:
    """Predicts rows; keeps kernels and step tables between rows of one configuration.

    Parameters
    ----------
    calibration_paths : Sequence[Path]
        The user's calibrations.
    constants : Callable[[EngineConstants], EngineConstants] | None
        Changes the constants of every row before use: fits try values with it.
    seed : int
        Of the lengths of requests.
    """

    def __init__(
        self,
        calibration_paths: Sequence[Path] = (),
        *,
        constants: Callable[[EngineConstants], EngineConstants] | None = None,
        seed: int = 0,
    ) -> None:
        self._paths = tuple(calibration_paths)
        self._constants = constants
        self._seed = seed
        self._kernels: dict[tuple[str, str], ServingKernels] = {}
        self._setups: dict[str, tuple[ServingRun, ServingSetup]] = {}
        self._tables: dict[tuple[object, ...], tuple[ServedModel, ServingPool, Replica]] = {}

    def score(self, run: ServingRun) -> ScoredServingRun:
        """Return the prediction of one row, or why it has none."""
        try:
            if run.is_disaggregated:
                return self._score_decode(run)
            setup = self._setup(run)
            served, one = self.replica(setup)
            ttft, tpot = simulated_means(one, setup, self._seed)
        except MeshwrightError as error:
            return ScoredServingRun(
                run=run,
                status="skipped",
                reason=str(error),
                is_complete=not isinstance(error, UnstatedLoadError),
            )
        return ScoredServingRun(
            run=run, status="scored", reason=constants_remark(served.constants), ttft=ttft, tpot=tpot
        )

    def forget_tables(self) -> None:
        """Build step tables anew: the constants have changed."""
        self._tables.clear()

    def replica(self, setup: ServingSetup) -> tuple[ServedModel, Replica]:
        """Return the replica of a row under its load; step tables are built once per configuration."""
        key = (setup.model.name, setup.cluster.gpu.id, setup.plan, setup.expert_precision)
        if key not in self._tables:
            served = self.served(setup)
            pool = with_engine_defaults(setup.plan.pools[0], served.constants)
            self._tables[key] = served, pool, replica(served, pool)
        served, pool, one = self._tables[key]
        per_engine = -(-setup.max_num_sequences // (pool.attention_dp * pool.pp))
        pool = replace(pool, max_num_sequences=min(pool.max_num_sequences, per_engine))
        behaviour = engine_behaviour(
            served.constants, pool, one.memory.kv_cache_tokens, prompt_length=setup.input_length
        )
        behaviour = replace(behaviour, prompt_wait_steps=setup.prompt_wait_steps)
        if setup.mixed_step_tokens:
            behaviour = replace(
                behaviour,
                policy="chunked_prefill",
                splits_prompts=False,
                max_num_batched_tokens=setup.mixed_step_tokens,
            )
        return served, replace(one, behaviour=behaviour)

    def _setup(self, run: ServingRun) -> ServingSetup:
        if run.id not in self._setups or self._setups[run.id][0] is not run:
            self._setups[run.id] = run, serving_setup(run)
        return self._setups[run.id][1]

    def served(self, setup: ServingSetup) -> ServedModel:
        """Return what the steps of a row cost, with the constants in force."""
        served = served_model(
            setup.model,
            setup.cluster,
            setup.plan,
            expert_precision=setup.expert_precision,
            kernels=self._load(setup.cluster, setup.plan.engine),
        )
        return (
            served
            if self._constants is None
            else replace(served, constants=self._constants(served.constants))
        )

    def _load(self, cluster: ClusterSpec, engine: str) -> ServingKernels:
        key = (cluster.gpu.id, engine)
        if key not in self._kernels:
            self._kernels[key] = load_serving_kernels(cluster.gpu, cluster.node, engine, self._paths)
        return self._kernels[key]

    def _score_decode(self, run: ServingRun) -> ScoredServingRun:
        """Return a row of separate pools: a decode step at the batch that prefill can keep filled.

        The batch a row states is the most its decode ranks take. By Little's law prompts that come at a rate ``x`` per
        rank keep ``x`` times the time of an answer running; the lesser of both counts. Queues are not stated.
        """
        setup, most = decode_setup(run)
        served, pool = self.served(setup), setup.plan.pools[0]
        table, drafts = step_table(served, pool), pool.num_speculative_tokens
        pace = pool.acceptance.tokens_per_step(drafts)
        prefill, ranks = prefill_setup(run)
        prompts = step_table(self.served(prefill), prefill.plan.pools[0])
        rate = ranks / prompt_step_time(prompts, setup.input_length)
        context = setup.input_length + 0.5 * setup.output_length
        batch = most
        for _ in range(_LITTLE_ROUNDS):
            answer = (setup.output_length - 1) / pace * decode_step_time(table, batch, context, drafts)
            batch = max(1.0, min(most, rate * answer))
        return ScoredServingRun(
            run=run,
            status="scored",
            reason=f"decode steps only, {constants_remark(served.constants)}",
            tpot=decode_step_time(table, batch, context, drafts) / pace,
        )


def simulated_means(one: Replica, setup: ServingSetup, seed: int = 0) -> tuple[float, float]:
    """Return mean time to the first token and per further token of a closed loop on one replica [s]."""
    requests = closed_loop_requests(
        concurrency=setup.num_clients,
        num_requests=setup.num_requests,
        input_length=setup.input_length,
        output_length=setup.output_length,
        ratio=setup.length_ratio,
        seed=seed,
    )
    result = simulate(one.table, one.behaviour, requests)
    ttft = float((result.first_token_time - result.arrival_time).mean())
    streamed = result.finish_time - result.first_token_time
    return ttft, float((streamed / np.maximum(result.output_length - 1, 1)).mean())


def constants_remark(constants: EngineConstants) -> str:
    """Return where the constants of a prediction come from, one line."""
    counts = [f"{len(constants.names(kind))} {kind}" for kind in CERTAINTIES if constants.names(kind)]
    return f"engine constants: {', '.join(counts)}"


def summarise_serving(name: str, rows: Sequence[ScoredServingRun]) -> ServingErrors:
    """Return the errors of some rows."""
    tpot = np.array([row.tpot_error for row in rows if row.tpot_error is not None])
    ttft = np.array([row.ttft_error for row in rows if row.ttft_error is not None])

    def figures(errors: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float | None, ...]:
        if not len(errors):
            return None, None, None
        size = np.abs(errors)
        return float(np.median(size)), float(np.percentile(size, 90)), float(np.median(errors))

    tpot_median, tpot_p90, tpot_bias = figures(tpot)
    ttft_median, ttft_p90, ttft_bias = figures(ttft)
    return ServingErrors(
        name=name,
        num_scored=len(tpot),
        num_rows=sum(row.is_complete for row in rows),
        tpot_median=tpot_median,
        tpot_p90=tpot_p90,
        tpot_bias=tpot_bias,
        ttft_median=ttft_median,
        ttft_p90=ttft_p90,
        ttft_bias=ttft_bias,
    )


def grouped(
    rows: Iterable[ScoredServingRun], key: Callable[[ScoredServingRun], str]
) -> Mapping[str, tuple[ScoredServingRun, ...]]:
    """Return rows by a key, in order of first appearance."""
    found: dict[str, list[ScoredServingRun]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return {name: tuple(part) for name, part in found.items()}


def rank_correlations(rows: Sequence[ScoredServingRun]) -> tuple[RankCorrelation, ...]:
    """Return the rank correlation of every model on every system with at least five scored rows."""
    scored = [row for row in rows if row.ttft is not None and row.tpot is not None]
    found = []
    for part in grouped(scored, lambda row: f"{row.run.cell('model')} {row.run.cell('gpu')}").values():
        if len(part) < _LEAST_ROWS:
            continue
        pairs = (
            ([row.tpot for row in part], [row.run.tpot_mean for row in part]),
            ([row.ttft for row in part], [row.run.ttft_mean for row in part]),
        )
        tpot, ttft = (float(spearmanr(predicted, measured).statistic) for predicted, measured in pairs)
        first = part[0].run
        found.append(
            RankCorrelation(
                model=first.cell("model"), gpu=first.cell("gpu"), num_rows=len(part), tpot=tpot, ttft=ttft
            )
        )
    return tuple(found)
