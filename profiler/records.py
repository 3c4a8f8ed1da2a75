"""The lines of a measurement file: one JSON object each, read strictly.

The first is the header; it names the device and the settings of the first run. The others are samples (one operator
in one shape), constants (one number), sentinels (what is re-measured to notice drift) and the suites that are
finished as a whole.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, cast, get_args

from meshwright.profiler.device import Device, DeviceType
from meshwright.profiler.failures import Failure
from meshwright.profiler.json_rows import JsonRow, parse_object
from meshwright.profiler.protocol import Timing
from meshwright.profiler.settings import ProfileSettings
from meshwright.simcore.domain.model import ModelSpec

__all__ = [
    "SCHEMA_VERSION",
    "ConstantRecord",
    "FinishedRecord",
    "HeaderRecord",
    "Record",
    "SampleRecord",
    "SentinelRecord",
    "Status",
    "identity_of",
    "parse_record",
    "record_line",
    "settings_mapping",
]

SCHEMA_VERSION = 1
_KINDS = ("header", "sample", "constant", "sentinel", "finished")
Status = Literal["ok", "out_of_memory", "unsupported", "failed"]
ShapeValue = float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderRecord:
    """Who measured what; ``settings`` are those of the run that began the file, for the reader."""

    kind: ClassVar[str] = "header"
    device: Device
    settings: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """One operator in one number format and shape, with the state of the device just after.

    Times are None unless ``status`` is ``ok``; the state is None where it cannot be read.
    """

    kind: ClassVar[str] = "sample"
    suite: str
    operator: str
    precision: str
    shape: Mapping[str, ShapeValue]
    status: Status
    seconds: float | None = None
    p10: float | None = None
    p90: float | None = None
    minimum: float | None = None
    repeats: int | None = None
    mode: str | None = None
    wall_seconds: float | None = None
    clock_hertz: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    reason: str = ""

    @property
    def identity(self) -> str:
        """What two samples of one case have in common."""
        return identity_of(self.operator, self.precision, self.shape)

    def with_result(self, result: Timing | Failure) -> SampleRecord:
        """Return the record with what a measurement gave."""
        if isinstance(result, Failure):
            return dataclasses.replace(self, status=result.status, reason=result.reason)
        return dataclasses.replace(
            self,
            status="ok",
            seconds=result.seconds,
            p10=result.p10,
            p90=result.p90,
            minimum=result.minimum,
            repeats=result.repeats,
            mode=result.mode,
            wall_seconds=result.wall_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantRecord:
    """One number of the device, in SI units; None unless ``status`` is ``ok``."""

    kind: ClassVar[str] = "constant"
    suite: str
    name: str
    value: float | None
    status: Status
    reason: str = ""

    @property
    def identity(self) -> str:
        """What two values of one constant have in common."""
        return identity_of("constant", "", {"name": self.name})


@dataclass(frozen=True, slots=True, kw_only=True)
class SentinelRecord:
    """A sentinel's time, ``elapsed`` seconds after its run began [s]."""

    kind: ClassVar[str] = "sentinel"
    name: str
    seconds: float
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRecord:
    """A suite that measures in processes of its own has yielded all it has."""

    kind: ClassVar[str] = "finished"
    suite: str


Record: TypeAlias = HeaderRecord | SampleRecord | ConstantRecord | SentinelRecord | FinishedRecord


def identity_of(operator: str, precision: str, shape: Mapping[str, ShapeValue]) -> str:
    """Return the text that is equal for equal cases, whatever the order of the fields and the type of the numbers.

    Examples
    --------
    >>> identity_of("gemm", "bf16", {"n": 2, "m": 1.0}) == identity_of("gemm", "bf16", {"m": 1, "n": 2})
    True
    """
    cells = sorted((name, _plain(value)) for name, value in shape.items())
    return json.dumps([operator, precision, cells])


