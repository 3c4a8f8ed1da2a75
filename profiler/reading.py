"""From measurement files to what a calibration is fitted to."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from meshwright.costmodels.operators import OPERATORS
from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.profiler.device import Device
from meshwright.profiler.eager_layers import eager_elementwise_factor
from meshwright.profiler.layer_samples import LAYER, layer_samples
from meshwright.profiler.measurements import (
    CollectiveSamples,
    LayerSample,
    MeasuredConstant,
    Measurements,
    OperatorSamples,
)
from meshwright.profiler.records import ConstantRecord, HeaderRecord, Record, SampleRecord, parse_record

__all__ = ["derived_constants", "read_measurements"]

_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
_COLLECTIVE_FIELDS = ("ranks", "num_bytes")
_MAX_BYTES = 200_000_000
# Backward attention recomputes the scores: five products where forward has two [FlashAttention-2, section 3.1.2].
_BACKWARD_FLOPS = 2.5
# Copies below this many times the last-level cache partly stay in it.
_CACHE_MULTIPLE = 4.0
_LAUNCH_LATENCY = "software.all.host_launch_latency"

Key = tuple[str, str]
Times = dict[tuple[float, ...], list[float]]


def read_measurements(paths: Sequence[Path], gpu: str | None = None) -> Measurements:
    """Return what files of one device hold.

    Samples of one operator, number format and shape become their median. Operators the cost models do not know are
    left out, but for whole layers.

    Parameters
    ----------
    paths : Sequence[Path]
        Files of ``meshwright profile``, all of one device.
    gpu : str | None
        Id of the device's spec, for devices that were not recognised; None takes the files' own.

    Raises
    ------
    SpecError
        If a file cannot be read or is malformed (file and line), if they are of several devices, or if the device
        has no spec and ``gpu`` is not given.
    """
    if not paths:
        raise SpecError("no measurement file is given; 'meshwright profile' writes one")
    headers: list[HeaderRecord] = []
    inputs: list[tuple[str, str, int]] = []
    operators: dict[Key, Times] = {}
    collectives: dict[Key, Times] = {}
    constants: dict[str, list[float]] = {}
    layers: list[tuple[str, SampleRecord]] = []
    for path in paths:
        content = _content(path)
        rows = list(_records(path, content))
        headers.append(_header(path, rows))
        inputs.append((path.name, hashlib.sha256(content).hexdigest(), len(rows) - 1))
        for where, record in rows[1:]:
            if isinstance(record, SampleRecord) and record.status == "ok":
                _add_sample(record, where, operators, collectives)
                if record.operator == LAYER:
                    layers.append((where, record))
            elif isinstance(record, ConstantRecord) and record.value is not None:
                constants.setdefault(record.name, []).append(record.value)
    device = _one_device(paths, headers)
    if not (operators or collectives or constants):
        raise SpecError(f"{paths[0]}: holds no measurement that succeeded; run 'meshwright profile' again")
    source = _source(headers)
    samples = tuple(_operator_samples(key, times, source) for key, times in sorted(operators.items()))
    measured = {
        name: MeasuredConstant(value=statistics.median(values), source=source)
        for name, values in sorted(constants.items())
    }
    identity = _gpu_of(device, gpu, paths[0])
    bandwidth = load_gpu(identity).memory_bandwidth_bytes_per_second
    whole_layers = layer_samples(layers)
    found = {**derived_constants(samples, bandwidth, device.l2_bytes), **measured}
    return Measurements(
        gpu=identity,
        kernels=" and ".join(sorted({f"torch {_torch_version(header.device)}" for header in headers})),
        operators=samples,
        collectives=tuple(
            _collective_samples(key, times, source) for key, times in sorted(collectives.items())
        ),
        constants={**_eager_constant(whole_layers, found, bandwidth, source), **found},
        layers=whole_layers,
        inputs=tuple(inputs),
    )


def derived_constants(
    operators: Iterable[OperatorSamples], bandwidth_bytes_per_second: float, l2_bytes: float
) -> Mapping[str, MeasuredConstant]:
    """Return the constants that follow from samples.

    Parameters
    ----------
    operators : Iterable[OperatorSamples]
        Of one device.
    bandwidth_bytes_per_second : float
        Memory bandwidth of its data sheet [B/s].
    l2_bytes : float
        Its last-level cache [B].

    Notes
    -----
    ``memory_stream.efficiency = max(num_bytes / seconds) / bandwidth`` over the copies whose bytes, read plus
    written, are at least four times the last-level cache (over all copies when none is).

    ``attention.backward_efficiency = median(2.5 * forward / backward)`` over the shapes and formats measured both
    ways: 1 when the backward pass reaches the forward's FLOP/s [Dao 2023, section 3.1.2: five products for two].
    """
    by_name = {samples.name: samples for samples in operators}
    found: dict[str, MeasuredConstant] = {}
    rates: list[float] = []
    ratios: list[float] = []
    for samples in by_name.values():
        if samples.operator == "copy":
            num_bytes = samples.shape["num_bytes"]
            is_large = num_bytes >= _CACHE_MULTIPLE * l2_bytes
            rows = is_large if is_large.any() else np.ones_like(is_large)
            rates.append(float((num_bytes[rows] / samples.seconds[rows]).max()))
        backward = by_name.get(f"attention_backward.{samples.precision}")
        if samples.operator == "attention_prefill" and backward is not None:
            times = _by_shape(backward)
            ratios += [
                _BACKWARD_FLOPS * forward / times[shape]
                for shape, forward in _by_shape(samples).items()
                if shape in times
            ]
    source = next((samples.source for samples in by_name.values()), "")
    if rates:
        found["memory_stream.efficiency"] = MeasuredConstant(
            value=max(rates) / bandwidth_bytes_per_second, source=f"{source}; best copy over the data sheet"
        )
    if ratios:
        found["attention.backward_efficiency"] = MeasuredConstant(
            value=statistics.median(ratios), source=f"{source}; {len(ratios)} shapes forward and backward"
        )
    return found


def _eager_constant(
    layers: Sequence[LayerSample],
    constants: Mapping[str, MeasuredConstant],
    bandwidth_bytes_per_second: float,
    source: str,
) -> Mapping[str, MeasuredConstant]:
    """Return the eager layer's factor where copies, launches and a layer eager and compiled were measured."""
    stream, launch = constants.get("memory_stream.efficiency"), constants.get(_LAUNCH_LATENCY)
    if stream is None or launch is None:
        return {}
    factor = eager_elementwise_factor(layers, stream.value * bandwidth_bytes_per_second, launch.value)
    if factor is None:
        return {}
    return {
        "software.all.eager_elementwise_factor": MeasuredConstant(
            value=factor, source=f"{source}; a layer eager and compiled"
        )
    }


