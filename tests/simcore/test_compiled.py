from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import meshwright

SOURCE = str(Path(meshwright.__file__).parents[1])
HASH_EVERYTHING = """
import hashlib, os, sys
import numpy as np
from meshwright.simcore.compiled import has_compiler
from meshwright.simcore.task_graph import build_task_graph
from meshwright.simcore.training import IterationCosts, iteration_time, simulate_iteration, steady_state_period

digest = hashlib.sha256()
rng = np.random.default_rng(7)
for num_tasks in (1, 10, 1000):
    sides = [rng.integers(-1, np.arange(num_tasks)).astype(np.int32) for _ in range(2)]
    graph = build_task_graph(*sides)
    durations, lags = rng.random(num_tasks), rng.random(num_tasks)
    for chosen in (None, lags):
        times = graph.evaluate(durations, chosen)
        arrays = (graph.order, times.start, times.end, graph.slack(times, durations, chosen))
        for array in (*arrays, graph.critical_path(times, chosen)):
            digest.update(str(array.dtype).encode() + array.tobytes())
        digest.update(repr(graph.makespan(durations, chosen)).encode())
for schedule, stages, chunks in (("none", 1, 1), ("gpipe", 4, 1), ("1f1b", 4, 1), ("interleaved_1f1b", 4, 3),
                                 ("zb_h1", 4, 1), ("zb_h2", 4, 1), ("zb_v", 4, 2), ("v_half", 4, 2),
                                 ("v_min", 4, 2), ("dualpipe", 4, 2), ("dualpipe_v", 4, 2)):
    for is_blocking in (False, True):
        each = stages * chunks
        weight = rng.random(each)
        costs = IterationCosts(
            num_stages=stages, num_chunks=chunks, num_micro_batches=12, forward_time=rng.random(each),
            backward_time=weight + rng.random(each), weight_gradient_time=weight,
            forward_communication_time=np.zeros(each), backward_communication_time=np.zeros(each),
            send_time=rng.random(each), is_send_blocking=is_blocking, gradient_reduce_time=rng.random(each),
            gradient_reduce_overlap=0.3, parameter_gather_time=rng.random(each), parameter_gather_overlap=0.7,
            optimizer_time=rng.random(stages), fixed_time=0.1)
        result = simulate_iteration(costs, schedule)
        for name in ("operation_start", "operation_end", "gather_start", "reduce_end", "optimizer_end",
                     "busy_time", "peak_in_flight", "stage_bubble_fraction"):
            digest.update(getattr(result, name).tobytes())
        digest.update(repr((iteration_time(costs, schedule), steady_state_period(costs, schedule))).encode())
print(has_compiler(), digest.hexdigest())
"""


def run_python(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    command = [sys.executable, "-P", "-c", code]
    child = subprocess.run(
        command, env=kept | {"PYTHONPATH": SOURCE} | environment, check=True, capture_output=True, text=True
    )
    return child.stdout.strip()


def test_compiled_and_plain_python_agree_bit_for_bit() -> None:
    compiled = run_python(HASH_EVERYTHING).split()
    plain = run_python(HASH_EVERYTHING, NUMBA_DISABLE_JIT="1").split()
    assert (compiled[0], plain[0]) == ("True", "False")
    assert compiled[1] == plain[1]


def test_a_missing_numba_is_no_error() -> None:
    hidden = "import sys; sys.modules['numba'] = None\n" + HASH_EVERYTHING
    assert run_python(hidden).split()[0] == "False"


def test_importing_the_simulator_does_not_import_numba() -> None:
    modules = ("chrome_trace", "schedules", "task_graph", "timeline", "training")
    imports = "".join(f"import meshwright.simcore.{name}\n" for name in modules)
    assert run_python("import sys\n" + imports + "print('numba' in sys.modules)") == "False"
