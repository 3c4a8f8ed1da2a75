"""Host orders against simulated annealing as Pipette does it, on the same seeded matrices.

    python benchmarks/mapping.py [--hosts 16 64 128 1024]

The peer's search is our own implementation of the published one (Yim et al. 2024, DATE; its moves, temperatures and
acceptance rule), given as many evaluations as its code makes in 500 s on a CPU like ours: 64,800, 26,800 and 15,200 a
second on 16, 64 and 128 hosts.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from meshwright.planner.mapping import MappingProblem, grid_problem, order_cost, search_order
from meshwright.simcore.compiled import compiled

# Evaluations per second of Pipette's code, and its limit in seconds.
PEER_SPEED = {16: 64_800, 64: 26_800, 128: 15_200}
PEER_SECONDS = 500
STAGES = {16: 4, 64: 8, 128: 16, 1024: 32}


@compiled
def pipette_annealing(
    hop: np.ndarray, ring: np.ndarray, num_stages: int, num_columns: int, num_evaluations: int, seed: int
) -> float:
    """Anneal as Pipette: five moves, temperature 1 times 0.999 a step, differences scaled by their power of ten."""
    np.random.seed(seed)
    num_hosts = num_stages * num_columns
    order, trial = np.arange(num_hosts), np.arange(num_hosts)
    best, cost, temperature = np.inf, np.inf, 1.0
    for step in range(num_evaluations):
        trial[:] = order
        first = np.random.randint(0, num_hosts)
        second = np.random.randint(0, num_hosts)
        low, high = min(first, second), max(first, second)
        move = np.random.randint(0, 5)
        if step > 0 and low < high:
            if move == 0:
                trial[low : high + 1] = order[low : high + 1][::-1]
            elif move == 1:
                trial[low:high] = order[low + 1 : high + 1]
                trial[high] = order[low]
            elif move == 2:
                trial[low], trial[high] = order[high], order[low]
            else:
                # A route of the hosts between the two goes to the front, as it is or reversed.
                length = high - low
                route = order[low:high].copy()
                trial[length:high] = order[:low]
                trial[:length] = route if move == 3 else route[::-1]
        slowest_pipeline, slowest_ring = 0.0, 0.0
        for column in range(num_columns):
            total = 0.0
            for stage in range(num_stages - 1):
                total += hop[trial[stage * num_columns + column], trial[(stage + 1) * num_columns + column]]
            slowest_pipeline = max(slowest_pipeline, total)
        for stage in range(num_stages):
            for column in range(num_columns):
                after = (column + 1) % num_columns
                slowest_ring = max(
                    slowest_ring,
                    ring[trial[stage * num_columns + column], trial[stage * num_columns + after]],
                )
        new = slowest_pipeline + slowest_ring
        difference = new - cost
        is_taken = step == 0 or difference <= 0.0
        if not is_taken:
            scaled = difference / 10.0 ** (np.floor(np.log10(difference)) + 1.0)
            is_taken = np.random.random() < np.exp(-scaled / max(temperature, 1e-300))
        if is_taken:
            order[:] = trial
            cost = new
        best = min(best, cost)
        temperature *= 0.999
    return best


def random_problem(num_hosts: int, seed: int) -> MappingProblem:
    """Return links of 5 to 25 GB/s and the traffic of a GPT of hidden size 12,288 with 16 micro-batches."""
    random = np.random.default_rng(seed)
    bandwidth = random.uniform(5e9, 25e9, (num_hosts, num_hosts))
    stages = STAGES[num_hosts]
    return grid_problem(
        bandwidth=np.minimum(bandwidth, bandwidth.T),
        num_stages=stages,
        hosts_per_stage=num_hosts // stages,
        # Forward and backward, once per group of as many micro-batches as stages.
        pipeline_bytes=2.0 * (16 / stages) * 2.0 * 2048 * 12288,
        ring_bytes=2.0 * 2.0 * 12 * 12288**2 * 96 / stages / 8,
    )


def main() -> None:
    """Print one line per matrix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[16, 64, 128, 1024], choices=sorted(STAGES))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    search_order(random_problem(16, 99), effort=1e-4)
    for num_hosts in arguments.hosts:
        for seed in range(arguments.seeds if num_hosts in PEER_SPEED else 1):
            problem = random_problem(num_hosts, seed)
            start = time.perf_counter()
            result = search_order(problem, seed=seed)
            seconds = time.perf_counter() - start
            assert abs(order_cost(problem, result.order) - result.cost) < 1e-9
            line = (
                f"{num_hosts} hosts, matrix {seed}: as given {result.identity_cost:.4f} s, ours {result.cost:.4f} s in "
                f"{seconds:.1f} s ({result.num_evaluations / seconds / 1e6:.1f} M orders/s), within {result.gap:.0%} of the bound"
            )
            if num_hosts in PEER_SPEED:
                count = PEER_SPEED[num_hosts] * PEER_SECONDS
                peer = pipette_annealing(
                    problem.traffic[0].time,
                    problem.traffic[1].time,
                    STAGES[num_hosts],
                    num_hosts // STAGES[num_hosts],
                    count,
                    seed,
                )
                line += f"; Pipette's annealing {peer:.4f} s after {count / 1e6:.1f} M orders ({peer / result.cost - 1:+.1%})"
            print(line, flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
