"""Tasks whose communications share links, against a plain event loop that solves all rates anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.simcore.network.channels import ChannelLinks, Channels


@dataclass
class Tasks:
    """A random graph of tasks over channels."""

    predecessors: np.ndarray
    fixed: np.ndarray
    channel: np.ndarray
    seconds: np.ndarray


def random_tasks(random: np.random.Generator, num_tasks: int, num_channels: int) -> Tasks:
    predecessors = np.full((2, num_tasks), -1)
    for task in range(1, num_tasks):
        count = int(random.integers(0, 3))
        predecessors[:count, task] = random.integers(max(0, task - 8), task, count)
    return Tasks(
        predecessors=predecessors,
        fixed=random.uniform(0.01, 2.0, num_tasks),
        channel=random.integers(-1, num_channels, num_tasks),
        seconds=random.choice([0.0, 0.3, 1.0, 2.1], num_tasks) * random.uniform(0.5, 1.0, num_tasks),
    )


def random_links(
    random: np.random.Generator, num_channels: int, num_links: int
) -> tuple[ChannelLinks, np.ndarray]:
    entries = [
        (channel, int(link), float(random.integers(1, 4)))
        for channel in range(num_channels)
        for link in random.choice(num_links, int(random.integers(1, 4)), replace=False)
    ]
    channel, link, flows = (np.array(column) for column in zip(*entries, strict=True))
    return ChannelLinks(channel=channel, link=link, num_flows=flows), random.uniform(1e9, 9e9, num_links)


def plain_rates(capacity: np.ndarray, flows: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Raise the rate of one flow of all channels together until a link or the channel's own limit holds it."""
    rates, is_open = np.zeros(len(flows)), np.ones(len(flows), dtype=bool)
    while is_open.any():
        demand = flows[is_open].sum(axis=0)
        room = capacity - rates @ flows
        share = np.min(room[demand > 0.0] / demand[demand > 0.0], initial=np.inf)
        level = min(share, most[is_open].min())
        full = (demand > 0.0) & (room <= level * demand * (1.0 + 1e-12))
        held = is_open & (flows[:, full].any(axis=1) | (most <= level * (1.0 + 1e-12)))
        rates[held], is_open = level, is_open & ~held
    return rates


def plain_run(tasks: Tasks, links: ChannelLinks, capacity: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return the end of every task."""
    flows = np.zeros((len(most), len(capacity)))
    flows[links.channel, links.link] = links.num_flows
    num_tasks = len(tasks.fixed)
    end, timer, left = np.full(num_tasks, np.inf), np.full(num_tasks, np.nan), np.full(num_tasks, np.nan)
    lines: list[list[int]] = [[] for _ in most]
    now = 0.0
    while True:
        has_moved = True
        while has_moved:
            has_moved = False
            for task in range(num_tasks):
                before = tasks.predecessors[:, task]
                if np.isnan(timer[task]) and all(end[each] <= now for each in before if each >= 0):
                    timer[task], has_moved = now + tasks.fixed[task], True
                if timer[task] <= now and np.isnan(left[task]):
                    left[task], has_moved = tasks.seconds[task], True
                    if tasks.channel[task] >= 0 and left[task] > 0.0:
                        lines[tasks.channel[task]].append(task)
                    else:
                        end[task] = now
        heads = np.array([line[0] for line in lines if line], dtype=int)
        busy = tasks.channel[heads]
        speed = plain_rates(capacity, flows[busy], most[busy]) / most[busy]
        following = min(
            np.min(now + left[heads] / speed, initial=np.inf), np.min(timer[timer > now], initial=np.inf)
        )
        if not np.isfinite(following):
            return end
        left[heads] -= speed * (following - now)
        now = following
        for task in heads[left[heads] <= 1e-12]:
            end[task] = now
            lines[tasks.channel[task]].remove(task)


@pytest.mark.parametrize("seed", range(12))
def test_tasks_that_share_links_end_when_a_plain_event_loop_says(seed: int) -> None:
    random = np.random.default_rng(seed)
    tasks = random_tasks(random, 40, 5)
    links, capacity = random_links(random, 5, 6)
    slowed = capacity * random.choice([1.0, 0.4], 6)
    channels = Channels(5, links, capacity, links, slowed)
    _, begin, end = channels.run(tasks.predecessors, tasks.fixed, tasks.channel, tasks.seconds)
    assert end == pytest.approx(plain_run(tasks, links, slowed, channels.full_rate), rel=1e-9)
    assert (end >= begin).all()


def test_links_that_all_load_alike_are_one() -> None:
    # Two channels cross 8 equal links each; a third one crosses others and never fills any.
    channel = np.repeat([0, 1, 2], [8, 8, 4])
    link = np.concatenate([np.arange(8), np.arange(8), np.arange(4) + 8])
    channels = Channels(3, ChannelLinks(channel=channel, link=link, num_flows=np.ones(20)), np.full(12, 2e9))
    assert channels.num_alike.tolist() == [8]
    assert channels.load[:, 0] == pytest.approx([1.0, 1.0, 0.0])


def test_a_channel_off_the_described_network_is_refused() -> None:
    described = ChannelLinks(channel=np.array([0]), link=np.array([0]), num_flows=np.ones(1))
    actual = ChannelLinks(channel=np.array([0, 1]), link=np.array([0, 1]), num_flows=np.ones(2))
    with pytest.raises(SpecError, match="channel 1 crosses no link"):
        Channels(2, described, np.ones(2), actual, np.ones(2))


def test_a_channel_that_something_else_holds_back_leaves_the_rest_of_its_link() -> None:
    links = ChannelLinks(channel=np.array([0, 1]), link=np.array([0, 0]), num_flows=np.ones(2))
    channels = Channels(2, links, np.full(1, 1e9), most_rate=np.array([np.inf, 2.5e8]))
    none = np.full((1, 2), -1)
    _, _, end = channels.run(none, np.zeros(2), np.arange(2), np.array([3.0, 8.0]))
    # A quarter of the link is held by the second for its 8 s; the first has the other three.
    assert end == pytest.approx([4.0, 8.0])


def test_communications_of_a_channel_follow_each_other() -> None:
    links = ChannelLinks(channel=np.array([0]), link=np.array([0]), num_flows=np.ones(1))
    channels = Channels(1, links, np.full(1, 1e9))
    start, begin, end = channels.run(
        np.full((1, 3), -1), np.array([0.0, 0.5, 0.7]), np.zeros(3, dtype=int), np.full(3, 2.0)
    )
    assert start.tolist() == [0.0, 0.0, 0.0]
    assert begin.tolist() == [0.0, 0.5, 0.7]
    assert end == pytest.approx([2.0, 4.0, 6.0])
