"""Operator tables of the installed package ``aiconfigurator-core`` (Apache-2.0), read where they lie.

The package comes with the extra ``meshwright[aiconfigurator]``. Only its operator tables are read: its samples of whole
requests are a blind test. What the data say of their units: latencies are milliseconds; ``message_size`` counts elements
of the whole buffer; a decode step attends to its past, ``step``, and to its own token, ``isl``; head counts are those of
one rank, in MLA tables too (times ``tp_size`` they are 64 or 128, and the time depends on them alone).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError, did_you_mean
from meshwright.profiler.importers.aiconfigurator_tables import PackageTables, installed_root
from meshwright.profiler.measurements import CollectiveSamples, Measurements, OperatorSamples

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ENGINES", "SYSTEMS", "read_aiconfigurator"]

SYSTEMS: Mapping[str, str] = {
    "a100_sxm": "a100-sxm-80",
    "a100_pcie": "a100-pcie-80",
    "h100_sxm": "h100-sxm-80",
    "h100_pcie": "h100-pcie-80",
    "h200_sxm": "h200-sxm-141",
    "b200_sxm": "b200-sxm-180",
    "b300_sxm": "b300-sxm-270",
    "gb200": "gb200",
    "gb300": "gb300",
    "l4": "l4",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000-server",
}
"""Our device id by the package's name of a system."""

ENGINES = ("vllm", "sglang", "trtllm")
_WITHOUT_SPEC = ("a30", "b60")
_PRECISIONS: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16"}
# Weight-only and SmoothQuant products (int4_wo, int8_wo, sq) are no operator of ours.
_GEMM_TYPES = (*_PRECISIONS, "fp8", "fp8_block", "mxfp8", "nvfp4")
_MOE_FIELDS: Mapping[str, str] = {
    "num_tokens": "num_tokens",
    "hidden_size": "hidden_size",
    "moe_ffn_hidden_size": "inter_size",
    "top_k": "topk",
    "num_experts": "num_experts",
    "tp": "moe_tp_size",
    "ep": "moe_ep_size",
}
_COLLECTIVES: Mapping[str, str] = {
    "all_gather": "all_gather",
    "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
    "reduce_scatter": "reduce_scatter",
}
# Bytes of one element by NCCL data type, the preferred one first.
_NCCL_BYTES: Mapping[str, float] = {"half": 2.0, "bfloat16": 2.0, "float": 4.0, "int8": 1.0}
# Quick products (5th percentile) that take this many times the 16-bit ones' wait for the host, not for a kernel:
# fp8_block of vllm 0.24.0, 20 to 130 times. fp8 of trtllm, 4.2 to 6.4 times, stays: it includes quantising the input.
_HOST_BOUND = 10.0


def read_aiconfigurator(system: str, engine: str, *, root: Path | None = None) -> Measurements:
    """Return the operator tables of one system and serving engine, and the system's NCCL table.

    Of every table the newest version counts; a supplement to an older operator table, with less than half its rows,
    does not. A GEMM shape measured more than once counts by its median; where several kernels ran one shape of
    attention or MoE, the quickest counts. A number format whose products wait for the host rather than for a kernel is
    left out (``fp8_block`` of vllm 0.24.0), and so are sliding windows and prefills behind a cached prefix.

    Parameters
    ----------
    system : str
        The package's name, a key of :data:`SYSTEMS`.
    engine : str
        Whose kernels, one of :data:`ENGINES`.
    root : Path | None
        Folder ``systems/data`` of the package; that of the installed one when None.

    Raises
    ------
    SpecError
        If the system or engine is unknown or has no tables, or a table is malformed.
    CalibrationError
        If the package, or what reads its tables, is not installed.
    """
    _check(system, engine)
    tables = PackageTables(root=installed_root() if root is None else root, system=system)
    operators = (*_gemm(tables, engine), *_attention(tables, engine), *_moe(tables, engine))
    if not operators:
        there = f"there are those of: {', '.join(tables.owners()) or 'none'}"
        raise SpecError(f"{tables.root / system}: no operator tables of {engine}; {there}")
    return Measurements(
        gpu=SYSTEMS[system],
        kernels=", ".join(dict.fromkeys(each.source.rsplit(", ", 1)[1] for each in operators)),
        operators=operators,
        collectives=tuple(_nccl(tables)),
        attribution=f"{tables.package}, NVIDIA, operator tables",
        licence="Apache-2.0",
        inputs=tuple(tables.inputs),
    )


def _check(system: str, engine: str) -> None:
    known, engines = f"known: {', '.join(SYSTEMS)}", f"known: {', '.join(ENGINES)}"
    if system in _WITHOUT_SPEC:
        raise SpecError(f"system '{system}': there is no spec of this GPU; {known}")
    if system not in SYSTEMS:
        raise SpecError(f"unknown system '{system}'{did_you_mean(system, SYSTEMS)}; {known}")
    if engine not in ENGINES:
        raise SpecError(f"unknown engine '{engine}'{did_you_mean(engine, ENGINES)}; {engines}")


def _gemm(tables: PackageTables, engine: str) -> list[OperatorSamples]:
    table = tables.read(f"gemm/{engine}", "gemm_perf", ("gemm_dtype", "m", "n", "k"))
    if table is None:
        return []
    fields = {name: name for name in ("m", "n", "k")}
    samples = [
        _samples(rows, "gemm", _PRECISIONS.get(name, name), fields, table.source)
        for name, rows in _by_dtype(table.rows, "gemm_dtype")
        if name in _GEMM_TYPES
    ]
    quick = {each.precision: float(np.quantile(each.seconds, 0.05)) for each in samples}
    reference = quick.get("bf16", quick.get("fp16", np.inf))
    return [each for each in samples if quick[each.precision] <= _HOST_BOUND * reference]


