"""Max-min fair flows: sums by hand, properties, and SimGrid's answers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import SpecError
from meshwright.simcore.network import FlowSet, simulate_flows

FIXTURES = Path(__file__).with_name("simgrid.npz")
settings.register_profile("compiles", deadline=None)
settings.load_profile("compiles")


def flow_set(
    capacity: list[float],
    routes: list[list[int]],
    num_bytes: list[float],
    start: list[float] | None = None,
    **changes: object,
) -> FlowSet:
    fields: dict[str, object] = {
        "capacity": np.array(capacity, dtype=float),
        "route_starts": np.concatenate([[0], np.cumsum([len(route) for route in routes])]).astype(np.int64),
        "route_links": np.concatenate(routes).astype(np.int64),
        "num_bytes": np.array(num_bytes, dtype=float),
        "start": np.zeros(len(routes)) if start is None else np.array(start, dtype=float),
    }
    return FlowSet(**(fields | changes))  # type: ignore[arg-type]  # checked by the class


def finish(*arguments: object, **changes: object) -> list[float]:
    times: list[float] = simulate_flows(flow_set(*arguments, **changes)).finish.tolist()  # type: ignore[arg-type]
    return times


@st.composite
def random_flows(draw: st.DrawFn) -> FlowSet:
    num_links = draw(st.integers(1, 6))
    num_flows = draw(st.integers(1, 12))
    numbers = st.floats(1.0, 100.0)
    routes = [
        draw(st.lists(st.integers(0, num_links - 1), min_size=1, max_size=3, unique=True))
        for _ in range(num_flows)
    ]
    return flow_set(
        draw(st.lists(numbers, min_size=num_links, max_size=num_links)),
        routes,
        draw(st.lists(numbers, min_size=num_flows, max_size=num_flows)),
        draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=num_flows, max_size=num_flows)),
    )


def test_equal_flows_share_a_link_evenly() -> None:
    assert finish([8.0], [[0]] * 4, [10.0] * 4) == [5.0] * 4


def test_a_long_flow_of_a_parking_lot_gets_half_of_every_link() -> None:
    # One flow over three links, one cross flow on each (Bertsekas and Gallager, figure 6.20).
    times = finish([10.0] * 3, [[0, 1, 2], [0], [1], [2]], [50.0] * 4)
    assert times == [10.0] * 4


def test_water_fills_what_a_narrow_link_leaves() -> None:
    # Flow 0 over links of 1 and 2 B/s gets 0.5 beside flow 1; flow 2 takes the 1.5 that are left.
    times = finish([1.0, 2.0], [[0, 1], [0], [1]], [5.0, 5.0, 15.0])
    assert times == [10.0, 10.0, 10.0]


def test_a_late_flow_slows_the_first_from_its_start_on() -> None:
    # 4 s alone move 40 B; the other 60 B at 5 B/s need 12 s; the second has 20 B left then, at full rate.
    assert finish([10.0], [[0], [0]], [100.0, 80.0], [0.0, 4.0]) == [16.0, 18.0]


def test_latency_delays_the_first_byte() -> None:
    assert finish([10.0], [[0]], [100.0], latency=np.array([2.5])) == [12.5]


def test_a_flow_without_bytes_ends_as_it_begins() -> None:
    assert finish([10.0], [[0], [0]], [0.0, 10.0], [3.0, 0.0]) == [3.0, 1.0]


def test_an_entry_that_stands_for_many_equals_them_written_out() -> None:
    many = finish([12.0, 5.0], [[0]] * 3 + [[0, 1]] * 2, [6.0] * 3 + [4.0] * 2)
    folded = finish([12.0, 5.0], [[0], [0, 1]], [6.0, 4.0], multiplicity=np.array([3.0, 2.0]))
    assert folded == pytest.approx([many[0], many[3]], rel=1e-12)


@given(random_flows())
def test_no_flow_beats_its_narrowest_link_and_no_link_its_capacity(flows: FlowSet) -> None:
    times = simulate_flows(flows).finish
    for flow in range(flows.num_flows):
        links = flows.route_links[flows.route_starts[flow] : flows.route_starts[flow + 1]]
        alone = flows.num_bytes[flow] / flows.capacity[links].min()
        assert times[flow] >= (flows.start[flow] + alone) * (1.0 - 1e-9)
    owner = np.repeat(np.arange(flows.num_flows), np.diff(flows.route_starts))
    for link in range(len(flows.capacity)):
        on_link = owner[flows.route_links == link]
        if len(on_link):
            span = times[on_link].max() - flows.start[on_link].min()
            assert flows.num_bytes[on_link].sum() <= span * flows.capacity[link] * (1.0 + 1e-9)


@given(random_flows())
def test_more_bandwidth_everywhere_speeds_all_up_alike(flows: FlowSet) -> None:
    doubled = FlowSet(
        capacity=2.0 * flows.capacity,
        route_starts=flows.route_starts,
        route_links=flows.route_links,
        num_bytes=2.0 * flows.num_bytes,
        start=flows.start,
    )
    assert simulate_flows(doubled).finish == pytest.approx(simulate_flows(flows).finish, rel=1e-9)


def test_simgrid_agrees() -> None:
    with np.load(FIXTURES) as fixtures:
        cases = sorted({int(name.split(".")[0]) for name in fixtures.files})
        worst = 0.0
        for case in cases:
            fields = {
                name: fixtures[f"{case}.{name}"]
                for name in ("capacity", "route_starts", "route_links", "num_bytes", "start")
            }
            expected = fixtures[f"{case}.finish"]
            times = simulate_flows(FlowSet(**fields)).finish
            worst = max(worst, float(np.max(np.abs(times / expected - 1.0))))
    assert len(cases) >= 50
    assert worst <= 1e-9


def filled_rates(capacity: np.ndarray, uses: np.ndarray) -> np.ndarray:
    """Progressive filling as the books have it; ``uses`` is what each flow takes of each link per unit of rate."""
    rates = np.zeros(len(uses))
    is_open = np.ones(len(uses), dtype=bool)
    while is_open.any():
        demand = uses[is_open].sum(axis=0)
        room = capacity - rates @ uses
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(demand > 0.0, room / demand, np.inf)
        link = int(np.argmin(shares))
        fixed = is_open & (uses[:, link] > 0.0)
        rates[fixed], is_open = shares[link], is_open & ~fixed
    return rates


def plain_finish(flows: FlowSet) -> np.ndarray:
    """Run flows by solving all rates anew at every event."""
    uses = np.zeros((flows.num_flows, len(flows.capacity)))
    weight = np.ones(flows.num_flows) if flows.multiplicity is None else flows.multiplicity
    for flow in range(flows.num_flows):
        uses[flow, flows.route_links[flows.route_starts[flow] : flows.route_starts[flow + 1]]] = weight[flow]
    left, finish, now = flows.num_bytes.copy(), np.full(flows.num_flows, np.inf), 0.0
    while not np.isfinite(finish).all():
        active = np.flatnonzero((flows.start <= now) & np.isinf(finish))
        rates = filled_rates(flows.capacity, uses[active])
        ends = now + left[active] / rates
        after = min(flows.start[flows.start > now].min(initial=np.inf), ends.min(initial=np.inf))
        left[active] -= rates * (after - now)
        finish[active[ends <= after]] = after
        now = after
    return finish


@pytest.mark.parametrize(
    ("num_flows", "num_links", "window"),
    [(60, 8, 0.2), (60, 8, 3.0), (90, 30, 1.0), (90, 60, 2.0), (90, 30, 0.0)],
)
def test_solving_only_what_an_event_changes_equals_solving_all(
    num_flows: int, num_links: int, window: float
) -> None:
    for seed in range(3):
        random = np.random.default_rng(seed)
        lengths = random.integers(1, 5, num_flows)
        flows = FlowSet(
            capacity=random.uniform(1.0, 10.0, num_links),
            route_starts=np.concatenate([[0], np.cumsum(lengths)]),
            route_links=np.concatenate(
                [random.choice(num_links, size=each, replace=False) for each in lengths]
            ),
            num_bytes=random.uniform(0.1, 10.0, num_flows) if seed % 2 else np.full(num_flows, 3.0),
            start=random.uniform(0.0, window * num_flows / num_links, num_flows),
            multiplicity=random.integers(1, 4, num_flows).astype(float) if seed > 1 else None,
        )
        assert simulate_flows(flows).finish == pytest.approx(plain_finish(flows), rel=1e-9)


def test_an_event_far_away_changes_no_rate() -> None:
    # Two bottlenecks of unequal level joined by a flow that only the lower one holds back: the events on the higher
    # one leave it alone, and it ends as if the others were not there.
    chained = finish([2.0, 100.0], [[0, 1], [0], [1], [1]], [10.0, 10.0, 50.0, 40.0], [0.0, 0.0, 1.0, 2.0])
    assert chained[:2] == [10.0, 10.0]


def test_plain_python_gives_the_same_bits() -> None:
    program = (
        "import numpy as np\n"
        "from meshwright.simcore.network import FlowSet, simulate_flows\n"
        f"f = np.load({str(FIXTURES)!r})\n"
        "names = ('capacity', 'route_starts', 'route_links', 'num_bytes', 'start')\n"
        "cases = (3, 4, 33)\n"
        "print([simulate_flows(FlowSet(**{n: f[f'{c}.{n}'] for n in names})).finish.tobytes().hex() for c in cases])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-P", "-c", program],
            env={**os.environ, "NUMBA_DISABLE_JIT": disabled},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for disabled in ("0", "1")
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": np.array([0.0])}, "capacity must be above 0"),
        ({"num_bytes": np.array([np.nan])}, "num_bytes must be finite"),
        ({"start": np.array([-1.0])}, "start must be finite and not negative"),
        ({"route_links": np.array([1])}, "links are 0 to 0"),
        ({"route_starts": np.array([0, 0])}, "number of route_links"),
    ],
)
def test_impossible_flows_are_refused(changes: dict[str, object], message: str) -> None:
    flows = flow_set([1.0], [[0]], [1.0])
    with pytest.raises(SpecError, match=message):
        replace(flows, **changes)  # type: ignore[arg-type]  # checked by the class
