"""Channels: communications that happen again and again over the same links, each known by its time alone.

A channel that takes ``t`` seconds alone moves as much as its slowest link carries in ``t`` seconds: on the described
network, without others, it is never slowed down. What it meets there, or a link slower than described, slows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.network.fabric import mixed_bits
from meshwright.simcore.network.flow_memory import flow_memory
from meshwright.simcore.network.flows import run_communications

__all__ = ["ChannelLinks", "Channels"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Links filled up to this share more than their capacity are full, not too full: sums of shares round.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelLinks:
    """Flows of some channels on each link; arrays of shape ``(num_entries,)``, one entry per channel and link.

    Parameters
    ----------
    channel, link : IntArray
        Which channel crosses which link.
    num_flows : FloatArray
        How many of its flows do, counting each as large as it is beside the channel's others.
    """

    channel: IntArray
    link: IntArray
    num_flows: FloatArray


class Channels:
    """Channels on the links where they can meet.

    Parameters
    ----------
    num_channels : int
        Channels; those that no entry names cross no link that others do.
    described : ChannelLinks
        Their flows on the network that their times alone hold for.
    described_capacity : FloatArray
        Of its links [B/s].
    actual : ChannelLinks | None
        Their flows on the network as it is; None is the described one.
    capacity : FloatArray | None
        Of its links [B/s].
    most_rate : FloatArray | None
        What holds one flow of each channel back beside the links, infinity for nothing, ``(num_channels,)`` [B/s].

    Attributes
    ----------
    full_rate : FloatArray
        Bytes per second of one flow of each channel when nothing slows it, ``(num_channels,)``; 1 without links.
    links : IntArray
        One link of each class that all channels load alike and could fill, ``(num_classes,)``.
    num_alike : IntArray
        Links of each class, ``(num_classes,)``.
    load : FloatArray
        Share of such a link that each channel takes at full rate, ``(num_channels, num_classes)``.

    Notes
    -----
    Links are shared max-min fairly between flows, as by per-flow congestion control; the flows of a channel move in
    lock-step, at the pace of the slowest. A link that all its channels together cannot fill is left out.
    """

    def __init__(
        self,
        num_channels: int,
        described: ChannelLinks,
        described_capacity: FloatArray,
        actual: ChannelLinks | None = None,
        capacity: FloatArray | None = None,
        most_rate: FloatArray | None = None,
    ) -> None:
        if actual is None or capacity is None:
            actual, capacity = described, described_capacity
        most = np.zeros(num_channels)
        np.maximum.at(most, described.channel, described.num_flows / described_capacity[described.link])
        self.full_rate: FloatArray = 1.0 / np.where(most > 0.0, most, 1.0)
        if most_rate is not None:
            self.full_rate = np.minimum(self.full_rate, most_rate)
        stray = np.setdiff1d(actual.channel, described.channel)
        if len(stray):
            raise SpecError(f"channels: channel {stray[0]} crosses no link of the described network")
        share = actual.num_flows * self.full_rate[actual.channel] / capacity[actual.link]
        self._fold(num_channels, actual, share, capacity)

    def _fold(self, num_channels: int, actual: ChannelLinks, share: FloatArray, capacity: FloatArray) -> None:
        """Keep one of the links that every channel takes the same share of, where the shares exceed the link."""
        total = np.bincount(actual.link, weights=share, minlength=len(capacity))
        # Equal up to the order of their sums is equal: 24 bits of a share tell links apart.
        words = np.stack([actual.channel, share.astype(np.float32).view(np.int32)]).astype(np.uint64)
        alike = np.zeros(len(capacity), dtype=np.uint64)
        np.add.at(alike, actual.link, mixed_bits(words, 1))
        is_kept = total > 1.0 + _ROUNDING
        candidates = np.flatnonzero(is_kept)
        _, first, inverse = np.unique(alike[candidates], return_index=True, return_inverse=True)
        self.links: IntArray = candidates[first].astype(np.int64)
        self.num_alike: IntArray = np.bincount(inverse.reshape(-1), minlength=len(first)).astype(np.int64)
        place = np.full(len(capacity), -1, dtype=np.int64)
        place[self.links] = np.arange(len(self.links))
        kept = np.flatnonzero(place[actual.link] >= 0)
        self.load: FloatArray = np.zeros((num_channels, len(self.links)))
        self.load[actual.channel[kept], place[actual.link[kept]]] = share[kept]
        self._capacity: FloatArray = capacity[self.links]

    def run(
        self, predecessors: IntArray, fixed: FloatArray, channel: IntArray, seconds: FloatArray
    ) -> FloatArray:
        """Run tasks that take a fixed time and then communicate over a channel.

        A channel carries one communication after the other, first come, first served.

        Parameters
        ----------
        predecessors : IntArray
            Tasks that must have ended, -1 for none, ``(num_predecessors, num_tasks)``.
        fixed : FloatArray
            Time before a task communicates, ``(num_tasks,)`` [s].
        channel : IntArray
            Channel it uses then, -1 for none, ``(num_tasks,)``.
        seconds : FloatArray
            How long it communicates when nothing slows it, ``(num_tasks,)`` [s].

        Returns
        -------
        FloatArray
            Start, begin of the communication and end of each task, ``(3, num_tasks)`` [s].
        """
        num_channels = len(self.full_rate)
        owner, link = np.nonzero(self.load)
        # A link of its own holds every flow to its full rate.
        counts = np.bincount(owner, minlength=num_channels) + 1
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        links, usage = np.empty(starts[-1], dtype=np.int64), np.ones(starts[-1])
        links[starts[:-1]] = len(self.links) + np.arange(num_channels)
        shared = np.ones(starts[-1], dtype=bool)
        shared[starts[:-1]] = False
        links[shared] = link
        usage[shared] = self.load[owner, link] * self._capacity[link] / self.full_rate[owner]
        flows = flow_memory(np.concatenate([self._capacity, self.full_rate]), starts, links, usage)
        # The last rate is that of tasks without a channel, which send nothing.
        volume = seconds * np.append(self.full_rate, 0.0)[channel]
        return run_communications(predecessors, fixed, channel, volume, flows)[0]

    def contended_seconds(self, channel: IntArray, begin: FloatArray, end: FloatArray) -> FloatArray:
        """Return how long each class of links was asked for more than it carries, ``(num_classes,)`` [s].

        ``channel``, ``begin`` and ``end`` are those of the communications, ``(num_communications,)``.
        """
        seconds = np.zeros(len(self.links))
        for place in range(len(self.links)):
            load = self.load[channel, place]
            on_link = load > 0.0
            times = np.concatenate([begin[on_link], end[on_link]])
            order = np.argsort(times, kind="stable")
            asked = np.cumsum(np.concatenate([load[on_link], -load[on_link]])[order])
            spans = np.diff(times[order])
            seconds[place] = spans[asked[:-1] > 1.0 + _ROUNDING].sum()
        return seconds
