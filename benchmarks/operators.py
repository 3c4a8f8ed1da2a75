"""Operator models on shapes they did not see: errors, intervals and speed, beside the peers' schemes.

Needs the extra ``aiconfigurator``, and scikit-learn for the peers' forest. Every figure is the mean over three seeds;
a seed holds out a fixed random 30 % of a table (at most 6,000 shapes) and picks the training shapes from the rest.

Run: python benchmarks/operators.py [--root FOLDER] [--part errors|speed]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration_choice import load_device_calibration
from meshwright.costmodels.calibration_document import device_rates
from meshwright.costmodels.collectives import GroupPlacement, collective_time
from meshwright.costmodels.operators import OPERATORS, OperatorModel, Shape, roofline_time
from meshwright.hardware_specs.catalog import load_cluster, load_gpu
from meshwright.profiler.fitting.collectives import BUS_FACTORS, fit_collectives
from meshwright.profiler.fitting.operator import FitSettings, fit_operator
from meshwright.profiler.fitting.subset import spread_rows
from meshwright.profiler.importers.aiconfigurator import read_aiconfigurator
from meshwright.profiler.measurements import Measurements, OperatorSamples

SEEDS = (0, 1, 2)
HELD_OUT_SHARE, MOST_HELD_OUT = 0.3, 6000
# Widths of language models' projections, from which a seed draws the (n, k) of twenty products.
MODEL_WIDTHS, NUM_PRODUCTS = (1024, 57344), 20
MODEL_SIZES = (1, 16, 64, 256, 1024, 4096, 32768)


@dataclass
class Scores:
    """Errors and interval hits of one line of the table, over the seeds."""

    mean: list[float] = field(default_factory=list)
    p95: list[float] = field(default_factory=list)
    roofline: list[float] = field(default_factory=list)
    covered: list[float] = field(default_factory=list)
    bias: list[float] = field(default_factory=list)

    def add(self, model: OperatorModel, held: OperatorSamples) -> None:
        """Score a model on shapes it did not see."""
        seconds = model.time(held.shape)
        errors = seconds / held.seconds - 1.0
        plain = roofline_time(model.work(held.shape), model.curve, model.rates) / held.seconds - 1.0
        low, high = model.interval(held.shape)
        self.mean.append(float(np.abs(errors).mean()))
        self.p95.append(float(np.quantile(np.abs(errors), 0.95)))
        self.roofline.append(float(np.abs(plain).mean()))
        self.bias.append(float(np.median(errors)))
        self.covered.append(float(((held.seconds >= low) & (held.seconds <= high)).mean()))

    def line(self) -> str:
        """Return the means over the seeds."""
        mean, p95, plain, bias, covered = (
            100.0 * float(np.mean(part))
            for part in (self.mean, self.p95, self.roofline, self.bias, self.covered)
        )
        return f"mean {mean:5.2f} %  P95 {p95:5.1f} %  bias {bias:+5.1f} %  roofline alone {plain:5.1f} %  covered {covered:3.0f} %"


def num_flops(shape: Shape) -> NDArray[np.float64]:
    return 2.0 * shape["m"] * shape["n"] * shape["k"]


def is_deepseek(shape: Shape) -> NDArray[np.bool_]:
    return (shape["hidden_size"] == 7168) & (shape["num_experts"] == 256) & (shape["top_k"] == 8)


def is_seldom(shape: Shape) -> NDArray[np.bool_]:
    """Return where one of the widths is every third of the table, which training leaves out."""
    return np.isin(shape["n"], np.unique(shape["n"])[::3]) | np.isin(shape["k"], np.unique(shape["k"])[::3])


@cache
def tables(system: str, engine: str, root: Path | None) -> Measurements:
    return read_aiconfigurator(system, engine, root=root)


def samples_of(system: str, engine: str, name: str, root: Path | None) -> OperatorSamples:
    return next(each for each in tables(system, engine, root).operators if each.name == name)


def rates_of(system: str, engine: str, samples: OperatorSamples, root: Path | None):
    return device_rates(load_gpu(tables(system, engine, root).gpu), samples.operator, samples.precision)


def split(samples: OperatorSamples, seed: int) -> tuple[OperatorSamples, OperatorSamples]:
    """Return held-out shapes and the pool that training shapes are picked from."""
    order = np.random.default_rng(seed).permutation(len(samples.seconds))
    count = min(MOST_HELD_OUT, int(HELD_OUT_SHARE * len(order)))
    return samples.take(order[:count]), samples.take(order[count:])


def pick(pool: OperatorSamples, count: int, seed: int, rates) -> OperatorSamples:
    operator = OPERATORS[pool.operator]
    return pool.take(spread_rows(operator.coordinates(pool.shape, rates), count, seed))


def random_hold_out(system: str, engine: str, name: str, count: int, root: Path | None, only=None) -> Scores:
    samples = samples_of(system, engine, name, root)
    if only is not None:
        samples = samples.take(np.flatnonzero(only(samples.shape)))
    rates, scores = rates_of(system, engine, samples, root), Scores()
    for seed in SEEDS:
        held, pool = split(samples, seed)
        scores.add(fit_operator(pick(pool, count, seed, rates), rates, FitSettings(seed=seed)), held)
    return scores


def structured_hold_out(
    train: Callable[[dict[str, NDArray[np.float64]]], NDArray[np.bool_]],
    test: Callable[[dict[str, NDArray[np.float64]]], NDArray[np.bool_]],
    count: int,
    root: Path | None,
    system: str = "h200_sxm",
) -> Scores:
    samples = samples_of(system, "vllm", "gemm.bf16", root)
    rates, scores = rates_of(system, "vllm", samples, root), Scores()
    training, held = (samples.take(np.flatnonzero(part(dict(samples.shape)))) for part in (train, test))
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        few = held.take(rng.permutation(len(held.seconds))[:MOST_HELD_OUT])
        scores.add(fit_operator(pick(training, count, seed, rates), rates, FitSettings(seed=seed)), few)
    return scores


def own_shapes(root: Path | None) -> tuple[Scores, float, float]:
    """Return errors on a model's own (n, k) from seven sizes each, and mean and bias of sums over a layer."""
    samples = samples_of("h200_sxm", "vllm", "gemm.bf16", root)
    rates, scores, sums = rates_of("h200_sxm", "vllm", samples, root), Scores(), []
    n, k = samples.shape["n"], samples.shape["k"]
    pairs = np.unique(np.column_stack([n, k]), axis=0)
    pairs = pairs[((pairs >= MODEL_WIDTHS[0]) & (pairs <= MODEL_WIDTHS[1])).all(axis=1)]
    for seed in SEEDS:
        _, pool = split(samples, seed)
        chosen = np.random.default_rng(seed).permutation(pairs)[:NUM_PRODUCTS]
        generic = pick(pool, 300, seed, rates)
        mine = np.flatnonzero(
            (n[:, None] == chosen[:, 0]).astype(int).__mul__(k[:, None] == chosen[:, 1]).any(axis=1)
        )
        sizes = samples.shape["m"][mine]
        swept = np.isin(sizes, MODEL_SIZES)
        both = samples.take(np.unique(np.concatenate([mine[swept], _rows_of(samples, generic)])))
        model = fit_operator(both, rates, FitSettings(seed=seed, max_points=10_000))
        held = samples.take(mine[~swept])
        scores.add(model, held)
        sums += _layer_sums(model, held)
    ratios = np.array(sums)
    return scores, float(np.abs(ratios - 1.0).mean()), float(np.median(ratios - 1.0))


