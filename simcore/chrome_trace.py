"""Write a simulated iteration as a Chrome trace, which https://ui.perfetto.dev opens.

One process per stage; thread 0 is its compute stream, thread 1 its communication stream. Arrows are sends.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules import FORWARD, INPUT_GRADIENT, NO_OPERATION, WEIGHT_GRADIENT
from meshwright.simcore.training.iteration import IterationResult

__all__ = ["MAX_EVENTS", "TraceSummary", "write_chrome_trace"]

# Browsers hold about a million events: https://github.com/golang/go/issues/11520 measured 1.07 M.
MAX_EVENTS = 1_000_000
_LETTERS = ("F", "B", "B", "W")
_CATEGORIES = ("forward", "backward", "backward", "backward")
_COMPUTE, _COMMUNICATION = 0, 1
# Level 3 writes twice as fast as the default 6 and a tenth larger.
_GZIP_LEVEL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSummary:
    """What a trace file holds.

    Parameters
    ----------
    path : Path
        The file.
    num_events : int
        Events written, metadata included.
    stages : tuple[int, ...]
        Stages written.
    note : str
        Why stages were left out; empty when all were written.
    """

    path: Path
    num_events: int
    stages: tuple[int, ...]
    note: str


def write_chrome_trace(
    result: IterationResult, path: str | os.PathLike[str], max_events: int = MAX_EVENTS
) -> TraceSummary:
    """Write the timeline of an iteration; the file appears whole or not at all.

    Equal results give equal bytes.

    Parameters
    ----------
    result : IterationResult
        The iteration.
    path : str | os.PathLike[str]
        File to write or replace; compressed when its name ends in ``.gz``.
    max_events : int
        Above this, only the first, the middle and the last stage are written.

    Returns
    -------
    TraceSummary
        What was written, and what was left out and why.
    """
    target = Path(path)
    stages, note = _chosen_stages(result, max_events)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as raw:
            if target.suffix == ".gz":
                with gzip.GzipFile("", "wb", compresslevel=_GZIP_LEVEL, fileobj=raw, mtime=0) as packed:
                    num_events = _write(result, stages, packed)
            else:
                num_events = _write(result, stages, raw)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return TraceSummary(path=target, num_events=num_events, stages=stages, note=note)


def _chosen_stages(result: IterationResult, max_events: int) -> tuple[tuple[int, ...], str]:
    num_stages, num_operations = result.operations.kind.shape
    # A slice, a counter step and at most one arrow end and one arrow start per operation.
    num_events = 4 * num_stages * num_operations
    if num_events <= max_events or num_stages <= 3:
        return tuple(range(num_stages)), ""
    stages = (0, num_stages // 2, num_stages - 1)
    note = (
        f"only stages {stages[0]}, {stages[1]} and {stages[2]} of {num_stages} were written: all of them are about "
        f"{num_events:,} events, and viewers hold about {max_events:,}"
    )
    return stages, note


def _write(result: IterationResult, stages: tuple[int, ...], binary: io.IOBase | gzip.GzipFile) -> int:
    num_events = 0
    # The mark tells a later run that it may replace the file.
    separator = '{"written_by":"meshwright","displayTimeUnit":"ms","traceEvents":[\n'
    for stage in stages:
        for block in (_metadata(stage), _compute_events(result, stage, stages), _other_events(result, stage)):
            lines = list(block)
            if lines:
                binary.write((separator + ",\n".join(lines)).encode("ascii"))
                separator = ",\n"
                num_events += len(lines)
    binary.write(b"\n]}\n")
    return num_events


def _metadata(stage: int) -> Iterator[str]:
    for name, value in (
        ("process_name", f'"name":"stage {stage}"'),
        ("process_sort_index", f'"sort_index":{stage}'),
    ):
        yield f'{{"ph":"M","pid":{stage},"tid":0,"name":"{name}","args":{{{value}}}}}'
    for thread, label in ((_COMPUTE, "compute"), (_COMMUNICATION, "communication")):
        head = f'{{"ph":"M","pid":{stage},"tid":{thread},"name":'
        yield f'{head}"thread_name","args":{{"name":"{label}"}}}}'
        yield f'{head}"thread_sort_index","args":{{"sort_index":{thread}}}}}'


def _compute_events(result: IterationResult, stage: int, stages: tuple[int, ...]) -> Iterator[str]:
    """Yield each operation's slice, the counter step it makes and the arrows it ends and starts."""
    operations = result.operations
    virtual_stages = operations.placement[stage].tolist()
    num_passed = operations.placement.size * result.costs.num_micro_batches
    partners = _partners(result, stages)
    in_flight = 0
    begins, ends = _microseconds(result.operation_start[stage]), _microseconds(result.operation_end[stage])
    is_joint = np.zeros(len(begins), dtype=np.bool_)
    if operations.is_overlapped is not None:
        is_joint = operations.is_overlapped[stage]
        forwards = np.flatnonzero(is_joint & (operations.kind[stage] == FORWARD))
        ends[forwards] = ends[forwards + 1]
    rows = zip(
        operations.kind[stage].tolist(),
        operations.micro_batch[stage].tolist(),
        operations.chunk[stage].tolist(),
        is_joint.tolist(),
        begins.tolist(),
        ends.tolist(),
        strict=True,
    )
    joint_name = ""
    for kind, micro_batch, chunk, joint, begin, end in rows:
        if kind == NO_OPERATION:
            continue
        virtual = virtual_stages[chunk]
        name, category = f"{_LETTERS[kind]} m{micro_batch} c{chunk}", _CATEGORIES[kind]
        if joint:
            name, category = f"{joint_name}{name}", "overlapped"
            joint_name = f"{name} & " if kind == FORWARD else ""
        # The slice of a joint pair is its backward's.
        if not joint_name:
            yield (
                f'{{"ph":"X","pid":{stage},"tid":0,"ts":{begin:.3f},"dur":{end - begin:.3f},'
                f'"name":"{name}","cat":"{category}",'
                f'"args":{{"micro_batch":{micro_batch},"chunk":{chunk},"virtual_stage":{virtual}}}}}'
            )
        if kind != INPUT_GRADIENT:
            in_flight += 1 if kind == FORWARD else -1
            yield (
                f'{{"ph":"C","pid":{stage},"ts":{begin if kind == FORWARD else end:.3f},'
                f'"name":"activations in flight","args":{{"chunks":{in_flight}}}}}'
            )
        if kind == WEIGHT_GRADIENT:
            continue
        # An arrow's number is its producer's: activations first, then gradients.
        step = 1
        offset = virtual * result.costs.num_micro_batches + micro_batch
        if kind != FORWARD:
            step = -1
            offset += num_passed
        place = f'"pid":{stage},"tid":0,"name":"send","cat":"communication"'
        if (virtual - step, virtual) in partners:
            source = offset - step * result.costs.num_micro_batches
            yield f'{{"ph":"f","bp":"e",{place},"ts":{begin:.3f},"id":{source}}}'
        if (virtual, virtual + step) in partners:
            yield f'{{"ph":"s",{place},"ts":{(begin + end) / 2:.3f},"id":{offset}}}'


