"""From measurements of one device to its calibration document."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from meshwright.costmodels.calibration import AttentionCurve
from meshwright.costmodels.calibration_document import CalibrationDocument, Provenance, device_rates
from meshwright.costmodels.operators import OPERATORS, OperatorModel
from meshwright.errors import CalibrationError
from meshwright.hardware_specs.specs import GpuSpec
from meshwright.profiler.fitting.attention import fit_attention_curve
from meshwright.profiler.fitting.collectives import BUS_FACTORS, fit_collectives
from meshwright.profiler.fitting.layers import LayerComparison, compare_layers
from meshwright.profiler.fitting.operator import FitSettings, fit_operator, num_samples_needed
from meshwright.profiler.fitting.residual import unbaked
from meshwright.profiler.measurements import MeasuredConstant, Measurements, OperatorSamples

__all__ = ["CalibrationResult", "calibrate"]

# Backward layouts measured with fewer shapes than this keep the forward's residual over a roofline of their own.
_OWN_RESIDUAL = 200
_LAYOUTS = ("gemm_dgrad", "gemm_wgrad")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationResult:
    """A calibration, what was measured and is not in it, and measured layers beside the sum of their operators."""

    document: CalibrationDocument
    notes: tuple[str, ...] = ()
    layers: tuple[LayerComparison, ...] = ()


def calibrate(
    measurements: Measurements,
    gpu: GpuSpec,
    settings: FitSettings | None = None,
    *,
    name: str = "calibration",
) -> CalibrationResult:
    """Return everything the measurements tell of a device.

    Parameters
    ----------
    measurements : Measurements
        Of this device.
    gpu : GpuSpec
        Its data sheet.
    settings : FitSettings | None
        Defaults when None.
    name : str
        Name of the document.

    Raises
    ------
    CalibrationError
        If nothing can be fitted: says how many more shapes are needed.
    """
    # For systems of a few hundred shapes the threads wait for one another longer than they solve: on two busy cores half
    # of a calibration.
    with threadpool_limits(1, user_api="blas"):
        operators, notes = _fit_operators(measurements, gpu, settings or FitSettings())
    constants = measurements.constants
    link = (gpu.scale_up or gpu.host_link).bandwidth_bytes_per_second
    try:
        collectives = fit_collectives(measurements.collectives, link)
    except CalibrationError as error:
        # A profile that ran out of time among its collectives still tells everything else.
        if not operators and not constants:
            raise
        collectives, notes = {}, (*notes, str(error))
    if not operators and not collectives and not constants:
        raise CalibrationError("; ".join(notes) or _nothing(measurements))
    attention = _attention_curves(measurements)
    sources = {key.split(".")[0]: constant.source for key, constant in constants.items()}
    for samples in measurements.operators:
        if samples.operator == "attention_prefill" and attention:
            sources.setdefault("attention", samples.source)
    if collectives:
        sources["collectives"] = measurements.collectives[0].source
    software = _under(constants, "software.all.")
    document = CalibrationDocument(
        name=name,
        gpu=gpu.id,
        provenance=Provenance(
            created_by=f"meshwright {importlib.metadata.version('meshwright')}",
            kernels=measurements.kernels,
            attribution=measurements.attribution,
            licence=measurements.licence,
            inputs=measurements.inputs,
        ),
        operators=operators,
        sustained_clock=_under(constants, "sustained_clock."),
        memory_stream_efficiency=_under(constants, "memory_stream.").get("efficiency"),
        attention=attention,
        attention_backward_efficiency=_under(constants, "attention.").get("backward_efficiency"),
        collectives=collectives,
        software={"all": software} if software else {},
        sources=sources,
    )
    layers, not_compared = compare_layers(measurements.layers, operators)
    return CalibrationResult(
        document=document, notes=(*notes, *_unused(measurements), *not_compared), layers=layers
    )


def _unused(measurements: Measurements) -> Iterator[str]:
    """Yield what was measured that no part of a calibration takes."""
    constants = [name for name in measurements.constants if not _is_part(name)]
    if constants:
        yield f"{', '.join(constants)}: no cost model takes {'it' if len(constants) == 1 else 'them'}"
    by_name: dict[str, int] = defaultdict(int)
    for samples in measurements.collectives:
        if samples.collective not in BUS_FACTORS:
            by_name[samples.collective] += len(samples.seconds)
    for name, count in by_name.items():
        yield f"{name}: {count} samples; collectives of other kinds than {', '.join(BUS_FACTORS)} are not fitted"


def _is_part(constant: str) -> bool:
    names = ("memory_stream.efficiency", "attention.backward_efficiency")
    return constant in names or constant.startswith(("sustained_clock.", "software.all."))


def _fit_operators(
    measurements: Measurements, gpu: GpuSpec, settings: FitSettings
) -> tuple[Mapping[str, OperatorModel], tuple[str, ...]]:
    fitted: dict[str, OperatorModel] = {}
    notes = []
    # The gradient layouts lean on the forward one.
    for samples in sorted(measurements.operators, key=lambda each: each.operator in _LAYOUTS):
        rates = device_rates(gpu, samples.operator, samples.precision)
        forward = fitted.get(f"gemm.{samples.precision}")
        try:
            if samples.operator in _LAYOUTS and forward and len(samples.seconds) < _OWN_RESIDUAL:
                fitted[samples.name] = _few_gradients(samples, forward, settings)
            else:
                fitted[samples.name] = fit_operator(samples, rates, settings)
        except CalibrationError as error:
            notes.append(str(error))
    return fitted, tuple(notes)


def _few_gradients(samples: OperatorSamples, forward: OperatorModel, settings: FitSettings) -> OperatorModel:
    """Return a gradient layout's roofline under the forward layout's residual, or bare where that errs less.

    Where the layouts run kernels of their own (fp16 on a processor) they share no residual.
    """
    bare = fit_operator(samples, forward.rates, replace(settings, with_residual=False))
    shared = _under_forward_residual(samples, forward, settings)
    assert bare.error is not None
    assert shared.error is not None
    return bare if bare.error.mean < shared.error.mean else shared


def _under_forward_residual(
    samples: OperatorSamples, forward: OperatorModel, settings: FitSettings
) -> OperatorModel:
    """Return a gradient layout's own roofline under the forward layout's residual."""
    shared = unbaked(forward).log_correction(samples.shape)
    flattened = replace(samples, seconds=samples.seconds / np.exp(shared))
    model = fit_operator(flattened, forward.rates, replace(settings, with_residual=False))
    layout = replace(
        model, residual=forward.residual, box=forward.box, source=f"{samples.source}; residual of gemm"
    )
    if model.error is None:
        return layout
    plain = np.abs(model.time(samples.shape) / samples.seconds - 1.0)
    return replace(layout, error=replace(model.error, roofline=float(plain.mean())))


def _attention_curves(measurements: Measurements) -> Mapping[str, AttentionCurve]:
    """Return the curve of the kernel that was measured: the one tuned to the architecture."""
    for samples in measurements.operators:
        if samples.name in ("attention_prefill.bf16", "attention_prefill.fp16"):
            curve = fit_attention_curve(samples)
            if curve is not None:
                return {"flash_3": curve}
    return {}


def _under(constants: Mapping[str, MeasuredConstant], prefix: str) -> dict[str, float]:
    """Return the constants below a dotted prefix by the rest of their names."""
    return {
        key.removeprefix(prefix): constant.value
        for key, constant in constants.items()
        if key.startswith(prefix)
    }


def _nothing(measurements: Measurements) -> str:
    needed = num_samples_needed(OPERATORS["gemm"])
    return (
        f"nothing to calibrate {measurements.gpu} with: no operator, constant or collective of a known bus "
        f"bandwidth ({', '.join(BUS_FACTORS)}) was measured; "
        f"profile at least {needed} shapes of one operator"
    )