def _rows_of(samples: OperatorSamples, part: OperatorSamples) -> NDArray[np.int64]:
    keys = {key: row for row, key in enumerate(zip(*(samples.shape[name] for name in "mnk"), strict=True))}
    return np.array([keys[key] for key in zip(*(part.shape[name] for name in "mnk"), strict=True)])


def _layer_sums(model: OperatorModel, held: OperatorSamples) -> list[float]:
    """Return predicted over measured sums of four products of one size: what a layer adds up."""
    predicted, ratios = model.time(held.shape), []
    for size in np.unique(held.shape["m"]):
        rows = np.flatnonzero(held.shape["m"] == size)
        for start in range(0, len(rows) - 3, 4):
            four = rows[start : start + 4]
            ratios.append(float(predicted[four].sum() / held.seconds[four].sum()))
    return ratios


def collectives(system: str, engine: str, root: Path | None) -> float:
    """Return the mean error of tables of every second size, read at the other sizes, over collectives and groups."""
    measured = tables(system, engine, root)
    gpu = load_gpu(measured.gpu)
    curves = fit_collectives(measured.collectives, (gpu.scale_up or gpu.host_link).bandwidth_bytes_per_second)
    for curve in curves.values():
        for table in curve.tables:
            assert table is not None
            assert (np.diff(table.seconds) >= 0.0).all()
    return float(np.mean([curves[name].error for name in BUS_FACTORS if name in curves]))


