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
    OperatorError,
    OperatorModel,
    RbfResidual,
    Residual,
    RooflineCurve,
    StackedResidual,
    TreeResidual,
)
from meshwright.costmodels.operators.model import REGIMES
from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.json_document import parse_document
from meshwright.hardware_specs.specs import GpuSpec
from meshwright.hardware_specs.yaml_document import Section

__all__ = ["check_header", "parse_calibration", "read_calibration"]


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
        sustained_clock={key: _positive(clock, key) for key in clock if key != "source"} if clock else {},
        memory_stream_efficiency=_positive(stream, "efficiency") if stream else None,
        attention=_read_attention(attention) if attention else {},
        attention_backward_efficiency=attention.optional_number("backward_efficiency") if attention else None,
        collectives=_read_collectives(collectives) if collectives else {},
        software={
            key: {field_name: part.number(field_name) for field_name in part if field_name != "source"}
            for key, part in _named_sections(section, "software").items()
        },
        sources={**sources, **{key: model.source for key, model in operators.items()}},
    )
    for part in _named_sections(section, "software").values():
        part.optional_text("source")
    section.close()
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


def _read_provenance(section: Section | None) -> Provenance:
    if section is None:
        return Provenance()
    return Provenance(
        created_by=section.text("created_by", default=""),
        kernels=section.text("kernels", default=""),
        attribution=section.text("attribution", default=""),
        licence=section.text("licence", default=""),
        inputs=tuple(
            (item.text("name"), item.text("sha256"), item.integer("rows"))
            for item in section.sections("inputs")
        ),
    )


def _read_operator(section: Section, key: str, gpu: GpuSpec) -> OperatorModel:
    name, _, precision = key.partition(".")
    if name not in OPERATORS or not precision:
        raise section.error(
            "", f"unknown operator '{name}'{did_you_mean(name, OPERATORS)}; write OPERATOR.PRECISION"
        )
    operator = OPERATORS[name]
    known = {parameter.name for parameter in operator.parameters}
    parameters_section = section.optional_section("parameters")
    parameters = {each: parameters_section.number(each) for each in known} if parameters_section else {}
    missing = known - set(parameters)
    if missing:
        raise section.error("parameters", f"lacks {', '.join(sorted(missing))}")
    box = section.numbers("box")
    residual = section.optional_section("residual")
    width = operator.num_smooth_dims + 1
    if (residual is None) != (not box) or (box and len(box) != 2 * width):
        raise section.error("box", f"a residual needs the 2 x {width} bounds of what was sampled")
    interval = section.optional_section("interval")
    return OperatorModel(
        operator=operator,
        precision=precision,
        rates=device_rates(gpu, name, precision),
        curve=RooflineCurve(
            launch_time=section.quantity("launch_time", "seconds"),
            compute_efficiency=_positive(section, "compute_efficiency"),
            memory_efficiency=_positive(section, "memory_efficiency"),
            exponent=_positive(section, "exponent"),
        ),
        parameters=parameters,
        residual=None if residual is None else _read_residual(residual, operator.num_smooth_dims),
        box=np.array(box).reshape(2, width) if box else None,
        intervals={} if interval is None else {regime: _band(interval, regime) for regime in REGIMES},
        error=_read_error(section.optional_section("error")),
        source=section.text("source"),
    )


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


def _read_residual(section: Section, num_dims: int) -> Residual:
    kind = section.choice("kind", ("rbf", "trees", "stacked"))
    if kind == "stacked":
        parts = section.sections("parts")
        return StackedResidual(
            parts=tuple(_read_residual(part, num_dims) for part in parts),
            weights=section.numbers("weights", default=()),
        )
    if kind == "trees":
        return _read_trees(section)
    centres, weights = np.array(section.numbers("centres")), np.array(section.numbers("weights"))
    if len(centres) != num_dims * len(weights):
        raise section.error("centres", f"must hold {num_dims} numbers for each of the {len(weights)} weights")
    return RbfResidual(
        centres=centres.reshape(-1, num_dims),
        weights=weights,
        offset=section.number("offset"),
        is_baked=num_dims <= 3,
    )


def _read_trees(section: Section) -> TreeResidual:
    def indices(key: str) -> NDArray[np.int64]:
        return np.array(section.numbers(key), dtype=np.int64)

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
    # Children come after their parent, so that no file can make an endless loop.
    if (
        {len(trees.threshold), len(trees.left), len(trees.right), len(trees.value)} != {num_nodes}
        or (is_inner & ((trees.left <= nodes) | (trees.right <= nodes))).any()
        or max(trees.left.max(initial=0), trees.right.max(initial=0), trees.roots.max(initial=0)) >= num_nodes
        or trees.roots.min(initial=0) < 0
        or trees.feature.min(initial=0) < 0
    ):
        raise section.error(
            "", "the trees' arrays do not fit together; the file was changed, calibrate again"
        )
    return trees


def _read_attention(section: Section) -> Mapping[str, AttentionCurve]:
    return {
        name: AttentionCurve(
            peak_flops_per_second=section.section(name).quantity("peak", "flops_per_second"),
            half_length=_positive(section.section(name), "half_length"),
        )
        for name in section
        if name.startswith("flash")
    }


def _read_collectives(section: Section) -> Mapping[str, CollectiveCurve]:
    link = section.optional_quantity("link", "bytes_per_second")
    return {name: _read_collective(section, name, link) for name in section if name not in ("source", "link")}


def _read_collective(section: Section, name: str, link: float | None) -> CollectiveCurve:
    rows = section.sections(name)
    if not rows:
        raise SpecError(f"{section.file}: collectives.{name} has no measured group size")
    ranks = [row.integer("ranks", minimum=2) for row in rows]
    if ranks != sorted(set(ranks)):
        raise section.error(name, "list the measured group sizes in ascending order, each once")
    errors = [row.optional_number("error") for row in rows]
    known = [error for error in errors if error is not None]
    return CollectiveCurve(
        ranks=tuple(float(size) for size in ranks),
        latency=tuple(row.quantity("latency", "seconds") for row in rows),
        link_efficiency=tuple(_positive(row, "link_efficiency") for row in rows),
        exponent=tuple(_positive(row, "exponent") for row in rows),
        tables=tuple(_read_table(row) for row in rows),
        link_bandwidth=link,
        error=float(np.mean(known)) if known else None,
    )


def _read_table(row: Section) -> CollectiveTable | None:
    sizes, seconds = row.numbers("num_bytes"), row.numbers("seconds")
    if not sizes:
        return None
    if len(sizes) != len(seconds) or list(sizes) != sorted(set(sizes)) or list(seconds) != sorted(seconds):
        raise row.error("num_bytes", "sizes must ascend, each with its time, and times may not fall")
    if sizes[0] <= 0.0 or seconds[0] <= 0.0:
        raise row.error("num_bytes", "sizes and times must be above zero")
    return CollectiveTable(num_bytes=np.array(sizes), seconds=np.array(seconds))
