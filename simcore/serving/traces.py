"""Read recorded requests: public traces in their own formats, and ours.

Formats, told apart by their columns:

- Azure LLM inference traces, CSV: ``TIMESTAMP, ContextTokens, GeneratedTokens``
  (https://github.com/Azure/AzurePublicDataset).
- BurstGPT, CSV: ``Timestamp`` in seconds, ``Request tokens``, ``Response tokens``; its requests without an answer failed
  and are left out, as its makers do in ``BurstGPT_without_fails`` (https://github.com/HPMLL/BurstGPT).
- Mooncake, JSON lines: ``timestamp`` in milliseconds, ``input_length``, ``output_length``, ``hash_ids`` of blocks of
  512 tokens (https://github.com/kvcache-ai/Mooncake).
- Lengths alone, CSV or JSON lines, as prepared from ShareGPT: ``input_length, output_length``, also under the names
  that Vidur and vLLM give them.
- Ours, JSON lines: ``input_length``, ``output_length``, and where known ``arrival_time_s``, ``prefix_group`` (any
  text or number) and ``prefix_length``, the tokens that requests of a group share.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain.serving import ServingWorkload
from meshwright.simcore.serving.requests import RequestTable, arrival_times, generate_requests

__all__ = ["MOONCAKE_BLOCK_SIZE", "Trace", "has_lengths_only", "load_requests", "read_trace"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
MOONCAKE_BLOCK_SIZE = 512
_BURST_ANSWER = "Response tokens"
_CSV_NAMES = {
    "input_length": ("input_length", "ContextTokens", "Request tokens", "num_prefill_tokens", "prompt_len"),
    "output_length": (
        "output_length",
        "GeneratedTokens",
        _BURST_ANSWER,
        "num_decode_tokens",
        "output_len",
    ),
    "time": ("arrival_time_s", "TIMESTAMP", "Timestamp"),
}
# Lengths of JSON lines may be called what they are called in CSV.
_LENGTH_OF = {name: field for field in ("input_length", "output_length") for name in _CSV_NAMES[field]}
_JSON_NAMES = (
    "arrival_time_s",
    "hash_ids",
    "input_length",
    "output_length",
    "prefix_group",
    "prefix_length",
    "timestamp",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Recorded requests.

    Parameters
    ----------
    requests : RequestTable
        Lengths and shared parts; arrival times from 0 on, or all 0 where the file has none.
    has_times : bool
        Whether the file says when requests came.
    """

    requests: RequestTable
    has_times: bool


def load_requests(workload: ServingWorkload, *, seed: int = 0) -> RequestTable:
    """Return the requests of a workload: synthetic, replayed, or with recorded lengths at arrivals of its own.

    Raises
    ------
    SpecError
        If its file cannot be read, or has no times and the workload asks to replay them.
    """
    if workload.requests_file is None:
        return generate_requests(workload, seed)
    trace = read_trace(Path(workload.requests_file))
    if workload.arrival == "trace":
        if not trace.has_times:
            raise SpecError(
                f"{workload.requests_file}: has lengths but no times; say how requests come: --rate '4 /s' or "
                "--concurrency 64 (in a job file, 'arrival: poisson' with a rate, or a concurrency, beside 'requests')"
            )
        return trace.requests
    count = trace.requests.num_requests
    is_closed = workload.arrival == "closed_loop"
    return replace(
        trace.requests,
        arrival_time=arrival_times(workload, count, np.random.default_rng(seed)),
        concurrency=workload.concurrency if is_closed else 0,
    )


def has_lengths_only(path: Path) -> bool:
    """Return whether the first line of a file names no times; False where it cannot be read, which its reader tells."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            first = next((line for line in stream if line.strip()), "")
        names = json.loads(first) if first.lstrip().startswith("{") else next(csv.reader([first]), [])
    except (OSError, ValueError):
        return False
    known = {"timestamp", *_CSV_NAMES["time"]}
    return bool(first) and not known & {name.strip() for name in names}


def read_trace(path: Path) -> Trace:
    """Return the requests of a file.

    Raises
    ------
    SpecError
        If the file cannot be read, is empty, has unknown columns, lengths below 1, or times that are negative or
        do not ascend; with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: is not UTF-8 text; give a trace as CSV or JSON lines") from None
    first = text.lstrip()[:1]
    if not first:
        raise SpecError(f"{path}: the trace is empty; it must hold at least one request")
    rows = _Rows(path)
    if first == "{":
        for line, record in _json_records(path, text):
            rows.add_json(line, record)
    else:
        _add_csv(rows, path, text)
    return rows.trace()