def _partners(result: IterationResult, stages: tuple[int, ...]) -> set[tuple[int, int]]:
    """Return the pairs of virtual stages between which the written stages send, either way round."""
    placement = result.operations.placement
    stage_of = np.empty(placement.size, dtype=np.int64)
    stage_of[placement] = np.arange(len(placement))[:, np.newaxis]
    length = placement.size // result.operations.num_model_copies
    pairs = set()
    for virtual in range(1, placement.size):
        ends = {int(stage_of[virtual - 1]), int(stage_of[virtual])}
        if virtual % length and len(ends) == 2 and ends.issubset(stages):
            pairs |= {(virtual - 1, virtual), (virtual, virtual - 1)}
    return pairs


def _other_events(result: IterationResult, stage: int) -> Iterator[str]:
    """Yield the optimizer step, the gathers and the reductions of a stage, leaving out what takes no time."""
    virtual = result.operations.placement[stage].tolist()
    gathers: Iterable[tuple[float, float, str]] = (
        (result.gather_start[v], result.gather_end[v], f"parameter gather c{chunk}")
        for chunk, v in enumerate(virtual)
    )
    reductions = (
        (result.reduce_start[v, part], result.reduce_end[v, part], f"gradient reduce c{chunk}")
        for chunk, v in enumerate(virtual)
        for part in range(2)
    )
    steps = [(result.optimizer_start[stage], result.optimizer_end[stage], "optimizer")]
    for thread, category, rows in (
        (_COMPUTE, "optimizer", steps),
        (_COMMUNICATION, "communication", sorted([*gathers, *reductions])),
    ):
        for first, last, name in rows:
            begin, end = _microseconds(np.array([first, last])).tolist()
            if end > begin:
                yield (
                    f'{{"ph":"X","pid":{stage},"tid":{thread},"ts":{begin:.3f},"dur":{end - begin:.3f},'
                    f'"name":"{name}","cat":"{category}","args":{{}}}}'
                )


def _microseconds(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    # Rounded to whole nanoseconds before they are subtracted: slices that touch still touch when printed.
    return np.rint(seconds * 1e9) / 1e3
