"""Read a calibration file, JSON or YAML, checking everything a hand or another program may have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration import AttentionCurve, CollectiveCurve, CollectiveTable
from meshwright.costmodels.calibration_document import (
    SCHEMA_VERSION,
    CalibrationDocument,
    Provenance,
    device_rates,
)
from meshwright.costmodels.operators import (
    OPERATORS,
    DeviceRates,
    Operator,
    OperatorError,
    OperatorModel,
    RbfResidual,
    Residual,
    RooflineCurve,
    StackedResidual,
    TreeResidual,
)
from meshwright.costmodels.operators.model import REGIMES
from meshwright.costmodels.operators.trees import MAX_LEAVES
from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.json_document import parse_document
from meshwright.hardware_specs.specs import GpuSpec
from meshwright.hardware_specs.yaml_document import Section
from meshwright.units import Kind

__all__ = ["check_header", "parse_calibration", "read_calibration"]

_CLOCKS = ("bf16", "fp8")
_FLASH = ("flash_2", "flash_3")
_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
# No size reaches 2 ** 64, four octaves of coordinate each (see attention's width); a grid beyond would not fit.
_MAX_COORDINATE = 256.0


def parse_calibration(text: str, name: str, gpu: GpuSpec) -> CalibrationDocument:
    """Return a calibration document, priced against a device's data sheet.

    Parameters
    ----------
    text : str
        JSON where ``name`` ends in ``.json``, else YAML.
    name : str
        File name, for messages and for the document's name.
    gpu : GpuSpec
        The device that uses the numbers: the one measured, or one that borrows from it.

    Raises
    ------
    SpecError
        If the text is malformed, of another kind, or of a schema version this release does not read.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    return read_calibration(parse_document(text, name), gpu, digest)


def read_calibration(section: Section, gpu: GpuSpec, digest: str = "") -> CalibrationDocument:
    """Return the document of a parsed file; see :func:`parse_calibration`."""
    check_header(section)
    section.optional_text("written_by")
    # Of built-in files: whom else the calibration serves (see calibration_choice).
    section.optional_text("architecture")
    section.boolean("represents_architecture", default=False)
    section.texts("covers")
    sources: dict[str, str] = {}
    operators = {
        key: _read_operator(part, key, gpu) for key, part in _named_sections(section, "operators").items()
    }
    clock = _optional(section, "sustained_clock", sources)
    stream = _optional(section, "memory_stream", sources)
    attention = _optional(section, "attention", sources)
    collectives = _optional(section, "collectives", sources)
    document = CalibrationDocument(
        name=section.file.rsplit("/", 1)[-1].removesuffix(".json").removesuffix(".yaml"),
        gpu=section.text("gpu"),
        digest=digest,
        estimate=section.optional_text("estimate"),
        provenance=_read_provenance(section.optional_section("provenance")),
        operators=operators,
        sustained_clock={key: _positive(clock, key) for key in _CLOCKS if clock.has(key)} if clock else {},
        memory_stream_efficiency=_positive(stream, "efficiency") if stream else None,
        attention=_read_attention(attention) if attention else {},
        attention_backward_efficiency=_optional_positive(attention, "backward_efficiency")
        if attention
        else None,
        collectives=_read_collectives(collectives) if collectives else {},
        software={
            key: {field_name: part.number(field_name) for field_name in part if field_name != "source"}
            for key, part in _named_sections(section, "software").items()
        },
        sources={**sources, **{key: model.source for key, model in operators.items()}},
    )
    for part in _named_sections(section, "software").values():
        part.optional_text("source")
    for read in (clock, stream, attention, collectives, section):
        _close(read)
    return document


def check_header(section: Section) -> None:
    """Raise unless a file says it is a calibration of the version this release reads."""
    if section.optional_text("kind") != "calibration":
        raise SpecError(
            f"{section.file}: is not a calibration (kind: calibration is missing); "
            "make one with 'meshwright calibrate'"
        )
    version = section.integer("schema_version")
    if version != SCHEMA_VERSION:
        raise section.error(
            "schema_version", f"this release reads version {SCHEMA_VERSION}, not {version}; calibrate again"
        )


def _named_sections(section: Section, key: str) -> Mapping[str, Section]:
    parent = section.optional_section(key)
    return {} if parent is None else {name: parent.section(name) for name in parent}


def _optional(section: Section, key: str, sources: dict[str, str]) -> Section | None:
    part = section.optional_section(key)
    if part is not None:
        sources[key] = part.text("source")
    return part


def _positive(section: Section, key: str) -> float:
    value = section.number(key)
    if value <= 0.0:
        raise section.error(key, f"must be above zero, not {value}")
    return value