def _json_records(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except ValueError as error:
            raise SpecError(f"{path}:{line}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise SpecError(f"{path}:{line}: one request a line is an object, not {type(record).__name__}")
        yield line, record


def _add_csv(rows: _Rows, path: Path, text: str) -> None:
    reader = csv.reader(text.splitlines())
    header = [name.strip() for name in next(reader)]
    places: dict[str, int] = {}
    for field, names in _CSV_NAMES.items():
        found = [header.index(name) for name in names if name in header]
        if found:
            places[field] = found[0]
        elif field != "time":
            known = [name for known_names in _CSV_NAMES.values() for name in known_names]
            hint = next((text for name in header if (text := did_you_mean(name, known))), ".")
            raise SpecError(
                f"{path}:1: no column for {field} among {', '.join(header)}{hint} It may be called {', '.join(names)}."
            )
    for values in reader:
        if not any(value.strip() for value in values):
            continue
        line = reader.line_num
        if len(values) != len(header):
            raise SpecError(f"{path}:{line}: {len(values)} values under {len(header)} columns")
        time = _time(path, line, values[places["time"]]) if "time" in places else None
        output = _number(path, line, "output_length", values[places["output_length"]])
        if output == 0.0 and header[places["output_length"]] == _BURST_ANSWER:
            rows.num_failed += 1
            continue
        rows.add(line, time, _number(path, line, "input_length", values[places["input_length"]]), output)


def _number(path: Path, line: int, field: str, value: object) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)  # type: ignore[arg-type]  # what is no number raises below
    except (TypeError, ValueError):
        raise SpecError(f"{path}:{line}: {field} must be a number, not {value!r}") from None


def _time(path: Path, line: int, text: str) -> float:
    """Return seconds, of a number of them or of a date and time."""
    try:
        return float(text)
    except ValueError:
        pass
    # Azure writes seven digits of a second, and since 2024 the offset of UTC after six.
    stamp = text.strip().split("+")[0].rstrip("Z")
    try:
        return float(np.datetime64(stamp.replace(" ", "T"), "ns").astype(np.int64)) * 1e-9
    except ValueError:
        raise SpecError(f"{path}:{line}: '{text}' is no number of seconds and no date and time") from None


class _Rows:
    """Requests read so far, checked one by one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._times: list[float] = []
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._parts: list[list[tuple[object, int]]] = []
        self._has_times: bool | None = None
        self.num_failed = 0

    def add(self, line: int, time: float | None, input_length: float, output_length: float) -> None:
        """Check and keep a request."""
        where = f"{self._path}:{line}"
        for field, value in (("input_length", input_length), ("output_length", output_length)):
            if not (1 <= value < 1 << 31) or value != int(value):
                failed = "; take out requests that failed, which had no answer" if value == 0 else ""
                raise SpecError(
                    f"{where}: {field} must be a whole number of at least 1 token, not {value:g}{failed}"
                )
        if self._has_times is None:
            self._has_times = time is not None
        elif self._has_times != (time is not None):
            raise SpecError(f"{where}: either every request has a time or none has")
        if time is not None:
            if not 0.0 <= time < float("inf"):
                raise SpecError(f"{where}: the time must not be negative, nor {time:g}")
            if self._times and time < self._times[-1]:
                raise SpecError(f"{where}: the time lies before the last request's; sort the trace by time")
        self._times.append(time or 0.0)
        self._inputs.append(int(input_length))
        self._outputs.append(int(output_length))
        self._parts.append([])

    def add_json(self, line: int, record: Mapping[str, object]) -> None:
        """Check and keep a request of a JSON line."""
        where = f"{self._path}:{line}"
        record = {_LENGTH_OF.get(name, name): value for name, value in record.items()}
        for name in record:
            if name not in _JSON_NAMES:
                raise SpecError(
                    f"{where}: unknown key '{name}'{did_you_mean(name, _JSON_NAMES) or '.'} "
                    f"Known: {', '.join(_JSON_NAMES)}."
                )
        for name in ("input_length", "output_length"):
            if name not in record:
                raise SpecError(f"{where}: {name} is missing")
        time = None
        if "timestamp" in record:
            time = _number(self._path, line, "timestamp", record["timestamp"]) / 1000.0
        elif "arrival_time_s" in record:
            time = _number(self._path, line, "arrival_time_s", record["arrival_time_s"])
        length = _number(self._path, line, "input_length", record["input_length"])
        self.add(line, time, length, _number(self._path, line, "output_length", record["output_length"]))
        hashes = record.get("hash_ids", [])
        if not isinstance(hashes, list):
            raise SpecError(f"{where}: hash_ids must be a list")
        parts = self._parts[-1]
        for index, value in enumerate(hashes):
            end = min((index + 1) * MOONCAKE_BLOCK_SIZE, int(length))
            parts.append((("hash", str(value)), end))
        if "prefix_group" in record:
            shared = _number(self._path, line, "prefix_length", record.get("prefix_length"))
            if not 1 <= shared <= length:
                raise SpecError(f"{where}: prefix_length must be from 1 to input_length, not {shared:g}")
            parts.append((("group", str(record["prefix_group"])), int(shared)))

    def trace(self) -> Trace:
        """Return all requests."""
        if not self._inputs and self.num_failed:
            raise SpecError(f"{self._path}: all {self.num_failed:,} requests failed: none has an answer")
        if not self._inputs:
            raise SpecError(f"{self._path}: the trace is empty; it must hold at least one request")
        times = np.array(self._times)
        offset, segment, ends = self._segments()
        requests = RequestTable(
            arrival_time=times - times[0],
            input_length=np.array(self._inputs, dtype=np.int64),
            output_length=np.array(self._outputs, dtype=np.int64),
            segment_offset=offset,
            segment=segment,
            segment_end=ends,
            num_failed=self.num_failed,
        )
        return Trace(requests=requests, has_times=bool(self._has_times))

    def _segments(self) -> tuple[IntArray, IntArray, IntArray]:
        """Number the parts that at least two requests begin with; the others are never found in a cache."""
        uses: dict[object, int] = {}
        for parts in self._parts:
            for key, _ in parts:
                uses[key] = uses.get(key, 0) + 1
        numbers: dict[object, int] = {}
        ends: list[int] = []
        offset, segment = [0], []
        for parts in self._parts:
            last = 0
            for key, end in parts:
                if uses[key] < 2:
                    break
                number = numbers.setdefault(key, len(ends))
                if number == len(ends):
                    ends.append(end)
                ends[number] = min(ends[number], end)
                # A block that two hashes place differently is no prefix of both.
                if ends[number] <= last:
                    break
                last = ends[number]
                segment.append(number)
            offset.append(len(segment))
        if not segment:
            empty = np.zeros(0, dtype=np.int64)
            return empty, empty, empty
        return np.array(offset), np.array(segment), np.array(ends)