def _by_shape(samples: OperatorSamples) -> dict[tuple[float, ...], float]:
    columns = [samples.shape[name] for name in OPERATORS[samples.operator].fields]
    cells = zip(*(column.tolist() for column in columns), strict=True)
    return dict(zip(cells, samples.seconds.tolist(), strict=True))


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SpecError(f"{path}: is larger than {_MAX_BYTES // 1_000_000} MB")
        return path.read_bytes()
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; 'meshwright profile' writes one") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: is a directory; name a file of 'meshwright profile'") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None


def _records(path: Path, content: bytes) -> Iterable[tuple[str, Record]]:
    """Yield every record with its ``file:line``."""
    if not content:
        raise SpecError(f"{path}: is empty; 'meshwright profile' writes measurements")
    lines = content.split(b"\n")
    if lines.pop():
        raise SpecError(
            f"{path}:{len(lines) + 1}: the last line is cut off: the profile was stopped or is running;"
            " 'meshwright profile' with the same file mends it and goes on"
        )
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        yield where, parse_record(line, where)


def _header(path: Path, rows: Sequence[tuple[str, Record]]) -> HeaderRecord:
    first = rows[0][1]
    if not isinstance(first, HeaderRecord):
        raise SpecError(f"{path}:1: the header is missing; name a file of 'meshwright profile'")
    for where, record in rows[1:]:
        if isinstance(record, HeaderRecord):
            raise SpecError(f"{where}: a second header; give the files one by one")
    return first


