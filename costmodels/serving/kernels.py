"""Kernels of a serving engine on a device: the shipped calibration, overlaid with what serving alone runs.

The overlays lie in ``kernels/GPU.ENGINE.json`` in the form of a calibration, fitted by
:mod:`meshwright.profiler.serving_kernels` to public operator tables; ``kernels/all_reduce.json`` holds the engines'
one-shot all-reduce as measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration import CollectiveTable, DeviceCalibration
from meshwright.costmodels.calibration_choice import load_device_calibration, read_device_calibrations
from meshwright.costmodels.calibration_document import device_rates
from meshwright.costmodels.calibration_reading import (
    check_header,
    parse_calibration,
    read_calibration,
)
from meshwright.costmodels.operators import OperatorModel, Shape
from meshwright.errors import CalibrationError
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.hardware_specs.json_document import read_document
from meshwright.hardware_specs.specs import GpuSpec, NodeSpec

__all__ = ["ExpertTable", "ServingKernels", "load_serving_kernels"]

# Devices that stand for their architecture where a device has no tables of its own.
_REPRESENTATIVES: Mapping[str, str] = {"hopper": "h100-sxm-80", "blackwell": "b200-sxm-180"}
# Widest expert parallelism in the tables beside tensor parallelism.
_MOST_EXPERT_RANKS = 16.0
# Formats in which engines share kernels but time them unlike.
_SHARED_FORMATS = ("fp8", "fp8_block")
# Engines whose own tables of experts count where they have one. SGLang's is of the kernels it runs, FlashInfer's on
# Blackwell and Triton's on Hopper: experts spread over ranks take it two to three times TensorRT-LLM's on prompts.
_OWN_EXPERTS = ("sglang",)
# Formats to borrow from, in this order, where an engine has no kernel of a format.
_EXPERT_FORMATS: Mapping[str, tuple[str, ...]] = {
    "fp8": ("fp8_block",),
    "fp8_block": ("fp8",),
    "nvfp4": ("w4a8_mxfp4_mxfp8", "w4a16_mxfp4", "int4_wo", "fp8_block"),
    "w4a8_mxfp4_mxfp8": ("w4a16_mxfp4", "nvfp4", "int4_wo"),
    "w4a16_mxfp4": ("w4a8_mxfp4_mxfp8", "int4_wo"),
    "int4_wo": ("w4a16_mxfp4",),
    "mxfp8": ("fp8_block", "fp8"),
    "int8": ("fp8", "fp8_block"),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertTable:
    """Experts of one model and split: a curve fitted to their measured times, straight in log-log between its knots.

    Parameters
    ----------
    num_tokens, seconds : NDArray[np.float64]
        Tokens that enter the layer, ascending; time [s].
    """

    num_tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]

    def time(self, num_tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the time of each count [s]: flat below the table, proportional above."""
        log_tokens = np.log(num_tokens)
        inside = np.interp(log_tokens, np.log(self.num_tokens), np.log(self.seconds))
        beyond = np.maximum(0.0, log_tokens - np.log(self.num_tokens[-1]))
        seconds: NDArray[np.float64] = np.exp(inside + beyond)
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingKernels:
    """Operator models and collectives that one engine runs on one device.

    Parameters
    ----------
    calibration : DeviceCalibration
        Collectives of NCCL and everything the overlay lacks.
    operators : Mapping[str, OperatorModel]
        By ``OPERATOR.FORMAT``, overlay first.
    all_reduce : Mapping[int, CollectiveTable]
        One-shot all-reduce replayed from a graph, by group size; empty where nobody measured it.
    fused_all_reduce : Mapping[int, CollectiveTable]
        TensorRT-LLM's, which other engines run through FlashInfer where they fuse residual and norm with it.
    expert_tables : Mapping[tuple[str, tuple[int, ...]], ExpertTable]
        Routed experts of published models, a fitted curve each: seconds over tokens, by format and ``(hidden size, expert
        width, top k, experts, moe_tp, ep)``.
    other_gemms : Mapping[str, tuple[OperatorModel, ...]]
        Products of other engines by format, for formats whose own table may time more than the kernel.
    memo : dict[tuple[object, ...], NDArray[np.float64]]
        Times computed so far.
    """

    calibration: DeviceCalibration
    operators: Mapping[str, OperatorModel]
    all_reduce: Mapping[int, CollectiveTable]
    fused_all_reduce: Mapping[int, CollectiveTable] = field(default_factory=dict)
    expert_tables: Mapping[tuple[str, tuple[int, ...]], ExpertTable] = field(default_factory=dict)
    other_gemms: Mapping[str, tuple[OperatorModel, ...]] = field(default_factory=dict)
    memo: dict[tuple[object, ...], NDArray[np.float64]] = field(default_factory=dict, repr=False)

    def gemm_time(self, precision: str, shape: Shape) -> NDArray[np.float64]:
        """Return matrix products [s]; in 8 bits at most what the quickest engine's kernel takes.

        The 8-bit tables of some engines time the host or a quantisation that others fuse: floors of 12 us for fp8 of
        TensorRT-LLM 1.3.0rc20 against 5 us, 33 us of vLLM 0.24.0 on B200 for one row against 18 us for 64.
        """

        def quickest() -> NDArray[np.float64]:
            seconds = self.gemm(precision).time(shape)
            for other in self.other_gemms.get(precision, ()):
                seconds = np.minimum(seconds, other.time(shape))
            return seconds

        return self.remembered(f"gemm.{precision}", shape, quickest)

    def attention_time(self, kind: str, kv_precision: str, shape: Shape) -> NDArray[np.float64]:
        """Return an attention kernel (``attention_decode``, ``mla_prefill``, ...) over a cache of a format [s]."""
        model = self.attention(kind, kv_precision)
        return self.remembered(f"{kind}.{kv_precision}", shape, lambda: model.time(shape))

    def remembered(
        self, name: str, shape: Shape, compute: Callable[[], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Return what was computed before under this name for these cases; a search asks again and again."""
        key = (name, *(np.ascontiguousarray(shape[field]).tobytes() for field in sorted(shape)))
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def gemm(self, precision: str) -> OperatorModel:
        """Return the matrix products of a format: its own, fp8's for 8-bit formats, else 16 bits."""
        narrow = "fp8" if precision in ("fp8", "fp8_block", "mxfp8", "int8") else "bf16"
        for name in (f"gemm.{precision}", f"gemm.{narrow}"):
            if name in self.operators:
                return self.operators[name]
        return self.operators["gemm.bf16"]

    def expert_time(self, precision: str, shape: Shape) -> NDArray[np.float64]:
        """Return the routed experts of one layer [s]; all cases are of one model and split.

        Published models have curves of their own; a split that was not measured takes one with as many ranks,
        other models the fit over all of them.
        """
        fields = ("hidden_size", "moe_ffn_hidden_size", "top_k", "num_experts")
        model = tuple(int(shape[name][0]) for name in fields)
        tp, ep = int(shape["tp"][0]), int(shape["ep"][0])
        for name in (precision, *_EXPERT_FORMATS.get(precision, ())):
            table = self.expert_tables.get((name, (*model, tp, ep)))
            if table is not None:
                return table.time(shape["num_tokens"])
            if f"moe.{name}" in self.operators:
                break
        local = _at_measured_split(shape)
        return self.remembered(f"moe.{precision}", local, lambda: self.experts(precision).time(local))

    def experts(self, precision: str) -> OperatorModel:
        """Return the experts' kernel of a format, or of the nearest one measured.

        Raises
        ------
        CalibrationError
            If no format of experts was measured on the device.
        """
        for name in (precision, *_EXPERT_FORMATS.get(precision, ()), "bf16"):
            if f"moe.{name}" in self.operators:
                return self.operators[f"moe.{name}"]
        raise CalibrationError(
            f"calibration {self.calibration.id} has no mixture-of-experts kernel; calibrate one with "
            "'meshwright calibrate --from aiconfigurator'"
        )

    def attention(self, kind: str, kv_precision: str) -> OperatorModel:
        """Return an attention kernel (``attention_decode``, ``mla_prefill``, ...) over a cache of a format.

        Raises
        ------
        CalibrationError
            If the kernel was not measured on the device.
        """
        cache_format = "fp8_kv" if "fp8" in kv_precision else "bf16"
        for name in (f"{kind}.{cache_format}", f"{kind}.bf16", f"{kind}.fp8_kv"):
            if name in self.operators:
                return self.operators[name]
        raise CalibrationError(
            f"calibration {self.calibration.id} has no {kind} kernel; calibrate one with "
            "'meshwright calibrate --from aiconfigurator'"
        )


def load_serving_kernels(
    gpu: GpuSpec, node: NodeSpec | None, engine: str, paths: Sequence[Path] = ()
) -> ServingKernels:
    """Return the kernels of an engine on a device.

    Parameters
    ----------
    gpu, node : GpuSpec, NodeSpec | None
        The device and where it sits.
    engine : str
        ``vllm``, ``sglang`` or ``trtllm``.
    paths : Sequence[Path]
        The user's calibrations; they win over everything built in.
    """
    shipped = load_device_calibration(gpu, node, engine=engine)
    lender = gpu.id if _has(gpu.id, engine) else _REPRESENTATIVES.get(gpu.architecture, "")
    operators = dict(shipped.operators)
    if _has(lender, engine):
        operators |= {
            name: replace(model, rates=device_rates(gpu, model.operator.name, model.precision))
            for name, model in _overlay(lender, engine).items()
        }
    own = _given_operators(paths, gpu)
    if paths:
        given = read_device_calibrations(paths, gpu, node)
        operators |= own
        shipped = replace(
            shipped,
            id=given.id,
            digest=given.digest,
            reason=given.reason,
            collectives=given.collectives,
            software=given.software,
        )
    return ServingKernels(
        calibration=shipped,
        operators=operators,
        all_reduce=_all_reduce().get((lender, engine), {}),
        fused_all_reduce=_all_reduce().get((lender, "trtllm"), {}),
        # Times of another device of the architecture would not scale with its memory: those take the fits.
        expert_tables=_expert_tables(lender, engine) if lender == gpu.id and not _holds(own, "moe.") else {},
        other_gemms={} if _holds(own, "gemm.") else _other_gemms(gpu, lender, engine),
    )


def _other_gemms(gpu: GpuSpec, lender: str, engine: str) -> Mapping[str, tuple[OperatorModel, ...]]:
    others = [name for name in ("vllm", "sglang", "trtllm") if name != engine and _has(lender, name)]
    found: dict[str, tuple[OperatorModel, ...]] = {}
    for precision in _SHARED_FORMATS:
        models = [_engine_gemm(lender, name, precision) for name in others]
        found[precision] = tuple(
            replace(model, rates=device_rates(gpu, model.operator.name, model.precision))
            for model in models
            if model is not None
        )
    return found


@cache
def _engine_gemm(device: str, engine: str, precision: str) -> OperatorModel | None:
    name = f"gemm.{precision}"
    own = _overlay(device, engine).get(name)
    if own is not None or engine != "vllm":
        return own
    return load_device_calibration(load_gpu(device), engine=engine).operators.get(name)


@cache
def _expert_tables(device: str, engine: str) -> Mapping[tuple[str, tuple[int, ...]], ExpertTable]:
    """Return the tables of an engine, and in 8 bits the quickest of all engines' unless its own is what it runs.

    TensorRT-LLM's table of fp8_block on Blackwell is of a kernel at half the memory's bandwidth, which its engine does
    not run; vLLM and SGLang time the one it does (FlashInfer's, of TensorRT-LLM's making).
    """
    document = json.loads((_folder() / f"{device}.experts.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, tuple[int, ...]], ExpertTable] = {}
    for owner in (engine, *(name for name in document if name != engine)):
        for precision, models in document[owner].items():
            for model, splits in models.items():
                for split, table in splits.items():
                    key = (precision, tuple(int(part) for part in f"{model}x{split}".split("x")))
                    measured = ExpertTable(
                        num_tokens=np.array(table["num_tokens"], dtype=np.float64),
                        seconds=np.array(table["microseconds"], dtype=np.float64) * 1e-6,
                    )
                    if owner == engine or key not in found:
                        found[key] = measured
                    elif precision in _SHARED_FORMATS and not _runs_own_experts(engine, key[1][-1]):
                        found[key] = _quicker(found[key], measured)
    return found


def _runs_own_experts(engine: str, ep: int) -> bool:
    """Whether an engine's own table is of the kernel it runs; over many ranks DeepEP's takes its place."""
    return engine in _OWN_EXPERTS and ep < _MOST_EXPERT_RANKS


def _quicker(first: ExpertTable, second: ExpertTable) -> ExpertTable:
    tokens = np.union1d(first.num_tokens, second.num_tokens)
    return ExpertTable(num_tokens=tokens, seconds=np.minimum(first.time(tokens), second.time(tokens)))


def _at_measured_split(shape: Shape) -> Shape:
    """Return an exchange over more ranks than were measured as one over fewer, with as many rows and experts a rank."""
    share = _MOST_EXPERT_RANKS / float(shape["ep"][0])
    if share >= 1.0:
        return shape
    return {
        **shape,
        "num_tokens": shape["num_tokens"] * share,
        "num_experts": shape["num_experts"] * share,
        "ep": np.full_like(shape["ep"], _MOST_EXPERT_RANKS),
    }


def _given_operators(paths: Sequence[Path], gpu: GpuSpec) -> Mapping[str, OperatorModel]:
    """Return the operators of the user's files for a device; later files win."""
    names = (gpu.id, *(alias.lower() for alias in gpu.aliases))
    found: dict[str, OperatorModel] = {}
    for path in paths:
        section = read_document(path)
        check_header(section)
        if section.text("gpu").lower() in names:
            found |= read_calibration(section, gpu, "").operators
    return found


def _holds(operators: Mapping[str, OperatorModel], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in operators)


def _has(device: str, engine: str) -> bool:
    return bool(device) and (_folder() / f"{device}.{engine}.json").is_file()


def _folder() -> Path:
    return Path(str(files("meshwright.costmodels.serving") / "kernels"))


@cache
def _overlay(device: str, engine: str) -> Mapping[str, OperatorModel]:
    file = f"{device}.{engine}.json"
    text = (_folder() / file).read_text(encoding="utf-8")
    return parse_calibration(text, file, load_gpu(device)).operators


@cache
def _all_reduce() -> Mapping[tuple[str, str], Mapping[int, CollectiveTable]]:
    """Return the measured tables by device and engine, then by group size; graph launches only.

    An eager launch waits for the host (20 to 30 us whatever the size): the steps that pay it are bounded by the
    engine's own host time.
    """
    document = json.loads((_folder() / "all_reduce.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, str], Mapping[int, CollectiveTable]] = {}
    for device, engines in document.items():
        for engine, kinds in engines.items():
            sizes = cast("Mapping[str, Mapping[str, list[float]]]", kinds.get("graph", {}))
            found[device, engine] = {
                int(ranks): CollectiveTable(
                    num_bytes=np.array(table["num_bytes"], dtype=np.float64),
                    seconds=np.array(table["microseconds"], dtype=np.float64) * 1e-6,
                )
                for ranks, table in sizes.items()
            }
    return found
