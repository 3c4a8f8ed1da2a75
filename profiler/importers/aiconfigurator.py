"""Operator tables of the installed package ``aiconfigurator-core`` (Apache-2.0), read where they lie.

The package is an optional extra (``meshwright[aiconfigurator]``). Only its operator tables are read; its samples of
whole requests are a blind test for predictions and stay unread. Units, as found in the data and their collectors:
latencies are milliseconds; ``message_size`` counts elements; head counts of MLA tables are those of one rank.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import CalibrationError, SpecError, did_you_mean
from meshwright.profiler.measurements import CollectiveSamples, Measurements, OperatorSamples

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ENGINES", "SYSTEMS", "read_aiconfigurator"]

SYSTEMS: Mapping[str, str] = {
    "a100_sxm": "a100-sxm-80",
    "h100_sxm": "h100-sxm-80",
    "h200_sxm": "h200-sxm-141",
    "b200_sxm": "b200-sxm-180",
    "b300_sxm": "b300-sxm-270",
    "gb200": "gb200",
    "gb300": "gb300",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000-server",
}
"""Our device id by the package's name of a system."""

ENGINES = ("vllm", "sglang", "trtllm")
_PACKAGE = "aiconfigurator_core"
_EXTRA = "pip install 'meshwright[aiconfigurator]'"
_PRECISIONS: Mapping[str, str] = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "nvfp4",
    "int8_wo": "int8_wo",
    "int4_wo": "int4_wo",
    "w4a16_mxfp4": "w4a16_mxfp4",
    "w4a8_mxfp4_mxfp8": "w4a8_mxfp4",
}
_SIXTEEN_BITS = ("bfloat16", "float16")
_MOE_COLUMNS = (
    "num_tokens",
    "hidden_size",
    "inter_size",
    "topk",
    "num_experts",
    "moe_tp_size",
    "moe_ep_size",
)
_MOE_FIELDS = ("num_tokens", "hidden_size", "moe_ffn_hidden_size", "top_k", "num_experts", "tp", "ep")
_COLLECTIVES: Mapping[str, str] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
# A newer table that lost half of the shapes of an older one holds a few new models, not a campaign.
_COMPLETE = 0.5
# An 8-bit table whose fastest product takes this many times the 16-bit one's is bound by the host, not by a kernel.
_HOST_BOUND = 4.0


@dataclass(slots=True)
class _Tables:
    """Where the tables of one system lie, and which files were read."""

    root: Path
    system: str
    release: str
    inputs: list[tuple[str, str, int]] = field(default_factory=list)

    def read(self, family: str, source: str, table: str) -> tuple[pd.DataFrame, str] | None:
        """Return the newest complete version of a table and its version, None where there is none."""
        import pandas as pd

        files = sorted(
            (self.root / self.system / family / source).glob(f"*/{table}.parquet"),
            key=lambda path: _version_key(path.parent.name),
        )
        frames = [(path, pd.read_parquet(path)) for path in files]
        largest = max((len(frame) for _, frame in frames), default=0)
        for path, frame in reversed(frames):
            if len(frame) and len(frame) >= _COMPLETE * largest:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                self.inputs.append((path.relative_to(self.root).as_posix(), digest, len(frame)))
                is_valid = np.isfinite(frame["latency"]) & (frame["latency"] > 0.0)
                return frame[is_valid], path.parent.name
        return None

    def source(self, what: str) -> str:
        """Return the sentence that names a table as a source."""
        return f"aiconfigurator-core {self.release} (Apache-2.0): {what}"