def record_line(record: Record) -> bytes:
    """Return a record as one line of ASCII JSON with its newline."""
    mapping: dict[str, object] = {"kind": record.kind}
    if isinstance(record, HeaderRecord):
        mapping |= {"schema_version": SCHEMA_VERSION, "written_by": "meshwright"}
    for field in dataclasses.fields(record):
        mapping[field.name] = getattr(record, field.name)
    if isinstance(record, HeaderRecord):
        device = {field.name: getattr(record.device, field.name) for field in dataclasses.fields(Device)}
        mapping["device"] = {**device, "software": dict(record.device.software)}
        mapping["settings"] = dict(record.settings)
    elif isinstance(record, SampleRecord):
        mapping["shape"] = {name: _plain(value) for name, value in record.shape.items()}
    return json.dumps(mapping, allow_nan=False).encode("ascii") + b"\n"


def settings_mapping(settings: ProfileSettings) -> Mapping[str, object]:
    """Return settings as JSON has them; a model by its name."""
    mapping: dict[str, object] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Mapping):
            value = dict(value)
        mapping[field.name] = value.name if isinstance(value, ModelSpec) else value
    return mapping


def parse_record(line: bytes, where: str) -> Record:
    """Return the record a line holds.

    Parameters
    ----------
    line : bytes
        Without its newline.
    where : str
        ``file:line``, for messages.

    Raises
    ------
    SpecError
        If the line is not a record as this version writes it.
    """
    row = parse_object(line, where)
    kind = row.choice("kind", _KINDS)
    if kind == "header":
        record: Record = _header(row)
    elif kind == "sample":
        record = _sample(row)
    elif kind == "constant":
        status = _status(row)
        value = row.number("value") if status == "ok" else row.optional_number("value")
        record = ConstantRecord(
            suite=row.text("suite"),
            name=row.text("name"),
            value=value,
            status=status,
            reason=row.text("reason"),
        )
    elif kind == "sentinel":
        record = SentinelRecord(
            name=row.text("name"), seconds=row.positive("seconds"), elapsed=row.number("elapsed")
        )
    else:
        record = FinishedRecord(suite=row.text("suite"))
    row.close()
    return record


def _header(row: JsonRow) -> HeaderRecord:
    if row.text("written_by") != "meshwright":
        raise row.error("was not written by meshwright")
    version = row.number("schema_version")
    if version != SCHEMA_VERSION:
        raise row.error(f"this version reads schema {SCHEMA_VERSION}, not {version:g}")
    part = JsonRow(row.mapping("device"), f"{row.where}: device")
    device = Device(
        type=cast("DeviceType", part.choice("type", get_args(DeviceType))),
        name=part.text("name"),
        gpu=part.optional_text("gpu"),
        num_devices=int(part.positive("num_devices")),
        num_sms=int(part.positive("num_sms")),
        memory_bytes=part.positive("memory_bytes"),
        l2_bytes=part.number("l2_bytes"),
        software={name: str(text) for name, text in part.mapping("software").items()},
    )
    part.close()
    return HeaderRecord(device=device, settings=row.mapping("settings"))


def _sample(row: JsonRow) -> SampleRecord:
    status = _status(row)
    cells = JsonRow(row.mapping("shape"), f"{row.where}: shape")
    repeats = row.optional_number("repeats")
    return SampleRecord(
        suite=row.text("suite"),
        operator=row.text("operator"),
        precision=row.text("precision"),
        shape={name: cells.shape_value(name) for name in cells.names()},
        status=status,
        seconds=row.positive("seconds") if status == "ok" else row.optional_number("seconds"),
        p10=row.optional_number("p10"),
        p90=row.optional_number("p90"),
        minimum=row.optional_number("minimum"),
        repeats=None if repeats is None else int(repeats),
        mode=row.optional_text("mode"),
        wall_seconds=row.optional_number("wall_seconds"),
        clock_hertz=row.optional_number("clock_hertz"),
        temperature_celsius=row.optional_number("temperature_celsius"),
        power_watts=row.optional_number("power_watts"),
        reason=row.text("reason"),
    )


def _status(row: JsonRow) -> Status:
    return cast("Status", row.choice("status", get_args(Status)))


def _plain(value: ShapeValue) -> int | float | str:
    """Return a number as JSON knows it, whole ones without a point."""
    if isinstance(value, str):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number