def _positive_quantity(section: Section, key: str, kind: Kind) -> float:
    value = section.quantity(key, kind)
    if value <= 0.0:
        raise section.error(key, "must be above zero")
    return value


def _optional_positive(section: Section, key: str) -> float | None:
    return _positive(section, key) if section.has(key) else None


def _close(section: Section | None) -> None:
    """Reject keys of a part that nobody read."""
    if section is not None:
        section.close()


def _read_provenance(section: Section | None) -> Provenance:
    if section is None:
        return Provenance()
    provenance = Provenance(
        created_by=section.text("created_by", default=""),
        kernels=section.text("kernels", default=""),
        attribution=section.text("attribution", default=""),
        licence=section.text("licence", default=""),
        inputs=tuple(
            (item.text("name"), item.text("sha256"), item.integer("rows"))
            for item in section.sections("inputs")
        ),
    )
    for part in (*section.sections("inputs"), section):
        part.close()
    return provenance


def _read_operator(section: Section, key: str, gpu: GpuSpec) -> OperatorModel:
    name, _, precision = key.partition(".")
    if name not in OPERATORS or not precision:
        raise section.error(
            "", f"unknown operator '{name}'{did_you_mean(name, OPERATORS)}; write OPERATOR.PRECISION"
        )
    operator = OPERATORS[name]
    known = [parameter.name for parameter in operator.parameters]
    given = section.optional_section("parameters")
    if known and given is None:
        raise section.error("parameters", f"lacks {', '.join(known)}")
    rates = device_rates(gpu, name, precision)
    box = section.numbers("box")
    residual = section.optional_section("residual")
    width = operator.num_dims + 1
    if (residual is None) != (not box) or (box and len(box) != 2 * width):
        raise section.error("box", f"a residual needs the 2 x {width} bounds of what was sampled")
    if any(low > high for low, high in zip(box[:width], box[width:], strict=True)):
        raise section.error("box", "lower bounds come first, then as many upper ones")
    interval = section.optional_section("interval")
    error = section.optional_section("error")
    model = OperatorModel(
        operator=operator,
        precision=precision,
        rates=rates,
        curve=RooflineCurve(
            launch_time=section.quantity("launch_time", "seconds"),
            compute_efficiency=_positive(section, "compute_efficiency"),
            memory_efficiency=_positive(section, "memory_efficiency"),
            exponent=_positive(section, "exponent"),
        ),
        parameters={} if given is None else {each: given.number(each) for each in known},
        residual=None if residual is None else _read_residual(residual, operator, rates),
        box=np.array(box).reshape(2, width) if box else None,
        intervals={} if interval is None else {regime: _band(interval, regime) for regime in REGIMES},
        error=_read_error(error),
        source=section.text("source"),
    )
    for part in (given, interval, error, section):
        _close(part)
    return model


def _band(section: Section, regime: str) -> tuple[float, float]:
    band = section.numbers(regime)
    if len(band) != 2 or band[0] > band[1]:
        raise section.error(regime, "write [P10, P90] of log(measured / predicted), lower one first")
    return band[0], band[1]


def _read_error(section: Section | None) -> OperatorError | None:
    if section is None:
        return None
    numbers = {
        key.name: section.number(key.name) for key in fields(OperatorError) if key.name != "num_points"
    }
    return OperatorError(num_points=section.integer("num_points"), **numbers)


def _read_residual(
    section: Section, operator: Operator, rates: DeviceRates, *, is_part: bool = False
) -> Residual:
    kind = section.choice("kind", ("rbf", "trees") if is_part else ("rbf", "trees", "stacked"))
    residual: Residual
    if kind == "stacked":
        parts, weights = section.sections("parts"), section.numbers("weights")
        if len(parts) != len(weights):
            raise section.error("weights", f"must be one for each of the {len(parts)} parts")
        residual = StackedResidual(
            parts=tuple(_read_residual(part, operator, rates, is_part=True) for part in parts),
            weights=weights,
        )
    elif kind == "trees":
        residual = _read_trees(section, operator, rates)
    else:
        residual = _read_rbf(section, operator)
    section.close()
    return residual


def _read_rbf(section: Section, operator: Operator) -> RbfResidual:
    num_dims = operator.num_dims
    centres, weights = np.array(section.numbers("centres")), np.array(section.numbers("weights"))
    if len(weights) == 0 or len(centres) != num_dims * len(weights):
        raise section.error("centres", f"must hold {num_dims} numbers for each of the {len(weights)} weights")
    if np.abs(centres).max() > _MAX_COORDINATE:
        raise section.error("centres", "are log2 of sizes; the file was changed, calibrate again")
    return RbfResidual(
        centres=centres.reshape(-1, num_dims),
        weights=weights,
        offset=section.number("offset"),
        is_baked=operator.is_bakeable,
    )


