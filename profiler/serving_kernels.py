"""Fit the kernels of serving engines that the shipped device calibrations lack, to the same public tables.

A shipped calibration holds one engine's kernels (:mod:`meshwright.profiler.built_in`). Serving overlays what it does
not have: matrix products, attention, latent attention and experts of the other engines, block-scaled products where the
first engine's table waits for the host, and the engines' own one-shot all-reduce.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration_document import CalibrationDocument, Provenance, device_rates
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.profiler.fitting.collectives import monotone_table
from meshwright.profiler.fitting.operator import FitSettings, fit_operator
from meshwright.profiler.importers.aiconfigurator import SYSTEMS, read_aiconfigurator
from meshwright.profiler.importers.aiconfigurator_tables import PackageTables, installed_root
from meshwright.profiler.measurements import CollectiveSamples, Measurements, OperatorSamples

__all__ = [
    "SERVING_SYSTEMS",
    "fit_serving_kernels",
    "fitted_curve",
    "read_all_reduce",
    "read_experts",
    "write_all",
]

SERVING_SYSTEMS = ("h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm", "gb200", "gb300")
_POINTS = {"gemm": 500, "attention_prefill": 400, "attention_decode": 500, "moe": 800}
_FEW_POINTS = 300
# Of the engine whose calibration is shipped only what it lacks is fitted anew: experts apart by routing.
_SHIPPED = "vllm"
# Kernels vLLM shares with SGLang (DeepGEMM, FlashMLA) and times with the host in the loop, or as whole modules.
_BORROWED = ("gemm.fp8_block", "mla_prefill", "mla_decode")
_LENDER = "sglang"
# Hidden size, expert width, experts per token and experts of published models that get curves of their own: Qwen3
# 30B, 235B and Coder 480B, GPT-OSS 20B and 120B, MiniMax-M2.5, DeepSeek-V3, Kimi-K2, GLM-5, Qwen3.5-397B, Mixtral 8x7B.
_EXPERT_SHAPES = (
    (2048, 768, 8, 128),
    (4096, 1536, 8, 128),
    (6144, 2560, 8, 160),
    (2880, 2880, 4, 32),
    (2880, 2880, 4, 128),
    (3072, 1536, 8, 256),
    (7168, 2048, 8, 256),
    (7168, 2048, 8, 384),
    (6144, 2048, 8, 256),
    (4096, 1024, 10, 512),
    (4096, 14336, 2, 8),
)
_EXPERT_FORMATS = ("bf16", "fp8", "fp8_block", "nvfp4", "int4_wo", "w4a16_mxfp4", "w4a8_mxfp4_mxfp8")
# Token counts at which the curves of experts may bend: doubling while batches of decode grow, then in fours.
_KNOTS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384], dtype=np.float64)
# Cross-validated mean error above which an engine's own fit is worse than the shipped engine's kernel.
_LARGEST_ERROR = 0.12


def fit_serving_kernels(system: str, engine: str, *, root: Path | None = None) -> CalibrationDocument:
    """Return the kernels of one engine on one device that serving lays over the shipped calibration.

    Parameters
    ----------
    system, engine : str
        As the package names them.
    root : Path | None
        Folder of the tables; that of the installed package when None.
    """
    measurements = read_aiconfigurator(system, engine, root=root)
    gpu = load_gpu(measurements.gpu)
    operators = {}
    for samples in _wanted(measurements, system, engine, root):
        points = _POINTS.get(samples.operator, _FEW_POINTS)
        rates = device_rates(gpu, samples.operator, samples.precision)
        model = fit_operator(samples, rates, FitSettings(max_points=points, with_trees=False))
        if engine == _SHIPPED or (model.error is not None and model.error.mean <= _LARGEST_ERROR):
            operators[samples.name] = model
    return CalibrationDocument(
        name=f"{gpu.id}.{engine}",
        gpu=gpu.id,
        provenance=Provenance(
            created_by="meshwright",
            kernels=measurements.kernels,
            attribution=measurements.attribution,
            licence=measurements.licence,
            inputs=measurements.inputs,
        ),
        operators=operators,
    )


def read_all_reduce(system: str, *, root: Path | None = None) -> dict[str, object]:
    """Return the one-shot all-reduce tables of every engine: microseconds by engine, launch and group size."""
    tables = PackageTables(root=installed_root() if root is None else root, system=system)
    found: dict[str, object] = {}
    columns = ("allreduce_dtype", "num_gpus", "message_size")
    for engine in ("vllm", "sglang", "trtllm"):
        table = tables.read(f"comm/{engine}", "custom_allreduce_perf", columns, optional=("backend",))
        if table is None:
            continue
        rows = table.rows[table.rows["allreduce_dtype"] == "bfloat16"]
        rows = rows.assign(
            launch=rows["backend"].str.rsplit("_", n=1).str[-1] if "backend" in rows else "graph"
        )
        kinds: dict[str, dict[str, object]] = {}
        for (launch, ranks), part in rows.groupby(["launch", "num_gpus"], sort=True):
            unique = part.groupby("message_size", sort=True)["latency"].median()
            curve = monotone_table(
                CollectiveSamples(
                    collective="all_reduce",
                    ranks=int(ranks),
                    num_bytes=2.0 * unique.index.to_numpy(dtype=np.float64),
                    seconds=unique.to_numpy(dtype=np.float64) * 1e-3,
                    source=table.source,
                )
            )
            kinds.setdefault(str(launch), {})[str(ranks)] = {
                "num_bytes": [int(value) for value in curve.num_bytes],
                "microseconds": [round(float(value) * 1e6, 2) for value in curve.seconds],
            }
        found[engine] = {"source": table.source, **kinds}
    return {SYSTEMS[system]: found}


def read_experts(system: str, engine: str, *, root: Path | None = None) -> dict[str, object]:
    """Return curves of an engine's experts: microseconds by format, model shape and split, over token counts.

    Each is the least-squares fit of straight pieces between :data:`_KNOTS` in log-log to the measured times. Fits of all
    models together err by 5 % on average but by 20 to 40 % on a single one: kernels are chosen by shape.
    """
    found: dict[str, dict[str, dict[str, dict[str, list[float]]]]] = {}
    for samples in read_aiconfigurator(system, engine, root=root).operators:
        if samples.operator != "moe" or samples.precision not in _EXPERT_FORMATS:
            continue
        part = next(_by_routing(samples))
        shape = part.shape
        fields = ("hidden_size", "moe_ffn_hidden_size", "top_k", "num_experts")
        keys = np.column_stack([shape[name].astype(np.int64) for name in (*fields, "tp", "ep")])
        for key in np.unique(keys, axis=0):
            if tuple(int(value) for value in key[:4]) not in _EXPERT_SHAPES:
                continue
            rows = np.flatnonzero((keys == key).all(axis=1))
            rows = rows[np.argsort(shape["num_tokens"][rows])]
            name, split = ("x".join(str(value) for value in part_key) for part_key in (key[:4], key[4:]))
            knots, seconds = fitted_curve(shape["num_tokens"][rows], part.seconds[rows])
            found.setdefault(samples.precision, {}).setdefault(name, {})[split] = {
                "num_tokens": [int(value) for value in knots],
                "microseconds": [float(f"{value * 1e6:.4g}") for value in seconds],
            }
    return dict(found)


def fitted_curve(
    num_tokens: NDArray[np.float64], seconds: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the knots within the measured counts, and the least-squares log-log polyline's times at them [s]."""
    first, last = num_tokens.min(), num_tokens.max()
    inner = np.array([knot for knot in _KNOTS if first < knot < last])
    knots = np.concatenate([[first], inner, [last]])
    # Hat functions: each measured time is the mean of its two knots, weighted by their distance.
    basis = np.stack(
        [np.interp(np.log(num_tokens), np.log(knots), row) for row in np.eye(len(knots))], axis=1
    )
    heights = np.linalg.lstsq(basis, np.log(seconds), rcond=None)[0]
    return knots, np.exp(heights)


