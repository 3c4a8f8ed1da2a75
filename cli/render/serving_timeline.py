"""The timeline of a serving simulation as a Chrome trace: one process per replica, one thread per engine."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from meshwright.planner.output_file import is_our_trace, replace_file
from meshwright.simcore.chrome_trace import MAX_EVENTS
from meshwright.simcore.domain.serving import ServingPlan
from meshwright.simcore.serving.simulate import StepRecord

__all__ = ["write_serving_timeline"]

_GZIP_LEVEL = 3


def write_serving_timeline(steps: StepRecord, plan: ServingPlan, path: Path, *, force: bool) -> str:
    """Write every engine step as a slice named by what it holds; the first million where there are more.

    Parameters
    ----------
    steps : StepRecord
        The steps, by their end.
    plan : ServingPlan
        Says which replica an engine is of.
    path : Path
        File to write; compressed when its name ends in ``.gz``.
    force : bool
        Replace a file Meshwright did not write.

    Returns
    -------
    str
        What was written, in one line.
    """
    count = min(len(steps.end), MAX_EVENTS)
    lines = [*_names(plan), *_slices(steps, plan, count)]
    text = (
        '{"written_by":"meshwright","displayTimeUnit":"ms","traceEvents":[\n' + ",\n".join(lines) + "\n]}\n"
    )
    content = text.encode("ascii")
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=_GZIP_LEVEL, mtime=0)
    replace_file(path, content, force=force, is_ours=is_our_trace)
    left = len(steps.end) - count
    note = f"; the last {left:,} steps were left out" if left else ""
    return f"{path} ({count:,} steps, open it in https://ui.perfetto.dev{note})"


def _engines(plan: ServingPlan) -> list[tuple[int, str, int]]:
    """Return process, its name and thread of each engine, in the simulator's order."""
    found = []
    process = 0
    for pool in plan.pools:
        for replica in range(pool.num_replicas):
            found += [
                (process, f"{pool.role} {replica}", thread) for thread in range(pool.attention_dp * pool.pp)
            ]
            process += 1
    return found


def _names(plan: ServingPlan) -> Iterator[str]:
    named = set()
    for process, name, thread in _engines(plan):
        if process not in named:
            named.add(process)
            yield f'{{"ph":"M","pid":{process},"tid":0,"name":"process_name","args":{{"name":"{name}"}}}}'
        yield f'{{"ph":"M","pid":{process},"tid":{thread},"name":"thread_name","args":{{"name":"engine {thread}"}}}}'


def _slices(steps: StepRecord, plan: ServingPlan, count: int) -> Iterator[str]:
    engines = _engines(plan)
    begins = np.rint(steps.start[:count] * 1e9).astype(np.int64)
    ends = np.rint(steps.end[:count] * 1e9).astype(np.int64)
    rows = zip(
        steps.engine[:count].tolist(),
        begins.tolist(),
        (ends - begins).tolist(),
        steps.num_decodes[:count].tolist(),
        steps.prompt_tokens[:count].tolist(),
        strict=True,
    )
    for engine, begin, length, decodes, tokens in rows:
        process, _, thread = engines[engine]
        kind = "mixed" if decodes and tokens else "prompt" if tokens else "decode"
        yield (
            f'{{"ph":"X","pid":{process},"tid":{thread},"ts":{begin / 1e3:.3f},"dur":{length / 1e3:.3f},"name":"{kind}",'
            f'"args":{{"sequences":{decodes},"prompt_tokens":{tokens}}}}}'
        )