def forest_error(samples: OperatorSamples, rates, count: int) -> float:
    """Return the error of a random forest on raw sizes (Vidur's scheme)."""
    from sklearn.ensemble import RandomForestRegressor

    errors = []
    for seed in SEEDS:
        held, pool = split(samples, seed)
        few = pick(pool, count, seed, rates)
        names = list(samples.shape)
        forest = RandomForestRegressor(n_estimators=250, random_state=seed)
        forest.fit(np.column_stack([few.shape[name] for name in names]), np.log(few.seconds))
        predicted = np.exp(forest.predict(np.column_stack([held.shape[name] for name in names])))
        errors.append(float(np.abs(predicted / held.seconds - 1.0).mean()))
    return float(np.mean(errors))


def nearest_error(samples: OperatorSamples, rates, count: int) -> float:
    """Return the error of inverse-distance weights of efficiencies in log sizes (AIConfigurator's scheme)."""
    from scipy.spatial import cKDTree

    operator, errors = OPERATORS[samples.operator], []
    for seed in SEEDS:
        held, pool = split(samples, seed)
        few = pick(pool, count, seed, rates)

        def ideal(part: OperatorSamples) -> NDArray[np.float64]:
            work = operator.work(
                part.shape, part.precision, rates, {each.name: each.initial for each in operator.parameters}
            )
            return np.maximum(
                work.flops / rates.peak_flops_per_second, work.num_bytes / rates.bandwidth_bytes_per_second
            )

        def place(part: OperatorSamples) -> NDArray[np.float64]:
            return np.log2(np.column_stack([part.shape[name] for name in operator.fields]))

        distance, rows = cKDTree(place(few)).query(place(held), k=8)
        weight = 1.0 / np.maximum(distance, 1e-9) ** 2
        utility = (weight * (ideal(few) / few.seconds)[rows]).sum(axis=1) / weight.sum(axis=1)
        errors.append(float(np.abs(ideal(held) / utility / held.seconds - 1.0).mean()))
    return float(np.mean(errors))


def speeds(root: Path | None) -> Iterator[tuple[str, float]]:
    """Yield kinds of operators and predictions per second, a million different shapes in one call, on one core."""
    for name in ("gemm.bf16", "gemm.fp8", "attention_prefill.bf16", "attention_decode.bf16", "moe.bf16"):
        samples = samples_of("h200_sxm", "vllm", name, root)
        rates = rates_of("h200_sxm", "vllm", samples, root)
        yield name, _speed(fit_operator(pick(samples, 1000, 0, rates), rates).time, samples.shape)
    num_bytes = 2.0 ** np.linspace(14.0, 31.0, 12)
    made = OperatorSamples(
        operator="rms_norm",
        precision="bf16",
        shape={"num_bytes": num_bytes},
        seconds=3e-6 + num_bytes / 4e12,
        source="made up",
    )
    yield "elementwise (rms_norm)", _speed(fit_operator(made, rates).time, made.shape)
    cluster = load_cluster("dgx-h200-superpod")
    calibration = load_device_calibration(cluster.node.gpu)

    def all_reduce(shape: Shape) -> NDArray[np.float64]:
        group = GroupPlacement(size=shape["ranks"], ranks_per_node=shape["ranks"])
        return collective_time("all_reduce", shape["num_bytes"], group, cluster, calibration, 1.0)

    yield (
        "all-reduce in a node",
        _speed(all_reduce, {"ranks": 2.0 ** np.arange(1, 4), "num_bytes": num_bytes[:3]}),
    )


def _speed(predict: Callable[[Shape], NDArray[np.float64]], sampled: Shape) -> float:
    """Return predictions per second of CPU time at sizes around the sampled ones."""
    rng, count = np.random.default_rng(0), 1_000_000
    rows = rng.integers(0, len(next(iter(sampled.values()))), count)
    shape = {name: column[rows] for name, column in sampled.items()}
    # One size of each shape anew, so that no two are the same.
    varied = next(
        name
        for name in ("num_bytes", "m", "num_tokens", "sequence_length", "context_length")
        if name in shape
    )
    shape[varied] = np.maximum(1.0, np.round(shape[varied] * rng.uniform(0.5, 2.0, count)))
    predict(shape)  # bakes grids, compiles
    best = min(_seconds(lambda: predict(shape)) for _ in range(3))
    return count / best


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder of tables; the installed package's by default")
    parser.add_argument(
        "--part", choices=("errors", "speed"), help="only errors and intervals, or only speed"
    )
    options = parser.parse_args()
    if options.part != "speed":
        print_errors(options.root)
    if options.part != "errors":
        print("predictions per second of CPU time on one core, a million shapes in one call:")
        for name, rate in speeds(options.root):
            print(f"  {name:24s} {rate:12,.0f}", flush=True)