def write_all(folder: Path, *, root: Path | None = None) -> None:
    """Write every document and the all-reduce tables into ``folder``."""
    from meshwright.costmodels.calibration_writing import calibration_text

    all_reduce: dict[str, object] = {}
    for system in SERVING_SYSTEMS:
        all_reduce |= read_all_reduce(system, root=root)
        experts = {engine: read_experts(system, engine, root=root) for engine in ("vllm", "sglang", "trtllm")}
        text = json.dumps(experts, separators=(",", ":")).replace('},"', '},\n"')
        (folder / f"{SYSTEMS[system]}.experts.json").write_text(text + "\n", encoding="utf-8")
        for engine in ("vllm", "sglang", "trtllm"):
            document = fit_serving_kernels(system, engine, root=root)
            (folder / f"{document.name}.json").write_text(calibration_text(document), encoding="utf-8")
    text = json.dumps(all_reduce, separators=(",", ":"))
    for launch in ('"eager"', '"graph"'):
        text = text.replace(launch, f"\n{launch}")
    (folder / "all_reduce.json").write_text(text + "\n", encoding="utf-8")


def _wanted(
    measurements: Measurements, system: str, engine: str, root: Path | None
) -> Iterator[OperatorSamples]:
    for samples in measurements.operators:
        if samples.operator == "moe":
            yield from _by_routing(samples)
        elif engine != _SHIPPED:
            yield samples
    if engine == _SHIPPED:
        for samples in read_aiconfigurator(system, _LENDER, root=root).operators:
            if samples.name.startswith(_BORROWED):
                yield samples


def _by_routing(samples: OperatorSamples) -> Iterator[OperatorSamples]:
    """Yield the skewed rows of a mixture of experts alone: two skews under one flag blur each other."""
    shape = samples.shape
    is_wanted = np.isclose(shape["skew"], 1.01) & (shape["tp"] * shape["ep"] <= 64.0)
    if not is_wanted.any():
        is_wanted = shape["tp"] * shape["ep"] <= 64.0
    yield replace(samples.take(np.flatnonzero(is_wanted)), source=samples.source)