def read_aiconfigurator(system: str, engine: str, *, root: Path | None = None) -> Measurements:
    """Return the operator tables of one system and serving engine, with the NCCL tables of the system.

    Parameters
    ----------
    system : str
        Name of the package, a key of :data:`SYSTEMS`.
    engine : str
        ``vllm``, ``sglang`` or ``trtllm``: whose kernels.
    root : Path | None
        Folder of the tables; that of the installed package when None.

    Raises
    ------
    SpecError
        If the system or engine is unknown, or has no tables.
    CalibrationError
        If the package or what reads its tables is not installed.
    """
    if system not in SYSTEMS:
        raise SpecError(
            f"unknown system '{system}'{did_you_mean(system, SYSTEMS)}; known: {', '.join(SYSTEMS)}"
        )
    if engine not in ENGINES:
        raise SpecError(
            f"unknown engine '{engine}'{did_you_mean(engine, ENGINES)}; known: {', '.join(ENGINES)}"
        )
    folder, release = (root, "") if root is not None else _installed()
    if importlib.util.find_spec("pandas") is None or importlib.util.find_spec("pyarrow") is None:
        raise CalibrationError(f"reading parquet tables needs pandas and pyarrow: {_EXTRA}")
    tables = _Tables(root=folder, system=system, release=release)
    operators = [
        *_gemm(tables, engine),
        *_attention(tables, engine),
        *_mla(tables, engine),
        *_moe(tables, engine),
    ]
    if not operators:
        raise SpecError(f"{folder.name}/{system}: no operator tables of {engine} there")
    versions = dict.fromkeys(source.rsplit(", ", 1)[-1] for source in (each.source for each in operators))
    return Measurements(
        gpu=SYSTEMS[system],
        kernels=", ".join(versions),
        operators=tuple(operators),
        collectives=tuple(_nccl(tables)),
        attribution=f"operator tables of aiconfigurator-core {release}, NVIDIA Corporation and affiliates",
        licence="Apache-2.0",
        inputs=tuple(tables.inputs),
    )


def _installed() -> tuple[Path, str]:
    """Return the folder of the installed tables and the package's version, without importing the package."""
    from importlib.metadata import PackageNotFoundError, version

    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CalibrationError(f"the package aiconfigurator-core is not installed: {_EXTRA}")
    folder = Path(next(iter(spec.submodule_search_locations))) / "systems" / "data"
    try:
        return folder, version("aiconfigurator-core")
    except PackageNotFoundError:
        return folder, ""


def _version_key(text: str) -> tuple[tuple[int, str], ...]:
    """Order versions: 0.24.0 after 0.9.1, release candidates before releases, rc20 after rc9."""
    parts = re.findall(r"\d+|[a-z]+", text.lower())
    key = [(int(part), "") if part.isdigit() else (-1 if part == "rc" else 0, part) for part in parts]
    return (*key, (0, ""))


def _columns(frame: pd.DataFrame, names: Sequence[str]) -> list[NDArray[np.float64]]:
    return [frame[name].to_numpy(dtype=np.float64) for name in names]