def print_errors(root: Path | None) -> None:
    """Print errors and intervals of every hold-out, and those of the peers' schemes."""
    every: list[Scores] = []

    def show(label: str, scores: Scores) -> None:
        every.append(scores)
        print(f"{label:48s} {scores.line()}", flush=True)

    lines = [
        ("H200 bf16 GEMM", "h200_sxm", "vllm", "gemm.bf16", (100, 300, 1000)),
        ("H100 bf16 GEMM", "h100_sxm", "vllm", "gemm.bf16", (100, 300)),
        ("H200 fp8 GEMM", "h200_sxm", "trtllm", "gemm.fp8", (300,)),
        ("B200 bf16 GEMM", "b200_sxm", "vllm", "gemm.bf16", (300,)),
        ("A100 bf16 GEMM (vLLM's table)", "a100_sxm", "vllm", "gemm.bf16", (300,)),
        ("A100 bf16 GEMM (SGLang's)", "a100_sxm", "sglang", "gemm.bf16", (300,)),
        ("H200 prefill attention", "h200_sxm", "vllm", "attention_prefill.bf16", (300, 1000)),
        ("H200 decode attention", "h200_sxm", "vllm", "attention_decode.bf16", (300, 1000)),
        ("B200 prefill attention", "b200_sxm", "vllm", "attention_prefill.bf16", (300, 1000)),
        ("B200 decode attention", "b200_sxm", "vllm", "attention_decode.bf16", (300, 1000)),
        ("H200 bf16 MoE, any model", "h200_sxm", "vllm", "moe.bf16", (300, 1000)),
    ]
    for label, system, engine, name, counts in lines:
        for count in counts:
            show(f"{label}, {count} points", random_hold_out(system, engine, name, count, root))
    scores = random_hold_out("h200_sxm", "vllm", "moe.fp8_block", 160, root, is_deepseek)
    show("H200 fp8 MoE, one model, 160 points", scores)
    show(
        "H200 GEMM, widths never seen, 300 points",
        structured_hold_out(lambda s: ~is_seldom(s), is_seldom, 300, root),
    )
    for label, part in (("m <= 64", lambda s: s["m"] <= 64), ("m >= 1024", lambda s: s["m"] >= 1024)):
        show(f"H200 GEMM, {label}, 300 points", structured_hold_out(lambda s: s["m"] > 0, part, 300, root))
    for system in ("h100_sxm", "h200_sxm"):
        label = f"{system[:4].upper()} GEMM, ten times the sampled FLOPs"
        below, above = (lambda s: num_flops(s) < 5e10), (lambda s: num_flops(s) > 5e11)
        show(label, structured_hold_out(below, above, 300, root, system))
    scores, sum_error, sum_bias = own_shapes(root)
    show("H200 GEMM, a model's own shapes, 7 sizes", scores)
    print(
        f"{'sums of four products of a layer':48s} mean {100 * sum_error:5.2f} %  bias {100 * sum_bias:+.1f} %"
    )
    covered = 100.0 * np.array([each.covered for each in every])
    of_line = covered.mean(axis=1)
    print(
        f"80 % intervals: pooled {covered.mean():.0f} %; hold-outs, mean over seeds, {of_line.min():.0f} to {of_line.max():.0f} %; "
        f"single seeds {covered.min():.0f} to {covered.max():.0f} %"
    )
    for system, engine in (
        ("a100_sxm", "sglang"),
        ("h100_sxm", "vllm"),
        ("h200_sxm", "vllm"),
        ("b200_sxm", "vllm"),
    ):
        print(f"collectives {system}: mean {100 * collectives(system, engine, root):.1f} %, monotone")
    for name in ("gemm.bf16", "attention_decode.bf16"):
        samples = samples_of("h200_sxm", "vllm", name, root)
        rates = rates_of("h200_sxm", "vllm", samples, root)
        forest, nearest = (100 * scheme(samples, rates, 300) for scheme in (forest_error, nearest_error))
        print(
            f"peers' schemes, H200 {name}, 300 points: random forest on raw sizes {forest:.1f} %, inverse distance {nearest:.1f} %"
        )


if __name__ == "__main__":
    main()