def _read_trees(section: Section, operator: Operator, rates: DeviceRates) -> TreeResidual:
    def indices(key: str) -> NDArray[np.int64]:
        values = np.array(section.numbers(key), dtype=np.float64)
        if (np.abs(values) > 2**31).any() or (values != np.floor(values)).any():
            raise section.error(key, "must be whole numbers; the file was changed, calibrate again")
        return values.astype(np.int64)

    trees = TreeResidual(
        roots=indices("roots"),
        feature=indices("feature"),
        threshold=np.array(section.numbers("threshold")),
        left=indices("left"),
        right=indices("right"),
        value=np.array(section.numbers("value")),
        offset=section.number("offset"),
    )
    num_nodes = len(trees.feature)
    nodes = np.arange(num_nodes)
    is_inner = trees.left >= 0
    ones = {name: np.ones(1) for name in operator.fields}
    num_steps = 0 if operator.steps is None else operator.steps(ones, rates).shape[1]
    # Children come after their one parent, so that no file can make an endless loop; compiled loops check no bounds.
    if (
        {len(trees.threshold), len(trees.left), len(trees.right), len(trees.value)} != {num_nodes}
        or (is_inner & ((trees.left <= nodes) | (trees.right <= nodes))).any()
        or max(trees.left.max(initial=0), trees.right.max(initial=0), trees.roots.max(initial=0)) >= num_nodes
        or trees.roots.min(initial=0) < 0
        or trees.feature.min(initial=0) < 0
        or trees.feature.max(initial=0) >= operator.num_dims + num_steps
        or sorted((*trees.roots, *trees.left[is_inner], *trees.right[is_inner])) != nodes.tolist()
        or trees.most_leaves > MAX_LEAVES
    ):
        raise section.error(
            "", "the trees' arrays do not fit together; the file was changed, calibrate again"
        )
    return trees


def _read_attention(section: Section) -> Mapping[str, AttentionCurve]:
    curves = {}
    for name in _FLASH:
        part = section.optional_section(name)
        if part is not None:
            curves[name] = AttentionCurve(
                peak_flops_per_second=_positive_quantity(part, "peak", "flops_per_second"),
                half_length=_positive(part, "half_length"),
            )
            part.close()
    return curves


def _read_collectives(section: Section) -> Mapping[str, CollectiveCurve]:
    link = _positive_quantity(section, "link", "bytes_per_second") if section.has("link") else None
    there = [name for name in _COLLECTIVES if section.has(name)]
    return {name: _read_collective(section, name, link) for name in section if name in there}


def _read_collective(section: Section, name: str, link: float | None) -> CollectiveCurve:
    rows = section.sections(name)
    if not rows:
        raise SpecError(f"{section.file}: collectives.{name} has no measured group size")
    ranks = [row.integer("ranks", minimum=2) for row in rows]
    if ranks != sorted(set(ranks)):
        raise section.error(name, "list the measured group sizes in ascending order, each once")
    errors = [row.optional_number("error") for row in rows]
    known = [error for error in errors if error is not None]
    curve = CollectiveCurve(
        ranks=tuple(float(size) for size in ranks),
        latency=tuple(_positive_quantity(row, "latency", "seconds") for row in rows),
        link_efficiency=tuple(_positive(row, "link_efficiency") for row in rows),
        exponent=tuple(_positive(row, "exponent") for row in rows),
        tables=tuple(_read_table(row) for row in rows),
        link_bandwidth=link,
        error=float(np.mean(known)) if known else None,
    )
    if link is None and any(table is not None for table in curve.tables):
        raise section.error("link", "tables of times need the bandwidth of the link they were measured on")
    for row in rows:
        row.close()
    return curve


def _read_table(row: Section) -> CollectiveTable | None:
    sizes, seconds = row.numbers("num_bytes"), row.numbers("seconds")
    if not sizes:
        return None
    if len(sizes) != len(seconds) or list(sizes) != sorted(set(sizes)) or list(seconds) != sorted(seconds):
        raise row.error("num_bytes", "sizes must ascend, each with its time, and times may not fall")
    if sizes[0] <= 0.0 or seconds[0] <= 0.0:
        raise row.error("num_bytes", "sizes and times must be above zero")
    return CollectiveTable(num_bytes=np.array(sizes), seconds=np.array(seconds))
