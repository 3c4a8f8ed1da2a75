"""Write the steps of a serving simulation as a Chrome trace, which https://ui.perfetto.dev opens.

One process per replica, one thread per engine of it; counters of running sequences and prompt tokens beside them.
The first requests are drawn as spans of their own, from sending to the last token, with their phases inside.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meshwright.errors import SpecError
from meshwright.simcore.chrome_trace import MAX_EVENTS
from meshwright.simcore.serving.simulate import ServingResult, StepRecord

__all__ = ["ServingTraceSummary", "step_kinds", "write_serving_trace"]

_GZIP_LEVEL = 3
_KINDS = ("decode", "prefill", "mixed")
_REQUESTS = "requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTraceSummary:
    """What a trace file holds.

    Parameters
    ----------
    path : Path
        The file.
    num_events : int
        Events written, metadata included.
    num_steps : int
        Steps written.
    note : str
        What was left out and why; empty when nothing was.
    """

    path: Path
    num_events: int
    num_steps: int
    note: str


def step_kinds(steps: StepRecord) -> tuple[str, ...]:
    """Return of each step whether it decodes, prefills, or mixes both."""
    index = np.where(steps.prompt_tokens > 0, np.where(steps.num_decodes > 0, 2, 1), 0)
    return tuple(_KINDS[kind] for kind in index.tolist())


def write_serving_trace(
    result: ServingResult,
    path: str | os.PathLike[str],
    *,
    max_events: int = MAX_EVENTS,
    max_requests: int = 1000,
) -> ServingTraceSummary:
    """Write the recorded steps and the first requests; the file appears whole or not at all.

    Parameters
    ----------
    result : ServingResult
        A run that recorded its steps.
    path : str | os.PathLike[str]
        File to write or replace; compressed when its name ends in ``.gz``.
    max_events : int
        Later steps are left out beyond this.
    max_requests : int
        Requests drawn as spans.

    Raises
    ------
    SpecError
        If no steps were recorded.
    """
    if result.steps is None:
        raise SpecError("timeline: the run kept no steps; simulate it with is_recording")
    # A step is a slice and a counter, a request four ends of spans and up to three phases of two ends.
    num_requests = min(max_requests, result.num_requests, max_events // 20)
    num_steps = min(len(result.steps.end), max(0, (max_events - 10 * num_requests) // 2))
    left_out = len(result.steps.end) - num_steps
    note = f"the last {left_out:,} steps were left out: viewers hold about {max_events:,} events"
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    lines = [*_steps(result, result.steps, num_steps), *_requests(result, num_requests)]
    text = (
        '{"written_by":"meshwright","displayTimeUnit":"ms","traceEvents":[\n' + ",\n".join(lines) + "\n]}\n"
    )
    try:
        with temporary.open("wb") as raw:
            if target.suffix == ".gz":
                with gzip.GzipFile("", "wb", compresslevel=_GZIP_LEVEL, fileobj=raw, mtime=0) as packed:
                    packed.write(text.encode("ascii"))
            else:
                raw.write(text.encode("ascii"))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return ServingTraceSummary(
        path=target, num_events=len(lines), num_steps=num_steps, note=note if left_out else ""
    )


def _event(**fields: object) -> str:
    return json.dumps(fields, separators=(",", ":"))


def _microseconds(time: float) -> float:
    return round(time * 1e6, 3)


def _steps(result: ServingResult, steps: StepRecord, count: int) -> Iterator[str]:
    replica_of = {
        int(engine): int(replica)
        for engines, replicas in (
            (result.engine, result.replica),
            (result.prefill_engine, result.prefill_replica),
        )
        for engine, replica in zip(*np.unique(np.stack([engines, replicas]), axis=1), strict=True)
    }
    for engine, replica in sorted(replica_of.items()):
        yield _event(
            ph="M", pid=replica, tid=engine, name="process_name", args={"name": f"replica {replica}"}
        )
        yield _event(ph="M", pid=replica, tid=engine, name="thread_name", args={"name": f"engine {engine}"})
    rows = zip(
        step_kinds(steps)[:count],
        steps.start[:count].tolist(),
        steps.end[:count].tolist(),
        steps.engine[:count].tolist(),
        steps.num_decodes[:count].tolist(),
        steps.prompt_tokens[:count].tolist(),
        strict=True,
    )
    for kind, start, end, engine, decodes, tokens in rows:
        place = {"pid": replica_of[engine], "ts": _microseconds(start)}
        size = {"decodes": decodes, "prompt_tokens": tokens}
        yield _event(ph="X", tid=engine, name=kind, dur=_microseconds(end - start), args=size, **place)
        yield _event(ph="C", name=f"engine {engine}", args=size, **place)


def _requests(result: ServingResult, count: int) -> Iterator[str]:
    """Yield a span per request and its phases inside."""
    for row in range(count):
        marks = [
            float(times[row])
            for times in (
                result.arrival_time,
                result.scheduled_time,
                result.first_token_time,
                result.finish_time,
            )
        ]
        name = f"request {row}: {result.input_length[row]} + {result.output_length[row]} tokens"
        spans = [(name, marks[0], marks[3])]
        spans += list(zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False))
        for label, start, end in spans:
            if end > start:
                place = {
                    "cat": _REQUESTS,
                    "id": row,
                    "pid": int(result.replica[row]),
                    "tid": 0,
                    "name": label,
                }
                yield _event(ph="b", ts=_microseconds(start), **place)
                yield _event(ph="e", ts=_microseconds(end), **place)