def _fastest(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Return one row per shape: the median of repeated rows, the fastest of several kernels."""
    kernels = ["kernel_source"] if "kernel_source" in frame else []
    median = frame.groupby([*keys, *kernels], sort=True, dropna=False)["latency"].median().reset_index()
    return median.groupby(list(keys), sort=True)["latency"].min().reset_index()


def _samples(
    frame: pd.DataFrame,
    operator: str,
    precision: str,
    fields: Sequence[str],
    keys: Sequence[str],
    source: str,
) -> OperatorSamples:
    rows = _fastest(frame, keys)
    return OperatorSamples(
        operator=operator,
        precision=precision,
        shape=dict(zip(fields, _columns(rows, keys), strict=True)),
        seconds=rows["latency"].to_numpy(dtype=np.float64) * 1e-3,
        source=source,
    )


def _gemm(tables: _Tables, engine: str) -> list[OperatorSamples]:
    found = tables.read("gemm", engine, "gemm_perf")
    if found is None:
        return []
    frame, version = found
    keys = ("m", "n", "k")
    samples = [
        _samples(part, "gemm", _PRECISIONS[str(name)], keys, keys, tables.source(f"gemm, {engine} {version}"))
        for name, part in frame.groupby("gemm_dtype", sort=True)
        if str(name) in _PRECISIONS
    ]
    floors = {each.precision: float(np.quantile(each.seconds, 0.05)) for each in samples}
    reference = floors.get("bf16") or floors.get("fp16") or min(floors.values(), default=0.0)
    return [each for each in samples if floors[each.precision] <= _HOST_BOUND * reference]


def _attention(tables: _Tables, engine: str) -> list[OperatorSamples]:
    samples = []
    for table, operator, length in (
        ("context_attention_perf", "attention_prefill", "sequence_length"),
        ("generation_attention_perf", "attention_decode", "context_length"),
    ):
        found = tables.read("attention", engine, table)
        if found is None:
            continue
        frame, version = found
        if "window_size" in frame:
            frame = frame[frame["window_size"] <= 0]
        heads = frame["num_key_value_heads"]
        # A prefill has no past; a decode step attends to its past and itself.
        lengths = frame["isl"] if operator == "attention_prefill" else frame["step"] + 1
        frame = frame.assign(kv_heads=heads.where(heads > 0, frame["num_heads"]), length=lengths)
        keys = ("batch_size", "length", "num_heads", "kv_heads", "head_dim")
        fields = ("batch_size", length, "num_heads", "num_kv_heads", "head_dim")
        what = tables.source(f"{table.removesuffix('_perf')}, {engine} {version}")
        for precision, part in _by_cache_format(frame, "attn_dtype"):
            samples.append(_samples(part, operator, precision, fields, keys, what))
    return samples


def _mla(tables: _Tables, engine: str) -> list[OperatorSamples]:
    samples = []
    for table, operator, length in (
        ("context_mla_perf", "mla_prefill", "sequence_length"),
        ("generation_mla_perf", "mla_decode", "context_length"),
    ):
        found = tables.read("mla", engine, table)
        if found is None:
            continue
        frame, version = found
        frame = frame.assign(length=frame["isl"] if operator == "mla_prefill" else frame["step"] + 1)
        what = tables.source(f"{table.removesuffix('_perf')}, {engine} {version}")
        for precision, part in _by_cache_format(frame, "mla_dtype"):
            fields = ("batch_size", length, "num_heads")
            keys = ("batch_size", "length", "num_heads")
            samples.append(_samples(part, operator, precision, fields, keys, what))
    return samples


def _by_cache_format(frame: pd.DataFrame, dtype: str) -> list[tuple[str, pd.DataFrame]]:
    """Split attention rows: 16 bits throughout, 16 bits over an fp8 KV cache, fp8 throughout."""
    wide = frame[dtype].isin(_SIXTEEN_BITS)
    wide_cache = frame["kv_cache_dtype"].isin(_SIXTEEN_BITS)
    parts = [
        ("bf16", frame[wide & wide_cache]),
        ("fp8_kv", frame[wide & (frame["kv_cache_dtype"] == "fp8")]),
        ("fp8", frame[frame[dtype] == "fp8"]),
    ]
    return [(name, part) for name, part in parts if len(part)]


def _moe(tables: _Tables, engine: str) -> list[OperatorSamples]:
    found = tables.read("moe", engine, "moe_perf")
    if found is None:
        return []
    frame, version = found
    skew = frame["distribution"].map(
        {name: _skew(str(name)) for name in frame["distribution"].unique()}  # "power_law_1.2" -> 1.2
    )
    frame = frame.assign(skew=skew).dropna(subset=["skew"])
    what = tables.source(f"moe, {engine} {version}")
    return [
        _samples(part, "moe", _PRECISIONS[str(name)], (*_MOE_FIELDS, "skew"), (*_MOE_COLUMNS, "skew"), what)
        for name, part in frame.groupby("moe_dtype", sort=True)
        if str(name) in _PRECISIONS
    ]


def _skew(distribution: str) -> float | None:
    """Return the exponent of a routing distribution: 0 when balanced, None when unknown."""
    match = re.fullmatch(r"power_law_([0-9.]+)", distribution)
    if match:
        return float(match[1])
    return 0.0 if distribution == "balanced" else None


def _nccl(tables: _Tables) -> list[CollectiveSamples]:
    found = tables.read("comm", "nccl", "nccl_perf")
    if found is None:
        return []
    frame, version = found
    half = frame[frame["nccl_dtype"] == "half"]
    samples = []
    for (name, ranks), part in half.groupby(["op_name", "num_gpus"], sort=True):
        rows = part.groupby("message_size", sort=True)["latency"].median().reset_index()
        if str(name) in _COLLECTIVES:
            sizes, latencies = _columns(rows, ("message_size", "latency"))
            samples.append(
                CollectiveSamples(
                    collective=_COLLECTIVES[str(name)],
                    ranks=int(ranks),
                    num_bytes=2.0 * sizes,  # elements of 16 bits
                    seconds=latencies * 1e-3,
                    source=tables.source(f"NCCL {version} on one node"),
                )
            )
    return samples
