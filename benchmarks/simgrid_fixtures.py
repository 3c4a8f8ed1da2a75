"""Regenerate ``tests/simcore/network/simgrid.npz``: what SimGrid says of random flows.

Runs under the Python that Debian's ``python3-simgrid`` (3.32) belongs to, which needs numpy besides:

    /usr/bin/python3 benchmarks/simgrid_fixtures.py tests/simcore/network/simgrid.npz

The model is SimGrid's CM02 without bandwidth or latency factors, round-trip weights, TCP window or cross traffic:
pure max-min sharing. Every case runs in a process of its own, because an engine lives once.
"""

from __future__ import annotations

import multiprocessing
import sys

import numpy as np

CONFIGURATION = (
    "network/model:CM02",
    "network/bandwidth-factor:1",
    "network/latency-factor:1",
    "network/weight-S:0",
    "network/TCP-gamma:1e18",
    "network/crosstraffic:0",
    "maxmin/precision:1e-9",
    "surf/precision:1e-12",
)
# Flows, links, and the seconds over which they start; 0 is all at once.
SIZES = (
    [(2, 1, 0.0), (3, 2, 0.0), (10, 5, 0.0), (10, 5, 1.0), (20, 8, 0.5)] * 6
    + [
        (50, 10, 0.2),
        (50, 10, 2.0),
        (100, 20, 0.0),
        (100, 20, 1.0),
        (100, 50, 0.5),
        (200, 20, 1.0),
        (200, 50, 0.5),
        (300, 100, 1.0),
    ]
    * 3
    + [(1000, 50, 2.0), (1000, 100, 1.0)]
)


def random_flows(case: int) -> dict[str, np.ndarray]:
    """Return capacities, routes, sizes and starts of one case."""
    num_flows, num_links, window = SIZES[case]
    random = np.random.default_rng(case)
    lengths = random.integers(1, min(4, num_links) + 1, num_flows)
    routes = [random.choice(num_links, size=length, replace=False) for length in lengths]
    return {
        "capacity": random.uniform(1e9, 1e10, num_links),
        "route_starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "route_links": np.concatenate(routes).astype(np.int64),
        # SimGrid takes whole bytes.
        "num_bytes": np.floor(random.uniform(1e6, 1e8, num_flows)),
        "start": np.sort(random.uniform(0.0, window, num_flows)) if window else np.zeros(num_flows),
    }


def simgrid_finish(case: int) -> np.ndarray:
    """Return when SimGrid lets every flow of a case end [s]."""
    import simgrid

    flows = random_flows(case)
    engine = simgrid.Engine(
        ["fixtures", "--log=root.thresh:critical", *(f"--cfg={word}" for word in CONFIGURATION)]
    )
    zone = simgrid.NetZone.create_full_zone("zone")
    links = [
        zone.create_link(f"link{index}", [float(capacity)]).set_latency(0).seal()
        for index, capacity in enumerate(flows["capacity"])
    ]
    finish = np.zeros(len(flows["num_bytes"]))

    def send(flow: int) -> None:
        simgrid.this_actor.sleep_until(float(flows["start"][flow]))
        simgrid.Mailbox.by_name(str(flow)).put("", int(flows["num_bytes"][flow]))

    def receive(flow: int) -> None:
        simgrid.Mailbox.by_name(str(flow)).get()
        finish[flow] = simgrid.Engine.clock

    for flow in range(len(finish)):
        ends = [zone.create_host(f"{side}{flow}", 1e9).seal() for side in ("from", "to")]
        first, last = flows["route_starts"][flow : flow + 2]
        route = [simgrid.LinkInRoute(links[link]) for link in flows["route_links"][first:last]]
        zone.add_route(ends[0].netpoint, ends[1].netpoint, None, None, route, False)
        simgrid.Actor.create(f"send{flow}", ends[0], send, flow)
        simgrid.Actor.create(f"receive{flow}", ends[1], receive, flow)
    zone.seal()
    engine.run()
    return finish


def main() -> None:
    """Write all cases to the file named on the command line."""
    arrays: dict[str, np.ndarray] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case, finish in enumerate(pool.imap(simgrid_finish, range(len(SIZES)), chunksize=1)):
            arrays |= {f"{case}.{name}": values for name, values in random_flows(case).items()}
            arrays[f"{case}.finish"] = finish
            print(f"case {case}: {len(finish)} flows end by {finish.max():.6f} s", flush=True)
    np.savez_compressed(sys.argv[1], **arrays)


if __name__ == "__main__":
    main()