def _one_device(paths: Sequence[Path], headers: Sequence[HeaderRecord]) -> Device:
    first = headers[0].device
    for path, header in zip(paths, headers, strict=True):
        there = header.device
        if (there.name, there.gpu) != (first.name, first.gpu):
            raise SpecError(
                f"{path}: is of {there.name} ({there.gpu}), and {paths[0]} of {first.name} ({first.gpu});"
                " calibrate one device at a time"
            )
    return first


def _gpu_of(device: Device, gpu: str | None, path: Path) -> str:
    given = None if gpu is None else load_gpu(gpu).id
    if device.gpu is None and given is None:
        raise SpecError(
            f"{path}: '{device.name}' has no spec here; name the spec to calibrate with --gpu"
            " ('meshwright specs list' has them all)"
        )
    if given is not None and device.gpu not in (None, given):
        raise SpecError(f"{path}: is of {device.gpu}, not of {given} that --gpu names")
    known = given or device.gpu
    assert known is not None
    return load_gpu(known).id


def _add_sample(
    record: SampleRecord, where: str, operators: dict[Key, Times], collectives: dict[Key, Times]
) -> None:
    """Sort one time under its operator or collective; others are left out."""
    seconds = record.seconds
    assert seconds is not None
    if record.operator in OPERATORS:
        shape = _cells(record, OPERATORS[record.operator].fields, where)
        times = operators.setdefault((record.operator, record.precision), {})
    elif record.operator in _COLLECTIVES:
        ranks, num_bytes = _cells(record, _COLLECTIVE_FIELDS, where)
        if ranks < 2 or not ranks.is_integer():
            raise SpecError(f"{where}: shape: ranks must be a whole number of at least 2, not {ranks:g}")
        shape = (num_bytes,)
        times = collectives.setdefault((record.operator, f"{int(ranks)}"), {})
    else:
        return
    times.setdefault(shape, []).append(seconds)


def _cells(record: SampleRecord, fields: tuple[str, ...], where: str) -> tuple[float, ...]:
    for name in record.shape:
        if name not in fields:
            raise SpecError(
                f"{where}: shape: {record.operator} has no field '{name}'{did_you_mean(name, fields)}"
            )
    cells = []
    for name in fields:
        value = record.shape.get(name)
        if not isinstance(value, int | float) or value < 0.0:
            raise SpecError(f"{where}: shape: {name} of {record.operator} must be a number of at least 0")
        cells.append(float(value))
    return tuple(cells)


def _operator_samples(key: Key, times: Times, source: str) -> OperatorSamples:
    operator, precision = key
    shapes = np.array(sorted(times), dtype=np.float64)
    return OperatorSamples(
        operator=operator,
        precision=precision,
        shape={name: shapes[:, column] for column, name in enumerate(OPERATORS[operator].fields)},
        seconds=np.array([statistics.median(times[shape]) for shape in sorted(times)]),
        source=source,
    )


def _collective_samples(key: Key, times: Times, source: str) -> CollectiveSamples:
    return CollectiveSamples(
        collective=key[0],
        ranks=int(key[1]),
        num_bytes=np.array([shape[0] for shape in sorted(times)]),
        seconds=np.array([statistics.median(times[shape]) for shape in sorted(times)]),
        source=source,
    )


def _torch_version(device: Device) -> str:
    return device.software.get("torch", "unknown").partition("+")[0]


def _source(headers: Sequence[HeaderRecord]) -> str:
    versions = sorted({_software(header.device) for header in headers})
    return f"profiled on {headers[0].device.name} with {' and '.join(versions)}"


def _software(device: Device) -> str:
    driver = device.software.get("driver")
    return f"torch {_torch_version(device)}" + (f", driver {driver}" if driver else "")
