"""Flows per second of the max-min solver: 1 to 4 links each over 1,000 links, by how full the links are.

    python benchmarks/flows.py

Staggered starts over a longer window leave the links emptier. An event is answered where it changes a rate: few flows
while links are loaded to less than half, nearly all once more is offered than they carry.
"""

from __future__ import annotations

import time

import numpy as np

from meshwright.simcore.network import FlowSet, simulate_flows


def random_flows(num_flows: int, num_links: int, window: float, seed: int = 0) -> FlowSet:
    """Return flows of 1 to 100 MB that start within ``window`` seconds, over links of 1 to 10 GB/s."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 5, num_flows)
    return FlowSet(
        capacity=random.uniform(1e9, 1e10, num_links),
        route_starts=np.concatenate([[0], np.cumsum(lengths)]),
        route_links=np.concatenate([random.choice(num_links, size=each, replace=False) for each in lengths]),
        num_bytes=random.uniform(1e6, 1e8, num_flows),
        start=np.sort(random.uniform(0.0, window, num_flows)),
    )


def main() -> None:
    """Print one line per window."""
    simulate_flows(random_flows(10, 5, 1.0))
    for window in (4.0, 2.4, 1.8, 1.4, 1.0, 0.6, 0.3, 0.1):
        flows = random_flows(10_000, 1_000, window)
        start = time.process_time()
        times = simulate_flows(flows)
        seconds = time.process_time() - start
        offered = np.repeat(flows.num_bytes, np.diff(flows.route_starts)).sum() / flows.capacity.sum()
        load, used = offered / window, offered / times.finish.max()
        print(
            f"10,000 flows, 1,000 links: offered {load:.0%} of what links carry until the last start, "
            f"{used:.0%} until the last end: {10_000 / seconds:,.0f} flows/s"
        )


if __name__ == "__main__":
    main()
