"""How fast the serving simulator is, beside what its peers were measured at.

    python benchmarks/serving.py

1,000,000 requests of log-normal lengths (mean 1,000 in, 250 out; chunks of 2,048 tokens, 256 sequences, 8 replicas)
compiled and, fewer of them, in plain Python (a child process with NUMBA_DISABLE_JIT=1); 10,000 requests at 4 per
second on one replica, as Vidur was run; a day of 1,000,000 requests on 64 replicas; and the first result in a new
process with a warm and an empty kernel cache. Loop times leave out making requests and the result's arrays. Times of
processes are CPU times: they hold when other work shares the machine. Results must be equal where they are the same
problem.

Peers, single core of the same kind, same day: Vidur (github.com/microsoft/vidur, 7d47513) 175 requests per second for
its 10,000; splitwise-sim (8f99e7d) 12.9; simdistserve (LLMServe/DistServe, 82831f1) 147, each on its own example.
"""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import has_compiler
from meshwright.simcore.domain.serving import LengthDistribution, ServingWorkload
from meshwright.simcore.serving import event_loop
from meshwright.simcore.serving.behaviour import EngineBehaviour
from meshwright.simcore.serving.metrics import summarize
from meshwright.simcore.serving.requests import RequestTable, generate_requests
from meshwright.simcore.serving.simulate import ServingResult, simulate
from meshwright.simcore.serving.step_table import StepTable

VIDUR_RATE, SPLITWISE_RATE, DISTSERVE_RATE = 175.0, 12.9, 147.0
PLAIN_COUNT = 20_000
MEBI = 1 << 20


def step_table() -> StepTable:
    """Return the step times of an engine about as fast as a 70 B model on eight H100."""
    tokens = np.array([1.0, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
    work = np.maximum(0.009 + 4e-6 * tokens, 2.2e-5 * tokens)
    batches, contexts = np.array([1.0, 8, 32, 128, 256]), np.array([1.0, 512, 2048, 8192, 32768, 131072])
    prompts = np.array([0.0, 512, 2048, 8192, 32768, 131072])
    return StepTable(
        token_counts=tokens,
        graph_token_time=work,
        eager_token_time=1.05 * work,
        decode_batch_sizes=batches,
        decode_contexts=contexts,
        decode_attention_time=1e-4 + 1.2e-8 * batches[:, np.newaxis] * contexts,
        prompt_lengths=prompts,
        prefill_attention_time=1.5e-9 * prompts**2,
        decode_skew=0.05,
        step_latency=4e-4,
        host_time=2e-3,
        host_time_per_sequence=1e-5,
        eager_host_time=5e-3,
    )


def requests_of(count: int, rate: float, input_mean: float = 1000, output_mean: float = 250) -> RequestTable:
    return generate_requests(
        ServingWorkload(
            arrival="poisson",
            rate=rate,
            num_requests=count,
            input_length=LengthDistribution(mean=input_mean, kind="lognormal"),
            output_length=LengthDistribution(mean=output_mean, kind="lognormal"),
        ),
        seed=1,
    )


def digest(result: ServingResult) -> str:
    arrays = (result.scheduled_time, result.first_token_time, result.finish_time, result.num_preemptions)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


class LoopClock:
    """Runs the event loop and adds up its time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.loop = event_loop.run

    def __call__(self, ints: NDArray[np.int64], floats: NDArray[np.float64]) -> int:
        """Run the loop."""
        begin = time.process_time()
        code = self.loop(ints, floats)
        self.seconds += time.process_time() - begin
        return code


def timed(
    requests: RequestTable, behaviour: EngineBehaviour, num_replicas: int
) -> tuple[ServingResult, float, float]:
    """Return the result, the seconds of the loop and the seconds of all."""
    clock = LoopClock()
    event_loop.run = clock
    begin = time.process_time()
    result = simulate(step_table(), behaviour, requests, num_replicas=num_replicas, router="least_loaded")
    summarize(result)
    seconds = time.process_time() - begin
    event_loop.run = clock.loop
    return result, clock.seconds, seconds


ENGINE = EngineBehaviour(max_num_sequences=256, max_num_batched_tokens=2048, num_kv_blocks=50_000)
VIDUR_ENGINE = EngineBehaviour(max_num_sequences=128, max_num_batched_tokens=512, num_kv_blocks=50_000)


def row(name: str, count: int, result: ServingResult, loop: float, seconds: float, note: str) -> None:
    print(
        f"{name:<34} {count:>9,} {result.num_steps:>10,} {loop:>8.3f} {seconds:>8.3f} {count / loop:>12,.0f}  {note}"
    )


def main() -> None:
    if sys.argv[1:] == ["first"]:
        simulate(step_table(), ENGINE, requests_of(1000, 10.0))
        return
    if sys.argv[1:] == ["digest"]:
        small = requests_of(PLAIN_COUNT, 400.0)
        result, loop, seconds = timed(small, ENGINE, 8)
        print(digest(result), result.num_steps, loop, seconds)
        return
    simulate(step_table(), ENGINE, requests_of(10, 10.0))
    print(f"compiled: {has_compiler()}")
    print(f"{'case':<34} {'requests':>9} {'steps':>10} {'loop s':>8} {'all s':>8} {'requests/s':>12}")
    million = requests_of(1_000_000, 400.0)
    for name, rate in (
        ("8 replicas, overloaded", 400.0),
        ("8 replicas, at their limit", 270.0),
        ("8 replicas, half load", 150.0),
    ):
        million = requests_of(1_000_000, rate)
        result, loop, seconds = timed(million, ENGINE, 8)
        row(name, 1_000_000, result, loop, seconds, f"{1e6 / loop / DISTSERVE_RATE:,.0f} x simdistserve")
    del million, result

    small = requests_of(PLAIN_COUNT, 400.0)
    result, loop, seconds = timed(small, ENGINE, 8)
    row("the first of them, compiled", PLAIN_COUNT, result, loop, seconds, digest(result))
    child = subprocess.run(
        [sys.executable, "-P", __file__, "digest"],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    plain = f"{child[0]}, {'equal' if child[0] == digest(result) else 'DIFFERENT'}"
    row("the same in plain Python", PLAIN_COUNT, result, float(child[2]), float(child[3]), plain)

    vidur = requests_of(10_000, 4.0, 1020, 210)
    result, loop, seconds = timed(vidur, VIDUR_ENGINE, 1)
    row(
        "Vidur's case: 4/s, 1 replica",
        10_000,
        result,
        loop,
        seconds,
        f"{10_000 / seconds / VIDUR_RATE:,.0f} x Vidur, with metrics",
    )

    day = requests_of(1_000_000, 1_000_000 / 86_400)
    result, loop, seconds = timed(day, ENGINE, 64)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row(
        "a day on 64 replicas", 1_000_000, result, loop, seconds, f"peak memory {peak:,.0f} MiB of all so far"
    )

    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        for name in ("first result, empty kernel cache", "first result, warm kernel cache"):
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-P", __file__, "first"], env=environment, check=True)
            wall = time.perf_counter() - begin
            now = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
            print(f"{name:<34} {cpu:.1f} s of CPU, {wall:.1f} s on the clock")


if __name__ == "__main__":
    main()
