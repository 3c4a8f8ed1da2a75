"""Fit the widths of prediction intervals to published runs, and print how many of the runs they hold.

    python benchmarks/interval_widths.py [--devices]

Prints the constants of ``costmodels/interval.py``: what every software generation's own rows ask for, and what scale,
pipeline and number format add, all fitted at once to the 80 % quantile of the errors (pinball loss); a source's rows
weigh less the more there are. Generations without rows take the errors of sources predicted with no constant fitted to
them (held_out_sources.py). Coverage is counted twice: with these constants, and for every source with those fitted to
the others.

``--devices`` measures how far the calibration of one device is from another's: jobs of the table on every measured
device, costed with its own calibration and with each of the others' carried to it as an uncalibrated device's would be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from meshwright.costmodels import interval
from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.costmodels.calibration_choice import (
    _carried,
    built_in_documents,
    list_calibrations,
    load_device_calibration,
)
from meshwright.costmodels.calibration_document import overlay
from meshwright.costmodels.context import cost_context
from meshwright.costmodels.iteration import iteration_costs
from meshwright.errors import MeshwrightError
from meshwright.hardware_specs.catalog import load_fabric, load_gpu, load_node
from meshwright.hardware_specs.specs import ClusterSpec, NodeSpec
from meshwright.profiler.measured_runs import read_measured_runs
from meshwright.profiler.measured_setup import IncompleteRowError, MeasuredSetup, measured_setup
from meshwright.profiler.validation import score_run
from meshwright.simcore.training.iteration import iteration_time

TABLE = Path(__file__).resolve().parent.parent / "tests" / "validation" / "training_runs.csv"
QUANTILE = 0.8
NAMES = ("per doubling", "pipeline, per doubling", "narrow", "narrow with tp")
# Fewer rows say nothing of a generation.
FEWEST_ROWS = 10
# A source of n rows weighs n to the power of 1 less this.
SOURCE_POWER = 0.25
# Jobs of each source that every device is tried on.
JOBS_PER_SOURCE = 6
# Node of each device with a measured calibration.
NODES = {
    "a100-sxm-80": "dgx-a100",
    "b200-sxm-180": "dgx-b200",
    "b300-sxm-270": "dgx-b300",
    "gb200": "gb200-nvl72",
    "gb300": "gb300-nvl72",
    "h100-sxm-80": "dgx-h100",
    "h100-sxm-96-hbm2e": "h100-96-8",
    "h200-sxm-141": "dgx-h200",
    "l40s": "l40s-8",
    "rtx-pro-6000-server": "rtx-pro-6000-8",
}

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Timed rows: source, software, what may widen their interval, and how far the prediction was off.

    ``causes`` has shape ``(len(NAMES), num_rows)``; ``errors`` are ``|log(predicted / measured)|``.
    """

    sources: NDArray[np.str_]
    software: NDArray[np.str_]
    causes: Floats
    errors: Floats

    def take(self, keep: NDArray[np.bool_]) -> Rows:
        """Return some of the rows."""
        return Rows(
            sources=self.sources[keep],
            software=self.software[keep],
            causes=self.causes[:, keep],
            errors=self.errors[keep],
        )