def _attention(tables: PackageTables, engine: str) -> Iterator[OperatorSamples]:
    """Yield prefill and decode of plain attention, then of MLA, which has one cache of one width."""
    grouped = ("num_key_value_heads", "head_dim")
    for family, dtype, more in (("attention", "attn_dtype", grouped), ("mla", "mla_dtype", ())):
        for phase, operator, length in (
            ("context", f"{family}_prefill", "sequence_length"),
            ("generation", f"{family}_decode", "context_length"),
        ):
            columns = (dtype, "kv_cache_dtype", "batch_size", "isl", "step", "num_heads", *more)
            optional = ("kernel_source", "window_size")
            table = tables.read(f"{family}/{engine}", f"{phase}_{family}_perf", columns, optional=optional)
            if table is None:
                continue
            rows = _full_attention(table.rows, is_decode=phase == "generation")
            fields = {"batch_size": "batch_size", length: "length", "num_heads": "num_heads"}
            if more:
                fields |= {"num_kv_heads": "num_kv_heads", "head_dim": "head_dim"}
            for precision, part in _by_cache(rows, dtype):
                yield _samples(part, operator, precision, fields, table.source)


def _full_attention(rows: pd.DataFrame, *, is_decode: bool) -> pd.DataFrame:
    """Return the rows that see their whole past, with the length they see and the KV heads spelt out."""
    if "window_size" in rows:
        rows = rows[rows["window_size"] == 0]
    if not is_decode:
        rows = rows[rows["step"] == 0]
    rows = rows.assign(length=rows["step"] + rows["isl"])
    if "num_key_value_heads" in rows:
        heads = rows["num_key_value_heads"]
        rows = rows.assign(num_kv_heads=heads.where(heads > 0, rows["num_heads"]))
    return rows


def _by_cache(rows: pd.DataFrame, dtype: str) -> list[tuple[str, pd.DataFrame]]:
    """Split attention: 16 bits throughout, 16 bits over an fp8 cache, fp8 throughout."""
    is_wide = rows[dtype].isin(_PRECISIONS)
    has_wide_cache = rows["kv_cache_dtype"].isin(_PRECISIONS)
    parts = (
        ("bf16", rows[is_wide & has_wide_cache]),
        ("fp8_kv", rows[is_wide & (rows["kv_cache_dtype"] == "fp8")]),
        ("fp8", rows[rows[dtype] == "fp8"]),
    )
    return [(name, part) for name, part in parts if len(part)]


def _moe(tables: PackageTables, engine: str) -> list[OperatorSamples]:
    columns = ("moe_dtype", "distribution", *_MOE_FIELDS.values())
    table = tables.read(f"moe/{engine}", "moe_perf", columns, optional=("kernel_source",))
    if table is None:
        return []
    fields = {**_MOE_FIELDS, "skew": "skew"}
    known = table.rows.assign(skew=table.rows["distribution"].map(_skew)).dropna(subset=["skew"])
    return [
        _samples(rows, "moe", _PRECISIONS.get(name, name), fields, table.source)
        for name, rows in _by_dtype(known, "moe_dtype")
    ]


def _by_dtype(rows: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    return [(str(name).lower(), part) for name, part in rows.groupby(column, sort=True)]


def _skew(distribution: str) -> float:
    """Return the exponent of a routing distribution, 0 when balanced, nan when unknown."""
    if distribution == "balanced":
        return 0.0
    match = re.fullmatch(r"power_law_(\d+(?:\.\d+)?)", distribution)
    return float(match[1]) if match else float("nan")


def _samples(
    rows: pd.DataFrame, operator: str, precision: str, fields: Mapping[str, str], source: str
) -> OperatorSamples:
    """Return one sample per shape: the median of repeated rows, the quickest of several kernels."""
    columns = list(fields.values())
    kernels = ["kernel_source"] if "kernel_source" in rows else []
    times = rows.groupby([*columns, *kernels], sort=True)["latency"].median()
    if kernels:
        times = times.groupby(level=columns, sort=True).min()
    unique = times.reset_index()
    return OperatorSamples(
        operator=operator,
        precision=precision,
        shape={name: _column(unique, column) for name, column in fields.items()},
        seconds=_column(unique, "latency") * 1e-3,
        source=source,
    )


def _column(rows: pd.DataFrame, name: str) -> NDArray[np.float64]:
    column: NDArray[np.float64] = rows[name].to_numpy(dtype=np.float64)
    return column


def _nccl(tables: PackageTables) -> Iterator[CollectiveSamples]:
    """Yield the curves of each collective and group size in the preferred data type."""
    columns = ("nccl_dtype", "op_name", "num_gpus", "message_size")
    table = tables.read("comm/nccl", "nccl_perf", columns, takes_supplement=True)
    if table is None:
        return
    there = set(table.rows["nccl_dtype"])
    name = next((name for name in _NCCL_BYTES if name in there), "")
    rows = table.rows[(table.rows["nccl_dtype"] == name) & table.rows["op_name"].isin(_COLLECTIVES)]
    for _, part in rows.groupby(["op_name", "num_gpus"], sort=True):
        unique = part.groupby("message_size", sort=True)["latency"].median().reset_index()
        yield CollectiveSamples(
            collective=_COLLECTIVES[str(part["op_name"].iloc[0])],
            ranks=int(part["num_gpus"].iloc[0]),
            num_bytes=_column(unique, "message_size") * _NCCL_BYTES[name],
            seconds=_column(unique, "latency") * 1e-3,
            source=table.source,
        )