def timed_rows() -> Rows:
    """Return the timed rows that may be trusted."""
    sources, software, causes, errors = [], [], [], []
    for run in read_measured_runs(TABLE):
        error = score_run(run).time_error
        if run.quality not in ("ok", "recalled") or error is None:
            continue
        setup = measured_setup(run)
        plan, workload = setup.plan, setup.job.workload
        doublings = np.log2(max(plan.num_gpus, 8) / 8)
        is_narrow = workload.precision not in ("fp32", "tf32", "fp16", "bf16")
        causes.append(
            [
                doublings,
                doublings * (plan.pp > 1),
                float(is_narrow),
                float(is_narrow and plan.tp > 1),
            ]
        )
        sources.append(run.id.rsplit("-", 1)[0])
        software.append(setup.job.software)
        errors.append(abs(np.log1p(error)))
    return Rows(
        sources=np.array(sources),
        software=np.array(software),
        causes=np.array(causes).T,
        errors=np.array(errors),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Half-widths, as logarithms, that add up in squares: of each cause, and of each measured generation."""

    causes: Floats
    software: dict[str, float]

    def of(self, rows: Rows) -> Floats:
        """Return the half-width of every row's interval."""
        own = np.array([self.software.get(name, interval.UNMEASURED_SOFTWARE) for name in rows.software])
        return np.sqrt(((rows.causes * self.causes[:, None]) ** 2).sum(axis=0) + own**2)


def fit(rows: Rows) -> Widths:
    """Return the widths that make the 80 % quantile of the errors the half-widths of their rows."""
    measured = [name for name in sorted(set(rows.software)) if (rows.software == name).sum() >= FEWEST_ROWS]
    counts = {source: int((rows.sources == source).sum()) for source in set(rows.sources)}
    weights = np.array([counts[source] ** -SOURCE_POWER for source in rows.sources])

    def widths(values: Floats) -> Widths:
        size = np.abs(values)
        software = zip(measured, size[len(NAMES) :].tolist(), strict=True)
        return Widths(causes=size[: len(NAMES)], software=dict(software))

    def loss(values: Floats) -> float:
        over = rows.errors - widths(values).of(rows)
        return float((weights * np.where(over > 0.0, QUANTILE * over, (QUANTILE - 1.0) * over)).sum())

    options = {"maxiter": 50_000, "xtol": 1e-6, "ftol": 1e-9}
    starts = np.random.default_rng(0).uniform(0.01, 0.08, (8, len(NAMES) + len(measured)))
    found = [minimize(loss, start, method="Powell", options=options) for start in starts]
    return widths(min(found, key=lambda result: result.fun).x)


def print_widths(rows: Rows) -> None:
    """Fit all rows, print the constants, and coverage by source as fitted and as held out."""
    fitted = fit(rows)
    print("Half-widths as logarithms")
    for name, width in zip(NAMES, fitted.causes, strict=True):
        print(f"  {name:<24}{width:.3f}")
    for name, width in fitted.software.items():
        print(f"  {name:<24}{width:.3f}  ({(rows.software == name).sum()} rows)")
    print(f"  {'unmeasured software':<24}{interval.UNMEASURED_SOFTWARE:.3f}")
    held_out = np.zeros(len(rows.errors))
    for source in sorted(set(rows.sources)):
        is_own = rows.sources == source
        held_out[is_own] = fit(rows.take(~is_own)).of(rows.take(is_own))
    print("\n  source      rows   inside  half-width        held out: inside  half-width")
    for source in [*sorted(set(rows.sources)), "all"]:
        own = rows.sources == source if source != "all" else np.ones(len(rows.errors), dtype=np.bool_)
        cells = "      ".join(
            f"{(rows.errors[own] <= half[own]).mean():>7.0%}  {np.median(half[own]):>8.1%}"
            for half in (fitted.of(rows), held_out)
        )
        print(f"  {source:<12}{own.sum():>4}  {cells}")


def device_ratios() -> tuple[Floats, Floats]:
    """Return the errors that borrowing a calibration makes: within an architecture, and across with alike links."""
    setups = chosen_setups()
    same, across = [], []
    measured = [name for name in list_calibrations() if name in NODES]
    for borrower in measured:
        node = load_node(NODES[borrower])
        for lender in measured:
            if lender == borrower or (load_node(NODES[lender]).topology == "pcie") != (
                node.topology == "pcie"
            ):
                continue
            ratios = borrowed_errors(setups, node, carried(borrower, lender))
            is_same = load_gpu(borrower).architecture == load_gpu(lender).architecture
            (same if is_same else across).append(ratios)
            print(f"  {borrower:<20}<- {lender:<20}{np.percentile(ratios, 80):>7.1%}")
    return np.concatenate(same), np.concatenate(across)


def chosen_setups() -> list[MeasuredSetup]:
    """Return some jobs and plans of every source."""
    by_source: dict[str, list[MeasuredSetup]] = {}
    for run in read_measured_runs(TABLE):
        try:
            setup = measured_setup(run)
        except IncompleteRowError:
            continue
        if run.measured == "time" and run.quality in ("ok", "recalled"):
            by_source.setdefault(run.id.rsplit("-", 1)[0], []).append(setup)
    return [
        setup
        for setups in by_source.values()
        for setup in setups[:: max(1, len(setups) // (JOBS_PER_SOURCE - 1))][:JOBS_PER_SOURCE]
    ]


def carried(borrower: str, lender: str) -> DeviceCalibration:
    """Return the lender's calibration as an uncalibrated device of its architecture would get it."""
    gpu = load_gpu(borrower)
    documents = tuple(
        _carried(document, gpu, load_gpu(lender)) for document in built_in_documents(lender, gpu)
    )
    return overlay(documents, "borrowed", is_estimate=True)


def borrowed_errors(setups: Sequence[MeasuredSetup], node: NodeSpec, borrowed: DeviceCalibration) -> Floats:
    """Return ``|log(borrowed / own)|`` of the iteration time of every job the device can run."""
    own = load_device_calibration(node.gpu, node)
    errors = []
    for setup in setups:
        count = -(-setup.plan.num_gpus // node.num_gpus)
        cluster = ClusterSpec(id="tried", node=node, num_nodes=count, fabric=load_fabric(node.default_fabric))
        try:
            context = cost_context(
                replace(setup.job, cluster=cluster),
                features=setup.features,
                attention_kernel=setup.attention_kernel,
            )
            seconds = [
                iteration_time(
                    iteration_costs(replace(context, calibration=each), setup.plan), setup.plan.schedule
                )
                for each in (own, borrowed)
            ]
        except MeshwrightError:
            continue
        errors.append(abs(np.log(seconds[1] / seconds[0])))
    return np.array(errors)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", action="store_true", help="measure borrowed calibrations (minutes)")
    work: Callable[[], None] = print_devices if parser.parse_args().devices else print_all
    work()


def print_all() -> None:
    """Print widths and coverage."""
    print_widths(timed_rows())


def print_devices() -> None:
    """Print the errors of borrowed calibrations."""
    print("80 % of the jobs lie within, by borrowed calibration")
    for name, errors in zip(("same architecture", "another architecture"), device_ratios(), strict=True):
        print(f"{name}: {np.percentile(errors, 80):.1%} ({len(errors)} jobs)")


if __name__ == "__main__":
    main()
